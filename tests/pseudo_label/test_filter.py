"""Every count of the filter against ones made by hand."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from fake_teacher import clip

from flax_distil.config import FilterConfig
from flax_distil.data.utterances import Skipped, read_dataset
from flax_distil.errors import InputError
from flax_distil.pseudo_label.filter import run
from flax_distil.pseudo_label.store import PseudoLabel, open_store, read_settings

# id: reference words, errors, seconds, tokens, mean log-probability, compression ratio
LABELS = {
    "perfect": (10, 0, 6.0, 9, -0.1, 1.2),
    "five": (100, 5, 12.0, 99, -0.2, 1.3),
    "ten": (10, 1, 6.0, 9, -0.3, 1.4),  # exactly 10 %: dropped at 10
    "third": (3, 1, 3.0, 5, -0.4, 1.5),
    "hundred": (2, 2, 3.0, 5, -2.0, 1.0),
    "runaway": (4, 90, 30.0, 224, -0.2, 12.0),
    "empty": (0, 3, 3.0, 5, -0.1, 1.2),
    "long": (10, 0, 30.5, 9, -0.1, 1.2),
    "wordy": (10, 0, 6.0, 445, -0.1, 1.2),
    "thirty seconds": (10, 0, 30.0, 444, -0.1, 1.2),
}
UNREFERENCED = {"silent": (None, None, 6.0, 9, -0.5, 1.5), "loop": (None, None, 6.0, 9, -0.5, 3.0)}


def store(folder, labels=LABELS):
    made = open_store(folder, {"teacher": "hand", "vocabulary": 51864})
    rows = [
        PseudoLabel(
            id=name,
            audio={"bytes": clip(1), "path": f"{name}.flac"},
            reference=None if words is None else "word " * words,
            whisper_transcript=" words",
            token_ids=tuple(range(tokens)),
            duration=seconds,
            language="en",
            speaker="s",
            recording=None,
            utterance_number=number,
            mean_log_probability=log_probability,
            compression_ratio=ratio,
            no_speech_probability=0.0,
            wer=errors / words if words else None,
            word_errors=errors,
            reference_words=words,
        )
        for number, (name, (words, errors, seconds, tokens, log_probability, ratio)) in enumerate(
            labels.items()
        )
    ]
    shards = [
        made.write(n, rows[4 * n : 4 * n + 4], [Skipped("x", "damaged")])
        for n in range(-(-len(rows) // 4))
    ]
    made.write_index(shards, complete=True)
    return folder


@pytest.fixture
def config(tmp_path):
    return FilterConfig(store(tmp_path / "labels"), tmp_path / "chosen")


def kept(config) -> list[str]:
    return [utterance.id for utterance in read_dataset(config.output_dir)]


def test_what_is_kept_and_why_the_rest_is_not(config):
    report = run(config)
    assert kept(config) == ["perfect", "five", "thirty seconds"]
    assert report.labels == 10
    assert report.kept == 3
    assert report.dropped == {
        "no reference": 0,
        "empty reference": 1,
        "too long": 1,
        "too many tokens": 1,
        "low log-probability": 0,
        "high compression ratio": 0,
        "WER": 4,
    }
    assert report.kept_hours == pytest.approx(48 / 3600)
    assert report.hours == pytest.approx(129.5 / 3600)
    assert report.kept_wer == pytest.approx(100 * 5 / 120)


def test_a_label_that_was_dropped_is_nobody_s_text_before(config):
    """All are one speaker's; "five" is behind "perfect", and "thirty seconds" behind a gap."""
    run(config)
    assert read_dataset(config.source).follows().tolist() == [False] + [True] * 9
    assert read_dataset(config.output_dir).follows().tolist() == [False, True, False]


def test_the_table(config):
    report = run(dataclasses.replace(config, max_wer=30.0))
    table = {line.max_wer: line for line in report.table}
    assert list(table) == [5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 80.0, 100.0]
    assert [line.kept for line in table.values()] == [2, 3, 4, 4, 4, 5, 5, 5]
    assert table[5.0].dropped_percent == pytest.approx(80.0)
    assert table[40.0].dropped_percent == pytest.approx(50.0)
    assert table[15.0].hours == pytest.approx((6 + 12 + 6 + 30) / 3600)
    assert table[15.0].wer == pytest.approx(100 * 6 / 130)
    assert table[40.0].wer == pytest.approx(100 * 7 / 133)
    assert table[30.0].kept == report.kept
    written = json.loads((config.output_dir / "filter.json").read_text())
    assert written["table"][3] == dataclasses.asdict(table[20.0])
    assert written["dropped"] == report.dropped


def test_datasets_reads_the_result(config, tmp_path):
    run(config)
    found = load_dataset(str(config.output_dir), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["id"][:] == ["perfect", "five", "thirty seconds"]
    assert found[1]["audio"]["bytes"] == clip(1)
    assert read_settings(config.output_dir)["filter"]["max_wer"] == 10.0
    assert read_settings(config.output_dir)["teacher"] == "hand"
    source = pq.read_schema(config.source / "data" / "00000.parquet")
    assert pq.read_schema(config.output_dir / "data" / "00000.parquet").equals(source)


def test_criteria_without_references(config):
    config = dataclasses.replace(
        config,
        source=store(config.source.with_name("mixed"), LABELS | UNREFERENCED),
        max_wer=None,
        min_mean_log_probability=-1.0,
        max_compression_ratio=2.4,
    )
    report = run(config)
    assert kept(config) == [
        *("perfect", "five", "ten", "third", "empty", "thirty seconds", "silent")
    ]
    assert report.dropped["low log-probability"] == 1
    assert report.dropped["high compression ratio"] == 2
    assert report.dropped["WER"] == report.dropped["empty reference"] == 0


def test_missing_references_must_be_wanted(config):
    config = dataclasses.replace(
        config, source=store(config.source.with_name("mixed"), LABELS | UNREFERENCED)
    )
    with pytest.raises(InputError, match=r"2 of 12 labels have no reference.*--max-compression"):
        run(config)
    assert not config.output_dir.exists()
    report = run(dataclasses.replace(config, allow_missing_reference=True))
    assert kept(config) == ["perfect", "five", "thirty seconds", "silent", "loop"]
    assert report.kept_wer == pytest.approx(100 * 5 / 120)
    # The WER still judges what has a reference, another criterion what has none.
    config = dataclasses.replace(config, max_compression_ratio=2.4, overwrite=True)
    run(config)
    assert kept(config) == ["perfect", "five", "thirty seconds", "silent"]


def test_no_references_at_all_is_no_table_of_thresholds(config):
    source = store(config.source.with_name("bare"), UNREFERENCED)
    report = run(dataclasses.replace(config, source=source, allow_missing_reference=True))
    assert report.table == ()
    assert report.kept_wer is None
    assert report.kept == 2


def test_folders_in_use(config):
    run(config)
    with pytest.raises(InputError, match="chosen is in use: take another output_dir, or --over"):
        run(config)
    run(dataclasses.replace(config, overwrite=True, max_wer=5.0))
    assert kept(config) == ["perfect", "thirty seconds"]
    with pytest.raises(InputError, match="are the same folder"):
        run(dataclasses.replace(config, output_dir=config.source, overwrite=True))
    other = config.source.with_name("other")
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds no earlier result of filter"):
        run(dataclasses.replace(config, output_dir=other, overwrite=True))


def test_nothing_kept_writes_nothing(config):
    with pytest.raises(InputError, match=r"none of 10 labels is kept: raise max_wer from 0\.0"):
        run(dataclasses.replace(config, max_wer=0.0))
    assert not config.output_dir.exists()


def test_bad_stores(config, tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(InputError, match=r"is no label store: it has no labels\.json"):
            run(dataclasses.replace(config, source=tmp_path / name))
    shard = config.source / "data" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"00001\.parquet is damaged"):
        run(config)
    for path in (config.source / "data").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="has no shard yet"):
        run(config)


def test_a_store_that_was_stopped_is_said(config, caplog):
    (config.source / "shards.json").unlink()
    run(config)
    assert "labels is not complete" in caplog.text
