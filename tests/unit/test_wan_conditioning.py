"""Masks, conditions, times and weights of samples that are given frames, against tables written down here."""

import pytest
import torch

from models.base import Draw
from models.flow_match import noisy_and_target, seeded_noise
from models.wan.conditioning import frame_mask, with_clean_first_frame, with_condition
from tests.helpers.models import wan_variant

# channel of the mask -> one number a latent frame
FIRST = {
    2: [[1, 0], [1, 0], [1, 0], [1, 0]],
    5: [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
}
FIRST_AND_LAST = {
    2: [[1, 0], [1, 0], [1, 0], [1, 1]],
    5: [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 1]],
}
QUANTILES = (0.3, 0.8, 0.6)


def samples(channels: int, frames: int, image_states: int = 0, count: int = 3) -> list[dict[str, torch.Tensor]]:
    made = []
    for index in range(count):
        shape = (channels, frames, 4, 6)
        one = {"latents": seeded_noise(shape, 10 * index), "text": seeded_noise((2 + index, 32), 10 * index + 1)}
        one["condition"] = seeded_noise(shape, 10 * index + 2)
        one["image"] = seeded_noise((image_states, 1280), 10 * index + 3)
        made.append(one)
    return made


def draws(*choices: float) -> list[Draw]:
    return [Draw(quantile, 7 + i, choice) for i, (quantile, choice) in enumerate(zip(QUANTILES, choices, strict=True))]


class TestMask:
    @pytest.mark.parametrize(("given", "table"), [("first", FIRST), ("first and last", FIRST_AND_LAST)])
    @pytest.mark.parametrize("frames", [2, 5])
    def test_table(self, given, table, frames):
        mask = frame_mask(given, frames, 2, 3)
        assert mask.dtype == torch.float32 and mask.shape == (4, frames, 2, 3)
        assert mask[:, :, 0, 0].tolist() == table[frames]
        assert (mask == mask[:, :, :1, :1]).all()

    def test_it_stands_between_the_noisy_latents_and_the_condition(self):
        x_t, condition = torch.full((2, 16, 3, 4, 4), 7.0), torch.full((2, 16, 3, 4, 4), 9.0, dtype=torch.bfloat16)
        joined = with_condition(x_t, condition, "first and last")
        assert joined.shape == (2, 36, 3, 4, 4) and joined.dtype == torch.float32
        assert (joined[:, :16] == 7).all() and (joined[:, 20:] == 9).all()
        assert joined[1, 16:20, :, 3, 3].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]


class TestCleanFirstFrame:
    def test_table(self):
        t, weight = with_clean_first_frame(torch.tensor([0.25, 0.5]), torch.tensor([True, False]), 3)
        assert t.tolist() == [[0, 0.25, 0.25], [0.5, 0.5, 0.5]]
        assert weight.shape == (2, 1, 3, 1, 1)
        assert weight.flatten(1).tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "table", "states"),
    [("wan_i2v", FIRST, 257), ("wan_flf2v", FIRST_AND_LAST, 514), ("wan22_i2v_low", FIRST, 0)],
)
def test_what_image_to_video_is_fed(name, table, states):
    family, given = wan_variant(name, max_t=0.8), samples(16, 2, states)
    batch = family.micro_batch(given, draws(0.5, 0.5, 0.5))
    plain = wan_variant("wan_t2v", max_t=0.8).micro_batch(given, draws(0, 0, 0))
    x, t, text, *image = batch.inputs
    assert torch.equal(x[:, :16], plain.inputs[0]) and torch.equal(t, plain.inputs[1])
    assert torch.equal(text, plain.inputs[2]) and torch.equal(*(b.target[0] for b in (batch, plain)))
    assert x[0, 16:20, :, 0, 0].tolist() == table[2]
    assert torch.equal(x[:, 20:], torch.stack([one["condition"] for one in given]))
    assert len(batch.target) == 1 and len(image) == bool(states)
    if states:
        assert torch.equal(image[0], torch.stack([one["image"] for one in given]))


class TestImageToVideoOf5B:
    def test_a_share_of_the_samples_keeps_its_first_frame(self):
        family, given = wan_variant("wan22_ti2v", i2v_fraction=0.5), samples(48, 3)
        x_t, t, _ = family.micro_batch(given, draws(0.1, 0.5, 0.49)).inputs
        v, weight = family.micro_batch(given, draws(0.1, 0.5, 0.49)).target
        sigma = wan_variant("wan22_ti2v").micro_batch(given, draws(0, 0, 0)).inputs[1]
        assert t.tolist() == [[0, sigma[0], sigma[0]], [sigma[1]] * 3, [0, sigma[2], sigma[2]]]
        assert weight.flatten(1).tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]
        for i, one in enumerate(given):
            noise = seeded_noise((48, 3, 4, 6), 7 + i)
            noisy, velocity = (
                part[0] for part in noisy_and_target(one["latents"][None], noise[None], sigma[i : i + 1])
            )
            assert torch.equal(v[i], velocity) and torch.equal(x_t[i, :, 1:], noisy[:, 1:])
            assert torch.equal(x_t[i, :, 0], one["latents"][:, 0] if i != 1 else noisy[:, 0])

    @pytest.mark.parametrize(("fraction", "choice", "frames"), [(0.0, 0.0, 3), (0.5, 0.5, 3), (1.0, 0.0, 1)])
    def test_text_to_video_has_one_t_a_sample(self, fraction, choice, frames):
        """With images too, whatever the fraction."""
        family = wan_variant("wan22_ti2v", i2v_fraction=fraction)
        batch = family.micro_batch(samples(48, frames), draws(choice, choice, choice))
        assert batch.inputs[1].shape == (3,) and len(batch.target) == 1

    def test_a_fraction_of_one_takes_every_clip(self):
        batch = wan_variant("wan22_ti2v", i2v_fraction=1.0).micro_batch(samples(48, 3), draws(0.1, 0.5, 0.999))
        assert not batch.inputs[1][:, 0].any() and batch.inputs[1][:, 1:].all()

    @pytest.mark.parametrize("c", [None, 0.1])
    def test_the_loss_is_a_mean_over_the_frames_that_are_not_given(self, c):
        from models.wan.family import WanFamily

        plain = wan_variant("wan22_ti2v", i2v_fraction=0.5)
        family = WanFamily(plain._config, pseudo_huber_c=c)
        v, weight = family.micro_batch(samples(48, 3), draws(0.1, 0.9, 0.1)).target
        prediction = v + seeded_noise(tuple(v.shape), 3)
        found = family.loss(prediction, (v, weight))
        for i, frames in enumerate((slice(1, None), slice(None), slice(1, None))):
            expected = family.loss(prediction[i : i + 1, :, frames], (v[i : i + 1, :, frames],))
            torch.testing.assert_close(found[i], expected[0], rtol=1e-6, atol=0)
        spoilt = prediction.clone()
        spoilt[0, :, 0] = 1e3
        assert torch.equal(family.loss(spoilt, (v, weight)), found)
        assert torch.equal(family.loss(prediction, (v, torch.ones_like(weight))), family.loss(prediction, (v,)))

    def test_who_else_is_in_the_batch_makes_no_difference(self):
        """A text-to-video sample beside one of image to video has a t for each frame, all alike."""
        family, given = wan_variant("wan22_ti2v", i2v_fraction=0.5), samples(48, 3)
        whole = family.micro_batch(given, draws(0.1, 0.9, 0.1))
        alone = family.micro_batch(given[1:2], draws(0.1, 0.9, 0.1)[1:2])
        assert torch.equal(whole.inputs[0][1:2], alone.inputs[0])
        assert (whole.inputs[1][1] == alone.inputs[1]).all()
