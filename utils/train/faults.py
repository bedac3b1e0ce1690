"""Why a run ended, as files that all ranks read: `<run>/errors/rank_N.json`, the oldest is what everyone tells.

Ranks that only lose their connection write none: theirs would bury the story of the rank that ended first.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FOLDER = "errors"


class Fault(NamedTuple):
    """The end of one rank."""

    rank: int
    text: str  # without a traceback
    place: str = ""  # what it was doing, see `Activity.place`
    told: bool = True  # by the rank itself; False: others noticed that it is gone

    def words(self) -> str:
        """For the ranks that end because of it."""
        place = f"\n  {self.place}" if self.place else ""
        if not self.told:
            return f"{self.text}{place}"
        return f"rank {self.rank} ended first, {self.place or 'and with it the run'}: {self.text}"


def write_fault(run_dir: Path, fault: Fault) -> None:
    """Note the end of a rank, unless that is done already. A disk that cannot take it is no reason to fail."""
    path = run_dir / FOLDER / f"rank_{fault.rank}.json"
    staged = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        staged.write_text(json.dumps(fault._asdict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            os.link(staged, path)  # unlike a rename it leaves alone what is there: the first to write it wins
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(staged, path)
    with suppress(OSError):
        staged.unlink(missing_ok=True)


def read_faults(run_dir: Path) -> list[Fault]:
    """All that are written, the oldest first by the file server's clock, which is the same for all ranks."""
    found = []
    paths: list[Path] = []
    with suppress(OSError):  # a disk that hesitates
        paths += (run_dir / FOLDER).glob("rank_*.json")
    for path in paths:
        with suppress(OSError, ValueError, TypeError):
            fault = Fault(**json.loads(path.read_text(encoding="utf-8")))
            found.append((path.stat().st_mtime_ns, fault.rank, fault))
    return [fault for *_, fault in sorted(found)]


def clear_faults(run_dir: Path) -> None:
    """Take away those of an earlier start; its logs still have them."""
    for path in (run_dir / FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)
