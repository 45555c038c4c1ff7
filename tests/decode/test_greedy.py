"""Greedy search against Transformers', token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.decode.search import likeliest
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import DecodeOptions

OPTIONS = DecodeOptions(max_tokens=60)


def test_a_random_model_writes_what_transformers_writes(random_folders, transformers_writes):
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((3, 480_000), np.float32)
    noise[:, 160_000:] = 0
    ours = recognize(make_recognizer(load_checkpoint(random_folders[0])), noise, OPTIONS)
    theirs = transformers_writes(random_folders[0], noise)
    assert [list(one.tokens) for one in ours] == theirs
    assert {len(row) for row in theirs} == {60}  # it never learned to end


@pytest.mark.parametrize("batch", [1, 2])
def test_real_speech_is_written_as_transformers_writes_it(
    tiny_en, tiny_en_folder, windows, transformers_writes, batch
):
    chosen = windows[:batch] if batch > 1 else windows[-1:]
    ours = recognize(tiny_en, chosen, OPTIONS)
    theirs = transformers_writes(tiny_en_folder, chosen)
    assert [list(one.tokens) for one in ours] == theirs
    assert len(set(map(tuple, theirs))) == batch


def test_the_likeliest_is_the_first_of_equals():
    logits = np.random.default_rng(0).integers(-3, 4, (2, 50, 7)).astype(np.float32)
    logits[0, 0], logits[0, 1, 3:] = -np.inf, np.inf
    assert ((logits == logits.max(-1, keepdims=True)).sum(-1) > 1).any()
    np.testing.assert_array_equal(likeliest(jnp.array(logits)), logits.argmax(-1))
