import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_distil.errors import InputError
from flax_distil.model.dims import PUBLISHED
from flax_distil.model.spec import HALVES, Spec
from flax_distil.parallel.mesh import (
    check_batch,
    check_heads,
    data_shards,
    in_mesh,
    make_mesh,
    on_each_device,
    shardings,
    within,
)

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (pretended) devices")


def specs(mesh, name="base", min_elements=1 << 16, scan=False):
    params = Spec(PUBLISHED[name], scan_layers=HALVES if scan else ()).abstract()
    placed = shardings(params, mesh, min_elements)["decoder"]
    return jax.tree.map(lambda one: one.spec, placed)


def test_mesh_takes_all_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert data_shards(make_mesh(-1, 4, 2)) == 4
    with pytest.raises(InputError, match="2 × 3 × 1 is for 6 devices and 8 are here"):
        make_mesh(-1, 3, 1)
    with pytest.raises(InputError, match="each size must be 1 or more"):
        make_mesh(0, 1, 1)


def test_a_function_runs_on_each_device_s_clips_and_heads():
    mesh = make_mesh(2, 2, 2)
    x_BHK = jax.random.normal(jax.random.key(0), (8, 4, 3))
    shapes = []

    def part(x_BHK):
        shapes.append(x_BHK.shape)
        return 2 * x_BHK

    def doubled(x_BHK):
        assert in_mesh()
        return on_each_device(part, x_BHK)

    def traced(x_BHK):
        with within(mesh):
            return doubled(x_BHK)

    assert not in_mesh()
    placed = jax.device_put(x_BHK, NamedSharding(mesh, P(("data", "fsdp"), "tensor")))
    np.testing.assert_array_equal(jax.jit(traced)(placed), 2 * x_BHK)
    assert shapes == [(2, 2, 3)]


def test_batch_has_to_divide():
    mesh = make_mesh(-1, 2, 1)
    check_batch(256, mesh)
    message = "batch 250 does not divide over 8 data shards: use 248 or 256"
    with pytest.raises(InputError, match=message):
        check_batch(250, mesh)
    with pytest.raises(InputError, match="batch 4 does not divide over 8 data shards: use 8"):
        check_batch(4, mesh)
    with pytest.raises(InputError, match="8 data shards of 4 micro-batches each: use 224 or 256"):
        check_batch(248, mesh, accumulation=4)


def test_data_alone_replicates():
    assert set(jax.tree.leaves(specs(make_mesh()), is_leaf=lambda x: isinstance(x, P))) <= {
        P(), P(None), P(None, None), P(None, None, None),
    }  # fmt: skip


def test_fsdp_cuts_the_largest_dimension_of_big_arrays():
    found = specs(make_mesh(1, 8, 1))
    layer = found["layers"][0]
    assert layer["feed_forward"]["up"]["kernel"] == P(None, "fsdp")
    assert layer["feed_forward"]["down"]["kernel"] == P("fsdp", None)
    assert layer["feed_forward"]["up"]["bias"] == P(None)
    assert found["tokens"]["embedding"] == P(None, "fsdp")  # 51,865 is odd


def test_tensor_cuts_heads_channels_and_vocabulary():
    found = specs(make_mesh(2, 2, 2), "base.en")
    layer = found["layers"][3]
    for name in ("query", "key", "value"):
        assert layer["cross_attention"][name]["kernel"] == P("fsdp", "tensor")
    assert layer["cross_attention"]["query"]["bias"] == P("tensor")
    assert layer["cross_attention"]["out"]["kernel"] == P("tensor", "fsdp")
    assert layer["cross_attention"]["out"]["bias"] == P(None)
    assert layer["feed_forward"]["down"]["kernel"] == P("tensor", "fsdp")
    assert found["tokens"]["embedding"] == P("tensor", "fsdp")
    scanned = specs(make_mesh(2, 2, 2), "base.en", scan=True)["layers"]
    assert scanned["feed_forward"]["up"]["kernel"] == P(None, "fsdp", "tensor")


def test_what_does_not_divide_is_named_with_both_sizes():
    mesh = make_mesh(1, 8, 1)
    with pytest.raises(InputError, match=r"a\.b has no dimension of 9 × 7 .* over 8 fsdp shards"):
        shardings({"a": {"b": np.zeros((9, 7))}}, mesh, min_elements=1)
    mesh = make_mesh(1, 1, 8)
    with pytest.raises(InputError, match=r"up\.kernel has 12 channels, .* over 8 tensor shards"):
        shardings({"up": {"kernel": np.zeros((8, 12))}}, mesh)
    with pytest.raises(InputError, match=r"decoder.* 6 heads, .* over 8 tensor shards: use 1, 2"):
        check_heads({"encoder": 8, "decoder": 6}, mesh)


def test_smallest_and_largest_fit_the_usual_meshes():
    for name in ("tiny", "large-v3-turbo"):
        params = Spec(PUBLISHED[name], scan_layers=HALVES).abstract()
        for sizes in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
            shardings(params, make_mesh(*sizes))
