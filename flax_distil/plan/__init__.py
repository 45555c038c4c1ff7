"""Say, without a TPU, whether a recipe fits a TPU slice, what fills it and how long it takes.

libtpu compiles the very programs that the stages run, for chips that are not here.
"""

from typing import TYPE_CHECKING

from flax_distil.config import PlanConfig
from flax_distil.plan.topology import without_tpu

if TYPE_CHECKING:
    from flax_distil.plan.report import Plan


def run(config: PlanConfig) -> "list[Plan]":
    """Plan a recipe for every slice asked for; prints tables or JSON, and returns the plans.

    Raises:
        InputError: the recipe does not fit the slice's number of chips, names a model whose sizes
            are not known, or libtpu is missing.
    """
    without_tpu()
    from flax_distil.plan.planner import plan
    from flax_distil.plan.report import as_json, print_plan

    plans = []
    for topology in config.topology:
        plans.append(plan(config, topology))
        if not config.json:
            print_plan(plans[-1], config)
    if config.json:
        print(as_json(plans, config))
    return plans
