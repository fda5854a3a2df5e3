"""Strict modes for every test: no rank promotion, 8 virtual CPU devices, parsed flags."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's worker processes read absl flags, which only `absl.app.run` would have parsed.
flags.FLAGS.mark_as_parsed()
