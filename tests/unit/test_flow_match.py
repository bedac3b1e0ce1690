import math

import pytest
import torch

from models.flow_match import (
    flow_loss,
    flux_shift,
    noisy_and_target,
    seeded_noise,
    shift_sigma,
    timestep,
    unshift_sigma,
)

QUANTILES = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


# Share of draws at or above the boundary between Wan2.2's experts, from the closed forms: uniform 1 - u(b) and
# logit-normal 1 - Phi(logit(u(b))), with u the inverse of the shift.
@pytest.mark.parametrize(
    ("boundary", "distribution", "shares"),
    [
        (0.875, "uniform", {1: 0.125, 2: 0.222, 3: 0.300, 5: 0.417, 8: 0.533, 12: 0.632}),
        (0.875, "logit_normal", {1: 0.026, 2: 0.105, 3: 0.198, 5: 0.368, 8: 0.553, 12: 0.705}),
        (0.9, "uniform", {1: 0.100, 2: 0.182, 3: 0.250, 5: 0.357, 8: 0.471, 12: 0.571}),
        (0.9, "logit_normal", {1: 0.014, 2: 0.066, 3: 0.136, 5: 0.278, 8: 0.453, 12: 0.613}),
    ],
)
def test_share_of_noisy_draws(boundary, distribution, shares):
    for shift, share in shares.items():
        t = timestep(QUANTILES, distribution, shift=shift)
        assert (t >= boundary).double().mean().item() == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_truncation_keeps_the_shape_of_the_density(distribution, shift):
    low, high = 0.3, 0.9
    inside = timestep(QUANTILES, distribution, shift=shift, min_t=low, max_t=high).double()
    everything = timestep(QUANTILES, distribution, shift=shift).double()
    kept = everything[(everything >= low) & (everything <= high)]
    assert low <= inside.min() and inside.max() <= high
    for share in (0.1, 0.5, 0.9):
        assert inside.quantile(share).item() == pytest.approx(kept.quantile(share).item(), abs=1e-4)


def test_timesteps_rise_with_the_quantile_and_reach_the_ends():
    for distribution in ("uniform", "logit_normal"):
        t = timestep(torch.tensor([1e-12, 0.25, 0.5, 0.75, 1 - 1e-12]).double(), distribution)
        assert t.dtype == torch.float32 and t.isfinite().all()
        assert (t.diff() > 0).all() and t[2].item() == pytest.approx(0.5) and t[0] >= 0 and t[-1] <= 1


def test_sigmoid_scale_is_the_logits_deviation():
    quantile = torch.tensor([torch.special.ndtr(torch.tensor(1.0, dtype=torch.float64))])  # one deviation up
    assert torch.logit(timestep(quantile, "logit_normal", sigmoid_scale=1.7)).item() == pytest.approx(1.7, abs=1e-5)


def test_shifting_a_logit_normal_adds_the_shifts_logarithm():
    plain, shifted = (timestep(QUANTILES[100:-100], "logit_normal", shift=s).double() for s in (1.0, 3.0))
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3), rtol=0, atol=1e-4)


def test_shift_fixes_the_ends_and_has_an_inverse():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, 5.0)
    assert shifted[[0, -1]].tolist() == [0, 1] and shifted[5].item() == pytest.approx(2.5 / 3)
    torch.testing.assert_close(unshift_sigma(shifted, 5.0), sigma)


def test_flux_shift():
    assert flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flux_shift(4096) == pytest.approx(math.exp(1.15))
    assert flux_shift((832 // 16) * (480 // 16)) == pytest.approx(2.056, abs=1e-3)


def test_noise_depends_on_the_seed_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    noise = seeded_noise((4, 1000), 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(noise, seeded_noise((4, 1000), 7))
    assert not torch.equal(noise, seeded_noise((4, 1000), 8))
    assert noise.dtype == torch.float32 and noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05


def test_path_and_target():
    latents, noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), seeded_noise((3, 2, 4), 1)
    x_t, v = noisy_and_target(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], latents[0]) and torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * latents[2] + 0.25 * noise[2])
    torch.testing.assert_close(x_t[2] - 0.25 * v[2], latents[2])  # x0 = x_t - t v
    assert torch.equal(v, noise - latents)


def test_path_with_a_t_for_each_frame():
    latents, noise = seeded_noise((2, 5, 3, 4), 0), seeded_noise((2, 5, 3, 4), 1)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]])
    x_t, v = noisy_and_target(latents, noise, t)
    for frame in range(3):
        single, _ = noisy_and_target(latents[:, :, frame], noise[:, :, frame], t[:, frame])
        assert torch.equal(x_t[:, :, frame], single)
    assert torch.equal(v, noise - latents)


def test_a_weighted_loss_is_a_weighted_mean():
    target = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1).expand(2, 4, 3, 5)
    weight = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 3.0]])[:, None, :, None]
    loss = flow_loss(torch.zeros(2, 4, 3, 5), target, weight=weight)
    assert loss.tolist() == pytest.approx([(4 + 9) / 2, (1 + 27) / 4])


@pytest.mark.parametrize("huber", [None, 0.5])
def test_a_mask_scales_errors_and_the_mean_stays_over_all(huber):
    prediction = seeded_noise((2, 4, 3, 2, 5), 0).requires_grad_()
    target, mask = seeded_noise((2, 4, 3, 2, 5), 1), seeded_noise((2, 1, 3, 2, 5), 2).clamp(0, 1)
    difference = (prediction - target).detach()
    error = difference.square() if huber is None else (difference.square() + huber**2).sqrt() - huber
    loss = flow_loss(prediction, target, huber, mask=mask)
    torch.testing.assert_close(loss, (error * mask).mean(dim=(1, 2, 3, 4)))
    loss.sum().backward()
    assert ((prediction.grad == 0) == (mask == 0).expand_as(target)).all()

    weight = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])[:, None, :, None, None]
    both = flow_loss(prediction, target, huber, weight, mask)
    torch.testing.assert_close(both[0], (error * mask)[0, :, 1:].mean(), msg="of a given frame nothing is in the mean")
    torch.testing.assert_close(both[1], loss[1])


def test_loss_is_one_number_a_sample_in_float32():
    prediction, target = torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 3, 4)
    target[1] = 3
    loss = flow_loss(prediction, target)
    assert loss.dtype == torch.float32 and loss.tolist() == [1, 9]


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    c = 0.5
    near, far = (flow_loss(torch.zeros(1, 4), torch.full((1, 4), d), c).item() for d in (1e-2, 1e3))
    assert near == pytest.approx(1e-4 / (2 * c), rel=1e-3)
    assert far == pytest.approx(1e3 - c, rel=1e-5)
