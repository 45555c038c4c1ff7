"""The rules against openai-whisper's filters, on random logits and random histories."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens

from flax_distil.decode.rules import RuleSet

VOCAB, END, NO_TIMESTAMPS, BEGIN = 60, 30, 37, 38  # text below END, timestamps from BEGIN
TOKENS = SimpleNamespace(
    encode=lambda text: [3], eot=END, no_timestamps=NO_TIMESTAMPS, timestamp_begin=BEGIN
)
RULES = RuleSet(
    end=END,
    no_speech=36,
    suppressed=(1, 2, 31, 36),
    suppressed_first=(3, END),
    timestamp_begin=BEGIN,
    no_timestamps=NO_TIMESTAMPS,
    max_initial=5,
)
PROMPT = 2


def theirs(filters, logits: np.ndarray, history: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(logits.copy())
    tokens = torch.from_numpy(np.pad(history, ((0, 0), (PROMPT, 0))))
    for each in filters:
        each.apply(logits, tokens)
    return logits.numpy()


@pytest.mark.parametrize("length", [0, 1, 2, 7])
@pytest.mark.parametrize("by_row", [False, True])
def test_timestamps_behind_a_prefix_equal_openai_s_behind_written_text(length, by_row):
    """The prompt's 0.00 s and words count as written: the next token need be no timestamp."""
    rng = np.random.default_rng(length)
    text, time = rng.integers(0, END, (200, length)), rng.integers(BEGIN, VOCAB, (200, length))
    history = np.where(rng.random((200, length)) < 0.5, text, time)
    logits = rng.normal(size=(200, VOCAB)) * rng.uniform(0.1, 8, (200, 1))
    logits[:, BEGIN:] += rng.uniform(-6, 3, (200, 1))
    logits = logits.astype(np.float32)
    filters = [
        SuppressTokens(RULES.suppressed),
        ApplyTimestampRules(TOKENS, PROMPT, RULES.max_initial),
    ]
    prefixed = replace(RULES, prefixed=True, suppressed_first=())
    opened = np.concatenate([np.tile([BEGIN, 5], (200, 1)), history], axis=1)
    result = ours(prefixed, logits, history, by_row)
    np.testing.assert_array_equal(result, theirs(filters, logits, opened))
    assert (result[:, :END] > -np.inf).any()


def ours(rules: RuleSet, logits: np.ndarray, history: np.ndarray, by_row: bool) -> np.ndarray:
    progress = rules.start(len(history), 32)
    if by_row:
        progress = progress._replace(index=jnp.zeros(len(history), jnp.int32))
    for token_B in history.T:
        progress = rules.advance(progress, jnp.asarray(token_B, jnp.int32))
    return np.asarray(rules.apply(jnp.asarray(logits), progress))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("by_row", [False, True])
def test_timestamps_equal_openai(length, by_row):
    rng = np.random.default_rng(length)
    rows = 200
    # Half of the tokens timestamps, so that pairs, openings and closings all occur.
    text, time = rng.integers(0, END, (rows, length)), rng.integers(BEGIN, VOCAB, (rows, length))
    history = np.where(rng.random((rows, length)) < 0.5, text, time)
    # From flat to peaked, so that the timestamps' mass wins in some rows and not in others.
    logits = rng.normal(size=(rows, VOCAB)) * rng.uniform(0.1, 8, (rows, 1))
    logits[:, BEGIN:] += rng.uniform(-6, 3, (rows, 1))
    logits = logits.astype(np.float32)
    filters = [
        SuppressBlank(TOKENS, PROMPT),
        SuppressTokens(RULES.suppressed),
        ApplyTimestampRules(TOKENS, PROMPT, RULES.max_initial),
    ]
    expected = theirs(filters, logits, history)
    np.testing.assert_array_equal(ours(RULES, logits, history, by_row), expected)
    only_time = np.isinf(expected[:, :BEGIN]).all(axis=1)
    assert only_time.all() if length == 0 else 0.05 < only_time.mean() < 0.95


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_words_behind_the_times_are_text(length):
    """The same as with those words among the text: only the ids differ."""
    rng, rows, words, texts = np.random.default_rng(length), 200, 4, END - 4
    place = np.r_[:texts, END:VOCAB, texts:END]  # of the ids behind, those of RULES
    behind = np.argsort(place)
    time = rng.integers(BEGIN, VOCAB, (rows, length))
    text = rng.choice(np.r_[:3, texts:END], (rows, length))  # many of the words
    history = np.where(rng.random((rows, length)) < 0.5, text, time)
    logits = rng.normal(size=(rows, VOCAB)).astype(np.float32)
    logits[:, BEGIN:] += rng.uniform(-6, 3, (rows, 1))
    logits[::2, texts:END] += 5
    moved = replace(
        RULES,
        end=END - words,
        no_speech=36 - words,
        suppressed=tuple(int(behind[token]) for token in RULES.suppressed),
        suppressed_first=(3, END - words),
        timestamp_begin=BEGIN - words,
        no_timestamps=NO_TIMESTAMPS - words,
        timestamp_end=VOCAB - words,
    )
    expected = ours(RULES, logits, history, False)[:, place]
    found = ours(moved, logits[:, place], behind[history], False)
    np.testing.assert_array_equal(found, expected)


def test_plain_text_equals_openai():
    rng = np.random.default_rng(0)
    rules = RuleSet(END, 36, RULES.suppressed, RULES.suppressed_first)
    filters = [SuppressBlank(TOKENS, PROMPT), SuppressTokens(RULES.suppressed)]
    for length in (0, 1, 4):
        history = rng.integers(0, END, (5, length))
        logits = rng.normal(size=(5, VOCAB)).astype(np.float32)
        expected = theirs(filters, logits, history)
        np.testing.assert_array_equal(ours(rules, logits, history, False), expected)


@pytest.mark.parametrize("length", [0, 1, 2, 9, 30])
@pytest.mark.parametrize("by_row", [False, True])
def test_repetition_rules_equal_transformers(length, by_row):
    from transformers.generation.logits_process import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    rng = np.random.default_rng(length)
    history = rng.integers(0, 5, (50, length))  # few tokens, so that much is repeated
    logits = rng.normal(size=(50, VOCAB)).astype(np.float32)
    for penalty, size in ((1.3, 0), (1.0, 3), (0.8, 2), (1.0, 1)):
        rules = RuleSet(END, 36, (), (), repetition_penalty=penalty, no_repeat_ngram=size)
        expected, tokens = torch.from_numpy(logits.copy()), torch.from_numpy(history)
        if penalty != 1:
            expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, expected)
        if size:
            expected = NoRepeatNGramLogitsProcessor(size)(tokens, expected)
        found = ours(rules, logits, history, by_row)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_runs_longer_than_any_text_cost_nothing():
    """A million steps would be compiled for a million tokens that nobody writes."""
    logits, steps = jnp.ones((1, VOCAB)), []
    for size in (0, 10**6):
        rules = RuleSet(END, 36, (), (), no_repeat_ngram=size)
        steps.append(len(jax.make_jaxpr(rules.apply)(logits, rules.start(1, 32)).eqns))
    assert steps[0] == steps[1]
