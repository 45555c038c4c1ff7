from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import PUBLISHED, WhisperDims, dims_to_hf
from flax_distil.model.spec import Spec
from flax_distil.model.student import choose_layers, init_student, layer_map

DIMS = WhisperDims(8, 32, 16, 3, 2, 4, 2, 32, 32, audio_positions=8, text_positions=8)


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    params = jax.tree.map(np.asarray, Spec(DIMS).init(jax.random.key(0)))
    generation = {"alignment_heads": [[0, 1], [2, 0], [3, 0], [3, 1]], "max_length": 8}
    config = dims_to_hf(DIMS) | {"decoder_start_token_id": 5}
    return Checkpoint(DIMS, params, config, generation, Path("folder"))


def test_maximally_spaced():
    spaced = partial(choose_layers, half="decoder")
    assert spaced(2, 32) == (0, 31)
    assert spaced(2, 4) == (0, 3)
    assert spaced(4, 12) == (0, 3, 7, 11)  # the published distil-small.en
    assert spaced(3, 4) == (0, 1, 3)
    assert spaced(1, 4) == (3,)
    assert spaced(23, 31)[11] == 14  # 11 · 30 / 22 is 15 but for rounding
    for available in range(1, 49):
        for count in range(1, available + 1):
            published = np.linspace(0, available - 1, count, dtype=int)
            published[-1] = available - 1
            assert spaced(count, available) == tuple(published.tolist())
            assert len(set(published.tolist())) == count


def test_layers_are_the_teachers(teacher):
    student = init_student(teacher, 2)
    theirs, ours = teacher.params["decoder"], student.params["decoder"]
    assert student.dims == WhisperDims(8, 32, 16, 3, 2, 2, 2, 32, 32, 8, 8)
    assert ours["layers"] == {0: theirs["layers"][0], 1: theirs["layers"][3]}
    assert {k: v for k, v in ours.items() if k != "layers"} == {
        k: v for k, v in theirs.items() if k != "layers"
    }
    assert student.params["encoder"] == teacher.params["encoder"]
    assert student.config["decoder_layers"] == 2
    assert student.config["encoder_layers"] == 3
    assert student.config["decoder_start_token_id"] == 5
    assert teacher.config["decoder_layers"] == 4
    assert len(teacher.params["decoder"]["layers"]) == 4


def test_explicit_layers_and_short_encoder(teacher):
    student = init_student(teacher, [2, 1], encoder_layers=2)
    theirs = teacher.params
    assert student.params["decoder"]["layers"][0] is theirs["decoder"]["layers"][2]
    assert student.params["decoder"]["layers"][1] is theirs["decoder"]["layers"][1]
    assert student.params["encoder"]["layers"][1] is theirs["encoder"]["layers"][2]
    assert student.dims.encoder_layers == 2
    abstract = Spec(student.dims).abstract()
    assert jax.tree.map(np.shape, student.params) == jax.tree.map(np.shape, abstract)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, -1], r"\[0, -1\] has \[-1\]: name each of 0 to 3"),
        ([0, 4], r"has \[4\]"),
        ([1, 1], "repeats a layer"),
        ([], "is empty"),
        (5, "5 decoder layers cannot be taken from a teacher with 4"),
        (0, "choose 1 to 4"),
    ],
)
def test_impossible_layers(teacher, layers, message):
    with pytest.raises(InputError, match=message):
        init_student(teacher, layers)


def test_alignment_heads_never_dangle(teacher):
    assert init_student(teacher, 2).generation == {
        "alignment_heads": [[0, 1], [1, 0], [1, 1]],
        "max_length": 8,
    }
    for theirs, layers, ours in (
        ([[1, 0]], (0, 3), [[1, 0], [1, 1]]),
        (None, (3,), [[0, 0], [0, 1]]),
        ([], (3,), []),
    ):
        other = replace(teacher, generation={"alignment_heads": theirs})
        assert init_student(other, layers).generation["alignment_heads"] == ours
    silent = replace(teacher, generation={"alignment_heads": [], "suppress_tokens": []})
    assert init_student(silent, 2).generation == silent.generation
    for kept in [(0,), (1, 2), (3, 0, 2)]:
        heads = init_student(teacher, kept).generation["alignment_heads"]
        assert heads
        assert all(0 <= layer < len(kept) for layer, _ in heads)


def test_layer_map_of_the_paper():
    assert layer_map(2, PUBLISHED["large-v2"].decoder_layers) == (15, 31)  # 1 → 16, 2 → 32
    assert layer_map(4, 4) == (0, 1, 2, 3)
    assert layer_map(2, 4) == (1, 3)
    assert layer_map(3, 4)[-1] == 3
