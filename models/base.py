"""The interface that a model family must meet, and the few values that cross it.

Legend used across the tree: B micro-batch, C latent channels, F pixel frames, T latent frames, H W latent height and
width, h w pixels, L tokens, S caption tokens, D width. t and sigma lie in [0, 1] and **1 is noise**.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class MediaSpec(NamedTuple):
    """What a family asks of the pixels it is fed."""

    fps: Fraction  # frames a second that the model was trained at
    pixel_multiple: int  # both sides of a bucket are multiples of this, px
    frame_stride: int  # a clip has frame_stride * k + 1 frames
    images: bool  # whether a clip of one frame can be trained on
    latent_stride: int = 8  # px, both ways, that one cell of the latents stands for

    def nearest_side(self, length: float) -> int:
        """The side, px, that a clip gets where `length` was asked for."""
        return max(1, round(length / self.pixel_multiple)) * self.pixel_multiple


class Outline(NamedTuple):
    """What can be told of a model before its weights are there: enough to count clips, steps and bytes.

    Sizes are (width px, height px, frames).
    """

    title: str
    media: MediaSpec
    tokens: Callable[[int, int, int], int]  # length of one sample inside the model
    cache_bytes: Callable[[int, int, int], Mapping[str, int]] | None = None  # what a clip takes, by kind of encoder
    caption_token_bytes: int = 0  # what a token of a caption takes in the cache
    max_caption_tokens: int | None = None  # the rest of a caption is cut off
    count_caption_tokens: Callable[[str], int] | None = None  # None where there is no tokenizer
    notes: Sequence[str] = ()  # what was assumed, and what the start will find missing


class Draw(NamedTuple):
    """The randomness of one sample in one step, made from counters and never from process state."""

    quantile: float  # place on the timestep distribution, in (0, 1)
    seed: int  # seed of the noise
    choice: float = 0.5  # uniform in (0, 1), for a family that trains several tasks: which one this sample is


class ClipEnds(NamedTuple):
    """What an encoder of conditions sees of a clip."""

    pixels: Any  # uint8 [2, h, w, 3]: the first and the last frame
    frames: int  # of the whole clip


class MicroBatch(NamedTuple):
    """One forward pass: tensors for the first stage and tensors for the last. No None, B first in every tensor.

    `target[0]` is what the prediction is held against and has its shape: of samples that hold an adapter to what the
    model knew without it, its rows are replaced by the model's own prediction. Whatever else a loss needs, such as
    weights of its elements, comes after it and stays.
    """

    inputs: tuple[Tensor, ...]
    target: tuple[Tensor, ...]
    weights: Tensor = torch.ones(1)  # [B] float32, or [1]: what each sample's loss counts. Never set by a family


class NotFiniteError(ValueError):
    """What an encoder made of an item holds NaN or infinity; says which setting would help."""


class Encoder(ABC):
    """A frozen network that runs once a sample, while caching. Made cheap; `load` brings the weights."""

    kind: ClassVar[str]  # the cache folder: "latents", "text", "condition", "image"; no two encoders share one
    reads: ClassVar[Literal["pixels", "ends", "caption", "mask"]]

    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """Every setting that changes the output, JSON-able. Weight files are listed as `{"files": [str path, ...]}`;
        whoever makes the cache key hashes their content."""

    def check(self) -> None:  # noqa: B027 (nothing to look at is fine)
        """Look at the files, quickly and without loading them; `ValueError` where they cannot be used."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Bring the weights to `device`."""

    @abstractmethod
    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """One dict of CPU tensors an item; a sample is the merged dicts of all encoders, so their keys differ.

        `NotFiniteError` where an item comes out with NaN or infinity: it alone is left out then.

        `reads == "pixels"`: items are uint8 arrays or tensors [F, h, w, 3] of one shape.
        `reads == "ends"`: items are `ClipEnds` of one shape and length.
        `reads == "caption"`: items are strings.
        `reads == "mask"`: items are uint8 arrays [T, H, W] on the grid of the latents. No family has such an encoder.
        """

    @abstractmethod
    def unload(self) -> None:
        """Drop the weights and give the device its memory back."""


class Merge(NamedTuple):
    """What a file adds to a model that it is merged into."""

    adapter: Mapping[str, Tensor]  # by plain names (`models.adapters`), alpha folded in
    differences: Mapping[str, Tensor]  # by the skeleton's names of parameters, of their shapes


class Activations(NamedTuple):
    """Bytes that one sample keeps on its device from the forward pass to the backward pass, as a formula has them."""

    boundary: int  # what a block hands on: all that is kept of a block that is recomputed
    block: int  # what a block keeps that is not recomputed, its input included
    head: int  # what the layers after the last block keep


class WeightSource(Protocol):
    """Tensors of a checkpoint under the skeleton's names, whatever the layout on disk."""

    def names(self) -> set[str]: ...

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU; only this one is read from disk."""


class ModelFamily(ABC):
    """All that the trainer knows of a model. Holds settings, never weights, so it pickles.

    `Config` is the pydantic model of the `[model]` table. The constructor may read small files (config.json) and tensor
    headers, raises `ValueError` or `FileNotFoundError` naming the key and the mend, and loads no weights.
    """

    Config: ClassVar[type]

    @classmethod
    def outline(cls, config: Any) -> Outline:
        """What `--plan` counts with. This one needs the weights; a family that can do without them has its own."""
        family = cls(config)
        return Outline(family.title, family.media_spec(), family.tokens)

    @property
    @abstractmethod
    def title(self) -> str:
        """What was found, for the banner: `Wan2.1 T2V 1.3B`."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """What matrix products run in (`[model] dtype`)."""

    @abstractmethod
    def media_spec(self) -> MediaSpec: ...

    @abstractmethod
    def tokens(self, width: int, height: int, frames: int) -> int:
        """Length of one sample inside the model; sides in px."""

    @abstractmethod
    def encoders(self) -> Sequence[Encoder]:
        """In the order they should run; never two loaded at once."""

    def blank_sample(self, width: int, height: int, frames: int) -> dict[str, Tensor] | None:
        """A merged cache entry of made-up numbers, of the shapes and dtypes that a clip of that bucket (px, frames) has
        with the longest caption; None where that is not known without a clip."""
        return None

    def activations(self, width: int, height: int, frames: int, adapter: str | None, rank: int) -> Activations | None:
        """What a clip of that bucket (px, frames) with the longest caption takes while a step is under way, for the
        estimate before the start; None where nobody has worked it out.

        Args:
            adapter: its kind (`models.adapters.KINDS`), with its rank; None where all weights are trained.
        """
        return None

    def trial(self) -> "ModelFamily":
        """The same family with a network as small as can be, whose layers, dtypes and widths of attention heads are
        those of the real one: with made-up weights it shows whether a device runs the model's code. This one, where
        there is none smaller."""
        return self

    @abstractmethod
    def micro_batch(self, samples: Sequence[Mapping[str, Tensor]], draws: Sequence[Draw]) -> MicroBatch:
        """`samples` are merged cache entries of one bucket (CPU tensors), `draws` one a sample."""

    def timesteps(self, batch: MicroBatch) -> list[float]:
        """t of each sample of `micro_batch`, for messages. Here the second input is taken for it, [B] or, where parts
        of a sample have their own, [B, ...], of which the largest counts."""
        return batch.inputs[1].flatten(1).amax(1).tolist() if batch.inputs[1].ndim > 1 else batch.inputs[1].tolist()

    @abstractmethod
    def build_skeleton(self) -> nn.Module:
        """The whole model, parameters on meta and buffers real."""

    @abstractmethod
    def pipeline_layers(self, skeleton: nn.Module) -> list[nn.Module]:
        """The skeleton cut into layers that run one after another: tuple of tensors in, tuple out; the last returns the
        prediction. Layers keep the skeleton's own modules, so names can be looked up there. A layer with attribute
        `checkpointable = True` may be recomputed in the backward pass."""

    @abstractmethod
    def open_weights(self) -> WeightSource:
        """Raises `ValueError` with counts, first names and file for missing, unexpected or mis-shaped tensors."""

    @abstractmethod
    def storage_dtype(self, name: str) -> torch.dtype:
        """What the skeleton's parameter `name` is kept in while it is frozen."""

    @abstractmethod
    def lora_targets(self, skeleton: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
        """Names of the Linear modules that get an adapter, less those that an entry of `exclude` matches; an entry that
        matches nothing is a `ValueError`."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        """One loss a sample, float32 [B]. Means over samples are taken by whoever knows the global batch."""

    @abstractmethod
    def save_adapter(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        metadata: Mapping[str, str],
        formats: Sequence[str] = (),
        weights: WeightSource | None = None,
    ) -> list[Path]:
        """Write the adapter for other programs, a file a format; no formats means the family's first.

        `weights` are those that it was trained on, where they are not the checkpoint's own: a format may count from
        their norms.

        Keys are `<module name>.<part>` under the skeleton's module names, parts as `models.adapters` lists them;
        metadata goes into the safetensors header (rank and alpha are in it)."""

    @abstractmethod
    def load_adapter(self, path: Path, weights: WeightSource | None = None) -> dict[str, Tensor]:
        """The inverse of `save_adapter`, alpha folded in, from a file or a folder, in any format."""

    def load_merge(self, path: Path, weights: WeightSource | None = None) -> Merge:
        """The same for `fuse_adapters`, which takes more than can be trained: modules that get no adapter here, and
        whole differences of parameters."""
        return Merge(self.load_adapter(path, weights), {})

    def check_formats(self, kind: str, formats: Sequence[str]) -> None:  # noqa: B027 (all formats may hold all kinds)
        """Raise `ValueError` where `save_adapter` could not write an adapter of `kind` (`models.adapters.KINDS`) in one
        of `formats`; asked before training."""

    def experts(self) -> Mapping[str, "ModelFamily"]:
        """Models that are trained in turns on the same data, each with an adapter and an optimizer of its own, by the
        suffix of their files. Most families are one model, which has none."""
        return {"": self}

    def expert_at(self, step: int) -> str:
        """Which of `experts` takes optimizer step `step` (from 0). A pure function: every rank and every resumed run
        comes to the same. It never changes within a step, whose gradients belong to one model."""
        return ""

    def expert_shares(self) -> Mapping[str, float]:
        """Share of the steps, in the long run, that each of `experts` takes; the sum is 1. Unless the user chose it, it
        is the share of the timestep distribution. The losses of held-out data are weighted with it."""
        return {"": 1.0}

    @abstractmethod
    def save_full(self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
        """Write the whole model under the names its official code reads."""
