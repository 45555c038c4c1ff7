"""Parts of a recording are those of the whole, without decoding the rest."""

import io

import numpy as np
import pytest
import soundfile
from test_load import RATE, chirp, encode

from flax_distil.audio import load
from flax_distil.audio.load import AudioError, load_audio
from flax_distil.errors import InputError

SECONDS = 12.0


def sound(rate: int) -> np.ndarray:
    """A sweep that a shift by one sample at 16 kHz changes by up to 0.12 (800 Hz at 0.4)."""
    return chirp(rate, SECONDS)


# Tolerances: PCM is exact but for the order of float additions. A lossy decoder that starts in the
# middle has another state (AAC fills in noise), and G.722 adapts for ever.
@pytest.mark.parametrize(
    ("form", "codec", "rate", "channels", "tolerance"),
    [
        ("wav", "pcm_s16le", 16_000, 1, 0),
        ("wav", "pcm_s16le", 44_100, 2, 1e-6),
        ("wav", "pcm_s16le", 11_025, 1, 1e-6),
        ("flac", "flac", 44_100, 2, 1e-6),
        ("aiff", "pcm_s16be", 22_050, 1, 1e-6),
        ("mp3", "libmp3lame", 44_100, 2, 1e-6),
        ("mp3", "libmp3lame", 16_000, 1, 1e-6),
        ("ogg", "libopus", 48_000, 1, 1e-3),
        ("ipod", "aac", 44_100, 2, 1e-4),
        ("mpegts", "aac", 44_100, 1, 1e-4),
        ("adts", "aac", 44_100, 1, 1e-4),
        ("g722", "g722", 16_000, 1, 1e-3),
    ],
)
def test_a_part_is_a_slice_of_the_whole(form, codec, rate, channels, tolerance):
    data = encode(np.tile(sound(rate), (channels, 1)), rate, form, codec)
    hint = "g722" if form == "g722" else None
    whole = load_audio(data, format=hint)
    for offset, duration in [(0.0, 1.0), (0.7, 1.1), (3.123456, 2.5), (7.00001, 0.25), (9.9, None)]:
        part = load_audio(data, format=hint, offset=offset, duration=duration)
        start = round(offset * RATE)
        end = len(whole) if duration is None else start + round(duration * RATE)
        assert len(part) == end - start
        np.testing.assert_allclose(part, whole[start:end], atol=tolerance)


def test_the_rest_is_not_decoded(monkeypatch):
    """A part of 1 s costs the decoding of a few seconds, wherever it lies in a minute."""
    decoded = []

    def counted(*arguments):
        for frame in frames(*arguments):
            decoded.append(frame.samples / frame.rate)
            yield frame

    frames = load.decoded_frames
    monkeypatch.setattr(load, "decoded_frames", counted)
    for form, codec in [
        ("wav", "pcm_s16le"),
        ("flac", "flac"),
        ("mp3", "libmp3lame"),
        ("ipod", "aac"),
    ]:
        data = encode(chirp(RATE, 60.0)[None], RATE, form, codec)
        for offset in (5.0, 50.0):
            decoded.clear()
            assert len(load_audio(data, offset=offset, duration=1.0)) == RATE
            assert sum(decoded) < 5


@pytest.mark.parametrize("seekable", [True, False])
def test_parts_of_an_open_file(tmp_path, seekable):
    data = encode(sound(RATE)[None], RATE, "wav", "pcm_s16le")
    file = io.BytesIO(data)
    file.seekable = lambda: seekable
    part = load_audio(file, offset=8.0, duration=1.0)
    np.testing.assert_array_equal(part, load_audio(data)[8 * RATE : 9 * RATE])


def test_matroska_keeps_a_part_s_place_to_a_millisecond():
    """Its times are whole milliseconds: 0.5 ms at 100 to 800 Hz and 0.4."""
    data = encode(sound(48_000)[None], 48_000, "matroska", "libopus")
    whole = load_audio(data)
    part = load_audio(data, offset=4.0, duration=2.0)
    shifts = range(-16, 17)
    start = 4 * RATE
    errors = [np.abs(part - whole[start + k : start + k + len(part)]).max() for k in shifts]
    assert min(errors) < 2e-3


def test_a_part_that_is_not_there(tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, sound(RATE), RATE)
    with pytest.raises(AudioError, match=r"the part starts at 20 s, and the audio ends at 12 s"):
        load_audio(path, offset=20.0)
    assert len(load_audio(path, offset=11.5, duration=5.0)) == RATE // 2
    for wrong in ({"offset": -1.0}, {"offset": float("nan")}, {"duration": float("inf")}):
        with pytest.raises(InputError, match="must be finite and at least 0"):
            load_audio(path, **wrong)
