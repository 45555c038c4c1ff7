"""Rows of other toolkits' datasets: Kaldi and ESPnet folders, Lhotse cuts.

Read from their documented text formats: the `lhotse` package needs PyTorch.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from flax_distil.data.paths import is_file, read_file
from flax_distil.data.table import PlacedRow, Row
from flax_distil.errors import InputError

WAV_SCP = "wav.scp"
# Commands that only decode a file, which is then opened itself; no command is run.
DECODES = re.compile(r"(?:\S*/)?(?:flac (?:-[cds]+ )+|sph2pipe -f wav (?:-p )?|cat )(\S+) *\|")
NOT_A_FILE = re.compile(r"\||\.ark(:\d+)?$")  # other commands, and parts of Kaldi's archives


def kaldi_rows(path: str) -> Iterator[PlacedRow]:
    """The utterances of wav.scp, with text, utt2spk, utt2lang, utt2dur and segments beside it.

    Raises:
        InputError: an entry is a command or an archive, or a segment's recording is missing.
    """
    recordings = {name: DECODES.sub(r"\1", cell) for name, cell in _pairs(path).items()}
    for number, (name, audio) in enumerate(recordings.items(), 1):
        if NOT_A_FILE.search(audio):
            raise InputError(
                f"{path} line {number}: {name} is a command or an archive, which is not opened: "
                "write the audio to files (Kaldi: wav-copy; ESPnet: format_wav_scp.sh) and list "
                "these"
            )
    beside = lambda name: os.path.join(os.path.dirname(path), name)
    kinds = {"text": "text", "speaker": "utt2spk", "language": "utt2lang", "duration": "utt2dur"}
    known = {kind: _pairs(beside(name)) for kind, name in kinds.items()}
    segments = _pairs(beside("segments"))
    for number, (name, cell) in enumerate((segments or recordings).items(), 1):
        row: Row = {"id": name, "audio": cell}
        row |= {kind: cells[name] for kind, cells in known.items() if name in cells}
        if segments:
            try:
                recording, start, end = cell.split()[:3]
                row |= {"audio": recordings[recording], "recording": recording}
                row["offset"] = float(start)
                if float(end) >= 0:  # -1 is the end of the recording
                    row["duration"] = float(end) - float(start)
            except (KeyError, ValueError):
                raise InputError(
                    f"{beside('segments')} line {number} is not “{name} recording start end” with "
                    f"a recording of {WAV_SCP}"
                ) from None
        yield f"line {number}", row


def _pairs(path: str) -> dict[str, str]:
    """The first word of each line, and the rest; empty for a missing file."""
    try:
        text = read_file(path).decode() if is_file(path) else ""
    except UnicodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    lines = (line.strip().partition(" ") for line in text.replace("\t", " ").split("\n"))
    return {name: rest.strip() for name, _, rest in lines if name}


def is_lhotse(row: Row) -> bool:
    """Whether a row is one of Lhotse's manifests."""
    kinds = ["supervisions"], ["tracks"], ["sources", "sampling_rate"], ["recording_id", "channel"]
    return any(all(name in row for name in names) for names in kinds)


def lhotse_rows(cut: dict[str, Any], place: str) -> Iterator[Row]:
    """The clips of a Lhotse cut: one for each supervision, or the whole cut without any.

    Raises:
        InputError: it is not a cut, or not a part of one audio file.
    """
    if "sources" in cut or "recording_id" in cut:
        raise InputError(
            f"{place} is of a Lhotse manifest of recordings or supervisions: join them to cuts "
            "(lhotse cut simple -r RECORDINGS -s SUPERVISIONS cuts.jsonl.gz)"
        )
    recording = cut.get("recording") or {}
    sources = [one for one in recording.get("sources", ()) if one.get("type") in ("file", "url")]
    one_of_several = cut.get("type") == "MonoCut" and len(recording.get("channel_ids") or ()) > 1
    if "tracks" in cut or len(sources) != 1 or one_of_several:
        raise InputError(
            f"{place} is a {cut.get('type', 'cut')} that is not a part of one audio file, or one "
            "channel of several: write its audio to files first (CutSet.save_audios)"
        )
    for part in cut.get("supervisions") or [{}]:
        start = max(cut.get("start", 0.0) + part.get("start", 0.0), 0.0)
        seconds = part.get("duration", cut.get("duration"))
        row = {name: part.get(name) for name in ("text", "speaker", "language")}
        row |= {"id": part.get("id") or cut.get("id"), "audio": sources[0]["source"]}
        if start > 0 or (seconds or 0.0) < recording.get("duration", 0.0) - 0.01:
            row |= {"offset": start, "recording": recording.get("id")}
        yield row | {"duration": seconds}
