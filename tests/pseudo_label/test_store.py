"""The standard tools read what we write, and we read it back."""

import json

from datasets import load_dataset
from fake_teacher import label_with

from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.pseudo_label import store as store_module
from flax_distil.pseudo_label.store import LabelStore


def test_datasets_reads_the_shards(config, tmp_path):
    label_with(config)
    files = str(config.output_dir / "data" / "*.parquet")
    by_files = load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    by_folder = load_dataset(
        str(config.output_dir), split="train", cache_dir=str(tmp_path / "cache")
    )
    for found in (by_files, by_folder):
        assert len(found) == 21
        assert found["whisper_transcript"][3] == " clip number 3"
        assert found[3]["audio"]["bytes"][:4] == b"fLaC"
        assert found[3]["wer"] == 0.0
    streamed = load_dataset(str(config.output_dir), split="train", streaming=True)
    assert [row["id"] for row in streamed] == by_files["id"][:]


def test_a_label_store_is_a_dataset(config):
    label_with(config)
    found = read_dataset(config.output_dir)
    assert len(found) == 21
    assert found[3].id == "3.flac"
    assert found[3].text == "Clip number 3!"
    assert found[3].token_ids == (1, 2, 3)
    assert found[3].language == "en"
    assert found[3].speaker == "s0"
    assert len(load_waveform(found[3])) == 1600
    assert found.label_lengths().tolist() == [3] * 21


def test_to_go_on_costs_footers_alone(config, monkeypatch):
    """And nothing of the shards that the index knows, or that were read before."""
    label_with(config)
    store = LabelStore(config.output_dir, {})
    whole, read = store.finished(), []

    def notice(self, name, start=0, before=LabelStore.read_file):
        contents = before(self, name, start)
        read.append((name, len(contents)))
        return contents

    monkeypatch.setattr(store_module, "TAIL", 8)  # so that a footer and no more is read
    monkeypatch.setattr(LabelStore, "read_file", notice)
    assert store.finished() == whole
    assert [name for name, _ in read] == ["shards.json"]
    read.clear()
    store.files.rm_file("shards.json")
    assert store.finished(known={0: whole[0]}) == whole
    assert "data/00000.parquet" not in dict(read)
    assert read[0][0] == "data/00001.parquet"
    assert all(size < whole[1].bytes for _, size in read)
    read.clear()
    assert store.finished(verify=True) == whole
    assert ("data/00000.parquet", whole[0].bytes) in read


def test_a_run_writes_its_index_once(config, monkeypatch):
    written = []

    def notice(self, name, contents, before=LabelStore.write_file):
        written.append(name)
        before(self, name, contents)

    monkeypatch.setattr(LabelStore, "write_file", notice)
    label_with(config)
    assert [name for name in written if "/" not in name] == [
        *("labels.json", "README.md", "shards.json", "skipped.jsonl")
    ]


def test_settings_of_a_path_of_any_bytes_are_read_back_equal():
    settings = {"data.source": "caf\udce9", "text": "\u00e9"}
    assert json.loads(store_module.as_json(settings)) == settings
