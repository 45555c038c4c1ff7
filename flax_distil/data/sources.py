"""Opens a dataset as a `Table`: from the hub, a saved dataset, a folder, a list or Parquet.

Audio is not decoded here, and no source holds audio in memory.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_distil.config import DataConfig
from flax_distil.data.folders import check_split, list_table, read_files, read_folder
from flax_distil.data.lists import COMPRESSED, list_kind
from flax_distil.data.parquet import ParquetRows
from flax_distil.data.table import Table
from flax_distil.errors import InputError


def read_table(config: DataConfig) -> Table:
    """The rows of `config.source`. Raises InputError where it is not a dataset."""
    source = config.source
    path = Path(source).expanduser()
    for name in ("config", "revision", "streaming"):
        if getattr(config, name) and path.exists():
            raise InputError(f"{source} is a local dataset and {name} is for the hub: leave it out")
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(path, config)
        return read_folder(path, config)
    if path.is_file():
        check_split(path, config)
        if path.suffix == ".parquet":
            rows = ParquetRows([path])
            return Table(rows.columns, rows)
        if list_kind(path):
            return list_table(path, config)
        raise InputError(
            f"{source}: a dataset is a folder, a list (.jsonl, .json, .csv, .tsv, each also .gz), "
            f".parquet or a hub name, not a {path.suffix or 'nameless'} file"
        )
    if any(sign in source for sign in "*?["):
        return _matching(path, config)
    is_file = path.suffix in (".parquet", *COMPRESSED) or list_kind(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or is_file:
        raise InputError(f"{source}: no such file or folder")
    return _hub(config)


def _matching(pattern: Path, config: DataConfig) -> Table:
    """The files that match a pattern; the existing folders in it are taken literally."""
    root = pattern.parent
    while not root.is_dir():
        root = root.parent
    below = os.path.join(glob.escape(str(root)), pattern.relative_to(root))
    names = sorted(glob.glob(below, recursive=True))
    if not (files := [Path(name) for name in names if os.path.isfile(name)]):
        raise InputError(f"{config.source}: no file matches")
    return read_files(files, root, config)


# --- Hugging Face -------------------------------------------------------------------------------


def _saved(folder: Path, config: DataConfig) -> Table:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_one_split(config, [str(name) for name in saved])]
    return replace(_undecoded(saved), folder=folder)


def _hub(config: DataConfig) -> Table:
    import datasets

    name, _, written = config.source.partition("@")
    options: dict[str, Any] = {"revision": config.revision or written or None}
    try:
        splits = [config.split] if config.split else None
        splits = splits or datasets.get_dataset_split_names(name, config.config, **options)
        options |= {"split": _one_split(config, splits), "streaming": config.streaming}
        return _undecoded(datasets.load_dataset(name, config.config, **options))
    except InputError:
        raise
    except ConnectionError:
        raise InputError(
            f"{name} is not a local file or folder, and the Hugging Face hub cannot be reached: "
            "download it elsewhere (`save_to_disk`) and name the folder"
        ) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{name} is neither a local file or folder nor a dataset of the hub "
            f"({type(error).__name__}: {error})"
        ) from None


def _one_split(config: DataConfig, splits: Sequence[str]) -> str:
    split = config.split or (splits[0] if len(splits) == 1 else None)
    if split is not None and split in splits:
        return split
    problem = f"no split {config.split}" if config.split else "several splits"
    raise InputError(f"{config.source} has {problem}: name one of {', '.join(splits)}")


def _undecoded(found: Any) -> Table:
    """A `datasets` object as a table, with audio not decoded."""
    from datasets import Audio

    for name, feature in (found.features or {}).items():
        if isinstance(feature, Audio):
            found = found.cast_column(name, Audio(decode=False))
    columns = found.column_names or list(next(iter(found), {}))
    return Table(tuple(columns), found)
