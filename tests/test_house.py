"""Law 1 of docs/design.md: imports run one way."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "flax_distil"
ORDER = """errors, files, cache, recipe, options, config, parallel, text, audio, model, decode, \
transcribe, data, pseudo_label, distill, evaluate, export, plan, fetch, demo, cli"""
ROOMS = ORDER.split(", ")


def imported(path: Path) -> set[str]:
    """The rooms of flax_distil that a file imports, inside functions too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in modules if name.startswith("flax_distil.")}


def test_imports_run_one_way():
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            later = ROOMS[ROOMS.index(room) + 1 :]
            assert not imported(path).intersection(later), f"{path} imports from a later room"
