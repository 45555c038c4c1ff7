"""Windows of several utterances: who shares one, what they say and how they sound."""

import json

import numpy as np
import pytest

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.data.packing import pack
from flax_distil.data.utterances import listen, read_dataset

CLIPS = [("a", 1.0), ("b", 2.0), ("a", 1.5), ("a", 0.5), ("b", 1.0), ("a", 4.0)]


@pytest.fixture
def manifest(tmp_path, flac):
    rows = []
    for number, (speaker, seconds) in enumerate(CLIPS):
        (tmp_path / f"{number}.flac").write_bytes(flac(seconds))
        row = {"audio_filepath": f"{number}.flac", "text": f"word{number}", "speaker": speaker}
        rows.append(row | ({"duration": seconds} if number % 2 else {}))
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_speaker_in_order_up_to_the_limit(manifest):
    windows = pack(read_dataset(manifest), seconds=3.25, pause=0.25)
    # a: 1.0 + 0.25 + 1.5 leaves 0.5: no room for 0.25 + 0.5. b: 2.0 + 0.25 + 1.0 fits exactly.
    # 4.0 s is longer than any window and stays alone.
    assert list(windows.groups) == [(0, 2), (1, 4), (3,), (5,)]
    assert [window.text for window in windows] == ["word0 word2", "word1 word4", "word3", "word5"]
    assert windows[1].speaker == "b"
    assert windows[0].duration == pytest.approx(2.75)
    assert [window.id for window in windows.since(2)] == [windows[2].id, windows[3].id]


def test_sounds_like_its_parts(manifest):
    utterances = read_dataset(manifest)
    whole = listen(pack(utterances, seconds=30, pause=0.25)[0])
    silence = np.zeros(SAMPLE_RATE // 4, np.float32)
    parts = [listen(utterances[row]) for row in (0, 2, 3, 5)]
    expected = np.concatenate([p for part in parts for p in (silence, part)][1:])
    np.testing.assert_array_equal(whole, expected)


def test_a_clip_that_cannot_be_read_stays_alone(manifest):
    (manifest.parent / "2.flac").write_bytes(b"no audio")
    windows = pack(read_dataset(manifest), seconds=30, pause=0.25)
    assert (2,) in windows.groups
