"""Which language is spoken: Whisper's own answer, at the start of transcript."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip
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
