"""Imports run downwards only: a file imports from lower ranks and from its own folder."""

import ast
import pathlib

import pytest

RANKS = {
    "errors": -1,  # every room may import it
    "ops": 0,
    "layers": 1,
    "attribution": 1,
    "metrics": 1,
    "data": 1,
    "models": 2,
    "training": 3,
    "viz": 3,
    "evaluation": 4,
    "cli": 5,
}
ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "attnzoom_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source):
    """Full names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the rank"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(folder, source):
    for name in imported(source):
        parts = name.split(".")
        if parts[0] == "attnzoom_jax" and len(parts) > 1 and parts[1] in RANKS:
            if parts[1] != folder and RANKS[parts[1]] >= RANKS[folder]:
                yield name
        if parts[0] in ("configs", "tools", "train", "eval", "explain"):
            yield name
        if folder == "attribution" and parts[0] == "flax":
            yield name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file):
    folder = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if folder != "__init__":
        assert folder in RANKS, f"give {folder} a rank here and in docs/design.md"
        assert list(violations(folder, file.read_text())) == []


def test_the_check_sees_what_it_should():
    assert list(violations("ops", "from attnzoom_jax.layers import gate"))
    assert list(violations("layers", "from attnzoom_jax import metrics"))
    assert list(violations("attribution", "def f():\n    import flax.linen"))
    assert list(violations("training", "import train"))
    assert not list(violations("training", "from attnzoom_jax.models import bind"))


def test_no_room_is_called_by_what_it_is_not():
    forbidden = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [file for file in FILES if file.stem in forbidden or file.parent.name in forbidden]
