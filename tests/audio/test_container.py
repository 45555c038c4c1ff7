"""Files that want more than to be decoded: none opens another, and none is waited for for ever."""

import io
import os
import struct
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from test_load import RATE, chirp, encode

from flax_distil.audio.load import AudioError, Limits, audio_duration, load_audio

LISTS = {
    "absolute.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\n{folder}/secret.ts\n"
    "#EXT-X-ENDLIST\n",
    "above.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\n../secret.ts\n#EXT-X-ENDLIST\n",
    "live.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\n{folder}/secret.ts\n",
    "beside.ffconcat": "ffconcat version 1.0\nfile beside.wav\n",
    "itself.ffconcat": "ffconcat version 1.0\nfile itself.ffconcat\n",
    "long.ffconcat": "ffconcat version 1.0\n" + 100_000 * "file beside.wav\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=audio 5004 RTP/AVP 0\n",
    "list.m3u": "#EXTM3U\n{folder}/secret.wav\n",
    "list.pls": "[playlist]\nFile1={folder}/secret.wav\nNumberOfEntries=1\n",
    "list.asx": "<asx version='3.0'><entry><ref href='{folder}/secret.wav'/></entry></asx>",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with sound in it and above it, where a program may stand."""
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret.ts").write_bytes(encode(chirp(RATE)[None], RATE, "mpegts", "aac"))
    for path in (tmp_path / "secret.wav", inside / "beside.wav"):
        soundfile.write(path, chirp(RATE), RATE)
    monkeypatch.chdir(inside)
    return tmp_path


@pytest.mark.parametrize("name", LISTS)
def test_no_list_of_files_is_followed(folder, name):
    contents = LISTS[name].format(folder=folder).encode()
    (folder / "in" / name).write_bytes(contents)
    for renamed in (name, f"{name}.wav"):
        path = folder / "in" / renamed
        path.write_bytes(contents)
        for source in (path, contents, io.BytesIO(contents)):
            with pytest.raises(AudioError, match=r"not an audio file|not an audio file"):
                load_audio(source)


def test_a_quicktime_film_s_sound_elsewhere_is_not_fetched(folder):
    """FFmpeg can read the other file, and does where it is asked to."""
    film = encode(chirp(RATE)[None], RATE, "mov", "pcm_s16le")
    (folder / "secret.mov").write_bytes(film)
    path = folder / "film.mov"
    path.write_bytes(film_of("secret.mov", film))
    with av.open(str(path), options={"enable_drefs": "1"}) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    np.testing.assert_allclose(np.concatenate(frames, 1)[0] / 32768, chirp(RATE), atol=1e-4)
    for source in (path, path.read_bytes()):
        with pytest.raises(AudioError, match="no audio could be decoded"):
            load_audio(source)


def film_of(other: str, film: bytes) -> bytes:
    """The film with silence in itself and a header that says that its sound lies in another file.

    It is an alias record (type 2: the path) in the place of "the same file"; all boxes around it
    grow.
    """
    name = other.encode()
    path = (
        struct.pack(">hh", 2, len(name)) + name + bytes(len(name) % 2) + struct.pack(">hh", -1, 0)
    )
    volume, file = bytes(28), bytes([len(name)]) + name.ljust(63, b"\0")
    levels = struct.pack(">hh", 1, 1)
    record = bytes(10) + volume + bytes(12) + file + bytes(16) + levels + bytes(16) + path
    entry = struct.pack(">I4sI", len(record) + 12, b"alis", 0) + record
    changed = bytearray(film)
    changed[44 : film.index(b"moov") - 4] = bytes(film.index(b"moov") - 48)
    at = film.index(b"url ", film.index(b"dref")) - 4
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = film.index(box) - 4
        (size,) = struct.unpack_from(">I", film, place)
        struct.pack_into(">I", changed, place, size + len(entry) - 12)
    changed[at : at + 12] = entry
    return bytes(changed)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", Path("/dev/zero"), tmp_path):
        with pytest.raises(AudioError, match="not a regular file: copy its audio into one"):
            load_audio(path)
    for path in ("concat:a.wav|b.wav", "x" * 5000, "http://127.0.0.1:9/a.wav", "a\0b"):
        with pytest.raises(AudioError, match=r"no such audio file|name too long"):
            load_audio(path)


class Endless(io.RawIOBase):
    """A WAV of silence without an end."""

    name = "endless.wav"

    def __init__(self):
        file = io.BytesIO()
        soundfile.write(file, np.zeros(1), RATE, format="WAV")
        self.head = file.getvalue()[:40] + b"\xff\xff\xff\xff"

    def readable(self):
        return True

    def read(self, size=-1):
        head, self.head = self.head[:size], self.head[size:]
        return head or bytes(size)


def test_a_clip_has_a_deadline():
    with pytest.raises(AudioError, match=r"endless\.wav: not decoded after 0\.2 s"):
        load_audio(Endless(), offset=1e9, limits=Limits(deadline=0.2))
    with pytest.raises(AudioError, match=r"endless\.wav: longer than 20 s: split it"):
        load_audio(Endless(), limits=Limits(max_seconds=20))
    assert len(load_audio(Endless(), duration=3.0)) == 3 * RATE


def wav(rate=RATE, channels=1, bits=16, tag=1, data=bytes(3200)) -> bytes:
    """A WAV whose header says so."""
    size = channels * bits // 8
    shape = (tag, channels, rate & 0xFFFFFFFF, rate * size & 0xFFFFFFFF, size & 0xFFFF, bits)
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *shape) + b"data"
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + head + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"rate": 2**31 - 1}, "the header has 2147483647 Hz, and audio 1000 to 1000000"),
        ({"rate": 2**32 - 1}, "not an audio file"),
        ({"rate": 8}, "the header has 8 Hz"),
        ({"rate": 0}, "not an audio file"),
        ({"channels": 0}, "no audio could be decoded"),
        ({"channels": 65_535}, "no audio could be decoded"),
        ({"bits": 0}, "no audio could be decoded"),
        ({"tag": 0x1234}, "no audio could be decoded"),
        ({"data": b""}, "no audio could be decoded"),
        ({"bits": 64, "tag": 3, "data": np.full(100, 1e300).tobytes()}, "NaN or infinity"),
    ],
)
def test_headers_that_lie_are_one_sentence(header, words):
    with pytest.raises(AudioError, match=words) as error:
        load_audio(wav(**header))
    assert "\n" not in str(error.value)


def test_odd_sample_formats_are_read():
    for header in ({"bits": 64, "tag": 3}, {"bits": 24}, {"bits": 12}, {"channels": 64}):
        assert not load_audio(wav(**header)).any()


KINDS = [
    ("wav", "pcm_s16le"),
    ("wav", "pcm_f32le"),
    ("flac", "flac"),
    ("aiff", "pcm_s16be"),
    ("mp3", "libmp3lame"),
    ("ogg", "libopus"),
    ("ipod", "aac"),
    ("matroska", "libopus"),
    ("mpegts", "aac"),
    ("adts", "aac"),
    ("avi", "pcm_s16le"),
    ("flv", "aac"),
    ("caf", "pcm_s16be"),
]


@pytest.mark.parametrize(("form", "codec"), KINDS)
def test_damaged_bytes_are_an_audio_error_or_sound(form, codec):
    """Flipped, cut and inserted bytes, most of them in the header."""
    random = np.random.default_rng(0)
    rate = 48_000 if codec == "libopus" else RATE
    data = encode(chirp(rate, 0.5)[None], rate, form, codec)
    limits = Limits(max_seconds=60)
    assert load_audio(data).size
    for _ in range(25):
        damaged = damage(data, random)
        for part in ({}, {"offset": 2.2, "duration": 0.3}):
            with suppress(AudioError):
                waveform = load_audio(damaged, limits=limits, **part)
                assert np.isfinite(waveform).all()
        with suppress(AudioError):
            assert audio_duration(damaged) >= 0


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """The file with some bytes changed, half of the time in its first 600; cut; or grown."""
    changed = bytearray(data)
    reach = len(changed) if random.integers(2) else min(600, len(changed))
    for _ in range(random.choice([1, 2, 8, 40])):
        changed[random.integers(reach)] = random.integers(256)
    if random.integers(4) == 0:
        del changed[random.integers(len(changed)) :]
    if changed and random.integers(4) == 0:
        at = random.integers(len(changed))
        changed[at:at] = random.integers(0, 256, 30, dtype=np.uint8).tobytes()
    return bytes(changed)


def test_a_format_that_is_named_holds_sound():
    with pytest.raises(AudioError, match="concat is not an audio format"):
        load_audio(b"ffconcat version 1.0\nfile a.wav\n", format="concat")
    assert len(load_audio(bytes(3200), format="s16le", rate=44_100)) == 1600
