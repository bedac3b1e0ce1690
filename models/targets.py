"""Which modules get an adapter: the targets that `[adapter] exclude_modules` leaves."""

import re
from collections.abc import Collection, Mapping, Sequence


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
