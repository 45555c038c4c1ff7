"""Precision of matrix products: that of their dtype on every device.

By default, GPUs round float32 factors to TF32 (10 bits) and TPUs to bfloat16 (7 bits).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float


def precision(dtype: Any) -> Precision | None:
    """XLA's precision for products of this dtype: HIGHEST for float32, else the default."""
    return Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def product(
    subscripts: str, left: Float[Array | np.ndarray, "..."], right: Float[Array | np.ndarray, "..."]
) -> Float[Array, "..."]:
    """`einsum` of two arrays of one type, summed and returned in float32 or wider."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(
        subscripts, left, right, precision=precision(left.dtype), preferred_element_type=wide
    )
