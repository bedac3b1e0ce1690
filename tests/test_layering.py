"""The structure holds: imports point one way, files and functions stay small, nothing is monkeypatched."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each may import what stands before it, and itself
ORDER = [
    "utils/version.py",
    "utils/doctor.py",
    "utils/dist.py",
    "utils/dist_library.py",
    "utils/dist_meeting.py",
    "utils/monitor",
    "models",
    "utils/config",
    "utils/data",
    "utils/train",
    "train.py",
]
# models know nothing of the rest: they can be used, and tested, by themselves
ISLANDS = {"models": {"models"}, "utils/monitor": {"utils/monitor", "utils/dist.py"}}
MAX_LINES = {"train.py": 150}
SOURCES = sorted(
    p for folder in ("models", "utils", "examples") for p in (ROOT / folder).rglob("*.py") if p.stat().st_size
)
SOURCES += [ROOT / "train.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def place(path: str) -> str | None:
    """Which entry of ORDER a file or a dotted module belongs to."""
    return next((p for p in ORDER if path == p or path.startswith(p + "/") or path + ".py" == p), None)


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, as paths."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.replace(".", "/") for name in found if name.split(".")[0] in ("models", "utils", "train")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = place(str(path.relative_to(ROOT)))
    if here is None:
        return  # examples may use anything
    for other in imported(path):
        there = place(other)
        if there is None:
            continue  # the package `utils` itself
        assert ORDER.index(there) <= ORDER.index(here), f"{path.name} imports {other}"
        assert there in ISLANDS.get(here, set(ORDER)), f"{path.name} imports {other}: {here} must not know it"


def test_utils_know_no_family_by_name():
    for path in (ROOT / "utils").rglob("*.py"):
        assert not any(name.startswith("models/wan") for name in imported(path)), path


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    limit = MAX_LINES.get(path.name, 400)
    assert len(text.splitlines()) < limit, f"{path.name} has {len(text.splitlines())} lines"
    if text.strip() and path in SOURCES:
        assert ast.get_docstring(ast.parse(text)), f"{path.name} needs a first sentence"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{path.name}:{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_monkeypatched(path):
    """No assignment to an attribute of an imported module or class."""
    tree = ast.parse(path.read_text())
    names = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            owner = target
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            patched = isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in names
            assert not patched, f"{path.name}:{node.lineno} sets {ast.unparse(target)}"


def test_train_does_no_work_at_import():
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.If)
    tree = ast.parse((ROOT / "train.py").read_text())
    assert all(isinstance(node, allowed) for node in tree.body)
    heavy = {"torch", "deepspeed", "diffusers", "transformers", "models", "utils"}
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not top & heavy, "--help must not wait for them"
