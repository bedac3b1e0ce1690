"""The `[model]` table of a Wan run: its keys, their ranges and defaults."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
StorageDtype = Literal["float32", "bfloat16", "float16", "float8", "float8_e4m3fn", "float8_e5m2"]


def _expand(path: Path) -> Path:
    if path == Path():
        raise ValueError("is empty; write a path, or remove the key")
    return path.expanduser()


# strict mode takes no string for a Path; TOML has nothing else to give
FilePath = Annotated[Path, Field(strict=False), AfterValidator(_expand)]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


class WanModelConfig(BaseModel):
    """All keys of `[model]` for `type = "wan"`. Paths are relative to the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: Literal["wan"] = Field("wan", description="The model family.")

    ckpt_path: FilePath | None = Field(
        None,
        description="Checkpoint folder, official or diffusers' layout. Gives whatever no other key gives.",
    )
    transformer_path: FilePath | None = Field(
        None, description="Transformer from elsewhere: one safetensors or pth file, or a folder with its shards."
    )
    vae_path: FilePath | None = Field(None, description="VAE from elsewhere: a pth or safetensors file, or a folder.")
    llm_path: FilePath | None = Field(
        None, description="UMT5-XXL from elsewhere: a pth or safetensors file, or a transformers folder."
    )
    clip_path: FilePath | None = Field(
        None,
        description="CLIP image encoder from elsewhere: a pth or safetensors file, or a transformers folder. "
        "Wan2.1 I2V and FLF2V only.",
    )
    tokenizer_path: FilePath | None = Field(
        None, description="Folder with UMT5's tokenizer, where it lies neither in ckpt_path nor beside llm_path."
    )

    expert: Literal["high", "low", "both"] | None = Field(
        None,
        description="Which transformer of Wan2.2 A14B is trained: high noise, low noise, or both in turns. Read off "
        "transformer_path unless given.",
    )
    switch_every: int = Field(
        1, ge=1, description="Optimizer steps before the expert may change; expert = 'both' only. 1 or more."
    )
    high_noise_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of steps for the high-noise expert; expert = 'both' only. In (0, 1); the share of timesteps "
        "above the boundary unless given.",
    )
    i2v_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of clips trained as image to video, with a clean first frame; TI2V-5B only. 0 to 1.",
    )

    dtype: Dtype = Field("bfloat16", description="What matrix products run in, and what weights are kept in.")
    transformer_dtype: StorageDtype | None = Field(
        None,
        description="What the frozen Linear weights of the transformer's blocks are kept in; unless given dtype, and "
        "for scaled float8 (ComfyUI's fp8_scaled files) what the file has. float8 halves their memory; norms, biases, "
        "embeddings and modulation stay as they are.",
    )
    vae_dtype: Dtype | None = Field(None, description="What the VAE runs in while caching; dtype unless given.")

    save_layout: Literal["official", "diffusers"] = Field(
        "official", description="Names and folders under which a fully trained transformer is saved."
    )

    timestep_sample_method: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="Distribution of the timestep before the shift."
    )
    sigmoid_scale: float = Field(1.0, gt=0, description="Standard deviation of the logit; logit_normal only. Above 0.")
    shift: float | None = Field(
        None, gt=0, description="Static flow shift; above 1 trains more on noisy timesteps. Above 0; none unless given."
    )
    flux_shift: bool = Field(
        False, description="Shift that grows with width x height, as in FLUX; frames do not count."
    )
    min_t: float = Field(0.0, ge=0, lt=1, description="Lowest timestep trained on. In [0, 1), 1 is noise.")
    max_t: float = Field(1.0, gt=0, le=1, description="Highest timestep trained on. In (0, 1], 1 is noise.")

    cache_text_embeddings: bool = Field(
        True, description="Text is always encoded once and cached; only true is accepted."
    )
    text_max_length: int = Field(
        512, ge=1, le=512, description="Longest caption in tokens; the rest is cut off. 1 to 512, as Wan was trained."
    )

    @field_validator("dtype", "vae_dtype", mode="before")
    @classmethod
    def _no_float8_compute(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("float8"):
            raise ValueError(f"{value} is for stored weights only: set transformer_dtype = {value!r} instead")
        return value

    @field_validator("cache_text_embeddings")
    @classmethod
    def _text_is_cached(cls, value: bool) -> bool:
        if not value:
            raise ValueError("text is always cached; remove the key")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "WanModelConfig":
        if self.shift is not None and self.flux_shift:
            raise ValueError("shift and flux_shift exclude each other; remove one")
        if self.min_t >= self.max_t:
            raise ValueError(f"min_t = {self.min_t} must be below max_t = {self.max_t}")
        if not (self.ckpt_path or self.transformer_path):
            raise ValueError("ckpt_path is missing: the folder of a Wan checkpoint, such as models/Wan2.1-T2V-1.3B")
        self._check_turns()
        return self

    def _check_turns(self) -> None:
        """What belongs to `expert = "both"`, and what does not go with it."""
        both = self.expert == "both"
        own = {"switch_every": self.switch_every, "high_noise_share": self.high_noise_share}
        for key, value in own.items():
            if value != WanModelConfig.model_fields[key].default and not both:
                raise ValueError(f"{key} = {value} is for two experts in turns; set expert = 'both', or remove {key}")
        if both and (self.transformer_path or not self.ckpt_path):
            raise ValueError(
                f"expert = 'both' takes two transformers out of ckpt_path, and transformer_path = "
                f"'{self.transformer_path}' is one; remove transformer_path, or train one expert after the other"
            )
        if both and self.flux_shift and self.high_noise_share is None:
            raise ValueError(
                "flux_shift = true makes the experts' share of steps differ from bucket to bucket; set "
                "high_noise_share, or use a static shift"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products run in."""
        return DTYPES[self.dtype]

    @property
    def linear_dtype(self) -> torch.dtype:
        """What frozen Linear weights of the blocks are kept in."""
        return DTYPES[self.transformer_dtype or self.dtype]

    @property
    def clip_dtype(self) -> torch.dtype:
        """What CLIP runs in: float16 as officially, unless all is to be exact."""
        return torch.float32 if self.compute_dtype == torch.float32 else torch.float16

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What the VAE runs in."""
        return DTYPES[self.vae_dtype or self.dtype]
