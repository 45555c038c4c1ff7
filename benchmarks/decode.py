"""Short clips to text against other engines, and speculative decoding against greedy search.

    python benchmarks/decode.py [--models whisper-tiny.en whisper-base] [--batches 1 8]
        [--rounds 5] [--student FOLDER] [--smaller NAME] [--guesses 4] [--vocabulary 8000]
        [--speculative-batches 1 4 16] [--json FILE] [AUDIO ...]

Every engine gets 16 kHz waveforms and returns English text by greedy search, without timestamps,
log-mel included. Each round runs all engines on the same batch in turn, so that a busy machine is
unfair to none; figures are medians over the rounds, and the ratios medians of the rounds' ratios.
Without audio files the clips are the telephone prompts and audiobooks of `flax-distil fetch`.
The drafters are the lookup and, where given, a student of the model and a smaller Whisper.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, load_audio, pad_or_trim
from flax_distil.cache import cache_folder
from flax_distil.decode.assisted import make_assistant, recognize_assisted
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
from flax_distil.export.formats import write_faster_whisper
from flax_distil.fetch.manifest import read_manifest
from flax_distil.fetch.prompts import human_prompts
from flax_distil.fetch.synthesis import sentences, synthesise
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.openai import to_openai
from flax_distil.model.weights import to_hf

Engine = Callable[[np.ndarray], list[str]]  # windows of 30 s to texts
OURS, GREEDY = "flax-distil float32", "greedy"
PACKAGES = ("jax", "flax", "torch", "transformers", "openai-whisper", "faster-whisper")


def flax_distil(checkpoint: Checkpoint, tokens: int, dtype: str) -> Engine:
    recognizer = make_recognizer(checkpoint, dtype)
    options = DecodeOptions("en", max_tokens=tokens)
    return lambda windows: [one.text for one in recognize(recognizer, windows, options)]


def transformers(checkpoint: Checkpoint, tokens: int) -> Engine:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns at every call that both kinds of options are given
    logging.disable_progress_bar()
    model = WhisperForConditionalGeneration.from_pretrained(checkpoint.source).eval()
    processor = WhisperProcessor.from_pretrained(checkpoint.source)
    english = {} if not checkpoint.dims.multilingual else {"language": "en", "task": "transcribe"}

    def run(windows):
        inputs = processor(list(windows), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        ids = model.generate(
            inputs.input_features, max_new_tokens=tokens, do_sample=False, **english
        )
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return run


def openai_whisper(checkpoint: Checkpoint, tokens: int) -> Engine:
    import torch
    import whisper

    sizes, state = to_openai(checkpoint.dims, to_hf(checkpoint.dims, checkpoint.params))
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes)).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    options = whisper.DecodingOptions(
        language="en", without_timestamps=True, fp16=False, sample_len=tokens
    )

    def run(windows):
        mel = whisper.log_mel_spectrogram(torch.from_numpy(windows), checkpoint.dims.mels)
        return [one.text for one in whisper.decode(model, mel, options)]

    return run


def faster_whisper(checkpoint: Checkpoint, tokens: int, compute_type: str) -> Engine:
    """Its feature extractor, engine and tokenizer, without its loop over long audio."""
    from faster_whisper import WhisperModel
    from faster_whisper.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_faster_whisper(checkpoint, Path(folder), "float32")
        threads = os.cpu_count() or 1
        model = WhisperModel(folder, "cpu", compute_type=compute_type, cpu_threads=threads)
    multilingual = model.model.is_multilingual
    tokenizer = Tokenizer(model.hf_tokenizer, multilingual, task="transcribe", language="en")
    prompt = [*tokenizer.sot_sequence, tokenizer.no_timestamps]

    def run(windows):
        features = [model.feature_extractor(window, padding=False) for window in windows]
        encoded = model.encode(np.stack(features))
        results = model.model.generate(
            encoded,
            [prompt] * len(windows),
            beam_size=1,
            max_length=len(prompt) + tokens,
            suppress_blank=True,
            suppress_tokens=list(checkpoint.generation["suppress_tokens"]),
        )
        return [tokenizer.decode(one.sequences_ids[0]).strip() for one in results]

    return run


def engines(checkpoint: Checkpoint, tokens: int) -> dict[str, Engine]:
    """Those that are installed; ours first."""
    ways = {
        OURS: partial(flax_distil, dtype="float32"),
        "flax-distil bfloat16": partial(flax_distil, dtype="bfloat16"),
        "Transformers float32": transformers,
        "openai-whisper float32": openai_whisper,
        "faster-whisper float32": partial(faster_whisper, compute_type="float32"),
        "faster-whisper int8": partial(faster_whisper, compute_type="int8"),
    }
    found = {}
    for name, make in ways.items():
        try:
            found[name] = make(checkpoint, tokens)
        except ImportError as error:
            Console(stderr=True).print(f"{name} is left out: {error}")
    return found


def drafted(recognizer: Recognizer, options: argparse.Namespace) -> dict[str, Engine]:
    """Greedy search, and the same text through every drafter; `tally` of the last batch on it."""
    decode = DecodeOptions("en", max_tokens=options.tokens)
    checkpoints = {"lookup": None}
    checkpoints |= {"student": load_checkpoint(options.student)} if options.student else {}
    checkpoints |= {"smaller": load_checkpoint(options.smaller)} if options.smaller else {}

    def assisted(assistant):
        def run(windows):
            found, run.tally = recognize_assisted(recognizer, assistant, windows, decode)
            return [one.text for one in found]

        return run

    def greedy(windows):
        return [one.text for one in recognize(recognizer, windows, decode)]

    runs: dict[str, Engine] = {GREEDY: greedy}
    for name, checkpoint in checkpoints.items():
        if checkpoint is not None and checkpoint.dims.vocab != recognizer.spec.dims.vocab:
            Console(stderr=True).print(f"{name} is left out: it has another vocabulary")
            continue
        for vocabulary in (None, options.vocabulary) if checkpoint else (None,):
            assistant = make_assistant(recognizer, checkpoint, options.guesses, vocabulary)
            runs[name if vocabulary is None else f"{name}, {vocabulary} tokens"] = assisted(
                assistant
            )
    return runs


def measure(
    runs: dict[str, Engine], first: str, clips: list[np.ndarray], batch: int, rounds: int
) -> list[dict]:
    """Seconds, RTF and the first one's advantage; texts are compared with the first one's."""
    # A round is one batch: the clips go round until all rounds are full.
    chosen = [clips[index % len(clips)] for index in range(batch * rounds)]
    windows = np.stack([pad_or_trim(clip) for clip in chosen]).reshape(rounds, batch, CLIP_SAMPLES)
    seconds = np.array([len(clip) / SAMPLE_RATE for clip in chosen]).reshape(rounds, batch).sum(1)
    for run in runs.values():
        run(windows[0])  # compiles, warms up
    times, texts, tallies = ({name: [] for name in runs} for _ in range(3))
    for windows_BN in tqdm(windows, desc=f"batch {batch}", leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            texts[name] += run(windows_BN)
            times[name].append(time.perf_counter() - start)
            tallies[name].append(getattr(run, "tally", None))
    rows = []
    for name in runs:
        equal = np.mean(
            [ours == theirs for ours, theirs in zip(texts[first], texts[name], strict=True)]
        )
        row = {
            "name": name,
            "batch": batch,
            "seconds_a_batch": round(statistics.median(times[name]), 3),
            "rtf": round(statistics.median(np.array(times[name]) / seconds), 4),
            "first_is_times_faster": round(
                statistics.median(np.array(times[name]) / np.array(times[first])), 2
            ),
            "equal_texts_percent": round(100 * float(equal), 1),
        }
        if tallies[name][0]:
            drafted, accepted, written, passes = (
                sum(int(getattr(tally, field).sum()) for tally in tallies[name])
                for field in ("drafted", "accepted", "written", "passes")
            )
            row["acceptance_percent"] = round(100 * accepted / max(drafted, 1), 1)
            row["tokens_a_pass"] = round(written / passes, 2)
        rows.append(row)
    return rows


def speech(files: list[Path]) -> list[np.ndarray]:
    """The waveforms of `files`, else human speech where apt is there and synthetic elsewhere."""
    if not files:
        folder = cache_folder() / "demo-speech"
        manifest = human_prompts(folder / "human")
        if manifest is None:
            texts = [text for text in sentences() if len(text.split()) > 12]
            manifest = synthesise(texts[:40], cache_folder() / "benchmark-speech")
        clips = [clip for clip in read_manifest(manifest) if 3 < clip.duration < 30]
        every = max(len(clips) // 40, 1)
        files = [manifest.parent / clip.audio_filepath for clip in clips[::every]]
    return [load_audio(file) for file in files]


def show(rows: list[dict], title: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(name.replace("_", " ") for name in names), title=title)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    return table


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("audio", nargs="*", type=Path)
    parser.add_argument("--models", nargs="+", default=["whisper-tiny.en", "whisper-base"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--speculative-batches", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="at most so many a clip")
    parser.add_argument("--student", help="drafts for the models with its vocabulary")
    parser.add_argument("--smaller", help="a smaller Whisper, as the student")
    parser.add_argument("--guesses", type=int, default=4, help="tokens drafted a pass")
    parser.add_argument("--vocabulary", type=int, default=8000, help="text tokens to guess from")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    options = arguments()
    clips = speech(options.audio)
    report = {
        "machine": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "clips": len(clips),
        "mean_seconds": round(statistics.mean(len(clip) / SAMPLE_RATE for clip in clips), 1),
        "engines": {},
        "speculative": {},
    }
    console = Console()
    console.print({key: report[key] for key in ("machine", "load", "versions", "clips")})
    for model in options.models:
        folder = model if Path(model).is_dir() else fetch_weights(model)
        checkpoint = load_checkpoint(folder)
        runs = engines(checkpoint, options.tokens) if options.batches else {}
        report["engines"][model] = [
            row
            for batch in options.batches
            for row in measure(runs, OURS, clips, batch, options.rounds)
        ]
        del runs
        runs = drafted(make_recognizer(checkpoint), options) if options.speculative_batches else {}
        report["speculative"][model] = [
            row
            for batch in options.speculative_batches
            for row in measure(runs, GREEDY, clips, batch, options.rounds)
        ]
        for kind in ("engines", "speculative"):
            console.print(show(report[kind][model], f"{model}: {kind}"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
