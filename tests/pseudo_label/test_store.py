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


def test_resuming_reads_footers_alone(config):
    """And nothing of shards that the index knows, or that were read before."""
    label_with(config)
    store = LabelStore(config.output_dir)
    whole, shards = store.finished(), sorted((config.output_dir / "data").iterdir())
    for path in shards:  # the footer stays, what is before it goes
        contents = path.read_bytes()
        footer = int.from_bytes(contents[-8:-4], "little") + 8
        path.write_bytes(bytes(len(contents) - footer) + contents[-footer:])
    (config.output_dir / "shards.json").unlink()
    assert store.finished() == whole
    shards[0].write_bytes(bytes(whole[0].bytes))
    assert store.finished(known={0: whole[0]}) == whole
    assert store.finished().keys() == whole.keys() - {0}
    store.write_index(whole.values())
    assert store.finished() == whole
    assert store.finished(verify=True) == {}


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
