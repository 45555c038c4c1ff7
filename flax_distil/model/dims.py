"""The sizes of a Whisper model, and the published ones (paper table 1 and Whisper's model card)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax_distil.errors import InputError

SAMPLE_RATE = 16_000
HOP_LENGTH = 160
CHUNK_SECONDS = 30
CHUNK_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE  # 480,000
CHUNK_FRAMES = CHUNK_SAMPLES // HOP_LENGTH  # 3,000 mel frames


@dataclass(frozen=True)
class WhisperDims:
    """Sizes of one Whisper checkpoint; encoder and decoder have one width."""

    mels: int
    vocab: int
    width: int
    encoder_layers: int
    encoder_heads: int
    decoder_layers: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    audio_positions: int = 1500
    text_positions: int = 448

    def __post_init__(self):
        if wrong := [name for name, size in vars(self).items() if size < 1]:
            raise InputError(f"sizes of a Whisper are at least 1: {', '.join(wrong)} are not")
        for side, heads in (("encoder", self.encoder_heads), ("decoder", self.decoder_heads)):
            if self.width % heads:
                raise InputError(
                    f"width {self.width} does not divide over {heads} {side} heads: "
                    "choose a width that is a multiple of the heads"
                )
        if self.width % 2:
            raise InputError(f"width {self.width} is odd: the sinusoids need an even width")

    @property
    def multilingual(self) -> bool:
        """English-only checkpoints have a vocabulary of 51,864 tokens, all others more."""
        return self.vocab >= 51_865


def published(layers: tuple[int, int], width: int, vocab: int, mels: int = 80) -> WhisperDims:
    """Dimensions in Whisper's proportions: heads of 64 channels, feed-forward of 4 widths."""
    encoder, decoder = layers
    heads = width // 64
    ffn = 4 * width
    return WhisperDims(mels, vocab, width, encoder, heads, decoder, heads, ffn, ffn)


_SIZES = {"tiny": (4, 384), "base": (6, 512), "small": (12, 768), "medium": (24, 1024)}

PUBLISHED: dict[str, WhisperDims] = {
    **{name: published((n, n), width, 51_865) for name, (n, width) in _SIZES.items()},
    **{f"{name}.en": published((n, n), width, 51_864) for name, (n, width) in _SIZES.items()},
    "large-v2": published((32, 32), 1280, 51_865),
    "large-v3": published((32, 32), 1280, 51_866, mels=128),
    "large-v3-turbo": published((32, 4), 1280, 51_866, mels=128),
}


_HF_FIELDS = {
    "mels": "num_mel_bins",
    "vocab": "vocab_size",
    "width": "d_model",
    "encoder_layers": "encoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "decoder_layers": "decoder_layers",
    "decoder_heads": "decoder_attention_heads",
    "encoder_ffn": "encoder_ffn_dim",
    "decoder_ffn": "decoder_ffn_dim",
    "audio_positions": "max_source_positions",
    "text_positions": "max_target_positions",
}


def dims_from_hf(config: Mapping[str, Any]) -> WhisperDims:
    """Dimensions from a Transformers `config.json`.

    Raises:
        InputError: it is not a Whisper configuration, or keys are missing (all are named).
    """
    if config.get("model_type", "whisper") != "whisper":
        raise InputError(
            f"the checkpoint is of type {config['model_type']!r}: a Whisper one is needed"
        )
    missing = [key for key in _HF_FIELDS.values() if key not in config]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}: is it a Whisper model's?")
    return WhisperDims(**{field: int(config[key]) for field, key in _HF_FIELDS.items()})


def dims_to_hf(dims: WhisperDims) -> dict[str, Any]:
    """The keys of a Transformers `config.json` that `dims` decides."""
    return {key: getattr(dims, field) for field, key in _HF_FIELDS.items()} | {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "num_hidden_layers": dims.encoder_layers,
        "activation_function": "gelu",
        "is_encoder_decoder": True,
        "scale_embedding": False,
        "tie_word_embeddings": True,
    }
