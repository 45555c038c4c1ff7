"""Transcripts of many files; one that cannot be used does not stop the others."""

import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flax_distil.audio.load import Limits, audio_duration, load_audio
from flax_distil.config import TranscribeConfig
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.decode.search import Acceptance
from flax_distil.errors import InputError, SomeFailed, check_writable, writing
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import SequentialOptions
from flax_distil.transcription.recordings import transcribe_all
from flax_distil.transcription.silence import digital_silence, load_detector, trim_silence
from flax_distil.transcription.transcript import WRITERS, Transcript

log = logging.getLogger(__name__)

STDIN = Path("-")
# File name endings of audio in a folder.
ENDINGS = """3gp aac ac3 aif aiff ape amr au avi caf dts flac flv g722 m2ts m4a m4b m4v mka mkv mov
mp2 mp3 mp4 mpeg mpg mts mxf oga ogg opus sph ts tta voc w64 wav weba webm wma wmv wv"""
SUFFIXES = frozenset(f".{ending}" for ending in ENDINGS.split())


def run(config: TranscribeConfig) -> list[Path]:
    """Transcribes every file, prints the texts and writes them; returns the paths written.

    Raises:
        SomeFailed: some files could not be used; the transcripts of the others are written.
        InputError: no file is given, two would be written under one name, an option is wrong,
            the output cannot be written, or there is no model.
    """
    targets = target_paths(config.audio, config.output_dir)
    check_writable(config.output_dir)
    check_flags(config)
    if config.vad:
        load_detector()
    recognizer = make_recognizer(load_checkpoint(config.model), config.dtype)
    if config.assistant:
        assistant = load_assistant(recognizer, config.assistant, config.draft_tokens)
        recognizer = replace(recognizer, assistant=assistant)
    asked = config.method == "sequential" or config.sequential != SequentialOptions()
    sequential = asked or (config.method == "auto" and recognizer.timestamps)
    if config.method == "auto" and not sequential:
        log.info("the model was trained without timestamps: --method chunked is used")
    decoded: list[tuple[Path, list[tuple[float, float]]]] = []
    failures: list[str] = []
    written, done, acceptance, begun = [], 0.0, None, time.monotonic()
    transcripts = transcribe_all(
        recognizer,
        decode_files(config, list(targets), decoded, failures),
        config.search,
        config.sequential if sequential else config.chunked,
        language=config.language,
        prompt=config.prompt,
        seed=config.seed,
        batch_size=config.batch_size,
        voice=config.voice if config.vad else None,
    )
    with progress_bar(targets, config.track) as bar:
        for number, seconds, transcript in transcripts:
            done += seconds
            bar.set_postfix_str(f"RTF {(time.monotonic() - begun) / max(done, 1e-9):.3f}", False)
            bar.update(seconds)
            if transcript is not None:
                source, gaps = decoded[number]
                transcript = trim_silence(transcript, gaps)
                try:
                    written += write_transcript(transcript, targets[source], config)
                except InputError as error:
                    failures.append(str(error))
                text = transcript.text.strip()
                tqdm.write(f"{source}: {text}" if len(targets) > 1 else text, file=sys.stdout)
                acceptance = Acceptance.total((acceptance, transcript.acceptance))
    spent = time.monotonic() - begun
    if done:
        log.info("%.1f min of audio in %.1f s, RTF %.3f", done / 60, spent, spent / done)
    if acceptance:
        log.info(
            "assistant: %.0f %% of its draft tokens accepted, %.2f tokens a pass of the model",
            100 * acceptance.rate,
            acceptance.tokens_per_pass,
        )
    if failures:
        count = f"{len(failures)} of {len(targets)} files could not be used:"
        raise SomeFailed("\n  ".join([count, *failures]))
    return written


def decode_files(
    config: TranscribeConfig,
    paths: Sequence[Path],
    decoded: list[tuple[Path, list[tuple[float, float]]]],
    failures: list[str],
) -> Iterator[np.ndarray]:
    """The waveform of each file that can be decoded.

    decoded: gets the path of each, and start and end of its digital silence. failures: gets the
    messages about the other files.
    """
    limits = Limits(config.max_seconds, config.deadline)
    for path in paths:
        try:
            source = standard_input() if path == STDIN else path
            waveform = load_audio(source, track=config.track, limits=limits)
        except InputError as error:
            failures.append(str(error))
        else:
            decoded.append((path, digital_silence(waveform, config.digital_silence)))
            yield waveform


def standard_input() -> io.BytesIO:
    """All of standard input.

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
    """Raises InputError: flags contradict each other, or one has no effect without another."""
    for name in ("max_seconds", "deadline", "digital_silence"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name):g}: it must be above 0")
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}: it must be at least 1")
    beams, default = config.search.beams, TranscribeConfig((), "")
    if config.assistant and beams > 1:
        raise InputError(
            f"--assistant drafts one text and --beams {beams} follows {beams}: leave out one of "
            "the two"
        )
    table = [  # a flag, whether it is given, and the options that have no effect without it
        ("--method sequential", config.method != "chunked", "sequential", ""),
        ("--method chunked", config.method == "chunked", "chunked", ""),
        ("--word-timestamps", config.sequential.word_timestamps, "layout", ""),
        ("--max-line-width", config.layout.max_line_width is not None, "layout", "max_line_count"),
        ("--vad", config.vad, "voice", ""),
        ("--assistant", config.assistant, "", "draft_tokens"),
        ("--beams", beams > 1, "search", "patience"),
    ]
    for needed, given, part, only in table:
        ours, theirs = (getattr(one, part) if part else one for one in (config, default))
        names = [only] if only else [field.name for field in fields(ours)]
        idle = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
        if idle and not given:
            prefix = "--vad-" if needed == "--vad" else "--"
            flags = ", ".join(prefix + name.replace("_", "-") for name in idle)
            raise InputError(f"{flags} would have no effect: add {needed}")


def write_transcript(transcript: Transcript, target: Path, config: TranscribeConfig) -> list[Path]:
    """Writes a transcript's files, `target` with the formats' suffixes.

    Raises:
        InputError: one cannot be written.
    """
    extensions = WRITERS if config.format == "all" else (config.format,)
    paths = [target.with_name(f"{target.name}.{extension}") for extension in extensions]
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        for extension, path in zip(extensions, paths, strict=True):
            path.write_text(WRITERS[extension](transcript, config.layout), encoding="utf-8")
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


def progress_bar(sources: Iterable[Path], track: int | None = None) -> tqdm:
    """A progress bar over the seconds of all files; without a total where a length is unknown."""
    total = 0.0
    for source in sources:
        try:
            total += audio_duration(source, track=track) if source != STDIN else float("inf")
        except InputError:
            continue  # reported when it is decoded
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
