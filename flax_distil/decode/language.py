"""The language spoken, as Whisper predicts it at the start of transcript."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import WhisperTokens


def detect_language(
    spec: Spec, params: Params, audio_BSD: Float[Array, "B S D"], tokens: WhisperTokens
) -> list[dict[str, float]]:
    """Probability of every language the checkpoint has, for each row.

    params: the decoder's.
    """
    codes, ids = tuple(tokens.languages), tuple(tokens.languages.values())
    probability_BL = jax.device_get(_detect(spec, params, audio_BSD, tokens.sot, ids))
    return [dict(zip(codes, map(float, row), strict=True)) for row in probability_BL]


@by_clip(static=("spec", "sot", "languages"))
def _detect(
    spec: Spec, params: Params, audio_BSD: Array, sot: int, languages: tuple[int, ...]
) -> Array:
    decoder = spec.decoder(params)
    start_B1 = jnp.full((audio_BSD.shape[0], 1), sot)
    logits_BV = decoder.logits(decoder(start_B1, audio_BSD))[:, 0]
    return jax.nn.softmax(logits_BV[:, jnp.array(languages)])


def only_language(generation: Mapping[str, Any], tokens: WhisperTokens) -> str | None:
    """The code of `language` in a generation config; None where there is none, or all English.

    Raises:
        InputError: there is no such language, or the model lacks it.
    """
    named = generation.get("language")
    if not named or not tokens.multilingual:
        return None
    code = to_language_code(named.strip("<|>"))
    tokens.prompt(code)  # raises where the model lacks it
    return code
