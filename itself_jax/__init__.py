"""ITSELF in JAX: text-based person search guided by the encoders' own attention."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> Any:
    """A trained model, ready to encode: `load(path).encode_text([…])`; see `encoders.load`."""
    from itself_jax import encoders  # late: importing the package costs nothing

    return encoders.load(path, **options)
