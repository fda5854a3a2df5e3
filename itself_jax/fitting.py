"""Fits weights to a run: its configuration takes their sizes, its model their arrays.

Every parameter of the model and every array of the weights is accounted for, in `fit` and `check`:
it is taken, resized, started anew or left out for a reason that is said, or it is an error.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itself_jax import config as config_lib
from itself_jax import dialects, sharding, weights
from itself_jax.models import clip

Log = Callable[[str], None]


def resolve(
    config: config_lib.Config,
    found: weights.Weights,
    log: Log,
    *,
    training: bool,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
    ask: str = "config.model.{tower}_heads, and config.model.{tower}_width={width},",
) -> config_lib.Config:
    """The configuration with the sizes of the weights: widths, depths, patch size, local width.

    To evaluate weights without a local branch, `local.enabled` is switched off; in training the
    branch starts from random numbers.

    Args:
      config: of the run.
      found: the weights.
      log: takes one line for everything that was decided.
      training: or evaluating.
      changes: flat keys that are set at the same time.
      ask: what the caller's user can set where the weights do not say the heads of a `{tower}` and
        its `{width}`.

    Raises:
      ConfigError: the sizes do not fit the run's pictures, stride or layers.
    """
    for note in found.notes:
        log(f"{found.source}: {note}")
    for reason in dict.fromkeys(found.dropped.values()):
        names = [name for name, why in found.dropped.items() if why == reason]
        log(f"{found.source}: {len(names)} arrays are dropped: {reason}.")
    sizes = dict(found.sizes)
    if not found.has_local:
        del sizes["local.dim"]
        if config.local.enabled and not training:
            log(f"{found.source} has no local branch: its global embedding alone is evaluated.")
            sizes["local.enabled"] = False
    for tower in ("vision", "text"):
        key, width = f"model.{tower}_heads", sizes[f"model.{tower}_width"]
        if sizes[key] is not None and changes.get(key, sizes[key]) != sizes[key]:
            log(f"{key}={changes[key]} overrides {sizes[key]} of {found.source}.")
            sizes[key] = changes[key]
        if sizes[key] is None:  # neither the file nor CLIP's rule says it
            sizes[key] = changes.get(key)
            if width == getattr(config.model, f"{tower}_width"):
                sizes[key] = sizes[key] or getattr(config.model, f"{tower}_heads")
            if sizes[key] is None:
                raise config_lib.ConfigError(
                    f"{key} is not known: {found.source} does not say how many heads its width "
                    f"{width} is made of; set {ask.format(tower=tower, width=width)} as it was "
                    "trained with."
                )
            log(f"{found.source} does not say how many heads it has: {key}={sizes[key]}.")
    chosen = changes.get("model.activation", config.model.activation)
    stated = sizes["model.activation"]
    if chosen is not None:
        if chosen != stated:
            log(f"config.model.activation={chosen!r} overrides {stated!r} of {found.source}.")
        sizes["model.activation"] = chosen
    return config_lib.replace(config, {**changes, **sizes})


def say_replaced(
    config: config_lib.Config, values: Mapping[str, Any], source: Any, log: Log
) -> None:
    """One line on the sizes of a configuration that weights replace by their own."""
    before = config_lib.flatten(config_lib.to_dict(config))
    replaced = [
        f"{key}={values[key]} (was {before[key]})"
        for key in weights.SIZES
        if values.get(key) is not None and before[key] not in (None, values[key])
    ]
    if replaced:
        log(f"Sizes of {source}: {', '.join(replaced)}.")


def fit(
    found: weights.Weights,
    template: Mapping[str, Any],
    model: config_lib.Model,
    log: Log,
    *,
    fresh: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The weights as float32 arrays of the run's model, placed as `template` says.

    Every parameter of the model and every array of the weights is accounted for. Positions are
    resized to the run's grid and text length, classifiers of other identities replaced by those of
    `fresh`, parts that the weights do not have taken from `fresh`: one line in the log each.
    Classifiers and local branch are left out where the template has none.

    Args:
      found: what `weights.open_` returned.
      template: "params" and "batch_stats" of the run, as shapes with shardings.
      model: the run's settings, resolved.
      log: takes one line per change.
      fresh: freshly initialised variables of the run; None: everything must come from the weights.

    Raises:
      WeightsError: arrays are missing, left over, or of another shape: all of them, each by its
        name in the file and with both shapes; or an array holds NaN or infinity.
    """
    wanted, given = weights.flat(template), _with_positions(found, model, log)
    started = _account(found, wanted, given, may_start=fresh is not None)
    if found.has_local and not any(name.startswith(weights.LOCAL) for name in wanted):
        log(f"{found.source}: its local branch is left out, config.local.enabled is off.")
    _say_started(found, started, log)
    kept = fresh is not None and found.num_identities is not None and None not in started.values()
    if kept:
        log(
            f"WARNING: {found.source}: its classifiers are kept, because it knows as many "
            f"identities as this run has, {found.num_identities}. They are right only if it was "
            "trained on this very data set; with other people they are no better than random."
        )
    fresh_leaves = weights.flat(fresh) if started else {}
    result = {}
    for name, leaf in wanted.items():
        if name in started:
            result[name] = fresh_leaves[name]
        else:
            result[name] = sharding.put(weights.read(found, name, given[name]), leaf.sharding)
    paths, tree = jax.tree_util.tree_flatten_with_path(dict(template))
    return jax.tree.unflatten(tree, [result[weights.name_of(path)] for path, _ in paths])


def check(
    found: weights.Weights, template: Mapping[str, Any], model: config_lib.Model
) -> dict[str, str]:
    """Accounts for every array as `fit` does, without reading one.

    Args:
      found: what `weights.open_` returned.
      template: shapes of the whole model: "params" and "batch_stats".
      model: settings in which no position needs to be resized.

    Returns:
      The parameters that the weights do not have, with the reasons why they need not.

    Raises:
      WeightsError: as `fit`.
    """
    given = _with_positions(found, model, lambda line: None)
    started = _account(found, weights.flat(template), given, may_start=True)
    return {name: reason or "of another number of identities" for name, reason in started.items()}


def encoders_only(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables without the identity classifiers, which only training needs."""
    heads = {name.split("/")[1] for name in weights.HEADS}
    params = {name: part for name, part in variables["params"].items() if name not in heads}
    return {**variables, "params": params}


class _Resized:
    """Positions of another length, computed when they are read."""

    def __init__(self, array: dialects.Array, shape: tuple[int, ...], resize: Callable):
        self._array, self._resize = array, resize
        self.shape, self.dtype = shape, np.dtype(np.float32)

    def read(self) -> np.ndarray:
        return np.asarray(self._resize(jnp.asarray(self._array.read(), jnp.float32)))


def _account(
    found: weights.Weights,
    wanted: Mapping[str, Any],
    given: Mapping[str, dialects.Array],
    *,
    may_start: bool,
) -> dict[str, str | None]:
    """Which parameters start anew: {name: why they are absent}, None for classifiers of others.

    Raises:
      WeightsError: everything that does not fit, at once.
    """
    started: dict[str, str | None] = {}
    problems = []
    absent = dialects.absent_reason
    for name, leaf in wanted.items():
        there = tuple(given[name].shape) if name in given else None
        if there == tuple(leaf.shape):
            continue
        if there and may_start and _differs_in_classes(name, there, tuple(leaf.shape)):
            started[name] = None
        elif there is None and may_start and (reason := absent(found.dialect, name, found.arrays)):
            started[name] = reason
        else:
            problems.append(_problem(found, name, there, tuple(leaf.shape)))
    # A model may do without its classifiers, and without the local branch, as a whole.
    spared = tuple(part for part in (*weights.HEADS, *weights.LOCAL) if not _any(wanted, part))
    problems += [
        _problem(found, name, tuple(array.shape), None)
        for name, array in given.items()
        if name not in wanted and not name.startswith(spared)
    ]
    if problems:
        raise weights.WeightsError(
            f"{found.source} ({found.kind}) does not fit the model: {weights.listed(problems)}. "
            "Use the config.model and config.local that it was trained with, or another file."
        )
    return started


def _differs_in_classes(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """Whether an array is a classifier's, and of another number of identities."""
    is_classifier = name.startswith(weights.HEADS) and "_classifier/" in name
    return is_classifier and len(there) == len(here) and there[:-1] == here[:-1]


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _problem(
    found: weights.Weights, name: str, there: tuple[int, ...] | None, here: tuple[int, ...] | None
) -> str:
    """One array that does not fit, by its name and shapes in the file."""
    names = found.names.get(name) or dialects.spell(found.dialect, name) or (name,)
    called = ", ".join(names)
    there, here = (
        shape and dialects.their_shape(found.dialect, name, shape) for shape in (there, here)
    )
    if there is None:
        return f"{called} is missing, expected {list(here)}"
    if here is None:
        return f"{called} {list(there)} has no place in it"
    return f"{called} is {list(there)} there and {list(here)} here"


def _say_started(found: weights.Weights, started: Mapping[str, str | None], log: Log) -> None:
    for reason in dict.fromkeys(started.values()):
        names = [name for name, why in started.items() if why == reason]
        if reason is None:
            log(
                f"WARNING: {found.source} knows {found.num_identities} identities, this run "
                "has others: the classifiers start anew."
            )
        else:
            parts = ", ".join(sorted({name.split("/")[1] for name in names}))
            log(
                f"{found.source}: {len(names)} arrays of {parts} start from random numbers: "
                f"{reason}."
            )


def _with_positions(
    found: weights.Weights, model: config_lib.Model, log: Log
) -> dict[str, dialects.Array]:
    """All arrays, positions for the run's grid and text length."""
    given = dict(found.arrays)
    if weights.IMAGE_POSITIONS in given:
        given[weights.IMAGE_POSITIONS] = _fit_image_positions(found, model, log)
    if weights.TEXT_POSITIONS in given:
        given[weights.TEXT_POSITIONS] = _fit_text_positions(found, model.text_length, log)
    return given


def _fit_image_positions(
    found: weights.Weights, model: config_lib.Model, log: Log
) -> dialects.Array:
    """Patch positions for the run's grid: as they are, or resized and said so."""
    array, grid = found.arrays[weights.IMAGE_POSITIONS], model.grid
    if len(array.shape) != 2:
        return array  # reported with its shape
    patches = array.shape[0] - 1
    source = found.config.model.grid if found.config else None
    if source is not None and source[0] * source[1] != patches:
        source = None
    side = math.isqrt(patches)
    if source is None and found.origin in dialects.PRETRAINED and side * side == patches:
        source = side, side  # of pre-training, whatever has as many patches here
    if source is None and patches == grid[0] * grid[1]:
        _say_assumed(found, patches, model, log)
        return array
    if source == grid:
        return array
    source = source or _guess_grid(found, patches, model)
    log(
        f"{found.source}: patch positions of a {source[0]}x{source[1]} grid were resized to "
        f"{grid[0]}x{grid[1]}."
    )
    shape = (grid[0] * grid[1] + 1, array.shape[1])
    return _Resized(
        array, shape, lambda x: clip.resize_position_embedding(x, grid, source_grid=source)
    )


def _say_assumed(found: weights.Weights, patches: int, model: config_lib.Model, log: Log) -> None:
    """That as many patches are taken for the same grid, loudly where another one is likelier."""
    said = (
        f"{found.source}: nothing says the grid of its {patches} patch positions; "
        f"{model.grid[0]}x{model.grid[1]}, as here, is assumed"
    )
    usual = native_picture(found, square=False)
    settings = {key.removeprefix("model."): value for key, value in usual.items()}
    rows, columns = dataclasses.replace(model, **{"stride": None} | settings).grid
    if usual and (rows, columns) != model.grid:
        (height, width), stride = settings["image_size"], settings.get("stride")
        log(
            f"WARNING: {said}, but most models of people have {rows}x{columns}. If it has, set "
            f"model.image_size=({height}, {width})"
            + (f" and model.stride={stride}." if stride else ".")
        )
    else:
        log(f"{said}.")


def _guess_grid(found: weights.Weights, patches: int, model: config_lib.Model) -> tuple[int, int]:
    """The grid where nothing says it: a square, or what a stride makes of the run's picture."""
    side = round(patches**0.5)
    if side * side == patches:
        return side, side
    strides = range(model.patch_size, 0, -1)
    grids = {dataclasses.replace(model, stride=stride).grid for stride in strides}
    fitting = [grid for grid in grids if grid[0] * grid[1] == patches]
    if len(fitting) == 1:
        return fitting[0]
    raise weights.WeightsError(
        f"{found.source} has positions for {patches} patches, which are no square and which no "
        f"stride makes of a picture of {model.image_size[0]}x{model.image_size[1]}: set "
        "model.image_size (and stride) to those it was trained with."
    )


def picture_in_a_row(found: weights.Weights) -> tuple[int, int]:
    """A picture size with as many patches as there are positions, where nobody knows their grid."""
    patch = found.sizes["model.patch_size"]
    return (found.arrays[weights.IMAGE_POSITIONS].shape[0] - 1) * patch, patch


def native_picture(found: weights.Weights, *, square: bool) -> dict[str, Any]:
    """`model.image_size` and `model.stride` in which the patch positions need no resizing.

    {} where nothing tells, and for the squares of pre-training unless `square` is set. Pictures of
    people are three times as high as wide, or have the published 384x128 with a smaller stride.
    """
    patch = found.sizes["model.patch_size"]
    patches = found.arrays[weights.IMAGE_POSITIONS].shape[0] - 1
    for ratio in (1, 3) if square else (3,):
        columns = math.isqrt(patches // ratio)
        if ratio * columns * columns == patches:
            return {"model.image_size": (ratio * columns * patch, columns * patch)}
    published = config_lib.Model(patch_size=patch)
    for stride in range(patch - 1, 0, -1):
        rows, columns = dataclasses.replace(published, stride=stride).grid
        if rows * columns == patches:
            return {"model.image_size": published.image_size, "model.stride": stride}
    return {}


def _fit_text_positions(found: weights.Weights, length: int, log: Log) -> dialects.Array:
    """Cut or stretched and said so; as they are when there is no tail to stretch."""
    array, kept = found.arrays[weights.TEXT_POSITIONS], clip.KEPT_POSITIONS
    t = array.shape[0] if len(array.shape) == 2 else length
    if t == length or (t <= kept and length > t):
        return array
    what = "cut" if length < t else f"stretched behind the first {kept}"
    log(
        f"model.text_length={length}, but {found.source} was trained with {t}: its text "
        f"positions were {what}."
    )
    return _Resized(
        array, (length, array.shape[1]), lambda x: clip.resize_text_positions(x, length)
    )
