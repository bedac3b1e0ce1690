"""Pixels to the normalised latents of Wan2.1's or Wan2.2's VAE, and back for checks by eye."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.base import Encoder, NotFiniteError
from models.json_files import read_table
from models.wan.encoder_keymaps import VAE, VAE22
from models.wan.frozen import check_frozen, fill_frozen, free_memory, frozen_files, odd_shapes_told
from models.wan.identify import VAE_KEY, hint_for
from models.weights import KeyMap, WeightReader

WHAT = "Wan VAE"
VERSION = 1  # of the arithmetic below; a change makes old cache entries stale
TIME_STRIDE = 4  # pixel frames a latent frame, after the first

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

# Likewise from the official Wan2.2 vae2_2.py; only TI2V-5B uses them.
# fmt: off
LATENTS_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

STEM = "diffusion_pytorch_model"  # of the files in diffusers' folder
CONFIG_NAME = "config.json"
MOST_ITEMS, MOST_RESNETS, MOST_WIDTH = 64, 16, 1 << 14  # of config.json; the released ones have 48, 2 and 1024
DIM_MULT = (1, 2, 4, 4)  # width of each level, in units of the first


class Version(NamedTuple):
    """What sets one of Wan's two VAEs apart from the other."""

    title: str
    used_by: str
    file: str  # to download
    key_map: KeyMap
    space_stride: int  # px a latent, both ways
    base_dims: tuple[int, int]  # width of the encoder's and the decoder's first level, where no tensor tells
    first_resnets: tuple[str, ...]  # of each level of the encoder
    arguments: Mapping[str, Any]  # of `AutoencoderKLWan`, which diffusers' convert_wan_to_diffusers.py has too


VERSIONS = {
    "2.1": Version(
        title="Wan2.1's VAE",
        used_by="all models but TI2V-5B",
        file="Wan2.1_VAE.pth",
        key_map=VAE,
        space_stride=8,
        base_dims=(96, 96),
        first_resnets=("down_blocks.0", "down_blocks.3", "down_blocks.6", "down_blocks.9"),
        arguments={"in_channels": 3, "latents_mean": LATENTS_MEAN, "latents_std": LATENTS_STD},
    ),
    "2.2": Version(
        title="Wan2.2's VAE",
        used_by="TI2V-5B",
        file="Wan2.2_VAE.pth",
        key_map=VAE22,
        space_stride=16,
        base_dims=(160, 256),
        first_resnets=tuple(f"down_blocks.{level}.resnets.0" for level in range(len(DIM_MULT))),
        arguments={
            "in_channels": 12,  # 2x2 pixels are folded into channels first
            "out_channels": 12,
            "patch_size": 2,
            "z_dim": 48,
            "is_residual": True,
            "scale_factor_spatial": 16,
            "latents_mean": LATENTS_MEAN_22,
            "latents_std": LATENTS_STD_22,
        },
    ),
}


class WanVAEEncoder(Encoder):
    """The encoder half of Wan's causal video VAE: the posterior mean, normalised per channel.

    Frames run through it four at a time (the first alone), with what the convolutions must remember in between, so
    activations do not grow with a clip's length. Reads official names (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, ComfyUI's
    `wan_2.1_vae.safetensors` and `wan2.2_vae.safetensors`) and diffusers' (a file or `vae/`).
    """

    kind: ClassVar[str] = "latents"
    reads: ClassVar[Literal["pixels", "ends", "caption"]] = "pixels"

    def __init__(self, path: Path, dtype: torch.dtype, version: Literal["2.1", "2.2"] = "2.1") -> None:
        """
        Args:
            path: a .pth or .safetensors file, or diffusers' `vae/` folder.
            dtype: what the network is held and run in. Officially float32; bfloat16 is faster and a little off.
            version: which of Wan's VAEs the transformer was trained with; the file must be of it.
        """
        self.path = path
        self.dtype = dtype
        self.version = version
        self.device = torch.device("cpu")
        self._kind = VERSIONS[version]
        self._vae: AutoencoderKLWan | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        files = frozen_files(self.path, STEM, WHAT)
        if (config := self.path / CONFIG_NAME).is_file():
            files = [*files, config]  # it holds the means, so it decides the output too
        return {
            "encoder": f"wan{self.version}-vae",
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
        self._vae, self.device = vae, device

    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """`{"latents": [C, T, H, W]}` an item, of items [F, h, w, 3] with F = 4k + 1 and sides multiples of the stride.
        C is 16, the stride 8 px; for version 2.2, 48 and 16.

        Stored in float32 whatever `dtype` is: they are what training aims at and are not rounded a second time;
        81 frames of 832x480 still take 8 MB only.

        Raises:
            NotFiniteError: the network returned infinities or NaN, which half precision can do.
        """
        pixels = to_pixels(torch.stack([torch.as_tensor(item) for item in items]), self.device, self.dtype)
        return [{"latents": latents} for latents in self.encode_clips(pixels)]

    def encode_clips(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [N, 3, F, h, w] in [-1, 1] on the device -> N latents [C, T, H, W] on the CPU, checked, each in memory
        of its own. Raises as `encode` does."""
        *_, num_frames, height, width = pixels.shape
        stride = self._kind.space_stride
        assert num_frames % TIME_STRIDE == 1, f"{num_frames} frames are not 4k + 1"
        assert height % stride == 0 and width % stride == 0, f"{width}x{height} is not a multiple of {stride}"
        latents = self.encode_pixels(pixels).cpu()
        if not latents.isfinite().all():
            mend = "set vae_dtype = 'float32'"
            raise NotFiniteError(f"{WHAT} {self.path}: latents are not finite in {self.dtype}; {mend}")
        # clone: a slice would keep, and save, the whole batch
        return [one.clone() for one in latents]

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, F, h, w] in [-1, 1] on the device -> normalised latents [N, C, T, H, W], float32, there."""
        assert self._vae is not None, "encode before load"
        posterior = self._vae.encode(pixels.to(self.dtype)).latent_dist
        mean, std = self._statistics()
        return (posterior.mean.float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, T, H, W] -> pixels uint8 [4(T-1)+1, stride * H, stride * W, 3] on the CPU."""
        assert self._vae is not None, "decode before load"
        mean, std = self._statistics()
        latent_states = latents.to(self.device).float()[None] * std + mean
        pixels = self._vae.decode(latent_states.to(self.dtype)).sample[0]
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu()

    def unload(self) -> None:
        self._vae = None
        free_memory(self.device)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 [C, 1, 1, 1] on the device."""
        config = self._vae.config
        pair = torch.tensor([config.latents_mean, config.latents_std], device=self.device)
        mean, std = pair[:, :, None, None, None]
        return mean, std

    def _skeleton(self) -> tuple[AutoencoderKLWan, WeightReader]:
        """The network on `meta` and the reader that fits it."""
        files = frozen_files(self.path, STEM, WHAT)
        reader = WeightReader(files, self._kind.key_map, WHAT, identify=hint_for(VAE_KEY))
        with odd_shapes_told(WHAT, reader), torch.device("meta"):
            vae = AutoencoderKLWan.from_config(vae_config(reader, self.version) | read_config(self.path / CONFIG_NAME))
        check_frozen(vae, reader)
        return vae, reader


def to_pixels(frames: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bytes [N, F, h, w, 3] -> pixels [N, 3, F, h, w] in [-1, 1], in `dtype` on `device`.

    Bytes travel, and floats are made a frame at a time: 121 frames of 1280x704 in float32 are 1.3 GB, and the
    arithmetic on all of them at once would hold three of those.
    """
    assert frames.dtype == torch.uint8 and frames.shape[-1] == 3, f"uint8 [F, h, w, 3] wanted, got {frames.dtype}"
    count, num_frames, height, width, channels = frames.shape
    pixels = torch.empty(count, channels, num_frames, height, width, dtype=dtype, device=device)
    for number, shown in enumerate(frames.to(device).unbind(1)):
        pixels[:, :, number] = shown.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels


def read_config(file: Path) -> dict[str, Any]:
    """`AutoencoderKLWan`'s arguments from diffusers' config.json; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        config = read_table(file)
    except ValueError as error:
        raise ValueError(f"{WHAT} {file}: not readable as JSON ({error}); download it again") from error
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in config.items():
        if not _is_argument(name, value):
            raise ValueError(f"{WHAT} {file}: {name} = {str(value)[:40]} is none of its settings; download it again")
    return config


def _is_argument(name: str, value: Any) -> bool:
    """Whether the network could be built with it, and soon: a few numbers of moderate size, or a word."""
    if isinstance(value, list):
        return len(value) <= MOST_ITEMS and all(_is_argument(name, item) for item in value)
    if isinstance(value, (int, float)):
        return 0 <= abs(value) <= (MOST_RESNETS if name == "num_res_blocks" else MOST_WIDTH)
    return value is None or isinstance(value, str)


def vae_config(reader: WeightReader, version: str) -> dict[str, Any]:
    """`AutoencoderKLWan`'s arguments from tensor shapes; those of the released VAE where a tensor is absent, so that
    the check names it.

    Raises:
        ValueError: this is the other VAE.
    """
    shapes = reader.shapes()
    wanted = VERSIONS[version]
    expected = (wanted.base_dims[0], wanted.arguments["in_channels"])
    base_dim, in_channels = shapes.get("encoder.conv_in.weight", expected)[:2]
    for found in VERSIONS.values():
        if found is not wanted and in_channels == found.arguments["in_channels"]:
            raise ValueError(
                f"{WHAT} {reader.location}: this is {found.title}, made for {found.used_by}; use {wanted.file}"
            )
    widths = [base_dim * multiple for multiple in DIM_MULT]
    for level, resnet in enumerate(wanted.first_resnets):
        widths[level] = shapes.get(f"encoder.{resnet}.conv1.weight", (widths[level],))[0]
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shapes.get("decoder.norm_out.gamma", (wanted.base_dims[1],))[0],
        "dim_mult": [max(width // base_dim, 1) for width in widths],
        **wanted.arguments,
    }
