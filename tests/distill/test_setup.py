from flax_distil.config import ComputeConfig, DistillConfig
from flax_distil.distill.setup import make_train_spec
from flax_distil.parallel.mesh import make_mesh


def test_the_spec_is_complete(teacher, student, tmp_path):
    """What the step is compiled for, so that nothing is added to it later."""
    compute = ComputeConfig(fsdp=2, tensor=2, accumulation=2, vocabulary_chunk=5)
    config = DistillConfig("t", "s", tmp_path, batch_size=256, compute=compute)
    spec = make_train_spec(config, teacher.dims, student.dims, make_mesh(-1, 2, 2))
    assert (spec.data_shards, spec.accumulation, spec.vocabulary_chunk) == (4, 2, 5)
    assert spec.loss == config.loss
