"""Rooflines, remedies and the search for a batch, on figures made up to be checked by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flax_distil.config import PlanConfig
from flax_distil.errors import InputError
from flax_distil.plan import run
from flax_distil.plan.compiler import Compiled, Program, Refusal, refusal
from flax_distil.plan.hlo import Collective, Held
from flax_distil.plan.planner import largest_fitting
from flax_distil.plan.report import (
    TABLE,
    Estimate,
    Plan,
    TooLarge,
    knob,
    plan_record,
    print_plan,
    remedy,
    write_table,
)
from flax_distil.plan.topology import GIB, tpu_slice

CONFIG = PlanConfig((Path("recipes/x.toml"),), ("v4-8",), chip_hour_price=3.0)
PROGRAM = Program("train", 64, 16, 256, 1.1e15, {"teacher": 3 * GIB}, None)
ANSWER = Compiled(
    int(3 * GIB), int(6 * GIB), 0, 0, 6e11, 8e8, (Collective("all-reduce", "bf16", 7, 4e8),), (),
    (), 1.0,
)  # fmt: skip


def made_up(target, chips=4, name="train", rows=16, **changes):
    program = replace(PROGRAM, name=name, rows=rows)
    return Estimate(program, replace(ANSWER, **changes), target, chips, 51865)


@pytest.mark.parametrize("most", [1, 2, 7, 16, 24, 100])
@pytest.mark.parametrize("first", [1, 8, 64])
@pytest.mark.parametrize("expected", [lambda rows, most: rows, lambda rows, most: 2 * most])
def test_the_search_finds_the_most_that_fits_to_an_eighth(first, most, expected):
    asked = []

    def fits(rows):
        asked.append(rows)
        return rows <= most and expected(rows, most)

    found = largest_fitting(fits, first)
    assert most - max(most // 8, 0) <= found <= most
    assert len(set(asked)) == len(asked)


def test_a_good_guess_leaves_few_programs_to_compile():
    """Asked of the compiler: 32, what those let expect, and an eighth more, which it refuses."""
    asked = []

    def fits(rows):
        asked.append(rows)
        return 144 if rows <= 150 else 0

    assert largest_fitting(fits, 32) == 144
    assert asked == [32, 144, 162]


def test_the_search_says_when_nothing_fits():
    assert largest_fitting(lambda rows: False, 8) is None
    assert largest_fitting(lambda rows: rows <= 5, 8, refused=16, exact=False) == 4


def test_shares_and_lengths_that_are_none_are_refused():
    for change, message in [
        ({"mfu": 40.0}, "mfu 40 is a share of the peak: 40 % is 0.4"),
        ({"mfu": 0.0}, "mfu 0 is a share"),
        ({"label_length": 0}, "label_length 0 must be 1 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(CONFIG, **change))


def test_the_roofline_is_what_takes_longest():
    reduced = (Collective("all-reduce", "bf16", 1, 4e8), Collective("all-gather", "bf16", 1, 2e8))
    program = replace(PROGRAM, flops=4 * 275e12)
    answer = replace(ANSWER, traffic=2400e9, collectives=reduced)
    seconds = Estimate(program, answer, tpu_slice("v4-8"), 4, 51865).seconds
    assert seconds == pytest.approx((1.0, 2.0, (2 * 0.75 * 4e8 + 0.75 * 2e8) / 300e9))
    assert (seconds.bound, seconds.limit) == (2.0, "memory")


@pytest.mark.parametrize(
    ("shape", "where", "part"),
    [
        ((16, 256, 51865), "jit(train_step)/sub", "vocabulary_chunk"),
        ((51865, 1280), "state.params['decoder']", "fsdp"),
        ((2, 16, 20, 256, 1500), "jit(train_step)/jvp()/exp", "remat"),
        ((16, 1500, 5120), "jit(train_step)/while", "accumulation"),
    ],
)
def test_each_tensor_has_its_knob(shape, where, part):
    assert part in knob(shape, where, PROGRAM, 51865)


def test_the_compiler_s_two_complaints_are_read():
    early = refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (25.21G) exceeds available HBM (15.75G)."
    )
    late = refusal("Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded hbm")
    assert (early.needed, early.available) == (25.21 * GIB, 15.75 * GIB)
    assert late.needed == 16.5 * GIB
    assert refusal("Ran out of memory in memory space vmem. Used 16.47M of 16.00M vmem.") is None


def too_large(fitting=None, name="train", length=256):
    program = replace(PROGRAM, name=name, clips=512, rows=64, length=length)
    return TooLarge(program, Refusal(25 * GIB, 16 * GIB), 8, fitting)


def test_what_does_not_fit_names_tensor_and_knob():
    held = Held(2.5 * GIB, "f32", (16, 256, 51865), "jit(train_step)/sub")
    sizes = {"temporaries": int(11 * GIB), "tensors": (held,) * 2}
    there = made_up(tpu_slice("v5e-8"), rows=24, chips=8, **sizes)
    said = remedy(too_large(there))
    # 3 would do, but 64 clips are not divided by it
    assert "fits with 24 clips a chip at a time: compute.accumulation 4 times as large (16" in said
    assert "takes 14.0 GiB: teacher 3.00, temporaries 11.00 GiB" in said
    assert "2.50 GiB f32[16, 256, 51865] jit(train_step)/sub" in said
    assert "needs 25.0 of 16.0 GiB" in said
    assert said.count("a time):\n     2.50 GiB f32") == 1
    # 24 clips on each of 8 chips are 192: filled up to 256 they would not fit
    assert "a batch_size of at most 128" in remedy(too_large(there, "label: decode"))


def test_what_never_fits_says_what_is_too_large():
    assert "arguments take teacher 3.00 GiB: shard them with compute.fsdp" in remedy(too_large())
    assert "choose chips with more memory" in remedy(too_large(name="label: decode"))


def test_json_of_what_does_not_fit_tells_what_does():
    target = tpu_slice("v5e-8")
    plan = Plan(Path("x.toml"), target, 9, (too_large(made_up(target, rows=24)), too_large()))
    record = json.loads(json.dumps(plan_record(plan, CONFIG)))
    large, never = record["programs"]
    assert (large["fits"], large["largest_batch"], large["fitting"]["memory"]) == (
        False,
        24,
        9 * GIB,
    )
    assert (never["largest_batch"], never["fitting"]) == (None, None)


def test_hours_and_price_follow_from_the_updates(capsys):
    """0.5 s an update by memory; 1.0 s of compute at a tenth of the peak is 10 s."""
    target = tpu_slice("v4-8")
    plan = Plan(Path("recipes/x.toml"), target, 7200, (made_up(target),))
    assert plan.hours(None) == pytest.approx(2.0)
    assert plan.hours(0.1) == pytest.approx(20.0)
    record = json.loads(json.dumps(plan_record(plan, CONFIG)))
    assert (record["chip_hours"], record["price"]) == pytest.approx((8.0, 24.0))
    assert record["programs"][0]["mfu"] == pytest.approx(1.0)
    print_plan(plan, CONFIG)
    out = " ".join(capsys.readouterr().out.split())
    assert "7,200 updates, at the roofline, at least: 2.0 h, 8 chip-hours, 24 at your price" in out
    assert "7 all-reduce of 400.0 MB bf16 (0% overlapped)" in out


def test_a_table_keeps_what_it_had(tmp_path):
    path = tmp_path / "tpu.md"
    path.write_text(f"before\n\n{TABLE[0]}\n{TABLE[1]}\n\nafter\n")
    for name in ("v4-8", "v5e-8", "v4-8"):
        target = tpu_slice(name)
        decode = made_up(target, name="label: decode")
        large = too_large(made_up(target, rows=24), length=128)
        write_table(path, [Plan(Path("recipes/x.toml"), target, 7200, (made_up(target), decode))])
        write_table(path, [Plan(Path("recipes/x.toml"), target, 7200, (large,))])
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| x | v4-8 | train, 256 tokens |") == 1
    assert text.count("| x | v5e-8 |") == 3
    assert "25.0 of 16.0: no" in text
    with pytest.raises(InputError, match="has no lines"):
        write_table(tmp_path / "other.md", [])
