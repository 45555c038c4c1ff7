"""Recognition on every chip of a process: parameters replicated, clips divided.

A search ends when the last of its clips has ended. So each chip searches its own clips, in a loop
of its own, and the chips do not communicate.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_distil.parallel.mesh import BATCH, data_shards, in_mesh, make_mesh, replicated, within


def replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """Parameters on every one of `devices`; functions `by_clip` then divide their clips over them.

    devices: all of this process's. CPU devices share one memory and its cores: without
        `devices`, parameters stay as they are on them.
    """
    if devices is None:
        devices = jax.local_devices()
        if devices[0].platform == "cpu":
            return tree
    return jax.device_put(tree, replicated(make_mesh(devices=devices)))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that parameters are `replicate`d on; None where they are on one device."""
    placed = getattr(next(iter(jax.tree.leaves(tree)), None), "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) else None  # pyright: ignore


def chips_of(tree: Any) -> int:
    """The number of chips that clips are divided over."""
    mesh = mesh_of(tree)
    return 1 if mesh is None else data_shards(mesh)


def by_clip(static: tuple[str, ...], whole: tuple[str, ...] = ("params", "head_DV")) -> Any:
    """Compiles a function of independent clips.

    The first of `whole` has the parameters: the work is divided over the devices that hold them.

    Each array but those in `whole` has a row a clip, or is a number that all share; each result has
    a row a clip. Clips that do not divide over the chips are padded with copies of the last one.

    static: names of arguments that decide the program, as of `jax.jit`.
    """

    def compile(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def divided(*args: Any, **kwargs: Any) -> Any:
            if not in_mesh():
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            fixed = {name: value for name, value in given.items() if name in static}
            shared = {name: given[name] for name in whole if name in given}
            arrays = {n: x for n, x in given.items() if n not in fixed and n not in shared}
            rows = next(len(leaf) for leaf in jax.tree.leaves(arrays) if leaf.ndim)
            missing = -rows % data_shards(jax.sharding.get_abstract_mesh())  # pyright: ignore
            if missing:
                arrays = jax.tree.map(lambda leaf: pad_rows(leaf, missing), arrays)
            places = jax.tree.map(lambda leaf: BATCH if leaf.ndim else PartitionSpec(), arrays)
            alone = jax.shard_map(
                lambda shared, arrays: function(**fixed, **shared, **arrays),
                in_specs=(PartitionSpec(), places),
                out_specs=BATCH,
                check_vma=False,
            )
            return jax.tree.map(lambda leaf: leaf[:rows], alone(shared, arrays))

        program = jax.jit(divided, static_argnames=static)

        def placed(call: Callable) -> Callable:
            def called(*args: Any, **kwargs: Any) -> Any:
                mesh = mesh_of(signature.bind(*args, **kwargs).arguments[whole[0]])
                with nullcontext() if mesh is None else within(mesh):
                    return call(*args, **kwargs)

            return wraps(function)(called)

        called: Any = placed(program)
        called.trace = placed(program.trace)
        return called

    return compile


def pad_rows(leaf: Array, missing: int) -> Array:
    """More rows like the last one; numbers stay."""
    more = [(0, missing), *[(0, 0)] * (leaf.ndim - 1)]
    return jnp.pad(leaf, more, mode="edge") if leaf.ndim else leaf
