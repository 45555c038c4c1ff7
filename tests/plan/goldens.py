"""What published recipes' programs cost, as the compiler said when it was last asked.

    python tests/plan/goldens.py [--compile]     tells which programs changed; compiles those anew

A file is an answer of `flax_distil.plan.compiler`, found by the program's fingerprint, so that
`flax-distil plan --answers tests/plan/golden` needs no compiler for programs that did not change.
Those of `GOLDENS` are tested; the others are those of the table in docs/tpu.md.
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


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"jax": version("jax"), "libtpu": libtpu_version() or ""}


def lowered(golden: Golden):
    """The program as the planner would ask the compiler about it."""
    from flax_distil.config import DistillConfig, EvaluateConfig
    from flax_distil.plan import planner
    from flax_distil.plan.topology import devices
    from flax_distil.recipe import load_recipe

    recipe = ROOT / "recipes" / f"{golden.recipe}.toml"
    target, distill = tpu_slice(golden.slice), load_recipe(recipe, DistillConfig)
    sizes, chips = planner.sizes_of(recipe, distill), devices(tpu_slice(golden.slice))
    if golden.program == "train":
        length = max(distill.label_buckets)
        return planner.train_program(distill, *sizes, chips, length), target
    judge = load_recipe(recipe, EvaluateConfig)
    options = planner.DecodeOptions(max_tokens=judge.max_tokens)
    rows = -(-judge.batch_size // len(chips))
    _, decode = planner.decode_programs(
        sizes.student, judge.dtype, rows, options, chips, options.max_tokens
    )
    return replace(decode, name=golden.program), target


def main() -> None:
    """Says which programs changed, and with --compile asks the compiler about them."""
    from flax_distil.plan.compiler import compiled, fingerprint, write_answer

    for golden in GOLDENS:
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
