"""Every search reports whether the model ended a text or `max_tokens` did."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.decode.beam import NEVER, _Texts, beam, best_text
from flax_distil.decode.drafters import LookupDrafter
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import AudioStates, decode, make_recognizer, read_hypotheses
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import DecoderModel, Prompt, Sampling, SearchInput, Window
from flax_distil.decode.speculative import speculative
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Spec
from flax_distil.options import DecodeOptions
from flax_distil.text.tokens import load_tokens

DIMS = WhisperDims(8, 97, 32, 1, 4, 2, 2, 48, 64, audio_positions=20, text_positions=40)
SPEC = Spec(DIMS)
RULES = RuleSet(50, 51, (3, 4), (5, 50), no_timestamps=52, max_initial=10)
PROMPT = Prompt(jnp.array([[7, 8, 9]] * 4), jnp.int32(3), jnp.int32(1))
COLD, WARM = jnp.zeros(4), jnp.full(4, 0.1)


@pytest.fixture(scope="module")
def clips():
    """Four clips on which a random decoder ends after 1 to 36 tokens, or never."""
    params = jax.tree.map(lambda leaf: 4 * leaf, SPEC.init(jax.random.key(0)))
    mel = jax.random.normal(jax.random.key(2), (4, 40, 8))
    return params["decoder"], SPEC.encoder(params["encoder"])(mel)


def searches():
    lookup = dict(drafter=LookupDrafter(), draft_audio_BSE=COLD[:, None, None], draft_tokens=3)
    yield "greedy", greedy
    yield "drawn", partial(greedy, copies=2)
    yield "speculative", partial(speculative, **lookup)
    yield "beam", partial(beam, beams=3, collected=3)


@pytest.mark.parametrize(("name", "search"), searches(), ids=lambda value: str(value)[:12])
def test_cut_texts_are_those_that_more_room_would_not_have_kept(
    clips, name, search, tiny_en_folder
):
    """With room for 14 tokens, a text of fewer has ended and is found in the whole context too;
    one that takes all the room was cut."""
    (params, audio), tokens = clips, load_tokens(tiny_en_folder)
    active, windows = jnp.ones(4, bool), [Window("en")] * 4
    found = {}
    for room in (14, 38):
        sampling = Sampling(WARM, jnp.arange(4)) if name == "drawn" else None
        batch = SearchInput(audio, PROMPT, active, sampling)
        result = search(DecoderModel(SPEC, params), batch, rules=RULES, max_tokens=room)
        found[room] = read_hypotheses(jax.device_get(result), windows, tokens, [room] * 4)
    short, whole = found[14], found[38]
    assert {one.ended for one in (*short, *whole)} == {True, False}
    for one, other in zip(short, whole, strict=True):
        assert one.ended == (len(one.tokens) < 14)
        assert other.ended == (len(other.tokens) < 38)
        if "beam" not in name and one.ended:  # beams that go on can overtake
            assert (one.tokens, one.ended) == (other.tokens, other.ended)


def test_a_full_context_cuts_too(random_folders):
    """Behind a prompt of 226 tokens there is room for 223, whatever was asked for."""
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    audio_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1500, 16)), "float32")
    window = Window("en", tuple(range(300, 523)))
    for options in (DecodeOptions(max_tokens=400), DecodeOptions(max_tokens=400, beams=2)):
        (found,) = decode(recognizer, AudioStates(audio_BSD), options, [window])
        assert (len(found.tokens), found.ended) == (223, False)


def test_a_beam_that_goes_on_has_not_ended():
    """Where a patience below 1 stops the search, the best beam may be one that never ended."""

    def texts(count: int, best: float) -> _Texts:
        tokens = jnp.zeros((1, count, 3), jnp.int32)
        return _Texts(tokens, jnp.full((1, count), 2), jnp.full((1, count), best))

    going = texts(2, -1.0)
    assert not best_text(going, texts(1, -2.0), None)[1][0]
    assert best_text(going, texts(1, -0.5), None)[1][0]
    assert not best_text(going, texts(1, NEVER), None)[1][0]
