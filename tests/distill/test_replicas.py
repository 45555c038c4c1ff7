"""A flipped bit on one of eight devices is found, named, and not saved."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_distil.distill.replicas import check_replicas, differing
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
    assert differing(good, mesh) == []
    check_replicas(good, mesh, 7)
    assert differing(good | {"bias": on_devices(bias.astype(np.float32), whole, 6)}, mesh) == [
        "bias"
    ]
    bad = good | {"kernel": on_devices(kernel.astype(np.float32), cut, 5)}
    with pytest.raises(InputError, match="at step 7 the copies of kernel on different devices"):
        check_replicas(bad, mesh, 7)


def test_one_device_has_no_copies():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert differing({"x": jax.numpy.ones(3)}, mesh) == []
