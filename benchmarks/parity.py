"""Do we write what the reference engines write, on real weights and real speech?

    python benchmarks/parity.py [language] [search] [chunked] [sequential] [words]
        [--models whisper-tiny.en whisper-base] [--clips 8] [--manifests FILE…] [--batch 1 8]
        [--minutes 1] [--languages en es fr it ru] [--students FOLDER…] [--json FILE]

language: whisper-base names the language of telephone prompts in five languages as openai-whisper
does. search: the tokens of greedy search are Transformers'; a model may be a folder, and
--manifests takes other clips than the prompts: those that the demo judges, say.
chunked: a recording read in chunks has the words that Transformers' pipeline finds in it. With
timestamps the pipeline repeats parts: there our chunks are also put together by its own code.
sequential: one read with Whisper's algorithm has openai-whisper's words and segments. words: the
times of its words, and those that students give to their teacher's words. Each difference of the
first two is listed with the log-probabilities that the reference gives to both answers: what is
equal to within float32's rounding is a tie. --clips 0 takes all there are, some 400 a language.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from foreign_speech import FOREIGN, foreign_prompts
from tqdm import tqdm

from flax_distil import ChunkedOptions, SequentialOptions, transcribe
from flax_distil.audio.load import AudioError, load_audio, pad_or_trim
from flax_distil.audio.log_mel import HOP
from flax_distil.cache import cache_folder
from flax_distil.decode.recognizer import (
    Recognizer,
    detect_language,
    encode,
    make_recognizer,
    recognize,
)
from flax_distil.decode.search import Window
from flax_distil.fetch.speech import human_prompts, read_manifest
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES
from flax_distil.model.student import init_student
from flax_distil.model.tensors import to_openai
from flax_distil.model.weights import to_hf
from flax_distil.options import DecodeOptions
from flax_distil.parallel.platform import name_platform
from flax_distil.text.normalize import normalizer
from flax_distil.text.tokens import WhisperTokens
from flax_distil.text.wer import word_errors
from flax_distil.transcription.chunked import Chunk, cut_all, decode_chunks
from flax_distil.transcription.long_form import LongFormJob, split_segments
from flax_distil.transcription.words import align_words

TOKENS = 128  # written at most for a clip
EVERYTHING = ["language", "search", "chunked", "sequential", "words"]


def human_manifest() -> Path:
    manifest = human_prompts(cache_folder() / "demo-speech" / "human")
    if manifest is None:
        raise SystemExit("this comparison needs apt-get: it reads Debian's telephone prompts")
    return manifest


def english(count: int, manifests: Sequence[Path] = ()) -> list[Path]:
    """Files of speech with known words: `count` of them, evenly chosen; 0 for all."""
    files = [
        manifest.parent / clip.audio_filepath
        for manifest in manifests or [human_manifest()]
        for clip in read_manifest(manifest)
    ]
    return chosen(files, count)


def chosen(files: list[Path], count: int) -> list[Path]:
    return files[:: max(len(files) // count, 1)][:count] if count else files


def batches(files: list[Path], size: int, title: str) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Files with their sound in windows of 30 s; those without any are named and left out."""
    for start in tqdm(range(0, len(files), size), desc=title, leave=False):
        sounds = {}
        for path in files[start : start + size]:
            try:
                sound = load_audio(path, format="g722" if path.suffix == ".g722" else None)
            except AudioError as error:
                print(error)
                continue
            sounds[path] = pad_or_trim(sound)
        if sounds:
            yield list(sounds), np.stack(list(sounds.values()))


def openai_model(checkpoint: Checkpoint) -> whisper.Whisper:
    sizes, state = to_openai(checkpoint.dims, to_hf(checkpoint.dims, checkpoint.params))
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes)).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model


def languages(spoken_in: list[str], count: int, size: int) -> list[dict]:
    """How often whisper-base names the same language as openai-whisper does, by language."""
    checkpoint = load_checkpoint(fetch_weights("whisper-base"))
    ours, theirs = make_recognizer(checkpoint), openai_model(checkpoint)
    rows = []
    for spoken in spoken_in:
        files = (
            english(0) if spoken == "en" else foreign_prompts(spoken, cache_folder() / "prompts")
        )
        row = {"language": spoken, "clips": 0, "as_openai": 0, "right": 0, "differences": []}
        for batch, windows in batches(chosen(files or [], count), size, spoken):
            audio = encode(ours.spec, ours.params["encoder"], windows)
            found = detect_language(ours, audio)
            # One at a time: the loudest frame of a batch would set the floor for all.
            mel = torch.stack([whisper.log_mel_spectrogram(window) for window in windows])
            _, expected = theirs.detect_language(mel)
            for path, mine, other in zip(batch, found, expected, strict=True):
                answer, reference = (max(one, key=one.__getitem__) for one in (mine, other))
                row["clips"] += 1
                row["right"] += answer == spoken
                row["as_openai"] += answer == reference
                if answer != reference:
                    logs = {code: float(np.log(other[code])) for code in (answer, reference)}
                    row["differences"].append({"file": path.name, "ours_theirs": logs})
        print(row, flush=True)
        rows.append(row)
    return rows


def searches(name: str, files: list[Path], sizes: Sequence[int]) -> list[dict]:
    """How often greedy search, over so many clips at a time, finds Transformers' tokens, with all
    differences. Transformers has the largest batch."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns at every call that both kinds of options are given
    checkpoint = load_checkpoint(name if Path(name).is_dir() else fetch_weights(name))
    ours = make_recognizer(checkpoint)
    theirs = WhisperForConditionalGeneration.from_pretrained(checkpoint.source).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(checkpoint.source)
    language = {"language": "en", "task": "transcribe"} if checkpoint.dims.multilingual else {}
    prompt = ours.tokens.prompt("en" if language else None)
    options = DecodeOptions(max_tokens=TOKENS)
    found: dict[int, list] = {
        size: [{"model": name, "batch": size, "clips": 0, "equal": 0}, []] for size in sizes
    }
    for batch, windows in batches(files, max(sizes), name):
        mel = extractor(list(windows), sampling_rate=16_000, return_tensors="pt").input_features
        written = theirs.generate(
            mel, num_beams=1, do_sample=False, max_new_tokens=TOKENS, **language
        )
        for size, (row, differences) in found.items():
            parts = (windows[at : at + size] for at in range(0, len(windows), size))
            hypotheses = [
                one for part in parts for one in recognize(ours, part, options, language="en")
            ]
            for index, (path, one, ids) in enumerate(zip(batch, hypotheses, written, strict=True)):
                texts = list(one.tokens), text_of(ids.tolist(), ours.tokens)
                row["clips"] += 1
                row["equal"] += texts[0] == texts[1]
                if texts[0] != texts[1]:
                    judge = partial(log_probability, theirs, mel[index : index + 1], prompt)
                    sides = {"ours": texts[0], "theirs": texts[1]}
                    differences.append(
                        {
                            "file": path.name,
                            **{who: ours.tokens.decode(text) for who, text in sides.items()},
                            "log_probabilities": {w: judge(text) for w, text in sides.items()},
                        }
                    )
    rows = [row | {"differences": differences} for row, differences in found.values()]
    print(*rows, sep="\n", flush=True)
    return rows


def long_recording(minutes: float, seed: int = 0) -> tuple[np.ndarray, str]:
    """Telephone prompts and audiobook clips in random order, with pauses of 0.2 to 1.5 s."""
    rng = np.random.default_rng(seed)
    manifest = human_manifest()
    clips = read_manifest(manifest)
    parts, texts, samples = [], [], 0
    for index in rng.permutation(len(clips)):
        sound = load_audio(manifest.parent / clips[index].audio_filepath)
        pause = np.zeros(round(rng.uniform(0.2, 1.5) * 16_000), np.float32)
        parts += [sound, pause]
        texts.append(clips[index].text)
        samples += sound.size + pause.size
        if samples >= minutes * 60 * 16_000:
            break
    return np.concatenate(parts), " ".join(texts)


def chunks(name: str, minutes: float, size: int) -> list[dict]:
    """WER between our chunked transcript and that of Transformers' pipeline, with and without
    timestamps, and of both against the reference."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    sound, reference = long_recording(minutes)
    checkpoint = load_checkpoint(fetch_weights(name))
    ours = make_recognizer(checkpoint)
    folder = str(checkpoint.source)
    theirs = pipeline("automatic-speech-recognition", model=folder, device="cpu")
    greedy = {"max_new_tokens": 224, "num_beams": 1}  # its default is five beams
    if checkpoint.dims.multilingual:
        greedy |= {"language": "en", "task": "transcribe"}
    rows = []
    for length in (30.0, 15.0):
        for timestamps in (False, True):
            found = transcribe(
                sound,
                ours,
                language="en",
                options=DecodeOptions(timestamps=timestamps),
                long_form=ChunkedOptions(length),
                batch_size=size,
            )
            # With timestamps it decodes the rest of a chunk after its last one, unless this is off.
            for once in (False, True) if timestamps else (False,):
                other = theirs(
                    sound.copy(),
                    chunk_length_s=length,
                    batch_size=size,
                    return_timestamps=timestamps,
                    generate_kwargs=greedy | {"force_unique_generate_call": once},
                )
                row = {
                    "model": name,
                    "minutes": round(sound.size / 960_000, 1),
                    "chunk_length": length,
                    "timestamps": timestamps,
                    "pipeline_reads_once": once,
                    "wer_between": wer(other["text"], found.text),
                    "wer_ours": wer(reference, found.text),
                    "wer_theirs": wer(reference, other["text"]),
                    "segments": [len(found.segments), len(other.get("chunks", ()))],
                }
                if timestamps:
                    merged = merged_as_theirs(ours, theirs.tokenizer, sound, length, size, once)
                    row["wer_between_merged_as_theirs"] = wer(other["text"], merged)
                print(row, flush=True)
                rows.append(row)
    return rows


class WholeChunk(Chunk):
    """Decoded to its end, as in Transformers; ours leaves the end to the next chunk."""

    def unfinished(self) -> bool:
        return bool(self.samples[self.seek * HOP :].any())


def merged_as_theirs(
    recognizer: Recognizer, tokenizer: Any, sound: np.ndarray, length: float, size: int, once: bool
) -> str:
    """Our chunks, each read once or to its end, put together by Transformers' tokenizer."""
    options = DecodeOptions(timestamps=True)
    job = LongFormJob(recognizer, options, Window("en"), chunked=ChunkedOptions(length))
    states = [WholeChunk(**vars(one)) for one in cut_all(job, [sound])]
    outputs = []
    for batch in (states[at : at + size] for at in range(0, len(states), size)):
        while left := [one for one in batch if one.unfinished() and not (once and one.hypotheses)]:
            decode_chunks(job, left)
        for one in batch:
            ids, seek, piece = [], 0, one.piece
            for found in one.hypotheses[:-1]:
                spans, moved = split_segments(
                    found.tokens, recognizer.tokens.times, one.frames - seek
                )
                ids += [token for *_, span in spans for token in span]
                seek += moved
            ids += [token for found in one.hypotheses[-1:] for token in found.tokens]
            edges = (piece.stop - piece.start, piece.first - piece.start, piece.stop - piece.last)
            outputs.append(
                {
                    "tokens": np.array([[*ids, recognizer.tokens.eot]]),
                    "stride": tuple(samples / 16_000 for samples in edges),
                }
            )
    return tokenizer._decode_asr(
        outputs, return_timestamps=True, return_language=None, time_precision=0.02
    )[0]


def wer(reference: str, text: str) -> float:
    """Word errors in percent, both texts normalised."""
    normalize = normalizer("en")
    return round(100 * word_errors([normalize(reference)], [normalize(text)]).rate, 2)


def long_form(name: str, minutes: float, words: bool) -> dict:
    """Our sequential transcript beside openai-whisper's at temperature 0, with words or without."""
    sound, reference = long_recording(minutes)
    checkpoint = load_checkpoint(fetch_weights(name))
    reference = openai_model(checkpoint)
    reference.set_alignment_heads(whisper._ALIGNMENT_HEADS[name.removeprefix("whisper-")])
    theirs = whisper.transcribe(
        reference, sound, language="en", temperature=0.0, word_timestamps=words, fp16=False
    )
    ours = transcribe(
        sound,
        make_recognizer(checkpoint),
        language="en",
        long_form=SequentialOptions((0.0,), word_timestamps=words),
    )
    times = lambda one: (one["start"], one["end"])
    segments = (ours.as_dict()["segments"], theirs["segments"])
    row = {
        "model": name,
        "minutes": round(sound.size / 960_000, 1),
        "wer_between": wer(theirs["text"], ours.text),
        "wer_ours": wer(reference, ours.text),
        "segments": [*map(len, segments)],
        "boundaries": apart(*([(one["text"], times(one)) for one in side] for side in segments)),
    }
    if words:
        sides = ([word for one in side for word in one["words"]] for side in segments)
        row["words"] = apart(*([(word["word"], times(word)) for word in side] for side in sides))
    print(row, flush=True)
    return row


def students_words(name: str, folders: list[str], minutes: float) -> list[dict]:
    """How far the times that students give to their teacher's words are from the teacher's."""
    sound, _ = long_recording(minutes)
    checkpoint = load_checkpoint(fetch_weights(name))
    teacher = make_recognizer(checkpoint)
    windows = np.stack([pad_or_trim(sound[at:]) for at in range(0, sound.size, CHUNK_SAMPLES)])
    texts = [one.tokens for one in recognize(teacher, windows, language="en")]

    def aligned(recognizer: Recognizer) -> list[tuple[str, tuple[float, float]]]:
        audio = encode(recognizer.spec, recognizer.params["encoder"], windows)
        rows = align_words(recognizer, audio, texts, ["en"] * len(texts))
        return [(word.word, (word.start, word.end)) for row in rows for word in row]

    students = {f"untrained, {n} layers": init_student(checkpoint, n) for n in (2, 3)}
    students |= {folder: load_checkpoint(folder) for folder in folders}
    rows = []
    for title, student in students.items():
        words = apart(aligned(make_recognizer(student)), aligned(teacher))
        rows.append({"teacher": name, "student": title, "words": words})
        print(rows[-1], flush=True)
    return rows


Timed = tuple[str, tuple[float, float]]


def apart(ours: list[Timed], theirs: list[Timed]) -> dict:
    """Differences of starts and ends in seconds, where both have the same texts in turn."""
    blocks = SequenceMatcher(
        None, [text for text, _ in ours], [text for text, _ in theirs], autojunk=False
    ).get_matching_blocks()
    pairs = [(ours[a + i][1], theirs[b + i][1]) for a, b, size in blocks for i in range(size)]
    differences = np.abs([np.subtract(mine, other) for mine, other in pairs])
    return {
        "theirs": len(theirs),
        "in_both": len(pairs),
        "median": round(float(np.median(differences)), 3),
        "p95": round(float(np.percentile(differences, 95)), 3),
        "within_0.2": round(float((differences <= 0.2).sum() / (2 * len(theirs))), 4),
    }


def text_of(ids: list[int], tokens: WhisperTokens) -> list[int]:
    """What was written, without prompt and end."""
    if tokens.no_timestamps in ids:
        ids = ids[ids.index(tokens.no_timestamps) + 1 :]
    return ids[: ids.index(tokens.eot)] if tokens.eot in ids else ids


@torch.no_grad()
def log_probability(model, mel: torch.Tensor, prompt: list[int], text: list[int]) -> float:
    """Transformers' log-probability of a text and its end, before any suppression."""
    ids = [*prompt, *text, model.config.eos_token_id]
    logits = model(mel, decoder_input_ids=torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :]
    return float(logits.double().log_softmax(-1)[range(len(text) + 1), ids[len(prompt) :]].sum())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=EVERYTHING)
    parser.add_argument("--models", nargs="+", default=["whisper-tiny.en", "whisper-base"])
    parser.add_argument("--languages", nargs="+", default=["en", *FOREIGN])
    parser.add_argument("--clips", type=int, default=8, help="of each kind; 0 for all")
    parser.add_argument("--manifests", nargs="+", type=Path, default=[], help="of clips to search")
    parser.add_argument("--students", nargs="+", default=[], help="of the first model, trained")
    parser.add_argument("--minutes", type=float, default=1, help="of the long recording")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name_platform()
    batch = max(options.batch)
    packages = ("jax", "torch", "transformers", "openai-whisper")
    report: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    print(report["versions"])
    if "language" in options.what:
        report["language"] = languages(options.languages, options.clips, batch)
    if "search" in options.what:
        files = english(options.clips, options.manifests)
        report["search"] = [
            row for name in options.models for row in searches(name, files, options.batch)
        ]
    if "chunked" in options.what:
        report["chunked"] = [
            row for name in options.models for row in chunks(name, options.minutes, batch)
        ]
    for what in {"sequential", "words"}.intersection(options.what):
        report[what] = [
            long_form(name, options.minutes, what == "words") for name in options.models
        ]
    if "words" in options.what:
        students = (options.models[0], options.students, options.minutes)
        report["students_words"] = students_words(*students)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
