"""Inputs, targets and weights on known tokens; the convention is checked against Transformers."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from flax_distil.data.batches import (
    TargetOptions,
    bucket_for,
    coins,
    collate,
    example,
    longest_prompt,
)
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

ENGLISH = WhisperTokens(
    bpe=Tokenizer(models.BPE()),
    eot=50256,
    sot=50257,
    transcribe=50358,
    translate=50357,
    previous=50360,
    no_speech=50361,
    no_timestamps=50362,
    multilingual=False,
    languages={},
    suppressed=(),
    suppressed_first=(),
)
MULTILINGUAL = WhisperTokens(
    bpe=Tokenizer(models.BPE()),
    eot=50257,
    sot=50258,
    transcribe=50359,
    translate=50358,
    previous=50361,
    no_speech=50362,
    no_timestamps=50363,
    multilingual=True,
    languages={"en": 50259, "de": 50261, "fr": 50265},
    suppressed=(),
    suppressed_first=(),
)
BEGIN = 50364  # <|0.00|>


def labelled(*token_ids, language=None) -> Utterance:
    return Utterance("a", b"", language=language, token_ids=token_ids)


def columns(utterance, tokens, length=8, seed=(0, 0, 0), **options):
    row = example(utterance, tokens, TargetOptions(**options), seed)
    silence = np.zeros((1, 10), np.int16)
    batch = collate([row], silence, [1.0], [0], length, tokens.eot)
    return batch.tokens[0].tolist(), batch.targets[0].tolist(), batch.weights[0].tolist()


def test_english_only():
    tokens, targets, weights = columns(labelled(7, 8), ENGLISH, language="en")
    assert tokens == [50257, 50362, 7, 8] + [50256] * 4
    assert targets == [50362, 7, 8, 50256] + [50256] * 4
    # The prompt is given; the first text token and the first eot are learnt, the padding is not.
    assert weights == [0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("language", "default", "first"),
    [("de", "en", 50261), (None, "fr", 50265), ("English", None, 50259), ("de-AT", None, 50261)],
)
def test_language_and_task_of_each_example(language, default, first):
    tokens, targets, weights = columns(
        labelled(7, 8, language=language), MULTILINGUAL, language=default, task="translate"
    )
    assert tokens == [50258, first, 50358, 50363, 7, 8, 50257, 50257]
    assert targets == [first, 50358, 50363, 7, 8, 50257, 50257, 50257]
    assert weights == [0, 0, 0, 1, 1, 1, 0, 0]


def test_timestamps_kept_and_dropped():
    label = labelled(BEGIN, 7, 8, BEGIN + 50, language="en")
    tokens, targets, weights = columns(label, MULTILINGUAL, timestamp_probability=1.0)
    assert tokens == [50258, 50259, 50359, BEGIN, 7, 8, BEGIN + 50, 50257]
    assert targets[2:] == [BEGIN, 7, 8, BEGIN + 50, 50257, 50257]
    assert weights == [0, 0, 1, 1, 1, 1, 1, 0]
    tokens, _, weights = columns(label, MULTILINGUAL, timestamp_probability=0.0)
    assert tokens == [50258, 50259, 50359, 50363, 7, 8, 50257, 50257]
    assert weights == [0, 0, 0, 1, 1, 1, 0, 0]


def test_labels_without_timestamps_never_claim_to_have_them():
    tokens, _, _ = columns(labelled(7, language="en"), MULTILINGUAL, timestamp_probability=1.0)
    assert tokens[:5] == [50258, 50259, 50359, 50363, 7]
    tokens, _, weights = columns(labelled(language="en"), MULTILINGUAL, timestamp_probability=1.0)
    assert tokens[:4] == [50258, 50259, 50359, 50363]
    assert weights == [0, 0, 0, 1, 0, 0, 0, 0]  # silence: eot is the whole label


def test_targets_are_transformers_shifted_labels():
    """Transformers shifts labels right and masks padding with -100; so do we, beyond the prompt."""
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    torch = pytest.importorskip("torch")
    tokens, targets, weights = columns(labelled(7, 8, 9), ENGLISH)
    labels = torch.tensor([[50362, 7, 8, 9, 50256, -100, -100, -100]])
    shifted = shift_tokens_right(labels, pad_token_id=50256, decoder_start_token_id=50257)
    assert tokens == shifted[0].tolist()
    learnt = np.array(weights) > 0
    assert np.array_equal(np.array(targets)[learnt], labels[0].numpy()[learnt])
    assert np.array_equal(learnt, (labels[0].numpy() >= 0) & (np.arange(8) > 0))


def test_the_coins_are_fair_independent_and_seeded():
    falls = np.array([coins((3, 1, number)) for number in range(2000)]) < 0.5
    assert np.all(np.abs(falls.mean(axis=0) - 0.5) < 0.04)  # 3.6 standard deviations
    assert abs((falls[:, 0] == falls[:, 1]).mean() - 0.5) < 0.04
    assert coins((3, 1, 0)) == coins((3, 1, 0)) != coins((3, 1))  # zeros count
    assert coins((3, 2, 0)) != coins((3, 1, 0))


def test_the_text_before_is_read_and_not_learnt():
    label = labelled(BEGIN, 7, 8, BEGIN + 50, language="en")
    before = labelled(BEGIN, 5, 6, BEGIN + 9, language="en")
    sure = {"prompt_probability": 1.0, "buckets": (16,)}
    for timestamps, given in [(0.0, [5, 6]), (1.0, [BEGIN, 5, 6, BEGIN + 9])]:
        options = TargetOptions(timestamp_probability=timestamps, **sure)
        without = example(label, MULTILINGUAL, options, (1,))
        row = example(label, MULTILINGUAL, options, (1,), before)
        assert row.tokens == [50361, *given, *without.tokens]
        learnt = slice(without.start, None)
        assert row.targets[row.start :] == without.targets[learnt]
        assert row.start == without.start + 1 + len(given)
    never = TargetOptions(prompt_probability=0.0)
    assert example(label, MULTILINGUAL, never, (1,), before).tokens[0] == MULTILINGUAL.sot


def test_the_end_of_a_long_text_before_is_read():
    before = labelled(*range(300), language="en")
    options = TargetOptions(prompt_probability=1.0)
    row = example(labelled(7, language="en"), MULTILINGUAL, options, (1,), before)
    assert row.tokens[1:224] == list(range(77, 300))  # 223, as Whisper reads
    long = labelled(*[7] * 400, language="en")
    row = example(long, MULTILINGUAL, options, (1,), before)
    assert len(row.tokens) == 448  # the context; 43 are left for the text before
    assert row.tokens[1:44] == list(range(257, 300))
    full = labelled(*[7] * 444, language="en")
    assert example(full, MULTILINGUAL, options, (1,), before).tokens[0] == MULTILINGUAL.sot


@pytest.mark.parametrize(("length", "bucket"), [(1, 32), (32, 32), (33, 64), (448, 448)])
def test_buckets(length, bucket):
    assert bucket_for(length, TargetOptions().buckets) == bucket


def test_longest_prompt():
    assert longest_prompt(ENGLISH) == len(ENGLISH.prompt())
    assert longest_prompt(MULTILINGUAL) == len(MULTILINGUAL.prompt("en"))


def test_errors():
    with pytest.raises(InputError, match="449 tokens, the longest bucket 448"):
        bucket_for(449, (448, 32))
    with pytest.raises(InputError, match="a has no token_ids: label its dataset"):
        example(Utterance("a", b""), ENGLISH, TargetOptions())
    with pytest.raises(InputError, match="needs a language"):
        example(labelled(7), MULTILINGUAL, TargetOptions())


def test_a_row_not_heard_weighs_nothing_and_a_batch_is_a_pytree():
    rows = [example(labelled(7), ENGLISH, TargetOptions())] * 2
    batch = collate(rows, np.zeros((2, 4), np.int16), [0.0, 1.5], [4, 2], 32, ENGLISH.eot)
    assert batch.weights.sum(axis=1).tolist() == [0, 2]
    shapes = {leaf.shape for leaf in jax.tree.leaves(batch)}
    assert shapes == {(2, 4), (2, 32), (2,)}
    assert jax.tree.map(lambda leaf: leaf * 2, batch).seconds.tolist() == [0.0, 3.0]
