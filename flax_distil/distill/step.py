"""One train step: state, teacher and batch in, state and metrics out.

The frozen encoder runs once, its output feeds teacher and student; the teacher runs outside the
differentiated function; only the trainable parameters have gradients and moments.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from flax_distil.audio.log_mel import log_mel
from flax_distil.audio.spec_augment import spec_augment
from flax_distil.config import AugmentConfig, LossConfig, OptimizerConfig
from flax_distil.data.batches import Batch
from flax_distil.distill.losses import (
    Losses,
    TeacherStates,
    hidden_mse,
    objective,
    vocabulary_losses,
)
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Dropout
from flax_distil.parallel.mesh import for_each_shard


@dataclass(frozen=True)
class TrainSpec:
    """All that decides the compiled step, static under jit; `setup.make_train_spec` builds it.

    layer_map: teacher layer for each student layer, for the MSE of hidden states.
    train_encoder: the student's encoder is trained too.
    own_encoder: the student's encoder is frozen and not the teacher's: both run.
    vocabulary_chunk: tokens of a device whose logits exist at a time; 0 is all of them.
    data_shards: into how many parts the mesh cuts a batch.
    seed: of dropout. All else that is random comes with the batch.
    stored_teacher: batches hold the teacher's final states, and its decoder does not run.
    """

    teacher: Spec
    student: Spec
    loss: LossConfig
    optimizer: OptimizerConfig
    layer_map: tuple[int, ...] = ()
    train_encoder: bool = False
    own_encoder: bool = False
    accumulation: int = 1
    vocabulary_chunk: int = 0
    data_shards: int = 1
    stored_teacher: bool = False
    augment: AugmentConfig | None = None
    dropout: float = 0.0
    seed: int = 0

    @property
    def shares_encoder(self) -> bool:
        """Whether the teacher's encoder is the student's: it runs once for both."""
        return not (self.train_encoder or self.own_encoder)

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's decoder runs: not for cross-entropy alone, nor if stored."""
        return not self.stored_teacher and bool(self.loss.kl or self.loss.mse)


class TrainState(NamedTuple):
    """All that has to be saved for training to continue exactly.

    step: batches consumed, skipped ones included; the schedule follows it.
    params: the trainable ones, float32: `{"decoder": …}`, and `"encoder"` if it is trained.
    optimizer: moments of exactly these parameters.
    skipped, skipped_in_row: updates that were not finite and not applied.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


class Frozen(NamedTuple):
    """Parameters that are read and never written.

    teacher: the whole teacher; if its decoder does not run, its encoder alone, and its embedding
        if batches hold its final states.
    student_encoder: the part of the student's encoder that is neither trained nor the teacher's:
        empty if the encoder is shared, all of an own one, the positions of a trained one.
    """

    teacher: Params
    student_encoder: Params


class Guide(NamedTuple):
    """What the student is compared with and computed from, outside of all differentiation.

    audio: audio states for the student, if its encoder is the teacher's. teacher: its final states.
    every: its hidden states after each layer.
    """

    audio: Array
    teacher: TeacherStates | None
    every: Any


def train_step(
    state: TrainState, frozen: Frozen, batch: Batch, spec: TrainSpec
) -> tuple[TrainState, dict[str, Array]]:
    """One update on a whole batch, in `spec.accumulation` micro-batches.

    Weights are shares of the batch's label tokens, so that micro-batches change memory alone. A
    loss or gradient that is not finite leaves parameters and moments unchanged and is counted.
    """
    tokens = jnp.maximum(jnp.sum(batch.weights), 1)
    shares = replace(batch, weights=batch.weights / tokens)

    def accumulate(sums: tuple[Losses, Params], given: tuple[Batch, Any]) -> tuple[Any, None]:
        (micro, keys), share = given, kl_share(state.step, spec)
        guide = teach(frozen, micro, spec)
        dropout = None if keys is None else Dropout(spec.dropout, keys)

        def loss(params: Params) -> tuple[Array, Losses]:
            return student_losses(params, frozen, guide, micro, spec, share, dropout)

        gradients, losses = jax.grad(loss, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, sums, (losses, gradients)), None

    zero = jnp.zeros((), jax.tree.leaves(state.params)[0].dtype)
    start = (Losses(zero, zero, zero), jax.tree.map(jnp.zeros_like, state.params))
    (losses, gradients), _ = jax.lax.scan(
        accumulate, start, micro_batches((shares, dropout_keys(state, batch, spec)), spec)
    )
    total, norm = objective(losses, spec.loss), optax.global_norm(gradients)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    after, norms = apply_gradients(state, gradients, finite, spec.optimizer)
    if spec.loss.kl_end is not None:
        losses = losses._replace(kl=losses.kl / kl_share(state.step, spec))
    return after, losses._asdict() | norms | {
        "loss": total,
        "gradient_norm": norm,
        "learning_rate": learning_rate(state.step, spec.optimizer),
        "tokens": jnp.sum(batch.weights),
        "skipped": after.skipped,
        "skipped_in_row": after.skipped_in_row,
    }


def dropout_keys(state: TrainState, batch: Batch, spec: TrainSpec) -> Array | None:
    """Key data of each row in this update, uint32 [B, 2]; None without dropout."""
    if not spec.dropout:
        return None
    key_2, rows_B = (
        jax.random.fold_in(jax.random.PRNGKey(spec.seed), state.step),
        jnp.arange(len(batch.tokens)),
    )
    return jax.vmap(partial(jax.random.fold_in, key_2))(rows_B)


def kl_share(step: Array, spec: TrainSpec) -> Array | None:
    """The KL's weight in this update, as a share of that at the start; None if it stays.

    It would reach `kl_end` one update after the last.
    """
    if spec.loss.kl_end is None:
        return None
    return 1 + (spec.loss.kl_end / spec.loss.kl - 1) * step / spec.optimizer.steps


def teach(frozen: Frozen, batch: Batch, spec: TrainSpec) -> Guide:
    """Runs the shared encoder and the teacher.

    Where the student is given a part of the positions, the encoder runs once for it and once for
    the teacher, who is given the whole window.
    """
    if batch.audio is not None:
        audio_BSD = given_BSD = jnp.asarray(batch.audio, spec.teacher.dtype)
    else:
        encoder, mel_BTM = spec.teacher.encoder(frozen.teacher["encoder"]), features(batch, spec)
        audio_BSD = given_BSD = encoder(mel_BTM)
        if batch.positions is not None and spec.shares_encoder:
            given_BSD = encoder(mel_BTM, jnp.asarray(batch.positions))
    if not (spec.stored_teacher or spec.asks_teacher):
        return Guide(given_BSD, None, None)
    params = frozen.teacher["decoder"]
    embedding_VD = params["tokens"]["embedding"]
    if spec.stored_teacher:
        assert batch.teacher_states is not None
        hidden_BLD = jnp.asarray(batch.teacher_states, spec.teacher.dtype)
        return Guide(given_BSD, TeacherStates(hidden_BLD, embedding_VD), None)
    decoder = spec.teacher.decoder(params)
    hidden_BLD, every_NBLD = decoder.hidden_states(jnp.asarray(batch.tokens), audio_BSD)
    return Guide(given_BSD, TeacherStates(hidden_BLD, embedding_VD), every_NBLD)


def features(batch: Batch, spec: TrainSpec) -> Float[Array, "B T M"]:
    """The log-mel of teacher and student, with SpecAugment's masks if it is on."""
    mel_BTM = log_mel(batch.waveforms, spec.teacher.dims.mels)
    if batch.keys is None or spec.augment is None:
        return mel_BTM
    return spec_augment(jnp.asarray(batch.keys), mel_BTM, jnp.asarray(batch.seconds), spec.augment)


def student_losses(
    params: Params,
    frozen: Frozen,
    guide: Guide,
    batch: Batch,
    spec: TrainSpec,
    kl_share: Array | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """The objective, to differentiate, and its parts: sums over the batch's label tokens.

    kl_share: a factor of the KL in both.
    """
    if spec.optimizer.freeze_embed_positions:
        frozen_positions = jax.lax.stop_gradient(params["decoder"]["positions"])
        params = params | {"decoder": params["decoder"] | {"positions": frozen_positions}}
    audio_BSD = guide.audio
    lengths_B = None if batch.positions is None else jnp.asarray(batch.positions)
    if not spec.shares_encoder:
        encoder = frozen.student_encoder | params.get("encoder", {})
        audio_BSD = spec.student.encoder(encoder)(features(batch, spec), lengths_B)
    student = spec.student.decoder(params["decoder"])
    tokens_BL, embedding_VD = jnp.asarray(batch.tokens), params["decoder"]["tokens"]["embedding"]
    embedding_GVD = for_each_shard(embedding_VD, spec.data_shards)
    embedded_BLD = look_up(embedding_GVD, tokens_BL).astype(spec.student.dtype)
    hidden_BLD, every_NBLD = student.hidden_states(
        tokens_BL, audio_BSD, embedded_BLD, dropout, lengths_B
    )
    weights_BL = jnp.asarray(batch.weights)
    factors_BL2 = None if batch.loss_weights is None else jnp.asarray(batch.loss_weights)
    of_parts_BL2 = factors_BL2
    if kl_share is not None:
        ones_BL2 = jnp.ones((*weights_BL.shape, 2)) if factors_BL2 is None else factors_BL2
        of_parts_BL2 = ones_BL2 * jnp.stack([kl_share, jnp.ones(())])[None, None]
    sums = vocabulary_losses(
        hidden_BLD,
        embedding_GVD,
        guide.teacher,
        jnp.asarray(batch.targets),
        weights_BL,
        spec.loss,
        spec.vocabulary_chunk,
        of_parts_BL2,
    )
    mse = jnp.zeros(())
    if spec.loss.mse:
        if factors_BL2 is not None:
            weights_BL = weights_BL * factors_BL2[..., 0]
        mse = hidden_mse(guide.every, every_NBLD, weights_BL, spec.layer_map)
    return sums.total + spec.loss.mse * mse, Losses(sums.kl, sums.ce, mse)


def evaluation_losses(
    params: Params, frozen: Frozen, batch: Batch, spec: TrainSpec
) -> Float[Array, "3"]:
    """KL at temperature 1, cross-entropy and weights, summed over a batch.

    The KL is 0 if the teacher's decoder is not in memory.
    """
    loss = LossConfig(kl=float(spec.asks_teacher), ce=1.0, temperature=1.0)
    spec = replace(spec, loss=loss, stored_teacher=False)

    def add(sums_3: Array, micro: Batch) -> tuple[Array, None]:
        losses = student_losses(params, frozen, teach(frozen, micro, spec), micro, spec)[1]
        return sums_3 + jnp.stack([losses.kl, losses.ce, jnp.sum(micro.weights)]), None

    return jax.lax.scan(add, jnp.zeros(3), micro_batches(batch, spec))[0]


def look_up(
    embedding_GVD: Float[Array, "G V D"], tokens_BL: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """The embeddings of tokens, each shard's from its own copy: see `for_each_shard`."""
    tokens_GBL = tokens_BL.reshape(len(embedding_GVD), -1, tokens_BL.shape[1])
    embedded_GBLD = jax.vmap(lambda x_VD, tokens: x_VD[tokens])(embedding_GVD, tokens_GBL)
    return embedded_GBLD.reshape(*tokens_BL.shape, -1)


def micro_batches(batch: Any, spec: TrainSpec) -> Any:
    """Rows as [accumulation, rows, …]: every k-th row, so that each stays on its device."""

    def split(rows: Array) -> Array:
        shape = (len(rows) // spec.accumulation, spec.accumulation, *rows.shape[1:])
        return rows.reshape(shape).swapaxes(0, 1)

    return jax.tree.map(split, batch)


# --- the update ---------------------------------------------------------------------------------


def initial_state(params: Params, config: OptimizerConfig) -> TrainState:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, adamw(config).init(params), zero, zero)


def learning_rate(step: Int[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """The learning rate of the update number `step`, counted from 0.

    Linear warm-up to the peak, then linear decay to 0 at `config.steps` (paper table 15), or what
    `config.schedule` names instead. The first update has 1 / warmup_steps of the peak, not 0: no
    update is wasted.
    """
    if config.schedule == "constant":
        return jnp.full((), config.learning_rate)
    rising = (step + 1) / max(config.warmup_steps, 1)
    if config.schedule == "constant_with_warmup":
        return config.learning_rate * jnp.clip(rising, 0.0, 1.0)
    falling = (config.steps - step) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def adamw(
    config: OptimizerConfig, rate: float | Float[Array, ""] = 0.0
) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled weight decay, at one update's learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, partial(decayed, config=config)),
        optax.scale_by_learning_rate(rate),
    )


def decayed(params: Params, config: OptimizerConfig) -> Any:
    """Which parameters decay: kernels and embeddings, not biases, layer norms and frozen ones."""

    def one(path: tuple, _: Any) -> bool:
        frozen = config.freeze_embed_positions and path[-2].key == "positions"
        return path[-1].key in ("kernel", "embedding") and not frozen

    return jax.tree_util.tree_map_with_path(one, params)


def apply_gradients(
    state: TrainState, gradients: Params, finite: Bool[Array, ""], config: OptimizerConfig
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and the norms of the parameters in it and of their update.

    Where `finite` is false, parameters and moments stay as they are.
    """
    transformation = adamw(config, learning_rate(state.step, config))
    updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
    params, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, updates), optimizer),
        (state.params, state.optimizer),
    )
    after = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
    norms = {"parameter_norm": optax.global_norm(params), "update_norm": optax.global_norm(updates)}
    return after, norms
