"""The standard tools read what we write, and we read it back."""

from datasets import load_dataset
from fake_teacher import label_with

from flax_distil.data.utterances import listen, read_dataset
from flax_distil.pseudo_label import folder
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
    assert len(listen(found[3])) == 1600
    assert found.label_lengths().tolist() == [3] * 21


def test_shards_that_were_read_are_not_read_again(config, monkeypatch):
    label_with(config)
    store = LabelStore(config.output_dir, {})
    whole = store.finished()
    one = {0: whole[0]}
    read = []

    def notice(self, name, before=folder.Folder.read):
        read.append(name)
        return before(self, name)

    monkeypatch.setattr(folder.Folder, "read", notice)
    assert store.finished(read=one) == whole
    assert "data/00001.parquet" in read
    assert "data/00000.parquet" not in read
