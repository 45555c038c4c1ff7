import pytest

from flax_distil.parallel.chips import free_memory, published_peak


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v2", 23e12, 23e12 / 6),
        ("TPU v4", 275e12, 275e12 / 6),
        ("TPU v5 lite", 197e12, 197e12 / 6),
        ("TPU v5", 459e12, 459e12 / 6),
        ("TPU v5p", 459e12, 459e12 / 6),
        ("TPU v6 lite", 918e12, 918e12 / 6),
        ("TPU v6e", 918e12, 918e12 / 6),
        ("TPU7x", 1153.5e12, 1153.5e12 / 6),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 67e12),
        ("NVIDIA A10G", 70e12, 31.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla V100-SXM2-16GB", 15.7e12, 15.7e12),
        ("Tesla T4", 8.1e12, 8.1e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("TPU v4 lite", None, None),
        ("cpu", None, None),
    ],
)
def test_known_devices_have_their_published_peak(kind, bfloat16, float32):
    assert published_peak(kind, "bfloat16") == bfloat16
    assert published_peak(kind, "float32") == float32


def test_free_memory_is_what_the_container_leaves(tmp_path):
    """Its limit, less what it uses, of which cached files can be given back."""
    machine = free_memory(tmp_path)
    assert machine > 2**28
    for name, text in (
        ("max", "1000000\n"),
        ("current", "600000\n"),
        ("stat", "inactive_file 1000\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 401_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == pytest.approx(machine, rel=0.5)
