"""Alignment heads of a student, chosen by comparing its attention with its teacher's on speech."""

import logging
from dataclasses import replace
from itertools import islice

import numpy as np

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.transcribe.heads import heads_like

log = logging.getLogger(__name__)

CLIPS = 16


def with_heads_of(checkpoint: Checkpoint, teacher: str, speech: str) -> Checkpoint:
    """The checkpoint with the heads that align the first clips of a dataset as the teacher's do.

    Raises:
        InputError: one of the two cannot be read, there is no clip, or the tokenizers differ.
    """
    guide = load_checkpoint(teacher)
    if guide.dims.vocab != checkpoint.dims.vocab:
        raise InputError(
            f"{teacher} has {guide.dims.vocab:,} tokens and the student {checkpoint.dims.vocab:,}: "
            "choose a teacher with the same tokenizer"
        )
    sounds = [load_waveform(clip) for clip in islice(read_dataset(speech).iter_from(0), CLIPS)]
    if not sounds:
        raise InputError(f"{speech} has no clip to choose alignment heads on")
    heads = heads_like(
        make_recognizer(checkpoint),
        make_recognizer(guide),
        np.stack([pad_or_trim(sound) for sound in sounds]),
        [sound.size / SAMPLE_RATE for sound in sounds],
    )
    log.info("alignment heads (layer, head): %s", ", ".join(map(str, heads)))
    return replace(
        checkpoint,
        generation=checkpoint.generation | {"alignment_heads": [list(head) for head in heads]},
    )
