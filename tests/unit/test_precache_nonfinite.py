"""Clips that come out of an encoder with NaN are left out one by one, with what its encoder advises."""

import pytest

from models.base import NotFiniteError
from tests.helpers.encoders import ConvEncoder
from tests.unit.test_precache import Bench

ADVICE = "latents are not finite in torch.float16; set vae_dtype = 'float32'"


class Overflowing(ConvEncoder):
    """Fails on clips of `frames`, and does not say which of a batch it was."""

    frames = 1

    def encode(self, items):
        if any(len(item) == self.frames for item in items):
            raise NotFiniteError(ADVICE)
        return super().encode(items)


class OverflowingBench(Bench):
    def make_encoders(self):
        return [Overflowing(self.vae), super().make_encoders()[1]]


@pytest.fixture
def bench(tmp_path):
    return OverflowingBench(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_clip_that_comes_out_with_nan_is_left_out_with_the_reason(bench, batch_size):
    with pytest.raises(ValueError, match=rf"still\.png: {ADVICE}"):
        bench.run(batch_size=batch_size)
    manifest, report = bench.run(batch_size=batch_size, skip_bad_media=True)
    ((key, skipped),) = report.failed.items()
    assert (skipped.path.name, skipped.reason) == ("still.png", ADVICE)
    assert report.made["latents"] == (0, 4), "the others were stored by the first start"
    assert key not in {key for entry in manifest.without(report.failed).entries for key in entry.media_keys}


def test_nan_that_the_encoder_does_not_see_is_found_too(bench):
    manifest = bench.manifest()
    bench.encoders[0].frames = -1
    convolve = bench.encoders[0].conv.forward
    bench.encoders[0].conv.forward = lambda pixels: convolve(pixels) * (float("nan") if pixels.shape[1] == 1 else 1)
    report = bench.fill([manifest], batch_size=2, skip_bad_media=True)
    (skipped,) = report.failed.values()
    assert skipped.path.name == "still.png"
    assert "NaN or infinity in 'latents'" in skipped.reason


def test_a_caption_that_comes_out_with_nan_stops_the_start(bench):
    manifest = bench.manifest()
    bench.encoders[0].frames = -1

    def overflow(items):
        raise NotFiniteError("states are not finite in torch.float16; use bfloat16 or float32")

    bench.encoders[1].encode = overflow
    with pytest.raises(ValueError, match=r"states are not finite in torch.float16; use bfloat16 or float32"):
        bench.fill([manifest], skip_bad_media=True)
