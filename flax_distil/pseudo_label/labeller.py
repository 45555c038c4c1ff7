"""The teacher over a dataset: every clip heard, written down, compared and kept, shard by shard.

Utterances keep their order. A batch never reaches over the end of a shard, so that a shard depends
on its own utterances alone and is the same, byte for byte, whether or not the run was ever killed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int16
from rich.console import Console

from flax_distil.audio.load import encode_flac
from flax_distil.config import PseudoLabelConfig
from flax_distil.data.audio_states import StateDtype, clip_names, write_states
from flax_distil.data.cells import escape
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
from flax_distil.data.windows import DecodedClip, decode_clips, map_in_order, pad_clips
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.errors import InputError
from flax_distil.files import remove_partial
from flax_distil.parallel.multihost import is_main_host, start
from flax_distil.pseudo_label.claims import Claims
from flax_distil.pseudo_label.rows import pseudo_label
from flax_distil.pseudo_label.skipping import SkipLimit, readable_now, reasons
from flax_distil.pseudo_label.store import LabelStore, PseudoLabel, Shard, open_store
from flax_distil.pseudo_label.summary import (
    AudioBar,
    LabelSummary,
    progress,
    summary_table,
    together,
)

if TYPE_CHECKING:
    from flax_distil.decode.drafters import Assistant
    from flax_distil.decode.recognizer import Recognizer
    from flax_distil.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# Settings that decide nothing about the labels.
PLACE_AND_PACE = ("batch_size", "workers", "output_dir", "claim_patience")
PLACE_AND_PACE += ("audio_states", "audio_states_dtype", "assistant", "draft_tokens")
PLACE_AND_PACE += ("max_skipped_share", "verify", "datasets")


# (waveforms int16 [B, 480000], language or None to detect it) → one hypothesis a row
Teacher = Callable[[Int16[np.ndarray, "B N"], str | None], Sequence[Hypothesis]]

# The clips of an utterance, each with the audio cell of its row: several of a window that is split.
Heard = list[tuple[DecodedClip, dict[str, Any]]]

# language or None to detect it → why the teacher cannot read it; None where it can
Lacks = Callable[[str | None], str | None]


def run(config: PseudoLabelConfig) -> LabelSummary:
    """Label `config.data` with `config.model`, going on where an earlier run was killed.

    Several datasets are labelled one after the other, each into a store of its own.
    Several processes with the same settings share the work, on one machine or, over a folder that
    they share, on many: hosts of a pod, or any that come and go.
    Raises InputError for a dataset or teacher that cannot be read, and for a store that was begun
    with other settings.
    """
    import jax

    from flax_distil.decode.assistant import load_assistant
    from flax_distil.decode.recognizer import make_recognizer
    from flax_distil.model.checkpoint import load_checkpoint
    from flax_distil.pseudo_label.distributions import check_form

    start()
    for name in ("batch_size", "shard_size", "workers", "max_tokens", "beams"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: use 1 or more")
    if config.draft_tokens != PseudoLabelConfig.draft_tokens and not config.assistant:
        raise InputError("--draft-tokens would do nothing: add --assistant")
    parts = [(one, windows(one)) for one in by_dataset(config)]
    checkpoint = load_checkpoint(config.model)
    check_form(config, checkpoint.dims.vocab)
    recognizer = make_recognizer(checkpoint, config.dtype)
    assistant = None
    if config.assistant:
        if config.batch_size > 1 and jax.default_backend() == "cpu":
            log.warning("on a CPU the assistant is asked for batches of one: use --batch-size 1")
        assistant = load_assistant(recognizer, config.assistant, config.draft_tokens)
    summaries = [
        label_with(checkpoint, recognizer, assistant, utterances, one) for one, utterances in parts
    ]
    whole = together(summaries)
    if is_main_host() and len(summaries) > 1:
        Console().print(summary_table(whole, f"{len(summaries)} datasets"))
    return whole


def by_dataset(config: PseudoLabelConfig) -> list[PseudoLabelConfig]:
    """A configuration for each dataset; those of several have stores inside `output_dir`, named by
    source, configuration and split.

    Raises InputError where two have the same name, or where flags change one of several datasets.
    """
    if not config.datasets:
        return [config]
    if config.data != config.datasets[0]:
        raise InputError(
            f"the recipe names {len(config.datasets)} datasets, and flags change the first: change "
            "the [[pseudo-label.data]] tables"
        )
    named: dict[str, PseudoLabelConfig] = {}
    for data in config.datasets:
        parts = (Path(data.source).stem, data.config, data.split)
        name = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
        if name in named:
            raise InputError(f"two datasets are called {name}: label one of them by itself")
        folder = config.output_dir / name
        named[name] = dataclasses.replace(config, data=data, datasets=(), output_dir=folder)
    return list(named.values())


def label_with(
    checkpoint: "Checkpoint",
    recognizer: "Recognizer",
    assistant: "Assistant | None",
    utterances: Utterances | UtteranceStream | Packed,
    config: PseudoLabelConfig,
) -> LabelSummary:
    """Label one dataset with a teacher that is loaded; prints the summary."""
    from flax_distil.pseudo_label.distributions import explain

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
        heard = map_in_order(
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
        yield from enumerate(islice(utterances.iter_from(first), shard_size), first)
    if isinstance(utterances, UtteranceStream):
        rest = enumerate(utterances.iter_from(known * shard_size), known * shard_size)
        for number, rows in groupby(rest, lambda numbered: numbered[0] // shard_size):
            if ours(number):
                yield from rows


def _remove_partial(store: LabelStore) -> None:
    """Remove what killed processes left beside the store's files."""
    if store.files.local:
        for folder in (store.files.path, store.files.path / "data"):
            remove_partial(folder)


def _heard(utterance: Utterance, store_audio: str, lacks: Lacks) -> Skipped | Heard:
    """The decoded clips and the audio cells of their rows; runs in the loader's threads."""
    clips = decode_clips(utterance)
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
    if escape(utterance.audio) != utterance.audio:
        return Skipped(
            utterance.id, "Parquet cannot hold its name: rename it, or use store_audio embed"
        )
    # The store may be read from elsewhere than it was made.
    path = utterance.audio if "://" in utterance.audio else os.path.abspath(utterance.audio)
    return [(clip, {"bytes": None, "path": path}) for clip in clips]


def embedded(clip: DecodedClip) -> dict[str, Any]:
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
        batch = pad_clips([clip for _, clip, _ in group], config.batch_size)
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


def keep_states(
    folder: Path, number: int, labels: Sequence[PseudoLabel], stored: StateDtype
) -> None:
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
