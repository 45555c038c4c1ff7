"""Where rows come from: hub, saved datasets, folders of audio, manifests, Parquet.

Every source ends as a `Table`: the names of its columns, and its rows as dicts in a fixed order.
Nothing is decoded here, and no source holds audio in memory.
"""

import csv
import glob
import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_distil.config import DataConfig
from flax_distil.errors import InputError

Row = dict[str, Any]

# fmt: off
AUDIO_SUFFIXES = (
    ".aac", ".aiff", ".flac", ".g722", ".m4a", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".oga",
    ".ogg", ".opus", ".wav", ".webm", ".wma",
)
# fmt: on
FILE_COLUMNS = ("file_name", "audio", "audio_filepath", "audio_path", "path", "file")
SHARD_NAME = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\.parquet")


@dataclass(frozen=True)
class Table:
    """Rows of one dataset; a stream has an Iterable where the others have a Sequence."""

    columns: tuple[str, ...]
    rows: Sequence[Row] | Iterable[Row]


def read_table(config: DataConfig) -> Table:
    """The rows of `config.source`, whatever it is. Raises InputError when it is nothing."""
    source = config.source
    path = Path(source).expanduser()
    for name in ("config", "revision", "streaming"):
        if getattr(config, name) and path.exists():
            raise InputError(f"{source} is here, and {name} is for the hub's: leave it out")
    if any(sign in source for sign in "*?["):
        return _parquet([Path(name) for name in sorted(glob.glob(str(path)))], source)
    if path.is_dir():
        return _folder(path, config)
    if path.is_file():
        if path.suffix in (".jsonl", ".json", ".ndjson"):
            return _manifest(path)
        if path.suffix == ".parquet":
            return _parquet([path], source)
        if path.suffix == ".csv":
            return _listed(_read_csv(path), path)
        raise InputError(
            f"{source}: a dataset is a folder, a .jsonl manifest, a .csv list, .parquet or a hub "
            f"name, not a {path.suffix or 'nameless'} file"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in _FILES:
        raise InputError(f"{source}: there is no such file or folder")
    return _hub(config)


_FILES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")


# --- files --------------------------------------------------------------------------------------


def _folder(folder: Path, config: DataConfig) -> Table:
    """Saved dataset, Parquet files, listed audio or plain audio: in this order."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, config)
    if config.split and (folder / config.split).is_dir():
        folder, config = folder / config.split, DataConfig(str(folder / config.split))
    files = sorted(path for path in folder.rglob("*.parquet") if path.name != "metadata.parquet")
    if files:
        return _parquet(_of_split(files, config), str(folder))
    if config.split:
        raise InputError(f"{folder} has no split {config.split}: there is no folder of that name")

    lists = [path for path in sorted(folder.rglob("metadata.*")) if path.suffix in _READERS]
    if lists:
        return _joined([_listed(_READERS[path.suffix](path), path) for path in lists])
    audio = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not audio:
        raise InputError(
            f"{folder} has no Parquet, no metadata.csv or .jsonl, and no audio: nothing to read"
        )
    rows = [{"id": path.relative_to(folder).as_posix(), "audio": str(path)} for path in audio]
    return Table(("id", "audio"), rows)


def _of_split(files: list[Path], config: DataConfig) -> list[Path]:
    """The files of one split, where names like train-00000-of-00002.parquet tell them apart."""
    named = [SHARD_NAME.fullmatch(path.name) for path in files]
    splits = sorted({match["split"] for match in named if match})
    if config.split is None and len(splits) > 1:
        raise InputError(f"{config.source} has the splits {', '.join(splits)}: name one as split")
    if config.split is None:
        return files
    if config.split not in splits:
        raise InputError(
            f"{config.source} has no split {config.split}; it has {', '.join(splits) or 'none'}"
        )
    return [
        path
        for path, match in zip(files, named, strict=True)
        if match and match["split"] == config.split
    ]


def _manifest(path: Path) -> Table:
    return _listed(_read_jsonl(path), path)


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} must be an object such as {{...}}")
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv}


def _listed(rows: list[Row], path: Path) -> Table:
    """Rows that name files; relative names start at the folder of the list."""
    if not rows:
        raise InputError(f"{path} has no rows")
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    for row in rows:
        for column in FILE_COLUMNS:
            name = row.get(column)
            if isinstance(name, str) and "://" not in name:
                # As it is written, a name is the same on every machine: a good id.
                row.setdefault(
                    "id", name if row.get("offset") is None else f"{name}@{row['offset']}"
                )
                row[column] = str(path.parent / name)
    return Table(tuple(dict.fromkeys(("id", *columns))), rows)


def _joined(tables: list[Table]) -> Table:
    columns = tuple(dict.fromkeys(name for table in tables for name in table.columns))
    return Table(columns, [row for table in tables for row in table.rows])


# --- Parquet ------------------------------------------------------------------------------------


class ParquetRows(Sequence[Row]):
    """Random access to the rows of Parquet files: a row group is read when a row of it is asked.

    The last few row groups stay in memory, so that reading in order touches each once. Safe to
    share between threads.
    """

    KEPT = 4  # row groups
    FOOTERS = 128  # parsing one takes as long as reading a row group

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        groups, self.columns = [], ()
        for number, path in enumerate(self.files):
            metadata, schema = _parquet_footer(path)
            self.columns = tuple(dict.fromkeys((*self.columns, *schema)))
            groups += [
                (number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)
            ]
        self._groups = [(number, group) for number, group, _ in groups]
        self._starts = [0, *accumulate(rows for _, _, rows in groups)]
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._footer = lru_cache(self.FOOTERS)(pq.read_metadata)

    def __reduce__(self):
        """Another process opens the files itself."""
        return ParquetRows, (self.files,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        group = bisect_right(self._starts, index) - 1
        return self._read(group).slice(index - self._starts[group], 1).to_pylist()[0]

    def column(self, name: str) -> Iterator[pa.Array]:
        """One column, without reading any other; nulls where a file lacks it."""
        for path in self.files:
            if name in pq.read_schema(path).names:
                yield from pq.read_table(path, columns=[name]).column(0).chunks
            else:
                yield pa.nulls(self._footer(path).num_rows)

    def list_lengths(self, column: str) -> np.ndarray:
        """Lengths of a list column, -1 where it is null, without reading any other."""
        found = [np.zeros(0, np.int32)]
        for values in self.column(column):
            if pa.types.is_null(values.type):
                found.append(np.full(len(values), -1, np.int32))
                continue
            lengths = values.value_lengths().fill_null(-1)
            found.append(lengths.to_numpy(zero_copy_only=False).astype(np.int32))
        return np.concatenate(found)

    def _read(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        number, within = self._groups[group]
        path = self.files[number]
        # Opened anew each time: thousands of shards must not hold thousands of files open.
        try:
            with pq.ParquetFile(
                path, metadata=self._footer(path), page_checksum_verification=True
            ) as file:
                table = file.read_row_group(within)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is damaged ({error}): write it again") from None
        with self._lock:
            self._cache[group] = table
            if len(self._cache) > self.KEPT:
                self._cache.popitem(last=False)
        return table


def _parquet_footer(path: Path) -> tuple[pq.FileMetaData, tuple[str, ...]]:
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, tuple(file.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}): write it again") from None


def _parquet(files: list[Path], source: str) -> Table:
    if not files:
        raise InputError(f"{source}: no Parquet file matches")
    rows = ParquetRows(files)
    return Table(rows.columns, rows)


# --- Hugging Face -------------------------------------------------------------------------------


def _saved(folder: Path, config: DataConfig) -> Table:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        split = _one_split(config, [str(name) for name in saved])
        saved = saved[split]
    return _undecoded(saved)


def _hub(config: DataConfig) -> Table:
    import datasets

    name = config.source
    try:
        split = config.split or _one_split(
            config, datasets.get_dataset_split_names(name, config.config, revision=config.revision)
        )
        found = datasets.load_dataset(
            name,
            config.config,
            split=split,
            streaming=config.streaming,
            revision=config.revision,
        )
    except InputError:
        raise
    except ConnectionError:
        raise InputError(
            f"{name} is no file or folder here, and the Hugging Face hub cannot be reached: "
            "download it elsewhere (`save_to_disk`) and name the folder"
        ) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{name} is neither a file or folder here nor a dataset the hub gives "
            f"({type(error).__name__}: {error})"
        ) from None
    return _undecoded(found)


def _one_split(config: DataConfig, splits: Sequence[str]) -> str:
    split = config.split or (splits[0] if len(splits) == 1 else None)
    if split is not None and split in splits:
        return split
    asked = f"no split {config.split}" if config.split else "several splits"
    raise InputError(f"{config.source} has {asked}: name one of {', '.join(splits)}")


def _undecoded(found: Any) -> Table:
    """A `datasets` object whose audio stays bytes or a path: decoding is ours."""
    from datasets import Audio

    for name, feature in (found.features or {}).items():
        if isinstance(feature, Audio):
            found = found.cast_column(name, Audio(decode=False))
    columns = found.column_names or list(next(iter(found), {}))
    return Table(tuple(columns), found)
