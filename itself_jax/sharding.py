"""The device mesh, and where state and batches live on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from itself_jax import config as config_lib


def make_mesh(settings: config_lib.Mesh, batch_size: int) -> Mesh:
    """A (data, model) mesh over this run's devices; `data=-1` takes all of them.

    Raises:
      ConfigError: more devices asked for than there are, or an indivisible batch.
    """
    available = jax.device_count()
    data = available // settings.model if settings.data == -1 else settings.data
    if data * settings.model > available:
        raise config_lib.ConfigError(
            f"config.mesh.data={data} x config.mesh.model={settings.model} needs "
            f"{data * settings.model} devices, {available} are there; use -1 for all of them."
        )
    if batch_size % data:
        raise config_lib.ConfigError(
            f"config.batch_size={batch_size} is not divisible by the {data} devices of "
            f"config.mesh.data; use a multiple of {data}, or set config.mesh.data."
        )
    devices = np.array(jax.devices()[: data * settings.model]).reshape(data, settings.model)
    # Auto axes: Linen fails on the Explicit ones that `jax.make_mesh` gives by default.
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows spread over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(mesh: Mesh, batch_of_rows: Any) -> Any:
    """Moves a tree of host arrays to the mesh: scalars to every device, rows over `data`."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, batch(mesh) if np.ndim(x) else replicated(mesh))

    return jax.tree.map(place, batch_of_rows)
