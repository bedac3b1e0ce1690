"""Ranks that are killed at random moments of their saves: what was saved is found, sound, and gone on from."""

import pytest

from tests.helpers.forked import run_forked

pytestmark = pytest.mark.pipeline

KILLS = 15  # tests/bench/kills.py makes many more


def test_no_kill_costs_a_checkpoint_that_was_there(tmp_path):
    """All that must hold after each is asserted in `tests.helpers.kills`."""
    kills = run_forked("tests.helpers.kills:hammer", tmp_path, {"kills": KILLS, "seed": 0, "synced": False})
    assert len(kills) == KILLS
    assert {kill.ranks for kill in kills} == {(0,), (1,), (0, 1)}
    assert any(name.startswith("tmp-global_step") for kill in kills for name in kill.left), "some came in a save"
    assert kills[-1].found > 3 * KILLS, "each round goes on from the one before"
    assert max(kill.ended_s for kill in kills) < 20, "the other rank does not wait for ever"
