import pytest

from models.targets import excluding, without_excluded

TARGETS = [f"blocks.{i}.{name}" for i in (1, 2, 12) for name in ("attn1.to_q", "attn2.to_q", "ffn.net.2")]
ALIASES = {name: name.replace("attn1.to_q", "self_attn.q").replace("attn2.to_q", "cross_attn.q") for name in TARGETS}


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("attn2", 6),  # skeleton names
        ("cross_attn", 6),  # official names
        ("blocks.1", 6),  # a whole number: block 12 stays
        ("blocks.1.attn1.to_q", 8),
        (r"blocks\.(1|2)\..*to_q", 5),
        ("ffn", 6),
    ],
)
def test_exclude_modules(entry, left):
    kept = without_excluded(TARGETS, [entry], ALIASES)
    assert len(kept) == left
    assert kept == [name for name in TARGETS if name in kept]


def test_an_entry_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'crossattn' matches no module; they are named like blocks\.1\.self_attn\.q"):
        without_excluded(TARGETS, ["ffn", "crossattn"], ALIASES)


def test_an_entry_that_is_no_expression():
    with pytest.raises(ValueError, match=r"'\*ffn' is no regular expression"):
        without_excluded(TARGETS, ["*ffn"], ALIASES)


@pytest.mark.parametrize(
    ("end", "entries"),
    [
        ("ffn.net.2", ["net.2"]),
        ("attn2.to_q", ["attn2.to_q"]),
        (("attn2.to_q", "ffn.net.2"), ["attn2.to_q", "ffn.net.2"]),
    ],
)
def test_entries_for_what_is_not_wanted(end, entries):
    unwanted = [name for name in TARGETS if name.endswith(end)]
    found = excluding(unwanted, TARGETS)
    assert sorted(found) == entries
    assert set(without_excluded(TARGETS, found, {})) == set(TARGETS) - set(unwanted)


def test_no_entries_for_a_block_or_for_everything():
    assert excluding(TARGETS[:3], TARGETS) == []
    assert excluding(TARGETS, TARGETS) == []
