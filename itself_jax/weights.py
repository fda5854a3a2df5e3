"""Weights that were trained elsewhere, fitted to a run: to start from, or to be evaluated."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from itself_jax import checkpoint
from itself_jax.models import clip

_TEXT_POSITIONS = "params/text_encoder/position_embedding"
_HEADS = ("params/global_heads/", "params/local_heads/")


class Weights(NamedTuple):
    """What a model needs to encode, as nested dicts of NumPy arrays."""

    source: pathlib.Path
    variables: dict[str, Any]  # "params" and "batch_stats"
    num_identities: int  # that its classifiers know
    meta: dict[str, Any]  # of the checkpoint: epoch, best_alpha, …

    @property
    def protocol(self) -> str:
        """By which epoch and fusion weight were chosen."""
        return self.meta.get("protocol", "val")  # the first checkpoints do not say


def read(source: pathlib.Path, log: Callable[[str], None]) -> Weights:
    """The best checkpoint of a work directory (or of its `checkpoints` folder).

    Raises:
      CheckpointError: there is none, or all are damaged.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if not folder.is_dir():
        raise checkpoint.CheckpointError(
            f"{source} is not a work directory of itself_jax: other kinds of weights cannot be "
            "read yet; give a directory that `itself_jax.main` has trained in."
        )
    found = checkpoint.Checkpoints(folder, log=log).restore_best(("params", "batch_stats"))
    if found is None:
        raise checkpoint.CheckpointError(
            f"{folder} holds no validated checkpoint: train there first, or set config.init_from."
        )
    variables = {"batch_stats": {}, **found.state}  # without the local branch there is no BatchNorm
    classifier = variables["params"]["global_heads"]["identity_classifier"]["kernel"]
    return Weights(source, variables, classifier.shape[1] - 1, found.meta)


def fit(
    weights: Weights,
    template: Mapping[str, Any],
    log: Callable[[str], None],
    *,
    fresh: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The weights as arrays of the run's model, placed as `template` says.

    Text positions are resized to the run's length, with one line in the log. Classifiers of
    another number of identities are replaced by those of `fresh`, also with a line.

    Args:
      weights: what `read` returned.
      template: "params" and "batch_stats" of the run, as shapes with shardings.
      log: takes one line per change.
      fresh: freshly initialised variables of the run; None: the classifiers must fit.

    Raises:
      CheckpointError: an array is missing, left over, or of another shape, named with both shapes.
    """
    wanted, given = _flat(template), _flat(weights.variables)
    result, renewed = {}, False
    for name in [*wanted, *given]:
        if name in result:
            continue
        here = wanted[name].shape if name in wanted else None
        there = given[name].shape if name in given else None
        if name == _TEXT_POSITIONS and None not in (here, there) and here != there:
            given[name] = _resize_positions(weights, given[name], here[0], log)
            there = given[name].shape
        if here != there and fresh is not None and name.startswith(_HEADS) and here is not None:
            result[name], renewed = _flat(fresh)[name], True
            continue
        if here != there:
            raise checkpoint.CheckpointError(
                f"{weights.source} belongs to another model: {name} is "
                f"{'absent' if there is None else list(there)} there and "
                f"{'absent' if here is None else list(here)} here; use the config.model and "
                "config.local that it was trained with."
            )
        result[name] = jax.device_put(given[name], wanted[name].sharding)
    if renewed:
        log(
            f"{weights.source} knows {weights.num_identities} identities, this run has others: "
            "the classifiers start anew."
        )
    paths, tree = jax.tree_util.tree_flatten_with_path(dict(template))
    return jax.tree.unflatten(tree, [result[_name(path)] for path, _ in paths])


def _resize_positions(
    weights: Weights, positions: np.ndarray, length: int, log: Callable[[str], None]
) -> np.ndarray:
    """Cut or stretched and said so; as they are when there is no tail to stretch."""
    t, kept = len(positions), clip.KEPT_POSITIONS
    if t <= kept and length > t:
        return positions
    what = "cut" if length < t else f"stretched behind the first {kept}"
    log(
        f"model.text_length={length}, but {weights.source} was trained with {t}: its text "
        f"positions were {what}."
    )
    return np.asarray(clip.resize_text_positions(jnp.asarray(positions), length))


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree))}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
