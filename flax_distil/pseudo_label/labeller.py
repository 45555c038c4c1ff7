"""The teacher over a dataset: every clip heard, written down, compared and kept, shard by shard.

Utterances keep their order. A batch never reaches over the end of a shard, so that a shard depends
on its own utterances alone and is the same, byte for byte, whether or not the run was ever killed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int16
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.audio.load import encode_flac
from flax_distil.config import PseudoLabelConfig
from flax_distil.data.audio_states import Stored, clip_names, write_states
from flax_distil.data.cells import escaped
from flax_distil.data.packing import Packed, pack
from flax_distil.data.stored_teacher import StoredForm
from flax_distil.data.utterances import (
    Skipped,
    Utterance,
    Utterances,
    UtteranceStream,
    read_dataset,
    to_language,
)
from flax_distil.data.windows import Clip, hear_clips, in_order, stack
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.errors import InputError
from flax_distil.files import remove_partial
from flax_distil.parallel.multihost import is_main_host, start
from flax_distil.pseudo_label.claims import Claims
from flax_distil.pseudo_label.store import LabelStore, PseudoLabel, Shard, open_store
from flax_distil.text.wer import error_rate

log = logging.getLogger(__name__)

# Settings that decide nothing about the labels.
PLACE_AND_PACE = ("batch_size", "workers", "output_dir", "claim_patience")
PLACE_AND_PACE += ("audio_states", "audio_states_dtype", "assistant", "guesses")
PLACE_AND_PACE += ("max_skipped_share", "verify")

# Skipped clips that stop a run, where nothing else was asked for.
SKIPPED_SHARE, SKIPPED_AT_LEAST = 0.1, 100
REASONS_SHOWN = 3

# (waveforms int16 [B, 480000], language or None to detect it) → one hypothesis a row
Teacher = Callable[[Int16[np.ndarray, "B N"], str | None], Sequence[Hypothesis]]

# The clips of an utterance, each with the audio cell of its row: several of a window that is split.
Heard = list[tuple[Clip, dict[str, Any]]]

# language or None to detect it → why the teacher cannot read it; None where it can
Lacks = Callable[[str | None], str | None]


@dataclass(frozen=True)
class LabelSummary:
    """What a label store holds, and how fast this run was."""

    labels: int
    seconds: float
    """Of labelled audio, earlier runs included."""
    word_errors: int
    reference_words: int
    rate: str
    """WER, CER or both: whether these two count words or characters."""
    skipped: tuple[Skipped, ...]
    labelled_now: float
    """Seconds of audio labelled in this run."""
    wall: float
    """Seconds this run took."""

    @property
    def wer(self) -> float | None:
        """Of all labels that have a reference, as a fraction; of characters where `rate` says."""
        return self.word_errors / self.reference_words if self.reference_words else None

    @property
    def rtf(self) -> float | None:
        """Real-time factor: seconds of work a second of audio; None when all was there already."""
        return self.wall / self.labelled_now if self.labelled_now else None


def run(config: PseudoLabelConfig) -> LabelSummary:
    """Label `config.data` with `config.model`, going on where an earlier run was killed.

    Several processes with the same settings share the work, on one machine or, over a folder that
    they share, on many: hosts of a pod, or any that come and go.
    Raises InputError for a dataset or teacher that cannot be read, and for a store that was begun
    with other settings.
    """
    import jax

    from flax_distil.decode.assistant import load_assistant
    from flax_distil.decode.recognizer import make_recognizer
    from flax_distil.model.checkpoint import load_checkpoint
    from flax_distil.pseudo_label.distributions import check_form, explain

    start()
    for name in ("batch_size", "shard_size", "workers", "max_tokens", "beams"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: use 1 or more")
    if config.guesses != PseudoLabelConfig.guesses and not config.assistant:
        raise InputError("--guesses would do nothing: add --assistant")
    utterances = windows(config)
    checkpoint = load_checkpoint(config.model)
    check_form(config, checkpoint.dims.vocab)
    recognizer = make_recognizer(checkpoint, config.dtype)
    assistant = None
    if config.assistant:
        if config.batch_size > 1 and jax.default_backend() == "cpu":
            log.warning("on a CPU the assistant is asked for batches of one: use --batch-size 1")
        assistant = load_assistant(recognizer, config.assistant, config.guesses)
    options = DecodeOptions(
        task=config.task,
        timestamps=config.timestamps,
        max_tokens=config.max_tokens,
        beams=config.beams,
    )
    weights, vocabulary = fingerprint(checkpoint.params), recognizer.tokens.vocabulary
    chosen = settings(config, utterances, weights, vocabulary, checkpoint.dims.width)
    form, keep_audio = StoredForm.of(chosen), config.audio_states is not None

    def teacher(waveforms_BN: np.ndarray, language: str | None) -> Sequence[Hypothesis]:
        asked = dataclasses.replace(options, language=language)
        return explain(recognizer, waveforms_BN, asked, form, keep_audio, assistant)

    store = open_store(config.output_dir, chosen)
    states = config.audio_states and states_of(
        config.audio_states, checkpoint.params["encoder"], store.settings
    )
    if states:
        remove_partial(states)
    lacks = partial(recognizer.tokens.lacks, task=config.task)
    summary = label(utterances, teacher, store, config, states, lacks)
    if is_main_host():
        Console().print(summary_table(summary, store.files.address))
    return summary


def windows(config: PseudoLabelConfig) -> Utterances | UtteranceStream | Packed:
    """What is labelled: the dataset's utterances, packed where `pack_seconds` asks for it.

    Raises InputError for windows that no encoder pass holds, and for a stream, whose durations and
    speakers are not known before it was read.
    """
    utterances, seconds = read_dataset(config.data), config.pack_seconds
    if seconds is None:
        return utterances
    if isinstance(utterances, UtteranceStream):
        raise InputError("a stream cannot be packed: leave out --streaming or --pack-seconds")
    return pack(utterances, seconds, config.pack_pause)


def settings(
    config: PseudoLabelConfig,
    utterances: Sequence | UtteranceStream,
    weights: str,
    vocabulary: int,
    width: int = 0,
) -> dict[str, Any]:
    """All that decides the labels. Batch size, threads and place are not among it."""
    chosen = dataclasses.asdict(config) | {"teacher_states": config.teacher_states and width}
    of_distributions = () if config.top_k else ("top_k", "top_k_temperatures")
    of_states = () if config.teacher_states else ("teacher_states",)
    for name in (*PLACE_AND_PACE, *of_distributions, *of_states):
        del chosen[name]
    size = None if isinstance(utterances, UtteranceStream) else len(utterances)
    return {"weights": weights, "vocabulary": vocabulary, "utterances": size, **chosen}


def fingerprint(params: Any) -> str:
    """Tells two teachers of the same name apart: a hash over the head of every array."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ):
        head = np.asarray(leaf.reshape(-1)[:256], np.float32)
        digest.update(f"{path}{leaf.shape}".encode() + head.tobytes())
    return digest.hexdigest()[:16]


def states_of(folder: Path, encoder: Any, settings: dict[str, Any]) -> Path:
    """Where the states are that this encoder has of the clips of a label store, filtered or not."""
    chosen = {name: value for name, value in settings.items() if name != "filter"}
    contents = json.dumps(chosen, sort_keys=True).encode()
    return folder / fingerprint(encoder) / hashlib.sha256(contents).hexdigest()[:16]


def label(
    utterances: Utterances | UtteranceStream | Packed,
    teacher: Teacher,
    store: LabelStore,
    config: PseudoLabelConfig,
    states: Path | None = None,
    lacks: Lacks = lambda language: None,
) -> LabelSummary:
    """Make every shard of `store` that is not there yet. The teacher always gets full batches.

    A store that is complete is gone through for clips that were skipped and can be read now; the
    shards of those are made again.

    states: receives what the teacher's encoder says, a file a shard, before the shard is there.

    Any number of processes may do so at once: each makes the shards that it can claim, and all
    return when the last one is there.
    Raises InputError where too many clips are skipped, or all.
    """
    begun, ours = time.monotonic(), set()
    claims = Claims(store.files, config.claim_patience)
    _remove_partial(store)
    done = store.finished(progress, verify=config.verify)
    listen_to = partial(_heard, store_audio=config.store_audio, lacks=lacks)
    stale: dict[int, Shard] = {}
    left = not (isinstance(utterances, UtteranceStream) and store.complete() and done)
    if not isinstance(utterances, UtteranceStream) and store.complete():
        stale = readable_now(utterances, done, listen_to, config.workers)
        done = {number: shard for number, shard in done.items() if number not in stale}
    while left:
        heard = in_order(
            lambda numbered: (numbered[0], listen_to(numbered[1])),
            pending(utterances, config.shard_size, store, done, claims, stale),
            config.workers,
            ahead=2 * config.batch_size,
        )
        limit = SkipLimit(utterances, config.max_skipped_share, done.values())
        with AudioBar(utterances, done.values()) as bar:
            for number, clips in groupby(heard, lambda item: item[0] // config.shard_size):
                labels, skipped = _label_shard(clips, teacher, config, bar, claims, limit)
                limit.read(len(labels))
                if states and labels:
                    keep_states(states, number, labels, config.audio_states_dtype)
                done[number] = store.write(number, labels, skipped)
                ours.add(number)
                claims.done(number)
        if left := claims.wait():
            found = store.finished(progress, done)
            done = {number: s for number, s in found.items() if s != stale.get(number)}
    claims.clear()
    _remove_partial(store)
    store.write_index(done.values(), complete=True)
    shards = [shard for _, shard in sorted(done.items())]
    skipped = [clip for shard in shards for clip in shard.skipped]
    lines = [json.dumps(dataclasses.asdict(clip), ensure_ascii=False) + "\n" for clip in skipped]
    store.files.write("skipped.jsonl", "".join(lines).encode())
    if not any(shard.rows for shard in shards):
        raise InputError(
            f"none of {len(skipped)} clips could be labelled; the first: {reasons(skipped)}"
        )
    return LabelSummary(
        labels=sum(shard.rows for shard in shards),
        seconds=sum(shard.seconds for shard in shards),
        word_errors=sum(shard.word_errors for shard in shards),
        reference_words=sum(shard.reference_words for shard in shards),
        rate="/".join(sorted({name for s in shards for name in s.rates}, reverse=True)) or "WER",
        skipped=tuple(skipped),
        labelled_now=sum(shard.seconds for shard in shards if shard.number in ours),
        wall=time.monotonic() - begun,
    )


def progress(files: Iterable) -> Iterable:
    """Shows how far the checking of shards has come."""
    return tqdm(files, desc="checking shards", leave=False)


def pending(
    utterances: Utterances | UtteranceStream | Packed,
    shard_size: int,
    store: LabelStore,
    done: Iterable[int],
    claims: Claims,
    stale: Mapping[int, Shard],
) -> Iterator[tuple[int, Utterance]]:
    """The utterances of shards that are not done and that no one else makes, with their numbers.

    stale: what shards say that are there and are made again.
    """
    done = set(done)

    def ours(number: int) -> bool:
        if number in done or not claims.take(number):
            return False
        # Looked at once nobody else can be at it: it may have been finished since `done`.
        if (there := store.whole(number)) is None or there == stale.get(number):
            return True
        claims.done(number)  # someone was faster
        claims.refused.add(number)
        return False

    if isinstance(utterances, UtteranceStream):
        known = max(done, default=-1) + 1
    else:
        known = -(-len(utterances) // shard_size)
    for number in filter(ours, range(known)):
        first = number * shard_size
        yield from enumerate(islice(utterances.since(first), shard_size), first)
    if isinstance(utterances, UtteranceStream):
        rest = enumerate(utterances.since(known * shard_size), known * shard_size)
        for number, rows in groupby(rest, lambda numbered: numbered[0] // shard_size):
            if ours(number):
                yield from rows


def _remove_partial(store: LabelStore) -> None:
    """Remove what killed processes left beside the store's files."""
    if store.files.local:
        for folder in (store.files.path, store.files.path / "data"):
            remove_partial(folder)


def readable_now(
    utterances: Utterances | Packed,
    done: Mapping[int, Shard],
    listen_to: Callable[[Utterance], Skipped | Heard],
    workers: int,
) -> dict[int, Shard]:
    """The shards with a clip that was skipped and would not be any more."""
    numbered = [(shard, clip) for shard in done.values() for clip in shard.skipped_numbers]
    numbered = [(shard, clip) for shard, clip in numbered if clip < len(utterances)]
    heard = in_order(
        lambda one: (one[0], listen_to(utterances[one[1]])), numbered, workers, ahead=2 * workers
    )
    return {shard.number: shard for shard, clip in heard if not isinstance(clip, Skipped)}


def reasons(skipped: Sequence[Skipped]) -> str:
    """The first few clips that were skipped, and why."""
    return "; ".join(f"{clip.id}: {clip.reason}" for clip in skipped[:REASONS_SHOWN])


class SkipLimit:
    """How many clips of a dataset may be skipped, and how many were.

    Of a stream, whose end is not known, the share is that of what was read.
    """

    def __init__(
        self,
        utterances: Utterances | UtteranceStream | Packed,
        share: float | None,
        done: Iterable[Shard],
    ):
        self.total = None if isinstance(utterances, UtteranceStream) else len(utterances)
        self.share = SKIPPED_SHARE if share is None else share
        self.least = SKIPPED_AT_LEAST if share is None else 0
        self.first: list[Skipped] = []
        self.skipped = self.labelled = 0
        for shard in done:
            self.first += shard.skipped[:REASONS_SHOWN]
            self.skipped += len(shard.skipped)
            self.labelled += shard.rows

    def add(self, clip: Skipped) -> None:
        """One more clip that was skipped. Raises InputError where it is one too many."""
        self.skipped += 1
        self.first.append(clip)
        if self.total is not None:
            self._check(self.total)

    def read(self, labelled: int) -> None:
        """So many more clips were labelled. Raises InputError as `add` does."""
        self.labelled += labelled
        if self.total is None:
            self._check(self.labelled + self.skipped)

    def _check(self, of: int) -> None:
        if self.skipped > max(self.share * of, self.least):
            raise InputError(
                f"{self.skipped} of {of} clips were skipped, and max_skipped_share is "
                f"{self.share:g}: mend the dataset or raise it; the first: {reasons(self.first)}"
            )


def _heard(utterance: Utterance, store_audio: str, lacks: Lacks) -> Skipped | Heard:
    """The decoded clips and the audio cells of their rows; runs in the loader's threads."""
    clips = hear_clips(utterance)
    if isinstance(clips, Skipped):
        return clips
    language = utterance.language and to_language(utterance.language)
    if reason := lacks(language):
        return Skipped(utterance.id, reason)
    if store_audio == "embed":
        return [(clip, embedded(clip)) for clip in clips]
    if not isinstance(utterance.audio, str) or utterance.offset is not None:
        raise InputError(
            f"{utterance.id} is not a file of its own, so its audio cannot be referred to: use "
            "store_audio embed"
        )
    if escaped(utterance.audio) != utterance.audio:
        return Skipped(
            utterance.id, "Parquet cannot hold its name: rename it, or use store_audio embed"
        )
    # The store may be read from elsewhere than it was made.
    path = utterance.audio if "://" in utterance.audio else os.path.abspath(utterance.audio)
    return [(clip, {"bytes": None, "path": path}) for clip in clips]


def embedded(clip: Clip) -> dict[str, Any]:
    """The audio cell of a clip whose samples are in the store."""
    contents = encode_flac(clip.samples.astype(np.float32) / 32768.0)
    return {"bytes": contents, "path": f"{clip.utterance.id}.flac"}


def _label_shard(
    clips: Iterable[tuple[int, Skipped | Heard]],
    teacher: Teacher,
    config: PseudoLabelConfig,
    bar: "AudioBar",
    claims: Claims,
    limit: SkipLimit,
) -> tuple[list[PseudoLabel], dict[int, Skipped]]:
    """Labels of one shard, in order; batches hold one language, which the prompt names."""
    rows: dict[tuple[int, int], PseudoLabel] = {}  # by utterance and clip of it
    skipped: dict[int, Skipped] = {}
    groups: dict[str | None, list] = {}

    def flush(language: str | None, group: list) -> None:
        batch = stack([clip for _, clip, _ in group], config.batch_size)
        hypotheses = teacher(batch.waveforms, language)
        for (place, clip, audio), hypothesis in zip(group, hypotheses, strict=False):
            made = pseudo_label(place[0], clip, audio, hypothesis, config.task, config.error_rate)
            rows[place] = made
        bar.add(sum(clip.duration for _, clip, _ in group), len(group))
        claims.touch()
        group.clear()

    for number, found in clips:
        if isinstance(found, Skipped):
            skipped[number] = found
            limit.add(found)
            bar.add(0.0, 1)
            continue
        for piece, (clip, audio) in enumerate(found):
            spoken = clip.utterance.language
            language = None if spoken is None else to_language(spoken)
            group = groups.setdefault(language, [])
            group.append(((number, piece), clip, audio))
            if len(group) == config.batch_size:
                flush(language, group)
    for language, group in groups.items():
        if group:
            flush(language, group)
    return [rows[place] for place in sorted(rows)], skipped


def stored_names(
    numbers: Sequence[int],
    ids: Sequence[str],
    durations: Sequence[float],
    log_probabilities: Sequence[float],
) -> np.ndarray:
    """uint64[n]: names of a label store's clips, whose audio states are found by them.

    Numbers and ids repeat from store to store; how long a clip is and how probable the teacher
    found its label (float32, as stored) tell other sound of the same id apart.
    """
    return clip_names(numbers, ids, durations, log_probabilities)


def keep_states(folder: Path, number: int, labels: Sequence[PseudoLabel], stored: Stored) -> None:
    """What the encoder says of the clips of a shard; see `data.audio_states`."""
    path = folder / f"{number:05d}.safetensors"
    names = stored_names(
        [one.utterance_number for one in labels],
        [one.id for one in labels],
        [one.duration for one in labels],
        [float(np.float32(one.mean_log_probability)) for one in labels],
    )
    states = [label.audio_SD for label in labels if label.audio_SD is not None]
    write_states(path, names, [label.duration for label in labels], states, stored)


def speaks(utterance: Utterance) -> bool:
    """Whether anybody speaks in it, as far as is known: not where its reference is empty."""
    if utterance.parts:
        return any(map(speaks, utterance.parts))
    return utterance.speech and (utterance.text is None or bool(utterance.text.strip()))


def pseudo_label(
    number: int,
    clip: Clip,
    audio: dict[str, Any],
    hypothesis: Hypothesis,
    task: str = "transcribe",
    asked: Literal["auto", "wer", "cer"] = "auto",
) -> PseudoLabel:
    """One row: the hypothesis beside the reference, both normalised to count the errors.

    Without speech nothing is counted: whatever was written was made up.
    """
    utterance, errors, parts, judged = clip.utterance, None, None, {}
    speech = speaks(utterance)
    rate = error_rate("en" if task == "translate" else hypothesis.language, asked)
    if utterance.text is not None and speech:
        errors = rate.count([utterance.text], [hypothesis.text])
        parts = [part.text or "" for part in utterance.parts]
    if parts:
        counts = rate.count_parts(parts, hypothesis.text)
        judged = {
            "part_references": tuple(parts),
            "part_errors": tuple(errors for errors, _ in counts),
            "part_words": tuple(words for _, words in counts),
        }
    return PseudoLabel(
        id=utterance.id,
        audio=audio,
        reference=utterance.text,
        whisper_transcript=hypothesis.text,
        token_ids=tuple(hypothesis.tokens),
        duration=clip.duration,
        language=hypothesis.language,
        speaker=utterance.speaker,
        recording=utterance.recording,
        utterance_number=number,
        mean_log_probability=hypothesis.mean_log_probability,
        compression_ratio=hypothesis.compression_ratio,
        no_speech_probability=hypothesis.no_speech_probability,
        wer=errors.rate if errors and errors.reference_words else None,
        word_errors=errors and errors.errors,
        reference_words=errors and errors.reference_words,
        error_rate=errors and rate.unit,
        ended=hypothesis.ended,
        speech=speech,
        **judged,
        distributions=getattr(hypothesis, "distributions", None),
        audio_SD=getattr(hypothesis, "audio_SD", None),
    )


class AudioBar:
    """Progress in audio time: how much was heard, how fast, and how long it still takes."""

    def __init__(self, utterances: Utterances | UtteranceStream | Packed, done: Iterable[Shard]):
        total = None if isinstance(utterances, UtteranceStream) else len(utterances)
        # A window that was split has several labels.
        made = sum(shard.utterances for shard in done)
        self.left = None if total is None else max(total - made, 0)
        self.heard, self.seconds, self.start = 0, 0.0, time.monotonic()
        self.bar = tqdm(
            desc="labelling",
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
            if self.left
            else "{desc} [{elapsed}]",
            total=self.left,
        )

    def __enter__(self) -> "AudioBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, seconds: float, utterances: int) -> None:
        """So many more seconds of audio, from so many utterances."""
        self.heard, self.seconds = self.heard + utterances, self.seconds + seconds
        clock = tqdm.format_interval
        text = f"{clock(self.seconds)} of audio"
        if self.left and self.heard:  # the whole is not known before it was heard
            text = f"{clock(self.seconds)} of about {clock(self.seconds * self.left / self.heard)}"
        if self.seconds:
            rtf = (time.monotonic() - self.start) / self.seconds
            text += f", RTF {rtf:.3f} ({1 / rtf:.1f}x)"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(utterances)


def summary_table(summary: LabelSummary, title: str) -> Table:
    """The summary as two columns."""
    table = Table("", title, show_header=True)
    table.add_row("labels", f"{summary.labels:,}")
    table.add_row("audio", f"{summary.seconds / 3600:.2f} h")
    wer = "no references" if summary.wer is None else f"{100 * summary.wer:.2f} %"
    table.add_row(f"{summary.rate} against the references", wer)
    if summary.rtf is not None:
        table.add_row("real-time factor", f"{summary.rtf:.3f} ({1 / summary.rtf:.1f}x)")
    table.add_row("skipped", f"{len(summary.skipped):,}")
    for clip in summary.skipped[:5]:
        table.add_row("", f"{clip.id}: {clip.reason}")
    if len(summary.skipped) > 5:
        table.add_row("", "… the others are in skipped.jsonl")
    return table
