"""What the programs of published recipes cost: more than it did is a failure, with both numbers."""

import json

import pytest
from goldens import GOLDENS, lowered, versions

from flax_distil.plan.compiler import ANSWER, compiled, fingerprint

LARGER = 1.02


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.path.stem)
def test_a_program_costs_what_it_did(golden):
    """Compiled only where it is another program than it was, which takes minutes."""
    kept = json.loads(golden.path.read_text())
    if kept["versions"] != versions():
        pytest.skip(f"compiled with {kept['versions']}: python tests/plan/goldens.py --compile")
    program, target = lowered(golden)
    if fingerprint(program, target) == kept["fingerprint"]:
        return
    before, now = ANSWER.validate_python(kept["answer"]), compiled(program, target)
    if not hasattr(before, "needed"):
        assert not hasattr(now, "needed"), f"{golden} needs {now.needed} bytes and does not fit"
        for name in ("memory", "traffic", "cycles"):
            old, new = getattr(before, name), getattr(now, name)
            assert new <= LARGER * old, f"{name} of {golden} was {old:,.0f} and is {new:,.0f}"
        moved = [sum(one.bytes for one in answer.collectives) for answer in (before, now)]
        old, new = moved
        assert new <= LARGER * old, f"links of {golden} carried {old:,.0f} and {new:,.0f} bytes"
        assert now.host_transfers == before.host_transfers
