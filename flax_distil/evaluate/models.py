"""What is evaluated: our models, alone or with an assistant, and those of other libraries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.recognizer import (
    Recognizer,
    decode,
    encode_audio,
    likeliest_languages,
    make_recognizer,
    pad_batch,
    prepare,
)
from flax_distil.decode.search import Acceptance, Window
from flax_distil.errors import InputError
from flax_distil.evaluate.results import Output
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import ChunkedOptions, DecodeOptions, SequentialOptions
from flax_distil.text.wer import compression_ratio
from flax_distil.transcription.recordings import LongForm, transcribe_all


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one language, padded to 30 s, at 16 kHz.

    previous: text before each clip, given as its prompt; () for none.
    """

    waveforms_BN: Float32[np.ndarray, "B N"]
    language: str
    previous: Sequence[str] = ()
    max_tokens: int = 224


@dataclass(frozen=True)
class RecordingBatch:
    """Recordings of one language, of any length, at 16 kHz. batch_size: windows decoded at once."""

    waveforms: Sequence[Float32[np.ndarray, "_"]]
    language: str
    method: LongForm
    batch_size: int = 8


@runtime_checkable
class Model(Protocol):
    """What is evaluated: a model of this library or of another one."""

    name: str
    source: str

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        ...

    def unsupported(self, language: str) -> str | None:
        """Why it cannot transcribe a language; None where it can."""
        ...

    def recognize(self, batch: ClipBatch) -> list[Output]:
        """Greedy transcripts of the clips, without timestamps."""
        ...

    def transcribe(self, batch: RecordingBatch) -> list[str] | None:
        """Transcripts of the recordings; None where the library lacks the method."""
        ...


@dataclass(eq=False)
class FlaxModel:
    """A model of this library. acceptance: of the assistant's draft tokens, in the last batch."""

    name: str
    source: str
    recognizer: Recognizer
    acceptance: Acceptance | None = field(default=None, init=False)

    @property
    def parameters(self) -> int:
        """Number of parameters, without the assistant's."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.recognizer.params))

    def unsupported(self, language: str) -> str | None:
        return self.recognizer.tokens.unsupported(language)

    def recognize(self, batch: ClipBatch) -> list[Output]:
        model, rows = self.recognizer, len(batch.waveforms_BN)
        options, tokens = DecodeOptions(max_tokens=batch.max_tokens), model.tokens
        language = prepare(model, options, rows, batch.language).language
        states = encode_audio(model, pad_batch(batch.waveforms_BN))
        detected: list[str] | list[None] = [None] * rows
        if tokens.multilingual and not batch.previous:
            detected = likeliest_languages(model, states.model_BSD)[:rows]
        windows = [
            Window(language, tuple(tokens.encode(" " + text)) if text else ())
            for text in batch.previous or [""] * rows
        ]
        hypotheses = decode(model, states, options, windows)
        self.acceptance = Acceptance.total(one.acceptance for one in hypotheses)
        return [
            Output(
                text=one.text,
                tokens=len(one.tokens),
                ended=one.ended,
                mean_log_probability=one.mean_log_probability,
                no_speech_probability=one.no_speech_probability,
                compression_ratio=one.compression_ratio,
                detected=code,
            )
            for one, code in zip(hypotheses, detected, strict=True)
        ]

    def transcribe(self, batch: RecordingBatch) -> list[str]:
        progress = transcribe_all(
            self.recognizer,
            batch.waveforms,
            long_form=batch.method,
            language=batch.language,
            batch_size=batch.batch_size,
        )
        texts = {number: one.text.strip() for number, _, one in progress if one is not None}
        return [texts[number] for number in range(len(batch.waveforms))]


@dataclass(eq=False)
class TransformersModel:
    """A Transformers folder in PyTorch."""

    name: str
    source: str

    @cached_property
    def pipeline(self) -> Any:
        """Transformers' own, on a GPU where PyTorch has one."""
        import torch
        from transformers import pipeline
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns at every call of options given twice
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return pipeline("automatic-speech-recognition", self.source, device=device)

    @property
    def parameters(self) -> int:
        return self.pipeline.model.num_parameters()

    def unsupported(self, language: str) -> str | None:
        known = getattr(self.pipeline.model.generation_config, "lang_to_id", {"<|en|>": 0})
        return None if f"<|{language}|>" in known else f"its vocabulary lacks {language}"

    def options(self, language: str) -> dict[str, Any]:
        """What its `generate` is given, beside the sound."""
        multilingual = self.pipeline.model.generation_config.is_multilingual
        task = {"language": language, "task": "transcribe"} if multilingual else {}
        return {"num_beams": 1, **task}

    def recognize(self, batch: ClipBatch) -> list[Output]:
        model, tokenizer = self.pipeline.model, self.pipeline.tokenizer
        features = self.pipeline.feature_extractor(
            list(batch.waveforms_BN), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features.to(model.device)
        options = {"max_new_tokens": batch.max_tokens, "do_sample": False}
        options |= self.options(batch.language)
        if batch.previous:  # it takes one prompt a call
            prompts = [tokenizer.get_prompt_ids(one, return_tensors="pt") for one in batch.previous]
            ids = [
                model.generate(features[[row]], prompt_ids=prompt.to(model.device), **options)[0]
                for row, prompt in enumerate(prompts)
            ]
        else:
            ids = model.generate(features, **options)
        return [text_output(tokenizer.decode(one, skip_special_tokens=True)) for one in ids]

    def transcribe(self, batch: RecordingBatch) -> list[str]:
        """With its defaults but for one beam."""
        options: dict[str, Any] = {"return_timestamps": True}
        if isinstance(batch.method, ChunkedOptions):
            seconds = batch.method.chunk_length
            options = {"chunk_length_s": seconds, "batch_size": batch.batch_size}
        options["generate_kwargs"] = self.options(batch.language)
        return [self.pipeline(one.copy(), **options)["text"].strip() for one in batch.waveforms]


@dataclass(eq=False)
class OpenAIModel:
    """A .pt file, or name, of openai-whisper."""

    name: str
    source: str

    @cached_property
    def model(self) -> Any:
        """openai-whisper's own, on a GPU where PyTorch has one."""
        import whisper

        return whisper.load_model(self.source)

    @property
    def half(self) -> bool:
        """Whether it computes in float16, as it does on a GPU."""
        return self.model.device.type == "cuda"

    @property
    def parameters(self) -> int:
        return sum(one.numel() for one in self.model.parameters())

    def unsupported(self, language: str) -> str | None:
        if language == "en" or self.model.is_multilingual:
            return None
        return f"it is English-only, and the clip is in {language}"

    def recognize(self, batch: ClipBatch) -> list[Output]:
        import torch

        whisper: Any = import_module("whisper")
        # One spectrogram at a time: the loudest frame of a batch would set the floor for all.
        mels = torch.stack(
            [whisper.log_mel_spectrogram(one, self.model.dims.n_mels) for one in batch.waveforms_BN]
        ).to(self.model.device)

        def read(mel: Any, prompt: str | None) -> list[Any]:
            options = whisper.DecodingOptions(
                language=batch.language,
                prompt=prompt,
                without_timestamps=True,
                fp16=self.half,
                sample_len=batch.max_tokens,
            )
            return whisper.decode(self.model, mel, options)

        results = read(mels, None) if not batch.previous else []
        for row, text in enumerate(batch.previous):  # it takes one prompt a call
            results += read(mels[[row]], text)
        return [
            text_output(
                one.text,
                tokens=len(one.tokens),
                mean_log_probability=one.avg_logprob,
                no_speech_probability=one.no_speech_prob,
            )
            for one in results
        ]

    def transcribe(self, batch: RecordingBatch) -> list[str] | None:
        """By its sequential algorithm, with its defaults."""
        whisper: Any = import_module("whisper")
        if not isinstance(batch.method, SequentialOptions):
            return None
        options = {"language": batch.language, "fp16": self.half}
        texts = [whisper.transcribe(self.model, one, **options) for one in batch.waveforms]
        return [one["text"].strip() for one in texts]


@dataclass(eq=False)
class FasterWhisperModel:
    """A CTranslate2 folder in faster-whisper; compute_type: such as float32 or int8."""

    name: str
    source: str
    compute_type: str = "default"

    @cached_property
    def model(self) -> Any:
        """faster-whisper's own, on a GPU where CTranslate2 finds one."""
        from faster_whisper import WhisperModel

        return WhisperModel(self.source, compute_type=self.compute_type)

    @property
    def parameters(self) -> int:
        """Number of parameters, by the weights' file: CTranslate2 does not tell."""
        return sum(leaf.size for leaf in jax.tree.leaves(load_checkpoint(self.source).params))

    def unsupported(self, language: str) -> str | None:
        known = self.model.supported_languages
        return None if language in known else f"its vocabulary lacks {language}"

    def recognize(self, batch: ClipBatch) -> list[Output]:
        """With its feature extractor, engine and tokenizer, without its loop over long audio."""
        from faster_whisper.tokenizer import Tokenizer

        model = self.model
        tokenizer = Tokenizer(
            model.hf_tokenizer,
            model.model.is_multilingual,
            task="transcribe",
            language=batch.language,
        )
        prompts = [
            model.get_prompt(
                tokenizer, tokenizer.encode(" " + text) if text else [], without_timestamps=True
            )
            for text in batch.previous or [""] * len(batch.waveforms_BN)
        ]
        features = [model.feature_extractor(one, padding=False) for one in batch.waveforms_BN]
        generated = model.model.generate(
            model.encode(np.stack(features)),
            prompts,
            beam_size=1,
            max_length=max(map(len, prompts)) + batch.max_tokens,
            suppress_blank=True,
            return_scores=True,
            return_no_speech_prob=True,
        )
        return [
            text_output(
                tokenizer.decode(one.sequences_ids[0]),
                tokens=len(one.sequences_ids[0]),
                mean_log_probability=one.scores[0],
                no_speech_probability=one.no_speech_prob,
            )
            for one in generated
        ]

    def transcribe(self, batch: RecordingBatch) -> list[str]:
        """With one beam and otherwise its defaults; chunked is its batched pipeline."""
        from faster_whisper import BatchedInferencePipeline

        options: dict[str, Any] = {"language": batch.language, "beam_size": 1}
        run = self.model.transcribe
        if isinstance(batch.method, ChunkedOptions):
            run = BatchedInferencePipeline(self.model).transcribe
            options["chunk_length"] = round(batch.method.chunk_length)
            options["batch_size"] = batch.batch_size
        segments = (run(one, **options)[0] for one in batch.waveforms)
        return ["".join(one.text for one in some).strip() for some in segments]


def text_output(text: str, **rest: Any) -> Output:
    """An output without spaces around its text."""
    return Output(text=text.strip(), compression_ratio=compression_ratio(text.strip()), **rest)


PEERS: Mapping[str, Callable[[str, str], Model]] = {
    "transformers": TransformersModel,
    "openai-whisper": OpenAIModel,
    "faster-whisper": FasterWhisperModel,
    "faster-whisper-int8": lambda name, source: FasterWhisperModel(name, source, "int8"),
}


def load_model(name: str, source: str, dtype: str, assistant: str | None = None) -> Model:
    """A model of this library, or LIBRARY:SOURCE of another one.

    Raises:
        InputError: the model cannot be used, or its library is not installed.
    """
    library, _, rest = source.partition(":")
    if library not in PEERS or not rest:
        recognizer = make_recognizer(load_checkpoint(source), dtype)
        if assistant is not None:
            recognizer = replace(recognizer, assistant=load_assistant(recognizer, assistant))
        return FlaxModel(name, source, recognizer)
    model = PEERS[library](name, rest)
    try:
        assert model.parameters  # loads it
    except ImportError as error:
        raise InputError(f"{source}: {library} is not installed ({error})") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{library} cannot load {Path(rest)}: {error}") from None
    return model
