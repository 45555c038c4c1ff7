"""Counting in HLO text, on a program of TPU's kind that is small enough to count by hand."""

import pytest

from flax_distil.plan.hlo import arrays_of, parse

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_read (param_0: bf16[6,256,512], param_1: s32[]) -> bf16[256,512] {
  %param_0 = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero)
  ROOT %flat = bf16[256,512]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%fused_write (param_0.1: bf16[6,256,512], param_1.1: bf16[256,512], param_2: s32[]) -> bf16[1] {
  %param_0.1 = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %wide = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} bitcast(%param_1.1)
  %param_2 = s32[]{:T(128)} parameter(2)
  ROOT %update = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0.1, %wide, %param_2)
}

%body (state: (s32[], bf16[6,256,512])) -> (s32[], bf16[6,256,512]) {
  %state = (s32[]{:T(128)}, bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %all = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %read = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} fusion(%all, %index), kind=kLoop, calls=%fused_read, backend_config={"window_config":{"estimated_cycles":"100"}}
  %sum = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%read), channel_id=1, to_apply=%add
  %written = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} fusion(%all, %sum, %index), calls=%fused_write
  ROOT %next = (s32[]{:T(128)}, bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) tuple(%index, %written)
}

%condition (state.1: (s32[], bf16[6,256,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %state.1 = (s32[]{:T(128)}, bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%index.1, %limit), direction=LT
}

ENTRY %main (x: bf16[6,256,512]) -> bf16[6,256,512] {
  %x = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %start = s32[]{:T(128)} constant(0)
  %fresh = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} copy(%x), backend_config={"window_config":{"estimated_cycles":"50"}}
  %begin = (s32[]{:T(128)}, bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) tuple(%start, %fresh)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  ROOT %result = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
ROW = 256 * 512 * 2


def test_a_loop_s_body_counts_as_often_as_it_runs():
    module = parse(PROGRAM)
    assert module.runs() == {"main": 1, "body": 6, "condition": 6}


def test_traffic_is_slices_read_and_updates_written():
    """A copy of six rows, read and written; then in six rounds one row read and one written.

    The loop's counters add some bytes.
    """
    assert parse(PROGRAM).traffic() == pytest.approx(12 * ROW + 6 * (ROW + ROW), abs=100)


def test_cycles_are_the_compilers():
    assert parse(PROGRAM).cycles() == 50 + 6 * 100


def test_collectives_are_counted_by_kind_and_type():
    (sum,) = parse(PROGRAM).collectives()
    assert sum == ("all-reduce", "bf16", 6, 6 * ROW, 0)


OVERLAPPED = """
%begin (operand: bf16[256,512]) -> (bf16[256,512], u32[]) {
  %operand = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %sum.1 = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%operand), channel_id=1, to_apply=%add
  ROOT %started = (bf16[256,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%sum.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (part: bf16[256,512], x: bf16[512,512], y: bf16[512,512]) -> (bf16[512,512], bf16[256,512]) {
  %part = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %y = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(2)
  %product = bf16[512,512]{1,0:T(8,128)(2,1)} convolution(%x, %y), dim_labels=bf_io->bf
  %sum.2 = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%part), channel_id=1, to_apply=%add
  ROOT %both = (bf16[512,512]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)}) tuple(%product, %sum.2)
}

%end (part.1: bf16[256,512]) -> bf16[256,512] {
  %part.1 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %sum.3 = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%part.1), channel_id=1, to_apply=%add
  ROOT %ended = bf16[256,512]{1,0:T(8,128)(2,1)} custom-call(%sum.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[256,512], b: bf16[512,512]) -> bf16[256,512] {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %first = (bf16[256,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %moving = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%first), index=0
  %then = (bf16[512,512]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)}) fusion(%moving, %b, %b), kind=kCustom, calls=%meanwhile
  %moved = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%then), index=1
  %alone = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%a), channel_id=2, to_apply=%add
  ROOT %last = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%moved), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_what_crosses_during_a_product_counts_once_and_as_overlapped():
    (sum,) = parse(OVERLAPPED).collectives()
    assert sum == ("all-reduce", "bf16", 2, 2 * ROW, ROW)


def test_a_loop_that_data_ends_runs_as_often_as_it_is_told():
    module = parse(PROGRAM.replace("direction=LT", "direction=EQ"))
    assert module.runs()["body"] == 1
    assert module.runs(unknown=9)["body"] == 9


def test_what_follows_a_kernel_is_read():
    """A Pallas kernel's metadata breaks its line, and goes on with a brace."""
    kernel = (
        "  %kernel = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%read), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{}"\n'
        '}}, metadata={op_name="f"}\n'
    )
    module = parse(PROGRAM.replace("  %sum", f"{kernel}  %sum"))
    assert module.collectives() == parse(PROGRAM).collectives()
    assert "kernel" in module.computations["body"]


def test_what_waits_for_the_host_is_found():
    assert not parse(PROGRAM).host_transfers()
    line = "%copy = (bf16[8]{0}, token[]) infeed(%start), infeed_config="
    spied = PROGRAM.replace("%fresh = bf16", line + "\n  %fresh = bf16")
    assert [one.opcode for one in parse(spied).host_transfers()] == ["infeed"]


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("f32[16,20]{1,0}", 4 * 320),
        ("f32[16,20]{1,0:T(8,128)}", 4 * 16 * 128),
        ("f32[16,20]{0,1:T(8,128)}", 4 * 128 * 24),
        ("bf16[4,20,1500,64]{3,2,1,0:T(8,128)(2,1)}", 2 * 4 * 20 * 1504 * 128),
        ("pred[]{:T(512)}", 1),
    ],
)
def test_arrays_fill_whole_tiles(text, bytes):
    (found,) = arrays_of(text)
    assert found.bytes == bytes


def test_arrays_on_the_chip_are_told():
    assert [one.on_chip for one in arrays_of("(f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)})")] == [
        True, False,
    ]  # fmt: skip
