"""What the compiled TPU programs do and do not do, read from their text.

Nothing here runs on a TPU.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from flax_distil.plan.hlo import parse
from flax_distil.plan.planner import train_program

POSITIONS = (1500, 1536)  # of the audio, and filled up to whole blocks


def scores(text: str) -> list:
    """Arrays in HBM that have audio positions twice: the encoder's attention, unrolled."""
    return [
        array
        for _, array in parse(text).arrays()
        if sum(size in POSITIONS for size in array.shape) > 1 and not array.on_chip
    ]


def test_no_attention_scores_of_the_encoder_in_memory(train_text, recognition_texts):
    assert not scores(train_text)
    assert not scores(recognition_texts[0])


def test_no_attention_scores_of_a_text_to_the_audio_in_memory(train_text, chosen):
    """Neither the teacher's nor the student's: [clips, heads, tokens, positions]."""
    heads = (2, chosen.teacher.decoder_heads, 128)
    assert not [
        array
        for _, array in parse(train_text).arrays()
        if array.shape[-4:-1] == heads and array.shape[-1] in POSITIONS and not array.on_chip
    ]


def test_nothing_waits_for_the_host(train_text, recognition_texts):
    for text in (train_text, *recognition_texts):
        assert not parse(text).host_transfers()


def test_gradients_cross_the_links_once_and_nothing_else_does(train_text, chosen):
    """One reduction of what is trained: the embedding, used twice, in float32, once; the layers in
    bfloat16. Teacher and state are on each chip already: nothing is gathered."""
    collectives = parse(train_text).collectives(unknown=4)
    assert {one.kind for one in collectives} == {"all-reduce"}
    moved = {one.dtype: one.bytes for one in collectives}
    embedding = chosen.student.vocab * chosen.student.width
    positions = chosen.student.text_positions * chosen.student.width
    assert moved["f32"] == pytest.approx(4 * embedding, rel=0.1)
    layers = 2 * (8 * chosen.student.width**2 + 2 * chosen.student.width * 1024)
    assert moved["bf16"] == pytest.approx(2 * (layers + positions), rel=0.1)


def test_gradients_cross_while_others_are_computed(student_text):
    """Those of a layer's square matrices; v4's compiler has no room for it."""
    (layers,) = [one for one in parse(student_text).collectives(4) if one.dtype == "bf16"]
    assert layers.overlapped > 0.4 * layers.bytes


def test_accumulation_sums_gradients_before_they_cross(train_text, accumulated_text):
    """Once an update, in float32: four micro-batches send little more than one."""
    once, four = (
        {one.dtype: one.bytes for one in parse(text).collectives()}
        for text in (train_text, accumulated_text)
    )
    assert four["f32"] < 1.01 * (once["f32"] + 2 * once["bf16"])
    assert four["bf16"] < 0.1 * once["bf16"]


def test_the_loop_over_the_vocabulary_is_silent(train_text):
    """Its rounds are the same chips' own: more of them are no more collectives."""
    counts = [
        sum(one.times for one in parse(train_text).collectives(unknown=rounds))
        for rounds in (1, 100)
    ]
    assert counts[0] == counts[1]


def test_chips_recognise_alone(recognition_texts):
    for text in recognition_texts:
        assert not parse(text).collectives()


def test_a_token_moves_no_cache(recognition_texts):
    """In the loop nothing as large as a layer's cache is made anew: it is written in place."""
    module = parse(recognition_texts[1])
    own = 64 * 4 * (64 + 4) * 64  # clips, heads, tokens, head size
    loops = [one for _, one, _ in module.executed() if one.opcode == "while"]
    bodies = {loop.called("body") for loop in loops if module.rounds(loop) is None}
    assert bodies
    for body in bodies:
        for one in module.computations[body].values():
            for array in one.result:
                size = 1
                for side in array.shape:
                    size *= side
                if one.opcode in ("copy", "transpose", "concatenate") and not array.on_chip:
                    assert size < own, f"{one.name} makes {array.dtype}{list(array.shape)}"


def test_keys_and_values_fill_their_tiles(recognition_texts):
    """Heads lie side by side: each for itself, those of 64 would take twice their room."""
    held = [
        array
        for _, array in parse(recognition_texts[1]).arrays()
        if not array.on_chip and array.dtype == "bf16"
    ]
    seen = [array for array in held if array.shape[-2:] == (1500, 256)]
    assert seen
    for array in seen:
        assert array.bytes < 1.1 * 2 * math.prod(array.shape)
    assert not [array for array in held if array.shape[-1:] == (64,) and 1500 in array.shape]


def test_what_is_kept_is_not_computed(chosen):
    """With stored states only the embedding of the teacher's decoder is in memory; with audio
    states there are no waveforms."""
    whole = train_program(*chosen, 128)
    states = train_program(replace(chosen.config, stored_teacher=True), *chosen[1:], 128)
    kept = train_program(replace(chosen.config, audio_states=Path("states")), *chosen[1:], 128)
    embedding = 2 * chosen.teacher.vocab * chosen.teacher.width
    encoder = states.arguments["teacher"] - embedding
    assert 0 < encoder < 0.6 * whole.arguments["teacher"]
    width = 2 * 128 * 2 * chosen.teacher.width
    assert states.arguments["batch"] - whole.arguments["batch"] == width
    assert kept.flops < states.flops < whole.flops
    states, sound = 2 * 1500 * chosen.teacher.width * 2, 2 * 480_000 * 2
    assert kept.arguments["batch"] - whole.arguments["batch"] == states - sound
