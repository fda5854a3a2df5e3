"""Both encoders of a model as files that run without this package: StableHLO and ONNX.

An export is one folder:

    image.onnx, text.onnx             weights inside (beside it, in .data, from 2 GB on)
    image.stablehlo, text.stablehlo   from `jax.export`, for CPU, CUDA and TPU (this jax or newer)
    image.npz, text.npz               the weights that these take as their first argument
    preprocessing.json                everything about pictures, text and similarity
    tokenizer.json                    CLIP's, for the `tokenizers` library
    example.py                        a picture and a sentence with ONNX Runtime

All take batches of any size and return un-normalised float32 `global` and, with a local branch,
`local`. Weights lie outside of the StableHLO because XLA folds constants: with those of ViT-B/16
inside, compiling takes three times as long and three times the memory.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from itself_jax import command, encoders, step, weights
from itself_jax.data import tokenizer

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
# Largest difference from our own encoders, relative to the largest value of an output.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
SETTINGS = "preprocessing.json"

_NEEDS = {"stablehlo": ("flatbuffers",), "onnx": ("onnx", "onnxruntime")}
_PACKAGES = ("itself_jax", "jax", "jaxlib", "flax", "numpy", "onnx", "onnxruntime")
_EXAMPLE = pathlib.Path(__file__).with_name("exported_example.py")
_BATCHES = (1, 3)  # that are compared
# What ftfy and html do most often, for a tokenizer that has neither. The first: twice escaped.
_REPLACED = {
    "(?i)&amp;(amp;)*": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;|[“”„‟]": '"',
    "&apos;|&#0*39;|[‘’‚‛ʼ]": "'",
    r"&nbsp;|\s+": " ",
}

Log = Callable[[str], None]


class ExportError(RuntimeError):
    """An export cannot be made; the message is one sentence for the user."""


class _Tower(NamedTuple):
    """One encoder as a pure function, and our own to compare with.

    encode: (weights, argument) → arrays by name.
    argument: its shape and type; the batch is symbolic.
    stored_as: type of the argument in ONNX.
    probe: n fixed rows of the argument, others for another seed.
    expected: of such rows.
    """

    name: str
    input: str
    encode: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    weights: dict[str, Any]
    argument: jax.ShapeDtypeStruct
    stored_as: type
    probe: Callable[[int, int], np.ndarray]
    expected: Callable[[np.ndarray], dict[str, Any]]


def export(
    source: str | os.PathLike,
    path: str | os.PathLike,
    log: Log,
    *,
    formats: Sequence[str] = FORMATS,
    force: bool = False,
    **options: Any,
) -> pathlib.Path:
    """Writes an export of the weights in `source`, and compares each file with our encoders.

    Args:
      source: anything that `itself_jax.load` takes.
      path: the folder to write; it appears when everything in it is complete.
      log: takes one line for everything that was decided, written and compared.
      formats: of `FORMATS`.
      force: replaces an existing export.
      **options: of `itself_jax.load`.

    Raises:
      ExportError: the folder is in the way or cannot be written, a package is missing, the model
        cannot be expressed, or a file computes something else; nothing is left behind.
      WeightsError, WeightFileError, CheckpointError, ConfigError: of `itself_jax.load`.
    """
    path = pathlib.Path(path).expanduser().resolve()
    _require(formats)
    command.settle(path)
    _check_place(path, force)
    ready = encoders.load(source, log=log, **options)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        parity = write(ready, temporary, log, formats=formats)
        settings = describe(ready, parity)
        _write_json(temporary / SETTINGS, settings)
        if "onnx" in formats:
            shutil.copyfile(_EXAMPLE, temporary / "example.py")
        command.move(temporary, path)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}); free space there, or choose "
            "another DST."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"Written to {path}: {', '.join(sorted(os.listdir(path)))}")
    return path


def write(
    ready: encoders.Encoders, folder: pathlib.Path, log: Log, *, formats: Sequence[str] = FORMATS
) -> dict[str, Any]:
    """Writes both encoders and the tokenizer, and compares what was written with `ready`.

    Returns:
      {file: {output: largest difference relative to the output's largest value}}.

    Raises:
      ExportError: the model cannot be expressed, or a file computes something else.
      OSError: the folder cannot be written.
    """
    writers = {"stablehlo": _write_stablehlo, "onnx": _write_onnx}
    limit = TOLERANCES[step.compute_dtype(ready.config.precision).name]
    parity = {}
    for tower in _towers(ready):
        for name in formats:
            run, files = writers[name](tower, folder, ready)
            differences = _compare(tower, run, seed=0)
            if differences["global"] <= limit < differences.get("local", 0.0):
                # Rounding decides which of two equally salient tokens is kept. That happens to one
                # picture in thousands: not to others at the same time.
                log(f"{files[0].name}: on the first probe another token was kept; a second one:")
                differences = _compare(tower, run, seed=1)
            parity[files[0].name] = differences
            sizes = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in files)
            shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
            log(f"{sizes}: {shown} off at batches of {' and '.join(map(str, _BATCHES))}")
            worst = max(differences.values())
            if not worst <= limit:
                raise ExportError(
                    f"{files[0].name} differs from the model by {worst:.1e} of the largest value, "
                    f"more than {limit:.0e}, so nothing was written: try other versions of jax and "
                    "onnxruntime."
                )
    if _knows_clip(ready):
        _write_json(folder / "tokenizer.json", tokenizer_json(ready.config.model.text_length))
    else:
        log(
            f"No tokenizer.json: the model knows {ready.config.model.vocab_size} ids, not the "
            f"{tokenizer.VOCAB_SIZE} of CLIP's vocabulary."
        )
    return parity


def describe(ready: encoders.Encoders, parity: Mapping[str, Any]) -> dict[str, Any]:
    """`preprocessing.json`: what somebody needs who has the files and not this package."""
    model, local = ready.config.model, ready.config.local
    with_local, knows_clip = local.enabled, _knows_clip(ready)
    formula = "cos(global of image, global of text)"
    if with_local:
        formula = f"alpha * {formula} + (1 - alpha) * cos(local of image, local of text)"
    versions = _versions()
    stablehlo = {}
    if "image.stablehlo" in parity:
        stablehlo["stablehlo"] = {
            "call": "jax.export.deserialize(content of image.stablehlo).call("
            "dict(numpy.load('image.npz')), pixels); text with ids alike",
            "jax": f"{versions['jax']} or newer",
        }
    return {
        "image": {
            "input": "pixels: uint8 (batch, height, width, 3), RGB",
            "size": list(model.image_size),
            "resize": "straight to (height, width) with PIL.Image.Resampling.BILINEAR, whatever "
            "the aspect ratio; the EXIF orientation is not applied",
            "normalisation": "inside the graph: (pixels / 255 - mean) / std",
            "mean": list(step.IMAGE_MEAN),
            "std": list(step.IMAGE_STD),
        },
        "text": {
            "input": "ids: int64 (batch, length) in ONNX, int32 in StableHLO",
            "length": model.text_length,
            "vocabulary": model.vocab_size,
            "tokenizer": "CLIP's byte-pair encoding, lower case, with <|mask|> as 49405",
            "file": "tokenizer.json" if knows_clip else None,
            "cleaning": "ftfy.fix_text, html.unescape twice, white space to one blank; "
            "tokenizer.json does what is frequent of it: plain English has the same ids",
            "start": tokenizer.SOT if knows_clip else None,
            "end": tokenizer.EOT if knows_clip else None,
            "pad": tokenizer.PAD,
            "cut": "start, the first length - 2 ids, end; then pads",
        },
        "embedding": {
            "global": model.embed_dim,
            "local": local.dim if with_local else None,
            "normalised": False,
        },
        "similarity": {
            "formula": formula,
            "alpha": ready.alpha if with_local else None,
        },
        "model": {
            "patch_size": model.patch_size,
            "stride": model.stride or model.patch_size,
            "activation": model.activation,
            "saliency": local.inference_saliency if with_local else None,
            "bank_ratio": local.ratio if with_local else None,
            "compute_type": step.compute_dtype(ready.config.precision).name,
        },
        **stablehlo,
        "source": {"path": str(ready.source), "kind": ready.kind},
        "difference_from_source": parity,
        "versions": versions,
    }


def tokenizer_json(text_length: int) -> dict[str, Any]:
    """CLIP's tokenizer in the format of the `tokenizers` library, cut and padded as the model is.

    Equal to `tokenizer.Tokenizer`, except where ftfy repairs broken encodings or replaces letters
    (ligatures, full-width forms), for rare HTML entities, and where a special token that is written
    out in the text touches punctuation.
    """
    pieces, ids, ranks = tokenizer.read_vocabulary()
    special = (tokenizer.MASK, tokenizer.SOT, tokenizer.EOT)
    start, end = pieces[tokenizer.SOT], pieces[tokenizer.EOT]
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

    def template(*parts: str) -> list[dict[str, Any]]:
        sequences = ("A", "B")
        return [
            {"Sequence" if part in sequences else "SpecialToken": {"id": part, "type_id": 0}}
            for part in parts
        ]

    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": text_length,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": text_length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": tokenizer.PAD,
            "pad_type_id": 0,
            "pad_token": pieces[tokenizer.PAD],
        },
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,  # looked for in lower case, as we do
                "special": True,
            }
            for i in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                *(
                    {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
                    for pattern, content in _REPLACED.items()
                ),
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": words},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template(start, "A", end),
            "pair": template(start, "A", end, start, "B", end),
            "special_tokens": {
                name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, end)
            },
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(merge) for merge in ranks],
        },
    }


def _towers(ready: encoders.Encoders) -> list[_Tower]:
    model, training = ready.config.model, ready.training
    (batch,) = jax.export.symbolic_shape("batch")
    height, width = model.image_size
    last, room = model.vocab_size - 1, model.text_length - 2

    def pictures(n: int, seed: int) -> np.ndarray:
        k, y, x, colour = np.ogrid[:n, :height, :width, :3]
        k = k + n * seed
        return (
            (7 * y + 13 * x + 61 * colour + (y * x) // 16 + 97 * k * (1 + x // 8)) % 256
        ).astype(np.uint8)

    def captions(n: int, seed: int) -> np.ndarray:
        # Not through the tokenizer, so that a model of any vocabulary has some: start, words, end.
        ids = np.zeros((n, model.text_length), np.int32)
        for row, count in zip(ids, (min(20, room), 0, room), strict=False):
            words = 1 + (np.arange(count) * 101 + seed) % (last - 2)
            row[: count + 2] = [last - 1, *words, last]
        return ids

    parts = (
        ("image", "pixels", training.encode_images, pictures, (height, width, 3), np.uint8),
        ("text", "ids", training.encode_captions, captions, (model.text_length,), np.int64),
    )
    towers = []
    for name, input_name, encode, probe, shape, stored_as in parts:
        compiled = jax.jit(encode)
        towers.append(
            _Tower(
                name=name,
                input=input_name,
                encode=lambda own, x, encode=encode: _named(encode(_nested(own), x)),
                weights={
                    key: array
                    for key, array in weights.flat(ready.variables).items()
                    if key.split("/")[1].startswith(f"{name}_")
                },
                argument=jax.ShapeDtypeStruct((batch, *shape), probe(1, 0).dtype),
                stored_as=stored_as,
                probe=probe,
                expected=lambda x, compiled=compiled: _named(compiled(ready.variables, x)),
            )
        )
    return towers


def _knows_clip(ready: encoders.Encoders) -> bool:
    return ready.config.model.vocab_size >= tokenizer.VOCAB_SIZE


def _named(embedding: Any) -> dict[str, Any]:
    named = {"global": embedding.global_, "local": embedding.local}
    return {name: value for name, value in named.items() if value is not None}


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as the model takes them, of {"params/image_encoder/…": array}."""
    variables: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = variables
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return variables


def _write_stablehlo(
    tower: _Tower, folder: pathlib.Path, ready: encoders.Encoders
) -> tuple[Callable[[np.ndarray], Mapping[str, Any]], list[pathlib.Path]]:
    """Returns the encoder as read back, and its files."""
    del ready
    program, arrays = folder / f"{tower.name}.stablehlo", folder / f"{tower.name}.npz"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tower.weights)
    exported = jax.export.export(jax.jit(tower.encode), platforms=PLATFORMS)(shapes, tower.argument)
    program.write_bytes(exported.serialize())
    with arrays.open("wb") as file:
        np.savez(file, **tower.weights)
    loaded = jax.export.deserialize(program.read_bytes())
    with np.load(arrays) as file:
        stored = dict(file)
    return lambda argument: loaded.call(stored, argument), [program, arrays]


def _write_onnx(
    tower: _Tower, folder: pathlib.Path, ready: encoders.Encoders
) -> tuple[Callable[[np.ndarray], Mapping[str, Any]], list[pathlib.Path]]:
    """Returns the encoder as ONNX Runtime runs it, and its files."""
    # Late: StableHLO alone does without these.
    import onnxruntime

    from itself_jax import onnx_graph

    try:
        translated = onnx_graph.translate(
            tower.encode, tower.weights, tower.argument, name=tower.input, as_dtype=tower.stored_as
        )
    except onnx_graph.OnnxError as error:
        local = ready.config.local
        saliency = f"with saliency {local.inference_saliency!r} " if local.enabled else ""
        raise ExportError(
            f"the {tower.name} encoder {saliency}cannot be written as ONNX: {error}; "
            "--formats=stablehlo can hold it."
        ) from error
    files = onnx_graph.write(translated, folder / f"{tower.name}.onnx")
    session = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(argument: np.ndarray) -> Mapping[str, Any]:
        outputs = session.run(None, {tower.input: argument.astype(tower.stored_as)})
        return dict(zip(names, outputs, strict=True))

    return run, files


def _compare(
    tower: _Tower, run: Callable[[np.ndarray], Mapping[str, Any]], *, seed: int
) -> dict[str, float]:
    """Largest difference by output, relative to the output's largest value."""
    worst: dict[str, float] = {}
    for n in _BATCHES:
        argument = tower.probe(n, seed)
        found, expected = run(argument), tower.expected(argument)
        if found.keys() != expected.keys():
            raise ExportError(f"{tower.name} returns {sorted(found)}, not {sorted(expected)}.")
        for name, values in expected.items():
            error = np.abs(np.asarray(found[name]) - values).max() / np.abs(values).max()
            worst[name] = float(np.maximum(worst.get(name, 0.0), error))  # a NaN stays one
    return worst


def _require(formats: Sequence[str]) -> None:
    for name in formats:
        for package in _NEEDS[name]:
            if importlib.util.find_spec(package) is None:
                raise ExportError(
                    f"{name} needs the package {package}, which is not installed: "
                    "pip install 'itself_jax[export]'"
                )


def _check_place(path: pathlib.Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent} is no folder: create it, or give another DST.")
    if not path.exists():
        return
    if not force:
        raise ExportError(f"{path} exists already: give another DST, or --force to replace it.")
    if not (path / SETTINGS).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(
            f"{path} is not an export (it has no {SETTINGS}), so that --force does not replace it: "
            "remove it yourself, or give another DST."
        )


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
