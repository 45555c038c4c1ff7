"""Short clips and a long recording against other engines, speculative decoding against greedy.

    python benchmarks/decode.py [--models whisper-tiny.en whisper-base] [--batches 1 8]
        [--rounds 3] [--minutes 1] [--student FOLDER] [--smaller NAME] [--draft-tokens 4]
        [--speculative-batches 1 4 16] [--json FILE] [AUDIO ...]

The figures that are published: --rounds 5 --minutes 10, on a machine that does nothing else.

Every engine gets 16 kHz waveforms and returns English text by greedy search, log-mel included;
short clips are read without timestamps. The long recording is the clips in a row with pauses, read
by each engine's own long-form algorithm at temperature 0. Each round runs all engines on the same
batch in turn, so that a busy machine is unfair to none; figures are medians over the rounds, and
the ratios medians of the rounds' ratios. Without audio files the clips are the telephone prompts
and audiobooks of `flax-distil fetch`. The drafters are the lookup and, where given, a student of
the model and a smaller Whisper.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil import ChunkedOptions, SequentialOptions, transcribe
from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, load_audio, pad_or_trim
from flax_distil.cache import cache_folder
from flax_distil.decode.assistant import make_assistant
from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
from flax_distil.decode.search import Acceptance
from flax_distil.export.formats import write_faster_whisper
from flax_distil.fetch.speech import human_prompts, read_manifest, sentences, synthesise
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.tensors import to_openai
from flax_distil.model.weights import to_hf
from flax_distil.options import DecodeOptions
from flax_distil.parallel.platform import name_platform
from flax_distil.text.wer import word_errors
from flax_distil.transcription.recordings import LongForm

Engine = Callable[[np.ndarray], list[str]]  # windows of 30 s to texts
OURS = "flax-distil float32"
PACKAGES = ("jax", "flax", "torch", "transformers", "openai-whisper", "faster-whisper")


def flax_distil(checkpoint: Checkpoint, tokens: int, dtype: str) -> Engine:
    recognizer = make_recognizer(checkpoint, dtype)
    options = DecodeOptions(max_tokens=tokens)
    return lambda windows: [
        one.text for one in recognize(recognizer, windows, options, language="en")
    ]


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


def openai_model(checkpoint: Checkpoint):
    import torch
    import whisper

    sizes, state = to_openai(checkpoint.dims, to_hf(checkpoint.dims, checkpoint.params))
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes)).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model


def openai_whisper(checkpoint: Checkpoint, tokens: int) -> Engine:
    import torch
    import whisper

    model = openai_model(checkpoint)
    options = whisper.DecodingOptions(
        language="en", without_timestamps=True, fp16=False, sample_len=tokens
    )

    def run(windows):
        # One at a time: the loudest frame of a batch would set the floor for all.
        mels = [whisper.log_mel_spectrogram(window, checkpoint.dims.mels) for window in windows]
        mel = torch.stack(mels)
        return [one.text for one in whisper.decode(model, mel, options)]

    return run


def faster_model(checkpoint: Checkpoint, compute_type: str):
    from faster_whisper import WhisperModel

    with tempfile.TemporaryDirectory() as folder:
        write_faster_whisper(checkpoint, Path(folder), "float32")
        threads = os.cpu_count() or 1
        return WhisperModel(folder, "cpu", compute_type=compute_type, cpu_threads=threads)


def faster_whisper(checkpoint: Checkpoint, tokens: int, compute_type: str) -> Engine:
    """Its feature extractor, engine and tokenizer, without its loop over long audio."""
    from faster_whisper.tokenizer import Tokenizer

    model = faster_model(checkpoint, compute_type)
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


ENGINES: dict[str, Callable[[Checkpoint, int], Engine]] = {
    OURS: partial(flax_distil, dtype="float32"),
    "flax-distil bfloat16": partial(flax_distil, dtype="bfloat16"),
    "Transformers float32": transformers,
    "openai-whisper float32": openai_whisper,
    "faster-whisper float32": partial(faster_whisper, compute_type="float32"),
    "faster-whisper int8": partial(faster_whisper, compute_type="int8"),
}


def long_flax_distil(checkpoint: Checkpoint, long_form: LongForm, dtype: str) -> Engine:
    read = partial(transcribe, model=make_recognizer(checkpoint, dtype), language="en")
    return lambda sounds: [read(sounds[0], long_form=long_form).text.strip()]


def long_transformers(checkpoint: Checkpoint) -> Engine:
    from transformers import pipeline

    read = pipeline("automatic-speech-recognition", model=str(checkpoint.source), device="cpu")
    english = {"language": "en", "task": "transcribe"} if checkpoint.dims.multilingual else {}
    greedy = {"num_beams": 1, **english}  # the pipeline's own default are five beams
    options: dict = {"chunk_length_s": 30, "batch_size": 8, "generate_kwargs": greedy}
    return lambda sounds: [read(sounds[0].copy(), **options)["text"].strip()]


def long_openai_whisper(checkpoint: Checkpoint) -> Engine:
    import whisper

    read = partial(whisper.transcribe, openai_model(checkpoint), fp16=False)
    return lambda sounds: [read(sounds[0], language="en", temperature=0.0)["text"].strip()]


def long_faster_whisper(checkpoint: Checkpoint, compute_type: str) -> Engine:
    read = faster_model(checkpoint, compute_type).transcribe
    options = {"language": "en", "beam_size": 1, "temperature": 0.0}
    return lambda sounds: ["".join(part.text for part in read(sounds[0], **options)[0]).strip()]


PLAIN = SequentialOptions((0.0,))
LONG_ENGINES: dict[str, Callable[[Checkpoint], Engine]] = {
    f"{OURS}, sequential": partial(long_flax_distil, long_form=PLAIN, dtype="float32"),
    "flax-distil bfloat16, sequential": partial(
        long_flax_distil, long_form=PLAIN, dtype="bfloat16"
    ),
    f"{OURS}, chunked": partial(long_flax_distil, long_form=ChunkedOptions(), dtype="float32"),
    "Transformers float32, chunked": long_transformers,
    "openai-whisper float32": long_openai_whisper,
    "faster-whisper float32": partial(long_faster_whisper, compute_type="float32"),
    "faster-whisper int8": partial(long_faster_whisper, compute_type="int8"),
}


def installed_engines(ways: Mapping[str, Callable[..., Engine]], *given) -> dict[str, Engine]:
    """Those that can be imported, ours first."""
    found = {}
    for name, make in ways.items():
        try:
            found[name] = make(*given)
        except ImportError as error:
            Console(stderr=True).print(f"{name} is left out: {error}")
    return found


def drafted(recognizer: Recognizer, options: argparse.Namespace) -> dict[str, Engine]:
    """Greedy search, and the same text through every drafter; `acceptance` is the last batch's."""
    decode = DecodeOptions(max_tokens=options.tokens)
    checkpoints = {"lookup": None}
    checkpoints |= {"student": load_checkpoint(options.student)} if options.student else {}
    checkpoints |= {"smaller": load_checkpoint(options.smaller)} if options.smaller else {}

    def assisted(assistant):
        def run(windows):
            helped = replace(recognizer, assistant=assistant)
            found = recognize(helped, windows, decode, language="en")
            run.acceptance = Acceptance.total(one.acceptance for one in found)
            return [one.text for one in found]

        return run

    def greedy(windows):
        return [one.text for one in recognize(recognizer, windows, decode, language="en")]

    runs: dict[str, Engine] = {"greedy": greedy}
    for name, checkpoint in checkpoints.items():
        if checkpoint is not None and checkpoint.dims.vocab != recognizer.spec.dims.vocab:
            Console(stderr=True).print(f"{name} is left out: it has another vocabulary")
            continue
        runs[name] = assisted(make_assistant(recognizer, checkpoint, options.draft_tokens))
    return runs


def measure(
    runs: dict[str, Engine], clips: list[np.ndarray], batch: int, rounds: int
) -> list[dict]:
    """Seconds, RTF and the first one's advantage; texts are compared with the first one's."""
    # A round is one batch: the clips go round until all rounds are full.
    chosen = [clips[index % len(clips)] for index in range(batch * rounds)]
    windows = np.stack([pad_or_trim(clip) for clip in chosen]).reshape(rounds, batch, CLIP_SAMPLES)
    seconds = np.array([len(clip) / SAMPLE_RATE for clip in chosen]).reshape(rounds, batch).sum(1)
    return [{"batch": batch, **row} for row in paired(runs, windows, seconds, f"batch {batch}")]


def measure_long(runs: dict[str, Engine], clips: list[np.ndarray], minutes: float) -> list[dict]:
    """The same of one recording, the clips in a row: one round, since each takes long."""
    parts, pause = [], np.zeros(SAMPLE_RATE // 2, np.float32)
    while sum(map(len, parts)) < minutes * 60 * SAMPLE_RATE:
        parts += [part for clip in clips for part in (clip, pause)]
    sound = np.concatenate(parts)[: round(minutes * 60 * SAMPLE_RATE)]
    return paired(runs, sound[None, None], np.array([len(sound) / SAMPLE_RATE]), "recording")


def paired(
    runs: dict[str, Engine], batches: np.ndarray, seconds: np.ndarray, title: str
) -> list[dict]:
    """Every engine on every batch in turn. seconds: of audio a batch."""
    first = next(iter(runs))
    warm_up = batches[0][..., : 60 * SAMPLE_RATE]
    for run in runs.values():
        run(warm_up)  # compiles
    times, texts, acceptances = ({name: [] for name in runs} for _ in range(3))
    for sounds in tqdm(batches, desc=title, leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            texts[name] += run(sounds)
            times[name].append(time.perf_counter() - start)
            acceptances[name].append(getattr(run, "acceptance", None))
    rows = []
    for name in runs:
        pairs = list(zip(texts[first], texts[name], strict=True))
        row = {
            "name": name,
            "seconds": round(statistics.median(times[name]), 3),
            "rtf": round(statistics.median(np.array(times[name]) / seconds), 4),
            "first_is_times_faster": round(
                statistics.median(np.array(times[name]) / np.array(times[first])), 2
            ),
            "equal_texts_percent": round(100 * float(np.mean([a == b for a, b in pairs])), 1),
            "wer_to_first": round(100 * word_errors(*zip(*pairs, strict=True)).rate, 2),
        }
        if acceptance := Acceptance.total(acceptances[name]):
            row["acceptance_percent"] = round(100 * acceptance.rate, 1)
            row["tokens_a_pass"] = round(acceptance.tokens_per_pass, 2)
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1, help="of the recording; 0 for none")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many a clip")
    parser.add_argument("--student", help="drafts for the models with its vocabulary")
    parser.add_argument("--smaller", help="a smaller Whisper, as the student")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens drafted a pass")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    options = arguments()
    name_platform()
    clips = speech(options.audio)
    report = {
        "machine": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "clips": len(clips),
        "mean_seconds": round(statistics.mean(len(clip) / SAMPLE_RATE for clip in clips), 1),
        "engines": {},
        "long": {},
        "speculative": {},
    }
    console = Console()
    console.print({key: report[key] for key in ("machine", "load", "versions", "clips")})
    for model in options.models:
        folder = model if Path(model).is_dir() else fetch_weights(model)
        checkpoint = load_checkpoint(folder)
        runs = installed_engines(ENGINES, checkpoint, options.tokens) if options.batches else {}
        report["engines"][model] = [
            row for batch in options.batches for row in measure(runs, clips, batch, options.rounds)
        ]
        runs = installed_engines(LONG_ENGINES, checkpoint) if options.minutes else {}
        if runs:
            report["long"][model] = measure_long(runs, clips, options.minutes)
        runs = drafted(make_recognizer(checkpoint), options) if options.speculative_batches else {}
        report["speculative"][model] = [
            row
            for batch in options.speculative_batches
            for row in measure(runs, clips, batch, options.rounds)
        ]
        for kind in ("engines", "long", "speculative"):
            console.print(show(report[kind].get(model, []), f"{model}: {kind}"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
