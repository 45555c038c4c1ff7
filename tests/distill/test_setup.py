from flax_distil.config import ComputeConfig, DistillConfig
from flax_distil.data.stored_teacher import StoredForm
from flax_distil.distill.setup import make_train_spec
from flax_distil.parallel.mesh import make_mesh


def test_the_plan_is_whole(teacher, student, tmp_path):
    """What the step is compiled for, so that nothing is added to it later."""
    compute = ComputeConfig(fsdp=2, tensor=2, accumulation=2, vocabulary_chunk=5)
    config = DistillConfig("t", "s", tmp_path, compute=compute)
    mesh, form = make_mesh(-1, 2, 2), StoredForm(width=teacher.dims.width)
    train_spec = make_train_spec(config, teacher.dims, student.dims, mesh, form)
    assert (train_spec.data_shards, train_spec.stored) == (4, form)
    assert (train_spec.accumulation, train_spec.vocabulary_chunk, train_spec.loss) == (
        2,
        5,
        config.loss,
    )
