"""What labelling stores of the teacher, against Transformers' logits for the same prompts."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from flax_distil.config import FilterConfig
from flax_distil.data.stored_teacher import LikeliestTokens, collate_stored
from flax_distil.errors import InputError
from flax_distil.pseudo_label import filter as choosing
from flax_distil.pseudo_label import run
from flax_distil.text.tokens import load_tokens

K, TEMPERATURES = 5, (1.0, 2.0)


@pytest.fixture(scope="module")
def model(random_folders):
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(random_folders[0]).eval()


def test_stored_are_the_teachers_own(config, random_folders, model, tmp_path):
    """float16 keeps 11 bits of a log-probability; tails are float32. The filter keeps them."""
    from flax_distil.audio.load import load_audio, pad_or_trim, to_int16
    from flax_distil.audio.log_mel import log_mel

    folder = str(random_folders[0])
    data = dataclasses.replace(config.data, limit=4)
    config = dataclasses.replace(
        config, data=data, model=folder, max_tokens=6, top_k=K, top_k_temperatures=TEMPERATURES
    )
    run(config)
    chosen = tmp_path / "chosen"
    choosing.run(FilterConfig(config.output_dir, chosen, max_wer=None))
    found = pq.read_table(chosen / "data" / "00000.parquet").to_pylist()
    tokens = load_tokens(folder)
    prompt = tokens.prompt()
    for row in found:
        label = row["token_ids"]
        heard = pad_or_trim(to_int16(load_audio(row["audio"]["bytes"])))
        mel = torch.tensor(np.array(log_mel(heard[None], 80))).swapaxes(1, 2)
        with torch.no_grad():
            logits = model(
                input_features=mel, decoder_input_ids=torch.tensor([[*prompt, *label]])
            ).logits[0, len(prompt) - 1 :]
        log_p = torch.log_softmax(logits, -1)
        top, expected = torch.topk(log_p, K)
        assert len(row["top_tokens"]) == len(label) + 1  # the end of text is learnt, too
        np.testing.assert_array_equal(row["top_tokens"], expected)
        np.testing.assert_allclose(row["top_log_probabilities"], top, rtol=2**-11)
        for place, temperature in enumerate(TEMPERATURES):
            rest = (log_p / temperature).scatter(-1, expected, -torch.inf).logsumexp(-1)
            np.testing.assert_allclose(np.array(row["tails"])[:, place], rest, atol=1e-5)
    assert load_dataset(str(chosen), split="train", cache_dir=str(tmp_path / "cache"))[0]["tails"]


def test_a_batch_has_them_where_their_tokens_are_learnt():
    one, two = (
        LikeliestTokens(
            np.full((n, 3), n, np.uint16),
            np.full((n, 3), -n, np.float16),
            np.full((n, 2), -n, np.float32),
        )
        for n in (2, 4)
    )
    batch = collate_stored([(3, one), (1, two)], length=6)
    assert batch.top_tokens[:, :, 0].tolist() == [[0, 0, 0, 2, 2, 0], [0, 4, 4, 4, 4, 0]]
    assert (batch.top_tokens.shape, batch.tails.shape) == ((2, 6, 3), (2, 6, 2))
    assert [leaf.dtype for leaf in vars(batch).values()] == [np.uint16, np.float16, np.float32]


def test_numbers_that_cannot_be_stored(config, random_folders):
    config = dataclasses.replace(config, model=str(random_folders[0]))
    with pytest.raises(InputError, match="top_k 51864 of 51864 tokens"):
        run(dataclasses.replace(config, top_k=51_864))
    with pytest.raises(InputError, match="teacher_states and top_k 3"):
        run(dataclasses.replace(config, top_k=3, teacher_states=True))
    with pytest.raises(InputError, match="name at least one, all above 0"):
        run(dataclasses.replace(config, top_k=3, top_k_temperatures=(0.0,)))
