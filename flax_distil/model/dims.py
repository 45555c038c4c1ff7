"""The sizes of a Whisper model, and the published ones (paper table 1 and Whisper's model card)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax_distil.audio import SAMPLE_RATE
from flax_distil.errors import InputError

HOP_LENGTH = 160
CHUNK_SECONDS = 30
CHUNK_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE  # 480,000
CHUNK_FRAMES = CHUNK_SAMPLES // HOP_LENGTH  # 3,000 mel frames
POSITION_SAMPLES = 2 * HOP_LENGTH  # of an audio position, which is two mel frames
POSITIONS_PER_SECOND = SAMPLE_RATE // POSITION_SAMPLES  # 50


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

# Columns: ours, Transformers' in config.json, OpenAI's, and the tensor and axis that have the size.
_NAMES = """
mels            num_mel_bins            n_mels        encoder.conv1.weight           1
vocab           vocab_size              n_vocab       decoder.embed_tokens.weight    0
width           d_model                 n_audio_state decoder.embed_tokens.weight    1
encoder_layers  encoder_layers          n_audio_layer -                              -
encoder_heads   encoder_attention_heads n_audio_head  -                              -
decoder_layers  decoder_layers          n_text_layer  -                              -
decoder_heads   decoder_attention_heads n_text_head   -                              -
encoder_ffn     encoder_ffn_dim         -             encoder.layers.0.fc1.weight    0
decoder_ffn     decoder_ffn_dim         -             decoder.layers.0.fc1.weight    0
audio_positions max_source_positions    n_audio_ctx   encoder.embed_positions.weight 0
text_positions  max_target_positions    n_text_ctx    decoder.embed_positions.weight 0
"""
SIZES = [line.split() for line in _NAMES.strip().splitlines()]

# What would change the numbers, and is not implemented.
_ARCHITECTURE = {"activation_function": "gelu", "scale_embedding": False}


def dims_from_hf(config: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> WhisperDims:
    """Dimensions from a Transformers `config.json`.

    sizes: fields of `WhisperDims` that the weights have; `config` may leave them out.

    Raises:
        InputError: it is not a Whisper configuration, keys are missing, are not whole numbers or
            differ from `sizes` (all are named), or the model computes what this one does not.
    """
    check_architecture(config)
    known = dict(sizes or {})
    faults = []
    for field, key, *_ in SIZES:
        value = config.get(key, known.get(field))
        if key not in config and field not in known:
            faults.append(f"lacks {key}")
        elif type(value) is not int:
            faults.append(f"has {key} {str(value)[:40]!r}, which is not a whole number")
        elif value != known.setdefault(field, value):
            faults.append(f"has {key} {value:,} and the weights have {known[field]:,}")
    if faults:
        raise InputError(f"the configuration {', '.join(faults)}: is it this model's?")
    return WhisperDims(**known)


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raises InputError for a config of another model, or of a Whisper that cannot be computed."""
    kind = config.get("model_type", "whisper")
    if kind != "whisper":
        raise InputError(f"the checkpoint is of type {str(kind)[:40]!r}: a Whisper one is needed")
    if config.get("quantization_config"):
        raise InputError(
            "the weights are quantised (quantization_config in config.json): "
            "use the model that they were made from, or save it dequantised"
        )
    for key, needed in _ARCHITECTURE.items():
        if config.get(key) not in (None, needed):
            raise InputError(
                f"config.json has {key} {str(config[key])[:40]!r}, Whisper has {needed!r}: "
                "models trained with another value cannot be used"
            )


def dims_to_hf(dims: WhisperDims) -> dict[str, Any]:
    """The keys of a Transformers `config.json` that `dims` decides."""
    return {key: getattr(dims, field) for field, key, *_ in SIZES} | {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "num_hidden_layers": dims.encoder_layers,
        "activation_function": "gelu",
        "is_encoder_decoder": True,
        "scale_embedding": False,
        "tie_word_embeddings": True,
    }
