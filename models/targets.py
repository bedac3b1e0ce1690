"""Which modules get an adapter: the targets that `[adapter] exclude_modules` leaves."""

import re
from collections.abc import Collection, Mapping, Sequence

MAX_END = 3  # parts of a name that a suggested entry may have


def without_excluded(targets: Sequence[str], exclude: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The targets that no entry of `[adapter] exclude_modules` matches.

    An entry of name characters alone (`cross_attn`, `blocks.1`) is searched as it stands, but a number at its end is a
    whole number: `blocks.1` is not `blocks.12`. Any other entry is a regular expression, searched.

    Args:
        aliases: what other naming has for each target, searched as well.

    Raises:
        ValueError: an entry that matches nothing, or is no regular expression.
    """
    excluded: set[str] = set()
    for entry in exclude:
        pattern = _entry_pattern(entry)
        matches = {name for name in targets if pattern.search(name) or pattern.search(aliases.get(name, ""))}
        if not matches:
            raise ValueError(
                f"[adapter] exclude_modules: '{entry}' matches no module; they are named like "
                f"{' or '.join(_examples(targets, aliases))}"
            )
        excluded |= matches
    return [name for name in targets if name not in excluded]


def _entry_pattern(entry: str) -> re.Pattern[str]:
    if re.fullmatch(r"[\w.]+", entry):
        return re.compile(rf"(?<!\d){re.escape(entry)}(?!\d)" if entry[-1].isdigit() else re.escape(entry))
    try:
        return re.compile(entry)
    except re.error as error:
        raise ValueError(f"[adapter] exclude_modules: '{entry}' is no regular expression: {error}") from error


def _examples(targets: Collection[str], aliases: Mapping[str, str]) -> list[str]:
    first = next(iter(targets), "")
    return [name for name in (aliases.get(first), first) if name]


def excluding(unwanted: Collection[str], targets: Sequence[str]) -> list[str]:
    """Entries of `[adapter] exclude_modules` that take out `unwanted` and nothing else of `targets`: the shortest ends
    of names that do, such as `add_k_proj`. Empty where no ends within a block tell them apart."""
    kept = [name for name in targets if name not in set(unwanted)]
    for length in range(1, MAX_END + 1):
        ends = list(dict.fromkeys(_end(name, length) for name in unwanted))
        if kept and not any(_entry_pattern(end).search(name) for end in ends for name in kept):
            return ends
    return []


def _end(name: str, length: int) -> str:
    """The last `length` parts of a name within its block; a number belongs to the part before it, as in `net.2`."""
    within = re.split(r"\.\d+\.", name)[-1]
    return ".".join(re.findall(r"[^.]+(?:\.\d+)?", within)[-length:])
