"""train.py with a toy family that takes its time to encode: python tests/helpers/slow_start.py --config X.toml"""

import os
import sys
import time
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # launchers run this file as a script
SECONDS = "TOY_ENCODE_S"  # of one clip


def slow_family() -> type:
    """Made when asked for, since decoding processes import this file too, and need no torch."""
    from tests.helpers.toy import ToyFamily, ToyText, ToyVAE

    class SlowVAE(ToyVAE):
        def encode(self, items):
            for _ in range(10):
                time.sleep(float(os.environ.get(SECONDS, "0")) * len(items) / 10)
            return super().encode(items)

    class SlowToy(ToyFamily):
        Config: ClassVar[type] = type("SlowConfig", (ToyFamily.Config,), {})

        def encoders(self):
            return [SlowVAE(), ToyText()]

    return SlowToy


def __getattr__(name: str) -> type:
    if name == "SlowToy":
        return slow_family()
    raise AttributeError(name)


def main() -> int:
    import models
    import train

    models.FAMILIES["slow"] = "tests.helpers.slow_start:SlowToy"
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
