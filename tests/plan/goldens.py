"""What published recipes' programs cost, as the compiler said when it was last asked.

    python tests/plan/goldens.py                     tells which programs changed
    python tests/plan/goldens.py --compile [PART …]  compiles those anew whose name has such a part

A file is an answer of `flax_distil.plan.compiler`, found by the program's fingerprint, so that
`flax-distil plan --answers tests/plan/golden` needs no compiler for programs that did not change.
Those of `GOLDENS` are tested; those of `TABLE` are in docs/tpu.md besides.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flax_distil.plan.topology import libtpu_version, tpu_slice, without_tpu

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("golden")


class Golden(NamedTuple):
    """A program of a recipe on a slice; train is at the longest label bucket."""

    recipe: str
    slice: str
    program: str

    @property
    def path(self) -> Path:
        name = "-".join((self.recipe, self.slice, self.program))
        return FOLDER / f"{name.replace(': ', '-')}.json"


GOLDENS = [
    Golden("large-v2-32-2", "v4-8", "train"),
    Golden("large-v2-32-2", "v5e-8", "train"),
    Golden("small-12-4", "v4-8", "train"),
    Golden("small-12-4", "v5e-8", "train"),
    Golden("large-v2-32-2", "v4-8", "evaluate: decode"),
]
RECIPES = (
    "large-v2-32-2",
    "large-v3-32-2",
    "medium-en-24-2",
    "small-12-4",
    "base-6-2",
    "tiny-en-4-2",
)
SLICES = ("v4-8", "v5e-8", "v5p-8", "v6e-8")
TABLE = [
    *(Golden(recipe, name, "train") for recipe in RECIPES for name in SLICES),
    Golden("large-v3-32-2", "v5e-256", "train"),
    *(
        Golden(recipe, name, f"label: {program}")
        for recipe, name in (
            ("large-v2-32-2", "v4-8"),
            ("large-v2-32-2", "v5e-16"),
            ("small-12-4", "v5e-8"),
        )
        for program in ("encode", "decode")
    ),
]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"jax": version("jax"), "libtpu": libtpu_version() or ""}


def lowered(golden: Golden):
    """The program as the planner would ask the compiler about it."""
    from flax_distil.config import DistillConfig, EvaluateConfig, PseudoLabelConfig
    from flax_distil.plan import planner
    from flax_distil.plan.topology import devices
    from flax_distil.recipe import load_recipe

    recipe = ROOT / "recipes" / f"{golden.recipe}.toml"
    target, distill = tpu_slice(golden.slice), load_recipe(recipe, DistillConfig)
    sizes, chips = planner.sizes_of(recipe, distill), devices(tpu_slice(golden.slice))
    if golden.program == "train":
        length = max(distill.label_buckets)
        return planner.train_program(distill, *sizes, chips, length), target
    stage, _, name = golden.program.partition(": ")
    judge = load_recipe(recipe, EvaluateConfig if stage == "evaluate" else PseudoLabelConfig)
    options = planner.DecodeOptions(
        timestamps=getattr(judge, "timestamps", False), max_tokens=judge.max_tokens
    )
    chips = [chip for chip in chips if chip.process_index == chips[0].process_index]
    programs = planner.decode_programs(
        sizes.student if stage == "evaluate" else sizes.teacher,
        judge.dtype,
        -(-planner.batch_bucket(judge.batch_size) // len(chips)),
        options,
        chips,
        options.max_tokens,
    )
    return replace(programs[name == "decode"], name=golden.program), target


def main() -> None:
    """Says which programs changed, and with --compile asks the compiler about them."""
    from flax_distil.plan.compiler import compiled, fingerprint, write_answer

    parts = [part for part in sys.argv[1:] if part != "--compile"]
    for golden in dict.fromkeys(GOLDENS + TABLE):
        if not any(part in golden.path.name for part in parts or [""]):
            continue
        program, target = lowered(golden)
        name = fingerprint(program, target)
        known = golden.path.is_file() and json.loads(golden.path.read_text())["fingerprint"] == name
        print(golden.path.name, name, "is known" if known else "changed", flush=True)
        if not known and "--compile" in sys.argv:
            answer = compiled(program, target)
            write_answer(replace(answer, source=""), name, golden.path, versions=versions())
            print(f"  {answer}"[:200], flush=True)


if __name__ == "__main__":
    without_tpu()
    main()
