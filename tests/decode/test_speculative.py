"""Speculative decoding against plain greedy search, and against the teacher's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.decode.assistant import make_assistant
from flax_distil.decode.beam import BeamSearch, beam
from flax_distil.decode.drafters import Drafts, LookupDrafter, Text, frequent_ids, model_drafter
from flax_distil.decode.greedy import Prompt, Sampling, greedy
from flax_distil.decode.options import DecodeOptions, total
from flax_distil.decode.recognizer import recognize
from flax_distil.decode.rules import RuleSet, begin
from flax_distil.decode.speculative import PATIENCE, speculative, verify
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student

DIMS = WhisperDims(8, 97, 32, 1, 4, 2, 2, 48, 64, audio_positions=20, text_positions=40)
SPEC = Spec(DIMS)
RULES = RuleSet(50, 51, (3, 4), (5, 50), no_timestamps=52, max_initial=10)
TIMES = dataclasses.replace(RULES, timestamp_begin=60, no_repeat_ngram=2)
ONE_PROMPT = Prompt(jnp.array([[7, 8, 9]] * 4), jnp.int32(3), jnp.int32(1))
PROMPTS = Prompt(jnp.array([[7, 8, 9, 1]] * 4), jnp.array([4, 4, 4, 1]), jnp.array([1, 1, 1, 0]))
ACTIVE = jnp.array([True, True, False, True])


@pytest.fixture(scope="module")
def pair():
    """A random teacher that does not settle on one token, and the same with noise on it."""
    params = jax.tree.map(lambda leaf: 4 * leaf, SPEC.init(jax.random.key(0)))
    noise = SPEC.init(jax.random.key(1))
    blurred = jax.tree.map(lambda leaf, other: leaf + 0.15 * other, params, noise)
    mel = jax.random.normal(jax.random.key(2), (4, 40, 8))
    return params["decoder"], blurred["decoder"], SPEC.encoder(params["encoder"])(mel)


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [("model", 1), ("model", 4), ("part of the vocabulary", 2), ("lookup", 3)],
)
@pytest.mark.parametrize(("rules", "prompt"), [(RULES, ONE_PROMPT), (TIMES, PROMPTS)])
def test_writes_what_greedy_writes_row_by_row(pair, rules, prompt, kind, draft_tokens):
    params, blurred, audio = pair
    drafter = {
        "model": model_drafter(SPEC, blurred),
        "part of the vocabulary": model_drafter(SPEC, blurred, jnp.arange(20, 97)),
        "lookup": LookupDrafter(),
    }[kind]
    arguments = (SPEC, params, audio, prompt, ACTIVE, rules, 39)
    expected = greedy(*arguments)
    for break_even in (0.7, 0.0):  # rows that stop guessing, and none
        found, acceptance = speculative(
            *arguments, drafter, audio, draft_tokens, break_even=break_even
        )
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        # Sums of up to 38 float32 logarithms, in another order of operations.
        np.testing.assert_allclose(found.log_probability, expected.log_probability, atol=1e-3)
        np.testing.assert_allclose(found.no_speech, expected.no_speech, rtol=1e-5)
    assert 0 < acceptance.rate < 1  # neither side of the loop is idle
    assert 1 < acceptance.tokens_per_pass < draft_tokens + 1
    assert acceptance.passes[2] == 0
    assert len(set(expected.lengths.tolist())) >= 3


def test_searches_write_the_same_with_a_tpus_caches(pair):
    params, blurred, audio = pair

    def every(spec):
        arguments = (spec, params, audio, PROMPTS, ACTIVE, TIMES, 39)
        yield beam(*arguments, BeamSearch(3, 3, None, as_transformers=False))
        yield speculative(*arguments, model_drafter(spec, blurred), audio, 4)[0]

    tpus = dataclasses.replace(SPEC, attention="splash")
    for ours, theirs in zip(every(tpus), every(SPEC), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.log_probability, theirs.log_probability, atol=1e-3)


def test_the_teacher_itself_is_always_right(pair):
    params, _, audio = pair
    arguments = (SPEC, params, audio, ONE_PROMPT, ACTIVE, RULES, 36)
    found, acceptance = speculative(*arguments, model_drafter(SPEC, params), audio, 3)
    np.testing.assert_array_equal(found.tokens, greedy(*arguments).tokens)
    # All but those behind the end, which nobody needs.
    written = np.asarray(acceptance.written)
    np.testing.assert_array_equal(
        acceptance.passes, np.where(ACTIVE, 1 + -(-(written - 1) // 4), 0)
    )


@pytest.mark.parametrize("certain", [False, True])
def test_samples_are_the_teachers(certain):
    """Three tokens out of 6 ids: the frequencies of all 216 texts are p(a) p(b|a) p(c|ab).

    Every third row does not guess.
    """
    rows, vocab, draft_tokens = 60_000, 6, 2
    rules = RuleSet(end=99, no_speech=0, suppressed=(), suppressed_first=())
    p = jax.random.normal(jax.random.key(0), (vocab, vocab)) * 1.5  # by the token before
    q = jax.random.normal(jax.random.key(1), (vocab, vocab)) * 1.5
    temperature = 0.7
    sampling = Sampling(jnp.full(rows, temperature), jnp.arange(rows))
    start = jnp.zeros(rows, jnp.int32)
    key_first, key_second = jax.random.split(jax.random.key(2))
    if certain:
        first = jnp.argmax(q[start], -1)
        drafts = Drafts(jnp.stack([first, jnp.argmax(q[first], -1)], 1), None)
    else:
        first = jax.random.categorical(key_first, q[start] / temperature)
        second = jax.random.categorical(key_second, q[first] / temperature)
        scores = jax.nn.log_softmax(jnp.stack([q[start], q[first]], 1) / temperature)
        drafts = Drafts(jnp.stack([first, second], 1), scores)
    read = jnp.concatenate([start[:, None], drafts.tokens], axis=1)
    progress = begin(rows)._replace(index=start)
    guessing = jnp.arange(rows) % 3 > 0
    verified = verify(p[read], progress, drafts, guessing, rules, sampling)
    agreed = np.asarray(verified.agreed_B)
    assert ({*agreed[guessing]}, {*agreed[~guessing]}) == ({0, 1, 2}, {0})
    # The places behind the last verified token are filled up by plain sampling.
    tokens, rng = np.asarray(verified.tokens_BK).copy(), np.random.default_rng(0)
    p = np.asarray(jax.nn.softmax(p / temperature), np.float64)
    p /= p.sum(-1, keepdims=True)
    for place in (1, 2):
        drawn = (p[tokens[:, place - 1]].cumsum(-1) < rng.random((rows, 1))).sum(-1)
        tokens[:, place] = np.where(agreed >= place, tokens[:, place], drawn)
    expected = p[0][:, None, None] * p[:, :, None] * p[None]
    seen = np.zeros((vocab,) * (draft_tokens + 1))
    np.add.at(seen, tuple(tokens.T), 1)
    # Chi-squared with 215 degrees of freedom: mean 215, deviation 21.
    assert ((seen - rows * expected) ** 2 / (rows * expected)).sum() < 215 + 4 * 21


def test_a_row_that_guesses_badly_goes_on_alone(pair):
    params, blurred, audio = pair
    arguments = (SPEC, params, audio, ONE_PROMPT, ACTIVE, RULES, 39)
    text = greedy(*arguments).tokens

    def passes(drafter, break_even):
        found, acceptance = speculative(*arguments, drafter, audio, 4, break_even=break_even)
        np.testing.assert_array_equal(found.tokens, text)
        np.testing.assert_array_equal(
            acceptance.drafted, 4 * (acceptance.passes - acceptance.alone)
        )
        return (np.asarray(column)[ACTIVE] for column in (acceptance.passes, acceptance.alone))

    # The first token is the prompt's own pass.
    assert [*passes(model_drafter(SPEC, params), 0.5)][1].max() == 1
    assert [*passes(LookupDrafter(), 0.0)][1].max() == 1
    every, alone = passes(model_drafter(SPEC, blurred), 0.9)
    assert alone.max() > 10
    assert (every - alone)[every > 10].min() > PATIENCE
    # Of the last row no guess is right: one after every eighth pass.
    every, alone = passes(LookupDrafter(pause=8), 0.2)
    assert (every[-1] - 1) // 10 <= (every - alone)[-1] <= (every[-1] - 1) // 9


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_draws_stay_the_teachers_where_rows_stop_guessing(pair, monkeypatch, kind):
    """The last two of six tokens are as frequent as in plain sampling, at 10 times the warmth."""
    monkeypatch.setattr("flax_distil.decode.speculative.PATIENCE", 0)  # stops at once
    params, blurred, audio = pair
    other = jax.tree.map(lambda leaf: leaf / 2, blurred)
    drafter = model_drafter(SPEC, other) if kind == "model" else LookupDrafter(pause=2)
    rows = 6000
    prompt = Prompt(jnp.repeat(ONE_PROMPT.tokens[:1], rows, axis=0), *ONE_PROMPT[1:])
    arguments = (SPEC, params, jnp.repeat(audio[:1], rows, axis=0), prompt, jnp.ones(rows, bool))
    sampling = lambda seed: Sampling(jnp.full(rows, 10.0), seed * rows + jnp.arange(rows))
    plain = greedy(*arguments, RULES, 6, sampling(0))
    found, acceptance = speculative(
        *arguments, RULES, 6, drafter, arguments[2], 2, sampling(1), break_even=0.4
    )
    # Rows that guess and rows that do not share their passes.
    assert len({*np.asarray(acceptance.alone).tolist()}) > 1
    pairs = [np.asarray(one.tokens)[:, 4:] @ [97, 1] for one in (plain, found)]
    counts = np.stack([np.bincount(pair, minlength=97 * 97) for pair in pairs])
    counts = counts[:, counts.sum(0) > 9]
    freedom = counts.shape[1]
    statistic = (np.diff(counts, axis=0)[0] ** 2 / counts.sum(0)).sum()
    assert freedom > 100
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_at_temperature_0_a_row_is_greedy_and_seeds_are_its_own(pair):
    params, blurred, audio = pair
    arguments = (SPEC, params, audio, ONE_PROMPT, ACTIVE, RULES, 36, model_drafter(SPEC, blurred))
    sampling = Sampling(jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.arange(4))
    mixed, _ = speculative(*arguments, audio, 3, sampling)
    warm, _ = speculative(*arguments, audio, 3, sampling._replace(temperature=jnp.ones(4)))
    plain = greedy(*arguments[:-1])
    np.testing.assert_array_equal(mixed.tokens[0], plain.tokens[0])
    np.testing.assert_array_equal(mixed.tokens[1:], warm.tokens[1:])
    assert (mixed.tokens[3] != plain.tokens[3]).any()


def test_looks_up_what_followed_the_last_time():
    text = jnp.array([[1, 2, 3, 9, 2, 3, 4, 2, 3, 0, 0], [5, 6, 7, 8, 7, 8, 0, 0, 0, 0, 0]])
    text = Text(text, jnp.array([9, 6]), begin(2))
    drafts, _ = LookupDrafter().propose(None, text, 4, RULES, None)
    # "2 3" was followed by 9 and, later, by "4 2 3"; a loop goes on as a loop.
    np.testing.assert_array_equal(drafts.tokens, [[4, 2, 3, 4], [7, 8, 7, 8]])


@pytest.mark.parametrize("batch", [4])
def test_real_speech_with_a_truncated_student(monkeypatch, tiny_en, tiny_en_folder, windows, batch):
    monkeypatch.setattr("flax_distil.decode.recognizer.CPU_DRAFT_ROWS", batch)
    teacher, chosen = load_checkpoint(tiny_en_folder), windows[:batch]
    options = DecodeOptions(max_tokens=60)
    expected = recognize(tiny_en, chosen, options)
    for checkpoint, vocabulary in ((init_student(teacher, [0, 1, 3]), 8000), (None, None)):
        assistant = make_assistant(tiny_en, checkpoint, 3, vocabulary)
        assert assistant.encoder is None  # the teacher's serves both
        found = recognize(tiny_en, chosen, options, assistant)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        acceptance = total(one.acceptance for one in found)
        assert acceptance is not None
        assert acceptance.written == sum(len(one.tokens) + 1 for one in found)
        if checkpoint:
            assert 0 < acceptance.rate < 1


def test_a_cpu_asks_no_assistant_for_many_rows(tiny_en, windows):
    lookup = make_assistant(tiny_en, None)
    found = recognize(tiny_en, windows, DecodeOptions(max_tokens=4), lookup)
    assert [one.acceptance for one in found] == [None, None]
    # Nor does it hear: here it could not.
    deaf = dataclasses.replace(lookup, encoder=(tiny_en.spec, {}))
    recognize(tiny_en, windows, DecodeOptions(max_tokens=4), deaf)
    assert recognize(tiny_en, windows[:1], DecodeOptions(max_tokens=4), lookup)[0].acceptance
    drawn = recognize(tiny_en, windows, DecodeOptions(max_tokens=4, temperature=0.5), lookup)
    assert all(
        one.acceptance for one in drawn
    )  # a draw does not depend on how many others there are


def test_frequent_ids(tiny_en):
    tokens = tiny_en.tokens
    rare = tokens.encode(" xylophone")
    ids = frequent_ids(tokens, 300, [rare])
    assert len(ids) == len(set(ids)) == 300 + 1 + 1501
    assert {*rare, tokens.eot, tokens.timestamp_begin} <= set(ids)
    assert not set(ids).intersection(tokens.suppressed)


def test_an_unfit_assistant_is_refused(tiny_en, base_folder, windows):
    with pytest.raises(InputError, match=r"51,865 tokens and the model 51,864"):
        make_assistant(tiny_en, load_checkpoint(base_folder))
    with pytest.raises(InputError, match="0 draft tokens"):
        make_assistant(tiny_en, None, 0)
    with pytest.raises(InputError, match="5 beams"):
        recognize(tiny_en, windows, DecodeOptions(beams=5), make_assistant(tiny_en, None))
