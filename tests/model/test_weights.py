"""The table of names, both ways, and what it says of tensors that do not fit."""

import math

import numpy as np
import pytest

from flax_distil.errors import InputError
from flax_distil.model.dims import PUBLISHED, dims_from_hf, dims_to_hf
from flax_distil.model.weights import dims_of, from_hf, to_hf


def test_there_and_back(twins):
    tensors = {name: value.numpy() for name, value in twins.torch.state_dict().items()}
    ours = to_hf(twins.dims, from_hf(twins.dims, tensors))
    assert set(ours) == set(tensors) - {"proj_out.weight"}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_all_faults_in_one_error(twins):
    tensors = {name: value.numpy() for name, value in twins.torch.state_dict().items()}
    del tensors["model.encoder.conv1.bias"]
    tensors["model.decoder.layers.3.fc1.bias"] = np.zeros(64)
    tensors["model.decoder.layers.0.fc1.weight"] = np.zeros((32, 64))
    with pytest.raises(InputError) as error:
        from_hf(twins.dims, tensors)
    message = str(error.value)
    assert "missing model.encoder.conv1.bias" in message
    assert "unknown model.decoder.layers.3.fc1.bias" in message
    assert "model.decoder.layers.0.fc1.weight has shape (32, 64), not (64, 32)" in message


def test_dims_and_config():
    for dims in PUBLISHED.values():
        assert dims_from_hf(dims_to_hf(dims)) == dims
    with pytest.raises(InputError, match="lacks d_model"):
        dims_from_hf({k: v for k, v in dims_to_hf(PUBLISHED["tiny"]).items() if k != "d_model"})
    with pytest.raises(InputError, match="at least 1: width, decoder_heads are not"):
        dims_from_hf(dims_to_hf(PUBLISHED["tiny"]) | {"d_model": 0, "decoder_attention_heads": 0})
    with pytest.raises(InputError, match="wav2vec2"):
        dims_from_hf({"model_type": "wav2vec2"})


@pytest.mark.parametrize("value", ["384", None, [384], math.nan, math.inf, 384.5, True, {}])
def test_sizes_are_whole_numbers(value):
    config = dims_to_hf(PUBLISHED["tiny"]) | {"d_model": value, "encoder_layers": value}
    with pytest.raises(InputError, match=r"has d_model.*has encoder_layers.*not a whole number"):
        dims_from_hf(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu', Whisper has 'gelu'"),
        ({"activation_function": "gelu_new"}, "gelu_new"),
        ({"scale_embedding": True}, "scale_embedding 'True', Whisper has False"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": ["whisper"]}, "of type"),
    ],
)
def test_what_ours_does_not_compute_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        dims_from_hf(dims_to_hf(PUBLISHED["tiny"]) | settings)
    dims_from_hf(dims_to_hf(PUBLISHED["tiny"]) | {"scale_embedding": None})


@pytest.mark.parametrize("key", ["d_model", "encoder_layers", "decoder_layers"])
@pytest.mark.parametrize("size", [10_000_000, 10**30, -1])
def test_sizes_are_compared_with_the_weights_before_anything_is_made(twins, key, size):
    """Ten million layers would be a table of 250 million names, d_model a matrix of 290 GiB."""
    shapes = {name: tuple(value.shape) for name, value in twins.torch.state_dict().items()}
    config = dims_to_hf(twins.dims)
    assert dims_of(config, shapes) == twins.dims
    with pytest.raises(InputError, match=f"has {key} {size:,} and the weights have {config[key]}"):
        dims_of(config | {key: size}, shapes)


def test_sizes_that_a_config_leaves_out_are_those_of_the_weights(twins):
    shapes = {name: tuple(value.shape) for name, value in twins.torch.state_dict().items()}
    heads = ("encoder_attention_heads", "decoder_attention_heads")
    config = {key: value for key, value in dims_to_hf(twins.dims).items() if key in heads}
    assert dims_of(config, shapes) == twins.dims
    with pytest.raises(InputError, match="lacks decoder_attention_heads"):
        dims_of({heads[0]: 4}, shapes)
