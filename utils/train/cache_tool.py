"""`python -m utils.train.cache_tool stats|verify|gc CACHE_DIR`: what a cache holds, if it is whole, what may go."""

import argparse
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models import family_class
from utils.config.load import load_config
from utils.data.archives import Stored, remove, stored
from utils.data.cache import CacheStore
from utils.data.care import Found, busy, damage_of, drop_dead_claims, encoder_of, entries, leftovers, look_at_all
from utils.data.crew import sweep
from utils.data.cutting import ARCHIVES_FOLDER, PROBES_FILE
from utils.data.inspection import LOOKS_FILE
from utils.data.scan_memory import forget_scans
from utils.data.uses import Use, forget_uses, keys_of, recorded_uses
from utils.data.whole import forget
from utils.monitor.console import counted, duration, grouped, short_bytes, show
from utils.monitor.logs import quiet_libraries, terminal
from utils.monitor.progress import CacheProgress
from utils.train.prepare import DEFAULT_WORKERS, scan

EXIT_DAMAGED, EXIT_USAGE = 1, 2
DAY_S = 86400.0
MAX_SHOWN = 20  # lines of one list
THREADS = 4  # that read entries: a disk is soon busy


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m utils.train.cache_tool", description="Look after a cache folder.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    told = {
        "stats": "entries and bytes by kind and encoder, and who used them last",
        "verify": "read every entry and hold it against its checksum; exit status 1 where one is damaged",
        "gc": "list entries that are not in use; deletes only with --delete",
    }
    added = {}
    for name, text in told.items():
        added[name] = commands.add_parser(name, help=text, description=text)
        added[name].add_argument("cache_dir", type=Path, metavar="CACHE_DIR")
    added["verify"].add_argument("--delete", action="store_true", help="delete what is damaged: starts make it anew")
    gc = added["gc"]
    gc.add_argument(
        "--config", type=Path, nargs="+", default=[], metavar="TOML", help="keep what these runs need; all that you use"
    )
    gc.add_argument("--days", type=_days, metavar="N", help="keep what a start has used or made in the last N days")
    gc.add_argument("--delete", action="store_true", help="delete what is listed")
    return whole


def _days(text: str) -> float:
    if not 0 <= (days := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time; give a number of 0 or more")
    return days


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    quiet_libraries()
    flags, console = parser().parse_args(arguments), terminal()
    try:
        root = flags.cache_dir
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; name the cache_dir of a run")
        if not any((root / name).is_file() for name in (PROBES_FILE, LOOKS_FILE)) and not any(entries(root)):
            raise ValueError(f"{root} holds no cache; name the cache_dir of a run")
        return COMMANDS[flags.command](flags, CacheStore(root), console)
    except (ValueError, OSError) as error:
        show(console, f"{error}")
        return EXIT_USAGE
    finally:
        console.file.close()  # or Python warns of it, on the terminal


# --- stats ------------------------------------------------------------------------------------------------------------


def stats(flags: argparse.Namespace, store: CacheStore, console: Console) -> int:
    now = time.time()
    groups: dict[tuple[str, str], list[Found]] = defaultdict(list)
    with CacheProgress(console) as progress:
        found = list(entries(store.root))
        for entry, encoder in look_at_all(found, partial(encoder_of, store), THREADS, progress, "reading headers"):
            groups[entry.kind, encoder].append(entry)
    table = Table("kind", "encoder", "entries", "size", "newest", "oldest", title=str(store.root))
    for (kind, encoder), group in sorted(groups.items()):
        written = [entry.written for entry in group]
        ages = (_ago(now - max(written)), _ago(now - min(written)))
        table.add_row(kind, encoder, grouped(len(group)), short_bytes(_size(group)), *ages)
    table.add_row("all", "", grouped(len(found)), short_bytes(_size(found)), "", "", style="bold")
    show(console, table)
    if uses := recorded_uses(store.root):
        show(console, _use_table(uses, found, now))
    if archives := list(stored(store.root / ARCHIVES_FOLDER)):
        show(console, f"{_unpacked(archives)} besides")
    if rest := list(leftovers(store.root)):
        show(
            console, f"{counted(len(rest), 'temporary file')} of writers that were killed; gc --delete takes them away"
        )
    return 0


def _use_table(uses: Sequence[Use], found: Sequence[Found], now: float) -> Table:
    table = Table("used by", "last", "entries", "size", title="Last uses")
    sizes = {entry.key: entry.size for entry in found}
    for use in uses[:MAX_SHOWN]:
        held = [sizes[key] for key in use.keys if key in sizes]
        table.add_row(use.name, _ago(now - use.when), grouped(len(held)), short_bytes(sum(held)))
    used = set().union(*(use.keys for use in uses))
    unused = [size for key, size in sizes.items() if key not in used]
    table.add_row("nobody that is known", "", grouped(len(unused)), short_bytes(sum(unused)))
    return table


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(flags: argparse.Namespace, store: CacheStore, console: Console) -> int:
    damaged: list[Found] = []
    with CacheProgress(console) as progress:
        found = list(entries(store.root))
        for entry, reason in look_at_all(found, partial(damage_of, store), THREADS, progress, "reading entries"):
            if reason:
                damaged.append(entry)
                name = store.marks(entry.path).get("name", "?")
                show(console, f"damaged: {entry.path} ({name}): {reason}")
                if flags.delete:
                    entry.path.unlink(missing_ok=True)
    total = f"{grouped(len(found))} {'entry' if len(found) == 1 else 'entries'} of {short_bytes(_size(found))} read"
    if not damaged:
        show(console, f"{total}, all whole")
        return 0
    mend = (
        "deleted: the next start makes them anew"
        if flags.delete
        else "verify --delete deletes them, for the next start to make anew"
    )
    show(console, f"{total}, {grouped(len(damaged))} damaged; {mend}")
    return EXIT_DAMAGED


# --- gc ---------------------------------------------------------------------------------------------------------------


def gc(flags: argparse.Namespace, store: CacheStore, console: Console) -> int:
    if not flags.config and flags.days is None:
        raise ValueError(
            "gc must be told what to keep: --config with every run file that uses this cache, --days, or both"
        )
    now, uses = time.time(), recorded_uses(store.root)
    keep: set[str] = set()
    for config in flags.config:
        keep |= wanted(config, store, console)
    since = now - flags.days * DAY_S if flags.days is not None else now
    keep = keep.union(*(use.keys for use in uses if use.when >= since))
    found = list(entries(store.root))
    unused = [entry for entry in found if entry.key not in keep and entry.written < since]
    rest = list(leftovers(store.root))
    archives = list(stored(store.root / ARCHIVES_FOLDER))
    idle = [archive for archive in archives if archive.used < since]  # reading the --config runs has touched theirs
    stay, go = _entries(len(found) - len(unused)), _entries(len(unused))
    show(console, f"{stay} stay, {go} of {short_bytes(_size(unused))} are not in use")
    going = {entry.key for entry in unused}
    for use in uses[:MAX_SHOWN]:
        if shared := len(use.keys & going):
            show(console, f"  {grouped(shared)} of them were used by {use.name}, {_ago(now - use.when)}")
    for archive in idle:
        size, used = short_bytes(archive.size), _ago(now - archive.used)
        show(console, f"the archive {archive.name}, {size} as it lies unpacked, was last read {used}")
    if not flags.delete:
        show(console, "nothing is deleted; --delete does that. A run that is training must be among the --config files")
        return 0
    if jobs := busy(store.root):
        raise ValueError(f"nothing is deleted: {', '.join(jobs)} fills this cache now; wait until it is done")
    for path in (*(entry.path for entry in unused), *rest):
        path.unlink(missing_ok=True)
    for archive in idle:
        remove(archive)
    forget_uses(store.root, {entry.key for entry in found} - going)
    forget(store.root, {entry.key for entry in found} - going)
    forget_scans(store.root, since)
    drop_dead_claims(store.root)
    sweep(store.root)
    show(
        console,
        f"deleted {_entries(len(unused))}, {short_bytes(_size(unused))}, {_unpacked(idle)}, and "
        f"{counted(len(rest), 'temporary file')}",
    )
    return 0


def wanted(config: Path, store: CacheStore, console: Console) -> set[str]:
    """Keys of all that a run needs.

    Raises:
        ValueError: the run uses another cache, or its data or weights are not there: then nobody knows what it needs.
    """
    loaded = load_config(config, ())
    if loaded.run.cache_dir.resolve() != store.root.resolve():
        raise ValueError(f"{config}: its cache_dir is {loaded.run.cache_dir}, not {store.root}; leave it out")
    family = family_class(loaded.family_name)(loaded.model, pseudo_huber_c=loaded.run.pseudo_huber_c)
    workers = loaded.run.map_num_proc or max(1, min(DEFAULT_WORKERS, os.cpu_count() or 1))
    with CacheProgress(console) as progress:
        manifests = scan(loaded, family, family.encoders(), store, workers=workers, regenerate=False, progress=progress)
    return keys_of(manifests.values())


COMMANDS = {"stats": stats, "verify": verify, "gc": gc}


def _size(found: Sequence[Found]) -> int:
    return sum(entry.size for entry in found)


def _unpacked(archives: Sequence[Stored]) -> str:
    size = sum(archive.size for archive in archives)
    return f"{counted(len(archives), 'unpacked archive')} of {short_bytes(size)}"


def _entries(number: int) -> str:
    return f"{grouped(number)} {'entry' if number == 1 else 'entries'}"


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"


if __name__ == "__main__":
    sys.exit(main())
