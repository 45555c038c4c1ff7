"""Recognition over several chips, pretended ones here: what one chip would have written."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speculative import DIMS, RULES, SPEC, TIMES

from flax_distil.decode.beam import beam
from flax_distil.decode.drafters import model_drafter
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import recognize
from flax_distil.decode.search import DecoderModel, Prompt, Sampling, SearchInput
from flax_distil.decode.speculative import speculative
from flax_distil.options import DecodeOptions
from flax_distil.parallel.clips import chips_of, replicate
from flax_distil.plan.hlo import COLLECTIVES

PROMPTS = Prompt(jnp.array([[7, 8, 9, 1]] * 3), jnp.array([4, 4, 1]), jnp.array([1, 1, 0]))
ONE_PROMPT = Prompt(jnp.array([[7, 8, 9]] * 3), jnp.int32(3), jnp.int32(1))
DRAWN = Sampling(jnp.array([0.0, 1.0, 0.7]), jnp.array([1, 2, 3]))


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda leaf: 4 * leaf, SPEC.init(jax.random.key(0)))
    mel = jax.random.normal(jax.random.key(7), (3, 40, DIMS.mels))
    return params["decoder"], SPEC.encoder(params["encoder"])(mel)


SEARCHES = {
    "greedy": greedy,
    "sampling": lambda model, batch, **limits: greedy(
        model, batch._replace(sampling=DRAWN), copies=2, **limits
    ),
    "beams": partial(beam, beams=3, collected=3),
    "speculative": lambda model, batch, **limits: speculative(
        model,
        batch,
        drafter=model_drafter(model.spec, model.params),
        draft_audio_BSE=batch.audio_BSD,
        draft_tokens=2,
        **limits,
    ),
}


@pytest.mark.parametrize(
    ("search", "rules", "prompt"),
    [("greedy", RULES, ONE_PROMPT)] + [(search, TIMES, PROMPTS) for search in SEARCHES],
)
def test_every_search_finds_the_same_on_four_chips(model, search, rules, prompt):
    """Three clips on four chips, one of them not active; the head kept there, and made here."""
    params, audio = model
    active = jnp.array([True, False, True])
    everywhere = replicate(params, jax.devices()[:4])
    assert (chips_of(params), chips_of(everywhere)) == (1, 4)
    kept = everywhere["tokens"]["embedding"].T
    found, expected = (
        SEARCHES[search](
            DecoderModel(SPEC, place, head),
            SearchInput(audio, prompt, active),
            rules=rules,
            max_tokens=30,
        )
        for head, place in ((kept, everywhere), (None, params))
    )
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-3)


def test_chips_search_alone(model):
    """Nothing crosses between them while they search."""
    params, audio = model
    everywhere, audio = replicate((params, audio), jax.devices()[:3])
    active = jnp.ones(3, bool)
    model, batch = DecoderModel(SPEC, everywhere), SearchInput(audio, ONE_PROMPT, active)
    lowered = greedy.trace(model, batch, rules=RULES, max_tokens=30).lower()
    text = lowered.compile().as_text()
    assert "while" in text
    assert not [kind for kind in COLLECTIVES if kind in text]


def test_real_speech_on_four_chips(tiny_en, windows):
    """One clip too, of which three chips have copies."""
    everywhere = dataclasses.replace(tiny_en, params=replicate(tiny_en.params, jax.devices()[:4]))
    options = DecodeOptions(max_tokens=24)
    expected = recognize(tiny_en, windows, options)
    assert [one.tokens for one in recognize(everywhere, windows, options)] == [
        one.tokens for one in expected
    ]
    assert recognize(everywhere, windows[:1], options)[0].tokens == expected[0].tokens


def test_cpus_keep_their_parameters_on_one_device(tiny_en):
    assert chips_of(tiny_en.params) == 1
    assert replicate(tiny_en.params) is tiny_en.params
