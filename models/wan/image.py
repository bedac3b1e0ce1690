"""The first frame of a clip, or the first and the last, to the states of CLIP's penultimate layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.base import ClipEnds, Encoder, NotFiniteError
from models.wan.encoder_keymaps import IMAGE, IMAGE_TOWER
from models.wan.frozen import fill_frozen, free_memory, frozen_files, odd_shapes_told
from models.wan.identify import IMAGE_KEY, hint_for
from models.wan.vae import to_pixels
from models.weights import WeightReader

WHAT = "CLIP image encoder"
VERSION = 1  # of the arithmetic below; a change makes old cache entries stale
STEM = "model"  # of the files in a transformers folder
OFFICIAL_MARK = "visual."  # begins the tower's names in official files
HEAD_DIM = 80  # of ViT-H/14, whatever its width; no file says it
MOST_BLOCKS = 1000  # a file that says more would take days to build
VIT_H = {"width": 1280, "feed_forward": 5120, "layers": 32, "patch": 14, "positions": 257}

# Of the colours in [0, 1] that CLIP was trained on; the official Wan2.1 clip.py has them from OpenAI's CLIP.
COLOUR_MEAN = (0.48145466, 0.4578275, 0.40821073)
COLOUR_STD = (0.26862954, 0.26130258, 0.27577711)

# Parts of larger files that the penultimate states do not need: the text side, what turns states into similarities,
# and a buffer that old versions of transformers saved.
IGNORED = ("textual.", "log_scale", "visual.head", "text_model.", "text_projection.", "logit_scale")
IGNORED += ("visual_projection.", "embeddings.position_ids")

FUSED = "qkv_proj"  # IMAGE's name for the official q, k and v in one tensor, in this order
FUSED_PARTS = ("q_proj", "k_proj", "v_proj")


class WanImageEncoder(Encoder):
    """The image side of open-clip's XLM-RoBERTa ViT-H/14 up to its last block but one, without a norm, as Wan2.1's
    official clip.py runs it. The frame is squeezed to a square, not cropped.

    Reads official names (`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`) and transformers' (ComfyUI's
    `clip_vision_h.safetensors`, or `image_encoder/`).
    """

    kind: ClassVar[str] = "image"
    reads: ClassVar[Literal["pixels", "ends", "caption"]] = "ends"

    def __init__(self, path: Path, dtype: torch.dtype, both_ends: bool) -> None:
        """
        Args:
            path: a .pth or .safetensors file, or a transformers folder.
            dtype: what the network is held and run in, and what its states are stored in. Officially float16.
            both_ends: encode the last frame too (FLF2V).
        """
        self.path = path
        self.dtype = dtype
        self.both_ends = both_ends
        self._device = torch.device("cpu")
        self._tower: nn.Module | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "encoder": "clip-vit-h-14",
            "version": VERSION,
            "frames": "first and last" if self.both_ends else "first",
            "dtype": str(self.dtype),
            "files": [str(file) for file in frozen_files(self.path, STEM, WHAT)],
        }

    def check(self) -> None:
        """Compare names and shapes of the tensors on disk with the network's, without loading them.

        Raises:
            FileNotFoundError: the path is wrong.
            ValueError: tensors are missing, mis-shaped or of another CLIP.
        """
        self._skeleton()

    def load(self, device: torch.device) -> None:
        tower, reader = self._skeleton()
        fill_frozen(tower, reader, device, self.dtype)
        # a buffer that no file has, so it is still on meta
        positions = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.position_ids = torch.arange(positions, device=device)[None]
        self._tower, self._device = tower, device

    def encode(self, items: Sequence[ClipEnds]) -> list[dict[str, Tensor]]:
        """`{"image": [257, 1280]}` an item, the class token first; with `both_ends` [514, 1280], those of the
        first frame before those of the last.

        Raises:
            NotFiniteError: the network returned infinities or NaN, which float16 can do.
        """
        frames = torch.stack([torch.as_tensor(item.pixels) for item in items])
        assert frames.shape[1] == 2, f"the first and the last frame wanted, got {frames.shape[1]}"
        pixels = to_pixels(frames if self.both_ends else frames[:, :1], self._device, torch.float32)
        states = self.encode_frames(pixels.transpose(1, 2).flatten(0, 1)).cpu()
        if not states.isfinite().all():
            raise NotFiniteError(f"{WHAT} {self.path}: states are not finite in {self.dtype}; use bfloat16 or float32")
        # clone: a slice would keep, and save, the whole batch
        return [{"image": one.flatten(0, 1).clone()} for one in states.unflatten(0, (len(items), -1))]

    @torch.no_grad()
    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Frames [N, 3, h, w] in [-1, 1] on the device -> states [N, 257, 1280] there, in `dtype`."""
        assert self._tower is not None, "encode before load"
        size = self._tower.config.image_size
        squeezed = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", align_corners=False)
        mean, std = torch.tensor([COLOUR_MEAN, COLOUR_STD], device=pixels.device)[:, :, None, None]
        colours = (squeezed * 0.5 + 0.5 - mean) / std
        return self._tower(colours.to(self.dtype)).last_hidden_state

    def unload(self) -> None:
        self._tower = None
        free_memory(self._device)

    def _skeleton(self) -> tuple[nn.Module, "TowerReader"]:
        """The network on `meta`, without its last block, and the reader that fits it."""
        files = frozen_files(self.path, STEM, WHAT)
        reader = WeightReader(files, IMAGE, WHAT, identify=hint_for(IMAGE_KEY))
        if not any(name.startswith(OFFICIAL_MARK) for name in reader.stored_names()):
            reader = WeightReader(files, IMAGE_TOWER, WHAT, identify=hint_for(IMAGE_KEY))
        with odd_shapes_told(WHAT, reader), torch.device("meta"):
            # out of the larger model: older versions of transformers wrap the tower alone once more
            tower = CLIPVisionModelWithProjection(vision_config(reader)).vision_model
        tower_reader = TowerReader(reader, tower)
        tower_reader.check()
        return tower, tower_reader


class TowerReader:
    """A tower's tensors in the shapes of transformers; meets `models.base.WeightSource`.

    The official file has q, k and v of a block in one tensor, and embeddings with leading axes of length 1.
    """

    def __init__(self, reader: WeightReader, tower: nn.Module) -> None:
        self._reader = reader
        self._stored = reader.shapes()
        self._needed = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}

    def names(self) -> set[str]:
        return set(self._needed)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in the tower's shape."""
        source, third = self._source(name)
        tensor = self._reader.read(source)
        if third is not None:
            tensor = tensor.chunk(len(FUSED_PARTS))[third]
        return tensor.reshape(self._needed[name])

    def check(self) -> None:
        """`WeightReader.check` in terms of what the file should hold."""
        expected = {}
        for name, shape in self._needed.items():
            source, third = self._source(name)
            if third is not None:
                shape = (len(FUSED_PARTS) * shape[0], *shape[1:])
            stored = self._stored.get(source, shape)
            expected[source] = stored if _without_ones(stored) == _without_ones(shape) else shape
        last_block = f"encoder.layers.{_num_blocks(self._stored) - 1}."
        ignored = {name: shape for name, shape in self._stored.items() if name.startswith((*IGNORED, last_block))}
        self._reader.check(ignored | expected)

    def _source(self, name: str) -> tuple[str, int | None]:
        """The reader's name of what holds `name`, and which third of it, or None for all."""
        for third, part in enumerate(FUSED_PARTS):
            fused = name.replace(f".{part}.", f".{FUSED}.")
            if fused != name and fused in self._stored:
                return fused, third
        return name, None


def vision_config(reader: WeightReader) -> CLIPVisionConfig:
    """Sizes from tensor shapes; ViT-H/14's where a tensor is absent, so that the check names it. One block fewer than
    the file has: its output is what Wan wants.

    Raises:
        ValueError: a CLIP of another kind.
    """
    shapes = reader.shapes()
    *_, width = shapes.get("embeddings.class_embedding", (VIT_H["width"],))
    *_, patch = shapes.get("embeddings.patch_embedding.weight", (VIT_H["patch"],))
    *_, positions, _ = shapes.get("embeddings.position_embedding.weight", (VIT_H["positions"], width))
    if width % HEAD_DIM:
        raise ValueError(
            f"{WHAT} {reader.location}: {width} wide, so it is not the ViT-H/14 that Wan was trained with; "
            "use models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or ComfyUI's clip_vision_h.safetensors"
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes.get("encoder.layers.0.mlp.fc1.bias", (VIT_H["feed_forward"],))[0],
        num_hidden_layers=_num_blocks(shapes) - 1,
        num_attention_heads=width // HEAD_DIM,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",  # open-clip's; OpenAI's own towers have quick_gelu
    )


def _num_blocks(shapes: Mapping[str, Sequence[int]]) -> int:
    """Blocks in the file, the one that is not run included."""
    numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")}
    blocks = max(numbers) + 1 if numbers else VIT_H["layers"]
    if blocks > MOST_BLOCKS:
        raise ValueError(f"there is a block of number {blocks - 1}")
    return blocks


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]
