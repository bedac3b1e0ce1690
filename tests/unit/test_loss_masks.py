"""Loss masks of a micro-batch: samples with and without, and beside the clean first frame of TI2V-5B."""

import pytest
import torch

from models.base import Draw
from models.flow_match import seeded_noise
from models.masks import loss_mask
from models.wan.vae import VERSIONS
from models.wan.variants import VARIANTS
from tests.helpers.models import wan_variant


def grid(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_ones_stand_for_a_mask_that_is_not_there():
    masked, plain = {"mask": grid(2, 3, 4), "latents": torch.zeros(1)}, {"latents": torch.zeros(1)}
    [mask] = loss_mask([plain, masked], 2, 3, 4)
    assert mask.shape == (2, 1, 2, 3, 4) and mask.dtype == torch.float32
    assert (mask[0] == 1).all() and torch.equal(mask[1, 0], masked["mask"].float() / 255)
    assert loss_mask([plain, plain], 2, 3, 4) == ()
    with pytest.raises(AssertionError, match="for latents"):
        loss_mask([masked], 3, 3, 4)


def test_a_given_first_frame_is_in_no_mean_and_masked_cells_are():
    """Of TI2V-5B: the second sample is image to video."""
    family = wan_variant("wan22_ti2v", i2v_fraction=0.5)
    samples = [
        {"latents": seeded_noise((48, 3, 4, 6), i), "text": seeded_noise((2, 32), 9), "mask": grid(3, 4, 6, seed=i)}
        for i in range(2)
    ]
    batch = family.micro_batch(samples, [Draw(0.5, 1, 0.9), Draw(0.5, 2, 0.1)])
    prediction = seeded_noise(tuple(batch.target[0].shape), 7)
    error = (prediction - batch.target[0]).square() * torch.stack([s["mask"] for s in samples])[:, None] / 255
    loss = family.loss(prediction, batch.target)
    torch.testing.assert_close(loss, torch.stack([error[0].mean(), error[1, :, 1:].mean()]))
    first = family.micro_batch(samples[:1], [Draw(0.5, 1, 0.9)])
    assert first.inputs[1].shape == (1,), "a mask alone asks for no time of each frame"
    torch.testing.assert_close(family.loss(prediction[:1], first.target), loss[:1])


def test_cells_are_as_large_as_the_vae_makes_them():
    supported = [variant for variant in VARIANTS if variant.media]
    assert len(supported) > 3
    for variant in supported:
        assert variant.media.latent_stride == VERSIONS[variant.vae].space_stride, variant.title
