"""Many files to transcripts beside each other; a bad one does not stop the good ones."""

import io
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from flax_distil.audio.load import LIMITS, Limits, audio_duration, load_audio
from flax_distil.config import TranscribeConfig
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.options import DecodeOptions, total
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.errors import InputError, SomeFailed, check_writable, writing
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe.gaps import clear_of, digital_silence
from flax_distil.transcribe.options import ChunkedOptions, SequentialOptions
from flax_distil.transcribe.recordings import LongForm, transcribe_all
from flax_distil.transcribe.result import Transcript
from flax_distil.transcribe.voice import VoiceOptions, load_detector
from flax_distil.transcribe.writers import WRITERS, Layout

log = logging.getLogger(__name__)

STDIN = Path("-")
# Endings of what is taken from a folder.
ENDINGS = """3gp aac ac3 aif aiff ape amr au avi caf dts flac flv g722 m2ts m4a m4b m4v mka mkv mov
mp2 mp3 mp4 mpeg mpg mts mxf oga ogg opus sph ts tta voc w64 wav weba webm wma wmv wv"""
NEEDED_BY = {  # a flag, and what says nothing without it
    "--method sequential": (
        "temperatures",
        "compression_ratio_threshold",
        "logprob_threshold",
        "no_speech_threshold",
        "condition_on_previous_text",
        "carry_prompt",
        "clips",
        "word_timestamps",
    ),
    "--method chunked": ("chunk_length", "stride"),
    "--word-timestamps": (
        "hallucination_silence_threshold",
        "max_line_width",
        "max_words_per_line",
        "highlight_words",
    ),
    "--max-line-width": ("max_line_count",),
    "--vad": tuple(f"vad_{name}" for name in VoiceOptions.__dataclass_fields__),
    "--assistant": ("draft_tokens",),
    "--beams": ("patience",),
}
SUFFIXES = frozenset(f".{ending}" for ending in ENDINGS.split())


def run(config: TranscribeConfig) -> list[Path]:
    """Transcribe every file, print the texts and write them; returns what was written.

    Raises:
        SomeFailed: naming the files that could not be used, when the others are written.
        InputError: no file is given, two would be written under one name, an option is wrong,
            nothing can be written, or no model is there.
    """
    targets = target_paths(config.audio, config.output_dir)
    check_writable(config.output_dir)
    check_flags(config)
    options, long_form, voice = options_of(config), long_form_of(config), voice_of(config)
    recognizer = make_recognizer(load_checkpoint(config.model), config.dtype)
    assistant = None
    if config.assistant:
        assistant = load_assistant(recognizer, config.assistant, config.draft_tokens)
    limits = Limits(config.max_seconds, config.deadline)
    sources = Sources(list(targets), config.track, limits, config.digital_silence)
    written, heard, acceptance, begun = [], 0.0, None, time.monotonic()
    transcripts = transcribe_all(
        recognizer, sources.waveforms(), options, long_form, config.batch_size, assistant, voice
    )
    with progress(targets, config.track) as bar:
        for number, seconds, transcript in transcripts:
            heard += seconds
            bar.set_postfix_str(f"RTF {(time.monotonic() - begun) / max(heard, 1e-9):.3f}", False)
            bar.update(seconds)
            if transcript is not None:
                source = sources.good[number]
                transcript = clear_of(transcript, sources.gaps[number])
                try:
                    written += write(transcript, targets[source], config)
                except InputError as error:
                    sources.failures.append(str(error))
                said = transcript.text.strip()
                tqdm.write(f"{source}: {said}" if len(targets) > 1 else said, file=sys.stdout)
                acceptance = total((acceptance, transcript.acceptance))
    spent = time.monotonic() - begun
    if heard:
        log.info("%.1f min of audio in %.1f s, RTF %.3f", heard / 60, spent, spent / heard)
    if acceptance:
        log.info(
            "the assistant: %.0f %% of its guesses accepted, %.2f tokens a pass of the model, "
            "%d of %d passes without guesses",
            *(
                100 * acceptance.rate,
                acceptance.tokens_per_pass,
                acceptance.alone,
                acceptance.passes,
            ),
        )
    if sources.failures:
        count = f"{len(sources.failures)} of {len(targets)} files could not be used:"
        raise SomeFailed("\n  ".join([count, *sources.failures]))
    return written


@dataclass
class Sources:
    """Files that are decoded when there is room for them."""

    paths: list[Path]
    track: int | None = None  # which is read of each
    limits: Limits = LIMITS
    silence: float = 1.0  # seconds of digital silence that are a gap
    gaps: list[list[tuple[float, float]]] = field(default_factory=list)  # of each good one
    good: list[Path] = field(default_factory=list)  # those that could be decoded so far
    failures: list[str] = field(default_factory=list)  # what is wrong with the others

    def waveforms(self) -> Iterator[np.ndarray]:
        """The sound of each file that has one."""
        for path in self.paths:
            try:
                source = standard_input() if path == STDIN else path
                waveform = load_audio(source, track=self.track, limits=self.limits)
            except InputError as error:
                self.failures.append(str(error))
                continue
            self.good.append(path)
            self.gaps.append(digital_silence(waveform, self.silence))
            yield waveform


def standard_input() -> BinaryIO:
    """All that comes from standard input.

    Raises:
        InputError: it is closed or cannot be read.
    """
    try:
        if sys.stdin is None:
            raise OSError("it is closed")
        file = io.BytesIO(sys.stdin.buffer.read())
    except (OSError, ValueError) as error:
        raise InputError(f"standard input cannot be read ({error}): name a file") from None
    file.name = "standard input"  # type: ignore[attr-defined]
    return file


def check_flags(config: TranscribeConfig) -> None:
    """Raises InputError: flags contradict each other, or one would do nothing without another."""
    for name in ("max_seconds", "deadline", "digital_silence"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name):g}: it must be above 0")
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}: it must be at least 1")
    if config.assistant and config.beams > 1:
        raise InputError(
            f"--assistant drafts one text and --beams {config.beams} follows {config.beams}: leave "
            "out one of the two"
        )
    there = {
        "--method sequential": config.method == "sequential",
        "--method chunked": config.method == "chunked",
        "--word-timestamps": config.word_timestamps,
        "--max-line-width": config.max_line_width is not None,
        "--vad": config.vad,
        "--assistant": config.assistant is not None,
        "--beams": config.beams > 1,
    }
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    for needed, names in NEEDED_BY.items():
        if not there[needed] and (idle := [name for name in names if name in given]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise InputError(f"{flags} would do nothing: add {needed}")


def options_of(config: TranscribeConfig) -> DecodeOptions:
    """How a window is decoded."""
    return DecodeOptions(
        language=config.language,
        task=config.task,
        timestamps=config.timestamps,
        max_tokens=config.max_tokens,
        beams=config.beams,
        patience=config.patience,
        length_penalty=config.length_penalty,
        best_of=config.best_of,
        seed=config.seed,
        prompt=config.prompt,
        hotwords=config.hotwords,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram=config.no_repeat_ngram,
    )


def long_form_of(config: TranscribeConfig) -> LongForm:
    """How long audio is read."""
    if config.method == "chunked":
        return ChunkedOptions(config.chunk_length, config.stride)
    return SequentialOptions(
        temperatures=config.temperatures,
        compression_ratio_threshold=config.compression_ratio_threshold,
        logprob_threshold=config.logprob_threshold,
        no_speech_threshold=config.no_speech_threshold,
        condition_on_previous_text=config.condition_on_previous_text,
        carry_prompt=config.carry_prompt,
        clips=config.clips,
        word_timestamps=config.word_timestamps,
        hallucination_silence_threshold=config.hallucination_silence_threshold,
    )


def voice_of(config: TranscribeConfig) -> VoiceOptions | None:
    """How pauses are found, where they are to be cut out.

    Raises:
        InputError: the detector is not installed, or an option is out of range.
    """
    if not config.vad:
        return None
    load_detector()
    return VoiceOptions(
        config.vad_threshold,
        config.vad_hysteresis,
        config.vad_min_silence,
        config.vad_min_speech,
        config.vad_padding,
    )


def write(transcript: Transcript, target: Path, config: TranscribeConfig) -> list[Path]:
    """Writes a transcript's files, `target` with the formats' suffixes.

    Raises:
        InputError: one cannot be written.
    """
    layout = Layout(
        config.max_line_width,
        config.max_line_count,
        config.max_words_per_line,
        config.highlight_words,
    )
    extensions = WRITERS if config.format == "all" else (config.format,)
    paths = [target.with_name(f"{target.name}.{extension}") for extension in extensions]
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        for extension, path in zip(extensions, paths, strict=True):
            path.write_text(WRITERS[extension](transcript, layout), encoding="utf-8")
    return paths


def target_paths(sources: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each source's transcript goes: its name without an extension, in `folder`.

    Files of a folder keep their place in it; `-` is stdin.

    Raises:
        InputError: two sources would be written to one file, or there is none.
    """
    if not sources:
        raise InputError("no audio is given: flax-distil transcribe talk.mp3 --model whisper-base")
    targets: dict[Path, Path] = {}
    for source in dict.fromkeys(sources):
        for path, name in _files(source):
            target = folder / name
            twin = next((other for other, taken in targets.items() if taken == target), path)
            if twin != path:
                raise InputError(
                    f"{twin} and {path} would both be written to {target}.*: "
                    "transcribe them into two folders"
                )
            targets[path] = target
    return targets


def progress(sources: Sequence[Path] | dict[Path, Path], track: int | None = None) -> tqdm:
    """A bar over the seconds of all files; without an end where a length is not known."""
    total = 0.0
    for source in sources:
        try:
            total += audio_duration(source, track=track) if source != STDIN else float("inf")
        except InputError:
            continue  # told when it is decoded
    known = round(total) if total < float("inf") else None
    form = "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
    return tqdm(total=known, unit="s", bar_format=form if known else None, disable=None)


def _files(source: Path) -> list[tuple[Path, Path]]:
    """(file, name of its transcript) of a file, or of all audio under a folder."""
    if source == STDIN:
        return [(source, Path("stdin"))]
    if not source.is_dir():
        return [(source, Path(source.stem))]
    named = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not (paths := [path for path in named if path.is_file()]):
        raise InputError(f"{source} holds no audio: name the files if their endings are unusual")
    return [(path, path.relative_to(source).with_suffix("")) for path in paths]
