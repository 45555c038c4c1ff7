from types import SimpleNamespace

import pytest

from flax_distil.errors import InputError
from flax_distil.parallel.mesh import make_mesh
from flax_distil.plan import topology
from flax_distil.plan.topology import tpu_slice


@pytest.mark.parametrize(
    ("name", "chips", "layout", "host_chips"),
    [
        ("v4-8", 4, "2x2x1", 4),
        ("v4-32", 16, "2x2x4", 4),
        ("v5e-4", 4, "2x2", 4),
        ("v5e-8", 8, "2x4", 8),
        ("v5litepod-16", 16, "4x4", 4),
        ("v5e-256", 256, "16x16", 4),
        ("v5p-64", 32, "2x4x4", 4),
        ("v6e-8", 8, "2x4", 8),
        ("v6e-16", 16, "4x4", 4),
        ("v4-512", 256, "4x8x8", 4),
    ],
)
def test_slices_have_google_s_chips_layout_and_hosts(name, chips, layout, host_chips):
    found = tpu_slice(name)
    assert (found.chips, found.layout, found.host_chips) == (chips, layout, host_chips)


def test_a_mesh_on_slices_of_several_hosts():
    """Axes that are a part of the torus's, and a tensor axis beyond a host's four chips."""
    if not topology.libtpu_version():
        pytest.skip("libtpu has wheels for x86-64 Linux alone")
    for name, sizes in (("v6e-16", (8, 2, 1)), ("v4-128", (32, 2, 1)), ("v4-32", (4, 1, 4))):
        mesh = make_mesh(*sizes, topology.devices(tpu_slice(name)))
        assert mesh.devices.shape == sizes
        assert len(set(mesh.devices.flat)) == mesh.size
    with pytest.raises(InputError, match=r"2 × 1 × 8: the tensor axis crosses hosts, .*"):
        make_mesh(2, 1, 8, topology.devices(tpu_slice("v4-32")))
    two = [SimpleNamespace(platform="tpu", process_index=n, slice_index=n) for n in range(2)]
    with pytest.raises(InputError, match="a mesh is for one TPU slice and 2 are available"):
        make_mesh(devices=two)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v3-8", "v3-8 is not a TPU slice that can be planned: name one of v4, v5e, v5p, v6e"),
        ("v4", "such as v4-8 or v5e-256"),
        ("v4-4", "v4-4 would have 2 chips: planned are 4, 8, 16, … 2048, so v4-8 to v4-4096"),
        ("v5e-12", "v5e-12 would have 12 chips"),
        ("v6e-512", "so v6e-4 to v6e-256"),
    ],
)
def test_what_is_no_slice_is_said(name, complaint):
    with pytest.raises(InputError, match=complaint):
        tpu_slice(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("Unknown backend: 'tpu'")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(topology, "libtpu_version", lambda: None)
    with pytest.raises(InputError, match=r"pip install 'flax-distil\[tpu\]'"):
        topology.devices(tpu_slice("v5e-8"))
