"""The command line of `python -m models.convert`, a sub-command a job; errors are one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

FORMATS = ("comfyui", "diffusers", "kohya")
LAYOUTS = ("official", "diffusers")
DTYPES = ("bfloat16", "float16", "float32")
EXIT_USAGE = 2


class _AddLora(argparse.Action):
    """Each --lora begins an entry of its own, with a weight of 1."""

    def __call__(self, _: Any, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        namespace.lora = [*(namespace.lora or []), (values, 1.0)]


class _SetWeight(argparse.Action):
    """A --weight belongs to the --lora before it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if not namespace.lora:
            parser.error("--weight must follow the --lora that it is for")
        namespace.lora = [*namespace.lora[:-1], (namespace.lora[-1][0], values)]


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m models.convert", description="Convert Wan's adapters and models.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    lora = _command(commands, "lora", "write a LoRA, DoRA or LoKr in another program's format")
    lora.add_argument("source", type=Path, metavar="IN", help="adapter in any format: a file, or a folder saved here")
    lora.add_argument("out", type=Path, metavar="OUT", help="file to write, .safetensors")
    lora.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    lora.add_argument("--base", type=Path, metavar="PATH", help="the model it belongs to; only DoRA needs it")

    merge = _command(commands, "merge", "add adapters to a model's weights and write the whole transformer")
    merge.add_argument("--base", type=Path, required=True, metavar="PATH", help="transformer: a file or a folder")
    merge.add_argument("--lora", action=_AddLora, type=Path, required=True, metavar="FILE", help="may be repeated")
    merge.add_argument(
        "--weight", action=_SetWeight, type=float, default=argparse.SUPPRESS, help="of the --lora before it; 1"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    merge.add_argument("--layout", choices=LAYOUTS, default="official", help="names of the tensors; official")
    merge.add_argument("--dtype", choices=DTYPES, help="of the result; as in the base unless given")
    _add_device(merge)

    resize = _command(commands, "resize", "bring a LoRA to a lower rank by singular values")
    resize.add_argument("source", type=Path, metavar="IN", help="LoRA in any format; the output is in the same")
    resize.add_argument("out", type=Path, metavar="OUT", help="file to write, .safetensors")
    resize.add_argument("--rank", type=int, required=True, metavar="R", help="highest rank of a module")
    resize.add_argument(
        "--dynamic", type=float, metavar="SHARE", help="lowest rank of each module that keeps this share, (0, 1]"
    )
    _add_device(resize)

    inspect = _command(commands, "inspect", "tell what a file is, or the files of a folder", writes=False)
    inspect.add_argument("path", type=Path, metavar="PATH", help="file or folder")
    return whole


def _command(commands: Any, name: str, text: str, writes: bool = True) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    if writes:
        command.add_argument("--force", action="store_true", help="replace what is there")
    return command


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="where matrices are multiplied, such as cuda; cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    flags = parser().parse_args(arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        _run(flags, console)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        errors.print(f"{flags.command}: {line}", markup=False, highlight=False)
        return EXIT_USAGE
    return 0


def _run(flags: argparse.Namespace, console: Console) -> None:
    # torch takes seconds, which --help should not wait for
    from models.convert import adapters, inspection, merging

    commands = {
        "lora": adapters.convert,
        "merge": merging.merge,
        "resize": adapters.resize,
        "inspect": inspection.inspect,
    }
    settings = {key: value for key, value in vars(flags).items() if key != "command"}
    commands[flags.command](console=console, **settings)


if __name__ == "__main__":
    sys.exit(main())
