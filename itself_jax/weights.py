"""Weights that were trained elsewhere, by the names of our parameters; `fitting` uses them.

`open_` takes everything that `config.init_from` may name: a work directory or its checkpoints, and
the files of other programs (`weight_files` reads them, `dialects` knows their names).
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import checkpoint, dialects, files, hosts, weight_files
from itself_jax import config as config_lib
from itself_jax.data import remote

# What weights say about a configuration; pictures, stride and text length are the run's own.
SIZES = (
    *("model.patch_size", "model.vision_width", "model.vision_depth", "model.vision_heads"),
    *("model.text_width", "model.text_depth", "model.text_heads", "model.vocab_size"),
    *("model.embed_dim", "model.activation", "local.dim"),
)
# Of these, what no array says.
_UNSAID = ("model.vision_heads", "model.text_heads", "model.activation")
IMAGE_POSITIONS = "params/image_encoder/position_embedding"
TEXT_POSITIONS = "params/text_encoder/position_embedding"
HEADS = ("params/global_heads/", "params/local_heads/")
LOCAL = tuple(
    f"{collection}/{part}/"
    for collection in ("params", "batch_stats")
    for part in ("image_grab", "text_grab", "local_heads")
)
# Weights that come with the package, by the name that `init_from` has for them.
SHIPPED = {
    "synthetic_clip": pathlib.Path(__file__).resolve().parent / "data" / "synthetic_clip.npz"
}
# What `describe` writes beside arrays of a foreign layout, and the checkpoint of a conversion.
DESCRIPTION = "itself_jax"
LOGIT_SCALE = "logit_scale"
# Kept beside converted arrays.
_KEPT = ("num_epoch", "iteration", "epoch", "best_alpha", "protocol", LOGIT_SCALE)

Log = Callable[[str], None]


class WeightsError(RuntimeError):
    """Weights cannot be used here; the message is one sentence for the user."""


class Weights(NamedTuple):
    """What was found, by the names of our parameters. Arrays may still lie in their file.

    kind: for the log, e.g. "torch.save (zip), ITSELF".
    dialect: the names in the file.
    origin: the dialect of the program that trained them; a conversion may have renamed them since.
    names: what the file calls each array.
    dropped: arrays of the file that mean nothing here, with reasons.
    sizes: keys of `SIZES`; a number of heads may be None where nobody says it.
    config: `model` and `local` of the run that made them, where that is known.
    num_identities: that its classifiers know; None: it has none.
    meta: num_epoch, iteration, epoch, best_alpha, protocol, logit_scale (CLIP's learnt temperature,
      of no use here), as far as known.
    """

    source: files.Path
    kind: str
    dialect: dialects.Dialect
    origin: dialects.Dialect
    arrays: dict[str, dialects.Array]
    names: dict[str, tuple[str, ...]]
    dropped: dict[str, str]
    sizes: dict[str, Any]
    config: config_lib.Config | None
    num_identities: int | None
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def protocol(self) -> str | None:
        """By which epoch and fusion weight were chosen; None: not in a run of this project."""
        of_a_run = self.dialect is dialects.OURS and DESCRIPTION not in self.meta
        return self.meta.get("protocol", "val" if of_a_run else None)  # the first ones do not say

    @property
    def text_length(self) -> int:
        """Positions of a caption."""
        return self.arrays[TEXT_POSITIONS].shape[0]

    @property
    def has_local(self) -> bool:
        return any(name.startswith(LOCAL) for name in self.arrays)


def open_(source: str | os.PathLike, log: Log, ours: hosts.Hosts | None = None) -> Weights:
    """Whatever `config.init_from` names. Arrays of foreign files are read when they are needed.

    A name of `SHIPPED` is not looked for in the working directory; "./NAME" is.

    Raises:
      WeightsError, WeightFileError, CheckpointError: it is nothing that can be understood here,
        damaged, or of an unknown layout; one sentence each.
    """
    source = SHIPPED.get(os.fspath(source), source)
    in_bucket = not remote.is_local(source)
    source = files.place(source) if in_bucket else pathlib.Path(source).expanduser()
    if _is_checkpoint_folder(source) or _is_checkpoint_folder(source / "checkpoints"):
        return of_run(source, log, ours)
    if in_bucket:
        raise WeightsError(
            f"{source} is no work directory with checkpoints; copy a file of other weights here, "
            "and give its local path."
        )
    if source.name == str(source) and not source.suffix and not source.exists():
        raise WeightsError(
            f"{source} is no file here, nor weights that come with the package: those are "
            f"{', '.join(SHIPPED)}."
        )
    try:
        file = weight_files.read(source)
    except weight_files.WeightFileError:
        _refuse_parts_of_a_run(source)
        raise
    try:
        mapped = dialects.read(file.tensors)
    except dialects.DialectError as error:
        raise WeightsError(f"{source}: {error}.") from error
    arrays, notes = mapped.arrays, list(file.notes)
    stated = _description(source, file.metadata)
    if not stated and not _is_by_openai(file):
        stated = _settings_of_library(file, mapped, notes)
    sizes = _sizes(source, mapped.dialect, arrays, stated)
    if sizes["model.activation"] is None:
        sizes["model.activation"] = mapped.dialect.activation
        if mapped.dialect in dialects.PRETRAINED and not _is_by_openai(file):
            notes += _guesses(mapped.dialect, sizes)
    origin = _origin(stated, mapped.dialect)
    # CLIP alone under the published names has those of a file of IRRA.
    whose = origin.name if origin is mapped.dialect else f"{origin.name} (converted)"
    return Weights(
        source=source,
        kind=f"{file.kind}, {whose}",
        dialect=mapped.dialect,
        origin=origin,
        arrays=arrays,
        names=mapped.names,
        dropped=mapped.dropped,
        sizes=sizes,
        config=_run_config(stated.get("config"), notes),
        num_identities=_num_identities(source, arrays),
        meta={
            **{
                key: value
                for key, value in file.metadata.items()
                if key in ("num_epoch", "iteration", "epoch") and type(value) is int
            },
            **_logit_scale(file.tensors),
            **_progress(stated),
        },
        notes=tuple(notes),
    )


def of_run(
    source: files.Path, log: Log, ours: hosts.Hosts | None = None, step: int | None = None
) -> Weights:
    """The best checkpoint of a work directory, of its `checkpoints` folder, or of a conversion.

    ours: the processes that read it together and must take the same one; None: this one alone.
    step: of another checkpoint than the best one, if it was kept (`keep_epochs`).

    Raises:
      CheckpointError: there is none, or all are damaged.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    checkpoints = checkpoint.Checkpoints(folder, log=log, ours=ours)
    parts = ("params", "batch_stats")
    found = checkpoints.restore_best(parts, step=step) if folder.is_dir() else None
    if found is None and folder.is_dir() and step is None:
        found = checkpoints.restore_best(parts, scored=False)
        if found is not None and DESCRIPTION not in found.meta:
            found = None  # a run that was stopped before its first validation
    if found is None:
        which = "" if step is None else f" of step {step}"
        raise checkpoint.CheckpointError(
            f"{folder} holds no validated checkpoint{which}: train there until the first "
            "validation, or give other weights in config.init_from."
        )
    arrays = {name: _Held(array) for name, array in flat(found.state).items()}
    described = found.meta.get(DESCRIPTION, {})
    settings = described.get("config") or _settings_beside(folder)
    notes: list[str] = []
    config = _run_config(settings, notes)
    described = {**_unsaid_in(settings), **described}
    sizes = _sizes(source, dialects.OURS, arrays, described)
    if sizes["model.activation"] is None:
        activation = config_lib.CLIP_ACTIVATION
        sizes["model.activation"] = activation
        notes.append(f"WARNING: no config.json says its activation; {activation} is taken")
    origin = _origin(described, dialects.OURS)
    whose = "" if origin is dialects.OURS else f", {origin.name} (converted)"
    return Weights(
        source=source,
        kind=f"checkpoint of itself_jax{whose}",
        dialect=dialects.OURS,
        origin=origin,
        arrays=arrays,
        names={name: (name,) for name in arrays},
        dropped={},
        sizes=sizes,
        config=config,
        num_identities=_num_identities(source, arrays),
        meta={
            "num_epoch": settings.get("num_epochs", 0),
            "iteration": found.step,
            **found.meta,
            **_progress(described),
        },
        notes=tuple(notes),
    )


def read(weights: Weights, name: str, array: dialects.Array) -> np.ndarray:
    """One array as the model keeps it: float32, or int32 for a count.

    Raises:
      WeightsError: it holds NaN or infinity, or a number that is not whole where a count is due.
    """
    values = array.read()
    called = weights.names.get(name, (name,))
    if name.endswith("batches"):
        count = float(values) if values.ndim == 0 else math.nan
        if not (0 <= count < 2**31 and count == int(count)):
            raise WeightsError(
                f"{weights.source}: {called[0]} is {values}, not a number of batches; the file is "
                "damaged or of another model."
            )
        return values.astype(np.int32)
    if values.dtype.kind not in "fV" and values.dtype.name != "bfloat16":
        raise WeightsError(
            f"{weights.source}: {called[0]} holds {values.dtype.name}, not floating-point numbers; "
            "it is no weight of this model."
        )
    # Nearly every file has float16 somewhere: what is computed with is float32.
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise WeightsError(
            f"{weights.source}: {', '.join(called)} holds {bad} values that are NaN or infinite; "
            "its training diverged or the file is damaged: use an earlier checkpoint."
        )
    return values


def halved(source: files.Path, name: str, values: np.ndarray) -> np.ndarray:
    """One array in half precision; `source` and `name` are for the message.

    Raises:
      WeightsError: half precision cannot hold one of its values.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise WeightsError(
            f"{source}: {name} holds {np.abs(values).max():g}, which float16 cannot; "
            "python -m itself_jax.convert with --dtype=float32 keeps it."
        )
    return half


def describe(weights: Weights, config: config_lib.Config) -> dict[str, Any]:
    """What no layout says of itself, for a JSON field beside the arrays; read back by `open_`.

    Whose weights they are, heads and activation, as `config` has them; of a run of this project
    also its settings of `model` and `local` (grid of the positions, source and size of the bank),
    epoch and fusion weight.
    """
    description: dict[str, Any] = {
        f"model.{name}": getattr(config.model, name)
        for name in ("vision_heads", "text_heads", "activation")
    }
    if weights.config is not None:
        made_with = config_lib.to_dict(config_lib.replace(weights.config, description))
        description["config"] = {group: made_with[group] for group in ("model", "local")}
    return {"origin": weights.origin.name, **description, **_progress(weights.meta)}


def flat(tree: Any) -> dict[str, Any]:
    """{"params/image_encoder/…": leaf} of nested dicts."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree))}


def listed(items: list[str], most: int = 30) -> str:
    """Items as one text, at most `most` of them."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


class _Held:
    """An array that is in memory already."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = tuple(array.shape), array.dtype

    def read(self) -> np.ndarray:
        return self._array


def _is_checkpoint_folder(folder: files.Path) -> bool:
    try:
        return any(
            (entry / "state").is_dir() and entry.name[0].isdigit() for entry in folder.iterdir()
        )
    except OSError:
        return False


def _refuse_parts_of_a_run(source: pathlib.Path) -> None:
    """Says what to give instead of a run without checkpoints, or of one of its checkpoints."""
    if (source / "state").is_dir() and (source / "meta").exists():
        raise WeightsError(
            f"{source} is one checkpoint of {source.parent}: give that folder, whose best "
            "checkpoint is taken, or a copy of it that holds this one alone."
        )
    run = source.parent if source.name == "checkpoints" else source
    if (run / "checkpoints").is_dir() or _settings_beside(run / "checkpoints"):
        raise WeightsError(
            f"{run} is a work directory of itself_jax without a checkpoint: train there until the "
            "first validation, or give other weights."
        )


def _run_config(settings: Any, notes: list[str]) -> config_lib.Config | None:
    """The part of a run's configuration that its arrays depend on; None: there is none.

    Keys that this version does not know are left out, and named in `notes`.
    """
    if not settings:
        return None
    known, unknown = {}, []
    defaults = config_lib.to_dict(config_lib.Config())
    try:
        for group in ("model", "local"):
            values = settings[group]
            known[group] = {key: values[key] for key in values if key in defaults[group]}
            unknown += [f"{group}.{key}" for key in values if key not in defaults[group]]
        config = config_lib.from_dict(known)
    except (KeyError, TypeError, config_lib.ConfigError) as error:
        # The arrays themselves say most of it.
        notes.append(f"WARNING: the settings of its run are not used, they cannot be read: {error}")
        return None
    if unknown:
        notes.append(
            f"WARNING: the settings of its run have keys of another version, which are left out: "
            f"{', '.join(unknown)}"
        )
    return config


def _unsaid_in(settings: Any) -> dict[str, Any]:
    """Heads and activation of a run's settings, whatever else is in them."""
    try:
        found = {key: settings["model"][key.removeprefix("model.")] for key in _UNSAID}
    except (KeyError, TypeError):
        return {}
    heads = [type(value) is int and value > 0 for key, value in found.items() if "heads" in key]
    fits = all(heads) and found["model.activation"] in (None, *config_lib.ACTIVATIONS)
    return found if fits else {}


def _settings_beside(folder: files.Path) -> dict[str, Any]:
    """From the `config.json` of the work directory around a folder of checkpoints; {} without."""
    for place in (folder.parent, folder):
        try:
            return {**json.loads((place / "config.json").read_text(encoding="utf-8"))["config"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _progress(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta[key] for key in _KEPT if key in meta}


def _description(source: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe` wrote."""
    if DESCRIPTION not in metadata:
        return {}
    try:
        return {**json.loads(metadata[DESCRIPTION])}
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{source}: field {DESCRIPTION!r} is {metadata[DESCRIPTION]!r}, not the JSON that a "
            "conversion writes there; convert the weights again."
        ) from error


def _settings_of_library(
    file: weight_files.TensorFile, mapped: dialects.Mapped, notes: list[str]
) -> dict[str, Any]:
    """Heads and activation from the settings that the file's own library keeps beside it.

    Those of another model are an error in a folder, and ignored with a note beside a lone file.
    """
    name = mapped.dialect.settings
    content = file.settings(name) if name is not None else None
    stated = dialects.stated(content) if content is not None else None
    if stated is None:
        return {}
    path, found = file.file.parent / name, _sizes(file.path, mapped.dialect, mapped.arrays, {})
    different = [
        f"{key}={value} and the arrays {found[key]}"
        for key, value in stated.values.items()
        if key not in _UNSAID and value != found[key]
    ]
    if different:
        what = f"{path} says {', '.join(different)}"
        if file.is_lone:
            notes.append(f"{name} beside it is of another model and ignored: {what}")
            return {}
        raise WeightsError(
            f"{what}: it is of another model; put the one there that belongs to {file.file.name}, "
            "or give that file alone, outside of the folder."
        )
    if stated.objection is not None:
        raise WeightsError(f"{file.path}: its {name} says {stated.objection}.")
    notes.append(f"settings from {path}")
    return {key: stated.values[key] for key in _UNSAID}


def _guesses(dialect: dialects.Dialect, sizes: Mapping[str, Any]) -> list[str]:
    """What is taken where neither a file nor settings beside it say it."""
    whose = "as in most models of it" if dialect.activation == "gelu" else "as in OpenAI's CLIP"
    notes = [
        f"WARNING: nothing in it says which activation it was trained with; {dialect.activation} "
        f"is taken, {whose}. Set model.activation if this is wrong (open_clip: gelu, unless its "
        "model's name ends in -quickgelu)"
    ]
    heads = sizes["model.vision_heads"], sizes["model.text_heads"]
    if None not in heads:
        notes.append(
            f"WARNING: nothing in it says how many heads it has; one for each "
            f"{config_lib.CLIP_HEAD_WIDTH} of the width is taken, {heads[0]} and {heads[1]}, as in "
            "OpenAI's CLIP"
        )
    return notes


def _origin(described: Mapping[str, Any], dialect: dialects.Dialect) -> dialects.Dialect:
    known = {known.name: known for known in (*dialects.DIALECTS, dialects.OURS)}
    return known.get(str(described.get("origin")), dialect)


def _logit_scale(tensors: Mapping[str, dialects.Array]) -> dict[str, float]:
    """CLIP's temperature, where a file has a number for it."""
    for name in (LOGIT_SCALE, f"base_model.{LOGIT_SCALE}"):
        if name in tensors and math.prod(tensors[name].shape) == 1:
            value = float(tensors[name].read().reshape(()))
            return {LOGIT_SCALE: value} if math.isfinite(value) else {}
    return {}


def _is_by_openai(file: weight_files.TensorFile) -> bool:
    return file.kind == "TorchScript" or "input_resolution" in file.tensors


def _sizes(
    source: files.Path,
    dialect: dialects.Dialect,
    arrays: Mapping[str, dialects.Array],
    stated: Mapping[str, Any],
) -> dict[str, Any]:
    """Sizes from the arrays' shapes; heads and activation as `stated`, heads else by CLIP's rule.

    Raises:
      WeightsError: an array that says one is missing or has another rank.
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        found = arrays[path].shape if path in arrays else None
        if found is None or len(found) != rank:
            called = (*dialects.spell(dialect, path), path)[0]
            what = "is missing" if found is None else f"has shape {list(found)}, not {rank} axes"
            raise WeightsError(
                f"{source}: {called} {what}, so the model's sizes are not known; the file is "
                "incomplete or of another model."
            )
        return found

    image, text = "params/image_encoder/", "params/text_encoder/"
    rows, columns, _, vision_width = shape(f"{image}patch_embedding/kernel", 4)
    if rows != columns:
        raise WeightsError(
            f"{source}: patches of {rows}x{columns} pixels, but only square ones fit."
        )
    vocab_size, text_width = shape(f"{text}token_embedding/embedding", 2)
    sizes = {
        "model.patch_size": rows,
        "model.vision_width": vision_width,
        "model.vision_depth": _depth(arrays, image),
        "model.text_width": text_width,
        "model.text_depth": _depth(arrays, text),
        "model.vocab_size": vocab_size,
        "model.embed_dim": shape(f"{image}projection", 2)[1],
        "model.activation": stated.get("model.activation"),
        "local.dim": None,
    }
    for tower in ("vision", "text"):
        width = sizes[f"model.{tower}_width"]
        heads, rest = divmod(width, config_lib.CLIP_HEAD_WIDTH)
        by_rule = heads if rest == 0 else None
        if dialect is dialects.OURS:  # of any width
            by_rule = None
        sizes[f"model.{tower}_heads"] = stated.get(f"model.{tower}_heads") or by_rule
    if any(name.startswith(LOCAL) for name in arrays):
        sizes["local.dim"] = shape("params/image_grab/skip/kernel", 2)[1]
    return sizes


def _depth(arrays: Mapping[str, Any], tower: str) -> int:
    stem = f"{tower}transformer/layer_"
    layers = (name[len(stem) :].split("/")[0] for name in arrays if name.startswith(stem))
    return 1 + max(map(int, layers), default=-1)


def _num_identities(source: files.Path, arrays: Mapping[str, dialects.Array]) -> int | None:
    classes = {
        array.shape[-1] for name, array in arrays.items() if "_classifier/" in name and array.shape
    }
    if len(classes) > 1:
        raise WeightsError(
            f"{source}: its classifiers disagree on the number of classes, "
            f"{', '.join(map(str, sorted(classes)))}; the file is damaged or put together."
        )
    classifier = arrays.get("params/global_heads/identity_classifier/kernel")
    return (
        classifier.shape[1] - 1 if classifier is not None and len(classifier.shape) == 2 else None
    )


def name_of(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
