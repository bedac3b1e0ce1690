"""A TOML file as read: its values, and the line that each key stands on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import toml

Location = tuple[str | int, ...]  # ("directory", 0, "path")

MAX_BYTES = 500_000  # a config is a few kB; a path to a weight file given by mistake should not be parsed
MAX_INLINE_TABLES = 1000  # the parser's time grows with the square of their number
MAX_DEPTH = 16  # lists in lists, tables in tables; a config has four, and the parser calls itself for each
SECRET_KEYS = frozenset({"wandb_api_key"})

_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOKEN = re.compile(r"""'{3}|"{3}|'[^']*'|"(?:\\.|[^"\\])*"|#.*|[\[\]{}]""")
# Wherever it stands: in its table, dotted, in an inline table, or in a line that is commented out.
_VALUE = r"""'{3}.*?'{3}|"{3}.*?"{3}|'[^'\n]*'|"[^"\n]*"|[^\s#,}]+"""
_SECRET = re.compile(rf"""(\b(?:{"|".join(SECRET_KEYS)})["']?[ \t]*=[ \t]*)({_VALUE})""", re.DOTALL)

# What the parser says -> what a person can do about it. Its own text is never shown: it may quote a secret.
_SYNTAX = {
    "Duplicate keys": "this key is there twice; remove one of them",
    "already exists": "this table is there twice; merge the two",
    "homogeneous": "a list mixes kinds of values; write all of its items alike: [1.0, 2.5]",
    "list index out of range": "a list mixes kinds of values; write all of its items alike",
    "Unbalanced quotes": "a quote is not closed",
    "Empty value": "nothing stands after the =",
}
_SYNTAX_ELSE = "text needs quotes, and a list its closing bracket"
_ESCAPE = "in double quotes a \\ begins an escape; write the path in single quotes"
# what the package lets through
_FAULTS = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# https://toml.io/en/v1.0.0: no control characters but tab and line ends, of which a lone CR is none
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


class TooDeep(ValueError):
    """Lists or tables nested too deeply, found on `line`."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


class ConfigError(ValueError):
    """Everything that is wrong with a config, one message a line."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return ConfigError, (self.messages,)  # an exception otherwise unpickles from its text


@dataclass(frozen=True)
class Source:
    """One file: `data` holds plain dicts, lists and scalars; `lines` the 1-based line of each key and table header."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[Location, int] = field(default_factory=dict)
    overridden: frozenset[Location] = frozenset()
    names: Mapping[Location, str] = field(default_factory=dict)  # what the file itself calls a key, where translated

    def line(self, location: Location) -> int:
        """Line of the key or of the nearest table around it; 0 where there is none."""
        return next((self.lines[part] for part in _outwards(location) if part in self.lines), 0)

    def where(self, location: Location) -> str:
        """What a message begins with: `run.toml:12: `, or `--set: ` for a key given on the command line."""
        if any(part in self.overridden for part in _outwards(location)):
            return "--set: "
        line = self.line(location)
        called = next((f"{self.names[part]}: " for part in _outwards(location) if part in self.names), "")
        return f"{self.path}:{line}: {called}" if line else f"{self.path}: {called}"

    def holds(self, location: Location) -> bool:
        """Whether the file itself has a value there, rather than a default or an inherited one."""
        node: Any = self.data
        for part in location:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True


def _outwards(location: Location) -> list[Location]:
    return [location[:length] for length in range(len(location), 0, -1)]


def read_toml(path: Path, named_by: str) -> Source:
    """Parse `path`; `named_by` is what the message says named it, such as `run.toml:3: dataset`.

    Raises:
        ConfigError: no such file, too large, not UTF-8, nested too deeply or not TOML.
    """
    text = _read_text(path, f"{named_by} = '{path}'")
    try:
        lines = key_lines(text)
    except TooDeep as error:
        told = f"lists or tables stand more than {MAX_DEPTH} deep in each other; is this the right file?"
        raise ConfigError([f"{path}:{error.line}: {told}"]) from None
    try:
        data = _plain(toml.loads(text))
    except _FAULTS as error:
        raise ConfigError([_syntax_message(path, text, error)]) from None
    source = Source(path, data, lines)
    if large := [f"{source.where(at)}{at[-1]} is a number of more than 64 bits" for at in _too_large(data)]:
        raise ConfigError(large)
    return source


def _read_text(path: Path, subject: str) -> str:
    try:
        # a pipe would be waited for, and a device may have no end
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError([f"{subject}: is no file; name a TOML file"])
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES else b""
    except FileNotFoundError:
        raise ConfigError([f"{subject}: there is no such file"]) from None
    except OSError as error:
        raise ConfigError([f"{subject}: cannot be read ({error.strerror})"]) from None
    if size > MAX_BYTES:
        raise ConfigError([f"{subject}: {size:,} bytes is too large for a TOML file; is this the right file?"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError([f"{path}:{line}: is not UTF-8 text; save the file as UTF-8"]) from None
    if (tables := text.count("{")) > MAX_INLINE_TABLES:
        told = f"{tables:,} inline tables are too many for a config; is this the right file?"
        raise ConfigError([f"{subject}: {told}"])
    if stray := _CONTROL.search(text):
        line = text.count("\n", 0, stray.start()) + 1
        told = f"has a control character ({stray[0]!r}), which no TOML file has; save it as plain text"
        raise ConfigError([f"{path}:{line}: {told}"])
    return text


def _syntax_message(path: Path, text: str, error: Exception) -> str:
    said = str(error)
    mend = next((mend for part, mend in _SYNTAX.items() if part in said), _SYNTAX_ELSE)
    number = getattr(error, "lineno", None)
    if number is None:
        return f"{path}: is not valid TOML: {mend}"
    rows = redacted_text(text).split("\n")
    if mend == _SYNTAX_ELSE and number <= len(rows) and re.search(r'"[^"]*\\', rows[number - 1]):
        mend = _ESCAPE
    shown = printable(rows[number - 1].strip()[:80]) if number <= len(rows) else ""
    return f"{path}:{number}: is not valid TOML: {shown}: {mend}"


def printable(text: str) -> str:
    """Escapes in place of what would move a terminal's cursor or change its colours."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: Any) -> Any:
    """The parser's inline tables are of a class made on the fly, which does not pickle."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _too_large(value: Any, location: Location = ()) -> Iterator[Location]:
    """Where whole numbers stand that TOML has no place for, and seeds and counts neither."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _too_large(item, (*location, key))
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        yield location


def redacted_text(text: str) -> str:
    """A config's text with its comments, secrets emptied: what may be copied into a run folder."""
    return _SECRET.sub(r"\1''", text)


def key_lines(text: str) -> dict[Location, int]:
    """The line of every key and table header; a repeated `[[table]]` is counted from 0.

    Raises:
        TooDeep: more than a parser should be given.
    """
    lines: dict[Location, int] = {}
    counts: dict[Location, int] = {}
    table: Location = ()
    depth, fence = 0, ""
    for number, line in enumerate(text.split("\n"), 1):  # as the parser counts: text may hold other line ends
        rest = line
        if depth == 0 and not fence:
            if header := _HEADER.match(line):
                table = _parts(header[2], number)
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                    table = (*table, counts[table])
                lines.setdefault(table, number)
                continue
            if key := _KEY.match(line):
                lines.setdefault((*table, *_parts(key[1], number)), number)
                rest = line[key.end() :]
        depth, fence = _after(rest, depth, fence)
        if depth > MAX_DEPTH:
            raise TooDeep(number)
    return lines


def _parts(dotted: str, line: int = 0) -> Location:
    if dotted.count(".") > MAX_DEPTH:
        raise TooDeep(line)
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _after(line: str, depth: int, fence: str) -> tuple[int, str]:
    """Open brackets and the open multi-line quote once `line` has been read."""
    position = 0
    while position < len(line):
        if fence:
            end = line.find(fence, position)
            if end < 0:
                return depth, fence
            position, fence = end + 3, ""
            continue
        token = _TOKEN.search(line, position)
        if token is None:
            break
        position = token.end()
        if token[0] in ("'''", '"""'):
            fence = token[0]
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            break  # enough is known
    return max(depth, 0), fence


def with_overrides(source: Source, overrides: Sequence[str]) -> Source:
    """`source` with `key=value` and `table.key=value` set on top; the value is TOML.

    Raises:
        ConfigError: all overrides that cannot be read, at once.
    """
    data, errors, places = _plain(source.data), [], set(source.overridden)
    for override in overrides:
        if _SECRET.search(override):
            errors.append(
                f"--set {redacted_text(override)}: everybody on the machine can read a command line, and wandb keeps "
                "it; set the environment variable WANDB_API_KEY instead"
            )
            continue
        key, equals, text = override.partition("=")
        location = tuple(part.strip().strip("\"'") for part in key.split(".", MAX_DEPTH))
        if not equals or not all(location):
            errors.append(f"--set {override}: is not key=value; write for instance --set optimizer.lr=1e-4")
            continue
        try:
            key_lines(f"value = {text}")  # refuses what is too deep
            value = _plain(toml.loads(f"value = {text}")["value"])
        except _FAULTS:
            errors.append(f"--set {override}: the value is not TOML; text needs quotes: --set \"{key}='{text}'\"")
            continue
        node = data
        for part in location[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            errors.append(f"--set {override}: {'.'.join(map(str, location[:-1]))} is not a table")
            continue
        node[location[-1]] = value
        places.add(location)
    if errors:
        raise ConfigError(errors)
    return replace(source, data=data, overridden=frozenset(places))
