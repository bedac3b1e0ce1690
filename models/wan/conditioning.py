"""What Wan is told of given frames: masks and condition channels of I2V and FLF2V, the clean first frame of TI2V."""

from typing import Literal

import torch
from torch import Tensor

GivenFrames = Literal["first", "first and last"]

MASK_CHANNELS = 4  # pixel frames that the VAE takes to one latent frame


def frame_mask(given: GivenFrames, frames: int, height: int, width: int) -> Tensor:
    """Which pixel frames are given, laid out as latents (as the official `WanI2V` and `WanFLF2V` have it).

    The clip's first frame counts four times, so that four frames go to each latent frame, as its four channels: the
    first latent frame is 1, 1, 1, 1, and where the last frame is given the last is 0, 0, 0, 1.

    Args:
        frames: latent frames T, 2 or more.

    Returns:
        float32 [4, T, H, W], 1 where given.
    """
    assert frames > 1, "a clip of one latent frame has nothing that is not given"
    pixel_frames = torch.zeros(MASK_CHANNELS * frames)
    pixel_frames[:MASK_CHANNELS] = 1
    if given == "first and last":
        pixel_frames[-1] = 1
    channels = pixel_frames.view(frames, MASK_CHANNELS).T
    return channels[:, :, None, None].expand(-1, -1, height, width)


def with_condition(x_t: Tensor, condition: Tensor, given: GivenFrames) -> Tensor:
    """The transformer's input: noisy latents, then the mask, then the condition, along the channels.

    Args:
        x_t: [B, 16, T, H, W].
        condition: normalised latents of the given frames with grey between and after them, [B, 16, T, H, W]; clean
            at every t.

    Returns:
        float32 [B, 36, T, H, W].
    """
    mask = frame_mask(given, *x_t.shape[2:]).expand(len(x_t), -1, -1, -1, -1)
    return torch.cat([x_t, mask, condition.float()], dim=1)


def with_clean_first_frame(t: Tensor, clean: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Time of each latent frame, and how much each counts in the loss, where some samples are given their first frame.

    As the official TI2V-5B samples image to video: a given frame is never noisy, so its tokens have t = 0. What
    the model says of it is thrown away, so it has no loss.

    Args:
        t: one a sample, [B].
        clean: which samples are image to video, bool [B].
        frames: latent frames T, 2 or more.

    Returns:
        t [B, T] and weights [B, 1, T, 1, 1] of 0 and 1, both float32.
    """
    assert frames > 1, "an image whose only frame is given leaves nothing to learn"
    first = torch.zeros(len(t), frames, dtype=torch.bool)
    first[:, 0] = clean
    weight = (~first).float()
    return t[:, None] * weight, weight[:, None, :, None, None]
