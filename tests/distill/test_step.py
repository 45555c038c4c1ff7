"""The step against PyTorch on the same small models, and what it promises about frozen parts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_whisper import losses_of

from flax_distil.audio.log_mel import log_mel
from flax_distil.config import AugmentConfig, LossConfig
from flax_distil.distill.setup import split_parameters, whole_student
from flax_distil.distill.step import (
    decayed,
    initial_state,
    learning_rate,
    student_losses,
    teach,
    train_step,
)
from flax_distil.model.spec import HALVES
from flax_distil.model.student import init_student
from flax_distil.model.weights import to_hf


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch()


@pytest.fixture(scope="module")
def state(train_spec, parameters):
    return initial_state(parameters[0], train_spec.optimizer)


def torch_model(checkpoint):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    # PyTorch's padding row has no gradient: let it be one that no batch contains
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special = dict.fromkeys(names, checkpoint.dims.vocab - 1)
    model = WhisperForConditionalGeneration(WhisperConfig(**checkpoint.config | special))
    tensors = {k: torch.tensor(v) for k, v in to_hf(checkpoint.dims, checkpoint.params).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], [])
    model.tie_weights()
    return model.eval()


def torch_loss(teacher, student, batch, config, layer_map):
    """The paper's formula over Transformers' own modules."""
    mel = torch.tensor(np.array(log_mel(batch.waveforms, 80))).swapaxes(1, 2)
    tokens, targets, weights = (
        torch.tensor(np.asarray(a)) for a in (batch.tokens, batch.targets, batch.weights)
    )
    layers = {}  # transformers gives the last state after the final norm: hook the layers
    for name, model in (("teacher", teacher), ("student", student)):
        for index, layer in enumerate(model.model.decoder.layers):
            layer.register_forward_hook(
                lambda _m, _i, out, key=(name, index): layers.__setitem__(
                    key, out[0] if isinstance(out, tuple) else out
                )
            )
    with torch.no_grad():
        wanted = teacher(input_features=mel, decoder_input_ids=tokens.long()).logits
    logits = student(input_features=mel, decoder_input_ids=tokens.long()).logits
    t = config.temperature
    kl = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(wanted / t, -1), reduction="none")
    ce = F.cross_entropy(
        logits.swapaxes(1, 2),
        targets.long(),
        reduction="none",
        label_smoothing=config.label_smoothing,
    )
    mse = sum(
        ((layers["student", own] - layers["teacher", other]) ** 2).mean(-1)
        for own, other in enumerate(layer_map)
    )
    parts = [(part * weights).sum() / weights.sum() for part in (t**2 * kl.sum(-1), ce, mse)]
    return parts, config.kl * parts[0] + config.ce * parts[1] + config.mse * parts[2]


@pytest.fixture(scope="module")
def value_and_gradient(quick_jit, train_spec, parameters, batch):
    def loss(params, frozen):
        total, _ = student_losses(
            params, frozen, teach(frozen, batch, train_spec), batch, train_spec
        )
        return total / jnp.sum(batch.weights)

    compiled = quick_jit(jax.value_and_grad(loss))
    return lambda params: compiled(params, parameters[1])


def test_loss_and_gradients_are_pytorchs(
    value_and_gradient, train_spec, parameters, batch, teacher, student
):
    """Float32 on both sides: 1e-5."""
    value, gradients = value_and_gradient(parameters[0])
    model = torch_model(student)
    _, expected = torch_loss(
        torch_model(teacher), model, batch, train_spec.loss, train_spec.layer_map
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    ours = to_hf(student.dims, student.params | gradients)
    theirs = {name: p.grad for name, p in model.named_parameters() if "decoder" in name}
    assert len(theirs) == len(jax.tree.leaves(gradients))
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5, err_msg=name)
        assert np.abs(ours[name]).max() > 1e-4, name


def test_parts_are_pytorchs(step, train_spec, state, parameters, batch, teacher, student):
    _, metrics = step(state, parameters[1], batch)
    parts, total = torch_loss(
        torch_model(teacher), torch_model(student), batch, train_spec.loss, train_spec.layer_map
    )
    ours = [metrics[name] for name in ("kl", "ce", "mse", "loss")]
    np.testing.assert_allclose(ours, [part.item() for part in (*parts, total)], rtol=1e-5)
    assert metrics["tokens"] == batch.weights.sum()


def test_update_is_pytorchs_adamw(value_and_gradient, step, train_spec, state, parameters, batch):
    """Two updates, clipped, warming up, against torch.optim.AdamW fed with our gradients."""
    weights = [torch.nn.Parameter(torch.tensor(np.array(p))) for p in jax.tree.leaves(state.params)]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ours = state
    for _ in range(2):
        _, gradients = value_and_gradient(ours.params)
        for weight, gradient in zip(weights, jax.tree.leaves(gradients), strict=True):
            weight.grad = torch.tensor(np.array(gradient))
        torch.nn.utils.clip_grad_norm_(weights, train_spec.optimizer.max_gradient_norm)
        optimizer.param_groups[0]["lr"] = float(learning_rate(ours.step, train_spec.optimizer))
        optimizer.step()
        ours, _ = step(ours, parameters[1], batch)
    for weight, leaf in zip(weights, jax.tree.leaves(ours.params), strict=True):
        np.testing.assert_allclose(leaf, weight.detach(), atol=1e-5)


def test_only_trainable_parameters_have_moments(state, teacher, student):
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
    decoder = count(student.params["decoder"])
    assert set(state.params) == {"decoder"}
    assert count(state.optimizer) == 2 * decoder


def test_encoder_runs_once(quick_jit, train_spec, state, parameters, batch):
    """Teacher and student share one encoder pass: two convolutions in the program, not four."""
    program = quick_jit(partial(train_step, spec=train_spec)).lower(state, parameters[1], batch)
    assert program.as_text().count("stablehlo.convolution") == 2


def test_micro_batches_are_one_batch(quick_jit, step, train_spec, state, parameters, batch):
    """Only the order of float32 sums differs: 1e-5 of gradient-sized numbers."""
    cut = quick_jit(partial(train_step, spec=replace(train_spec, accumulation=4)))
    whole, metrics = step(state, parameters[1], batch)
    parts, cut_metrics = cut(state, parameters[1], batch)
    for name in ("loss", "kl", "ce", "mse", "gradient_norm", "tokens", "learning_rate"):
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
    moments = lambda s: jax.tree.leaves(s.optimizer[1].mu)
    for a, b in zip(moments(whole), moments(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    assert parts.step == whole.step == 1


def test_non_finite_batches_change_nothing(step, state, parameters, batch):
    after, _ = step(state, parameters[1], batch)
    bad = replace(batch, weights=np.where(batch.weights > 0, np.nan, 0).astype(np.float32))
    skipped, metrics = step(after, parameters[1], bad)
    same = jax.tree.map(np.array_equal, (skipped.params, skipped.optimizer),
                        (after.params, after.optimizer))  # fmt: skip
    assert all(jax.tree.leaves(same))
    assert (skipped.step, skipped.skipped, skipped.skipped_in_row) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"])
    twice, _ = step(skipped, parameters[1], bad)
    assert (twice.skipped, twice.skipped_in_row) == (2, 2)
    well, metrics = step(twice, parameters[1], batch)
    assert (well.skipped, well.skipped_in_row) == (2, 0)
    assert np.isfinite(metrics["loss"])


def test_all_padding_is_harmless(step, state, parameters, batch):
    _, metrics = step(state, parameters[1], replace(batch, weights=0 * batch.weights))
    assert metrics["loss"] == metrics["gradient_norm"] == 0


def test_a_batch_is_memorised(step, state, parameters, batch):
    losses = []
    for _ in range(20):
        state, metrics = step(state, parameters[1], batch)
        losses.append(float(metrics["ce"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("loss", "encoder_layers", "train_encoder"),
    [
        (LossConfig(kl=0.0, ce=1.0, label_smoothing=0.1), None, False),
        (LossConfig(kl=1.0, ce=0.0, temperature=3.5), None, False),
        (LossConfig(mse=0.1), 1, False),  # as 16 + 2: an encoder of its own, frozen
        (LossConfig(kl=1.0, ce=0.8), None, True),
    ],
)
def test_every_objective_has_pytorchs_gradients(
    quick_jit, train_spec, batch, teacher, loss, encoder_layers, train_encoder
):
    """Value and gradients of all that is trained, float32: 1e-5."""
    student = init_student(teacher, 2, encoder_layers)
    one = replace(
        train_spec,
        loss=loss,
        student=replace(train_spec.student, dims=student.dims),
        train_encoder=train_encoder,
        own_encoder=bool(encoder_layers),
    )
    trainable, frozen = split_parameters(one, teacher.params, student.params)
    assert set(trainable) == ({"encoder", "decoder"} if train_encoder else {"decoder"})
    assert len(frozen.student_encoder.get("layers", ())) == (encoder_layers or 0)
    assert ("decoder" in frozen.teacher) == bool(loss.kl or loss.mse)  # else nobody asks it

    def total(params):
        losses = student_losses(params, frozen, teach(frozen, batch, one), batch, one)
        return losses[0] / batch.weights.sum()

    value, gradients = quick_jit(jax.value_and_grad(total))(trainable)
    model = torch_model(student)
    _, expected = torch_loss(torch_model(teacher), model, batch, loss, train_spec.layer_map)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    whole = {half: student.params[half] | gradients.get(half, {}) for half in student.params}
    ours = to_hf(student.dims, whole)
    halves = tuple(f"model.{half}" for half in trainable)
    theirs = {n: p.grad for n, p in model.named_parameters() if n.startswith(halves)}
    theirs = {name: gradient for name, gradient in theirs.items() if gradient is not None}
    assert len(theirs) == len(jax.tree.leaves(gradients))
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5, err_msg=name)


def test_trained_encoder_leaves_the_teacher_alone(quick_jit, train_spec, batch, teacher, student):
    train_spec = replace(train_spec, train_encoder=True)
    trainable, frozen = split_parameters(train_spec, teacher.params, student.params)
    assert set(frozen.student_encoder) == {"positions"}
    state = initial_state(trainable, train_spec.optimizer)
    after, metrics = quick_jit(partial(train_step, spec=train_spec))(state, frozen, batch)
    _, expected = torch_loss(
        torch_model(teacher), torch_model(student), batch, train_spec.loss, train_spec.layer_map
    )
    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-5)
    kernel = lambda params: np.asarray(params["encoder"]["conv1"]["kernel"])
    assert not np.array_equal(kernel(after.params), kernel(teacher.params))
    whole = whole_student(after.params, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(student.params)


def test_bfloat16_over_float32_masters(quick_jit, train_spec, parameters, batch, teacher, student):
    """bfloat16 has 8 bits: losses agree to about a percent, parameters stay float32."""
    half = replace(
        train_spec,
        teacher=replace(train_spec.teacher, dtype="bfloat16"),
        student=replace(train_spec.student, dtype="bfloat16"),
    )
    trainable, frozen = split_parameters(half, teacher.params, student.params)
    layer = frozen.teacher["decoder"]["layers"][0]
    assert layer["feed_forward"]["up"]["kernel"].dtype == jnp.bfloat16
    assert layer["feed_norm"]["scale"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {np.dtype("float32")}
    rough = quick_jit(partial(losses_of, train_spec=half))(trainable, frozen, batch)
    exact = quick_jit(partial(losses_of, train_spec=train_spec))(*parameters, batch)
    np.testing.assert_allclose(rough, exact, rtol=2e-2)
    # what is stored narrow is what the program would have narrowed: not a bit differs
    wide = frozen._replace(teacher=teacher.params)
    same = quick_jit(partial(losses_of, train_spec=half))(trainable, wide, batch)
    assert [float(part) for part in same] == [float(part) for part in rough]


@pytest.mark.parametrize("train_encoder", [False, True])
def test_scanned_layers_give_the_same(
    quick_jit, train_spec, step, batch, teacher, student, train_encoder
):
    train_spec = replace(train_spec, train_encoder=train_encoder)
    scanned = replace(
        train_spec,
        teacher=replace(train_spec.teacher, scan_layers=HALVES),
        student=replace(train_spec.student, scan_layers=("encoder",), remat=True),
    )

    def metrics_of(step, train_spec):
        trainable, frozen = split_parameters(train_spec, teacher.params, student.params)
        return step(initial_state(trainable, train_spec.optimizer), frozen, batch)[1]

    metrics = metrics_of(quick_jit(partial(train_step, spec=scanned)), scanned)
    plain = metrics_of(quick_jit(partial(train_step, spec=train_spec)), train_spec)
    for name in ("loss", "kl", "ce", "mse", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-5, err_msg=name)


def test_chunks_of_the_vocabulary_are_the_whole(
    quick_jit, train_spec, step, state, parameters, batch
):
    """With a last chunk that is not full: 1e-6."""
    chunked = quick_jit(
        partial(train_step, spec=replace(train_spec, vocabulary_chunk=5, data_shards=2))
    )
    whole, metrics = step(state, parameters[1], batch)
    parts, chunked_metrics = chunked(state, parameters[1], batch)
    for name in ("loss", "kl", "ce", "mse", "gradient_norm"):
        np.testing.assert_allclose(chunked_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
    moments = lambda s: jax.tree.leaves(s.optimizer[1].mu)
    for a, b in zip(moments(whole), moments(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_no_logits_of_the_whole_batch_with_chunks(train_spec, state, parameters, make_batch):
    batch = make_batch(8, 12)
    whole = f"96x{train_spec.teacher.dims.vocab}x"
    lowered = lambda train_spec: jax.jit(partial(train_step, spec=train_spec)).lower(
        state, parameters[1], batch
    )
    assert whole in lowered(train_spec).as_text()
    assert whole not in lowered(replace(train_spec, vocabulary_chunk=4)).as_text()


def test_schedule(train_spec):
    config = replace(train_spec.optimizer, learning_rate=1e-4, warmup_steps=500, steps=80_000)
    rate = lambda step: float(learning_rate(jnp.array(step), config))
    assert rate(0) == pytest.approx(2e-7)
    assert rate(249) == pytest.approx(5e-5)
    assert rate(499) == rate(500) == pytest.approx(1e-4)
    assert rate(40_250) == pytest.approx(5e-5)
    assert rate(79_999) == pytest.approx(1e-4 / 79_500, rel=1e-3)
    assert rate(80_000) == 0


def test_decay_spares_biases_and_norms(state, train_spec):
    mask = decayed(state.params, train_spec.optimizer)["decoder"]
    layer = mask["layers"][0]
    assert mask["tokens"]["embedding"]
    assert layer["self_attention"]["query"] == {"kernel": True, "bias": False}
    assert layer["feed_norm"] == mask["norm"] == {"scale": False, "bias": False}


def test_weights_are_configuration(quick_jit, train_spec, parameters, batch):
    only = replace(train_spec, loss=LossConfig(kl=0.0, ce=1.0))
    losses = quick_jit(partial(losses_of, train_spec=only))(*parameters, batch)
    assert losses.kl == losses.mse == 0
    assert losses.ce > 0


@pytest.mark.parametrize("everything", [False, True])
def test_no_rank_is_promoted_and_nothing_is_transferred(
    everything, quick_jit, train_spec, teacher, student, make_batch
):
    """In the plain step, and with all that can be added to it."""
    batch = make_batch()
    if everything:
        train_spec = replace(
            train_spec,
            loss=LossConfig(kl_end=0.1, mse=0.1, label_smoothing=0.1),
            optimizer=replace(train_spec.optimizer, freeze_embed_positions=True),
            train_encoder=True,
            accumulation=2,
            vocabulary_chunk=5,
            augment=AugmentConfig(time_masks=1, frequency_masks=1),
            dropout=0.1,
        )
        keys = np.arange(16, dtype=np.uint32).reshape(8, 2)
        factors = np.ones((*batch.weights.shape, 2), np.float32)
        batch = replace(batch, keys=keys, loss_weights=factors)
    params, frozen = split_parameters(train_spec, teacher.params, student.params)
    state = jax.jit(initial_state, static_argnums=1)(params, train_spec.optimizer)
    arguments = jax.device_put((state, frozen, batch))
    with jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        step = quick_jit(partial(train_step, spec=train_spec))
        metrics = jax.block_until_ready(step(*arguments)[1])
    assert np.isfinite(metrics["loss"])


def test_norms_of_parameters_and_updates(step, train_spec, state, parameters, batch):
    """As the log has them: of the parameters after the update, and of their change."""
    after, metrics = step(state, parameters[1], batch)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
    change = jax.tree.map(np.subtract, after.params, state.params)
    assert metrics["parameter_norm"] == pytest.approx(norm(after.params), rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(norm(change), rel=1e-3)
    assert metrics["gradient_norm"] > 0
