import json

import numpy as np
import pytest
import whisper.utils

from flax_distil.audio.load import SAMPLE_RATE, encode_flac
from flax_distil.config import TranscribeConfig
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.errors import InputError, SomeFailed
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe import Segment, Transcript, run, transcribe
from flax_distil.transcribe.files import target_paths
from flax_distil.transcribe.windows import cut
from flax_distil.transcribe.writers import WRITERS

TRANSCRIPT = Transcript(
    " Hallo, wie geht's? Grüß «dich».",
    (
        Segment(0, 0, 0.0, 30.0, " Hallo, wie geht's?", (1, 2), 0.0, -0.3, 1.1, 0.01),
        Segment(1, 3000, 30.0, 31.5, " Grüß «dich».", (3,), 0.0, -0.4, 1.2, 0.02),
    ),
    "de",
)


@pytest.fixture(scope="module")
def recognizer(random_folders):
    return make_recognizer(load_checkpoint(random_folders[0]))


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.float32(0.3 * np.sin(2 * np.pi * 220 * time * (1 + time / 10)))


def test_windows_are_decoded_each_as_recognize_does(recognizer):
    audio = tone(31)
    windows = np.stack(cut(audio))
    heard = recognize(recognizer, windows, DecodeOptions())
    result = transcribe(audio, recognizer, batch_size=2)
    assert [segment.tokens for segment in result.segments] == [one.tokens for one in heard]
    assert [(one.seek, one.start, one.end) for one in result.segments] == [
        (0, 0.0, 30.0),
        (3000, 30.0, 31.0),
    ]
    assert result.text == "".join(segment.text for segment in result.segments)
    assert result.language == "en"


def test_the_windows_hold_every_sample_once():
    audio = tone(61)
    assert np.array_equal(np.concatenate(cut(audio))[: audio.size], audio)
    assert len(cut(audio[: 60 * SAMPLE_RATE])) == 2


def test_files_bytes_and_arrays_are_alike(recognizer, tmp_path):
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(1)))
    from_file = transcribe(tmp_path / "a.flac", recognizer)
    assert transcribe(encode_flac(tone(1)), recognizer) == from_file
    assert from_file.segments[0].end == 1.0


def test_no_audio_has_no_text(recognizer):
    assert transcribe(np.zeros(0, np.float32), recognizer) == Transcript("", (), "en")


@pytest.mark.parametrize(
    ("audio", "complaint"),
    [
        (np.full(100, np.nan, np.float32), "100 samples are NaN"),
        (np.zeros((2, 100), np.float32), "one channel"),
        (np.zeros(100, np.int16), "int16"),
    ],
)
def test_a_wrong_waveform_is_refused(recognizer, audio, complaint):
    with pytest.raises(InputError, match=complaint):
        transcribe(audio, recognizer)


@pytest.mark.parametrize("extension", WRITERS)
def test_files_equal_those_of_openai(extension, tmp_path):
    result = json.loads(WRITERS["json"](TRANSCRIPT))
    whisper.utils.get_writer(extension, str(tmp_path))(result, "talk.wav")
    written = (tmp_path / f"talk.{extension}").read_text(encoding="utf-8")
    assert WRITERS[extension](TRANSCRIPT) == written


def test_a_bad_file_does_not_stop_the_good_ones(random_folders, tmp_path, capsys):
    for name in ("a.flac", "c.flac"):
        (tmp_path / name).write_bytes(encode_flac(tone(0.5)))
    (tmp_path / "b.flac").write_bytes(b"no audio")
    files = tuple(tmp_path / f"{name}.flac" for name in ("a", "b", "c", "none"))
    config = TranscribeConfig(files, str(random_folders[1]), "json", tmp_path / "texts")
    with pytest.raises(SomeFailed, match=r"2 of 4 files(.|\n)*b\.flac(.|\n)*none\.flac"):
        run(config)
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["a.json", "c.json"]
    written = json.loads((tmp_path / "texts" / "a.json").read_text())
    assert written["text"].strip() in capsys.readouterr().out
    assert set(written) == {"text", "segments", "language"}
    assert set(written["segments"][0]) == set(Segment.__dataclass_fields__)


def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.wav and .*x\.mp3 would both be written"):
        target_paths([tmp_path / "a/x.wav", tmp_path / "b/x.mp3"], tmp_path, "txt")
    with pytest.raises(InputError, match="no audio"):
        target_paths([], tmp_path, "txt")
