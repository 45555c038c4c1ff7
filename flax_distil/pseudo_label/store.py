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
from typing import Annotated, Any, get_type_hints

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter

from flax_distil.data.utterances import Skipped
from flax_distil.errors import InputError, check_writable
from flax_distil.files import remove_partial, write_whole

log = logging.getLogger(__name__)

SETTINGS = "labels.json"
INDEX = "shards.json"
SHARDS = "data/[0-9]*.parquet"
# 1 had neither recording nor utterance_number; 2 none of ended, speech, error_rate and parts.
FORMAT = 3
ROW_GROUP = 4  # rows; training reads at random, one row group at a time
METADATA_KEY = b"flax_distil.shard"

CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
---
Speech with pseudo-labels; `labels.json` says what made them.
"""


@dataclass(frozen=True)
class PseudoLabel:
    """The teacher's label of one clip: one row of a shard, each field with its Parquet type."""

    id: Annotated[str, pa.string()]
    audio: Annotated[dict[str, Any], pa.struct([("bytes", pa.binary()), ("path", pa.string())])] = (
        dataclasses.field(repr=False)
    )
    """{bytes, path}: 16 kHz FLAC, or only the path of the original file."""
    reference: Annotated[str | None, pa.string()]
    """The dataset's own text, unchanged."""
    whisper_transcript: Annotated[str, pa.string()]
    token_ids: Annotated[tuple[int, ...], pa.list_(pa.int32())]
    """Text and timestamps, without prompt and end of text."""
    duration: Annotated[float, pa.float64()]
    """Seconds."""
    language: Annotated[str | None, pa.string()]
    speaker: Annotated[str | None, pa.string()]
    recording: Annotated[str | None, pa.string()]
    """The recording, chapter or session that the utterance is a part of."""
    utterance_number: Annotated[int, pa.int64()]
    """Position of the utterance or window in the dataset; training finds the previous one by it."""
    mean_log_probability: Annotated[float, pa.float32()]
    compression_ratio: Annotated[float, pa.float32()]
    no_speech_probability: Annotated[float, pa.float32()]
    wer: Annotated[float | None, pa.float64()]
    """A fraction, not percent, after Whisper's normaliser; None without a reference word."""
    word_errors: Annotated[int | None, pa.int32()]
    """Substitutions, deletions and insertions; None without a reference."""
    reference_words: Annotated[int | None, pa.int32()]
    """Words of the normalised reference; None without a reference."""
    error_rate: Annotated[str | None, pa.string()] = None
    """WER or CER: the unit of the three fields above; None without a reference."""
    ended: Annotated[bool, pa.bool_()] = True
    """Whether the teacher produced the end of text; False for a label cut at max_tokens."""
    speech: Annotated[bool, pa.bool_()] = True
    """Whether the clip contains speech; if not, the transcript is a hallucination."""
    part_references: Annotated[tuple[str, ...] | None, pa.list_(pa.string())] = None
    """Texts of the parts of a packed window; None for single clips, or if there is no reference."""
    part_errors: Annotated[tuple[int, ...] | None, pa.list_(pa.int32())] = None
    """Errors in each part, by the alignment of the whole window."""
    part_words: Annotated[tuple[int, ...] | None, pa.list_(pa.int32())] = None
    """Words (or characters) of each part's normalised text."""
    teacher_states: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """float16 [n, D]: the decoder's final states at each token of prompt and label, if kept."""
    audio_SD: np.ndarray | None = dataclasses.field(default=None, repr=False)
    """The encoder's output, which is kept beside the store."""


_HINTS = get_type_hints(PseudoLabel, include_extras=True)
SCHEMA = pa.schema(
    [(name, hint.__metadata__[0]) for name, hint in _HINTS.items() if hasattr(hint, "__metadata__")]
)


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


FROM_JSON = TypeAdapter(Shard)  # what a footer and the index hold


@dataclass(frozen=True)
class LabelStore:
    """A folder of shards, made with one combination of settings."""

    folder: Path
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        rows, schema = [vars(label) for label in labels], SCHEMA
        if width := self.settings.get("teacher_states"):
            states = pa.list_(pa.list_(pa.float16(), width))
            schema = schema.append(pa.field("teacher_states", states))
            rows = [row | {"teacher_states": list(row["teacher_states"])} for row in rows]
        return self.write_table(number, pa.Table.from_pylist(rows, schema), skipped)

    def write_table(
        self, number: int, table: pa.Table, skipped: Mapping[int, Skipped] | None = None
    ) -> Shard:
        """Write a shard: the whole file or none of it."""
        skipped, counted = skipped or {}, ["duration", "word_errors", "reference_words"]
        totals = table.select(counted).to_pandas().sum()
        shard = Shard(
            number=number,
            rows=table.num_rows,
            seconds=float(totals["duration"]),
            word_errors=int(totals["word_errors"]),
            reference_words=int(totals["reference_words"]),
            rates=tuple(sorted(set(table["error_rate"].drop_null().to_pylist()))),
            skipped=tuple(skipped.values()),
            skipped_numbers=tuple(skipped),
        )
        facts = dataclasses.asdict(shard)
        del facts["bytes"]  # not known until the footer that holds them is written
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
        sink = pa.BufferOutputStream()
        options = {"row_group_size": ROW_GROUP, "compression": "zstd", "write_page_checksum": True}
        pq.write_table(table, sink, **options)
        contents = sink.getvalue().to_pybytes()
        self.write_file(_name(number), contents)
        return dataclasses.replace(shard, bytes=len(contents))

    def write_file(self, name: str, contents: bytes) -> None:
        """Write a file: the whole of it or nothing, also when the process is killed."""
        if self.local:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, contents)
        else:  # an upload becomes visible when it is complete
            self.files.pipe_file(name, contents)

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
        found: Any = self.files.glob(SHARDS, detail=True)
        for name, file in progress(sorted(found.items())):
            number = int(Path(name).stem)
            if number in shards:
                continue
            if number in index and index[number].bytes == file["size"]:
                shards[number] = index[number]
            elif shard := self._read_shard(number, file["size"], verify):
                shards[number] = shard
            elif verify:
                self.files.rm_file(_name(number))
        return shards

    def write_index(self, shards: Iterable[Shard], complete: bool = False) -> None:
        """Write what `finished` would return. complete: whether no utterance is left to label."""
        entries = [dataclasses.asdict(one) for one in sorted(shards, key=lambda one: one.number)]
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
            index = json.loads(self.files.cat_file(INDEX))
            return index["complete"], [FROM_JSON.validate_python(one) for one in index["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False, []  # missing or damaged: the shards hold the same facts

    def _read_shard(self, number: int, size: int, verify: bool) -> Shard | None:
        """The facts in a shard's footer; None where it is damaged.

        verify: check every page, and not the footer alone.
        """
        try:
            with self.files.open(_name(number)) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=verify)
                if verify:
                    parquet.read()
                facts = json.loads((parquet.metadata.metadata or {})[METADATA_KEY])
            return FROM_JSON.validate_python(facts | {"bytes": size})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            log.warning("%s is damaged: %s", _name(number), error)
            return None


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
        return json.loads(LabelStore(folder).files.cat_file(SETTINGS))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a label store: it has no {SETTINGS}") from None
    except ValueError as error:
        raise InputError(f"{folder}/{SETTINGS} is damaged: {error}") from None


def shard_files(folder: Path) -> dict[int, Path]:
    """The Parquet files of a label store by number, on a disk or a mounted bucket.

    Raises InputError where there are none.
    """
    if not (store := LabelStore(folder)).local:
        raise InputError(f"{store.address} is a bucket: name the folder where it is mounted")
    read_settings(folder)
    if files := sorted(folder.glob(SHARDS)):
        return {int(path.stem): path for path in files}
    raise InputError(f"{folder} has no shard yet: run pseudo-label")


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard, or some of its columns; what its format lacks is null. Raises InputError when it is
    damaged."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): run pseudo-label --verify to make it again"
        ) from None
    return pa.concat_tables([table, SCHEMA.empty_table()], promote_options="default")


def as_json(value: Any) -> bytes:
    """A JSON file's contents; bytes of a path that are not UTF-8 are escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def _name(number: int) -> str:
    return f"data/{number:05d}.parquet"
