"""Speculative decoding against plain greedy search, and against the teacher's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.decode.assistant import make_assistant
from flax_distil.decode.beam import beam
from flax_distil.decode.drafters import (
    ENOUGH_DRAFTS,
    DraftedText,
    Drafts,
    LookupDrafter,
    model_drafter,
)
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import recognize
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import Acceptance, DecoderModel, Prompt, Sampling, SearchInput
from flax_distil.decode.speculative import speculative, verify
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student
from flax_distil.options import DecodeOptions

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
    audio_BSD = SPEC.encoder(params["encoder"])(mel)
    return DecoderModel(SPEC, params["decoder"]), blurred["decoder"], audio_BSD


def draft(model, batch, drafter, draft_tokens: int, **limits):
    """`speculative` with a drafter that shares the model's encoder."""
    drafting = dict(draft_audio_BSE=batch.audio_BSD, draft_tokens=draft_tokens)
    return speculative(model, batch, drafter=drafter, **drafting, **limits)


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [("model", 1), ("model", 4), ("lookup", 3)],
)
@pytest.mark.parametrize(("rules", "prompt"), [(RULES, ONE_PROMPT), (TIMES, PROMPTS)])
def test_writes_what_greedy_writes_row_by_row(pair, rules, prompt, kind, draft_tokens):
    model, blurred, audio = pair
    drafter = {
        "model": model_drafter(SPEC, blurred),
        "lookup": LookupDrafter(),
    }[kind]
    batch, limits = SearchInput(audio, prompt, ACTIVE), dict(rules=rules, max_tokens=39)
    expected = greedy(model, batch, **limits)
    found = draft(model, batch, drafter, draft_tokens, **limits)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    # Sums of up to 38 float32 logarithms, in another order of operations.
    np.testing.assert_allclose(found.log_probability, expected.log_probability, atol=1e-3)
    np.testing.assert_allclose(found.no_speech, expected.no_speech, rtol=1e-5)
    acceptance = found.acceptance
    assert 0 < acceptance.rate < 1  # neither side of the loop is idle
    assert 1 < acceptance.tokens_per_pass < draft_tokens + 1
    # The first token is the prompt's own pass.
    passes = np.maximum(acceptance.passes - 1, 0)
    np.testing.assert_array_equal(acceptance.drafted, draft_tokens * passes)
    assert acceptance.passes[2] == 0
    assert len(set(expected.lengths.tolist())) >= 3


def test_searches_write_the_same_with_a_tpus_caches(pair):
    model, blurred, audio = pair
    batch, limits = SearchInput(audio, PROMPTS, ACTIVE), dict(rules=TIMES, max_tokens=39)

    def every(spec):
        on_spec = dataclasses.replace(model, spec=spec)
        yield beam(on_spec, batch, beams=3, collected=3, **limits)
        yield draft(on_spec, batch, model_drafter(spec, blurred), 4, **limits)

    tpus = dataclasses.replace(SPEC, attention="splash")
    for ours, theirs in zip(every(tpus), every(SPEC), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.log_probability, theirs.log_probability, atol=1e-3)


def test_the_teacher_itself_is_always_right(pair):
    model, _, audio = pair
    batch = SearchInput(audio, ONE_PROMPT, ACTIVE)
    limits = dict(rules=RULES, max_tokens=36)
    found = draft(model, batch, model_drafter(SPEC, model.params), 3, **limits)
    np.testing.assert_array_equal(found.tokens, greedy(model, batch, **limits).tokens)
    # All but those after the end.
    written = np.asarray(found.acceptance.written)
    passes = np.where(ACTIVE, 1 + -(-(written - 1) // 4), 0)
    np.testing.assert_array_equal(found.acceptance.passes, passes)


@pytest.mark.parametrize("certain", [False, True])
def test_samples_are_the_teachers(certain):
    """Three tokens out of 6 ids: the frequencies of all 216 texts are p(a) p(b|a) p(c|ab)."""
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
    progress = rules.start(rows, 32)._replace(index=start)
    verified = verify(p[read], progress, drafts, rules, sampling)
    accepted = np.asarray(verified.accepted_B)
    assert {*accepted} == {0, 1, 2}
    # The places behind the last verified token are filled up by plain sampling.
    tokens, rng = np.asarray(verified.tokens_BK).copy(), np.random.default_rng(0)
    p = np.asarray(jax.nn.softmax(p / temperature), np.float64)
    p /= p.sum(-1, keepdims=True)
    for place in (1, 2):
        drawn = (p[tokens[:, place - 1]].cumsum(-1) < rng.random((rows, 1))).sum(-1)
        tokens[:, place] = np.where(accepted >= place, tokens[:, place], drawn)
    expected = p[0][:, None, None] * p[:, :, None] * p[None]
    seen = np.zeros((vocab,) * (draft_tokens + 1))
    np.add.at(seen, tuple(tokens.T), 1)
    # Chi-squared with 215 degrees of freedom: mean 215, deviation 21.
    assert ((seen - rows * expected) ** 2 / (rows * expected)).sum() < 215 + 4 * 21


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_draws_are_the_teachers(pair, kind):
    """The last two of six tokens are as frequent as in plain sampling, at temperature 10."""
    model, blurred, audio = pair
    other = jax.tree.map(lambda leaf: leaf / 2, blurred)
    drafter = model_drafter(SPEC, other) if kind == "model" else LookupDrafter()
    rows = 6000
    prompt = Prompt(jnp.repeat(ONE_PROMPT.tokens[:1], rows, axis=0), *ONE_PROMPT[1:])
    batch = SearchInput(jnp.repeat(audio[:1], rows, axis=0), prompt, jnp.ones(rows, bool))
    sampling = lambda seed: Sampling(jnp.full(rows, 10.0), seed * rows + jnp.arange(rows))
    limits = dict(rules=RULES, max_tokens=6)
    plain = greedy(model, batch._replace(sampling=sampling(0)), **limits)
    found = draft(model, batch._replace(sampling=sampling(1)), drafter, 2, **limits)
    # Rows differ in how many draft tokens are accepted.
    assert len({*np.asarray(found.acceptance.passes).tolist()}) > 1
    pairs = [np.asarray(one.tokens)[:, 4:] @ [97, 1] for one in (plain, found)]
    counts = np.stack([np.bincount(pair, minlength=97 * 97) for pair in pairs])
    counts = counts[:, counts.sum(0) > 9]
    freedom = counts.shape[1]
    statistic = (np.diff(counts, axis=0)[0] ** 2 / counts.sum(0)).sum()
    assert freedom > 100
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_at_temperature_0_a_row_is_greedy_and_seeds_are_its_own(pair):
    model, blurred, audio = pair
    drafter, limits = model_drafter(SPEC, blurred), dict(rules=RULES, max_tokens=36)
    sampling = Sampling(jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.arange(4))
    batch = SearchInput(audio, ONE_PROMPT, ACTIVE, sampling)
    mixed = draft(model, batch, drafter, 3, **limits)
    warm = batch._replace(sampling=sampling._replace(temperature=jnp.ones(4)))
    warm = draft(model, warm, drafter, 3, **limits)
    plain = greedy(model, batch._replace(sampling=None), **limits)
    np.testing.assert_array_equal(mixed.tokens[0], plain.tokens[0])
    np.testing.assert_array_equal(mixed.tokens[1:], warm.tokens[1:])
    assert (mixed.tokens[3] != plain.tokens[3]).any()


def test_looks_up_what_followed_the_last_time():
    text = jnp.array([[1, 2, 3, 9, 2, 3, 4, 2, 3, 0, 0], [5, 6, 7, 8, 7, 8, 0, 0, 0, 0, 0]])
    text = DraftedText(text, jnp.array([9, 6]), RULES.start(2, 32))
    drafts, _ = LookupDrafter().propose(None, text, 4, RULES, None)
    # "2 3" was followed by 9 and, later, by "4 2 3"; a loop goes on as a loop.
    np.testing.assert_array_equal(drafts.tokens, [[4, 2, 3, 4], [7, 8, 7, 8]])


@pytest.mark.parametrize("batch", [4])
def test_real_speech_with_a_truncated_student(monkeypatch, tiny_en, tiny_en_folder, windows, batch):
    monkeypatch.setattr("flax_distil.decode.recognizer.CPU_DRAFT_ROWS", batch)
    teacher, chosen = load_checkpoint(tiny_en_folder), windows[:batch]
    options = DecodeOptions(max_tokens=60)
    expected = recognize(tiny_en, chosen, options)
    for checkpoint in (init_student(teacher, [0, 1, 3]), None):
        assistant = make_assistant(tiny_en, checkpoint, 3)
        assert assistant.encoder is None  # the teacher's serves both
        found = recognize(dataclasses.replace(tiny_en, assistant=assistant), chosen, options)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        acceptance = Acceptance.total(one.acceptance for one in found)
        assert acceptance is not None
        assert acceptance.written == sum(len(one.tokens) + 1 for one in found)
        if checkpoint:
            assert 0 < acceptance.rate < 1


def test_a_cpu_uses_no_assistant_for_many_rows(tiny_en, windows):
    options, lookup = DecodeOptions(max_tokens=4), make_assistant(tiny_en, None)
    helped = dataclasses.replace(tiny_en, assistant=lookup)
    found = recognize(helped, windows, options)
    assert [one.acceptance for one in found] == [None, None]
    # Nor does its encoder run: this one has no parameters.
    useless = dataclasses.replace(lookup, encoder=(tiny_en.spec, {}))
    recognize(dataclasses.replace(tiny_en, assistant=useless), windows, options)
    assert recognize(helped, windows[:1], options)[0].acceptance
    drawn = recognize(helped, windows, options, temperature=0.5)
    assert all(one.acceptance for one in drawn)  # a draw does not depend on the batch


def test_an_assistant_pays_from_its_break_even_on(tiny_en):
    lookup = dataclasses.replace(make_assistant(tiny_en, None), break_even=0.5)
    many, few = 2 * ENOUGH_DRAFTS, ENOUGH_DRAFTS - 2
    assert lookup.pays(None)
    assert lookup.pays(Acceptance(passes=30, drafted=many, accepted=many // 2, written=80))
    assert not lookup.pays(Acceptance(passes=30, drafted=many, accepted=many // 2 - 1, written=80))
    assert lookup.pays(Acceptance(passes=9, drafted=few, accepted=0, written=9))


def test_an_unfit_assistant_is_refused(tiny_en, base_folder, windows):
    with pytest.raises(InputError, match=r"51,865 tokens and the model 51,864"):
        make_assistant(tiny_en, load_checkpoint(base_folder))
    with pytest.raises(InputError, match="0 draft tokens"):
        make_assistant(tiny_en, None, 0)
    helped = dataclasses.replace(tiny_en, assistant=make_assistant(tiny_en, None))
    with pytest.raises(InputError, match="5 beams"):
        recognize(helped, windows, DecodeOptions(beams=5))
