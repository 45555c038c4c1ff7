"""The laws of docs/design.md that can be checked by reading the code."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1] / "flax_distil"
ORDER = """errors, files, cache, terminal, recipe, options, config, parallel, text, audio, model, \
decode, transcription, data, pseudo_label, distill, evaluate, export, plan, fetch, sweep, demo, \
doctor, cli"""
ROOMS = ORDER.split(", ")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package, parsed."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """The rooms of flax_distil that a module imports, inside functions too."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in modules if name.startswith("flax_distil.")}


def lines(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def test_imports_run_one_way():
    for path, tree in sources():
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            later = ROOMS[ROOMS.index(room) + 1 :]
            assert not imported(tree).intersection(later), f"{path} imports from a later room"


def test_the_model_file_is_pure_maths():
    text = (ROOT / "model" / "whisper.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert imported(ast.parse(text)) == {"model"}
    for name in ("platform_dependent", "local_devices", "default_backend", "get_abstract_mesh"):
        assert name not in text, f"the model depends on the device it runs on: {name}"


def test_the_train_step_is_at_most_40_lines():
    tree = ast.parse((ROOT / "distill" / "step.py").read_text(encoding="utf-8"))
    (step,) = (node for node in tree.body if getattr(node, "name", "") == "train_step")
    assert lines(step) <= 40


def test_a_class_name_has_one_meaning():
    places = defaultdict(list)
    for path, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_every_import_is_declared():
    """Without conditions, or with an extra where the import is inside a function."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    name = lambda requirement: re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
    always = set(map(name, project["dependencies"]))
    anywhere = always.union(*(map(name, one) for one in project["optional-dependencies"].values()))
    packages = packages_distributions()
    for path, tree in sources():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {one.split(".")[0] for one in modules} - sys.stdlib_module_names:
                declared = always if node in tree.body else anywhere
                found = {name(one) for one in packages.get(module, [module])}
                assert module == ROOT.name or found & declared, f"{path} imports {module}"


def test_sizes_are_printed(capsys):
    """Files over 400 lines and functions over 60 ask to be split: a table, not a failure."""
    rows = []
    for path, tree in sources():
        place = path.relative_to(ROOT)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > 400:
            rows.append(f"{length:5} lines  {place}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and lines(node) > 60:
                rows.append(f"{lines(node):5} lines  {place}:{node.lineno} {node.name}")
    with capsys.disabled():
        print("", *sorted(rows, reverse=True), sep="\n")
