"""Mixtures: proportions, passes, and what is learnt from each source."""

import json
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_batches import BEGIN, MULTILINGUAL

from flax_distil.config import DistillConfig, TrainingDataConfig
from flax_distil.data.batches import TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import (
    DRAWS_PER_BLOCK,
    TrainingSource,
    draw_sources,
    example_keys,
    pass_order,
    rows_by_lane,
    training_sources,
)
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.text.tokens import load_tokens


def source(size: int, weight: float) -> TrainingSource:
    rows = [Utterance(str(n), b"", token_ids=(n,)) for n in range(size)]
    return TrainingSource(rows, TargetOptions(), np.ones(size, int), np.zeros(size, bool), weight)


def test_proportions_are_the_weights():
    weights, taken = [6.0, 3.0, 1.0], 100_000
    drawn = np.array([one for one, _ in islice(draw_sources(weights, 7, 0), taken)])
    shares = np.bincount(drawn) / taken
    sigma = np.sqrt(np.array([0.6, 0.3, 0.1]) * np.array([0.4, 0.7, 0.9]) / taken)
    assert np.all(np.abs(shares - [0.6, 0.3, 0.1]) < 4 * sigma)
    early = np.bincount(drawn[:1000]) / 1000  # from the beginning on, not one after the other
    assert np.all(np.abs(early - [0.6, 0.3, 0.1]) < 4 * sigma * 10)


@pytest.mark.parametrize("position", [1, 999, DRAWS_PER_BLOCK, DRAWS_PER_BLOCK + 5])
def test_draws_go_on_from_any_position(position):
    weights = [1.0, 2.5]
    whole = islice(draw_sources(weights, 3, 0), position, position + 50)
    assert list(islice(draw_sources(weights, 3, position), 50)) == list(whole)


def test_each_source_is_passed_over_at_its_own_pace():
    sources = [source(5, 4.0), source(50, 1.0)]
    seen: dict[tuple[int, int], list[int]] = {}
    for place in islice(example_keys(sources, 2, 0), 200):
        seen.setdefault((place.source, place.passes), []).append(place.number)
    small = [numbers for (of, _), numbers in seen.items() if of == 0]
    assert len(small) > 25
    assert all(sorted(numbers) == list(range(5)) for numbers in small[:-1])
    assert len({tuple(numbers) for numbers in small[:-1]}) > 15  # an order of each pass
    first = seen[1, 0]
    assert len(set(first)) == len(first)


def test_the_order_is_pinned():
    """A numpy whose Philox or permutation changed would change every run's data order."""
    assert pass_order(8, seed=0, source=0, passes=0).tolist() == [0, 5, 2, 3, 7, 6, 1, 4]
    assert [one for one, _ in islice(draw_sources([1, 1], 0, 0), 8)] == [1, 1, 1, 0, 1, 0, 0, 1]


def test_a_lane_s_rows_lie_together():
    assert rows_by_lane(6, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert rows_by_lane(6, 2).tolist() == [0, 2, 4, 1, 3, 5]


FIVE = {
    "en": " Good morning to you.",
    "de": " Grüße aus Köln.",
    "fr": " Où est-ce que tu vas ?",
    "ja": "お元気ですか。",
    "ru": " Как дела?",
}


def test_five_languages_in_one_batch(base_folder):
    """Each row names its own language and task, which are learnt with text and end."""
    tokens = load_tokens(base_folder)
    silence = np.zeros(160, np.float32)
    said = [Utterance(code, silence, text, language=code) for code, text in FIVE.items()]
    learnt = [tokens.encode(text) for text in FIVE.values()]
    labelled = [
        Utterance(f"{code}-label", silence, language=code, token_ids=tuple(ids))
        for code, ids in zip(FIVE, learnt, strict=True)
    ]
    nowhere = np.zeros(5, bool)
    lengths = np.array([len(ids) for ids in learnt])
    sources = (
        TrainingSource(said, TargetOptions(target="text"), lengths, nowhere),
        TrainingSource(labelled, TargetOptions(task="translate"), lengths, nowhere),
    )
    ((batch, _),) = islice(Loader(sources, tokens, 40).batches(LoaderState()), 1)
    assert set(batch.rows.tolist()) == set(range(10))
    for row, line, targets, weights in zip(
        batch.rows, batch.tokens, batch.targets, batch.weights, strict=True
    ):
        code, text = list(FIVE.items())[row % 5]
        task = tokens.transcribe if row < 5 else tokens.translate
        assert line[:4].tolist() == [tokens.sot, tokens.languages[code], task, tokens.no_timestamps]
        assert targets[weights > 0].tolist() == [*line[1:4], *learnt[row % 5], tokens.eot]
        assert tokens.decode(targets[weights > 0][3:-1]) == text


@pytest.fixture
def folder(tmp_path, flac):
    """A label store, a manifest in German with references, a folder of French audio."""
    audio = [{"bytes": flac(0.3), "path": f"{n}.flac"} for n in range(6)]
    ids = [[BEGIN, 7, BEGIN + 15]] * 6
    table = pa.table({"audio": audio, "token_ids": ids, "language": ["en"] * 6})
    pq.write_table(table.append_column("duration", [[0.3] * 6]), tmp_path / "labels.parquet")
    (tmp_path / "de").mkdir()
    (tmp_path / "fr").mkdir()
    lines = []
    for number in range(4):
        (tmp_path / "de" / f"{number}.flac").write_bytes(flac(0.2))
        (tmp_path / "fr" / f"{number}.flac").write_bytes(flac(0.9))
        lines.append({"audio": f"{number}.flac", "satz": " Guten Tag.", "speaker": number // 2})
    (tmp_path / "de" / "list.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    listed = "".join(f"{n}.flac,Bonjour.\n" for n in range(4))
    (tmp_path / "fr" / "metadata.csv").write_text("file_name,transcription\n" + listed)
    return tmp_path


def configured(folder, *tables, **fields) -> DistillConfig:
    data = tuple(TrainingDataConfig(**table) for table in tables)
    return DistillConfig("t", "s", folder / "run", data=data, **fields)


def test_labels_manifest_and_folder_in_one_batch(folder, base_folder):
    tokens = load_tokens(base_folder)
    config = configured(
        folder,
        {"source": f"{folder}/de/list.jsonl", "text_column": "satz", "language": "de"},
        {"source": f"{folder}/fr", "language": "fr", "task": "translate", "weight": 2e-3},
        labels=(folder / "labels.parquet",),
        timestamp_probability=0.0,
    )
    sources = training_sources(config, tokens)
    # Seconds of speech, as told and as the headers say; weights count as hours.
    expected = [6 * 0.3 / 3600, 4 * 0.2 / 3600, 2e-3]
    assert [one.weight for one in sources] == pytest.approx(expected)
    ((batch, _),) = islice(Loader(sources, tokens, 40).batches(LoaderState()), 1)
    wanted = {
        (tokens.languages["en"], tokens.transcribe): [7],
        (tokens.languages["de"], tokens.transcribe): tokens.encode(" Guten Tag."),
        (tokens.languages["fr"], tokens.translate): tokens.encode(" Bonjour."),
    }
    found = {}
    for line, weights in zip(batch.tokens.tolist(), batch.weights, strict=True):
        end = int(np.flatnonzero(weights)[-1])
        start = line.index(tokens.sot)
        found[tuple(line[start + 1 : start + 3])] = line[start + 4 : end + 1]
        assert line[start + 3] == tokens.no_timestamps
    assert found == wanted
    assert batch.weights.any(axis=1).all()
    kinds = {tuple(sorted({round(s, 1) for s in batch.seconds.tolist()}))}
    assert kinds == {(0.2, 0.3, 0.9)}


def test_one_source_has_no_need_of_hours(folder):
    config = configured(folder, {"source": f"{folder}/fr", "language": "fr"})
    (one,) = training_sources(config, MULTILINGUAL)
    assert one.weight == 1.0
    assert one.options.target == "text"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": "de/list.jsonl"}, "neither token_ids nor a column that looks like text"),
        ({"source": "fr", "target": "label"}, "has no token_ids: label it"),
        ({"source": "fr", "weight": 0.0}, "has weight 0: it must be positive"),
        ({"source": "fr"}, r"none of the 4 rows .* no language is named \(4, first 0.flac\)"),
    ],
)
def test_what_cannot_be_learnt(folder, table, message):
    config = configured(folder, table | {"source": f"{folder}/{table['source']}"})
    with pytest.raises(InputError, match=message):
        training_sources(config, MULTILINGUAL)
    with pytest.raises(InputError, match=r"--labels\) or a \[\[distill.data\]\] table"):
        training_sources(configured(folder), MULTILINGUAL)
