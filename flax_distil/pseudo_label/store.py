"""The label store: a folder of Parquet shards that a killed run can go on with.

    labels.json         what made them: teacher, options, data; written first, never changed
    data/00000.parquet  labels of utterances 0 … shard_size − 1, and so on
    shards.json         an index of the shards, written once all are there
    skipped.jsonl       utterances without a label, and why; written at the end
    README.md           tells `datasets.load_dataset(folder)` where the shards are

A shard is a fixed range of utterances, says so itself, and depends on nothing but them. It appears
under its name only when it is whole and on disk. So any process may make any shard, in any order.
Its footer holds the sums and skips that a run needs to know of it: to go on costs the footers'
reading, and nothing that grows with the store is written beside each shard.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_distil.data.stored_teacher import StoredForm, StoredTeacher, places
from flax_distil.data.utterances import UTTERANCE_NUMBER, Skipped
from flax_distil.errors import InputError, check_writable
from flax_distil.pseudo_label.folder import Folder, write_whole

log = logging.getLogger(__name__)

SETTINGS = "labels.json"
# 1 had neither recording nor utterance_number; 2 none of ended, speech, error_rate and parts.
FORMAT = 3
ROW_GROUP = 4  # rows; training reads at random, and a whole row group at a time
METADATA_KEY = b"flax_distil.shard"
MAGIC = b"PAR1"  # at both ends of a Parquet file
TAIL = 1 << 16  # bytes read for a footer at first; most are smaller

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
        (UTTERANCE_NUMBER, pa.int64()),
        ("mean_log_probability", pa.float32()),
        ("compression_ratio", pa.float32()),
        ("no_speech_probability", pa.float32()),
        ("wer", pa.float64()),
        ("word_errors", pa.int32()),
        ("reference_words", pa.int32()),
        ("error_rate", pa.string()),
        ("ended", pa.bool_()),
        ("speech", pa.bool_()),
        ("part_references", pa.list_(pa.string())),
        ("part_errors", pa.list_(pa.int32())),
        ("part_words", pa.list_(pa.int32())),
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
    error_rate: str | None = None
    """WER or CER: whether these three count words or characters; None without a reference."""
    ended: bool = True
    """Whether the teacher ended the text; False where it was cut at the longest label."""
    speech: bool = True
    """Whether anybody speaks; where not, the transcript is what the teacher made up."""
    part_references: tuple[str, ...] | None = None
    """Of a packed window, the texts of its parts; None where it is none or one has no text."""
    part_errors: tuple[int, ...] | None = None
    """Of each part, by the alignment of the window's words."""
    part_words: tuple[int, ...] | None = None
    """Words (or characters) of each part's normalised text."""
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
    rates: tuple[str, ...]
    """WER, CER or both: what was counted."""
    skipped: tuple[Skipped, ...]
    skipped_numbers: tuple[int, ...]
    """Of these utterances in what was labelled."""
    bytes: int
    """Of the file."""

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
        self, number: int, labels: Sequence[PseudoLabel], skipped: Mapping[int, Skipped]
    ) -> Shard:
        """Make a shard of labels; clips that have none are known by their numbers."""
        rows = [{name: getattr(label, name) for name in SCHEMA.names} for label in labels]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if form := StoredForm.of(self.settings):
            for name, column in _distributions(labels, form).items():
                table = table.append_column(name, column)
        return self.put(number, table, skipped)

    def put(
        self, number: int, table: pa.Table, skipped: Mapping[int, Skipped] | None = None
    ) -> Shard:
        """Put a whole shard in its place: there or not there, never half."""
        skipped = skipped or {}
        sums = {
            name: sum(value or 0 for value in table.column(name).to_pylist())
            for name in ("duration", "word_errors", "reference_words")
        }
        facts = {
            "number": number,
            "rows": table.num_rows,
            "seconds": sums["duration"],
            "word_errors": sums["word_errors"],
            "reference_words": sums["reference_words"],
            "rates": error_rates(table),
            "skipped": [dataclasses.asdict(clip) for clip in skipped.values()],
            "skipped_numbers": list(skipped),
        }
        contents = parquet_bytes(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}))
        self.files.write(_name(number), contents)
        return _made(facts | {"bytes": len(contents)})

    def finished(
        self, progress: Any = iter, read: Mapping[int, Shard] | None = None, verify: bool = False
    ) -> dict[int, Shard]:
        """The shards that are there and whole, by number; others are made again.

        A shard of the size that the index tells is taken for whole, of any other the footer is
        read; what was `read` before is not read again. `progress` wraps the list of files.

        verify: read all of every shard instead, and remove those with a damaged page.
        """
        known = {} if verify else {shard.number: shard for shard in self._index()}
        found = dict(read or {})
        for name, size in progress(sorted(self._shards().items())):
            if (number := int(name.partition(".")[0])) in found:
                continue
            if number in known and known[number].bytes == size:
                found[number] = known[number]
            elif shard := self.whole(number, size, verify):
                found[number] = shard
            elif verify:
                self.files.remove(_name(number))
        return found

    def whole(self, number: int, size: int | None = None, verify: bool = False) -> Shard | None:
        """What a shard of `size` bytes says of itself; None where it is not there, or damaged.

        verify: as far as every page shows, and not the footer alone.
        """
        try:
            if verify:
                contents = self.files.read(_name(number))
                pq.read_table(pa.BufferReader(contents), page_checksum_verification=True)
            return _made(self._facts(_name(number), size))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            log.warning("%s is not a whole shard: %s", _name(number), error)
            return None

    def _facts(self, name: str, size: int | None) -> dict[str, Any]:
        """The footer's contents, and the file's size."""
        size = self.files.size(name) if size is None else size
        tail = self.files.read(name, max(size - TAIL, 0))
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = self.files.read(name, max(size - length, 0))
        # Arrow reads a footer alone as a file of nothing else.
        footer = pq.read_metadata(pa.BufferReader(MAGIC + tail[-length:]))
        return json.loads((footer.metadata or {})[METADATA_KEY]) | {"bytes": size}

    def write_index(self, shards: Iterable[Shard], complete: bool = False) -> None:
        """Write what `finished` would find; `complete` once no utterance is left."""
        entries = [dataclasses.asdict(shard) for shard in sorted(shards, key=lambda s: s.number)]
        self.files.write("shards.json", as_json({"complete": complete, "shards": entries}))

    def _shards(self) -> dict[str, int]:
        """The sizes of the shards that are there, whole or not, by file name."""
        sizes = self.files.sizes("data").items()
        return {n: size for n, size in sizes if n[0].isdigit() and n.endswith(".parquet")}

    def _index(self) -> list[Shard]:
        try:
            return [_made(one) for one in json.loads(self.files.read("shards.json"))["shards"]]
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
    """A JSON file's contents; bytes of a path that are no UTF-8 are escaped, as JSON can."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """`value` as a whole JSON file."""
    write_whole(path, as_json(value))


def error_rates(table: pa.Table) -> list[str]:
    """What the rows' errors are counted in: WER, CER, both, or neither."""
    if "error_rate" not in table.column_names:
        return ["WER"] if table.column("reference_words").null_count < len(table) else []
    return sorted({value for value in table.column("error_rate").to_pylist() if value})


def _name(number: int) -> str:
    return f"data/{number:05d}.parquet"


def _made(facts: dict[str, Any]) -> Shard:
    skipped = tuple(Skipped(**clip) for clip in facts["skipped"])
    tuples = {name: tuple(facts[name]) for name in ("rates", "skipped_numbers")}
    made: dict[str, Any] = facts | tuples
    made["skipped"] = skipped
    return Shard(**made)
