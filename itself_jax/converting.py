"""Conversion of weights from one kind of file to another, with a report of every array."""

import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import checkpoint, command, dialects, encoders, fitting, weight_files, weights
from itself_jax import config as config_lib
from itself_jax.models import itself

_TORCH = (".pth", ".pt")
_ENDINGS = (*_TORCH, ".safetensors", ".npz")
_FIRST_LOGIT_SCALE = math.log(1 / 0.07)

# sha256 of the files that OpenAI publishes.
_KNOWN = {
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "OpenAI's ViT-B/16",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "OpenAI's ViT-B/32",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "OpenAI's ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "OpenAI's ViT-L/14@336px",
}


class DestinationError(weights.WeightsError):
    """Nothing can be written under a name, or not so; a sentence for the user."""


class Source(NamedTuple):
    """Weights that were checked against the model they make.

    config: settings in which no position has to be resized.
    absent: parameters of the whole model that they do not have, with reasons.
    grid: rows and columns of the patches; None: nothing says it, and `config` has them in a row.
    """

    weights: weights.Weights
    config: config_lib.Config
    absent: dict[str, str]
    grid: tuple[int, int] | None


def examine(
    path: str | os.PathLike, log: Callable[[str], None], given: Mapping[str, Any] | None = None
) -> Source:
    """Reads weights, accounts for every array and prints the parity report.

    Its last lines are norms of the embeddings of a fixed picture and sentence: who gets the same
    ones has the same model. `given` are flat config keys that the weights do not say, or say
    wrongly: "model.activation", "model.image_size", "model.stride", "model.vision_heads" and
    "model.text_heads".

    Raises:
      WeightsError, WeightFileError, CheckpointError, ConfigError: they cannot be used.
    """
    found = weights.open_(path, log)
    given = {"local.enabled": found.has_local, **(given or {})}
    if found.config is None:
        picture = fitting.native_picture(found, square=True)
        given = {"model.text_length": found.text_length, **picture, **given}
    known = "model.image_size" in given or found.config is not None
    if not known:
        given["model.image_size"] = fitting.picture_in_a_row(found)
    base = found.config or config_lib.Config()
    config = fitting.resolve(base, found, log, training=True, changes=given, ask=encoders.HEADS)
    rows, columns = config.model.grid
    positions = found.arrays[weights.IMAGE_POSITIONS].shape[0] - 1
    if rows * columns != positions:
        raise weights.WeightsError(
            f"{found.source} has positions for {positions} patches, but a picture of "
            f"{config.model.image_size[0]}x{config.model.image_size[1]} has {rows}x{columns} of "
            f"them: give another --image_size or --stride."
        )
    absent = fitting.check(found, _shapes(found, config), config.model)
    source = Source(found, config, absent, config.model.grid if known else None)
    for line in report(source):
        log(line)
    for line in _probe(source) if known else ():
        log(line)
    return source


def report(source: Source) -> list[str]:
    """What was found, as lines: file, arrays, parameters, sizes."""
    found, model = source.weights, source.config.model
    lines = [f"{found.source}: {found.kind}"]
    if found.source.is_file():
        digest = _sha256(found.source)
        known = _KNOWN.get(digest, "not one of OpenAI's published files")
        lines.append(f"sha256       {digest} ({known})")
    reasons = _count(source.absent.values()), _count(found.dropped.values())
    lines.append(
        f"arrays       {sum(map(len, found.names.values()))} mapped, "
        f"{len(source.absent)} absent{reasons[0]}, {len(found.dropped)} dropped{reasons[1]}"
    )
    parts = {"encoders": 0, "local branch": 0, "classifiers": 0}
    for name, array in found.arrays.items():
        collection, part = name.split("/")[:2]
        if collection == "params":
            kind = {"heads": "classifiers", "grab": "local branch"}.get(part.split("_")[1])
            parts[kind or "encoders"] += math.prod(array.shape)
    lines.append(
        f"parameters   {sum(parts.values()):,}: "
        + ", ".join(f"{kind} {count:,}" for kind, count in parts.items() if count)
    )
    grid = f"{model.grid[0]}x{model.grid[1]} patches"
    if source.grid is None:
        grid = f"{model.grid[0]} patches in an unknown grid (no probe: say --image_size)"
    lines.append(
        f"image        ViT/{model.patch_size}, width {model.vision_width}, depth "
        f"{model.vision_depth}, heads {model.vision_heads}, {grid}"
    )
    lines.append(
        f"text         width {model.text_width}, depth {model.text_depth}, heads "
        f"{model.text_heads}, {model.text_length} positions, {model.vocab_size} words"
    )
    local = f", local {source.config.local.dim}" if found.has_local else ""
    lines.append(f"embedding    global {model.embed_dim}{local}")
    lines.append(f"activation   {model.activation}")
    if found.num_identities is not None:
        lines.append(f"identities   {found.num_identities}")
    return lines


def verify(source: Source, log: Callable[[str], None]) -> None:
    """Reads every array, as `write` would.

    Raises:
      WeightsError: one holds NaN, infinity or no numbers that a weight can have.
      WeightFileError: the file is damaged.
    """
    for name, array in source.weights.arrays.items():
        weights.read(source.weights, name, array)
    log(f"values       of all {len(source.weights.arrays)} parameters and statistics are finite")


def ending(path: str | os.PathLike, *, layout: str | None, dtype: str | None) -> str:
    """What kind of file a destination becomes, ".pth" and so on; "" for a folder.

    Raises:
      DestinationError: an ending of nothing that can be written, or a layout or number type for a
        folder, which has neither.
    """
    path, known = pathlib.Path(path), ", ".join(_ENDINGS)
    found = path.suffix.lower()
    if found in _ENDINGS:
        return found
    if re.fullmatch(r"\.[a-z]\w*", found):  # no part of a version or a date
        raise DestinationError(
            f"{path} ends in {path.suffix}, as no file that can be written does: end it in one of "
            f"{known}, or give a name without an ending, which becomes a folder."
        )
    for flag, value in (("layout", layout), ("dtype", dtype)):
        if value is not None:
            raise DestinationError(
                f"--{flag}={value} is for files, but {path} becomes a folder with our own names in "
                f"float32: leave it out, or end DST in one of {known}."
            )
    return ""


def write(
    source: Source,
    path: str | os.PathLike,
    log: Callable[[str], None],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> pathlib.Path:
    """Writes weights as the ending of `path` says; a reader never sees half of them.

    Args:
      source: what `examine` returned.
      path: ".pth", ".pt", ".safetensors" or ".npz"; a folder without an ending.
      log: takes one line for everything that was decided.
      layout: names in a file, "published" [default] or "openai".
      dtype: in a file, "float32" or "published"; default: the latter in a published `.pth`.
      force: replaces what is there.

    Raises:
      WeightsError: the destination is in the way, or a value does not fit into float16.
      WeightFileError, CheckpointError: it cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path).expanduser()
    kind = ending(path, layout=layout, dtype=dtype)
    command.settle(path.absolute())
    if path.exists() and not force:
        raise weights.WeightsError(
            f"{path} exists already: give another DST, or --force to replace it."
        )
    if path.is_dir() and not _is_conversion(path):
        raise weights.WeightsError(
            f"{path} is a folder that no conversion wrote, so that --force does not replace it: "
            "remove it yourself, or give another DST."
        )
    found = source.weights
    arrays = {name: _Checked(found, name, array) for name, array in found.arrays.items()}
    try:
        with command.folders_above(path):
            if kind:
                _write_file(source, path, kind, arrays, layout or "published", dtype, force, log)
            else:
                _write_checkpoint(source, path, arrays, log)
    except OSError as error:
        raise weights.WeightsError(
            f"{path} cannot be written ({error.strerror or error}); free space there, or choose "
            "another DST."
        ) from error
    return path


def _write_file(
    source: Source,
    path: pathlib.Path,
    kind: str,
    arrays: Mapping[str, dialects.Array],
    layout: str,
    dtype: str | None,
    force: bool,
    log: Callable[[str], None],
) -> None:
    """One file of the given kind, under the names of a layout."""
    found = source.weights
    try:
        named, left_out = dialects.write(arrays, dialects.WRITABLE[layout])
    except dialects.DialectError as error:
        raise weights.WeightsError(
            f"{found.source} cannot be written to {path}: {error}."
        ) from error
    if layout == "openai":
        # A parameter of OpenAI's model, whose loader is strict; the published code has none.
        scale = found.meta.get(weights.LOGIT_SCALE)
        if scale is None:
            scale = _FIRST_LOGIT_SCALE
            log(
                f"logit_scale  {scale:.4f}, with which CLIP's training begins: {found.source} has "
                "none, and OpenAI's loader asks for one"
            )
        named[weights.LOGIT_SCALE] = _Number(scale)
    if dtype is None:
        dtype = "published" if kind in _TORCH and layout == "published" else "float32"
    rounding = _Rounding(path)
    stored = {
        name: _Stored(name, array, dtype == "published", rounding) for name, array in named.items()
    }
    note = json.dumps(weights.describe(found, source.config))
    if kind in _TORCH and layout == "openai":
        # OpenAI's program takes the names and nothing else.
        weight_files.write_torch(path, stored, wrap=None, force=force)
        for line in _unsaid(source):
            log(line)
    elif kind in _TORCH:
        # What the published program writes beside the model.
        progress = {key: found.meta.get(key, 0) for key in ("num_epoch", "iteration", "epoch")}
        weight_files.write_torch(
            path, stored, extra={**progress, weights.DESCRIPTION: note}, force=force
        )
    elif kind == ".npz":
        weight_files.write_npz(path, stored, metadata={weights.DESCRIPTION: note}, force=force)
    else:
        metadata = {weights.DESCRIPTION: note}
        weight_files.write_safetensors(path, stored, metadata=metadata, force=force)
    if left_out:
        log(f"left out     {len(left_out)} arrays{_count(left_out.values())}")
    if rounding.values:
        log(
            f"rounding     {rounding.values:,} values are not exact in float16, by "
            f"{rounding.largest:.1e} of their size at most; --dtype=float32 keeps them"
        )
    names = dialects.WRITABLE[layout].name
    log(f"Written to {path}: {len(stored)} arrays under the names of {names}")


def _unsaid(source: Source) -> list[str]:
    """What a file of names alone lets its reader guess wrongly."""
    model = source.config.model
    by_rule = {
        "activation": config_lib.CLIP_ACTIVATION,
        "vision_heads": model.vision_width // config_lib.CLIP_HEAD_WIDTH,
        "text_heads": model.text_width // config_lib.CLIP_HEAD_WIDTH,
    }
    wrong = [f"{k} {getattr(model, k)}" for k, v in by_rule.items() if getattr(model, k) != v]
    if not wrong:
        return []
    return [f"WARNING: this file cannot say {', '.join(wrong)}, which is not OpenAI's: remember it"]


class _Checked:
    """An array as the model keeps it, read when it is written."""

    def __init__(self, found: weights.Weights, name: str, array: dialects.Array):
        self._found, self._name, self._array = found, name, array
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(np.int32 if name.endswith("batches") else np.float32)

    def read(self) -> np.ndarray:
        return weights.read(self._found, self._name, self._array)


class _Number:
    """A lone number as an array."""

    def __init__(self, value: float):
        self._value = np.array(value, np.float32)
        self.shape, self.dtype = self._value.shape, self._value.dtype

    def read(self) -> np.ndarray:
        return self._value


class _Rounding:
    """What float16 loses of the values that go through."""

    def __init__(self, path: pathlib.Path):
        self.path, self.values, self.largest = path, 0, 0.0

    def halve(self, name: str, values: np.ndarray) -> np.ndarray:
        half = weights.halved(self.path, name, values)
        inexact = half.astype(np.float32) != values
        if inexact.any():
            error = np.abs(half.astype(np.float32) - values)[inexact] / np.abs(values[inexact])
            self.values += int(inexact.sum())
            self.largest = max(self.largest, float(error.max()))
        return half


class _Stored:
    """An array in the number type that the file has for its name."""

    def __init__(self, name: str, array: dialects.Array, published: bool, rounding: _Rounding):
        self._name, self._array, self._rounding = name, array, rounding
        self.shape, self.dtype = array.shape, np.dtype(array.dtype)
        if self.dtype.kind == "i":
            self.dtype = np.dtype(np.int64)  # PyTorch's counts
        elif published and dialects.HALF.fullmatch(name):
            self.dtype = np.dtype(np.float16)

    def read(self) -> np.ndarray:
        values = self._array.read()
        if self.dtype == np.float16:
            return self._rounding.halve(self._name, values)
        return values.astype(self.dtype)


def _shapes(found: weights.Weights, config: config_lib.Config) -> dict[str, Any]:
    """Every parameter and statistic of the whole model, as shapes; local branch included."""
    whole = config_lib.replace(config, {"local.enabled": True})
    model = itself.ITSELF(whole.model, whole.local, found.num_identities or 1)
    images = jax.ShapeDtypeStruct((2, *whole.model.image_size, 3), np.float32)
    ids = jax.ShapeDtypeStruct((2, whole.model.text_length), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), images, ids)


def _probe(source: Source) -> list[str]:
    """Norms of the embeddings of a fixed picture and sentence, in float32."""
    found, config = source.weights, config_lib.replace(source.config, {"precision": "float32"})
    ready = encoders.of_weights(found, config, lambda line: None)
    height, width = config.model.image_size
    y, x, colour = np.ogrid[:height, :width, :3]
    picture = ((7 * y + 13 * x + 61 * colour + (y * x) // 16) % 256).astype(np.uint8)
    # Not through the tokenizer, so that a model of any vocabulary has a probe: SOT, words, EOT.
    last = config.model.vocab_size - 1
    words = 1 + np.arange(min(20, config.model.text_length - 2)) * 101 % (last - 2)
    ids = np.zeros((1, config.model.text_length), np.int32)
    ids[0, : len(words) + 2] = [last - 1, *words, last]
    embeddings = {
        "picture": jax.jit(ready.training.encode_images)(ready.variables, picture[None]),
        "sentence": jax.jit(ready.training.encode_captions)(ready.variables, ids),
    }
    lines = []
    for name, embedding in embeddings.items():
        norms = {"global": embedding.global_, "local": embedding.local}
        shown = (f"{k} {np.linalg.norm(v):.5f}" for k, v in norms.items() if v is not None)
        lines.append(f"probe        |{name}| " + ", ".join(shown))
    return lines


def _write_checkpoint(
    source: Source,
    path: pathlib.Path,
    arrays: Mapping[str, dialects.Array],
    log: Callable[[str], None],
) -> None:
    """A folder with one Orbax checkpoint of parameters and BatchNorm statistics."""
    state: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = state
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jax.device_put(array.read())  # Orbax copies NumPy arrays, but not these
    description = weights.describe(source.weights, source.config)
    meta = {"score": None, weights.DESCRIPTION: description, "kind": source.weights.kind}
    temporary = path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with checkpoint.Checkpoints(temporary / "checkpoints", log=log) as checkpoints:
            checkpoints.save(source.weights.meta.get("iteration", 0), state, meta)
        command.move(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"Written to {path}, as float32: use it with --config.init_from={path}")


def _is_conversion(folder: pathlib.Path) -> bool:
    """Whether it holds checkpoints and nothing else: a run has more."""
    return [entry.name for entry in folder.iterdir()] in ([], ["checkpoints"])


def _count(reasons: Any) -> str:
    """ " (3: because …; 2: …)" of a list of reasons."""
    reasons = list(reasons)
    if not reasons:
        return ""
    return " (" + "; ".join(f"{reasons.count(r)}: {r}" for r in dict.fromkeys(reasons)) + ")"


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
