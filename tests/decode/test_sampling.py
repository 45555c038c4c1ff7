"""Drawn tokens: their distribution, and that rows do not disturb each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.decode.greedy import best_copy, next_token
from flax_distil.decode.prompts import prompt_ids
from flax_distil.decode.recognizer import AudioStates, decode, make_recognizer
from flax_distil.decode.search import Sampling, SearchResult, Window
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import DecodeOptions


def test_frequencies_are_those_of_the_tempered_softmax():
    logits_V = jnp.array([0.0, 1.0, 2.0, -jnp.inf, 0.5])
    rows = 20_000
    drawn = next_token(
        jnp.tile(logits_V, (rows, 1)),
        jnp.array(3),
        Sampling(jnp.full(rows, 0.7), jnp.arange(rows)),
    )
    frequencies = np.bincount(drawn, minlength=5) / rows
    # Three standard errors of a share of one half are 0.0106.
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits_V / 0.7), atol=0.011)


def test_without_temperature_it_is_the_most_probable():
    logits_BV = jnp.array([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    cold = Sampling(jnp.zeros(2), jnp.arange(2))
    assert next_token(logits_BV, jnp.array(0), cold).tolist() == [1, 0]
    assert next_token(logits_BV, jnp.array(0), None).tolist() == [1, 0]


def test_the_best_of_the_drawn_is_taken():
    found = SearchResult(
        jnp.arange(4)[:, None], jnp.array([4, 2, 3, 9]), -jnp.array([4.0, 3, 5, 9]), None
    )
    found = found._replace(no_speech=jnp.zeros(4))
    assert best_copy(found, 2, None).tokens.tolist() == [[0], [3]]  # -1 of -1, -1.5; -1 of -1.7, -1
    assert best_copy(found, 2, 0.0).tokens.tolist() == [[1], [2]]  # the sums themselves


def test_rows_of_several_temperatures_in_one_batch(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    audio_BSD = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1500, 16), np.float32))
    states = lambda first, last: AudioStates(audio_BSD[first:last])
    options = DecodeOptions(max_tokens=6, best_of=2)
    drawn = ((0.0, 5), (0.4, 5), (1.0, 5), (1.0, 6))
    windows = [Window("en", (), temperature, seed) for temperature, seed in drawn]
    mixed = decode(recognizer, states(0, 4), options, windows)
    assert mixed == decode(recognizer, states(0, 4), options, windows)
    alone = decode(recognizer, states(2, 3), options, windows[2:3])
    assert alone[0].tokens == mixed[2].tokens
    greedy = decode(recognizer, states(0, 1), options, windows[:1])
    assert greedy[0].tokens == mixed[0].tokens
    assert len({one.tokens for one in mixed}) == 4
    decode(recognizer, states(0, 1), options, [Window("en", (), 1.0, 2**40)])  # any seed will do


def test_hotwords_and_prompts_share_half_of_the_context(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    tokens, read = recognizer.tokens, partial(prompt_ids, recognizer.tokens, recognizer.context)
    window = Window("en", tuple(range(1000, 1300)))
    plain = read(DecodeOptions(), window)
    assert plain == [tokens.previous, *range(1077, 1300), tokens.sot, tokens.no_timestamps]
    options = DecodeOptions(hotwords="Marianne, Elinor", prefix="Dear")
    hot = tokens.encode(" Marianne, Elinor")
    mixed = read(options, window)
    assert mixed[: len(hot) + 1] == [tokens.previous, *hot]
    assert mixed.index(tokens.sot) == 224
    assert mixed[225:] == [tokens.no_timestamps, *tokens.encode(" Dear")]
    with pytest.raises(InputError, match="hotwords have 300 tokens: use at most 223"):
        read(DecodeOptions(hotwords=" day" * 300), window)
    with pytest.raises(InputError, match="prefix has 300 tokens: use at most 222"):
        read(DecodeOptions(prefix=" day" * 300), window)
