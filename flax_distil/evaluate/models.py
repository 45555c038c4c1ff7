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


@runtime_checkable
class Model(Protocol):
    """A model that transcribes clips of at most 30 s, and recordings of any length."""

    name: str
    source: str

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        ...

    def unsupported(self, language: str) -> str | None:
        """Why it cannot transcribe a language; None where it can."""
        ...

    def recognize(
        self,
        waveforms_BN: Float32[np.ndarray, "B N"],
        language: str,
        previous: Sequence[str],
        max_tokens: int,
    ) -> list[Output]:
        """Greedy transcripts of windows of 30 s, without timestamps.

        previous: text before each clip, as its prompt; () for none.
        """
        ...

    def transcribe(
        self, waveforms: Sequence[np.ndarray], language: str, method: LongForm, batch_size: int
    ) -> list[str] | None:
        """Transcripts of recordings; None where the library lacks the method."""
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
        """Why it cannot transcribe a language; None where it can."""
        return self.recognizer.tokens.unsupported(language)

    def recognize(
        self,
        waveforms_BN: Float32[np.ndarray, "B N"],
        language: str,
        previous: Sequence[str] = (),
        max_tokens: int = 224,
    ) -> list[Output]:
        """Greedy transcripts of windows of 30 s, without timestamps."""
        model, options = self.recognizer, DecodeOptions(max_tokens=max_tokens)
        tokens = model.tokens
        start = prepare(model, options, len(waveforms_BN), language)
        states = encode_audio(model, pad_batch(waveforms_BN))
        detected: list[str] | list[None] = [None] * len(waveforms_BN)
        if tokens.multilingual and not previous:
            detected = likeliest_languages(model, states.model_BSD)[: len(waveforms_BN)]
        windows = [
            Window(start.language, tuple(tokens.encode(" " + text)) if text else ())
            for text in previous or [""] * len(waveforms_BN)
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

    def transcribe(
        self, waveforms: Sequence[np.ndarray], language: str, method: LongForm, batch_size: int
    ) -> list[str]:
        """Transcripts of recordings, whose windows share batches."""
        finished = {
            number: transcript.text.strip()
            for number, _, transcript in transcribe_all(
                self.recognizer,
                waveforms,
                long_form=method,
                language=language,
                batch_size=batch_size,
            )
            if transcript is not None
        }
        return [finished[number] for number in range(len(waveforms))]


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
        """Number of parameters."""
        return self.pipeline.model.num_parameters()

    def unsupported(self, language: str) -> str | None:
        """Why it cannot transcribe a language; None where it can."""
        known = getattr(self.pipeline.model.generation_config, "lang_to_id", {"<|en|>": 0})
        return None if f"<|{language}|>" in known else f"its vocabulary lacks {language}"

    def _options(self, language: str) -> dict[str, Any]:
        multilingual = self.pipeline.model.generation_config.is_multilingual
        return {"language": language, "task": "transcribe"} if multilingual else {}

    def recognize(
        self,
        waveforms_BN: Float32[np.ndarray, "B N"],
        language: str,
        previous: Sequence[str] = (),
        max_tokens: int = 224,
    ) -> list[Output]:
        """Greedy transcripts of windows of 30 s, without timestamps."""
        model, tokenizer = self.pipeline.model, self.pipeline.tokenizer

        def generate(waveforms: Sequence[np.ndarray], **prompt: Any) -> list[str]:
            features = self.pipeline.feature_extractor(
                list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt"
            ).input_features.to(model.device)
            ids = model.generate(
                features,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                **self._options(language),
                **prompt,
            )
            return tokenizer.batch_decode(ids, skip_special_tokens=True)

        if previous:  # it takes one prompt a call
            prompts = (tokenizer.get_prompt_ids(text, return_tensors="pt") for text in previous)
            texts = [
                generate([waveform], prompt_ids=ids.to(model.device))[0]
                for waveform, ids in zip(waveforms_BN, prompts, strict=True)
            ]
        else:
            texts = generate(list(waveforms_BN))
        return [text_output(text) for text in texts]

    def transcribe(
        self, waveforms: Sequence[np.ndarray], language: str, method: LongForm, batch_size: int
    ) -> list[str]:
        """Transcripts of recordings; its defaults but for one beam."""
        options: dict[str, Any] = {"return_timestamps": True}
        if isinstance(method, ChunkedOptions):
            options = {"chunk_length_s": method.chunk_length, "batch_size": batch_size}
        generate = {"num_beams": 1, **self._options(language)}
        return [
            self.pipeline(one.copy(), generate_kwargs=generate, **options)["text"].strip()
            for one in waveforms
        ]


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
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(one.numel() for one in self.model.parameters())

    def unsupported(self, language: str) -> str | None:
        """Why it cannot transcribe a language; None where it can."""
        if language == "en" or self.model.is_multilingual:
            return None
        return f"it is English-only, and the clip is in {language}"

    def recognize(
        self,
        waveforms_BN: Float32[np.ndarray, "B N"],
        language: str,
        previous: Sequence[str] = (),
        max_tokens: int = 224,
    ) -> list[Output]:
        """Greedy transcripts of windows of 30 s, without timestamps."""
        import torch

        whisper: Any = import_module("whisper")
        # One spectrogram at a time: the loudest frame of a batch would set the floor for all.
        mels = [whisper.log_mel_spectrogram(one, self.model.dims.n_mels) for one in waveforms_BN]
        options: dict[str, Any] = {
            "language": language,
            "without_timestamps": True,
            "fp16": self.model.device.type == "cuda",
            "sample_len": max_tokens,
        }
        groups: Sequence[tuple[list[Any], dict[str, Any]]] = (
            [([mel], {"prompt": text}) for mel, text in zip(mels, previous, strict=True)]
            if previous
            else [(mels, {})]
        )
        return [
            text_output(
                one.text,
                tokens=len(one.tokens),
                mean_log_probability=one.avg_logprob,
                no_speech_probability=one.no_speech_prob,
            )
            for group, prompt in groups
            for one in whisper.decode(
                self.model,
                torch.stack(group).to(self.model.device),
                whisper.DecodingOptions(**options, **prompt),
            )
        ]

    def transcribe(
        self, waveforms: Sequence[np.ndarray], language: str, method: LongForm, batch_size: int
    ) -> list[str] | None:
        """Transcripts of recordings by its sequential algorithm, with its defaults."""
        whisper: Any = import_module("whisper")
        if not isinstance(method, SequentialOptions):
            return None
        half = self.model.device.type == "cuda"
        return [
            whisper.transcribe(self.model, one, language=language, fp16=half)["text"].strip()
            for one in waveforms
        ]


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
        """Why it cannot transcribe a language; None where it can."""
        known = self.model.supported_languages
        return None if language in known else f"its vocabulary lacks {language}"

    def recognize(
        self,
        waveforms_BN: Float32[np.ndarray, "B N"],
        language: str,
        previous: Sequence[str] = (),
        max_tokens: int = 224,
    ) -> list[Output]:
        """Greedy transcripts of windows of 30 s, without timestamps: its feature extractor, engine
        and tokenizer, without its loop over long audio."""
        from faster_whisper.tokenizer import Tokenizer

        model = self.model
        tokenizer = Tokenizer(
            model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=language
        )
        prompts = [
            model.get_prompt(
                tokenizer, tokenizer.encode(" " + text) if text else [], without_timestamps=True
            )
            for text in previous or [""] * len(waveforms_BN)
        ]
        features = [model.feature_extractor(one, padding=False) for one in waveforms_BN]
        generated = model.model.generate(
            model.encode(np.stack(features)),
            prompts,
            beam_size=1,
            max_length=max(map(len, prompts)) + max_tokens,
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

    def transcribe(
        self, waveforms: Sequence[np.ndarray], language: str, method: LongForm, batch_size: int
    ) -> list[str]:
        """Transcripts of recordings with one beam and otherwise its defaults; chunked is its
        batched pipeline."""
        from faster_whisper import BatchedInferencePipeline

        options: dict[str, Any] = {"language": language, "beam_size": 1}
        run = self.model.transcribe
        if isinstance(method, ChunkedOptions):
            run = BatchedInferencePipeline(self.model).transcribe
            options |= {"chunk_length": round(method.chunk_length), "batch_size": batch_size}
        return ["".join(part.text for part in run(one, **options)[0]).strip() for one in waveforms]


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
