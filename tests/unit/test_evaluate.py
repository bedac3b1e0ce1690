"""A loss on held-out data that is not finite: which clips are at fault is told, and what it is without them."""

import math

import pytest
import torch

from utils.train.evaluate import QUANTILES, EvalResult, Evaluation


def table(samples: int = 4) -> torch.Tensor:
    return torch.arange(1.0, 1 + 9 * samples, dtype=torch.float64).reshape(9, samples)


def test_finite_losses_are_plain_means():
    result = EvalResult.of(table())
    assert result.loss == pytest.approx(float(table().mean())) and result.samples == 4
    assert result.by_quantile == dict(zip(QUANTILES, table().mean(dim=1).tolist(), strict=True))
    assert not result.bad
    assert len(result.scalars("far")) == 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_at_fault_are_named_and_left_out_of_a_mean_of_its_own(value):
    losses = table()
    losses[0, 1] = losses[:, 3] = value
    result = EvalResult.of(losses)
    assert result.bad == {1: [0.1], 3: list(QUANTILES)}
    assert result.bad_words("abcd".__getitem__) == "b (quantile 0.1), d (all quantiles)"
    assert not math.isfinite(result.loss), "nothing is hidden"
    assert result.others_loss == pytest.approx(float(table()[:, [0, 2]].mean()))
    assert result.scalars("far")["far/loss_without_bad"] == result.others_loss
    whole = Evaluation({"high": result, "low": EvalResult.of(table())}, {"high": 0.25, "low": 0.75}).scalars("far")
    wanted = 0.25 * result.others_loss + 0.75 * float(table().mean())
    assert whole["far/loss_without_bad"] == pytest.approx(wanted)
    assert "far_high/loss_without_bad" in whole and "far_low/loss_without_bad" not in whole


def test_many_samples_are_counted():
    result = EvalResult.of(torch.full((9, 11), math.nan))
    assert result.bad_words(str).endswith("7 (all quantiles) and 3 more")
    assert math.isnan(result.others_loss)
