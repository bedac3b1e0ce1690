"""The given frames of a clip to condition latents: what the VAE makes of them with mid-grey in place of the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.base import ClipEnds, Encoder
from models.wan.vae import TIME_STRIDE, WanVAEEncoder, to_pixels

VERSION = 1  # of the arithmetic below; a change makes old cache entries stale


class WanConditionEncoder(Encoder):
    """The condition channels of Wan2.1 I2V and FLF2V and of Wan2.2 I2V-A14B, as their official image2video.py and
    first_last_frame2video.py make them: zeros in [-1, 1] stand for frames that are not given. Zeros in latent space
    are something else: the VAE makes no zeros of grey."""

    kind: ClassVar[str] = "condition"
    reads: ClassVar[Literal["pixels", "ends", "caption"]] = "ends"

    def __init__(self, vae_path: Path, dtype: torch.dtype, both_ends: bool) -> None:
        """
        Args:
            vae_path: Wan2.1's VAE, as `WanVAEEncoder` takes it. All models with condition channels use that one.
            dtype: what the network is held and run in, the same as for the latents.
            both_ends: give the last frame too (FLF2V).
        """
        self.both_ends = both_ends
        self._vae = WanVAEEncoder(vae_path, dtype)

    def fingerprint(self) -> Mapping[str, Any]:
        given = "first and last" if self.both_ends else "first"
        return {**self._vae.fingerprint(), "condition_version": VERSION, "given": given, "others": "mid-grey"}

    def check(self) -> None:
        """As `WanVAEEncoder.check`."""
        self._vae.check()

    def load(self, device: torch.device) -> None:
        self._vae.load(device)

    @torch.no_grad()
    def encode(self, items: Sequence[ClipEnds]) -> list[dict[str, Tensor]]:
        """`{"condition": [16, T, H, W]}` an item, float32, normalised as the latents are.

        Items are clips of F = 4k + 1 frames with sides that are multiples of 8.

        Raises:
            NotFiniteError: the network returned infinities or NaN, which half precision can do.
        """
        num_frames = items[0].frames
        assert num_frames > 1 and num_frames % TIME_STRIDE == 1, f"{num_frames} frames are not 4k + 1, or an image"
        assert all(item.frames == num_frames for item in items), "clips of different lengths in one batch"
        frames = torch.stack([torch.as_tensor(item.pixels) for item in items])
        ends = to_pixels(frames, self._vae.device, self._vae.dtype)
        assert ends.shape[2] == 2, f"the first and the last frame wanted, got {ends.shape[2]}"
        count, channels, _, height, width = ends.shape
        pixels = ends.new_zeros(count, channels, num_frames, height, width)
        pixels[:, :, 0] = ends[:, :, 0]
        if self.both_ends:
            pixels[:, :, -1] = ends[:, :, 1]
        return [{"condition": latents} for latents in self._vae.encode_clips(pixels)]

    def unload(self) -> None:
        self._vae.unload()
