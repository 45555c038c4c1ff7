"""Clips that get no label: counted, named, limited, and tried again."""

import dataclasses
import json
from collections.abc import Iterator

import pytest
from fake_teacher import clip, fake_labeller, fake_teacher, idle_teacher, label_with
from test_labeller import contents, json_lines, rows

from flax_distil.data.utterances import UtteranceStream, read_dataset
from flax_distil.errors import InputError
from flax_distil.pseudo_label.labeller import label
from flax_distil.text.languages import LANGUAGES, to_language_code


def lacks(language: str | None) -> str | None:
    """Of a teacher for English alone."""
    try:
        code = "en" if language is None else to_language_code(language)
    except InputError as error:
        return str(error)
    return None if code == "en" else f"{LANGUAGES[code]} is not among them"


def languages(speech, *names: str | None) -> None:
    whole = [n for n in range(len(names) + 2) if n not in (5, 13)][: len(names)]
    listed = [
        {"audio": f"{n}.flac", "language": name} for n, name in zip(whole, names, strict=True)
    ]
    (speech / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def test_a_language_that_the_teacher_lacks_ends_no_run(config, speech):
    languages(speech, "en", "yue", "tlh", None, "de")
    summary = label_with(config, lacks=lacks)
    assert [row["id"] for row in rows(config.output_dir)] == ["0.flac", "3.flac"]
    assert [one.id for one in summary.skipped] == ["1.flac", "2.flac", "4.flac"]
    assert summary.skipped[0].reason == "Cantonese is not among them"
    assert 'has no language "tlh"' in summary.skipped[1].reason


def test_no_label_at_all_is_an_error(config, speech):
    languages(speech, "de", "yue", "fr", "de")
    with pytest.raises(
        InputError, match=r"none of 4 clips could be labelled; the first: 0\.flac: Ge"
    ):
        label_with(dataclasses.replace(config, max_skipped_share=1.0), lacks=lacks)
    assert len(json_lines(config.output_dir / "skipped.jsonl")) == 4


def test_too_many_skips_end_a_run_with_the_first_reasons(config, speech):
    languages(speech, "de", "en", "en", "yue", "tlh", "en")
    asked = dataclasses.replace(config, max_skipped_share=0.3, shard_size=2)
    with pytest.raises(
        InputError, match=r"2 of 6 clips .* is 0\.3: .*0\.flac: German .*; 3\.flac: C"
    ):
        label_with(asked, lacks=lacks)
    # What was labelled until then stays, and the rest is done once more may be skipped.
    assert len(rows(config.output_dir)) == 2
    with pytest.raises(InputError, match=r"2 of 6 clips"):
        label_with(asked, idle_teacher, lacks=lacks)
    asked = dataclasses.replace(asked, max_skipped_share=0.5)
    assert label_with(asked, lacks=lacks).labels == 3


def test_where_nothing_was_asked_for_the_first_hundred_may_be_skipped(config, speech):
    languages(speech, *["en"] * 3, *["tlh"] * 100)
    assert label_with(config).labels == 3
    languages(speech, *["en"] * 3, *["tlh"] * 101)
    with pytest.raises(InputError, match=r"101 of 104 clips were skipped"):
        label_with(dataclasses.replace(config, output_dir=speech / "more"))


def test_a_stream_is_limited_by_what_was_read(config, speech):
    languages(speech, "en", "tlh", "tlh", "en", *["en"] * 8)
    listed = read_dataset(config.data)
    stream = UtteranceStream(list(listed.rows), listed.columns, config.data)
    asked = dataclasses.replace(config, max_skipped_share=0.3)
    labeller = fake_labeller(asked, utterances=stream)
    with pytest.raises(InputError, match="2 of 4 clips were skipped"):
        label(labeller.job, labeller.shards)


def test_a_run_that_was_stopped_for_its_skips_goes_on_once_they_are_repaired(config, speech):
    asked = dataclasses.replace(config, max_skipped_share=0.05)
    with pytest.raises(InputError, match=r"2 of 23 clips .*5\.flac: .*; 13\.flac"):
        label_with(asked)
    (speech / "5.flac").write_bytes(clip(5))
    summary = label_with(asked)
    assert (summary.labels, [one.id for one in summary.skipped]) == (22, ["13.flac"])


def test_what_can_be_read_now_is_labelled_by_the_next_run(config, speech, tmp_path):
    """Its shard alone is made again, and the store is that of a run that never skipped it."""
    first = label_with(config)
    assert [one.id for one in first.skipped] == ["5.flac", "13.flac"]
    (speech / "13.flac").write_bytes(clip(13))
    asked = []

    def teacher(waveforms, language):
        asked.append(len(waveforms))
        return fake_teacher(waveforms, language)

    second = label_with(config, teacher)
    assert [one.id for one in second.skipped] == ["5.flac"]
    assert second.labels == 22
    assert asked == [3, 3]  # shard 3: 12 to 15
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    assert contents(config.output_dir) == contents(tmp_path / "whole")
    assert label_with(config, idle_teacher).labelled_now == 0


def test_a_complete_streams_skipped_clips_are_tried_again(config, speech, tmp_path):
    """Read up to the last of them alone; a complete stream without any is not read."""
    listed = read_dataset(config.data)
    read: list[int] = []

    def rows_read(start: int = 0) -> Iterator[dict]:
        for number in range(start, len(listed.rows)):
            read.append(number)
            yield listed.rows[number]

    class Rows:
        skip = staticmethod(rows_read)

        def __iter__(self) -> Iterator[dict]:
            return rows_read()

    def label_stream(teacher=fake_teacher):
        stream = UtteranceStream(Rows(), listed.columns, config.data)
        labeller = fake_labeller(config, teacher, utterances=stream)
        return label(labeller.job, labeller.shards)

    assert [one.id for one in label_stream().skipped] == ["5.flac", "13.flac"]
    read.clear()
    assert label_stream(idle_teacher).labelled_now == 0
    assert read == [*range(5, 14)]
    (speech / "13.flac").write_bytes(clip(13))
    assert [one.id for one in label_stream().skipped] == ["5.flac"]
    (speech / "5.flac").write_bytes(clip(5))
    assert label_stream().labels == 24 - 1
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    assert rows(config.output_dir) == rows(tmp_path / "whole")
    read.clear()
    label_stream(idle_teacher)
    assert not read


def test_what_killed_processes_left_is_removed(config):
    label_with(config)
    whole = contents(config.output_dir)
    for name in ("data/.00001.parquet.abc.partial", ".shards.json.abc.partial"):
        (config.output_dir / name).write_bytes(b"half")
    label_with(config, idle_teacher)
    assert contents(config.output_dir) == whole
