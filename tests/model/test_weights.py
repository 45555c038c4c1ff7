"""The table of names, both ways, and what it says of tensors that do not fit."""

import numpy as np
import pytest

from flax_distil.errors import InputError
from flax_distil.model.dims import PUBLISHED, dims_from_hf, dims_to_hf
from flax_distil.model.weights import from_hf, to_hf


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
