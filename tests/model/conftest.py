"""A small random Whisper in float64, ours and Transformers', with the same numbers."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.spec import Params
from flax_distil.model.weights import from_hf


@dataclass
class Twins:
    """dims, params (float64) and the same model in PyTorch."""

    dims: WhisperDims
    params: Params
    torch: Any


@pytest.fixture(scope="session")
def twins():
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    dims = WhisperDims(
        mels=8,
        vocab=97,
        width=32,
        encoder_layers=2,
        encoder_heads=4,
        decoder_layers=3,
        decoder_heads=2,
        encoder_ffn=48,
        decoder_ffn=64,
        audio_positions=20,
        text_positions=16,
    )
    unwanted = ("architectures", "model_type", "num_hidden_layers")
    config = {key: value for key, value in dims_to_hf(dims).items() if key not in unwanted}
    special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=2)
    model = WhisperForConditionalGeneration(WhisperConfig(**config, **special)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = from_hf(dims, tensors)
    return Twins(dims, jax.tree.map(np.float64, params), model.double())


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
