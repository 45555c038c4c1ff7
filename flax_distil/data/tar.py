"""Rows of WebDataset archives: the members `key.*` of a tar are one sample."""

import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from flax_distil.data.lists import BESIDE, cells_beside, decode_text, is_audio
from flax_distil.data.paths import open_file, read_part
from flax_distil.data.table import Row, Table
from flax_distil.errors import InputError

log = logging.getLogger(__name__)

NAMED = 20  # samples of a stream that tell its columns


def read_samples(path: str, stream: bool = False) -> Iterator[Row]:
    """The samples of an archive: members that are adjacent. Audio has its bytes where it is read as
    a stream, else its position and size in the archive (`place`).

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
                        row["audio"] = {"path": name, "bytes": contents or None}
                        if not stream:
                            row["place"] = (path, member.offset_data, member.size)
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
    return tuple(dict.fromkeys(name for row in rows for name in row if name != "place"))


class TarRows(Sequence[Row]):
    """Samples whose audio is read when it is needed."""

    def __init__(self, samples: Sequence[Row]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Row:
        row = dict(self.samples[index])
        return row | {"audio": row["audio"] | {"bytes": read_part(*row.pop("place"))}}

    def column(self, name: str) -> Iterator[Any]:
        """One column, read without the audio."""
        return (row.get(name) for row in self.samples)
