"""Pixels to Wan2.1's normalised latents, and back for checks by eye."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.base import Encoder
from models.wan.encoder_keymaps import VAE
from models.wan.frozen import check_frozen, fill_frozen, free_memory, frozen_files
from models.weights import WeightReader

WHAT = "Wan VAE"
VERSION = 1  # of the arithmetic below; a change makes old cache entries stale
TIME_STRIDE = 4  # pixel frames a latent frame, after the first
SPACE_STRIDE = 8  # px a latent, both ways

# Per channel, from the official Wan2.1 vae.py; Wan2.1 and both Wan2.2 A14B models use them.
# fmt: off
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

STEM = "diffusion_pytorch_model"  # of the files in diffusers' folder
CONFIG_NAME = "config.json"
DIM_MULT = (1, 2, 4, 4)  # width of each level, in units of the first
RESNETS_PER_DOWN_LEVEL = 2
WAN22_IN_CHANNELS = 12  # the Wan2.2 5B model's VAE folds 2x2 pixels into channels first


class WanVAEEncoder(Encoder):
    """The encoder half of Wan2.1's causal video VAE: the posterior mean, normalised per channel.

    Reads official names (`Wan2.1_VAE.pth`, ComfyUI's `wan_2.1_vae.safetensors`) and diffusers' (a file or `vae/`).
    """

    kind: ClassVar[str] = "latents"
    reads: ClassVar[Literal["pixels", "caption"]] = "pixels"

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """
        Args:
            path: a .pth or .safetensors file, or diffusers' `vae/` folder.
            dtype: what the network is held and run in. Officially float32; bfloat16 is faster and a little off.
        """
        self.path = path
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._vae: AutoencoderKLWan | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        files = frozen_files(self.path, STEM, WHAT)
        if (config := self.path / CONFIG_NAME).is_file():
            files = [*files, config]  # it holds the means, so it decides the output too
        return {
            "encoder": "wan2.1-vae",
            "version": VERSION,
            "takes": "posterior mean",
            "dtype": str(self.dtype),
            "files": [str(file) for file in files],
        }

    def check(self) -> None:
        """Compare names and shapes of the tensors on disk with the network's, without loading them.

        Raises:
            FileNotFoundError: the path is wrong.
            ValueError: tensors are missing, mis-shaped or of another VAE; one message names count, first name and file.
        """
        self._skeleton()

    def load(self, device: torch.device) -> None:
        vae, reader = self._skeleton()
        fill_frozen(vae, reader, device, self.dtype)
        self._vae, self._device = vae, device

    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """`{"latents": [16, T, H, W]}` an item, of items [F, h, w, 3] with F = 4k + 1 and sides multiples of 8.

        Stored in float32 whatever `dtype` is: they are what training aims at and are not rounded a second time;
        81 frames of 832x480 still take 8 MB only.

        Raises:
            ValueError: the network returned infinities or NaN, which half precision can do.
        """
        frames = torch.stack([torch.as_tensor(item) for item in items])
        _, num_frames, height, width, channels = frames.shape
        assert frames.dtype == torch.uint8 and channels == 3, f"uint8 [F, h, w, 3] wanted, got {frames.dtype}"
        assert num_frames % TIME_STRIDE == 1, f"{num_frames} frames are not 4k + 1"
        assert height % SPACE_STRIDE == 0 and width % SPACE_STRIDE == 0, f"{width}x{height} is not a multiple of 8"
        # the transfer is of bytes; floats are made on the device
        pixels = frames.to(self._device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        latents = self.encode_pixels(pixels).cpu()
        if not latents.isfinite().all():
            raise ValueError(f"{WHAT} {self.path}: latents are not finite in {self.dtype}; set vae_dtype = 'float32'")
        # clone: a slice would keep, and save, the whole batch
        return [{"latents": one.clone()} for one in latents]

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, F, h, w] in [-1, 1] on the device -> normalised latents [N, 16, T, H, W], float32, there."""
        assert self._vae is not None, "encode before load"
        posterior = self._vae.encode(pixels.to(self.dtype)).latent_dist
        mean, std = self._statistics()
        return (posterior.mean.float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [16, T, H, W] -> pixels uint8 [4(T-1)+1, 8H, 8W, 3] on the CPU."""
        assert self._vae is not None, "decode before load"
        mean, std = self._statistics()
        latent_states = latents.to(self._device).float()[None] * std + mean
        pixels = self._vae.decode(latent_states.to(self.dtype)).sample[0]
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu()

    def unload(self) -> None:
        self._vae = None
        free_memory(self._device)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 [C, 1, 1, 1] on the device."""
        config = self._vae.config
        pair = torch.tensor([config.latents_mean, config.latents_std], device=self._device)
        mean, std = pair[:, :, None, None, None]
        return mean, std

    def _skeleton(self) -> tuple[AutoencoderKLWan, WeightReader]:
        """The network on `meta` and the reader that fits it."""
        reader = WeightReader(frozen_files(self.path, STEM, WHAT), VAE, WHAT)
        config = vae_config(reader) | read_config(self.path / CONFIG_NAME)
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config)
        check_frozen(vae, reader)
        return vae, reader


def read_config(file: Path) -> dict[str, Any]:
    """`AutoencoderKLWan`'s arguments from diffusers' config.json; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{WHAT} {file}: not readable as JSON ({error}); download it again") from error
    return {name: value for name, value in config.items() if not name.startswith("_")}


def vae_config(reader: WeightReader) -> dict[str, Any]:
    """`AutoencoderKLWan`'s arguments from tensor shapes; Wan2.1's where a tensor is absent, so that the check names it.

    Raises:
        ValueError: this is the VAE of Wan2.2's 5B model.
    """
    shapes = reader.shapes()
    base_dim, in_channels = shapes.get("encoder.conv_in.weight", (96, 3))[:2]
    if in_channels == WAN22_IN_CHANNELS:
        raise ValueError(f"{WHAT} {reader.location}: this is Wan2.2's VAE, made for TI2V-5B; use Wan2.1_VAE.pth")
    widths = [base_dim * multiple for multiple in DIM_MULT]
    for level, width in enumerate(widths):
        first_resnet = f"encoder.down_blocks.{level * (RESNETS_PER_DOWN_LEVEL + 1)}"
        widths[level] = shapes.get(f"{first_resnet}.conv1.weight", (width,))[0]
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shapes.get("decoder.conv_out.weight", (3, base_dim))[1],
        "dim_mult": [max(width // base_dim, 1) for width in widths],
        "latents_mean": LATENTS_MEAN,
        "latents_std": LATENTS_STD,
    }
