"""Opens a dataset as a `Table`: from the hub, a saved dataset, or files of any form.

Audio is not decoded here, and no source holds audio in memory.
"""

import os
from dataclasses import replace
from typing import Any

from flax_distil.config import DataConfig
from flax_distil.data.folders import check_split, read_files, wanted_names
from flax_distil.data.lists import list_kind
from flax_distil.data.paths import (
    PATTERN,
    address,
    is_file,
    is_folder,
    is_url,
    join,
    list_files,
    matching,
)
from flax_distil.data.table import Table
from flax_distil.errors import InputError

FORMS = (
    "a folder, a list (.jsonl, .json, .csv, .tsv, each also .gz, or wav.scp), .parquet, .tar, a "
    "pattern of files or the name of a dataset on the hub"
)


def read_table(config: DataConfig) -> Table:
    """The rows of `config.source`. Raises InputError where it is not a dataset."""
    source = address(config.source)
    try:
        return _read(source, config)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if not is_url(source):
            raise
        raise InputError(f"cannot read {source} ({type(error).__name__}: {error})") from error


def _read(source: str, config: DataConfig) -> Table:
    known = list_kind(source) or source.endswith((".parquet", ".tar"))
    if is_folder(source):
        files, root = list_files(source), source
    elif is_file(source):
        if not known:
            kind = os.path.splitext(source)[1] or "nameless"
            raise InputError(
                f"{config.source}: a dataset is {FORMS}, not a {kind} file; unpack an archive first"
            )
        check_split(source, config)
        files, root, config = [source], os.path.dirname(source), replace(config, split=None)
    elif PATTERN.search(source):
        files, root = matching(source)
        if not files:
            raise InputError(f"{config.source}: no file matches")
    elif known or is_url(source) or source.startswith((".", "/")) or source.count("/") > 1:
        raise InputError(f"{config.source}: no such file or folder; a dataset is {FORMS}")
    else:
        return _hub(config)
    for name in ("config", "revision"):
        if getattr(config, name):
            raise InputError(
                f"{config.source} is a local dataset and {name} is for the hub: leave it out"
            )
    if any(is_file(join(source, name)) for name in ("dataset_dict.json", "state.json")):
        return _saved(source, config)
    return read_files(files, root, config)


# --- Hugging Face -------------------------------------------------------------------------------


def _saved(folder: str, config: DataConfig) -> Table:
    import datasets

    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.DatasetDict):
        splits = _splits(config, [str(name) for name in saved])
        saved = datasets.concatenate_datasets([saved[name] for name in splits])
    return replace(_undecoded(saved), folder=folder)


def _hub(config: DataConfig) -> Table:
    import datasets

    name, _, written = config.source.partition("@")
    options: dict[str, Any] = {"revision": config.revision or written or None}
    try:
        known = (
            None
            if config.split
            else datasets.get_dataset_split_names(name, config.config, **options)
        )
        options |= {"streaming": config.streaming}
        parts = [
            datasets.load_dataset(name, config.config, split=split, **options)
            for split in (wanted_names(config) if known is None else _splits(config, known))
        ]
        return _undecoded(parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts))
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


def _splits(config: DataConfig, splits: list[str]) -> list[str]:
    """The splits that are named, or the only one."""
    if config.split is None and len(splits) == 1:
        return splits
    wanted = wanted_names(config) if config.split else []
    missing = [name for name in wanted if name not in splits]
    if wanted and not missing:
        return wanted
    problem = f"no split {'+'.join(missing)}" if wanted else "several splits"
    raise InputError(
        f"{config.source} has {problem}: name one of {', '.join(splits)}, or several as A+B"
    )


def _undecoded(found: Any) -> Table:
    """A `datasets` object as a table, with audio not decoded."""
    from datasets import Audio

    for name, feature in (found.features or {}).items():
        if isinstance(feature, Audio):
            found = found.cast_column(name, Audio(decode=False))
    columns = found.column_names or list(next(iter(found), {}))
    return Table(tuple(columns), found)
