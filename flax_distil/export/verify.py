"""Verification of an export: logits and texts of PyTorch against ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, load_audio, pad_or_trim
from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.tensors import import_torch
from flax_distil.options import DecodeOptions


def largest_difference(folder: Path, audio: Path | None = None) -> float:
    """The largest absolute difference of a logit between Transformers' PyTorch Whisper and ours.

    Both read the Transformers folder and run in float32 over the log-mel of the first 30 s of
    `audio` (None: a synthetic clip) and the tokens of our greedy search.

    Raises:
        InputError: PyTorch is missing, or the audio cannot be read.
    """
    torch = import_torch("to verify")
    from transformers import WhisperForConditionalGeneration

    recognizer = make_recognizer(load_checkpoint(folder))
    clip = synthetic_clip() if audio is None else pad_or_trim(load_audio(audio))
    hypothesis = recognize(recognizer, clip[None])[0]
    prompt = recognizer.tokens.prompt(hypothesis.language)
    room = recognizer.spec.dims.text_positions - len(prompt)
    tokens_BL = jnp.array([[*prompt, *hypothesis.tokens[:room]]])

    mel_BTM = log_mel(clip[None], recognizer.spec.dims.mels)
    audio_BSD = recognizer.spec.encoder(recognizer.params["encoder"])(mel_BTM)
    decoder = recognizer.spec.decoder(recognizer.params["decoder"])
    ours = np.asarray(decoder.logits(decoder(tokens_BL, audio_BSD)))

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features = torch.tensor(np.asarray(mel_BTM)).transpose(1, 2)
    with torch.no_grad():
        theirs = model(features, decoder_input_ids=torch.tensor(tokens_BL.tolist())).logits.numpy()
    return float(np.abs(ours - theirs).max())


def differing_texts(folder: Path, clips: Sequence[np.ndarray], max_tokens: int = 128) -> list[int]:
    """Indices of the clips whose greedy tokens differ between Transformers and ours.

    clips: 16 kHz waveforms of at most 30 s, in English.

    Raises:
        InputError: PyTorch is missing.
    """
    torch = import_torch("to verify")
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    recognizer = make_recognizer(load_checkpoint(folder))
    extract = WhisperFeatureExtractor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    spoken: dict[str, Any] = (
        {"language": "en", "task": "transcribe"} if recognizer.tokens.multilingual else {}
    )
    options = DecodeOptions(max_tokens=max_tokens)
    # Not max_new_tokens: Transformers would warn of two limits, clip by clip.
    longest = len(recognizer.tokens.prompt("en")) + max_tokens
    limits: dict[str, Any] = {"max_length": longest, "num_beams": 1, "do_sample": False}
    differing = []
    for index, clip in enumerate(tqdm(clips, desc="PyTorch", unit="clip")):
        ours = recognize(recognizer, pad_or_trim(clip)[None], options, language="en")[0].tokens
        features = extract(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        theirs = np.asarray(model.generate(features, **limits, **spoken))[0].tolist()
        text = [token for token in theirs if recognizer.tokens.is_text(token)]
        # Transformers adds the prompt to the limit once more: a text that it cuts is longer.
        if list(ours) != text[:max_tokens]:
            differing.append(index)
    return differing


def synthetic_clip() -> Float32[np.ndarray, "480000"]:
    """30 s of a gliding tone in noise: neither speech nor silence."""
    time = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    glide = np.sin(2 * np.pi * (150 + 20 * time) * time)
    noise = np.random.default_rng(0).normal(0, 0.02, time.size)
    return (0.2 * glide + noise).astype(np.float32)
