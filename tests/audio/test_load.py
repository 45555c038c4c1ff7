"""Every format against the waveform it was made from; soundfile and soxr are the oracles."""

import io
import logging

import av
import numpy as np
import pytest
import soundfile
import soxr

from flax_distil.audio.load import (
    AudioError,
    audio_duration,
    encode_flac,
    load_audio,
    pad_or_trim,
    to_int16,
)
from flax_distil.errors import InputError

RATE = 16_000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def chirp(rate: int, seconds: float = 1.5, top: float = 800.0) -> np.ndarray:
    """A sweep from 100 Hz to `top`, faded at both ends so that edges do not ring."""
    time = np.arange(int(rate * seconds)) / rate
    sweep = np.sin(2 * np.pi * (100 * time + (top - 100) / (2 * seconds) * time**2))
    return (0.4 * sweep * np.hanning(len(time)) ** 0.25).astype(np.float32)


def encode(channels: np.ndarray, rate: int, container: str, codec: str, video=False) -> bytes:
    """`channels` (channels, n) as a file, made by FFmpeg's own encoders."""
    file = io.BytesIO()
    layout = LAYOUTS[len(channels)]
    with av.open(file, "w", format=container) as out:
        if video:
            picture = out.add_stream("mpeg4", rate=5)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if video:
            for _ in range(5):
                out.mux(picture.encode(av.VideoFrame(32, 32, "yuv420p")))
            out.mux(picture.encode(None))
        packed = np.ascontiguousarray(to_int16(channels).T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def best_match(heard: np.ndarray, truth: np.ndarray, slack: int = 1600) -> float:
    """Signal-to-error ratio in dB at the best shift: lossy codecs add a delay of their own."""
    size = 1 << (len(heard) + len(truth)).bit_length()
    spectrum = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(truth, size))
    shift = int(np.argmax(np.fft.irfft(spectrum, size)[:slack]))
    heard = pad_or_trim(heard[shift:], len(truth))
    return float(10 * np.log10((truth**2).sum() / ((heard - truth) ** 2).sum()))


@pytest.mark.parametrize(
    ("container", "codec", "rate", "channels", "floor_db"),
    [
        ("wav", "pcm_s16le", 16_000, 1, 80),
        ("wav", "pcm_s16le", 44_100, 2, 60),
        ("wav", "pcm_s24le", 48_000, 6, 60),
        ("wav", "pcm_f32le", 48_000, 2, 60),
        ("wav", "pcm_u8", 8_000, 1, 25),
        ("wav", "pcm_mulaw", 8_000, 1, 25),
        ("flac", "flac", 44_100, 2, 60),
        ("aiff", "pcm_s16be", 22_050, 1, 60),
        ("mp3", "libmp3lame", 44_100, 2, 25),
        ("ogg", "libopus", 48_000, 1, 15),
        ("ipod", "aac", 44_100, 2, 20),
        ("g722", "g722", 16_000, 1, 20),
    ],
)
def test_every_format_gives_back_the_sound(container, codec, rate, channels, floor_db):
    truth = chirp(RATE)
    data = encode(np.tile(chirp(rate), (channels, 1)), rate, container, codec)
    hint = "g722" if container == "g722" else None
    heard = load_audio(data, format=hint)
    assert heard.dtype == np.float32
    assert heard.ndim == 1
    assert abs(len(heard) - len(truth)) <= 0.08 * RATE  # codec padding
    assert best_match(heard, truth) > floor_db
    assert audio_duration(data, format=hint) == pytest.approx(1.5, abs=0.08)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "libopus")])
def test_the_sound_of_a_video(container, codec):
    data = encode(chirp(48_000)[None], 48_000, container, codec, video=True)
    assert best_match(load_audio(data), chirp(RATE)) > 15


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resampling_agrees_with_soxr(rate, tmp_path):
    path = tmp_path / "sweep.wav"
    soundfile.write(path, chirp(rate), rate, subtype="FLOAT")
    expected = soxr.resample(chirp(rate), rate, RATE)
    heard = pad_or_trim(load_audio(path), len(expected))
    # Two good resamplers differ in their filters; a wrong rate or delay would be 0.1 and more.
    np.testing.assert_allclose(heard, expected, atol=2e-3)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_samples_at_16_khz_equal_soundfile(subtype, channels, tmp_path):
    path = tmp_path / "x.wav"
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (4000, channels))
    soundfile.write(path, noise, RATE, subtype=subtype)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    np.testing.assert_allclose(load_audio(path), expected, atol=1e-6)


def test_path_bytes_and_file_agree_and_names_may_hold_colons(tmp_path):
    path = tmp_path / "10:30 day.wav"
    soundfile.write(path, chirp(RATE), RATE)
    expected = load_audio(path)
    np.testing.assert_array_equal(load_audio(str(path)), expected)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), expected)


def test_raw_g722_is_known_by_its_file_name(tmp_path):
    path = tmp_path / "prompt.g722"
    path.write_bytes(encode(chirp(RATE)[None], RATE, "g722", "g722"))
    assert len(load_audio(path)) == 24_000
    with path.open("rb") as file:
        assert len(load_audio(file)) == 24_000


@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("mp3", "libmp3lame")])
def test_a_cut_file_yields_what_is_left(container, codec):
    data = encode(chirp(RATE, 4.0)[None], RATE, container, codec)
    heard = load_audio(data[: len(data) // 2])
    assert 1.0 < len(heard) / RATE < 3.0
    assert np.abs(heard).max() < 0.5


def test_damage_in_the_middle_is_passed_over(caplog):
    data = bytearray(encode(chirp(RATE, 4.0)[None], RATE, "ipod", "aac"))
    middle = len(data) // 2
    data[middle : middle + 600] = b"\xff" * 600
    with caplog.at_level(logging.WARNING):
        heard = load_audio(bytes(data))
    assert len(heard) / RATE > 3.5
    assert "2 damaged packets" in caplog.text


def test_a_stream_may_change_its_rate_and_layout():
    quiet, loud = chirp(RATE)[None], np.tile(chirp(44_100), (2, 1))
    parts = [encode(quiet, RATE, "mp3", "libmp3lame"), encode(loud, 44_100, "mp3", "libmp3lame")]
    assert len(load_audio(b"".join(parts))) / RATE == pytest.approx(3.0, abs=0.3)


def wav_bytes(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b"",
            r"audio of 0 bytes: not an .* can read \(invalid data found when processing input\)$",
        ),
        (b"these are words, not sound " * 50, "audio of 1350 bytes"),
        (wav_bytes(np.zeros(0)), "no audio could be decoded"),
        (wav_bytes(np.zeros(100))[:40], "audio of 40 bytes"),
        (wav_bytes(np.array([0.0, np.nan, 0.1])), "NaN"),
        (wav_bytes(np.array([0.0, np.inf, 0.1])), "NaN or infinity"),
    ],
    ids=["empty", "text", "no samples", "cut header", "NaN", "infinity"],
)
def test_bad_audio_is_one_sentence(data, words):
    with pytest.raises(AudioError, match=words) as caught:
        load_audio(data)
    assert isinstance(caught.value, InputError)


def test_missing_file_and_silent_video_are_named(tmp_path):
    with pytest.raises(AudioError, match=r"nowhere\.wav: no such"):
        load_audio(tmp_path / "nowhere.wav")
    film = tmp_path / "film.mp4"
    with av.open(str(film), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        out.mux(stream.encode(None))
    with pytest.raises(AudioError, match=r"film\.mp4: the file has no audio stream"):
        load_audio(film)


def test_pad_or_trim():
    ramp = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.testing.assert_array_equal(pad_or_trim(ramp, 2), [[0, 1], [3, 4]])
    np.testing.assert_array_equal(pad_or_trim(ramp, 4), [[0, 1, 2, 0], [3, 4, 5, 0]])
    assert pad_or_trim(ramp).shape == (2, 480_000)
    assert pad_or_trim(ramp).dtype == np.int16


def test_flac_is_lossless_for_16_bit_audio():
    samples = np.random.default_rng(0).integers(-32768, 32768, 50_001).astype(np.int16)
    data = encode_flac(samples.astype(np.float32) / 32768)
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], samples)
    np.testing.assert_array_equal(to_int16(load_audio(data)), samples)
    assert audio_duration(data) == pytest.approx(50_001 / RATE)
    np.testing.assert_array_equal(to_int16(np.array([1.5, -1.5])), [32767, -32768])
