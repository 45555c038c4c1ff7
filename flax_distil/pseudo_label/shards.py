"""Utterances of a shard → clips → batches of one language → the teacher → rows → the store."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int16

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.audio_states import clip_names, write_states
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import DecodedClip, map_in_order, pad_clips
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.hypothesis import Hypothesis
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.options import DecodeOptions
from flax_distil.pseudo_label.distributions import explain
from flax_distil.pseudo_label.jobs import DecodedUtterance, LabelJob, prepare
from flax_distil.pseudo_label.progress import LabelProgress
from flax_distil.pseudo_label.rows import AudioCell, pseudo_label
from flax_distil.pseudo_label.store import PseudoLabel, Shard

log = logging.getLogger(__name__)

# (waveforms int16 [B, 480000], language or None to detect it) → one hypothesis per row
Teacher = Callable[[Int16[np.ndarray, "B N"], str | None], Iterable[Hypothesis]]

# The number of a shard and its utterances.
Work = tuple[int, Iterable[Utterance]]


def load_labellers(config: PseudoLabelConfig) -> list["ShardLabeller"]:
    """A labeller for each dataset, all with one teacher. Raises what `prepare` raises."""
    jobs, checkpoint = prepare(config)
    teacher = load_teacher(jobs[0], checkpoint)
    return [ShardLabeller(job, teacher) for job in jobs]


def load_teacher(job: LabelJob, checkpoint: Checkpoint) -> Teacher:
    """The function that transcribes batches with `checkpoint` as the job's configuration asks."""
    config = job.config
    recognizer = make_recognizer(checkpoint, config.dtype)
    if config.assistant:
        if config.batch_size > 1 and jax.default_backend() == "cpu":
            log.warning("on a CPU the assistant works on batches of one only: use --batch-size 1")
        assistant = load_assistant(recognizer, config.assistant, config.draft_tokens)
        recognizer = recognizer.with_assistant(assistant)
    options = DecodeOptions(
        task=config.task,
        timestamps=config.timestamps,
        max_tokens=config.max_tokens,
        beams=config.beams,
    )
    keep_states, keep_audio = config.teacher_states, config.audio_states is not None

    def teacher(waveforms_BN: np.ndarray, language: str | None) -> Sequence[Hypothesis]:
        return explain(
            recognizer,
            waveforms_BN,
            options,
            language=language,
            keep_states=keep_states,
            keep_audio=keep_audio,
        )

    return teacher


@dataclass(frozen=True)
class ShardLabeller:
    """A teacher, and the job whose shards it labels."""

    job: LabelJob
    teacher: Teacher

    def shards(
        self, work: Iterable[Work], progress: LabelProgress | None = None
    ) -> Iterator[Shard]:
        """Label and write these shards, one after the other; clips are decoded ahead in threads.

        Raises InputError where too many clips are skipped, before the shard is written.
        """
        config, store = self.job.config, self.job.store
        numbered = (
            (number, position, utterance)
            for number, utterances in work
            for position, utterance in enumerate(utterances, number * config.shard_size)
        )
        decoded = map_in_order(
            lambda one: (*one[:2], self.job.decode(one[2])),
            numbered,
            config.workers,
            ahead=2 * config.batch_size,
        )
        for number, clips in groupby(decoded, lambda one: one[0]):
            labels, skipped = self._label((one[1:] for one in clips), progress)
            if progress:
                progress.count(len(labels), skipped.values())
            if self.job.states and labels:
                path = self.job.states / f"{number:05d}.safetensors"
                _keep_states(path, labels, config)
            yield store.write(number, labels, skipped)

    def _label(
        self,
        clips: Iterable[tuple[int, Skipped | DecodedUtterance]],
        progress: LabelProgress | None,
    ) -> tuple[list[PseudoLabel], dict[int, Skipped]]:
        """Labels of one shard, in order. Batches hold one language, which the prompt names."""
        config = self.job.config
        rows: dict[tuple[int, int], PseudoLabel] = {}  # by utterance and clip of it
        skipped: dict[int, Skipped] = {}
        groups: dict[str | None, list[tuple[tuple[int, int], DecodedClip, AudioCell]]] = {}

        def advance(seconds: float, utterances: int) -> None:
            if progress:
                progress.advance(seconds, utterances)

        def flush(language: str | None) -> None:
            group = groups.pop(language)
            batch = pad_clips([clip for _, clip, _ in group], config.batch_size)
            hypotheses = self.teacher(batch.waveforms, language)
            for (place, clip, audio), hypothesis in zip(group, hypotheses, strict=False):
                rows[place] = pseudo_label(
                    place[0], clip, audio, hypothesis, config.task, config.error_rate
                )
            advance(sum(clip.duration for _, clip, _ in group), len(group))

        for position, decoded in clips:
            if isinstance(decoded, Skipped):
                skipped[position] = decoded
                advance(0.0, 1)
                continue
            for piece, (clip, audio) in enumerate(decoded):
                language = clip.utterance.language
                group = groups.setdefault(language, [])
                group.append(((position, piece), clip, audio))
                if len(group) == config.batch_size:
                    flush(language)
        for language in list(groups):
            flush(language)
        return [rows[place] for place in sorted(rows)], skipped


def _keep_states(path: Path, labels: Sequence[PseudoLabel], config: PseudoLabelConfig) -> None:
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
