"""Recognition, speculative decoding and training on one GPU or TPU, with random weights.

    python benchmarks/accelerator.py [--model large-v2] [--layers 2] [--dtype bfloat16]
        [--batches 1 16] [--tokens 32] [--train-batch 64] [--label-tokens 128] [--rounds 5]
        [--no-peer] [--parity MODEL ... --audio FILE ...] [--json FILE]

These are the defaults of GPUs and TPUs; on a CPU they are tiny.en, --batches 1 4, --train-batch 4.
Needs no network and no files: the teacher has random weights in a published size, the student the
teacher's encoder and the first, last (and evenly spaced) of its decoder layers. Every clip is 30 s
of noise, and the end of text is suppressed, so that each text has exactly `--tokens` tokens.

- recognition: log-mel, encoder, the prompt of three tokens, and greedy search.
- ms a token: the search alone, without the prompt's pass and the cross-attention's keys.
- speculative: the student drafts four tokens for each pass of the teacher. With random weights
  hardly any is accepted, so the time of a pass is measured, in steps without an assistant: if a
  pass of a real pair yields more tokens than that, the assistant saves time.
- train step: the trainer's own, on `--train-batch` clips of `--label-tokens` tokens each. MFU: the
  useful products of matrices, relative to the published peak of the chip, or to a measured one.

All programs are compiled at once in threads, as a run compiles them; then read again from the
persistent cache. Where PyTorch sees the same GPU (or both run on a CPU), Transformers does the same
work with random weights: generate() with sdpa attention in the same precision, and a train step
under autocast with the fused AdamW.

--parity: real models (folders or names) instead: their texts of `--audio` on this device in float32
and bfloat16, compared with those on the CPU of the same machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flax_distil.audio.load import load_audio, pad_or_trim
from flax_distil.config import ComputeConfig, DistillConfig
from flax_distil.data.batches import Batch
from flax_distil.decode.drafters import model_drafter
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import encode, make_recognizer, recognize
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import DecoderModel, Prompt, SearchInput
from flax_distil.decode.speculative import speculative
from flax_distil.distill.flops import peak_flops, step_flops, vocabulary_tokens
from flax_distil.distill.setup import compile_step, make_train_spec, split_parameters
from flax_distil.distill.step import initial_state
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES, PUBLISHED, WhisperDims, dims_to_hf
from flax_distil.model.spec import Params, Spec
from flax_distil.model.student import choose_layers
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import make_mesh, shardings
from flax_distil.parallel.platform import name_platform
from flax_distil.text.wer import word_errors

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
SOT, END, NO_SPEECH = 50_258, 50_257, 50_362  # any three tokens, without a vocabulary
DRAFT_TOKENS = 4
Call = Callable[[], Any]  # runs and waits


def student_of(dims: WhisperDims, teacher: Params, layers: int) -> tuple[WhisperDims, Params]:
    """The student's sizes and parameters, which are the teacher's own arrays."""
    kept = choose_layers(layers, dims.decoder_layers, "decoder")
    decoder = teacher["decoder"]
    copied = {new: decoder["layers"][old] for new, old in enumerate(kept)}
    params = teacher | {"decoder": decoder | {"layers": copied}}
    return replace(dims, decoder_layers=layers), params


def recognitions(name: str, spec: Spec, params: Params, options: argparse.Namespace) -> dict:
    """The calls of one model: its encoder, its search, and the search without a single step."""
    calls: dict[str, Call] = {}
    rules = RuleSet(END, NO_SPEECH, suppressed=(END,), suppressed_first=())
    model = DecoderModel(spec, params["decoder"])
    for batch in options.batches:
        waveforms_BN, search_input = search_of(spec, batch)
        search = partial(greedy, model, rules=rules, max_tokens=options.tokens)
        idle = search_input._replace(active_B=jnp.zeros(batch, bool))

        def encoder(waveforms_BN: Any = waveforms_BN) -> Any:
            return encode(spec, params["encoder"], waveforms_BN)

        calls[f"{name}, batch {batch}, encoder"] = lambda e=encoder: jax.block_until_ready(e())
        for part, given in (("search", search_input), ("prompt", idle)):
            run = lambda s=search, i=given: jax.block_until_ready(s(i))
            calls[f"{name}, batch {batch}, {part}"] = run
    return calls


def search_of(spec: Spec, batch: int) -> tuple[np.ndarray, SearchInput]:
    """Waveforms of noise, and a search over audio states of the same size."""
    random, dims = np.random.default_rng(0), spec.dims
    waveforms = random.integers(-3000, 3000, (batch, CHUNK_SAMPLES)).astype(np.int16)
    audio = random.standard_normal((batch, dims.audio_positions, dims.width))
    prompt = Prompt(jnp.full((batch, 3), SOT), jnp.array(3), jnp.array(0))
    audio_BSD = jnp.asarray(audio, spec.dtype)
    return waveforms, SearchInput(audio_BSD, prompt, jnp.ones(batch, bool))


def speculation(
    teacher: tuple[Spec, Params], student: tuple[Spec, Params], options: argparse.Namespace
) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls of speculative decoding, and the passes of each, filled in by the calls."""
    calls, passes = {}, {}
    rules = RuleSet(END, NO_SPEECH, suppressed=(END,), suppressed_first=())
    (spec, params), drafter = teacher, model_drafter(student[0], student[1]["decoder"])
    for batch in options.batches:
        _, given = search_of(spec, batch)
        name = f"speculative, batch {batch}"

        def run(given: SearchInput = given, name: str = name) -> None:
            result = speculative(
                DecoderModel(spec, params["decoder"]),
                given,
                drafter=drafter,
                draft_audio_BSE=given.audio_BSD,
                draft_tokens=DRAFT_TOKENS,
                rules=rules,
                max_tokens=options.tokens,
            )
            assert result.acceptance is not None
            passes[name] = float(np.max(result.acceptance.passes)) - 1  # the prompt's is apart

        calls[name] = run
    return calls, passes


def training(
    dims: tuple[WhisperDims, WhisperDims], params: tuple[Params, Params], options: Any
) -> tuple[Call, int, float, str]:
    """One update, its useful FLOPs, and the chip's peak with its origin."""
    rows, length = options.train_batch, options.label_tokens
    compute = ComputeConfig(options.dtype)
    config = DistillConfig("-", "-", Path("-"), batch_size=rows, compute=compute)
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = make_train_spec(config, *dims, mesh)
    trainable, frozen = split_parameters(spec, *params)
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)
    state = jax.jit(partial(initial_state, config=config.optimizer))(trainable)
    state = jax.device_put(state, shardings(state, mesh))
    step = compile_step(spec, mesh, state, {})
    random = np.random.default_rng(0)
    tokens = random.integers(0, END, (rows, length + 1)).astype(np.int32)
    batch = Batch(
        random.integers(-3000, 3000, (rows, CHUNK_SAMPLES)).astype(np.int16),
        tokens[:, :-1],
        tokens[:, 1:],
        np.ones((rows, length), np.float32),
        np.full(rows, 30, np.float32),
        np.arange(rows, dtype=np.int32),
    )
    batch = jax.tree.map(jnp.array, batch)

    def update() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        float(metrics["loss"])

    logits = vocabulary_tokens(np.asarray(batch.weights), 1, 1, spec.vocabulary_chunk)
    return update, step_flops(spec, rows, length, logits=logits), *peak_flops(config)


def torch_calls(dims: tuple[WhisperDims, WhisperDims], options: Any) -> dict[str, Call]:
    """The same work by Transformers, on the GPU or CPU that JAX uses."""
    import torch
    import torch.nn.functional as F
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils import logging

    logging.set_verbosity_error()
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError(f"PyTorch {torch.__version__} sees no GPU")
    dtype = getattr(torch, options.dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    ids = {"decoder_start_token_id": SOT, "eos_token_id": END, "pad_token_id": END}

    def make(dims: WhisperDims, dtype: torch.dtype) -> Any:
        settings: dict[str, Any] = dims_to_hf(dims) | ids | {"bos_token_id": END}
        with torch.device(device):
            model: Any = WhisperForConditionalGeneration(WhisperConfig(**settings))
        model.generation_config.update(**ids)
        model = model.to(dtype).eval()
        return model

    calls: dict[str, Call] = {}
    for name, one in zip(("teacher", "student"), dims, strict=True):
        model = make(one, dtype)
        for batch in options.batches:
            mel = torch.randn(batch, one.mels, 3000, device=device, dtype=dtype)
            prompt = torch.full((batch, 3), SOT, device=device)

            def recognise(model: Any = model, mel: Any = mel, prompt: Any = prompt) -> None:
                count = options.tokens
                model.generate(
                    mel, decoder_input_ids=prompt, do_sample=False,
                    min_new_tokens=count, max_new_tokens=count,
                )  # fmt: skip
                wait()

            calls[f"{name}, batch {batch}, recognition"] = recognise
    if not options.train_batch:
        return calls
    teacher, student = make(dims[0], dtype), make(dims[1], torch.float32)
    student.model.encoder = teacher.model.encoder.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    mel = torch.randn(options.train_batch, dims[0].mels, 3000, device=device, dtype=dtype)
    shape = options.train_batch, options.label_tokens
    tokens, targets = torch.randint(0, END, (2, *shape), device=device)

    def update() -> None:
        with torch.no_grad():
            audio = teacher.model.encoder(mel).last_hidden_state
            inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=audio)}
            wanted = teacher(**inputs, decoder_input_ids=tokens).logits.float()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = student(**inputs, decoder_input_ids=tokens).logits.float()
        kl = F.kl_div(
            F.log_softmax(logits / 2, -1), F.log_softmax(wanted / 2, -1),
            reduction="none", log_target=True,
        ).sum(-1)  # fmt: skip
        ce = F.cross_entropy(logits.swapaxes(1, 2), targets)
        optimizer.zero_grad()
        (0.8 * 4 * kl.mean() + ce).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        wait()

    return calls | {"train step": update}


def first_calls(calls: dict[str, Call]) -> tuple[dict[str, float], float]:
    """Seconds until each has run, all started at once in threads; and until all have."""

    def one(call: Call) -> float:
        call()
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        seconds = dict(zip(calls, pool.map(one, calls.values()), strict=True))
    return seconds, time.perf_counter() - start


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Milliseconds of each; a round runs all in turn, so that a busy machine is unfair to none."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(some) for name, some in times.items()}


def measure(options: argparse.Namespace) -> dict:
    """All figures of random models."""
    dims, device = PUBLISHED[options.model], jax.devices()[0]
    spec = Spec(dims, options.dtype).on(device)
    start = time.perf_counter()
    params = spec.init(jax.random.key(0))
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(options.dtype), tree)
    params = jax.block_until_ready(narrow(params))
    initialised = time.perf_counter() - start
    small, student_params = student_of(dims, params, options.layers)
    student = replace(spec, dims=small)

    calls = recognitions("teacher", spec, params, options)
    calls |= recognitions("student", student, student_params, options)
    drafting, passes = speculation((spec, params), (student, student_params), options)
    calls |= drafting
    flops, peak, origin = 0, 0.0, ""
    if options.train_batch:
        both = (params, student_params)
        calls["train step"], flops, peak, origin = training((dims, small), both, options)
    compiling, compiled = first_calls(calls)
    jax.clear_caches()
    _, loaded = first_calls(calls)
    peers = {}
    if options.peer:
        try:
            peers = torch_calls((dims, small), options)
        except ImportError as error:
            Console(stderr=True).print(f"Transformers is left out: {error}")
        for call in peers.values():
            call()  # warms up
    ours = medians(calls, options.rounds)
    theirs = medians(peers, options.rounds)

    rows, drafted = [], []
    for batch in options.batches:
        steps = {}
        for name in ("teacher", "student"):
            at = f"{name}, batch {batch}"
            encoder, search = ours[f"{at}, encoder"], ours[f"{at}, search"]
            steps[name] = (search - ours[f"{at}, prompt"]) / options.tokens
            row = {"model": name, "batch": batch, "recognition_ms": encoder + search}
            row |= {"encoder_ms": encoder, "ms_a_token": steps[name]}
            if other := theirs.get(f"{at}, recognition"):
                row |= {"transformers_ms": other, "times_faster": other / (encoder + search)}
            rows.append(row)
        name = f"speculative, batch {batch}"
        prompt = sum(ours[f"{one}, batch {batch}, prompt"] for one in steps)
        each = (ours[name] - prompt) / passes[name]
        row = {"batch": batch, "draft_tokens": DRAFT_TOKENS, "ms_a_pass": each}
        drafted.append(row | {"tokens_a_pass_that_pay": each / steps["teacher"]})
    training_row = {}
    if options.train_batch:
        seconds = ours["train step"] / 1000
        training_row = {"clips": options.train_batch, "label_tokens": options.label_tokens}
        training_row |= {"ms": ours["train step"], "tflops": flops / seconds / 1e12}
        training_row |= {
            "mfu_percent": 100 * flops / seconds / peak,
            "peak": f"{peak:.3g} {origin}",
        }
        if other := theirs.get("train step"):
            training_row |= {"transformers_ms": other, "times_faster": other / ours["train step"]}
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "initialisation_s": initialised,
        "first_calls_s": compiled,
        "from_cache_s": loaded,
        "slowest_first_calls_s": dict(sorted(compiling.items(), key=lambda one: -one[1])[:3]),
        "peak_memory_gib": memory and memory / 2**30,
        "recognition": rows,
        "speculative": drafted,
        "train_step": training_row,
    }


# --- real models --------------------------------------------------------------------------------


def texts(model: str, dtype: str, files: list[Path]) -> list[str]:
    """Greedy texts of real speech on this process's device."""
    recognizer = make_recognizer(load_checkpoint(model), dtype)
    windows = np.stack([pad_or_trim(load_audio(file)) for file in files])
    found = []
    for first in range(0, len(windows), 16):
        batch = windows[first : first + 16]
        found += [one.text for one in recognize(recognizer, batch, DecodeOptions(max_tokens=128))]
    return found


def parity(options: argparse.Namespace) -> list[dict]:
    """Texts on this device against those of another process on the CPU."""
    rows = []
    for model in options.parity:
        command = [sys.executable, __file__, "--texts", model, "--audio", *map(str, options.audio)]
        result = subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True
        )
        reference = json.loads(result.stdout.splitlines()[-1])
        for dtype in ("float32", "bfloat16"):
            here = texts(model, dtype, options.audio)
            same = sum(a == b for a, b in zip(reference, here, strict=True))
            rate = word_errors(reference, here).rate
            row = {
                "model": Path(model).name,
                "dtype": dtype,
                "equal_texts": f"{same} of {len(here)}",
            }
            rows.append(row | {"wer_to_cpu_percent": 100 * rate})
    return rows


def show(rows: list[dict], title: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(name.replace("_", " ") for name in names), title=title)
    number = lambda value: f"{value:,.2f}" if isinstance(value, float) else str(value)
    for row in rows:
        table.add_row(*(number(row.get(name, "")) for name in names))
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
    parser.add_argument("--model", choices=PUBLISHED)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the student")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each text")
    parser.add_argument("--train-batch", type=int, help="clips; 0 for no training")
    parser.add_argument("--label-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--parity", nargs="+", default=[], help="real models to compare with the CPU"
    )
    parser.add_argument("--audio", nargs="+", type=Path, default=[])
    parser.add_argument("--texts", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    options, console = arguments(), Console()
    name_platform()
    sizes = ("tiny.en", [1, 4], 4) if jax.default_backend() == "cpu" else ("large-v2", [1, 16], 64)
    for name, size in zip(("model", "batches", "train_batch"), sizes, strict=True):
        setattr(options, name, size if getattr(options, name) is None else getattr(options, name))
    if options.texts:
        print(json.dumps(texts(options.texts, "float32", options.audio)))
        return
    report: dict[str, Any] = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("json", "texts")},
    }
    console.print(report)
    if options.parity:
        report["parity"] = parity(options)
        console.print(show(report["parity"], "texts against the CPU's in float32"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            report |= measure(options)
        console.print(show(report["recognition"], options.model))
        console.print(show(report["speculative"], "speculative decoding"))
        if report["train_step"]:
            console.print(show([report["train_step"]], "train step"))
        keys = ("initialisation_s", "first_calls_s", "from_cache_s", "peak_memory_gib")
        console.print({key: report[key] for key in keys})
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
