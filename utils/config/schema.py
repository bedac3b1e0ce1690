"""The schema of the run TOML: one typed field a key, its meaning and unit in the docstring under it."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, model_validator

from utils.config.fields import (
    BatchSize,
    Cadence,
    ClipMode,
    Count,
    ExpertPaths,
    FloatDtype,
    Lax,
    Table,
    UserPath,
    checked,
    not_yet,
    refusal,
)

COMMAND_LINE = "remove it and give --{0} on the command line"

Fraction = Annotated[float, Field(ge=0, lt=1)]
Checkpointing = Annotated[
    bool | str,
    checked(
        lambda value: isinstance(value, bool) or value in ("unsloth", "offload"),
        "is not known; use true, false, 'unsloth' or 'offload' (both keep what is saved in host memory)",
    ),
]


SPIKE_FACTOR = "is no factor; use a number above 1, or 0 to be told of none"
EXIT_CODE = "is no status to leave with; use 0, or a number from 64 to 113 such as 85: the others have a meaning"


def _is_spike_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (value == 0 or 1 < value < math.inf)


def _is_exit_code(value: Any) -> bool:
    return type(value) is int and (value == 0 or 64 <= value <= 113)  # what sysexits.h and shells leave to programs


MOST_EVAL_DATASETS = 100
MOST_NAME = 100  # characters: it becomes part of a file's name


def _eval_name(name: str) -> str:
    if not name or name == "train" or set(name) & set("/\\"):
        raise ValueError("cannot name a graph; use a name without slashes that is not 'train'")
    if not name.isprintable() or len(name) > MOST_NAME:
        raise ValueError(f"cannot name a graph and a file; use a name of one line and {MOST_NAME} letters at most")
    return name


class EvalDataset(Table):
    """One held-out set. A plain string in `eval_datasets` is the path, and the file's stem is the name."""

    name: Annotated[str, AfterValidator(_eval_name)]
    """Where its losses are shown: `<name>/loss`."""
    config: UserPath
    """Its dataset TOML."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"name": Path(value).stem, "config": value} if isinstance(value, str) else value


def _formats(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    known = isinstance(names, (list, tuple)) and all(name in get_args(SaveFormat) for name in names)
    if not known or not names or len(set(names)) < len(names):
        raise ValueError("is not known; use 'comfyui', 'diffusers', 'kohya', or a list of them, each once")
    return tuple(names)


SaveFormat = Literal["comfyui", "diffusers", "kohya"]


class FusedAdapter(Table):
    """One entry of `fuse_adapters`."""

    path: UserPath
    """A saved adapter (file or folder), of any type and format."""
    weight: float = 1.0
    """What it counts. 1 merges it as it was trained; below 0 takes it away."""
    expert: str = ""
    """Whose weights it is merged into, `high_noise` or `low_noise`. Only where both experts are trained."""


class AdapterConfig(Table):
    """`[adapter]`: what is trained on top of the frozen model. Without this table the whole model is trained."""

    type: Annotated[
        str,
        checked(
            lambda value: value in ("lora", "dora", "lokr"),
            "is not known; use 'lora', 'dora' or 'lokr', or remove [adapter] to train all weights",
        ),
    ]
    """`lora`, `dora` (a LoRA whose length of each row is trained apart) or `lokr` (a Kronecker product)."""
    rank: Count
    """Inner width of the adapter's matrices.

    The second matrix of a LoKr is whole, and has no inner width, where rank is half its longer side or more."""
    alpha: Annotated[float, Field(gt=0)] = None  # type: ignore[assignment]  # filled from rank below
    """The adapter is scaled by alpha / rank. Default: rank, which is a scale of 1."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs zeroed while training; `lora` and `dora` only."""
    factor: Annotated[
        int,
        checked(
            lambda value: value == -1 or (type(value) is int and value >= 1),
            "is not a factor; use a whole number of 1 or more, or -1 for the most even cut",
        ),
    ] = -1
    """Side of the first matrix of a LoKr, at most; -1 makes both matrices as equal as can be. `lokr` only."""
    decompose_both: bool = False
    """Give the first matrix of a LoKr a rank too, where it is large enough. `lokr` only."""
    dtype: FloatDtype = "float32"
    """What the adapter's weights are kept and trained in."""
    exclude_modules: Annotated[tuple[str, ...], Lax] = ()
    """Modules left without an adapter: a part of their names, or a regular expression."""
    init_from_existing: ExpertPaths | None = None
    """A saved adapter (file or folder) to start from; where two experts are trained, a table with one for each."""
    save_format: Annotated[tuple[SaveFormat, ...], BeforeValidator(_formats)] = ("comfyui",)
    """What it is saved for: `comfyui`, `diffusers`, `kohya`, or a list of them."""
    fuse_adapters: Annotated[tuple[FusedAdapter, ...], Lax] = ()
    """The same as fuse_adapters at the top of the file, where diffusion-pipe has it."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_rank(cls, value: Any) -> Any:
        rank = value.get("rank") if isinstance(value, dict) else None
        if isinstance(rank, int) and rank >= 1 and "alpha" not in value:
            return {**value, "alpha": rank}
        return value


class OptimizerConfig(Table, extra="allow"):
    """`[optimizer]`: keys that are not listed here go to the optimizer's own class."""

    type: Annotated[str, Field(min_length=1)]
    """adamw, adamw_optimi, stableadamw, adamw8bit, sgd, lion, prodigy, or any class of pytorch-optimizer."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Never applied to tensors of one dimension. Default: what the optimizer's class has."""
    betas: Annotated[tuple[Fraction, ...], Lax] | None = None
    """Decay of the running means. Default: what the optimizer's class has."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the denominator. Default: what the optimizer's class has."""
    gradient_release: Annotated[bool, not_yet(False)] = False
    """diffusion-pipe: a step inside the backward pass. Not supported yet."""
    beta2_half_life: Annotated[float | None, not_yet(None, "remove it and give betas")] = None
    """diffusion-pipe: the second beta from a number of examples. Not supported yet."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes to the optimizer's class as it was written: all but `type`, `lr` and `weight_decay`."""
        named = {key: value for key in ("betas", "eps") if (value := getattr(self, key)) is not None}
        return {**named, **(self.model_extra or {})}


class MonitoringConfig(Table):
    """`[monitoring]`: Weights & Biases beside TensorBoard and metrics.jsonl, which are always written."""

    enable_wandb: bool = False
    """Send the numbers to Weights & Biases too."""
    wandb_api_key: Annotated[SecretStr, Lax] = SecretStr("")
    """Better kept in the environment variable WANDB_API_KEY. Never written to any output."""
    wandb_tracker_name: str = ""
    """Project name. Default: reelpipe."""
    wandb_run_name: str = ""
    """Default: the name of the run folder."""


class RunConfig(Table):
    """The top-level keys of the run TOML, and its tables apart from `[model]`, which belongs to the family."""

    output_dir: UserPath
    """Every start makes a run folder in here, named by its UTC time."""
    dataset: UserPath
    """Dataset TOML of the training data."""
    eval_datasets: Annotated[tuple[EvalDataset, ...], Lax, Field(max_length=MOST_EVAL_DATASETS)] = ()
    """Held-out sets: `{name = '...', config = '...'}` tables, or paths."""
    cache_dir: UserPath = None  # type: ignore[assignment]  # filled from output_dir below
    """Encoded latents and captions. Content-addressed, so several runs may share it. Default: `<output_dir>/cache`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Order of the data, noise, timesteps, caption dropout and LoRA initialisation all derive from it."""
    eval_seed: Annotated[int, Field(ge=0)] = 42
    """Noise of the evaluation. Losses of runs with equal values can be compared."""

    epochs: Count
    """Passes over the dataset, in total, resumed ones included."""
    max_steps: Cadence = None
    """Stop after this many optimizer steps, if that comes first."""
    micro_batch_size_per_gpu: BatchSize | None = None
    """Clips in one forward pass of one data rank; or `[[resolution, batch], ...]`, the nearest resolution counts.
    Default: 1, or what max_tokens_per_gpu makes of it."""
    image_micro_batch_size_per_gpu: BatchSize | None = None
    """The same for images. Default: micro_batch_size_per_gpu."""
    max_tokens_per_gpu: Cadence = None
    """Tokens in one forward pass of one data rank, in place of the two above: as many clips of a bucket as fit in, one
    at least, so that images and long clips cost about alike."""
    pipeline_stages: Count = 1
    """Devices that one copy of the model is spread over."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches in one optimizer step; they fill the pipeline."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient of all trained weights together. 0 turns clipping off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows where loss or gradient of a step are NaN or infinite: end with a checkpoint, or leave the step out.
    Either way no weight was changed by it."""
    max_nonfinite: Annotated[int, Field(ge=0, le=99)] = 10
    """With `on_nonfinite = 'skip'`: steps of any 100 that may be left out; one more ends the run."""
    loss_spike_factor: Annotated[float, checked(_is_spike_factor, SPIKE_FACTOR)] = 10.0
    """Warn, with the samples, of a step whose loss is above so many times the running mean. 0 never warns."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from near zero."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; linear and cosine end at zero."""
    force_constant_lr: Annotated[float, Field(gt=0)] | None = None
    """This learning rate from now on, whatever optimizer, schedule and checkpoint say."""
    pseudo_huber_c: Annotated[float, Field(gt=0)] | None = None
    """Pseudo-Huber loss with this c in place of the squared error."""
    uncond_fraction: Fraction = 0.0
    """Share of samples trained with an empty caption."""

    eval_every_n_epochs: Cadence = None
    """Evaluate after every so many epochs."""
    eval_every_n_steps: Cadence = None
    """Evaluate after every so many optimizer steps."""
    eval_every_n_examples: Cadence = None
    """Evaluate after every so many clips seen."""
    eval_before_first_step: bool = True
    """Evaluate the untrained model too, so that there is something to compare with."""
    eval_micro_batch_size_per_gpu: BatchSize | None = None
    """Default: as in training. Changes the speed, never the losses."""
    image_eval_micro_batch_size_per_gpu: BatchSize | None = Field(
        default=None,
        validation_alias=AliasChoices("image_eval_micro_batch_size_per_gpu", "eval_image_micro_batch_size_per_gpu"),
    )
    """The same for images. Default: eval_micro_batch_size_per_gpu."""
    eval_gradient_accumulation_steps: Count = 1
    """diffusion-pipe: micro-batches sent through the pipeline together when evaluating. Accepted, without effect: here
    it is all of them."""

    save_every_n_epochs: Cadence = None
    """Save the LoRA or model after every so many epochs, to `epochN/`."""
    save_every_n_steps: Cadence = None
    """Save the LoRA or model after every so many optimizer steps, to `stepN/`."""
    save_every_n_examples: Cadence = None
    """Save the LoRA or model after every so many clips seen, to `stepN/`."""
    checkpoint_every_n_epochs: Cadence = None
    """Write the whole training state after every so many epochs, to `global_stepN/`."""
    checkpoint_every_n_minutes: Annotated[float, Field(gt=0)] | None = None
    """Write the whole training state after every so many minutes, to `global_stepN/`."""
    max_runtime_minutes: Annotated[float, Field(gt=0)] | None = None
    """End with a checkpoint so that the whole job, caching included, takes no longer: for time-limited queues."""
    requeue_exit_code: Annotated[int, checked(_is_exit_code, EXIT_CODE)] = 0
    """Exit status of a run that max_runtime_minutes or SIGUSR1 has ended, for a job script that queues it again."""
    keep_last: Cadence = None
    """Checkpoints kept; older ones are deleted once a newer one is complete. Default: all. Saved models always stay."""
    save_dtype: FloatDtype | None = None
    """What saved weights are written in. Default: what they are trained in."""

    activation_checkpointing: Checkpointing = False
    """Recompute each block in the backward pass; `unsloth` and `offload` also keep blocks' inputs in host memory."""
    reentrant_activation_checkpointing: bool = False
    """diffusion-pipe's other recomputation method. Not needed here: accepted, without effect."""
    partition_method: Literal["parameters", "uniform", "manual"] = "parameters"
    """How layers are spread over the stages: equal weights, equal counts, or at `partition_split`."""
    partition_split: Annotated[tuple[int, ...], Lax] | None = None
    """First layer of every stage but the first."""
    compile: bool = False
    """torch.compile on the blocks."""
    blocks_to_swap: Annotated[int, not_yet(0)] = 0
    """diffusion-pipe: blocks kept in host memory. Not supported yet."""
    disable_block_swap_for_eval: bool = False
    """diffusion-pipe: goes with blocks_to_swap. Accepted, without effect."""

    caching_batch_size: Count = 1
    """Clips or captions encoded together while caching."""
    map_num_proc: Cadence = None
    """Processes that decode while caching, for each rank's device. Default: 8, or the number of cores where fewer."""
    decode_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that decoding one clip may take before it counts as unreadable."""
    cache_ram_gb: Annotated[float, Field(gt=0)] | None = None
    """GiB of host memory for decoded clips and decoders while caching, for all ranks of a machine. Default: a quarter
    of what is free."""
    video_clip_mode: ClipMode = "single_beginning"
    """Which part of a video that is longer than its bucket is used; a dataset TOML may set its own."""
    skip_bad_media: bool = False
    """Go on without files that cannot be read, listed by name. Otherwise they stop the start."""

    stall_timeout_s: Annotated[float, Field(ge=0)] = 600.0
    """End the run, with everyone's stacks, when no rank has moved for so many seconds. 0 waits for ever.

    Compiling, reading all weights and saving may take six times as long."""

    steps_per_print: Count = 1
    """Console: a line every so many steps where the output is no terminal."""
    logging_steps: Count = 1
    """TensorBoard, metrics.jsonl and wandb: numbers every so many steps."""
    x_axis_examples: bool = False
    """Draw the graphs over clips seen in place of steps."""

    huggingface_repo: Annotated[str, not_yet("")] = ""
    """diffusion-pipe: upload what is saved. Not supported yet."""
    upload_hf_from_epoch: Annotated[int | None, not_yet(None)] = None
    """diffusion-pipe: goes with huggingface_repo. Not supported yet."""
    huber_delta: Annotated[float | None, not_yet(None, "use pseudo_huber_c")] = None
    """diffusion-pipe: Huber loss. Not supported yet."""
    smooth_l1_beta: Annotated[float | None, not_yet(None, "use pseudo_huber_c")] = None
    """diffusion-pipe: smooth L1 loss. Not supported yet."""
    max_checkpoints: Annotated[
        int, not_yet(0, "use keep_last, which deletes old checkpoints and never saved models")
    ] = 0
    """diffusion-pipe: deletes old checkpoints and old models alike. Not supported."""
    resume_from_checkpoint: Annotated[Any, not_yet(False, COMMAND_LINE.format("resume_from_checkpoint"))] = False
    """A flag of the command line."""
    regenerate_cache: Annotated[Any, not_yet(False, COMMAND_LINE.format("regenerate_cache"))] = False
    """A flag of the command line."""

    fuse_adapters: Annotated[tuple[FusedAdapter, ...], Lax] = ()
    """Adapters merged into the model before training: `[{path = '...', weight = 1.0}]`, in this order."""

    adapter: AdapterConfig | None = None
    optimizer: OptimizerConfig
    monitoring: MonitoringConfig = MonitoringConfig()

    @model_validator(mode="before")
    @classmethod
    def _cache_beside_runs(cls, value: Any) -> Any:
        if isinstance(value, dict) and "cache_dir" not in value and isinstance(value.get("output_dir"), str):
            wrong = refusal(Path(value["output_dir"]))  # told once, of output_dir
            return {**value, "cache_dir": "cache" if wrong else str(Path(value["output_dir"]) / "cache")}
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_by_one(cls, value: Any) -> Any:
        sizes = ("micro_batch_size_per_gpu", "max_tokens_per_gpu")
        written = isinstance(value, dict) and any(value.get(key) is not None for key in sizes)
        return {**value, sizes[0]: 1} if isinstance(value, dict) and not written else value

    @property
    def fused(self) -> tuple[FusedAdapter, ...]:
        """`fuse_adapters`, from whichever of its two places."""
        return self.fuse_adapters or (self.adapter.fuse_adapters if self.adapter else ())

    def micro_batch_size(self, width: int, height: int, frames: int, tokens: int, *, evaluating: bool = False) -> int:
        """Samples in one forward pass of a bucket of `width` x `height` px and `frames` frames.

        With `[[resolution, batch], ...]` the resolution nearest to sqrt(width * height) counts, the smaller on a tie.

        Args:
            tokens: of one of its samples inside the model, for `max_tokens_per_gpu`.
        """
        setting = self.micro_batch_size_per_gpu
        image = self.image_micro_batch_size_per_gpu
        if evaluating:
            setting = setting if self.eval_micro_batch_size_per_gpu is None else self.eval_micro_batch_size_per_gpu
            image = self.image_eval_micro_batch_size_per_gpu
        if frames == 1 and image is not None:
            setting = image
        if setting is None:
            assert self.max_tokens_per_gpu is not None, "filled in where neither was written"
            return max(1, self.max_tokens_per_gpu // tokens)
        if isinstance(setting, int):
            return setting
        side = math.sqrt(width * height)
        return min(setting, key=lambda pair: (abs(pair[0] - side), pair[0]))[1]
