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
from flax_distil.pseudo_label.criteria import all_capitals
from flax_distil.pseudo_label.filter import report_table, run
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


def store(folder, labels=LABELS, change=None, **settings):
    """change: fields of some rows, by their ids."""
    made = open_store(folder, {"teacher": "hand", "vocabulary": 51864} | settings)
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
            error_rate=None if words is None else "WER",
        )
        for number, (name, (words, errors, seconds, tokens, log_probability, ratio)) in enumerate(
            labels.items()
        )
    ]
    rows = [dataclasses.replace(row, **(change or {}).get(row.id, {})) for row in rows]
    shards = [
        made.write(n, rows[4 * n : 4 * n + 4], {4 * n: Skipped("x", "damaged")})
        for n in range(-(-len(rows) // 4))
    ]
    made.write_index(shards, complete=True)
    return folder


@pytest.fixture
def config(tmp_path):
    return FilterConfig(store(tmp_path / "labels"), tmp_path / "filtered")


def kept(config) -> list[str]:
    return [utterance.id for utterance in read_dataset(config.output_dir)]


def test_what_is_kept_and_why_the_rest_is_not(config):
    report = run(config)
    assert kept(config) == ["perfect", "five", "thirty seconds"]
    assert report.labels == 10
    assert report.kept == 3
    counted = {"empty reference": 1, "too long": 1, "too many tokens": 1, "WER": 4}
    assert report.dropped == dict.fromkeys(report.dropped, 0) | counted
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


def test_a_choice_of_hours_is_random_and_grows(config):
    """Of five labels of 6, 12, 6, 3 and 30 s: never more than asked, smaller choices in larger."""
    config = dataclasses.replace(config, max_wer=60.0, overwrite=True)
    chosen = {}
    for seconds in (36, 45, 100):
        report = run(dataclasses.replace(config, max_hours=seconds / 3600))
        assert report.kept_hours <= seconds / 3600 + 1e-9
        assert report.kept + report.dropped["hours"] == 5
        assert {line.max_wer: line.kept for line in report.table}[60.0] == 5  # before the choice
        chosen[seconds] = set(kept(config))
    assert chosen[36] <= chosen[45] < chosen[100]
    assert len(chosen[100]) == 5
    run(dataclasses.replace(config, max_hours=36 / 3600))
    assert set(kept(config)) == chosen[36]
    others = []
    for seed in range(1, 6):
        run(dataclasses.replace(config, max_hours=36 / 3600, seed=seed))
        others.append(set(kept(config)))
    assert any(one != chosen[36] for one in others)


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
    with pytest.raises(
        InputError, match="filtered is in use: choose another output_dir, or add --over"
    ):
        run(config)
    run(dataclasses.replace(config, overwrite=True, max_wer=5.0))
    assert kept(config) == ["perfect", "thirty seconds"]
    with pytest.raises(InputError, match="are the same folder"):
        run(dataclasses.replace(config, output_dir=config.source, overwrite=True))
    other = config.source.with_name("other")
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="does not hold an earlier result of filter"):
        run(dataclasses.replace(config, output_dir=other, overwrite=True))


def test_nothing_kept_writes_nothing(config):
    with pytest.raises(InputError, match=r"none of 10 labels is kept: raise max_wer from 0\.0"):
        run(dataclasses.replace(config, max_wer=0.0))
    assert not config.output_dir.exists()


def test_bad_stores(config, tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(InputError, match=r"is not a label store: it has no labels\.json"):
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


GOOD = (10, 0, 6.0, 9, -0.1, 1.2)


def test_a_label_that_was_cut_is_dropped(tmp_path):
    labels = {"whole": GOOD, "cut": GOOD}
    source = store(tmp_path / "labels", labels, {"cut": {"ended": False}})
    config = FilterConfig(source, tmp_path / "filtered")
    assert run(config).dropped["not ended"] == 1
    assert kept(config) == ["whole"]
    run(dataclasses.replace(config, overwrite=True, keep_unended=True))
    assert kept(config) == ["whole", "cut"]


def test_a_bad_part_cannot_hide_in_a_window(tmp_path):
    """Of 100 words five are wrong: 5 % of the window, 5 of 8 words of the second part."""
    window = (100, 5, 28.0, 120, -0.1, 1.4)
    parts = {"part_references": ("a", "b", "c"), "part_words": (50, 8, 42)}
    changes = {
        "spread": parts | {"part_errors": (2, 1, 2)},
        "hidden": parts | {"part_errors": (0, 5, 0)},
    }
    labels = {"spread": window, "hidden": window, "not packed": window}
    config = FilterConfig(store(tmp_path / "labels", labels, changes), tmp_path / "filtered")
    report = run(config)
    assert (report.dropped["WER of a part"], report.dropped["WER"]) == (1, 0)
    assert kept(config) == ["spread", "not packed"]
    run(dataclasses.replace(config, overwrite=True, max_part_wer=12.5))  # 1 of 8 is not below
    assert kept(config) == ["not packed"]
    run(dataclasses.replace(config, overwrite=True, max_part_wer=None))
    assert kept(config) == ["spread", "hidden", "not packed"]


def test_clips_without_speech_are_counted_and_kept_where_asked(tmp_path):
    """Whatever their label looks like; only too long ones go."""
    made_up = (None, None, 6.0, 600, -3.0, 9.0)
    labels = {"said": GOOD, "noise": made_up, "long noise": (None, None, 31.0, 9, -0.1, 1.0)}
    changes = {name: {"speech": False, "ended": False} for name in ("noise", "long noise")}
    config = FilterConfig(store(tmp_path / "labels", labels, changes), tmp_path / "filtered")
    report = run(config)
    assert (report.dropped["non-speech"], report.non_speech) == (2, 0)
    assert kept(config) == ["said"]
    report = run(dataclasses.replace(config, overwrite=True, keep_non_speech=True))
    assert (report.dropped["non-speech"], report.dropped["too long"]) == (0, 1)
    assert report.non_speech == 1
    assert report_table(report, config).columns[0]._cells[3] == "  of these non-speech"
    assert kept(config) == ["said", "noise"]
    assert [one.speech for one in read_dataset(config.output_dir)] == [True, False]
    assert report.kept_wer == 0.0


def test_labels_in_capitals_are_dropped_where_letters_can_be_small(tmp_path):
    said = {"small": " Yes.", "loud": " YES, INDEED.", "chinese": " 是的", "digits": " 1984"}
    changes = {name: {"whisper_transcript": text} for name, text in said.items()}
    labels = dict.fromkeys(said, GOOD)
    config = FilterConfig(store(tmp_path / "labels", labels, changes), tmp_path / "filtered")
    assert run(config).dropped["all capitals"] == 1
    assert kept(config) == ["small", "chinese", "digits"]
    run(dataclasses.replace(config, overwrite=True, keep_all_caps=True))
    assert kept(config) == list(said)
    assert not all_capitals("")


def test_no_speech_probability_and_another_teacher(tmp_path):
    """Of six words one, two or none is another; the third clip has no second label."""
    heard = {"sure": 0.1, "agreed": 0.1, "alone": 0.1, "differing": 0.1, "doubtful": 0.7}
    texts = {name: {"no_speech_probability": p} for name, p in heard.items()}
    for name in texts:
        texts[name]["whisper_transcript"] = " We went up the old road"
    labels = dict.fromkeys(heard, (None, None, 6.0, 9, -0.1, 1.2))
    same = {"data": {"source": "speech"}, "shard_size": 4}
    source = store(tmp_path / "labels", labels, texts, **same)
    others = dict(texts)
    others["agreed"] = {"whisper_transcript": " we went, up the old road now"}
    others["differing"] = {"whisper_transcript": " we want up the cold road"}
    folder = tmp_path / "others"
    store(folder, labels, others, **same)
    table = pq.read_table(folder / "data" / "00000.parquet")
    pq.write_table(table.filter([True, True, False, True]), folder / "data" / "00000.parquet")
    config = FilterConfig(source, tmp_path / "filtered", agree_with=folder, max_disagreement=20.0)
    report = run(config)
    assert report.dropped["disagreement"] == 2
    assert kept(config) == ["sure", "agreed", "doubtful"]
    assert read_settings(config.output_dir)["filter"]["agree_with"] == str(folder)
    config = dataclasses.replace(config, overwrite=True, max_no_speech_probability=0.6)
    assert run(config).dropped["no-speech probability"] == 1
    other = store(tmp_path / "of others", labels, data={"source": "elsewhere"}, shard_size=4)
    with pytest.raises(
        InputError, match=r"of others cannot be compared with .*labels: data is .*elsewhere"
    ):
        run(dataclasses.replace(config, agree_with=other))


def test_stores_of_both_units_are_judged_by_row(tmp_path):
    changes = {"characters": {"error_rate": "CER", "language": "zh"}}
    labels = {"words": (10, 0, 6.0, 9, -0.1, 1.2), "characters": (30, 2, 6.0, 9, -0.1, 1.2)}
    config = FilterConfig(store(tmp_path / "labels", labels, changes), tmp_path / "filtered")
    report = run(config)
    assert (report.rate, report.kept) == ("WER/CER", 2)
    shown = report_table(report, config)
    assert shown.columns[4].header == "WER/CER %"
    assert "WER/CER < 10 % ←" in shown.columns[0]._cells


def test_a_store_of_an_older_format_is_read(config):
    """Without the columns that came later: its labels are speech that ended, in words."""
    for path in (config.source / "data").iterdir():
        table = pq.read_table(path)
        later = ["error_rate", "ended", "speech", "part_references", "part_errors", "part_words"]
        pq.write_table(table.drop_columns(later), path)
    report = run(config)
    assert (report.kept, report.rate) == (3, "WER")
    assert kept(config) == ["perfect", "five", "thirty seconds"]


def test_several_stores_are_filtered_into_a_folder_each(tmp_path, caplog):
    """As labelling several datasets leaves them; the table is of all."""
    for name, label in (("clean", GOOD), ("other", GOOD), ("bad", (2, 2, 3.0, 5, -0.1, 1.0))):
        store(tmp_path / "labels" / name, {f"{name} {n}": label for n in range(3)})
    config = FilterConfig(tmp_path / "labels", tmp_path / "filtered")
    report = run(config)
    assert (report.labels, report.kept, report.dropped["WER"]) == (9, 6, 3)
    assert sorted(path.name for path in config.output_dir.iterdir()) == ["clean", "other"]
    assert "none of 3 labels of" in caplog.text
    clean = dataclasses.replace(config, output_dir=config.output_dir / "clean")
    assert kept(clean) == ["clean 0", "clean 1", "clean 2"]
    written = json.loads((config.output_dir / "clean" / "filter.json").read_text())
    assert (written["labels"], written["kept"]) == (3, 3)
    with pytest.raises(InputError, match="clean is in use"):
        run(config)
