"""Rows that are read when they are needed: of Parquet files, and of WebDataset archives, in which
the members `key.*` of a tar are one sample. Lists of numbers are arrays over Arrow's memory.
"""

import logging
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_distil.data.lists import BESIDE, cells_beside, decode_text, is_audio
from flax_distil.data.paths import file_system, is_url, open_file, read_part
from flax_distil.data.table import USUAL, Row, Table
from flax_distil.errors import InputError

log = logging.getLogger(__name__)

NAMED = 20  # samples of a stream that tell its columns


class ParquetRows(Sequence[Row]):
    """The rows of Parquet files; a row group is read when one of its rows is needed.

    The last row groups stay in memory, so that reading in order reads each once. Thread-safe.
    """

    KEPT = 4  # row groups in memory
    FOOTERS = 128  # parsed ones in memory: parsing takes as long as reading a row group

    def __init__(self, files: Sequence[str]):
        self.files = tuple(files)
        self.columns = ()
        self._groups: list[tuple[str, int]] = []  # file and its row group
        self._nulls: list[dict[str, int]] = []  # of each file's text columns
        sizes = []
        for path in self.files:
            metadata, schema = parquet_footer(path)
            self.columns = tuple(dict.fromkeys((*self.columns, *schema.names)))
            self._nulls.append(_null_counts(metadata))
            groups = range(metadata.num_row_groups)
            self._groups += [(path, group) for group in groups]
            sizes += [metadata.row_group(group).num_rows for group in groups]
        self._starts = [0, *accumulate(sizes)]
        self._footer = lru_cache(self.FOOTERS)(lambda path: parquet_footer(path)[0])
        self._read = lru_cache(self.KEPT)(self._read_group)

    def __reduce__(self):
        """Another process opens the files again."""
        return ParquetRows, (self.files,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        group, within = self._place(index)
        row = self._read(group).slice(within, 1)
        return {
            name: cell(next(part for part in column.chunks if len(part)))
            for name, column in zip(row.column_names, row.columns, strict=True)
        }

    def folder(self, index: int) -> str:
        """The folder of the file that a row lies in."""
        return os.path.dirname(self._groups[self._place(index)[0]][0])

    def column(self, name: str) -> Iterator[Any]:
        """The values of one column, read without the others."""
        return (value for part in self._arrays(name) for value in part.to_pylist())

    def _arrays(self, name: str) -> Iterator[pa.Array]:
        """One column; nulls where a file lacks it."""
        for path in self.files:
            with _opened(path) as file:
                if name in file.schema_arrow.names:
                    yield from file.read([name]).column(0).chunks
                else:
                    yield pa.nulls(file.metadata.num_rows)

    def list_lengths(self, column: str) -> np.ndarray:
        """Lengths of a list column, -1 where it is null, read without the others."""
        lengths = [np.zeros(0, np.int32)]
        for values in self._arrays(column):
            lists = values.cast(pa.list_(pa.int32())) if pa.types.is_null(values.type) else values
            lengths.append(lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False))
        return np.concatenate(lengths).astype(np.int32)

    def null_count(self, column: str) -> int:
        """Rows without a value, from the files' statistics where they exist."""
        if all(column in nulls for nulls in self._nulls):
            return sum(nulls[column] for nulls in self._nulls)
        return sum(values.null_count for values in self._arrays(column))

    def _place(self, index: int) -> tuple[int, int]:
        """The row group of a row, and its number there."""
        index = range(len(self))[index]
        group = bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def _read_group(self, number: int) -> pa.Table:
        path, group = self._groups[number]
        # Opened each time: thousands of shards must not keep thousands of files open.
        try:
            with _opened(
                path, metadata=self._footer(path), page_checksum_verification=True
            ) as file:
                return file.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is damaged ({error}): write it again") from None


def _opened(path: str, **options: Any) -> pq.ParquetFile:
    return pq.ParquetFile(path, filesystem=file_system(path) if is_url(path) else None, **options)


def parquet_footer(path: str) -> tuple[pq.FileMetaData, pa.Schema]:
    """Metadata and schema of a file. Raises InputError where it is not a complete Parquet file."""
    try:
        with _opened(path) as file:
            return file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} is not a complete Parquet file ({error}): write it again"
        ) from None


def _null_counts(metadata: pq.FileMetaData) -> dict[str, int]:
    """Nulls of the usual text columns, without columns whose statistics are incomplete."""
    groups, counts = range(metadata.num_row_groups), {}
    for place in range(metadata.num_columns):
        if (name := metadata.schema.column(place).path) in USUAL["text"]:
            statistics = [metadata.row_group(group).column(place).statistics for group in groups]
            if all(one is not None and one.has_null_count for one in statistics):
                counts[name] = sum(one.null_count for one in statistics)
    return counts


def cell(values: pa.Array) -> Any:
    """The only value of an array, with lists of numbers as NumPy arrays that are not copied.

    A list of n lists of fixed size D is [n, D]; other values are those of `to_pylist`. Converting
    the final states of a label to Python objects takes a hundred times as long as reading them.
    """
    if values.null_count:
        return None
    if pa.types.is_struct(values.type):
        return {
            field.name: cell(part)
            for field, part in zip(values.type, values.flatten(), strict=True)
        }
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        numbers, shape = values.flatten(), (-1,)
        if pa.types.is_fixed_size_list(numbers.type) and not numbers.null_count:
            numbers, shape = numbers.flatten(), (-1, numbers.type.list_size)
        kind = numbers.type
        if not numbers.null_count and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return numbers.to_numpy().reshape(shape)
    return values.to_pylist()[0]


# --- tars ---------------------------------------------------------------------------------------


def read_samples(path: str, stream: bool = False) -> Iterator[Row]:
    """The samples of an archive: members that are adjacent. Audio has its bytes where it is read as
    a stream, else its `place`: archive, position and size.

    Raises:
        InputError: the archive is damaged or compressed.
    """
    try:
        with (
            open_file(path) as file,
            tarfile.open(fileobj=file, mode="r|" if stream else "r:") as tar,
        ):
            for key, members in groupby(filter(tarfile.TarInfo.isfile, tar), _key):
                row: Row = {"id": key}
                for member in members:
                    name, suffix = member.name, member.name[len(key) + 1 :].lower()
                    wanted = suffix in BESIDE or (stream and is_audio(name))
                    contents = tar.extractfile(member).read() if wanted else b""  # type: ignore[union-attr]
                    if suffix in BESIDE:
                        row |= cells_beside(suffix, decode_text(contents), f"{path}: {name}")
                    elif is_audio(name):
                        place = path, member.offset_data, member.size
                        row["audio"] = {"path": name} | (
                            {"bytes": contents} if stream else {"place": place}
                        )
                yield row
    except (tarfile.TarError, OSError, UnicodeError) as error:
        raise InputError(
            f"{path} is not a complete uncompressed tar of audio and texts ({error}): write it "
            "again"
        ) from None


def _key(member: tarfile.TarInfo) -> str:
    """The name up to the first dot of its last part."""
    folder, sign, name = member.name.rpartition("/")
    return folder + sign + name.partition(".")[0]


def stream_tars(files: Sequence[str]) -> Table:
    """Archives as a stream, read from their beginning to their end; each is a shard of it."""
    import datasets

    rows = datasets.IterableDataset.from_generator(_samples, gen_kwargs={"files": list(files)})
    return Table(_names(islice(_samples(files), NAMED)), rows)


def _samples(files: Iterable[str]) -> Iterator[Row]:
    for path in files:
        apart = 0
        for row in read_samples(path, stream=True):
            apart += "text" in row and "audio" not in row
            if "audio" in row:
                yield row
        if apart:
            log.warning(
                "%s: %d texts are not read, whose audio is not beside them: sort it by name "
                "(tar --sort=name), or leave out streaming",
                path,
                apart,
            )


def read_tars(files: Sequence[str]) -> Table:
    """Archives as rows in random order of access; members of a sample may be apart."""
    samples: dict[tuple[str, str], Row] = {}
    for path in files:
        for row in read_samples(path):
            samples.setdefault((path, row["id"]), {}).update(row)
    rows = TarRows([row for row in samples.values() if "audio" in row])
    without = len(samples) - len(rows)
    notes = (f"{without:,} members of tars without audio",) if without else ()
    return Table(_names(rows.samples), rows, notes)


def _names(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


class TarRows(Sequence[Row]):
    """Samples whose audio is read when it is needed."""

    def __init__(self, samples: Sequence[Row]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Row:
        row = self.samples[index]
        audio = row["audio"]
        return row | {"audio": {"path": audio["path"], "bytes": read_part(*audio["place"])}}

    def column(self, name: str) -> Iterator[Any]:
        """One column, read without the audio."""
        return (row.get(name) for row in self.samples)
