"""Flow matching: quantile to timestep, seeded noise, path, target and loss; pure functions.

The path is x_t = (1 - t) * latents + t * noise and the target v = noise - latents (Lipman et al. 2023, arXiv
2210.02747, with the time axis of the official Wan code: t = 1 is noise).
"""

import math
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["logit_normal", "uniform"]


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Static flow shift, s * sigma / (1 + (s - 1) * sigma) (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def flux_shift(tokens: int) -> float:
    """The shift that FLUX ties to image tokens: e^mu, mu linear through (256, 0.5) and (4096, 1.15).

    `tokens` counts one frame, (H // 2) * (W // 2): with frames counted in, an 81-frame clip would train on almost
    nothing but noise.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(slope * tokens + 0.5 - slope * 256)


def _cdf(sigma: Tensor, distribution: Distribution, sigmoid_scale: float) -> Tensor:
    if distribution == "uniform":
        return sigma
    return torch.special.ndtr(torch.logit(sigma) / sigmoid_scale)


def _inverse_cdf(quantile: Tensor, distribution: Distribution, sigmoid_scale: float) -> Tensor:
    if distribution == "uniform":
        return quantile
    return torch.sigmoid(torch.special.ndtri(quantile) * sigmoid_scale)


def timestep(
    quantile: Tensor,
    distribution: Distribution,
    sigmoid_scale: float = 1.0,
    shift: float = 1.0,
    min_t: float = 0.0,
    max_t: float = 1.0,
) -> Tensor:
    """Sigma at `quantile` of the shifted density, truncated to [min_t, max_t].

    Truncation goes through the inverse distribution, so the density inside the window keeps its shape.

    Args:
        quantile: in (0, 1), [B].
        sigmoid_scale: standard deviation of the logit (logit_normal only).

    Returns:
        float32 [B], 1 is noise. Computed in float64: `ndtri` in float32 loses the tails.
    """
    bounds = unshift_sigma(torch.tensor([min_t, max_t], dtype=torch.float64), shift)
    low, high = _cdf(bounds, distribution, sigmoid_scale).tolist()
    inside = low + quantile.double() * (high - low)
    sigma = shift_sigma(_inverse_cdf(inside, distribution, sigmoid_scale), shift)
    return sigma.clamp(min_t, max_t).float()


def share_above(
    boundary: float,
    distribution: Distribution,
    sigmoid_scale: float = 1.0,
    shift: float = 1.0,
    min_t: float = 0.0,
    max_t: float = 1.0,
) -> float:
    """Probability that what `timestep` draws lies above `boundary`."""
    bounds = unshift_sigma(torch.tensor([min_t, min(max(boundary, min_t), max_t), max_t], dtype=torch.float64), shift)
    low, middle, high = _cdf(bounds, distribution, sigmoid_scale).tolist()
    return (high - middle) / (high - low)


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 from a CPU generator: the same on every rank and every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def noisy_and_target(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and v for float32 latents and noise [B, C, ...].

    Args:
        t: one a sample, [B], or one a latent frame, [B, T], with latents [B, C, T, ...].
    """
    axes = (len(t), 1, -1) if t.ndim == 2 else (len(t),)
    t = t.reshape(*axes, *[1] * (latents.ndim - len(axes)))
    return (1 - t) * latents + t * noise, noise - latents


def flow_loss(
    prediction: Tensor,
    target: Tensor,
    pseudo_huber_c: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared error, or pseudo-Huber sqrt(d^2 + c^2) - c (Song & Dhariwal 2023, arXiv 2310.14189), in float32.

    Args:
        weight: how much each element counts, to be broadcast to the target, such as [B, 1, T, 1, 1]; all alike unless
            given. A sample's weights must not all be 0.
        mask: what is left of each element's error, likewise to be broadcast. In contrast to weights it makes the loss
            of a sample smaller: what is masked out counts as if it were right.

    Returns:
        The weighted mean over all but the batch axis, [B].
    """
    difference = prediction.float() - target.float()
    if pseudo_huber_c is None:
        error = difference.square()
    else:
        error = torch.sqrt(difference.square() + pseudo_huber_c**2) - pseudo_huber_c
    if mask is not None:
        error = error * mask
    if weight is None:
        return error.flatten(1).mean(dim=1)
    # elements that share a weight are equally many, so the mean of the small tensor is that of the broadcast one
    return (error * weight).flatten(1).mean(dim=1) / weight.flatten(1).mean(dim=1)
