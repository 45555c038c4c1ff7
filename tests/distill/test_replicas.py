"""A flipped bit on one of eight devices is found, named, and not saved."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_distil.config import OptimizerConfig
from flax_distil.data.loader import LoaderState
from flax_distil.distill.checkpoints import Checkpoints, RunProgress, bit_sums, check_replicas
from flax_distil.distill.step import initial_state
from flax_distil.errors import InputError
from flax_distil.parallel.mesh import make_mesh


def on_devices(array, sharding, spoilt=None):
    """`array` as a global one; the part on device number `spoilt` has its lowest bit flipped."""
    parts = []
    for number, (device, index) in enumerate(
        sharding.addressable_devices_indices_map(array.shape).items()
    ):
        part = np.array(array[index])
        if number == spoilt:
            part.view(np.uint32).reshape(-1)[-1] ^= 1
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


@pytest.mark.parametrize(("sizes", "spec"), [((8, 1, 1), ()), ((2, 4, 1), ("fsdp",))])
def test_a_flipped_bit_is_found(sizes, spec):
    mesh = make_mesh(*sizes)
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(8, 4)), random.normal(size=6)
    cut, whole = (NamedSharding(mesh, PartitionSpec(*one)) for one in (spec, ()))
    state = {"count": on_devices(np.array([3], np.int32), whole)}
    state |= {"kernel": on_devices(kernel.astype(np.float32), cut)}
    good = state | {"bias": on_devices(bias.astype(np.float32), whole)}
    sums = check_replicas(good, 7)
    assert sums == bit_sums(jax.tree.map(np.asarray, good))[0]  # the same on one device
    assert sums["count"] == 3
    assert sums["bias"] == bias.astype(np.float32).view(np.uint32).sum(dtype=np.uint32)
    spoilt = on_devices(bias.astype(np.float32), whole, 6)
    assert bit_sums(good | {"bias": spoilt})[1] == ["bias"]
    bad = good | {"kernel": on_devices(kernel.astype(np.float32), cut, 5)}
    with pytest.raises(InputError, match="at step 7 the copies of kernel on different devices"):
        check_replicas(bad, 7)


@pytest.mark.parametrize("best", [False, True])
def test_a_state_whose_copies_differ_is_not_saved(tmp_path, best):
    whole = NamedSharding(make_mesh(8, 1, 1), PartitionSpec())
    state = initial_state({"decoder": {"bias": np.ones(6, np.float32)}}, OptimizerConfig())
    state = jax.device_put(state, whole)
    spoilt = on_devices(np.ones(6, np.float32), whole, 3)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(InputError, match=r"at step 0 the copies of params\.decoder\.bias on"):
        checkpoints.save(
            state._replace(params={"decoder": {"bias": spoilt}}), RunProgress(LoaderState()), best
        )
    checkpoints.close()
    assert not list(tmp_path.glob("*/*"))


def test_one_device_has_no_copies():
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    assert bit_sums({"x": jax.device_put(np.ones(3, np.float32), whole)})[1] == []
