"""Utterances of a shard → clips → batches of one language → the teacher → rows → the store."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from flax_distil.audio.load import encode_flac
from flax_distil.config import PseudoLabelConfig
from flax_distil.data.audio_states import clip_names, write_states
from flax_distil.data.table import escape
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import DecodedClip, decode_clips, pad_clips
from flax_distil.data.workers import map_in_order
from flax_distil.decode.search import Hypothesis
from flax_distil.errors import InputError
from flax_distil.pseudo_label.jobs import LabelJob
from flax_distil.pseudo_label.store import PseudoLabel, Shard
from flax_distil.pseudo_label.teacher import Teacher
from flax_distil.text.wer import error_rate

Item = TypeVar("Item")

# The number of a shard and its utterances.
Work = tuple[int, Iterable[Utterance]]


class LabelProgress(tqdm):
    """A progress bar of utterances that also shows their audio and the real-time factor."""

    seconds = 0.0

    def advance(self, seconds: float, utterances: int) -> None:
        """Add seconds of audio from so many utterances."""
        self.seconds += seconds
        if self.seconds:
            rtf = self.format_dict["elapsed"] / self.seconds
            audio = f"{self.format_interval(self.seconds)} of audio, RTF {rtf:.3f}"
            self.set_postfix_str(audio, refresh=False)
        self.update(utterances)


class RowClip(NamedTuple):
    """A clip that becomes a row: several of a packed window that was split."""

    utterance_number: int
    piece: int
    clip: DecodedClip
    audio: dict[str, Any]
    """{bytes, path}, as `datasets` stores audio."""


def label_shards(
    job: LabelJob, teacher: Teacher, work: Iterable[Work], progress: LabelProgress | None = None
) -> Iterator[Shard]:
    """Label and write these shards, one after the other; clips are decoded ahead in threads."""
    config = job.config
    numbered = (
        (shard, number, utterance)
        for shard, utterances in work
        for number, utterance in enumerate(utterances, shard * config.shard_size)
    )
    decoded = map_in_order(
        lambda one: (*one[:2], decode(job, *one[1:])),
        numbered,
        config.workers,
        ahead=2 * config.batch_size,
    )
    for shard, group in groupby(decoded, itemgetter(0)):
        labels, skipped = label_clips((one[1:] for one in group), config, teacher, progress)
        if job.states and labels:
            keep_states(job.states / f"{shard:05d}.safetensors", labels, config)
        yield job.store.write(shard, labels, skipped)


def label_clips(
    decoded: Iterable[tuple[int, "list[RowClip] | Skipped"]],
    config: PseudoLabelConfig,
    teacher: Teacher,
    progress: LabelProgress | None,
) -> tuple[list[PseudoLabel], dict[int, Skipped]]:
    """Labels of one shard, in order. Batches hold one language, which the prompt names."""
    labels: dict[tuple[int, int], PseudoLabel] = {}
    skipped: dict[int, Skipped] = {}
    advance = progress.advance if progress is not None else lambda seconds, utterances: None

    def usable() -> Iterator[RowClip]:
        for number, clips in decoded:
            if isinstance(clips, Skipped):
                skipped[number] = clips
                advance(0.0, 1)
            else:
                yield from clips

    for batch in batches_by(lambda row: row.clip.utterance.language, usable(), config.batch_size):
        clips = [row.clip for row in batch]
        waveforms_BN = pad_clips(clips, config.batch_size).waveforms
        hypotheses = teacher(waveforms_BN, clips[0].utterance.language)
        for row, hypothesis in zip(batch, hypotheses, strict=False):
            labels[row.utterance_number, row.piece] = pseudo_label(row, hypothesis, config)
        advance(sum(clip.duration for clip in clips), len(clips))
    return [labels[place] for place in sorted(labels)], skipped


def batches_by(
    key: Callable[[Item], Any], items: Iterable[Item], size: int
) -> Iterator[list[Item]]:
    """Batches of items with the same key, such as the language; incomplete ones come last."""
    waiting: dict[Any, list[Item]] = {}
    for item in items:
        batch = waiting.setdefault(key(item), [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(key(item))
    yield from waiting.values()


def decode(job: LabelJob, number: int, utterance: Utterance) -> list[RowClip] | Skipped:
    """The clips of an utterance with the audio cells of their rows, or why it has no label.

    number: position of the utterance in the dataset.

    Raises InputError for references to an utterance that is only a part of a file.
    """
    clips = decode_clips(utterance)
    if isinstance(clips, Skipped):
        return clips
    if reason := job.lacks(utterance.language):
        return Skipped(utterance.id, reason)
    if job.config.store_audio == "embed":
        cells = [
            {
                "bytes": encode_flac(clip.samples / np.float32(32768)),
                "path": f"{clip.utterance.id}.flac",
            }
            for clip in clips
        ]
    elif not isinstance(utterance.audio, str) or utterance.offset is not None:
        raise InputError(
            f"{utterance.id} is not a file of its own, so the store cannot refer to it: use "
            "store_audio embed"
        )
    elif escape(utterance.audio) != utterance.audio:
        why = "Parquet cannot hold its name: rename it, or use store_audio embed"
        return Skipped(utterance.id, why)
    else:  # absolute, because the store may be read from another folder
        path = utterance.audio if "://" in utterance.audio else os.path.abspath(utterance.audio)
        cells = [{"bytes": None, "path": path}] * len(clips)
    pairs = zip(clips, cells, strict=True)
    return [RowClip(number, piece, clip, cell) for piece, (clip, cell) in enumerate(pairs)]


def pseudo_label(row: RowClip, hypothesis: Hypothesis, config: PseudoLabelConfig) -> PseudoLabel:
    """The row of one clip, with the errors of the hypothesis against the reference.

    Clips without speech have no error counts.
    """
    utterance, errors, parts = row.clip.utterance, None, []
    speech = has_speech(utterance)
    language = "en" if config.task == "translate" else hypothesis.language
    rate = error_rate(language, config.error_rate)
    if utterance.text is not None and speech:
        errors = rate.count([utterance.text], [hypothesis.text])
        parts = [part.text or "" for part in utterance.parts]
    counts = rate.count_parts(parts, hypothesis.text) if parts else []
    return PseudoLabel(
        id=utterance.id,
        audio=row.audio,
        reference=utterance.text,
        whisper_transcript=hypothesis.text,
        token_ids=hypothesis.tokens,
        duration=row.clip.duration,
        language=hypothesis.language,
        speaker=utterance.speaker,
        recording=utterance.recording,
        utterance_number=row.utterance_number,
        mean_log_probability=hypothesis.mean_log_probability,
        compression_ratio=hypothesis.compression_ratio,
        no_speech_probability=hypothesis.no_speech_probability,
        wer=errors.rate if errors and errors.reference_words else None,
        word_errors=errors and errors.errors,
        reference_words=errors and errors.reference_words,
        error_rate=errors and rate.unit,
        ended=hypothesis.ended,
        speech=speech,
        part_references=tuple(parts) or None,
        part_errors=tuple(wrong for wrong, _ in counts) or None,
        part_words=tuple(words for _, words in counts) or None,
        teacher_states=getattr(hypothesis, "teacher_states", None),
        audio_SD=getattr(hypothesis, "audio_SD", None),
    )


def has_speech(utterance: Utterance) -> bool:
    """Whether the utterance contains speech: its reference, if it has one, must not be empty."""
    if utterance.parts:
        return any(map(has_speech, utterance.parts))
    return utterance.speech and (utterance.text is None or bool(utterance.text.strip()))


def keep_states(path: Path, labels: Sequence[PseudoLabel], config: PseudoLabelConfig) -> None:
    """Write the encoder's output of a shard's clips; see `data.audio_states`."""
    # Numbers and ids repeat from store to store; durations and log-probabilities (float32, as
    # stored) tell different audio of the same id apart.
    names = clip_names(
        [one.utterance_number for one in labels],
        [one.id for one in labels],
        [one.duration for one in labels],
        [float(np.float32(one.mean_log_probability)) for one in labels],
    )
    states = [label.audio_SD for label in labels if label.audio_SD is not None]
    durations = [label.duration for label in labels]
    write_states(path, names, durations, states, config.audio_states_dtype)
