"""What training carries from update to update, and how a gradient becomes an update."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from flax_distil.config import OptimizerConfig
from flax_distil.model.spec import Params


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
