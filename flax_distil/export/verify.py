"""The proof of an export: PyTorch's logits of it against ours, on the same clip."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, load_audio, pad_or_trim
from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint


def largest_difference(folder: Path, audio: Path | None = None) -> float:
    """The largest absolute difference of a logit between Transformers' PyTorch Whisper and ours.

    Both read the Transformers folder and run in float32 over the log-mel of the first 30 s of
    `audio` (a synthetic clip where None) and the tokens that our greedy search finds in it.

    Raises:
        InputError: PyTorch is missing, or the audio cannot be read.
    """
    try:
        import torch
    except ImportError:
        raise InputError("to verify needs PyTorch: pip install 'flax-distil[torch]'") from None
    from transformers import WhisperForConditionalGeneration

    recognizer = make_recognizer(load_checkpoint(folder))
    clip = synthetic_clip() if audio is None else pad_or_trim(load_audio(audio))
    heard = recognize(recognizer, clip[None], DecodeOptions())[0]
    prompt = recognizer.tokens.prompt(heard.language)
    room = recognizer.spec.dims.text_positions - len(prompt)
    tokens_BL = jnp.array([[*prompt, *heard.tokens[:room]]])

    mel_BTM = log_mel(clip[None], recognizer.spec.dims.mels)
    audio_BSD = recognizer.spec.encoder(recognizer.params["encoder"])(mel_BTM)
    decoder = recognizer.spec.decoder(recognizer.params["decoder"])
    ours = np.asarray(decoder.logits(decoder(tokens_BL, audio_BSD)))

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features = torch.tensor(np.asarray(mel_BTM)).transpose(1, 2)
    with torch.no_grad():
        theirs = model(features, decoder_input_ids=torch.tensor(tokens_BL.tolist())).logits.numpy()
    return float(np.abs(ours - theirs).max())


def synthetic_clip() -> Float32[np.ndarray, "480000"]:
    """30 s of a gliding tone in noise: nothing to understand, but no silence either."""
    time = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    glide = np.sin(2 * np.pi * (150 + 20 * time) * time)
    noise = np.random.default_rng(0).normal(0, 0.02, time.size)
    return (0.2 * glide + noise).astype(np.float32)
