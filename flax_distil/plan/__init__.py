"""Plans a recipe for a TPU slice without a TPU: whether it fits, its memory and its time.

libtpu compiles the programs that the stages run, for absent chips.
"""

import json
from itertools import product
from typing import TYPE_CHECKING

from flax_distil.config import PlanConfig
from flax_distil.errors import InputError
from flax_distil.plan.topology import without_tpu

if TYPE_CHECKING:
    from flax_distil.plan.report import Plan


def run(config: PlanConfig) -> "list[Plan]":
    """Plan every recipe for every slice; prints tables or JSON, and returns the plans.

    Raises:
        InputError: a recipe does not fit a slice's number of chips, names a model whose sizes are
            not known, or libtpu is missing.
    """
    if config.mfu is not None and not 0 < config.mfu <= 1:
        raise InputError(f"mfu {config.mfu:g} is a share of the peak: 40 % is 0.4")
    if config.label_length is not None and config.label_length < 1:
        raise InputError(f"label_length {config.label_length} must be 1 or more")
    without_tpu()
    from flax_distil.plan.planner import plan
    from flax_distil.plan.report import plan_record, print_plan, write_table

    plans = []
    if config.table is not None:
        write_table(config.table, [])  # fails before hours of compiling
    for recipe, topology in product(config.recipes, config.topology):
        plans.append(plan(recipe, topology, config))
        if not config.json:
            print_plan(plans[-1], config)
        if config.table is not None:
            write_table(config.table, plans[-1:])
    if config.json:
        print(json.dumps([plan_record(plan, config) for plan in plans], indent=2))
    return plans
