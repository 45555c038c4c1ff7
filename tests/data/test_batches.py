"""Inputs, targets and weights on known tokens; the convention is checked against Transformers."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from flax_distil.data.batches import (
    TargetOptions,
    bucket_for,
    collate,
    example_draws,
    longest_prompt,
    make_example,
)
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens, load_tokens

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
    row = make_example(utterance, tokens, TargetOptions(**options), seed)
    silence = np.zeros((1, 10), np.int16)
    batch = collate([row], silence, [1.0], [0], length, tokens.eot)
    return batch.tokens[0].tolist(), batch.targets[0].tolist(), batch.weights[0].tolist()


def test_english_only():
    tokens, targets, weights = columns(labelled(7, 8), ENGLISH, language="en")
    assert tokens == [50257, 50362, 7, 8] + [50256] * 4
    assert targets == [50362, 7, 8, 50256] + [50256] * 4
    # All that follows the start of transcript is learnt, the first eot too, the padding is not.
    assert weights == [1, 1, 1, 1, 0, 0, 0, 0]


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
    assert weights == [1, 1, 1, 1, 1, 1, 0, 0]


def test_timestamps_kept_and_dropped():
    label = labelled(BEGIN, 7, 8, BEGIN + 50, language="en")
    tokens, targets, weights = columns(label, MULTILINGUAL, timestamp_probability=1.0)
    assert tokens == [50258, 50259, 50359, BEGIN, 7, 8, BEGIN + 50, 50257]
    assert targets[2:] == [BEGIN, 7, 8, BEGIN + 50, 50257, 50257]
    assert weights == [1, 1, 1, 1, 1, 1, 1, 0]
    tokens, _, weights = columns(label, MULTILINGUAL, timestamp_probability=0.0)
    assert tokens == [50258, 50259, 50359, 50363, 7, 8, 50257, 50257]
    assert weights == [1, 1, 1, 1, 1, 1, 0, 0]


def test_labels_without_timestamps_never_claim_to_have_them():
    tokens, _, _ = columns(labelled(7, language="en"), MULTILINGUAL, timestamp_probability=1.0)
    assert tokens[:5] == [50258, 50259, 50359, 50363, 7]
    tokens, _, weights = columns(labelled(language="en"), MULTILINGUAL, timestamp_probability=1.0)
    assert tokens[:4] == [50258, 50259, 50359, 50363]
    assert weights == [1, 1, 1, 1, 0, 0, 0, 0]  # the teacher wrote nothing: eot is the label


def test_targets_are_transformers_shifted_labels():
    """Transformers shifts labels right and masks padding with -100; so do we, from the start of
    transcript on: the prompt's tokens are targets, as in the published scripts."""
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    torch = pytest.importorskip("torch")
    tokens, targets, weights = columns(labelled(7, 8, 9), ENGLISH)
    labels = torch.tensor([[50362, 7, 8, 9, 50256, -100, -100, -100]])
    shifted = shift_tokens_right(labels, pad_token_id=50256, decoder_start_token_id=50257)
    assert tokens == shifted[0].tolist()
    learnt = np.array(weights) > 0
    assert np.array_equal(np.array(targets)[learnt], labels[0].numpy()[learnt])
    assert np.array_equal(learnt, labels[0].numpy() >= 0)


def test_the_coins_are_fair_independent_and_seeded():
    falls = np.array([example_draws((3, 1, number)) for number in range(2000)]) < 0.5
    assert np.all(np.abs(falls.mean(axis=0) - 0.5) < 0.04)  # 3.6 standard deviations
    assert abs((falls[:, 0] == falls[:, 1]).mean() - 0.5) < 0.04
    assert (
        example_draws((3, 1, 0)) == example_draws((3, 1, 0)) != example_draws((3, 1))
    )  # zeros count
    assert example_draws((3, 2, 0)) != example_draws((3, 1, 0))


def test_the_text_before_is_read_and_not_learnt():
    label = labelled(BEGIN, 7, 8, BEGIN + 50, language="en")
    before = labelled(BEGIN, 5, 6, BEGIN + 9, language="en")
    sure = {"prompt_probability": 1.0, "buckets": (16,)}
    for timestamps, given in [(0.0, [5, 6]), (1.0, [BEGIN, 5, 6, BEGIN + 9])]:
        options = TargetOptions(timestamp_probability=timestamps, **sure)
        without = make_example(label, MULTILINGUAL, options, (1,))
        row = make_example(label, MULTILINGUAL, options, (1,), before)
        assert row.tokens == [50361, *given, *without.tokens]
        assert without.start == 0
        assert row.targets[row.start :] == without.targets
        assert row.start == 1 + len(given) == row.tokens.index(MULTILINGUAL.sot)
    never = TargetOptions(prompt_probability=0.0)
    assert make_example(label, MULTILINGUAL, never, (1,), before).tokens[0] == MULTILINGUAL.sot


def test_the_end_of_a_long_text_before_is_read():
    before = labelled(*range(300), language="en")
    options = TargetOptions(prompt_probability=1.0)
    row = make_example(labelled(7, language="en"), MULTILINGUAL, options, (1,), before)
    assert row.tokens[1:224] == list(range(77, 300))  # 223, as Whisper reads
    long = labelled(*[7] * 400, language="en")
    row = make_example(long, MULTILINGUAL, options, (1,), before)
    assert len(row.tokens) == 448  # the context; 43 are left for the text before
    assert row.tokens[1:44] == list(range(257, 300))
    full = labelled(*[7] * 444, language="en")
    assert make_example(full, MULTILINGUAL, options, (1,), before).tokens[0] == MULTILINGUAL.sot


def test_a_label_that_was_cut_has_no_end():
    cut = replace(labelled(7, 8, language="en"), ended=False)
    tokens, targets, weights = columns(cut, MULTILINGUAL)
    assert tokens[:5] == [50258, 50259, 50359, 50363, 7]
    assert targets[:5] == [50259, 50359, 50363, 7, 8]
    assert weights == [1, 1, 1, 1, 1, 0, 0, 0]  # nothing is learnt of what follows 8


@pytest.mark.parametrize(
    ("what", "weights", "targets"),
    [
        # (KL, cross-entropy) at each position
        ("teacher", [(1, 0)], [50362]),
        ("no_speech", [(1, 1)], [50362]),
        ("end", [(1, 0), (0, 0), (0, 0), (0, 1)], [50259, 50359, 50363, 50257]),
    ],
)
def test_clips_without_speech_have_targets_of_their_own(what, weights, targets):
    """What the teacher wrote about noise is not learnt, whether it is a label or an empty text."""
    noise = replace(labelled(7, 8, language="en"), speech=False)
    empty = Utterance("b", b"", text="", language="en")
    for clip, target in ((noise, "label"), (empty, "text")):
        options = TargetOptions(non_speech=what, timestamp_probability=0.0, target=target)
        row = make_example(clip, MULTILINGUAL, options, (0,))
        batch = collate([row], np.zeros((1, 1), np.int16), [1.0], [0], 8, 50257, weighted=True)
        size = len(targets)
        assert batch.targets[0, :size].tolist() == targets
        assert list(map(tuple, batch.loss_weights[0, :size].tolist())) == weights
        assert batch.weights[0].tolist() == [float(any(pair)) for pair in weights] + [0] * (
            8 - size
        )
        assert not batch.loss_weights[0, size:].any()


def test_the_end_of_silence_with_timestamps():
    """Whisper's rules ask for a timestamp first: then the end is learnt."""
    noise = Utterance("a", b"", speech=False, language="en")
    row = make_example(
        noise, MULTILINGUAL, TargetOptions(non_speech="end", timestamp_probability=1.0)
    )
    assert row.targets == [50259, 50359, BEGIN, 50257]
    assert row.ce == (0, 0, 1, 1)


def test_factors_of_a_dataset():
    row = make_example(labelled(7), ENGLISH, TargetOptions(kl=0.0, ce=0.5))
    batch = collate([row], np.zeros((1, 1), np.int16), [1.0], [0], 4, 50256, weighted=True)
    assert batch.loss_weights[0].tolist() == [[0, 0.5]] * 3 + [[0, 0]]


def test_published_labels_are_tokens_and_never_their_characters(base_folder):
    """Distil-whisper's label sets hold the teacher's text with its special tokens written out."""
    tokens = load_tokens(base_folder)
    begin = tokens.timestamp_begin
    hello, world = tokens.encode(" Hello"), tokens.encode(" world.")
    options = TargetOptions(timestamp_probability=1.0, prompt_probability=1.0)
    for transcript, expected in [
        ("<|0.00|> Hello<|1.20|><|1.20|> world.<|2.00|>", [(0,), hello, (60, 60), world, (100,)]),
        (
            "<|startoftranscript|><|en|><|transcribe|><|0.00|> Hello<|1.20|><|endoftext|>",
            [(0,), hello, (60,)],
        ),
        (" Hello world.", [hello + world]),
        ("Hello world.", [hello + world]),
    ]:
        label = [
            token + begin if isinstance(part, tuple) else token
            for part in expected
            for token in part
        ]
        row = make_example(
            Utterance("a", b"", transcript=transcript, language="en"), tokens, options
        )
        prompt = tokens.prompt("en", timestamps=transcript.startswith("<"))
        assert row.tokens == [*prompt, *label]
        assert row.targets[-1] == tokens.eot
    previous = (tokens.previous, begin, *world, begin + 5)
    one = Utterance("a", b"", transcript="<|0.00|> Hello<|1.20|>", previous=previous, language="en")
    row = make_example(one, tokens, options)
    assert row.tokens[: row.start] == list(previous)


def test_special_tokens_in_references_are_left_out(base_folder):
    tokens = load_tokens(base_folder)
    text = "<|startoftranscript|>Hello <|0.00|>world.<|endoftext|>"
    row = make_example(
        Utterance("a", b"", text, language="en"), tokens, TargetOptions(target="text")
    )
    assert row.tokens[4:] == tokens.encode(" Hello world.")


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
        make_example(Utterance("a", b""), ENGLISH, TargetOptions())
    with pytest.raises(InputError, match="needs a language"):
        make_example(labelled(7), MULTILINGUAL, TargetOptions())


def test_a_row_not_heard_weighs_nothing_and_a_batch_is_a_pytree():
    rows = [make_example(labelled(7), ENGLISH, TargetOptions())] * 2
    batch = collate(rows, np.zeros((2, 4), np.int16), [0.0, 1.5], [4, 2], 32, ENGLISH.eot)
    assert batch.weights.sum(axis=1).tolist() == [0, 3]
    shapes = {leaf.shape for leaf in jax.tree.leaves(batch)}
    assert shapes == {(2, 4), (2, 32), (2,)}
    assert jax.tree.map(lambda leaf: leaf * 2, batch).seconds.tolist() == [0.0, 3.0]
