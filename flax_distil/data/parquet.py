"""Random access to rows of Parquet files, with lists of numbers as arrays over Arrow's memory."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_distil.data.table import TEXT, Row, Table
from flax_distil.errors import InputError


class ParquetRows(Sequence[Row]):
    """The rows of Parquet files; a row group is read when one of its rows is needed.

    The last row groups stay in memory, so that reading in order reads each once. Thread-safe.
    """

    KEPT = 4  # row groups in memory
    FOOTERS = 128  # parsed ones in memory: parsing takes as long as reading a row group

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        groups, self.columns = [], ()
        self._nulls: list[dict[str, int]] = []  # of each file's text columns
        for number, path in enumerate(self.files):
            metadata, schema = parquet_footer(path)
            self.columns = tuple(dict.fromkeys((*self.columns, *schema.names)))
            self._nulls.append(_null_counts(metadata))
            groups += [
                (number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)
            ]
        self._groups = [(number, group) for number, group, _ in groups]
        self._starts = [0, *accumulate(rows for _, _, rows in groups)]
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._footer = lru_cache(self.FOOTERS)(pq.read_metadata)

    def __reduce__(self):
        """Another process opens the files again."""
        return ParquetRows, (self.files,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        group, within = self._place(index)
        row = self._read(group).slice(within, 1)
        return {
            name: cell(next(part for part in column.chunks if len(part)))
            for name, column in zip(row.column_names, row.columns, strict=True)
        }

    def folder(self, index: int) -> Path:
        """The folder of the file that a row lies in."""
        return self.files[self._groups[self._place(index)[0]][0]].parent

    def column(self, name: str) -> Iterator[pa.Array]:
        """One column, read without the others; nulls where a file lacks it."""
        for path in self.files:
            if name in pq.read_schema(path).names:
                yield from pq.read_table(path, columns=[name]).column(0).chunks
            else:
                yield pa.nulls(self._footer(path).num_rows)

    def list_lengths(self, column: str) -> np.ndarray:
        """Lengths of a list column, -1 where it is null, read without the others."""
        found = [np.zeros(0, np.int32)]
        for values in self.column(column):
            if pa.types.is_null(values.type):
                found.append(np.full(len(values), -1, np.int32))
                continue
            lengths = values.value_lengths().fill_null(-1)
            found.append(lengths.to_numpy(zero_copy_only=False).astype(np.int32))
        return np.concatenate(found)

    def null_count(self, column: str) -> int:
        """Rows without a value, from the files' statistics where they exist."""
        if all(column in nulls for nulls in self._nulls):
            return sum(nulls[column] for nulls in self._nulls)
        return sum(values.null_count for values in self.column(column))

    def _place(self, index: int) -> tuple[int, int]:
        """The row group of a row, and its number there."""
        index = range(len(self))[index]
        group = bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def _read(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        number, within = self._groups[group]
        path = self.files[number]
        # Opened each time: thousands of shards must not keep thousands of files open.
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


def parquet_footer(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    """Metadata and schema of a file. Raises InputError where it is not a complete Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} is not a complete Parquet file ({error}): write it again"
        ) from None


def _null_counts(metadata: pq.FileMetaData) -> dict[str, int]:
    """Nulls of the usual text columns, without columns whose statistics are incomplete."""
    groups = range(metadata.num_row_groups)
    counts = {}
    for place in range(metadata.num_columns):
        if (name := metadata.schema.column(place).path) in TEXT:
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


def read_parquet(files: Sequence[Path], source: str) -> Table:
    """The rows of files in order. Raises InputError where there is none or one is damaged."""
    if not files:
        raise InputError(f"{source}: no Parquet file matches")
    rows = ParquetRows(files)
    return Table(rows.columns, rows)
