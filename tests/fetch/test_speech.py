import gzip
import json
import re
import subprocess

import foreign_speech
import numpy as np
import pytest

from flax_distil.audio.load import encode_flac, load_audio
from flax_distil.fetch import speech
from flax_distil.fetch.speech import (
    ManifestClip,
    demo_speech,
    human_prompts,
    read_manifest,
    rebase_paths,
    sentences,
    shuffled,
    split,
    synthesise,
    write_manifest,
)


def test_sentences_are_many_and_varied():
    texts = sentences()
    lengths = np.array([len(text.split()) for text in texts])
    assert len(set(texts)) == len(texts) >= 1500
    assert not any(re.search(r"[{}<>#\t]|  ", text) for text in texts)
    assert np.mean(lengths <= 6) > 0.1  # short commands
    assert np.mean(lengths > 12) > 0.3
    assert np.mean([text.endswith("?") for text in texts]) > 0.05


def test_manifest_there_and_back(tmp_path):
    clips = [
        ManifestClip("audio/a.flac", "naïve “x”", 1.25, "s"),
        ManifestClip("b.flac", "", 0.5, "t", "fr"),
    ]
    path = write_manifest(tmp_path / "manifest.jsonl", clips)
    assert read_manifest(path) == clips
    assert json.loads(path.read_text().splitlines()[0])["audio_filepath"] == "audio/a.flac"
    (tmp_path / "deep").mkdir()
    deep = write_manifest(tmp_path / "deep" / "manifest.jsonl", clips)
    assert rebase_paths(tmp_path, deep)[0].audio_filepath == "deep/audio/a.flac"


def test_synthesis_is_deterministic_and_resumes(tmp_path):
    texts = ["Good morning.", "Turn left at the next corner, please.", "It is half past nine."]
    first = synthesise(texts, tmp_path / "a")
    second = synthesise(texts[::-1], tmp_path / "b")
    sounds = {clip.text: clip.audio_filepath for clip in read_manifest(second)}
    for clip in read_manifest(first):
        assert sounds[clip.text] == clip.audio_filepath  # whatever the order
        waveform = load_audio(tmp_path / "a" / clip.audio_filepath)
        again = load_audio(tmp_path / "b" / clip.audio_filepath)
        np.testing.assert_array_equal(waveform, again)
        assert clip.duration == pytest.approx(len(waveform) / 16_000, abs=1e-3)
        assert 0.5 < clip.duration < 6
        assert np.abs(waveform).max() > 0.05

    kept = tmp_path / "a" / read_manifest(first)[0].audio_filepath
    kept.write_bytes(encode_flac(np.zeros(16_000, np.float32)))
    synthesise(texts, tmp_path / "a")
    assert not load_audio(kept).any()  # what is there is not made again


def test_recognised_as_what_was_said(tiny_en_folder, tmp_path):
    """tiny.en hears the lowest and the highest of the seven speakers."""
    import jiwer
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    plain = re.compile(r"[A-Z][a-z ,]+[.?]")  # neither names nor numbers
    texts = [text for text in sentences() if plain.fullmatch(text) and len(text) > 40][:20]
    clips = sorted(read_manifest(synthesise(texts, tmp_path)), key=lambda clip: clip.speaker)
    clips = [clips[0], clips[1], clips[-2], clips[-1]]
    waveforms = [load_audio(tmp_path / clip.audio_filepath) for clip in clips]
    processor = WhisperProcessor.from_pretrained(tiny_en_folder)
    model = WhisperForConditionalGeneration.from_pretrained(tiny_en_folder)
    mel = processor(waveforms, sampling_rate=16_000, return_tensors="pt").input_features
    heard = processor.batch_decode(model.generate(mel), skip_special_tokens=True)
    normalise = processor.tokenizer.normalize
    assert clips[0].speaker != clips[-1].speaker
    assert jiwer.wer([normalise(c.text) for c in clips], [normalise(h) for h in heard]) < 0.2


def test_no_heldout_words_are_trained_on():
    clips = [
        ManifestClip(f"{n}.flac", text, 1.0, "s")
        for n, text in enumerate(["A b.", "c", "a B", "d"])
    ]
    train, heldout = split(clips, 1)
    assert [clip.text for clip in heldout] == ["A b."]
    assert [clip.text for clip in train] == ["c", "d"]
    nine = list(range(9))
    assert shuffled(nine, 1) == shuffled(nine, 1) != shuffled(nine, 2)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Few sentences, synthesis replaced by silence, no apt."""

    def silent(texts, folder, seed):
        folder.mkdir(parents=True, exist_ok=True)
        clips = [ManifestClip(f"{n}.flac", text, 1.0, "s") for n, text in enumerate(texts)]
        return write_manifest(folder / "manifest.jsonl", clips)

    monkeypatch.setattr(speech, "synthesise", silent)
    monkeypatch.setattr(speech, "human_prompts", lambda folder: None)
    return tmp_path


def test_demo_without_apt(few):
    made = demo_speech(few, seed=3, spoken=30, heldout_spoken=10)
    train, heldout = read_manifest(made.train), read_manifest(made.heldout_synthetic)
    assert made.heldout_human is None
    assert "no human speech" in made.sources
    assert (len(train), len(heldout)) == (20, 10)
    assert not {clip.text for clip in train} & {clip.text for clip in heldout}
    assert (few / train[0].audio_filepath).parent == few / "synthetic"


def test_demo_with_too_few_sentences(few):
    with pytest.raises(ValueError, match="speak at least 61"):
        demo_speech(few, spoken=10)


def test_no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path))
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    assert human_prompts(tmp_path / "human") is None


def test_apt_that_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path))
    monkeypatch.setattr(speech.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 100, "", "E: no network")
    monkeypatch.setattr(speech, "_quiet", lambda command, folder: failed)
    assert human_prompts(tmp_path / "human") is None
    assert "E: no network" in caplog.text


def test_prompts_without_words_are_left_out(tmp_path, monkeypatch):
    """A package as Debian lays it out: beeps, letters, remarks and clicks are no speech."""
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "cache"))
    listing = (
        "; a heading\n\nhello: Hello  there.\nbeep: [a beep]\nbeeps: <two beeps>\n"
        "letters/a: a\nnote: Wait. (tone)\nclick: Click.\nmissing: Missing.\ndigits/1: one\n"
    )

    def unpack(package, root):
        if package == "asterisk-core-sounds-en":
            (root / "core-sounds-en.txt.gz").write_bytes(gzip.compress(listing.encode()))
        elif package == "asterisk-core-sounds-en-g722":
            voices = root / "en_US_f_Allison"
            for name in ("hello", "beep", "beeps", "letters/a", "note", "click", "digits/1"):
                path = voices / f"{name}.g722"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    b"\0" * (800 if name == "click" else 8_000)
                )  # 8,000 bytes a second
        return package != "pocketsphinx-testdata"

    monkeypatch.setattr(speech, "unpack_debian", unpack)
    manifest = human_prompts(tmp_path / "human")
    assert manifest is not None
    clips = read_manifest(manifest)
    assert [(clip.text, clip.duration) for clip in clips] == [("Hello there.", 1), ("one", 1)]
    assert [clip.audio_filepath for clip in clips] == ["audio/hello.flac", "audio/digits-1.flac"]
    assert "Attribution-ShareAlike 3.0" in (tmp_path / "human" / "LICENCE").read_text()
    monkeypatch.setattr(speech, "unpack_debian", lambda *_: pytest.fail("fetched again"))
    assert human_prompts(tmp_path / "human") == manifest


def test_foreign_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(foreign_speech, "unpack_debian", lambda *_: False)
    assert foreign_speech.foreign_prompts("fr", tmp_path) is None

    def unpack(package, root):
        assert package == "asterisk-core-sounds-fr-g722"
        for name in ("digits/1", "hello", "letters/a", "silence/2"):
            path = root / "usr" / "fr_CA_f_June" / f"{name}.g722"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return True

    monkeypatch.setattr(foreign_speech, "unpack_debian", unpack)
    found = foreign_speech.foreign_prompts("fr", tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "fr/digits/1.g722",
        "fr/hello.g722",
    ]
    monkeypatch.setattr(foreign_speech, "unpack_debian", lambda *_: pytest.fail("fetched again"))
    assert foreign_speech.foreign_prompts("fr", tmp_path) == found


def test_human_clips_are_what_they_say(human_clips):
    assert len(human_clips) >= 20
    for waveform, text in human_clips:
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert text.strip()
        assert not re.search(r"[\[\]<>]", text)
