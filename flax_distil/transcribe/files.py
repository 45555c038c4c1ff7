"""Many files to transcripts beside each other; a bad one does not stop the good ones."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from flax_distil.config import TranscribeConfig
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.errors import InputError, SomeFailed
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe.windows import transcribe
from flax_distil.transcribe.writers import WRITERS


def run(config: TranscribeConfig) -> list[Path]:
    """Transcribe every file, print the texts and write one file each; returns what was written.

    Raises:
        SomeFailed: naming the files that could not be used, when the others are written.
        InputError: no file is given, two would be written under one name, or no model is there.
    """
    targets = target_paths(config.audio, config.output_dir, config.format)
    recognizer = make_recognizer(load_checkpoint(config.model), config.dtype)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    written, failures = [], []
    for source, target in tqdm(targets.items(), unit="file", disable=len(targets) < 2):
        try:
            transcript = transcribe(
                source,
                recognizer,
                language=config.language,
                task=config.task,
                batch_size=config.batch_size,
            )
        except InputError as error:
            failures.append(str(error))
            continue
        tqdm.write(f"{source}: {transcript.text.strip()}" if len(targets) > 1 else transcript.text)
        target.write_text(WRITERS[config.format](transcript), encoding="utf-8")
        written.append(target)
    if failures:
        raise SomeFailed(
            "\n  ".join([f"{len(failures)} of {len(targets)} files could not be used:", *failures])
        )
    return written


def target_paths(sources: Sequence[Path], folder: Path, extension: str) -> dict[Path, Path]:
    """Where each source's transcript goes: its name, with another extension, in `folder`.

    Raises:
        InputError: two sources would be written to one file, or there is none.
    """
    if not sources:
        raise InputError("no audio is given: flax-distil transcribe talk.mp3 --model whisper-base")
    targets: dict[Path, Path] = {}
    for source in dict.fromkeys(sources):
        target = folder / f"{source.stem}.{extension}"
        twins = [other for other, taken in targets.items() if taken == target]
        if twins:
            raise InputError(
                f"{twins[0]} and {source} would both be written to {target}: "
                "transcribe them into two folders"
            )
        targets[source] = target
    return targets
