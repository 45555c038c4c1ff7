"""The label store: a folder of Parquet shards that a killed run can go on with.

    labels.json         what made them: teacher, options, data; written first, never changed
    data/00000.parquet  labels of utterances 0 … shard_size − 1, and so on
    shards.json         the shards that are whole; made from them, and made again when it is lost
    skipped.jsonl       utterances without a label, and why; written at the end
    README.md           tells `datasets.load_dataset(folder)` where the shards are

A shard is a fixed range of utterances, says so itself, and depends on nothing but them. It appears
under its name only when it is whole and on disk. So any process may make any shard, in any order.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_distil.data.stored_teacher import StoredForm, StoredTeacher, places
from flax_distil.data.utterances import NUMBER, Skipped
from flax_distil.errors import InputError, check_writable
from flax_distil.pseudo_label.folder import Folder, write_whole

SETTINGS = "labels.json"
FORMAT = 2  # 1 had neither recording nor utterance_number
ROW_GROUP = 4  # rows; training reads at random, and a whole row group at a time
METADATA_KEY = b"flax_distil.shard"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("reference", pa.string()),
        ("whisper_transcript", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("duration", pa.float64()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("recording", pa.string()),
        (NUMBER, pa.int64()),
        ("mean_log_probability", pa.float32()),
        ("compression_ratio", pa.float32()),
        ("no_speech_probability", pa.float32()),
        ("wer", pa.float64()),
        ("word_errors", pa.int32()),
        ("reference_words", pa.int32()),
    ]
)

CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
---
Speech with pseudo-labels; `labels.json` tells what wrote them.
"""


@dataclass(frozen=True)
class PseudoLabel:
    """What the teacher wrote for one utterance: one row of a shard."""

    id: str
    audio: dict[str, Any] = dataclasses.field(repr=False)
    """{bytes, path}: 16 kHz FLAC, or only the path of the original."""
    reference: str | None
    """The dataset's own text, as it was."""
    whisper_transcript: str
    token_ids: tuple[int, ...]
    """What the teacher wrote: timestamps if asked, neither prompt nor end of text."""
    duration: float
    """Seconds."""
    language: str | None
    speaker: str | None
    recording: str | None
    """The recording, chapter or session it is a part of."""
    utterance_number: int
    """Of the utterance or window in what was labelled: training finds the one before by it."""
    mean_log_probability: float
    compression_ratio: float
    no_speech_probability: float
    wer: float | None
    """Fraction, not percent, after Whisper's normaliser; None where no reference word is left."""
    word_errors: int | None
    """Substitutions, deletions and insertions; None without a reference."""
    reference_words: int | None
    """Words of the normalised reference; None without a reference."""
    distributions: StoredTeacher | None = dataclasses.field(default=None, repr=False)
    """The teacher at each token and at the end behind them, where the store keeps it."""
    audio_SD: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """What the encoder said of the clip, where that is kept, beside the store."""


@dataclass(frozen=True)
class Shard:
    """What is known about a whole shard."""

    number: int
    rows: int
    seconds: float
    word_errors: int
    reference_words: int
    skipped: tuple[Skipped, ...]
    sha256: str

    @property
    def utterances(self) -> int:
        """Labelled and skipped."""
        return self.rows + len(self.skipped)


@dataclass(frozen=True)
class LabelStore:
    """A folder of shards, made by one combination of settings."""

    folder: Path
    settings: dict[str, Any]

    @property
    def files(self) -> Folder:
        """The folder, on a disk or in a bucket."""
        return Folder(self.folder)

    def write(
        self, number: int, labels: Sequence[PseudoLabel], skipped: Sequence[Skipped]
    ) -> Shard:
        """Make a shard of labels."""
        rows = [{name: getattr(label, name) for name in SCHEMA.names} for label in labels]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if form := StoredForm.of(self.settings):
            for name, column in _distributions(labels, form).items():
                table = table.append_column(name, column)
        return self.put(number, table, skipped)

    def put(self, number: int, table: pa.Table, skipped: Sequence[Skipped] = ()) -> Shard:
        """Put a whole shard in its place: there or not there, never half."""
        facts = {"shard": number, "skipped": [dataclasses.asdict(clip) for clip in skipped]}
        contents = parquet_bytes(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}))
        self.files.write(name := f"data/{number:05d}.parquet", contents)
        return _shard(contents, name)

    def numbers(self) -> set[int]:
        """The shards that are there, whole or not."""
        return {int(name.partition(".")[0]) for name in self._shards()}

    def finished(
        self, progress: Any = iter, read: Mapping[int, Shard] | None = None
    ) -> dict[int, Shard]:
        """The shards that are there and whole, by number; others are made again.

        One that the index knows must have its checksum; one that it does not know must read
        through. `progress` wraps the list of files; what was `read` before is not read again.
        """
        known = {shard.number: shard for shard in self._index()}
        found = dict(read or {})
        for name in progress(self._shards()):
            if (number := int(name.partition(".")[0])) in found:
                continue
            contents = self.files.read(f"data/{name}")
            if number not in known:
                try:
                    found[number] = _shard(contents, name)
                except InputError:
                    continue
            elif hashlib.sha256(contents).hexdigest() == known[number].sha256:
                found[number] = known[number]
        return found

    def write_index(self, shards: Iterable[Shard], complete: bool = False) -> None:
        """Keep what `finished` would find; `complete` once no utterance is left."""
        entries = [dataclasses.asdict(shard) for shard in sorted(shards, key=lambda s: s.number)]
        self.files.write("shards.json", as_json({"complete": complete, "shards": entries}))

    def _shards(self) -> list[str]:
        names = self.files.names("data")
        return [name for name in names if name[0].isdigit() and name.endswith(".parquet")]

    def _index(self) -> list[Shard]:
        try:
            entries = json.loads(self.files.read("shards.json"))["shards"]
            return [
                Shard(**entry | {"skipped": tuple(Skipped(**one) for one in entry["skipped"])})
                for entry in entries
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # lost or damaged: the shards tell the same

    def complete(self) -> bool:
        """Whether the index says that no utterance is left."""
        try:
            return json.loads(self.files.read("shards.json"))["complete"]
        except (OSError, ValueError, KeyError, TypeError):
            return False


def open_store(folder: Path, settings: dict[str, Any]) -> LabelStore:
    """The store in `folder`, made now or begun earlier with the same settings.

    Raises InputError when it was begun with others, naming each with both values, or when the
    folder holds something else.
    """
    settings, files = json.loads(json.dumps({"format": FORMAT, **settings})), Folder(folder)
    if files.local:
        check_writable(folder)
    if files.has(SETTINGS):
        begun, asked = _flat(read_settings(folder)), _flat(settings)
        differences = [
            f"{name} was {begun.get(name)!r} and is {asked.get(name)!r}"
            for name in sorted(begun.keys() | asked.keys())
            if begun.get(name) != asked.get(name)
        ]
        if differences:
            raise InputError(
                f"{folder} was begun with other settings: {'; '.join(differences)}. Go on with "
                "the old ones, or take another output_dir"
            )
    else:
        others = any(not name.startswith(".") for name in files.names())
        if others and not files.has(SETTINGS):  # made by another process just now
            raise InputError(f"{folder} is not empty and no label store: take another output_dir")
        files.write(SETTINGS, as_json(settings))
    files.write("README.md", CARD.encode())
    return LabelStore(folder, settings)


def _distributions(labels: Sequence[PseudoLabel], form: StoredForm) -> dict[str, pa.Array]:
    """The columns of the teacher's distributions: a list of lists of fixed size a row."""
    kept = [label.distributions for label in labels if label.distributions is not None]
    starts = np.cumsum([0, *map(places, kept)], dtype=np.int32)
    columns = {}
    for name, (size, dtype) in form.columns().items():
        rows = [getattr(one, name) for one in kept]
        values = np.concatenate([np.zeros((0, size)), *rows]).astype(dtype)
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)
        columns[name] = pa.ListArray.from_arrays(starts, inner)
    return columns


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"split": 1}}` → `{"data.split": 1}`: a difference is named by its own field."""
    flat = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def read_settings(folder: Path) -> dict[str, Any]:
    """What made the labels in `folder`. Raises InputError where there is no label store."""
    try:
        return json.loads(Folder(folder).read(SETTINGS))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no label store: it has no labels.json") from None
    except ValueError as error:
        raise InputError(f"{folder}/labels.json is damaged: {error}") from None


def shard_files(folder: Path) -> dict[int, Path]:
    """The Parquet files of a label store by number, on a disk or a mounted bucket.

    Raises InputError where there are none.
    """
    if not (files := Folder(folder)).local:
        raise InputError(f"{files.address} is read where it is mounted, or copied to a disk")
    read_settings(folder)
    files = sorted((folder / "data").glob("[0-9]*.parquet"))
    if not files:
        raise InputError(f"{folder} has no shard yet: run pseudo-label")
    return {int(path.stem): path for path in files}


def parquet_bytes(table: pa.Table) -> bytes:
    """The same bytes for the same table, with a checksum on every page."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def as_json(value: Any) -> bytes:
    """A JSON file's contents."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`value` as a whole JSON file."""
    write_whole(path, as_json(value))


def _shard(contents: bytes, path: str) -> Shard:
    """A shard's facts out of its bytes. Raises InputError when a page is damaged."""
    try:
        table = pq.read_table(pa.BufferReader(contents), page_checksum_verification=True)
        facts = json.loads(table.schema.metadata[METADATA_KEY])
        sums = {
            name: sum(value or 0 for value in table.column(name).to_pylist())
            for name in ("duration", "word_errors", "reference_words")
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a whole shard: {error}") from None
    return Shard(
        number=facts["shard"],
        rows=table.num_rows,
        seconds=sums["duration"],
        word_errors=sums["word_errors"],
        reference_words=sums["reference_words"],
        skipped=tuple(Skipped(**clip) for clip in facts["skipped"]),
        sha256=hashlib.sha256(contents).hexdigest(),
    )
