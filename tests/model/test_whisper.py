"""The model against PyTorch's in float64 (1e-6 tells a tanh GELU or a wrong ε; 1e-2 would not)."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.model import attention
from flax_distil.model.attention import (
    QUERY_BLOCK,
    _attend,
    _by_head,
    _by_query_block,
    _by_splash,
    attend,
    attend_merged,
    attention_for,
)
from flax_distil.model.dims import PUBLISHED, WhisperDims
from flax_distil.model.spec import HALVES, Spec, unstack_layers
from flax_distil.model.weights import names
from flax_distil.model.whisper import gelu_by_exp


def stack_layers(half):
    """Parameters with layers 0 … N-1 as one layer of leading axis N."""
    layers = [half["layers"][index] for index in range(len(half["layers"]))]
    return half | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel on any device."""
    on_a_tpu = attention._splash
    monkeypatch.setattr(attention, "_splash", lambda *sizes: on_a_tpu(*sizes, interpret=True))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 40, 8)), rng.integers(0, 97, (2, 10))


def layouts(twins, attention):
    stacked = {half: stack_layers(params) for half, params in twins.params.items()}
    yield Spec(twins.dims, "float64", attention=attention), twins.params
    yield Spec(twins.dims, "float64", HALVES, attention=attention), stacked
    yield Spec(twins.dims, "float64", remat=True, attention=attention), twins.params


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attention", ["xla", "cpu", "splash"])
def test_equals_transformers_in_every_layout(twins, inputs, attention):
    import torch

    mel, tokens = inputs
    with torch.no_grad():
        features, labels = torch.tensor(mel.swapaxes(1, 2)), torch.tensor(tokens)
        theirs = twins.torch(features, decoder_input_ids=labels, output_hidden_states=True)
    for spec, params in layouts(twins, attention):
        audio = spec.encoder(params["encoder"])(jnp.asarray(mel))
        decoder = spec.decoder(params["decoder"])
        hidden, every = decoder.hidden_states(jnp.asarray(tokens), audio)
        np.testing.assert_allclose(audio, theirs.encoder_last_hidden_state, atol=1e-10)
        np.testing.assert_allclose(decoder.logits(hidden), theirs.logits, atol=1e-10)
        np.testing.assert_allclose(decoder.projection()(hidden), theirs.logits, atol=1e-10)
        np.testing.assert_allclose(every[0], theirs.decoder_hidden_states[1], atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attention", ["xla", "splash"])
@pytest.mark.parametrize("per_row", [False, True])
def test_cached_equals_uncached(twins, inputs, per_row, attention):
    mel, tokens = inputs
    for spec, params in layouts(twins, attention):
        audio = spec.encoder(params["encoder"])(jnp.asarray(mel))
        decoder = spec.decoder(params["decoder"])
        whole = decoder(jnp.asarray(tokens), audio)
        empty = decoder.start(audio, 12)
        hidden, cache = decoder.step(jnp.asarray(tokens[:, :4]), empty)
        if per_row:
            cache = cache._replace(length=jnp.full((2,), 4))
        parts = [hidden]
        for index in range(4, 10):
            hidden, cache = decoder.step(jnp.asarray(tokens[:, index : index + 1]), cache)
            parts.append(hidden)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attention", ["xla", "splash"])
def test_rows_advance_on_their_own(twins, inputs, attention):
    mel, tokens = inputs
    spec = Spec(twins.dims, "float64", attention=attention)
    audio = spec.encoder(twins.params["encoder"])(jnp.asarray(mel))
    decoder = spec.decoder(twins.params["decoder"])
    whole = decoder(jnp.asarray(tokens), audio)
    # Row 0 takes three of the four tokens read, row 1 all of them; both then read two more.
    _, cache = decoder.step(jnp.asarray(tokens[:, :4]), decoder.start(audio, 12))
    accepted = np.array([3, 4])
    rows, places = np.arange(2)[:, None], accepted[:, None] + np.arange(2)
    following = jnp.asarray(tokens[rows, places])
    hidden, cache = decoder.step(following, cache._replace(length=jnp.asarray(accepted)))
    np.testing.assert_allclose(hidden, whole[rows, places], atol=1e-12)
    np.testing.assert_array_equal(cache.length, accepted + 2)


@pytest.mark.usefixtures("float64")
def test_causal_by_gradient(twins, inputs):
    mel, _ = inputs
    spec = Spec(twins.dims, "float64")
    audio = spec.encoder(twins.params["encoder"])(jnp.asarray(mel))

    def at(position, embedding_LD):
        params = twins.params["decoder"]
        params = params | {"tokens": {"embedding": embedding_LD}}
        return spec.decoder(params)(jnp.arange(10)[None], audio[:1])[0, position].sum()

    embedding = jnp.asarray(twins.params["decoder"]["tokens"]["embedding"])
    for position in (0, 4, 9):
        reach = jnp.abs(jax.grad(at, argnums=1)(position, embedding)).sum(-1)[:10] > 0
        np.testing.assert_array_equal(reach, np.arange(10) <= position)


@pytest.mark.parametrize("parts", [attend, _by_head, _by_query_block])
def test_attention_in_parts_changes_nothing(parts):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 2 * QUERY_BLOCK, 8))
    np.testing.assert_allclose(parts(q, k, v), _attend(q, k, v, None), atol=1e-6)
    loss = lambda attend: jax.grad(lambda k: (attend(q, k, v) ** 2).sum())(k)
    plain = loss(lambda q, k, v: _attend(q, k, v, None))
    np.testing.assert_allclose(loss(parts), plain, atol=1e-5)


def test_a_tpus_gelu_is_exact():
    x = jnp.linspace(-9, 9, 2001)
    exact = jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu_by_exp(x), exact, atol=1e-6)
    slopes = [
        jax.vmap(jax.grad(one))(x) for one in (gelu_by_exp, partial(jax.nn.gelu, approximate=False))
    ]
    np.testing.assert_allclose(*slopes, atol=1e-5)
    little = (x < 0) & (x > -4)  # a quarter of bfloat16's rounding
    np.testing.assert_allclose(gelu_by_exp(x)[little], exact[little], rtol=1e-3)


def test_merged_heads_change_nothing():
    """Two beams to a clip, and rows with masks of their own."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 3, 5, 8))  # B H S K
    flat = lambda x_BHSK: x_BHSK.swapaxes(1, 2).reshape(len(x_BHSK), 5, 24)
    beams = flat(attend(q, k[:2], v[:2]))
    merged = attend_merged(flat(q), flat(k)[:2], flat(v)[:2], 3)
    np.testing.assert_allclose(merged, beams, atol=1e-6)
    mask = jnp.arange(5) <= (jnp.array([0, 1, 2, 4])[:, None] + jnp.arange(5))[..., None]
    masked = attend_merged(*map(flat, (q, k, v)), 3, mask[:, None])
    np.testing.assert_allclose(masked, flat(attend(q, k, v, mask[:, None])), atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_padding_of_the_kernels_blocks_is_masked_out(monkeypatch):
    """130 positions are padded to 256, for a text's attention to the audio as well."""
    dims = WhisperDims(8, 97, 64, 1, 1, 1, 1, 64, 64, audio_positions=130, text_positions=130)
    params = Spec(dims).init(jax.random.key(0))
    mel = jax.random.normal(jax.random.key(1), (1, 260, 8))
    tokens = jax.random.randint(jax.random.key(2), (1, 130), 0, 97)

    def states(attention="xla"):
        spec = Spec(dims, attention=attention)
        audio = spec.encoder(params["encoder"])(mel)
        return audio, spec.decoder(params["decoder"])(tokens, audio)

    expected, sizes = states(), []

    def seen(kernel, *arrays):
        sizes.append([array.shape[2] for array in arrays])
        return kernel(*arrays)

    monkeypatch.setattr(attention, "takes_kernel", lambda backend, *_: backend == "splash")
    monkeypatch.setattr(attention, "on_each_device", seen)
    for ours, plain in zip(states("splash"), expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)
    assert sizes == [[256, 256, 256], [130, 256, 256]]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("half", [(), HALVES])
def test_a_shorter_clip_in_a_batch_is_what_it_is_alone(twins, inputs, half):
    """In float64, with layers in a list and stacked: no frame behind a clip's length is read."""
    mel, tokens = jnp.asarray(inputs[0]), jnp.asarray(inputs[1])
    params = {h: stack_layers(p) if half else p for h, p in twins.params.items()}
    spec = Spec(twins.dims, "float64", half)
    encoder, decoder = spec.encoder(params["encoder"]), spec.decoder(params["decoder"])
    lengths = jnp.array([20, 7])
    audio = encoder(mel, lengths)
    hidden, _ = decoder.hidden_states(tokens, audio, lengths_B=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(mel[row : row + 1, : 2 * length])
        np.testing.assert_allclose(audio[row : row + 1, :length], alone, atol=1e-12)
        text = decoder(tokens[row : row + 1], alone)
        np.testing.assert_allclose(hidden[row : row + 1], text, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "xla", "cudnn", "splash"])
def test_keys_behind_a_clips_length_are_not_read(backend, monkeypatch):
    """In every backend; XLA computes cuDNN's part, and the TPU's kernel is interpreted."""
    on_a_tpu = attention._splash
    monkeypatch.setattr(attention, "_splash", lambda *sizes: on_a_tpu(*sizes, interpret=True))
    monkeypatch.setattr(attention, "takes_kernel", lambda backend, *_: backend == "splash")
    by_xla = jax.nn.dot_product_attention
    without = lambda *x, implementation, **options: by_xla(*x, **options)
    monkeypatch.setattr(jax.nn, "dot_product_attention", without)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 2 * QUERY_BLOCK, 8))
    lengths = [2 * QUERY_BLOCK, 130]
    for queries in (2 * QUERY_BLOCK, 140):
        found = attend(q[:, :, :queries], k, v, None, jnp.array(lengths), backend)
        for row, length in enumerate(lengths):
            keys, values = k[row : row + 1, :, :length], v[row : row + 1, :, :length]
            alone = _attend(q[row : row + 1, :, :queries], keys, values)
            np.testing.assert_allclose(found[row : row + 1], alone, atol=1e-5)


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """Its own kernel needs a GPU: XLA computes what it is asked for."""
    asked = []

    def cudnn(*arrays, implementation, **options):
        asked.append(implementation)
        return dot_product_attention(*arrays, **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    by_cudnn = partial(attend, backend="cudnn")
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 2 * QUERY_BLOCK, 8), jnp.bfloat16)
    exact = _attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(by_cudnn(q, k, v).astype(jnp.float32), exact, atol=0.03)
    by_cudnn(q[:, :, :QUERY_BLOCK], k, v)
    assert asked == ["cudnn"]


def test_the_backend_is_the_devices():
    device = partial(SimpleNamespace, device_kind="", compute_capability="8.0")
    hopper = device(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    turing = device(platform="gpu", device_kind="NVIDIA T4", compute_capability="7.5")
    found = [
        [attention_for(one, dtype) for dtype in ("bfloat16", "float32")]
        for one in (device(platform="tpu"), device(platform="cpu"), hopper, turing)
    ]
    assert found == [["splash"] * 2, ["cpu"] * 2, ["cudnn", "xla"], ["xla"] * 2]
    assert Spec(PUBLISHED["tiny"]).on(jax.devices()[0]).attention == "cpu"


@pytest.mark.parametrize("queries", [600, 256, 130])
@pytest.mark.usefixtures("interpreted")
def test_the_tpu_kernel_computes_attention(queries):
    """In float32; 600 positions are padded to two blocks of 512, the rest masked out."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 600, 64))
    q = 0.3 * q[:, :, :queries]
    kernel = _by_splash
    np.testing.assert_allclose(kernel(q, k, v), _attend(q, k, v), atol=1e-5)
    shorter = _attend(q, k[:, :, :500], v[:, :, :500])
    np.testing.assert_allclose(kernel(q, k, v, kv_length=500), shorter, atol=1e-5)

    def gradients(attend):
        return jax.grad(lambda qkv: (attend(*qkv) ** 2).sum())((q, k, v))

    for ours, plain in zip(gradients(kernel), gradients(_attend), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4, rtol=1e-5)


def test_bfloat16_keeps_parameters_and_logits_in_float32(twins, inputs):
    mel, tokens = inputs
    spec = Spec(twins.dims, "bfloat16")
    params = spec.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    audio = spec.encoder(params["encoder"])(jnp.asarray(mel, jnp.float32))
    decoder = spec.decoder(params["decoder"])
    assert audio.dtype == jnp.bfloat16
    assert decoder.logits(decoder(jnp.asarray(tokens), audio)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny.en", 37.8),
        ("base", 72.6),
        ("small", 241.7),
        ("medium.en", 763.9),
        ("large-v2", 1543.3),
        ("large-v3", 1543.5),
        ("large-v3-turbo", 808.9),
    ],
)
def test_published_sizes(name, millions):
    abstract = Spec(PUBLISHED[name]).abstract()
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert round(count / 1e6, 1) == millions
    layers = PUBLISHED[name].encoder_layers, PUBLISHED[name].decoder_layers
    assert len(jax.tree.leaves(abstract)) == len(names(*layers))


def test_stack_and_unstack(twins):
    decoder = twins.params["decoder"]
    back = unstack_layers(stack_layers(decoder))
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(jnp.asarray, decoder))
