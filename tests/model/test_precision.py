"""float32 products are float32 on GPUs and TPUs: nothing runs here, lowered programs are read."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flax_distil
from flax_distil.config import LossConfig
from flax_distil.distill.losses import TeacherStates, vocabulary_losses
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import HALVES, Spec

DIMS = WhisperDims(
    mels=8, vocab=97, width=16, encoder_layers=2, encoder_heads=2, encoder_ffn=32,
    decoder_layers=2, decoder_heads=2, decoder_ffn=32, audio_positions=20, text_positions=12,
)  # fmt: skip
PRODUCTS = {"einsum", "matmul", "dot", "tensordot", "vdot", "inner", "dot_general", "Linear"}
PRODUCTS |= {"conv_general_dilated", "Conv", "Einsum", "LinearGeneral", "MultiHeadAttention"}


def products(lowered) -> list[str]:
    """The lines of all products of matrices, and of convolutions."""
    kinds = ("stablehlo.dot_general", "stablehlo.convolution")
    return [line for line in lowered.as_text().splitlines() if any(k in line for k in kinds)]


def everything(spec: Spec, params, mel_BTM, tokens_BL):
    """What recognition, labelling, alignment and training ask of a model, the gradient too."""

    def loss(params):
        audio_BSD = spec.encoder(params["encoder"])(mel_BTM)
        decoder = spec.decoder(params["decoder"])
        hidden_BLD, scores = decoder.cross_scores(tokens_BL, audio_BSD)
        written = [decoder.projection()(hidden_BLD), decoder.logits(hidden_BLD), scores]
        written.append(decoder.step(tokens_BL, decoder.start(audio_BSD, 12))[0])
        embedding_VD = params["decoder"]["tokens"]["embedding"]
        teacher = TeacherStates(hidden_BLD, embedding_VD)
        weights = jnp.ones(tokens_BL.shape)
        parts = vocabulary_losses(
            hidden_BLD, embedding_VD[None], teacher, tokens_BL, weights, LossConfig(), 4
        )
        return parts.total, written

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("scan_layers", [(), HALVES])
@pytest.mark.parametrize("tpu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_as_exact_as_their_type(dtype, tpu, scan_layers):
    spec = Spec(DIMS, dtype, scan_layers, attention="splash" if tpu else "xla")
    mel = jax.ShapeDtypeStruct((2, 40, 8), jnp.dtype(dtype))
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    traced = jax.jit(everything, static_argnums=0).trace(spec, spec.abstract(), mel, tokens)
    lines = products(traced.lower(lowering_platforms=("tpu" if tpu else "cuda",)))
    assert len(lines) > 30
    exact = [line for line in lines if line.count("HIGHEST") == 2]
    assert exact == (lines if dtype == "float32" else [])


def test_every_product_of_the_package_says_how_exact_it_is():
    """A new einsum without a precision would round float32 on all devices but this one."""
    silent = []
    for path in Path(flax_distil.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        if not names & {"jax", "jax.numpy"}:  # numpy's products are exact in their type
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                silent.append(f"{path.name}:{node.lineno}")
            if not isinstance(node, ast.Call):
                continue
            named = [node.func, *node.args[:1]]  # also partial(jnp.einsum, …)
            ours = (ast.Attribute,)
            calls = [n for n in named if isinstance(n, ours) and n.attr in PRODUCTS]
            if any(getattr(n.value, "id", "") in ("jnp", "lax", "nnx") for n in calls) and (
                "precision" not in {keyword.arg for keyword in node.keywords}
            ):
                silent.append(f"{path.name}:{node.lineno}")
    assert not silent
