from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import HALVES, Spec, unstack_layers

DIMS = WhisperDims(8, 32, 16, 3, 2, 4, 2, 32, 32, audio_positions=8, text_positions=8)


@pytest.mark.parametrize("scan", [(), HALVES])
def test_programs_of_init_do_not_grow_with_the_layers(scan, compilations):
    """Large-v2's, unrolled, compiled for minutes."""

    def equations(layers: int) -> list[int]:
        dims = replace(DIMS, encoder_layers=layers, decoder_layers=layers)
        compiled = jax.make_jaxpr(Spec(dims, scan_layers=scan).init)(jax.random.key(0))
        return sorted({count(one.params["jaxpr"].jaxpr) for one in compiled.eqns if inner(one)})

    inner = lambda equation: "jaxpr" in equation.params
    count = lambda jaxpr: (
        len(jaxpr.eqns) + sum(count(one.params["jaxpr"].jaxpr) for one in jaxpr.eqns if inner(one))
    )
    assert equations(2) == equations(9)
    made = []
    for layers in (5, 7):
        before = len(compilations)
        dims = replace(DIMS, width=20, encoder_layers=layers, decoder_layers=layers)
        Spec(dims, scan_layers=scan).init(jax.random.key(0))
        made.append(len(compilations) - before)
    assert made[1] <= made[0]


def test_layers_are_the_same_numbers_stacked_or_not():
    key = jax.random.key(0)
    stacked, plain = Spec(DIMS, scan_layers=HALVES).init(key), Spec(DIMS).init(key)
    for half in HALVES:
        jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked[half]), plain[half])
    first, last = (plain["decoder"]["layers"][n]["feed_forward"]["up"]["kernel"] for n in (0, 3))
    assert jnp.abs(first - last).max() > 0.1
