"""The device mesh, and where everything lives on it.

A mesh has two axes: `data`, over which the rows of a batch are spread, and `model`, over which the
heads and hidden units of every layer are (tensor parallelism). What an axis of an array *means* is
its logical name: `AXES` names those of every parameter, the model names those of its activations
with `constrain`. One table, `RULES`, says which mesh axis a logical one is spread over; nothing
else depends on the mesh. With `config.sharding="fsdp"` parameters and optimiser state are, beyond
that, spread over all devices while they are not in use.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from itself_jax import config as config_lib

# Logical axis → mesh axis; None: whole on every device.
RULES: dict[str, str | None] = {
    "batch": "data",
    "gathered": None,  # rows of the whole batch, of which every device needs all
    "heads": "model",
    "hidden": "model",  # of the MLPs of transformer and GRAB
    "projected": None,  # query, key and value side by side: no contiguous part holds whole heads
    "width": None,
    "embedding": None,
    "classes": None,
    "vocabulary": None,
    "positions": None,
    "pixels": None,
}

# What the axes of a parameter are, by its path; the first match counts, and every one must match.
_NORM = r"(ln_\w+|pair_norm)/(scale|bias)"
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf".*/{_NORM}", ("width",)),
    (r".*/attention/in_proj/kernel", ("width", "projected")),
    (r".*/attention/in_proj/bias", ("projected",)),
    (r".*/attention/out_proj/kernel", ("heads", "width")),
    (r".*/attention/out_proj/bias", ("width",)),
    (r".*/mlp_in/kernel", ("width", "hidden")),
    (r".*/mlp_in/bias", ("hidden",)),
    (r".*/mlp_out/kernel", ("hidden", "width")),
    (r".*/mlp_out/bias", ("width",)),
    (r".*_encoder/patch_embedding/kernel", ("pixels", "pixels", "pixels", "width")),
    (r".*_encoder/class_embedding", ("width",)),
    (r".*_encoder/position_embedding", ("positions", "width")),
    (r".*_encoder/token_embedding/embedding", ("vocabulary", "width")),
    (r".*_encoder/projection", ("width", "embedding")),
    (r".*_grab/norm/\w+", ("hidden",)),
    (r".*_grab/(skip|unused_skip)[/_]kernel", ("embedding", "width")),
    (r".*_grab/((skip|unused_skip)[/_]bias|unused_norm_\w+)", ("width",)),
    (r".*_heads/pair_mlp/kernel", ("embedding", "width")),
    (r".*_heads/pair_mlp/bias", ("width",)),
    (r".*_heads/\w+_classifier/kernel", ("embedding", "classes")),
    (r".*_heads/\w+_classifier/bias", ("classes",)),
)
_SMALL = 64 << 10  # bytes: arrays below are not worth gathering


class ShardingError(ValueError):
    """An array or axis that no rule covers: a mistake in the program, not of its user."""


class Placement(NamedTuple):
    """Where a tree of arrays lives.

    stored: between steps. used: in the computation; the same unless `sharding="fsdp"`.
    whole: reason → names of the arrays that are whole on every device though others are spread.
    """

    stored: Any
    used: Any
    whole: dict[str, list[str]]


def make_mesh(config: config_lib.Config, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, model) mesh over all devices of all hosts; `mesh.data=-1` takes what is left.

    Fewer devices than there are may be asked for while one process has them all.

    devices: others than this program's own, e.g. of a machine that is only compiled for.

    Raises:
      ConfigError: the axes do not fit the devices, or batch, heads or hidden units the axes.
    """
    own = devices is None
    devices = jax.devices() if own else devices
    settings, available = config.mesh, len(devices)
    data = max(1, available // settings.model) if settings.data == -1 else settings.data
    wanted = data * settings.model
    if wanted > available or (wanted < available and own and jax.process_count() > 1):
        raise config_lib.ConfigError(
            f"config.mesh.data={data} x config.mesh.model={settings.model} is {wanted} devices, "
            f"but {available} are there; set config.mesh.data=-1 for all of them."
        )
    if settings.data == -1 and wanted != available:
        raise config_lib.ConfigError(
            f"config.mesh.model={settings.model} does not divide the {available} devices; choose a "
            "divisor, or set config.mesh.data as well."
        )
    check_divisible(config, data)
    grid = np.array(devices[:wanted]).reshape(data, settings.model)
    # Auto axes: Linen fails on the Explicit ones that `jax.make_mesh` gives by default.
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check_divisible(config: config_lib.Config, data: int) -> None:
    """Whether a configuration can be spread over `data` x `config.mesh.model` devices.

    Raises:
      ConfigError: names the setting that does not divide.
    """
    parts = data * config.micro_batches
    if config.batch_size % parts:
        pieces = f"the {data} devices of config.mesh.data"
        if config.micro_batches > 1:
            pieces += f" x config.micro_batches={config.micro_batches}"
        raise config_lib.ConfigError(
            f"config.batch_size={config.batch_size} is not divisible by {pieces}; use a multiple "
            f"of {math.lcm(parts, config.num_instances)}, or set config.mesh.data."
        )
    shards = config.mesh.model
    spread = {
        "model.vision_heads": config.model.vision_heads,
        "model.text_heads": config.model.text_heads,
    }
    if config.local.enabled:
        spread["half of local.dim"] = config.local.dim // 2
    for name, size in spread.items():
        if size % shards:
            raise config_lib.ConfigError(
                f"config.mesh.model={shards} does not divide {name}={size}; choose a divisor of it."
            )


def eval_batch_size(config: config_lib.Config, mesh: Mesh) -> int:
    """`config.eval.batch_size`, made a multiple of the devices: what is beyond it is padding."""
    n = mesh.shape["data"]
    return -(-config.eval.batch_size // n) * n


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows spread over the data axis."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def shard_batch(mesh: Mesh, batch_of_rows: Any) -> Any:
    """Moves a tree of this host's arrays to the mesh: scalars to every device, rows over `data`."""

    index, count = host_rows(mesh)

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if not x.ndim:
            where, shape, first = replicated(mesh), (), 0
        else:
            where, shape, first = batch(mesh), (len(x) * count, *x.shape[1:]), len(x) * index
        parts = []
        # One by one: what moves all of them at once is no explicit transfer to the guard.
        for device, indices in where.addressable_devices_indices_map(shape).items():
            if indices:
                start, stop, _ = indices[0].indices(shape[0])
                parts.append(jax.device_put(x[start - first : stop - first], device))
            else:
                parts.append(jax.device_put(x, device))
        return jax.make_array_from_single_device_arrays(shape, where, parts)

    return jax.tree.map(place, batch_of_rows)


def put(values: np.ndarray, where: Any) -> jax.Array:
    """Moves an array that every host has to its place, which may reach over all of them."""
    values = np.asarray(values)
    if where is None or where.is_fully_addressable:
        return jax.device_put(values, where)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """(index, count): a batch is cut into `count` equal parts, and this host needs part `index`.

    Hosts that share rows, because the model axis reaches over them, have the same index.
    """
    n = mesh.shape["data"]
    indices = batch(mesh).addressable_devices_indices_map((n,))
    rows = {i for (s,) in indices.values() for i in range(*s.indices(n))}
    size = len(rows)
    if n % size or min(rows) % size or max(rows) - min(rows) != size - 1:
        raise config_lib.ConfigError(
            f"config.mesh.data={n} x config.mesh.model={mesh.shape['model']} gives this host the "
            f"rows {sorted(rows)} of {n}, which is no equal part: choose axes that the devices of "
            "a host divide."
        )
    return min(rows) // size, n // size


def place(mesh: Mesh, tree: Any, how: str) -> Placement:
    """Where the arrays of a tree of shapes live; names that are no parameter's stay whole.

    how: `config.sharding`. With "replicated" arrays are spread over `model` alone, where `RULES`
    say so. "fsdp" spreads each over all devices: over its largest axis that divides and is not
    spread yet; one without such an axis, or below 64 KiB, is whole.

    Raises:
      ShardingError: a parameter that `AXES` does not cover, or an axis that `RULES` does not know.
    """
    whole: dict[str, list[str]] = collections.defaultdict(list)

    def used(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_axes(path, leaf.shape)))

    def stored(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        base = used(path, leaf)
        if leaf.shape and how != "fsdp" and mesh.shape["model"] > 1 and not any(base.spec):
            whole["because no rule spreads their axes over `model`"].append(_name(path))
        if how != "fsdp" or not leaf.shape:
            return base
        spec, reason = _spread(mesh, base.spec, leaf)
        if reason is not None:
            whole[reason].append(_name(path))
        return NamedSharding(mesh, spec)

    return Placement(
        jax.tree_util.tree_map_with_path(stored, tree),
        jax.tree_util.tree_map_with_path(used, tree),
        dict(whole),
    )


def describe(placement: Placement, tree: Any) -> list[str]:
    """Lines on what the devices hold, and on which arrays are whole on each of them and why."""
    leaves = jax.tree.leaves(tree)
    places = jax.tree.leaves(placement.stored)
    total = sum(_bytes(leaf.shape, leaf) for leaf in leaves)
    each = sum(_bytes(p.shard_shape(x.shape), x) for x, p in zip(leaves, places, strict=True))
    lines = [f"Each device keeps {each / 1e6:.1f} MB of the {total / 1e6:.1f} MB of the state."]
    for reason, names in placement.whole.items():
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"Whole on every device, {reason}: {len(names)} arrays ({shown}).")
    return lines


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Spreads an activation as `RULES` say; without a mesh (`jax.set_mesh`) it does nothing.

    axes: the logical name of each axis, None for one that is whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes))


def in_use(tree: Any, how: str) -> Any:
    """Parameters as the computation needs them; their gradients come back as they are stored.

    With "fsdp" this is where they are gathered. Without a mesh it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        used = stored = _spec(_axes(path, leaf.shape))
        if how == "fsdp" and leaf.shape:
            stored, _ = _spread(mesh, used, leaf)
        return _gathered(used, stored)(leaf)

    return jax.tree_util.tree_map_with_path(gather, tree)


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """(b, …) → (parts, b / parts, …). Each device cuts its own rows, so that nothing moves.

    Part i has not the rows i·b/parts …, but some of every device's; `join_rows` undoes it.
    """
    n = shards("batch")
    b = x.shape[0]
    x = x.reshape(n, parts, b // parts // n, *x.shape[1:])
    x = constrain(x, "batch", *[None] * (x.ndim - 1)).swapaxes(0, 1)
    x = x.reshape(parts, b // parts, *x.shape[3:])
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def join_rows(x: jax.Array) -> jax.Array:
    """(parts, b / parts, …) → (b, …), in the order before `split_rows`."""
    n = shards("batch")
    parts, rows = x.shape[:2]
    x = x.reshape(parts, n, rows // n, *x.shape[2:]).swapaxes(0, 1)
    x = constrain(x, "batch", *[None] * (x.ndim - 1))
    return constrain(x.reshape(parts * rows, *x.shape[3:]), "batch", *[None] * (x.ndim - 3))


def by_rows(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)` with every device computing the rows that it has, and only those.

    Where the compiler is left to choose, it may gather the rows of the whole batch on each device.
    `function` returns arrays with one row for each of its own; `gather_rows` gives it all others.
    """
    axis = RULES["batch"]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis in mesh.manual_axes:
        return function(*arrays)
    rows = PartitionSpec(axis)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names={axis})(*arrays)


def sum_over_rows(function: Callable[..., Any], whole: Any, *parts: Any) -> Any:
    """`function(whole, *parts)`, a sum over rows, added up over the devices once, in the end.

    Where the compiler is left to choose, it adds up in every round of a loop in `function`.

    whole: what all rows share. parts: arrays (parts, rows, …), as `split_rows` makes them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(whole, *parts)
    axis = RULES["batch"]

    def own(whole: Any, *parts: Any) -> Any:
        # Else each use of `whole` would have a gradient that is added up on the spot.
        whole = jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), whole)
        return jax.tree.map(lambda x: jax.lax.psum(x, axis), function(whole, *parts))

    shared, rows = PartitionSpec(), PartitionSpec(None, axis)
    in_specs = (shared, *[rows] * len(parts))
    return jax.shard_map(own, in_specs=in_specs, out_specs=shared, axis_names={axis})(whole, *parts)


def gather_rows(x: jax.Array) -> jax.Array:
    """Inside of `by_rows`: the rows of all devices. Gradients are summed and spread again."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.all_gather(x, RULES["batch"], tiled=True)


def _gathered(used: PartitionSpec, stored: PartitionSpec) -> Any:
    move = jax.lax.with_sharding_constraint
    f = jax.custom_vjp(lambda x: move(x, used))
    f.defvjp(lambda x: (move(x, used), None), lambda _, gradient: (move(gradient, stored),))
    return f


def shards(axis: str) -> int:
    """Over how many devices of the mesh in force a logical axis is spread."""
    mesh, name = jax.sharding.get_abstract_mesh(), RULES[axis]
    return 1 if mesh.empty or name is None else mesh.shape[name]


def _spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ShardingError(f"logical axis {axis!r} is unknown: add it to sharding.RULES")
    # Inside of `sum_over_rows` a device sees its own rows only.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = (None if axis is None else RULES[axis] for axis in axes)
    return PartitionSpec(*(None if name in manual else name for name in names))


def _axes(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Logical axes of a parameter, of its Adam moments (same path behind a prefix), or none."""
    if not shape:
        return ()
    name = _name(path)
    for pattern, axes in AXES:
        if re.fullmatch(pattern, name):
            if len(axes) != len(shape):
                raise ShardingError(f"{name} has shape {list(shape)}, its rule names {axes}")
            return axes
    raise ShardingError(f"no rule names the axes of {name} {list(shape)}: add it to sharding.AXES")


def _spread(
    mesh: Mesh | AbstractMesh, spec: PartitionSpec, leaf: Any
) -> tuple[PartitionSpec, str | None]:
    """The spec with its largest divisible free axis over all mesh axes that are left."""
    if _bytes(leaf.shape, leaf) < _SMALL:
        return spec, f"because they have less than {_SMALL >> 10} KiB"
    taken = {axis for axis in spec if axis is not None}
    free = tuple(axis for axis in mesh.axis_names if axis not in taken)
    shards = math.prod(mesh.shape[axis] for axis in free)
    full = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    fitting = [
        (size, -i) for i, size in enumerate(leaf.shape) if full[i] is None and size % shards == 0
    ]
    if not fitting:
        return spec, f"because {shards} divides none of their axes"
    full[-max(fitting)[1]] = free if len(free) > 1 else free[0]
    return PartitionSpec(*full), None


def _bytes(shape: tuple[int, ...], leaf: Any) -> int:
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
