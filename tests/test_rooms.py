"""The source as text: imports go down, never up, not even inside functions, and never in a circle; no unpickling."""

import ast
import functools
from pathlib import Path

import pytest
from tiny import ROOT

FLOORS = [  # from the ground up; rooms of one floor do not know each other
    {"utils"},
    {"scenes", "datasets", "metrics"},
    {"models.networks"},
    {"models.branches"},
    {"models.fusion"},
    {"models", "models.published", "models.exported", "reporting"},
    {"evaluation", "prediction"},
    {"training"},
    {"experiments"},
    {"scripts"},
]
FILES = [path for path in ROOT.rglob("*.py") if not {".venv", ".venv-baselines", "tests"} & set(path.parts)]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR), "scripts")


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Every module of the project that the file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    own = room_of(module)
    for other in imports_of(MODULES[module]):
        room = room_of(other)
        assert room == own or FLOOR[room] < FLOOR[own], f"{module} ({own}) imports {other} ({room})"


def test_no_circles():
    waiting = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"modules that import each other: {sorted(waiting)}"


def test_nothing_unpickles():
    """torch.load only with weights_only=True; no pickle, no eval, nothing of the kind."""
    assert "models.published.checkpoints" in MODULES
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "dill.load"), path
                assert called != "torch.load" or keywords.get("weights_only") == "True", path
                assert called not in ("np.load", "numpy.load") or "allow_pickle" not in keywords, path
