"""Imports only go down, rooms on one level never meet, torch starts at `models`, no cycles: read from the source as text (ast)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src" / "burnish"
LAYERS = [
    {"types", "errors"},
    {"recipe"},
    {"run"},
    {"data", "tasks"},
    {"models"},
    {"training", "evaluation"},
    {"advice", "report", "serving"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MEANINGLESS = {"utils", "util", "helpers", "common", "core", "base", "misc", "manager", "factory", "builder", "registry"}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if top_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            for alias in node.names:
                yield (f"burnish.{alias.name}" if node.module == "burnish" else str(node.module)), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] != "burnish" or len(parts) == 1 or parts[1] == room:
            continue
        other = parts[1]
        assert other in LEVEL, f"{path}:{line}: room {other} has no layer"
        assert LEVEL[other] < LEVEL[room], f"{path}:{line}: {room} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_starts_at_models(path: Path) -> None:
    room = room_of(path)
    if LEVEL.get(room, 99) >= LEVEL["models"] and room not in ("report", "__init__"):
        return
    heavy = [(name, line) for name, line in imported(path) if name.split(".")[0] in ("torch", "transformers", "peft")]
    assert not heavy, f"{path}: {heavy}"


def test_rooms_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        others = {n.split(".")[1] for n, _ in imported(path, top_only=True) if n.startswith("burnish.") and n.count(".") >= 1}
        graph.setdefault(room, set()).update(others - {room})
    done: set[str] = set()
    while ready := [room for room in graph if room not in done and not (graph[room] & graph.keys()) - done]:
        done.update(ready)
    assert done == set(graph), f"a cycle among {set(graph) - done}"


def test_names_say_something() -> None:
    assert not [path for path in FILES if path.stem in MEANINGLESS]


def test_import_is_light() -> None:
    code = "import sys, burnish; print([m for m in ('torch', 'transformers', 'scipy', 'pydantic', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["recipe", "explain"], ["runs", "list"], ["report", "--help"]])
def test_quick_commands_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['burnish', *{arguments!r}]\nfrom burnish.cli import main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_public_names_exist() -> None:
    import burnish

    for name in burnish.__all__:
        assert getattr(burnish, name) is not None, name
    with pytest.raises(AttributeError):
        burnish.no_such_name  # noqa: B018
