"""Standard error stays clean where libtpu is installed and no TPU is there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flax_distil.parallel.platform import ACCELERATORS, name_platform


@pytest.fixture
def unnamed(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("JAX_PLATFORM", "TPU_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("flax_distil.parallel.platform.find_spec", lambda _: True)


def test_the_cpu_is_named_where_nothing_else_is(unnamed, tmp_path):
    name_platform(tmp_path)
    assert os.environ.pop("JAX_PLATFORMS") == "cpu"


@pytest.mark.parametrize("file", ["accel0", "vfio/0", "nvidia0", "dxg", "kfd"])
def test_accelerators_are_left_to_jax(unnamed, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    name_platform(tmp_path)
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize(
    "variable", ["TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT", "JAX_PLATFORMS"]
)
def test_what_is_asked_for_wins(unnamed, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    name_platform(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") in (None, "1")


@pytest.mark.skipif(
    find_spec("libtpu") is None or any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS),
    reason="no libtpu, or an accelerator is here",
)
@pytest.mark.parametrize("order", ["name_platform(); import jax", "import jax; name_platform()"])
def test_libtpu_is_silent(unnamed, order):
    code = f"from flax_distil.parallel.platform import name_platform; {order}; jax.devices()"
    alone = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # or else its lock would silence it
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, check=True)
    assert done.stderr == b""
