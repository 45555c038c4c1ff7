"""Where sound stands in its recording, which track is read, and how channels become one."""

import io
import logging

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition
from test_load import RATE, chirp, encode

from flax_distil.audio.load import AudioError, load_audio, to_int16

HZ = 48_000
FRAME = 15_360  # whole frames of Opus (960) and AAC (1024)


def tone(hertz: float, samples: int, rate: int = HZ) -> np.ndarray:
    return np.float32(0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate))


def encode_at(container: str, codec: str, places, video: bool = False) -> bytes:
    """A file whose time stamps say that each tone (start in samples, Hz, samples) begins there.

    video: a picture from 0 on, beside the sound.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=HZ, layout="mono")
        if video:
            picture = out.add_stream("mpeg4", rate=5)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
            for number in range(50):
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts = number
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        for start, hertz, samples in places:
            for begin in range(0, samples, 960 if codec == "libopus" else 1024):
                size = min(960 if codec == "libopus" else 1024, samples - begin)
                block = to_int16(tone(hertz, samples)[None, begin : begin + size])
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                frame.sample_rate, frame.pts = HZ, start + begin
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def sounding(waveform: np.ndarray) -> list[tuple[float, float, float]]:
    """Where there is sound: from and to in seconds, and its pitch."""
    loud = np.convolve(np.abs(waveform) > 0.02, np.ones(400), "same") > 20
    edges = np.flatnonzero(np.diff(np.r_[0, loud.astype(int), 0]))
    found = []
    for start, end in edges.reshape(-1, 2).tolist():
        spectrum = np.abs(np.fft.rfft(waveform[start:end]))
        found.append((start / RATE, end / RATE, spectrum.argmax() * RATE / (end - start)))
    return found


@pytest.mark.parametrize(
    ("container", "codec", "video"),
    [
        ("matroska", "libopus", False),
        ("webm", "libopus", False),
        ("matroska", "pcm_s16le", True),
        ("mp4", "aac", True),
        ("ipod", "aac", False),
        ("mpegts", "mp2", True),
        ("flv", "aac", False),
        ("nut", "aac", False),
    ],
)
def test_a_gap_in_the_time_stamps_is_silence(container, codec, video):
    """Two tones, the second at 6 s. A codec's delay and a container's clock are 0.05 s at most."""
    data = encode_at(container, codec, [(0, 500, FRAME * 6), (6 * HZ, 900, FRAME * 4)], video)
    waveform = load_audio(data)
    (start, end, low), (begin, stop, high) = sounding(waveform)
    assert (start, end, begin, stop) == pytest.approx((0, 1.92, 6.0, 7.28), abs=0.05)
    assert (low, high) == pytest.approx((500, 900), abs=2)
    part = load_audio(data, offset=6.2, duration=0.5)
    whole = waveform[round(6.2 * RATE) :][: RATE // 2]
    assert np.abs(np.fft.rfft(part)).argmax() == np.abs(np.fft.rfft(whole)).argmax()
    assert not load_audio(data, offset=3.0, duration=1.0).any()


@pytest.mark.parametrize(
    ("container", "codec", "video"),
    [
        ("matroska", "libopus", False),
        ("matroska", "libopus", True),
        ("mp4", "aac", True),
        ("mov", "pcm_s16le", False),
        ("mpegts", "mp2", True),
        ("mpeg", "mp2", True),
        ("flv", "aac", False),
    ],
)
def test_a_late_start_is_silence(container, codec, video):
    """Sound from 4 s on: of the file, or of its picture where a format's clock starts anywhere."""
    ((start, end, _),) = sounding(
        load_audio(encode_at(container, codec, [(4 * HZ, 500, FRAME * 6)], video))
    )
    assert (start, end) == pytest.approx((4.0, 5.92), abs=0.05)


def test_a_clock_that_starts_anywhere_is_no_silence():
    """The sound of a transport stream alone, cut out of a broadcast."""
    ((start, end, _),) = sounding(
        load_audio(encode_at("mpegts", "mp2", [(4 * HZ, 500, FRAME * 6)]))
    )
    assert (start, end) == pytest.approx((0.0, 1.92), abs=0.05)


def test_a_gap_of_months_is_not_filled():
    data = encode_at("matroska", "pcm_s16le", [(0, 500, FRAME), (HZ * 10**7, 900, FRAME)])
    with pytest.raises(AudioError, match="time stamps leave a gap of 10000000 s"):
        load_audio(data)


@pytest.fixture(scope="module")
def film() -> bytes:
    """Three tracks of 500, 900 and 1300 Hz, of which the second is marked as the default."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        streams = []
        for number, language in enumerate(("deu", "eng", "fra")):
            stream = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
            stream.metadata["language"] = language
            stream.disposition = Disposition.default if number == 1 else Disposition(0)
            streams.append(stream)
        for stream, hertz in zip(streams, (500, 900, 1300), strict=True):
            block = to_int16(tone(hertz, RATE, RATE)[None])
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = RATE
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return file.getvalue()


def test_the_default_track_is_read_and_any_other_by_number(film):
    pitch = lambda **track: sounding(load_audio(film, **track))[0][2]
    assert pitch() == pytest.approx(900, abs=2)
    assert [pitch(track=number) for number in (1, 2, 3)] == pytest.approx([500, 900, 1300], abs=2)
    for absent in (0, 4, -1):
        with pytest.raises(
            AudioError, match=rf"no audio track {absent}; the file has 1 \(deu"
        ) as error:
            load_audio(film, track=absent)
        assert "2 (eng, pcm_s16le, default), 3 (fra, pcm_s16le)" in str(error.value)


def flac_of(channels: np.ndarray, rate: int = RATE) -> bytes:
    return encode(channels, rate, "flac", "flac")


@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_opposite_phases_are_heard(share, rate, caplog):
    sound = chirp(rate, 2.5)
    data = flac_of(np.stack([sound, -share * sound]), rate)
    with caplog.at_level(logging.WARNING):
        found = load_audio(data)
    np.testing.assert_allclose(found, load_audio(flac_of(sound[None], rate)), atol=1e-4)
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "the channels cancel each other in 2 s: the louder one is used there"
    ]


def test_opposite_phases_of_a_part_alone():
    """A second from the middle, by seeking, is what the whole has there."""
    sound = chirp(RATE, 8.0)
    second = sound.copy()
    second[3 * RATE : 6 * RATE] *= -1
    data = flac_of(np.stack([sound, second]))
    whole = load_audio(data)
    np.testing.assert_allclose(whole, sound, atol=1e-4)
    np.testing.assert_array_equal(
        load_audio(data, offset=5.25, duration=1.5), whole[84_000:108_000]
    )


def test_other_channels_are_averaged(caplog):
    """One silent channel, unrelated ones, a centre among five silent ones, silence: the mean."""
    random = np.random.default_rng(0)
    sound, noise = chirp(RATE), random.normal(0, 0.1, 24_000).astype(np.float32)
    centre = np.zeros((6, 24_000), np.float32)
    centre[2] = sound
    with caplog.at_level(logging.WARNING):
        for channels in (np.stack([sound, 0 * sound]), np.stack([sound, noise]), centre):
            expected = to_int16(channels).mean(axis=0) / 32768
            np.testing.assert_allclose(load_audio(flac_of(channels)), expected, atol=1e-6)
        assert not load_audio(flac_of(np.zeros((2, 24_000), np.float32))).any()
    assert not caplog.records


@pytest.mark.parametrize("peak", [32_768.0, 2.5, 1.5, 1.0])
def test_samples_far_beyond_1_are_scaled_and_said(peak, caplog):
    """Float samples written as if full scale were 32768; a little beyond 1 is left alone."""
    file = io.BytesIO()
    sound = chirp(RATE)
    sound *= np.float32(peak / np.abs(sound).max())
    soundfile.write(file, sound, RATE, format="WAV", subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        found = load_audio(file.getvalue())
    if peak > 2:
        np.testing.assert_allclose(found, sound / peak, rtol=1e-6)
        assert f"samples reach {peak:g}, not 1" in caplog.text
    else:
        np.testing.assert_array_equal(found, sound)
        assert not caplog.records
