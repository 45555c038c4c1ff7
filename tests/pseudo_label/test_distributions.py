"""What labelling stores of the teacher, against Transformers' logits for the same prompts."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from flax_distil.config import FilterConfig
from flax_distil.data.batches import Example, collate
from flax_distil.errors import InputError
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import run
from flax_distil.text.tokens import load_tokens


@pytest.fixture(scope="module")
def model(random_folders):
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(random_folders[0]).eval()


def test_final_states_make_the_teachers_logits(config, random_folders, model, tmp_path):
    """float16 changes each number by at most 2^-11 of it: a logit, whose 384 products err either
    way, by less than 1e-3 of the largest."""
    config = dataclasses.replace(config, teacher_states=True)
    embedding = model.proj_out.weight.detach()
    for row, logits in labelled(config, random_folders[0], model, tmp_path / "filtered"):
        found = torch.tensor(row["teacher_states"]) @ embedding.T
        assert found.shape == logits.shape
        assert (found - logits).abs().max() < 1e-3 * logits.abs().max()
    filtered, cache = str(tmp_path / "filtered"), str(tmp_path / "cache")
    assert load_dataset(filtered, split="train", cache_dir=cache)[0]["teacher_states"]


def test_an_assistant_changes_no_label(config, random_folders, tmp_path):
    data = dataclasses.replace(config.data, limit=3)
    model = {"model": str(random_folders[0]), "max_tokens": 12, "batch_size": 1}
    config = dataclasses.replace(config, data=data, **model)
    helped = dataclasses.replace(config, output_dir=tmp_path / "helped", assistant="lookup")
    columns = []
    for one in (config, helped):
        run(one)
        columns.append(pq.read_table(one.output_dir / "data" / "00000.parquet")["token_ids"])
    assert columns[0] == columns[1]
    with pytest.raises(InputError, match="--draft-tokens has no effect"):
        run(dataclasses.replace(config, draft_tokens=3))
    # An assistant may come and go: it decides nothing about the store.
    assert run(dataclasses.replace(helped, assistant=None)).labels == 3


def labelled(config, folder, model, filtered):
    """Rows that the filter kept, each with Transformers' logits at all tokens of prompt and label,
    the first of which has language and no-speech."""
    from flax_distil.audio.load import load_audio, pad_or_trim, to_int16
    from flax_distil.audio.log_mel import log_mel

    data = dataclasses.replace(config.data, limit=4)
    asked = {"model": str(folder), "max_tokens": 6, "timestamps": False}
    run(dataclasses.replace(config, data=data, **asked))
    filtering.run(FilterConfig(config.output_dir, filtered, max_wer=None, keep_unended=True))
    prompt = load_tokens(str(folder)).prompt()
    for row in pq.read_table(filtered / "data" / "00000.parquet").to_pylist():
        heard = pad_or_trim(to_int16(load_audio(row["audio"]["bytes"])))
        mel = torch.tensor(np.array(log_mel(heard[None], 80))).swapaxes(1, 2)
        tokens = torch.tensor([[*prompt, *row["token_ids"]]])
        with torch.no_grad():
            logits = model(input_features=mel, decoder_input_ids=tokens).logits
        yield row, logits[0]  # the prompt's tokens and the end of text are learnt, too


def test_a_batch_has_them_where_their_tokens_are_learnt():
    examples = [
        Example([0] * 6, [0] * 6, start, np.full((n, 3), n, np.float16))
        for start, n in ((3, 2), (1, 4))
    ]
    batch = collate(examples, np.zeros((2, 1), np.int16), [1.0, 1.0], [0, 1], length=6, eot=0)
    states = batch.teacher_states
    assert states[:, :, 0].tolist() == [[0, 0, 0, 2, 2, 0], [0, 4, 4, 4, 4, 0]]
    assert (states.shape, states.dtype) == ((2, 6, 3), np.float16)
