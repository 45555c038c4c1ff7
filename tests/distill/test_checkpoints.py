"""What is on disk after a kill, a full disk, a change of mesh."""

import json
import resource
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_distil.config import OptimizerConfig
from flax_distil.data.loader import LoaderState
from flax_distil.distill.checkpoints import Checkpoints, RunProgress, has_checkpoints, read_params
from flax_distil.distill.step import initial_state
from flax_distil.errors import InputError
from flax_distil.parallel.mesh import make_mesh


def state_at(step, size=64):
    params = {"decoder": {"layers": {0: {"kernel": jnp.full((size, 8), float(step))}}}}
    return initial_state(params, OptimizerConfig())._replace(step=jnp.array(step))


def save_and_wait(checkpoints, state):
    checkpoints.save(state, RunProgress(LoaderState()))
    checkpoints.wait()


def test_everything_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    progress = RunProgress(
        LoaderState(1, 2, 3, {"0/1": [1, 2, 3, 4]}), best_wer=12.3456789, best_step=2, since_best=1
    )
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), replace(progress, since_best=step))
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)
    state, found = again.restore(state_at(0))
    again.close()
    assert found == replace(progress, since_best=3)
    assert jax.tree.structure(state) == jax.tree.structure(state_at(3))
    same = jax.tree.map(np.array_equal, state, state_at(3))
    assert all(jax.tree.leaves(same))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_restores_on_another_mesh(tmp_path):
    """From eight devices to four, which cut the kernel, and to one."""
    whole = NamedSharding(make_mesh(8, 1, 1), PartitionSpec())
    with_eight = jax.tree.map(lambda x: jax.device_put(x, whole), state_at(5))
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_and_wait(checkpoints, with_eight)
    for count in (4, 1):
        mesh = make_mesh(1, count, 1, devices=jax.devices()[:count])
        cut = lambda x, mesh=mesh: NamedSharding(
            mesh, PartitionSpec("fsdp") if x.ndim > 1 else PartitionSpec()
        )
        like = jax.tree.map(
            lambda x, cut=cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut(x)), state_at(0)
        )
        state, _ = checkpoints.restore(like)
        kernel = state.params["decoder"]["layers"][0]["kernel"]
        assert len(kernel.sharding.device_set) == count
        assert kernel.addressable_shards[0].data.size * count == kernel.size
        assert np.all(np.asarray(kernel) == 5)
    checkpoints.close()


@pytest.mark.parametrize(
    ("part", "named"),
    [("params", "params.decoder.layers.0.kernel"), ("rest", "rest.optimizer"), ("progress", "pro")],
)
def test_a_flipped_bit_on_the_disk_is_noticed(tmp_path, part, named):
    """In the middle of the numbers, which compression leaves as they are: they are random."""
    noise = lambda x: jax.random.normal(jax.random.key(1), x.shape) if x.ndim == 2 else x
    state = jax.tree.map(noise, state_at(1, 512))
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_and_wait(checkpoints, state)
    folder = tmp_path / "checkpoints" / "1"
    files = [path for path in (folder / part).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    place = content.index(b'"position": 0') + 12 if part == "progress" else len(content) // 2
    content[place] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match=f"1 is damaged: {named}.*cannot be what was saved"):
        checkpoints.restore(state_at(0, 512))
    if part == "params":
        with pytest.raises(InputError, match=f"1 is damaged: {named}"):
            read_params(tmp_path, state.params)
    checkpoints.close()


def test_a_checkpoint_without_sums_can_be_read(tmp_path):
    """As versions wrote it that took none."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_and_wait(checkpoints, state_at(1))
    written = tmp_path / "checkpoints" / "1" / "progress" / "metadata"
    values = json.loads(written.read_text())
    assert set(values.pop("sums")) >= {"progress", "params.decoder.layers.0.kernel", "rest.step"}
    written.write_text(json.dumps(values))
    state, progress = checkpoints.restore(state_at(0))
    checkpoints.close()
    assert (int(state.step), progress) == (1, RunProgress(LoaderState()))
    step, params = read_params(tmp_path, state.params)
    assert step == 1
    assert np.all(params["decoder"]["layers"][0]["kernel"] == 1)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, caplog, capfd):
    """One sentence, no traceback of Orbax's threads, and closing raises nothing more."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_at(1, 4096), RunProgress(LoaderState(position=1)))
    checkpoints.wait()
    full = state_at(2, 4096)
    noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), full.params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a full disk: writes fail
    try:
        with pytest.raises(
            InputError, match=r"be written to .*\(File too large\).* step 1 is intact"
        ):
            save_and_wait(checkpoints, full._replace(params=noise))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert capfd.readouterr().err == ""
    again = Checkpoints(tmp_path, keep=1)
    state, progress = again.restore(state_at(0, 4096))
    again.close()
    assert (int(state.step), progress.loader.position) == (1, 1)


def test_half_written_checkpoints_do_not_count(tmp_path):
    half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert not has_checkpoints(tmp_path)


def test_another_model_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_at(1), RunProgress(LoaderState()))
    checkpoints.wait()
    with pytest.raises(InputError, match=r"checkpoints/1 is damaged or of another model"):
        checkpoints.restore(state_at(0, size=32))
    checkpoints.close()


def test_parameters_of_another_layout_are_named_and_not_printed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_and_wait(checkpoints, state_at(1))
    stacked = {"decoder": {"layers": {"kernel": jnp.zeros((1, 64, 8))}}}
    with pytest.raises(InputError, match=r"compute\.scan_layers.*decoder\.layers") as told:
        checkpoints.restore(state_at(0)._replace(params=stacked))
    assert len(str(told.value)) < 400 + len(str(tmp_path))
    checkpoints.close()


def test_best_after_the_resumed_step_is_forgotten(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_at(6), RunProgress(LoaderState()), best=True)
    checkpoints.wait()
    checkpoints.forget_best_after(4)
    checkpoints.save(state_at(5), RunProgress(LoaderState()), best=True)
    checkpoints.close()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["5"]
