"""A label store: a folder of Parquet shards, on disk or in a bucket, that a killed run can resume.

    labels.json         what made the labels: teacher, options, data; written first, never changed
    data/00000.parquet  labels of utterances 0 … shard_size − 1, and so on
    shards.json         an index of the shards, written once all of them exist
    skipped.jsonl       utterances without a label, with the reason; written at the end
    README.md           tells `datasets.load_dataset(folder)` where the shards are

A shard is a fixed range of utterances and depends on nothing else, so any process can make any
shard, in any order, and make it again. It appears under its name only when it is complete. Its
footer holds its totals and skipped clips: resuming reads footers and no labels.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cattrs import Converter
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from flax_distil.data.utterances import UTTERANCE_NUMBER, Skipped
from flax_distil.errors import InputError, check_writable
from flax_distil.files import remove_partial, write_whole

log = logging.getLogger(__name__)

SETTINGS = "labels.json"
INDEX = "shards.json"
# 1 had neither recording nor utterance_number; 2 none of ended, speech, error_rate and parts.
FORMAT = 3
ROW_GROUP = 4  # rows; training reads at random, one row group at a time
METADATA_KEY = b"flax_distil.shard"
MAGIC = b"PAR1"  # at both ends of a Parquet file
TAIL = 1 << 16  # bytes read for a footer at first; most footers are smaller

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
Speech with pseudo-labels; `labels.json` says what made them.
"""


@dataclass(frozen=True)
class PseudoLabel:
    """The teacher's label of one clip: one row of a shard."""

    id: str
    audio: dict[str, Any] = dataclasses.field(repr=False)
    """{bytes, path}: 16 kHz FLAC, or only the path of the original file."""
    reference: str | None
    """The dataset's own text, unchanged."""
    whisper_transcript: str
    token_ids: tuple[int, ...]
    """Text and timestamps, without prompt and end of text."""
    duration: float
    """Seconds."""
    language: str | None
    speaker: str | None
    recording: str | None
    """The recording, chapter or session that the utterance is a part of."""
    utterance_number: int
    """Position of the utterance or window in the dataset; training finds the previous one by it."""
    mean_log_probability: float
    compression_ratio: float
    no_speech_probability: float
    wer: float | None
    """A fraction, not percent, after Whisper's normaliser; None without a reference word."""
    word_errors: int | None
    """Substitutions, deletions and insertions; None without a reference."""
    reference_words: int | None
    """Words of the normalised reference; None without a reference."""
    error_rate: str | None = None
    """WER or CER: the unit of the three fields above; None without a reference."""
    ended: bool = True
    """Whether the teacher wrote the end of text; False where the label was cut at max_tokens."""
    speech: bool = True
    """Whether the clip contains speech; if not, the transcript is a hallucination."""
    part_references: tuple[str, ...] | None = None
    """Texts of the parts of a packed window; None for single clips, or if a part has no text."""
    part_errors: tuple[int, ...] | None = None
    """Errors in each part, by the alignment of the whole window."""
    part_words: tuple[int, ...] | None = None
    """Words (or characters) of each part's normalised text."""
    teacher_states: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """float16 [n, D]: the decoder's final states at each token of prompt and label, if kept."""
    audio_SD: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """The encoder's output, which is kept beside the store."""


@dataclass(frozen=True)
class Shard:
    """What the footer of a shard says."""

    number: int
    rows: int
    seconds: float
    word_errors: int
    reference_words: int
    rates: tuple[str, ...]
    """WER, CER or both: the units of the errors."""
    skipped: tuple[Skipped, ...]
    skipped_numbers: tuple[int, ...]
    """Their utterance numbers."""
    bytes: int = 0
    """Size of the file."""

    @property
    def utterances(self) -> int:
        """Labelled and skipped utterances."""
        return self.rows + len(self.skipped)


@dataclass(frozen=True)
class LabelStore:
    """A folder of shards, made with one combination of settings."""

    folder: Path
    settings: dict[str, Any]

    @cached_property
    def files(self) -> DirFileSystem:
        """The folder as a file system of fsspec."""
        address = self.address
        try:
            files, root = fsspec.url_to_fs(address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"cannot open {address} ({error}): install the bucket's file system "
                "(pip install 'flax-distil[tpu]' for gs://), or name a folder where it is mounted"
            ) from None
        return DirFileSystem(root, files)

    @property
    def address(self) -> str:
        """The folder as a path or URL; `Path` keeps one slash of `gs://bucket`."""
        return re.sub(r"^([a-z][a-z0-9]+):/+", r"\1://", str(self.folder))

    @property
    def local(self) -> bool:
        """Whether the folder is on a disk."""
        return isinstance(self.files.fs, LocalFileSystem)

    def write(
        self, number: int, labels: Sequence[PseudoLabel], skipped: Mapping[int, Skipped]
    ) -> Shard:
        """Write a shard of labels. skipped: clips without one, by utterance number."""
        rows = [{name: getattr(label, name) for name in SCHEMA.names} for label in labels]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if width := self.settings.get("teacher_states"):
            table = table.append_column("teacher_states", _states_column(labels, width))
        return self.write_table(number, table, skipped)

    def write_table(
        self, number: int, table: pa.Table, skipped: Mapping[int, Skipped] | None = None
    ) -> Shard:
        """Write a shard: the whole file or none of it."""
        skipped = skipped or {}

        def total(column: str) -> Any:
            return sum(value or 0 for value in table.column(column).to_pylist())

        shard = Shard(
            number=number,
            rows=table.num_rows,
            seconds=float(total("duration")),
            word_errors=total("word_errors"),
            reference_words=total("reference_words"),
            rates=tuple(error_rates(table)),
            skipped=tuple(skipped.values()),
            skipped_numbers=tuple(skipped),
        )
        facts = _JSON.unstructure(shard)
        del facts["bytes"]  # not known until the footer that holds them is written
        metadata = {METADATA_KEY: json.dumps(facts)}
        contents = parquet_bytes(table.replace_schema_metadata(metadata))
        self.write_file(_name(number), contents)
        return dataclasses.replace(shard, bytes=len(contents))

    def write_file(self, name: str, contents: bytes) -> None:
        """Write a file: the whole of it or nothing, also when the process is killed."""
        if self.local:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, contents)
        else:  # an upload becomes visible when it is complete
            self.files.pipe_file(name, contents)

    def read_file(self, name: str, start: int = 0) -> bytes:
        """A file's contents from byte `start` on. Raises FileNotFoundError."""
        return self.files.cat_file(name, start=start)

    def finished(
        self, progress: Any = iter, known: Mapping[int, Shard] | None = None, verify: bool = False
    ) -> dict[int, Shard]:
        """The complete shards by number; the others have to be made again.

        A shard whose size is that of the index is taken as complete; of any other the footer is
        read. progress: wraps the list of files. known: shards that were read before.

        verify: read all of every shard, and remove those with a damaged page.
        """
        index = {} if verify else {shard.number: shard for shard in self._read_index()[1]}
        shards = dict(known or {})
        for number, size in progress(sorted(self._shard_sizes().items())):
            if number in shards:
                continue
            if number in index and index[number].bytes == size:
                shards[number] = index[number]
            elif shard := self._read_shard(number, size, verify):
                shards[number] = shard
            elif verify:
                self.files.rm_file(_name(number))
        return shards

    def write_index(self, shards: Iterable[Shard], complete: bool = False) -> None:
        """Write what `finished` would return. complete: whether no utterance is left to label."""
        entries = [_JSON.unstructure(one) for one in sorted(shards, key=lambda one: one.number)]
        self.write_file(INDEX, as_json({"complete": complete, "shards": entries}))

    def complete(self) -> bool:
        """Whether the index says that no utterance is left to label."""
        return self._read_index()[0]

    def remove_partial(self) -> None:
        """Remove what killed processes left beside the store's files."""
        if self.local:
            for folder in (self.folder, self.folder / "data"):
                remove_partial(folder)

    def _read_index(self) -> tuple[bool, list[Shard]]:
        try:
            index = json.loads(self.read_file(INDEX))
            return index["complete"], [_JSON.structure(one, Shard) for one in index["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False, []  # missing or damaged: the shards hold the same facts

    def _shard_sizes(self) -> dict[int, int]:
        """Bytes of the shards that exist, complete or not, by number."""
        try:
            files: Any = self.files.ls("data", detail=True)
        except FileNotFoundError:
            return {}
        named = ((Path(file["name"]), file["size"]) for file in files)
        return {
            int(path.stem): size
            for path, size in named
            if path.stem.isdigit() and path.suffix == ".parquet"
        }

    def _read_shard(self, number: int, size: int, verify: bool) -> Shard | None:
        """The facts in a shard's footer; None where it is damaged.

        verify: check every page, and not the footer alone.
        """
        name = _name(number)
        try:
            if verify:
                pages = pa.BufferReader(self.read_file(name))
                pq.read_table(pages, page_checksum_verification=True)
            return _JSON.structure(self._footer(name, size) | {"bytes": size}, Shard)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            log.warning("%s is damaged: %s", name, error)
            return None

    def _footer(self, name: str, size: int) -> dict[str, Any]:
        tail = self.read_file(name, max(size - TAIL, 0))
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = self.read_file(name, max(size - length, 0))
        # Arrow reads a footer alone as a file without rows.
        footer = pq.read_metadata(pa.BufferReader(MAGIC + tail[-length:]))
        return json.loads((footer.metadata or {})[METADATA_KEY])


def open_store(folder: Path, settings: dict[str, Any]) -> LabelStore:
    """The store in `folder`: a new one, or one that was begun with the same settings.

    Raises InputError when it was begun with other settings, naming each with both values, or when
    the folder holds something else.
    """
    store = LabelStore(folder, json.loads(json.dumps({"format": FORMAT, **settings})))
    if store.local:
        check_writable(folder)
    if store.files.exists(SETTINGS):
        begun, asked = _flat(read_settings(folder)), _flat(store.settings)
        differences = [
            f"{name} was {begun.get(name)!r} and is {asked.get(name)!r}"
            for name in sorted(begun.keys() | asked.keys())
            if begun.get(name) != asked.get(name)
        ]
        if differences:
            raise InputError(
                f"{folder} was begun with other settings: {'; '.join(differences)}. Continue with "
                "the old ones, or choose another output_dir"
            )
    else:
        names: Any = store.files.ls("", detail=False) if store.files.exists("") else []
        others = any(not Path(name).name.startswith(".") for name in names)
        if others and not store.files.exists(SETTINGS):  # another host may have just written it
            raise InputError(
                f"{folder} is not empty and not a label store: choose another output_dir"
            )
        store.write_file(SETTINGS, as_json(store.settings))
    store.write_file("README.md", CARD.encode())
    return store


def _states_column(labels: Sequence[PseudoLabel], width: int) -> pa.Array:
    """The final states: a list of lists of `width` numbers per row."""
    rows = [label.teacher_states for label in labels if label.teacher_states is not None]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate([np.zeros((0, width), np.float16), *rows])
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    return pa.ListArray.from_arrays(starts, inner)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"split": 1}}` → `{"data.split": 1}`, so that a difference is named exactly."""
    flat = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that made the labels in `folder`. Raises InputError: not a label store."""
    try:
        return json.loads(LabelStore(folder, {}).read_file(SETTINGS))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a label store: it has no {SETTINGS}") from None
    except ValueError as error:
        raise InputError(f"{folder}/{SETTINGS} is damaged: {error}") from None


def shard_files(folder: Path) -> dict[int, Path]:
    """The Parquet files of a label store by number, on a disk or a mounted bucket.

    Raises InputError where there are none.
    """
    if not (store := LabelStore(folder, {})).local:
        raise InputError(f"{store.address} is a bucket: name the folder where it is mounted")
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
    """A JSON file's contents; bytes of a path that are not UTF-8 are escape."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def error_rates(table: pa.Table) -> list[str]:
    """The units in which the rows' errors are counted: WER, CER, both, or neither."""
    if "error_rate" not in table.column_names:
        return ["WER"] if table.column("reference_words").null_count < len(table) else []
    return sorted({value for value in table.column("error_rate").to_pylist() if value})


def _name(number: int) -> str:
    return f"data/{number:05d}.parquet"


# Shards as JSON, in footers and the index.
_JSON = Converter(detailed_validation=False)
