"""ITSELF in JAX: text-based person search guided by the encoders' own attention."""

__version__ = "0.1.0"
