"""Settings: frozen dataclasses, and the only door through which a ConfigDict enters.

The defaults are the published settings (paper and its released code); each number stands here once,
and `configs/*.py` say only what differs. `from_dict` checks everything that can be checked before
data, devices or weights are touched.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

_SIZES = ("width", "depth", "heads")
SALIENCY_SOURCES = ("mars", "last", "layer:K", "mean", "std", "min_mean", "min_std")
DATASETS = ("synthetic", "cuhk_pedes", "icfg_pedes", "rstp_reid", "jsonl")
ACTIVATIONS = ("quick_gelu", "gelu")
CLIP_ACTIVATION = "quick_gelu"  # of CLIP, where nothing else is said
CLIP_HEAD_WIDTH = 64  # of every CLIP of OpenAI
HELD_OUT = ("icfg_pedes", "jsonl")  # may have no val of their own: some of train is held out


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the dual encoder [CLIP ViT-B/16, pictures of 384x128]."""

    patch_size: int = 16
    stride: int | None = None  # None: the patch size
    image_size: tuple[int, int] = (384, 128)  # height, width
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_length: int = 77
    vocab_size: int = 49408
    embed_dim: int = 512
    activation: str | None = None  # "quick_gelu", "gelu"; None: as the weights, else quick_gelu

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches (paper, section 3.1: overlapping when stride < patch)."""
        step = self.stride or self.patch_size
        height, width = ((side - self.patch_size) // step + 1 for side in self.image_size)
        return height, width


@dataclasses.dataclass(frozen=True)
class Local:
    """The local branch: which tokens (MARS), how many (ATS), and their embedding (GRAB)."""

    enabled: bool = True
    dim: int = 4096
    saliency: str = "mars"
    mars_layers: tuple[int, ...] | None = None  # None: (depth // 3, depth - 1), (4, 11) of 12
    mars_discard: float = 0.25
    inference_saliency: str = "last"  # the reference evaluates with the last layer, not with MARS
    ats: bool = True
    ats_horizon_steps: int | str = 1450  # optimiser steps, or epochs as "10ep"
    ats_per_epoch: bool = False
    ratio: float = 0.4  # without ATS, and at inference
    ratio_start: float = 0.65
    ratio_end: float = 0.5


@dataclasses.dataclass(frozen=True)
class Loss:
    """TAL (temperature, margin) and what CID calls a mismatched pair."""

    temperature: float = 0.015
    margin: float = 0.1
    mismatch_label: str = "batch_max"  # as the reference; or "extra_class"


@dataclasses.dataclass(frozen=True)
class Optim:
    """Adam with coupled L2 decay; the parameter groups are `optim.RULES`."""

    learning_rate: float = 1e-5
    local_learning_rate: float = 1e-3
    eps: float = 1e-3
    weight_decay: float = 4e-5


@dataclasses.dataclass(frozen=True)
class Augment:
    image: bool = True
    text: bool = True
    pad: int = 10  # pixels a picture may shift by, each way; the published 10 are for 384x128


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes all the rest."""

    data: int = -1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train as one; None: from the environment, see `hosts.Hosts.start`."""

    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    detect: bool = False  # let jax ask the cluster, e.g. on the workers of a TPU pod
    timeout_s: int = 300  # how long to wait for each other at the start


@dataclasses.dataclass(frozen=True)
class Eval:
    protocol: str = "val"  # or "paper": epoch and fusion weight chosen on the test split
    alpha: float | None = None  # None: chosen on validation
    batch_size: int = 128
    captions: str = "all"  # each caption is a query; or "single": the first one of each picture
    dump_embeddings: bool = False
    chunk_mb: int = 64  # memory of one block of similarities
    watch: int = 4  # pairs whose saliency is followed, for the report; 0: no report either


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The embedded data set: its own seed and identities for train, val and test."""

    seed: int = 0
    identities: tuple[int, int, int] = (400, 50, 150)
    images_per_identity: int = 4
    named: tuple[int, int] = (5, 8)  # attributes that a caption names: fewest, most


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "synthetic"
    data_root: str | None = None
    eval_datasets: tuple[str, ...] = ()
    init_from: str | None = None  # a path, or the name of weights that come with the package
    model: Model = Model()
    local: Local = Local()
    loss: Loss = Loss()
    optim: Optim = Optim()
    augment: Augment = Augment()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    eval: Eval = Eval()
    synthetic: Synthetic = Synthetic()
    sharding: str = "replicated"  # parameters and Adam's moments; or "fsdp": spread over devices
    batch_size: int = 256  # pairs over all devices
    num_instances: int = 2  # pairs per identity in a batch
    num_epochs: int = 60
    last_epoch: int | None = None  # end after this epoch of a schedule of `num_epochs`
    train_on_all: bool = False  # also on the identities held out as val, where there is no own val
    warmup_epochs: int = 5
    seed: int = 0
    precision: str | None = None  # None: bfloat16 on TPU/GPU, float32 on CPU
    attention: str | None = None  # of layers without a map: "plain", "cudnn"; None: as devices do
    micro_batches: int = 1  # a batch is encoded in so many parts; losses are of the whole batch
    remat: str = "none"  # kept for the backward pass: all; "dots" linear layers; "block" inputs
    freeze_layers: int = 0  # embeddings and first layers that are not trained; -1: both encoders
    num_workers: int = 0  # processes that decode pictures; 0: threads of this one
    log_every: int = 10
    keep_epochs: bool = False  # the checkpoint of every validated epoch; else last two and best


# An existing work directory may be continued although these differ, with two exceptions: the best
# epoch so far was chosen by them.
UNCHANGEABLE = ("eval.protocol", "eval.captions")
CHANGEABLE = (
    "mesh.",
    "distributed.",
    "sharding",
    "remat",
    "attention",
    "log_every",
    "eval.",
    "eval_datasets",
    "data_root",
    "num_workers",
    "micro_batches",
    "keep_epochs",
)


_TINY = {
    "init_from": None,
    "model.image_size": (96, 32),
    "model.patch_size": 16,
    "model.vision_width": 64,
    "model.text_width": 64,
    "model.embed_dim": 64,
    "model.vision_depth": 2,
    "model.text_depth": 2,
    "model.vision_heads": 4,
    "model.text_heads": 4,
    "local.dim": 128,
    "augment.pad": 2,
    "batch_size": 16,
    "eval.batch_size": 32,
    "num_epochs": 2,
    "warmup_epochs": 1,
    "optim.learning_rate": 3e-4,
    "optim.eps": 1e-8,
}


def default() -> ml_collections.ConfigDict:
    """The published settings as a ConfigDict, for `configs/*.py` to change and return."""
    return _to_config_dict(Config())


def apply_variants(config: ml_collections.ConfigDict, names: str) -> ml_collections.ConfigDict:
    """Applies comma-separated ablations, e.g. `configs/cuhk.py:baseline,stride12`.

    `baseline` global branch only; `sl` one layer's map, no ATS; `sl_ats`; `mars` no ATS; `itself`
    (the default) MARS and ATS; `stride12` overlapping patches; `vit_b32` patches of 32 pixels;
    `tiny` a small untrained model for two epochs, to try data and machine in a minute.

    Raises:
      ConfigError: an unknown variant, with the nearest known one.
    """
    names = [name for name in names.split(",") if name]
    if "tiny" in names:  # first: the others build on its sizes
        config.update_from_flattened_dict(_TINY)
    # The layer of lowest attention entropy, the third of twelve (paper, Fig. 7).
    depth = min(config.model.vision_depth, config.model.text_depth)
    layer = f"layer:{max(0, depth // 4 - 1)}"
    known = {
        "itself": {},
        "baseline": {"local.enabled": False},
        "sl": {"local.saliency": layer, "local.ats": False},
        "sl_ats": {"local.saliency": layer},
        "mars": {"local.ats": False},
        "tiny": {},
        "stride12": {"model.stride": 12},
        "vit_b32": {"model.patch_size": 32},
    }
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"variant {name!r} is unknown; known: {', '.join(known)}.{hint}")
        config.update_from_flattened_dict(known[name])
    return config


def from_dict(settings: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a ConfigDict (or nested dict) and freezes it.

    Raises:
      ConfigError: names the key, what came and what is expected; an unknown key comes with the
        nearest known one.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, settings, prefix="")
    _validate(config)
    return config


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values for some flat keys, e.g. {"model.patch_size": 32}.

    Raises:
      ConfigError: as `from_dict`.
    """
    settings = to_dict(config)
    for key, value in changes.items():
        *groups, name = key.split(".")
        node = settings
        for group in groups:
            node = node[group]
        node[name] = value
    return from_dict(settings)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as nested plain dicts (tuples become lists), as `config.json` holds them."""
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        result[field.name] = list(value) if isinstance(value, tuple) else value
    return result


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"model.stride": None, …}."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(old: Mapping[str, Any], new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys of `new` whose value differs from a saved configuration: {key: (old, new)}."""
    before, after = flatten(old), flatten(to_dict(new))
    keys = [*after, *(key for key in before if key not in after)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def unknown_key(key: str) -> str:
    """The sentence about a key that does not exist, with the nearest one that does."""
    known = list(flatten(to_dict(Config()))) + [f.name for f in dataclasses.fields(Config)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == last]
    hint = f" Did you mean {near[0]!r}?" if near else " See itself_jax/config.py for the keys."
    return f"config key {key!r} does not exist.{hint}"


def _to_config_dict(config: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        elif isinstance(hints[field.name], types.UnionType) or isinstance(value, tuple):
            # A plain object: the command line then takes any literal, and `from_dict` judges it.
            result[field.name] = ml_collections.config_dict.FieldReference(value, field_type=object)
        else:
            result[field.name] = value
    return result


def _build(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in settings:
        if key not in hints:
            raise ConfigError(unknown_key(prefix + key))
    values = {}
    for name, hint in hints.items():
        if name not in settings:
            continue
        value = settings[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"config.{prefix}{name} is a group of keys, not {value!r}.")
            values[name] = _build(hint, value, f"{prefix}{name}.")
        else:
            values[name] = _coerce(f"{prefix}{name}", hint, value)
    return cls(**values)


def _coerce(key: str, hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "None" and type(None) in options:
        return None
    if isinstance(value, str) and str not in options:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # judged below with the value as it came
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is tuple:
            items = typing.get_args(option)
            if isinstance(value, (list, tuple)):
                if items[-1] is Ellipsis:
                    items = (items[0],) * len(value)
                if len(items) == len(value) and all(
                    type(v) is t for v, t in zip(value, items, strict=True)
                ):
                    return tuple(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    expected = " or ".join(_type_name(option) for option in options)
    raise ConfigError(f"config.{key}={value!r} has the wrong type: expected {expected}.")


def _type_name(option: Any) -> str:
    if option is type(None):
        return "None"
    return str(option).replace("...", "…") if typing.get_origin(option) else option.__name__


def _validate(config: Config) -> None:
    model, local = config.model, config.local

    def check(key: str, value: Any, condition: bool, expected: str) -> None:
        if not condition:
            raise ConfigError(f"config.{key}={value!r}: {expected}.")

    def one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        check(key, value, value in allowed, f"must be one of {', '.join(map(repr, allowed))}")

    one_of("dataset", config.dataset, DATASETS)
    for name in config.eval_datasets:
        one_of("eval_datasets", name, DATASETS)
    one_of("precision", config.precision, (None, "float32", "bfloat16"))
    one_of("attention", config.attention, (None, "plain", "cudnn"))
    if config.attention == "cudnn":
        fine = config.precision != "float32"
        check("attention", "cudnn", fine, "needs config.precision=bfloat16: cuDNN has no other")
    one_of("sharding", config.sharding, ("replicated", "fsdp"))
    one_of("remat", config.remat, ("none", "dots", "block"))
    one_of("model.activation", model.activation, (None, *ACTIVATIONS))
    one_of("loss.mismatch_label", config.loss.mismatch_label, ("batch_max", "extra_class"))
    one_of("eval.protocol", config.eval.protocol, ("val", "paper"))
    one_of("eval.captions", config.eval.captions, ("all", "single"))

    flat = flatten(to_dict(config))
    sizes = ("patch_size", "embed_dim", *(f"{t}_{s}" for t in ("vision", "text") for s in _SIZES))
    for key in (
        *(f"model.{name}" for name in sizes),
        *("local.dim", "loss.temperature", "optim.learning_rate", "optim.local_learning_rate"),
        *("optim.eps", "batch_size", "num_instances", "num_epochs", "log_every"),
        *("eval.batch_size", "eval.chunk_mb", "synthetic.images_per_identity"),
        *("micro_batches", "mesh.model", "distributed.timeout_s"),
    ):
        value = flat[key]
        check(key, value, value > 0 and math.isfinite(value), "must be positive")
    for key in (
        *("seed", "synthetic.seed", "num_workers", "augment.pad", "warmup_epochs"),
        "optim.weight_decay",
    ):
        check(key, flat[key], flat[key] >= 0, "must be zero or more")
    check("loss.margin", config.loss.margin, config.loss.margin >= 0, "must be zero or more")
    fewest, most = config.synthetic.named
    check(
        "synthetic.named",
        config.synthetic.named,
        1 <= fewest <= most,
        "must be the fewest and the most attributes that a caption names, from 1 on",
    )
    for count in config.synthetic.identities:
        check("synthetic.identities", config.synthetic.identities, count > 0, "must be positive")
    check(
        "mesh.data",
        config.mesh.data,
        config.mesh.data == -1 or config.mesh.data > 0,
        "must be positive, or -1 for all devices",
    )
    deepest = max(model.vision_depth, model.text_depth)
    check(
        "freeze_layers",
        config.freeze_layers,
        -1 <= config.freeze_layers <= deepest,
        f"must lie in 0..{deepest}, the layers of the deeper encoder, or be -1 for all of both",
    )
    if config.eval.alpha is not None:
        check("eval.alpha", config.eval.alpha, 0 <= config.eval.alpha <= 1, "must lie in [0, 1]")

    stride = model.stride if model.stride is not None else model.patch_size
    check("model.stride", model.stride, stride > 0, "must be positive, or None for the patch size")
    for side in model.image_size:
        check("model.image_size", model.image_size, side > 0, "must be positive (height, width)")
        check(
            "model.image_size",
            model.image_size,
            side >= model.patch_size,
            f"leaves no patch of {model.patch_size} pixels; use larger pictures or smaller patches",
        )
    rows, columns = model.grid
    if model.stride is None:
        key, value = "model.image_size", model.image_size
    else:
        key, value = "model.stride", model.stride
    check(key, value, rows * columns >= 2, "leaves fewer than two patches")
    for tower in ("vision", "text"):
        width, heads = getattr(model, f"{tower}_width"), getattr(model, f"{tower}_heads")
        check(f"model.{tower}_heads", heads, width % heads == 0, f"must divide the width {width}")
    check("model.text_length", model.text_length, 4 <= model.text_length <= 248, "must be 4..248")
    check("model.vocab_size", model.vocab_size, model.vocab_size >= 4, "must be at least 4")
    check("local.dim", local.dim, local.dim % 2 == 0, "must be even (GRAB's hidden width is half)")

    check(
        "batch_size",
        config.batch_size,
        config.batch_size % config.num_instances == 0,
        f"must be divisible by num_instances={config.num_instances}",
    )
    check(
        "batch_size",
        config.batch_size,
        config.batch_size >= 2 * config.num_instances,
        f"must hold at least two identities of num_instances={config.num_instances} pairs",
    )
    check(
        "num_epochs",
        config.num_epochs,
        config.num_epochs > config.warmup_epochs,
        f"must exceed warmup_epochs={config.warmup_epochs}",
    )
    if config.last_epoch is not None:
        check(
            "last_epoch",
            config.last_epoch,
            1 <= config.last_epoch <= config.num_epochs,
            f"must lie in 1..num_epochs={config.num_epochs}",
        )
    if config.train_on_all:
        check(
            "train_on_all",
            True,
            config.dataset in HELD_OUT,
            f"only {', '.join(HELD_OUT)} may have no val of their own",
        )
        check(
            "eval.alpha",
            config.eval.alpha,
            config.eval.alpha is not None or not local.enabled,
            "must be given with train_on_all, which leaves nobody to choose it on: take the one "
            "that the run with held-out identities has chosen",
        )
    for key in ("ratio", "ratio_start", "ratio_end"):
        value = getattr(local, key)
        check(f"local.{key}", value, 0 < value <= 1, "must lie in (0, 1]")
    check(
        "local.mars_discard",
        local.mars_discard,
        0 <= local.mars_discard < 1,
        "must lie in [0, 1)",
    )
    check(
        "local.ats_horizon_steps",
        local.ats_horizon_steps,
        _horizon_is_valid(local.ats_horizon_steps),
        "must be a positive number of steps, or of epochs such as '10ep'",
    )
    for key in ("saliency", "inference_saliency"):
        _check_source(f"local.{key}", getattr(local, key), model)
    for layer in local.mars_layers or ():
        depth = min(model.vision_depth, model.text_depth)
        check(
            "local.mars_layers",
            local.mars_layers,
            0 <= layer < depth,
            f"layer {layer} does not exist, the encoders have layers 0..{depth - 1}",
        )
    if local.mars_layers is not None:
        check("local.mars_layers", local.mars_layers, len(local.mars_layers) > 0, "names no layer")
        check(
            "local.mars_layers",
            local.mars_layers,
            list(local.mars_layers) == sorted(set(local.mars_layers)),
            "must be strictly increasing",
        )
    if local.enabled:
        smallest = min(local.ratio, local.ratio_start, local.ratio_end)
        for name, candidates in (("picture", rows * columns), ("caption", model.text_length - 2)):
            check(
                "local.ratio",
                smallest,
                int(candidates * smallest) >= 1,
                f"keeps no token of a {name} with {candidates} tokens; use a larger ratio",
            )


def _horizon_is_valid(horizon: int | str) -> bool:
    if isinstance(horizon, str):
        digits = horizon.removesuffix("ep")
        return digits.isdigit() and int(digits) > 0
    return horizon > 0


def _check_source(key: str, name: str, model: Model) -> None:
    kind, _, layer = name.partition(":")
    if name not in SALIENCY_SOURCES[:2] + SALIENCY_SOURCES[3:] and not (
        kind == "layer" and layer.isdigit()
    ):
        near = difflib.get_close_matches(name, SALIENCY_SOURCES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"config.{key}={name!r} is no saliency source; known are "
            f"{', '.join(SALIENCY_SOURCES)}.{hint}"
        )
    depth = min(model.vision_depth, model.text_depth)
    if kind == "layer" and int(layer) >= depth:
        raise ConfigError(
            f"config.{key}={name!r}: the encoders have layers 0..{depth - 1}; name one of them."
        )
