"""What training carries from update to update, and how a gradient becomes an update."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from flax_distil.config import OptimizerConfig
from flax_distil.model.spec import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All of it: nothing else has to be saved for the step to continue exactly.

    step: batches consumed, skipped ones included; the schedule follows it.
    params: the trainable ones, float32: `{"decoder": …}`, and `"encoder"` where it is trained.
    optimizer: moments of exactly these parameters.
    rng: key data of the seed, for dropout. All else that is random comes with the batch.
    skipped, skipped_in_row: non-finite updates that were not applied.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    rng: UInt32[Array, " 2"]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


def initial_state(params: Params, config: OptimizerConfig, seed: int) -> TrainState:
    """The state before the first update, of parameters or of their shapes."""
    zero = jnp.zeros((), jnp.int32)
    optimizer = adamw(config).init(params)
    return TrainState(zero, params, optimizer, jax.random.PRNGKey(seed), zero, zero)


def learning_rate(step: Int[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """Linear warm-up to the peak, then linear decay to 0 at `config.steps` (paper table 15), or
    whatever else `config.schedule` names.

    The first update has 1 / warmup_steps of the peak, not 0: no update is wasted.
    """
    if config.schedule == "constant":
        return jnp.full((), config.learning_rate)
    rising = (step + 1) / max(config.warmup_steps, 1)
    if config.schedule == "constant_with_warmup":
        return config.learning_rate * jnp.clip(rising, 0.0, 1.0)
    falling = (config.steps - step) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled decay; the learning rate is left to `apply_gradients`."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, partial(decayed, config=config)),
    )


def decayed(params: Params, config: OptimizerConfig) -> Any:
    """True for kernels and embeddings, False for biases, layer norms and what is frozen."""

    def one(path: tuple, _: Any) -> bool:
        frozen = config.freeze_embed_positions and path[-2].key == "positions"
        return path[-1].key in ("kernel", "embedding") and not frozen

    return jax.tree_util.tree_map_with_path(one, params)


def apply_gradients(
    state: TrainState, gradients: Params, finite: Bool[Array, ""], config: OptimizerConfig
) -> TrainState:
    """The next state; where `finite` is false, parameters and moments stay as they are."""
    updates, optimizer = adamw(config).update(gradients, state.optimizer, state.params)
    rate = learning_rate(state.step, config)
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
    params, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, optimizer),
        (state.params, state.optimizer),
    )
    return replace(
        state,
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
