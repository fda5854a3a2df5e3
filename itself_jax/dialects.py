"""What other programs call the parameters of this model: one ordered rule table per dialect.

A dialect maps names and layouts both ways. `read` accounts for every array of a file: it is mapped
to one of our parameters, or dropped by a rule that says why; anything else is an error. `write`
gives our parameters the names of a dialect again. Nothing here reads or computes numbers: arrays
stay in their files until somebody asks for them.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from itself_jax import config as config_lib

PARAMS, STATS = "params/", "batch_stats/"
_IMAGE, _TEXT = "params/image_encoder/", "params/text_encoder/"
# How an array lies in the file against ours. A linear layer's weight is (out, in) in PyTorch and
# (in, out) here, a convolution's (out, in, y, x) there and (y, x, in, out) here.
_LAYOUTS = {"same": None, "linear": (1, 0), "convolution": (2, 3, 1, 0)}


class DialectError(ValueError):
    """The arrays of a file are not those of any model known here; a sentence for the user."""


@runtime_checkable
class Array(Protocol):
    """An array that may still lie in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray: ...


class Map(NamedTuple):
    """`name` in the file is `path` here. `{}` in both stands for the number of a layer.

    part: which third of our array it is (query, key, value), where the file keeps them apart.
    """

    name: str
    path: str
    layout: str = "same"
    part: int | None = None


class Drop(NamedTuple):
    """Arrays that mean nothing here and are left out. `pattern` is a regular expression."""

    pattern: str
    reason: str


class Absent(NamedTuple):
    """Parameters of ours that a dialect does not have: they start from random numbers."""

    pattern: str
    reason: str


class Dialect(NamedTuple):
    """One kind of file.

    signature: names that all must be there to recognise it.
    activation: what its models use where the file does not say.
    settings: the JSON file in which its library says what arrays do not; None: it has none.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[Map | Drop, ...]
    absent: tuple[Absent, ...]
    activation: str = config_lib.CLIP_ACTIVATION
    settings: str | None = None


class Mapped(NamedTuple):
    """Arrays under our names. `names` says what each was called; `dropped` gives the reasons."""

    dialect: Dialect
    arrays: dict[str, Array]
    names: dict[str, tuple[str, ...]]
    dropped: dict[str, str]


def _block(prefix: str, path: str, names: Mapping[str, str]) -> tuple[Map, ...]:
    """The rules of one transformer layer. `names`: ours → theirs, `{}` being `weight` or `bias`."""
    rules = []
    for ours, theirs in names.items():
        norm = ours.startswith("ln_")
        kernel = "scale" if norm else "kernel"
        for leaf, theirs_leaf in ((kernel, "weight"), ("bias", "bias")):
            layout = "linear" if leaf == "kernel" else "same"
            for part, name in enumerate(theirs.split()):
                third = part if " " in theirs else None
                full = prefix + name.replace("*", theirs_leaf)
                rules.append(Map(full, f"{path}{ours}/{leaf}", layout, third))
    return tuple(rules)


_OPENAI_BLOCK = {
    "attention/in_proj": "attn.in_proj_*",
    "attention/out_proj": "attn.out_proj.*",
    "ln_1": "ln_1.*",
    "mlp_in": "mlp.c_fc.*",
    "mlp_out": "mlp.c_proj.*",
    "ln_2": "ln_2.*",
}
_HF_BLOCK = {
    "attention/in_proj": "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*",
    "attention/out_proj": "self_attn.out_proj.*",
    "ln_1": "layer_norm1.*",
    "mlp_in": "mlp.fc1.*",
    "mlp_out": "mlp.fc2.*",
    "ln_2": "layer_norm2.*",
}


def _clip(prefix: str, text: str = "") -> tuple[Map, ...]:
    """OpenAI's names. `text` is what open_clip's CustomTextCLIP puts before the text tower's."""
    visual, text = f"{prefix}visual.", f"{prefix}{text}"
    return (
        Map(f"{text}positional_embedding", f"{_TEXT}position_embedding"),
        Map(f"{text}text_projection", f"{_TEXT}projection"),
        Map(f"{visual}class_embedding", f"{_IMAGE}class_embedding"),
        Map(f"{visual}positional_embedding", f"{_IMAGE}position_embedding"),
        Map(f"{visual}proj", f"{_IMAGE}projection"),
        Map(f"{visual}conv1.weight", f"{_IMAGE}patch_embedding/kernel", "convolution"),
        *_norm(f"{visual}ln_pre", f"{_IMAGE}ln_pre"),
        *_block(
            f"{visual}transformer.resblocks.{{}}.",
            f"{_IMAGE}transformer/layer_{{}}/",
            _OPENAI_BLOCK,
        ),
        *_norm(f"{visual}ln_post", f"{_IMAGE}ln_post"),
        *_block(
            f"{text}transformer.resblocks.{{}}.",
            f"{_TEXT}transformer/layer_{{}}/",
            _OPENAI_BLOCK,
        ),
        Map(f"{text}token_embedding.weight", f"{_TEXT}token_embedding/embedding"),
        *_norm(f"{text}ln_final", f"{_TEXT}ln_final"),
    )


def _norm(name: str, path: str) -> tuple[Map, ...]:
    return Map(f"{name}.weight", f"{path}/scale"), Map(f"{name}.bias", f"{path}/bias")


def _linear(name: str, path: str) -> tuple[Map, ...]:
    return (
        Map(f"{name}.weight", f"{path}/kernel", "linear"),
        Map(f"{name}.bias", f"{path}/bias"),
    )


def _heads(theirs: str, ours: str) -> tuple[Map, ...]:
    """The identity classifiers of one branch."""
    return (
        *_linear(f"classifier_{theirs}", f"{PARAMS}{ours}/pair_classifier"),
        *_linear(f"mlp_{theirs}.0", f"{PARAMS}{ours}/pair_mlp"),
        *_norm(f"mlp_{theirs}.1", f"{PARAMS}{ours}/pair_norm"),
        *_linear(f"classifier_id_{theirs}", f"{PARAMS}{ours}/identity_classifier"),
    )


def _grab(theirs: str, ours: str, skip: str) -> tuple[Map, ...]:
    """GRAB of one side. Its unused arrays are kept: a published file must survive a round trip."""
    norm = f"{theirs}.mlp.bns."
    return (
        *_linear(f"{theirs}.{skip}", f"{PARAMS}{ours}/skip"),
        *_linear(f"{theirs}.mlp.layers.0", f"{PARAMS}{ours}/mlp_in"),
        *_linear(f"{theirs}.mlp.layers.1", f"{PARAMS}{ours}/mlp_out"),
        *_norm(f"{norm}0", f"{PARAMS}{ours}/norm"),
        Map(f"{norm}0.running_mean", f"{STATS}{ours}/norm/mean"),
        Map(f"{norm}0.running_var", f"{STATS}{ours}/norm/var"),
        Map(f"{norm}0.num_batches_tracked", f"{STATS}{ours}/norm/batches"),
        Map(f"{norm}1.weight", f"{PARAMS}{ours}/unused_norm_scale"),
        Map(f"{norm}1.bias", f"{PARAMS}{ours}/unused_norm_bias"),
        Map(f"{norm}1.running_mean", f"{STATS}{ours}/unused_norm_mean"),
        Map(f"{norm}1.running_var", f"{STATS}{ours}/unused_norm_var"),
        Map(f"{norm}1.num_batches_tracked", f"{STATS}{ours}/unused_norm_batches"),
    )


_OPEN_CLIP_SETTINGS, _HUGGING_FACE_SETTINGS = "open_clip_config.json", "config.json"

_TEMPERATURE = Drop(r"(base_model\.)?logit_scale", "the losses have no learnt temperature")
_CONSTANTS = Drop("input_resolution|context_length|vocab_size", "a constant of OpenAI's archives")
_BUFFERS = Drop(r"(.*\.)?(position_ids|attn_mask)", "a constant buffer")

_NO_HEADS = Absent(r"params/(global|local)_heads/.*", "the file has no identity classifiers")
_NO_LOCAL = Absent(
    r"(params|batch_stats)/((image|text)_grab|local_heads)/.*", "the file has no local branch"
)

ITSELF = Dialect(
    "ITSELF",
    ("base_model.visual.conv1.weight", "mlp_global.0.weight"),
    (
        *_clip("base_model."),
        *_heads("global", "global_heads"),
        *_heads("grab", "local_heads"),
        Map("visul_emb_layer.linear.weight", "params/image_grab/unused_skip_kernel", "linear"),
        Map("visul_emb_layer.linear.bias", "params/image_grab/unused_skip_bias"),
        *_grab("visul_emb_layer", "image_grab", skip="fc"),
        *_grab("texual_emb_layer", "text_grab", skip="linear"),
        _TEMPERATURE,
    ),
    (_NO_LOCAL,),
)

# open_clip has the same names, unless a model of it is a CustomTextCLIP.
OPENAI = Dialect(
    "CLIP",
    ("visual.conv1.weight", "token_embedding.weight"),
    (*_clip(""), _TEMPERATURE, _CONSTANTS, _BUFFERS),
    (_NO_LOCAL, _NO_HEADS),
    settings=_OPEN_CLIP_SETTINGS,
)

_CUSTOM_TEXT = Dialect(
    "open_clip's CustomTextCLIP",
    ("visual.conv1.weight", "text.token_embedding.weight"),
    (*_clip("", text="text."), _TEMPERATURE, _BUFFERS),
    (_NO_LOCAL, _NO_HEADS),
    activation="gelu",
    settings=_OPEN_CLIP_SETTINGS,
)

_HUGGING_FACE = Dialect(
    "Hugging Face CLIP",
    (
        "vision_model.embeddings.patch_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
    ),
    (
        Map(
            "vision_model.embeddings.patch_embedding.weight",
            f"{_IMAGE}patch_embedding/kernel",
            "convolution",
        ),
        Map("vision_model.embeddings.class_embedding", f"{_IMAGE}class_embedding"),
        Map("vision_model.embeddings.position_embedding.weight", f"{_IMAGE}position_embedding"),
        *_norm("vision_model.pre_layrnorm", f"{_IMAGE}ln_pre"),  # the misspelling is theirs
        *_block("vision_model.encoder.layers.{}.", f"{_IMAGE}transformer/layer_{{}}/", _HF_BLOCK),
        *_norm("vision_model.post_layernorm", f"{_IMAGE}ln_post"),
        Map("visual_projection.weight", f"{_IMAGE}projection", "linear"),
        Map("text_model.embeddings.token_embedding.weight", f"{_TEXT}token_embedding/embedding"),
        Map("text_model.embeddings.position_embedding.weight", f"{_TEXT}position_embedding"),
        *_block("text_model.encoder.layers.{}.", f"{_TEXT}transformer/layer_{{}}/", _HF_BLOCK),
        *_norm("text_model.final_layer_norm", f"{_TEXT}ln_final"),
        Map("text_projection.weight", f"{_TEXT}projection", "linear"),
        _TEMPERATURE,
        _BUFFERS,
    ),
    (_NO_LOCAL, _NO_HEADS),
    settings=_HUGGING_FACE_SETTINGS,
)

_RDE = Dialect(
    "RDE",
    ("base_model.visual.conv1.weight", "visul_emb_layer.fc.weight"),
    (
        *_clip("base_model."),
        Drop(r"(visul|texual)_emb_layer\..*", "RDE's local embedding is pooled in another way"),
        # Not those of ITSELF: a file that lacks half of its heads is no file of RDE.
        Drop(
            r"classifier(?!_id_|_grab|_global)\w*\..*",
            "RDE's classifiers have no class for mismatched pairs",
        ),
        _TEMPERATURE,
        _BUFFERS,
    ),
    (_NO_LOCAL, _NO_HEADS),
)

_IRRA = Dialect(
    "IRRA",
    ("base_model.visual.conv1.weight",),
    (
        *_clip("base_model."),
        Drop(
            r"(cross_attn|cross_modal_transformer|ln_pre_t|ln_pre_i|ln_post|mlm_head)\..*",
            "IRRA's masked language modelling is used in its training only",
        ),
        Drop(r"classifier\..*", "IRRA's classifier has no class for mismatched pairs"),
        _TEMPERATURE,
        _BUFFERS,
    ),
    (_NO_LOCAL, _NO_HEADS),
)

# Our own checkpoints have our own names.
OURS = Dialect("itself_jax", (), (), (_NO_LOCAL, _NO_HEADS))

# The first whose signature is there: a published ITSELF file also has what IRRA's and RDE's have.
PRETRAINED = (_HUGGING_FACE, _CUSTOM_TEXT, OPENAI)  # on square pictures
DIALECTS = (ITSELF, _RDE, _IRRA, _HUGGING_FACE, _CUSTOM_TEXT, OPENAI)
WRITABLE = {"published": ITSELF, "openai": OPENAI}

# Arrays that the published code and OpenAI store as float16: linear layers, convolution and
# projections of the encoders and of GRAB, and the ID classifiers, which never meet its float32
# forward pass.
HALF = re.compile(
    r"(base_model\.)?(visual\.)?(conv1\.weight|proj|text_projection|"
    r"transformer\.resblocks\.\d+\.(attn|mlp)\..*)"
    r"|(visul|texual)_emb_layer\.(linear|fc|mlp\.layers\.\d)\..*"
    r"|classifier_id_.*"
)


def recognise(names: Mapping[str, Any]) -> Dialect:
    """The dialect of a file by the names of its arrays.

    Raises:
      DialectError: none fits; some names are shown.
    """
    for dialect in DIALECTS:
        if all(name in names for name in dialect.signature):
            return dialect
    shown = ", ".join(list(names)[:3])
    raise DialectError(
        f"its {len(names)} arrays ({shown}{', …' if len(names) > 3 else ''}) are those of no model "
        f"known here: {', '.join(d.name for d in DIALECTS)} (both encoders are needed)"
    )


def read(arrays: Mapping[str, Array]) -> Mapped:
    """Maps every array of a file to our name and layout, or drops it by a rule.

    Raises:
      DialectError: no dialect fits, or names that no rule knows: all of them, with their shapes.
    """
    dialect = recognise(arrays)
    mapped: dict[str, dict[int | None, tuple[str, Array]]] = {}
    dropped, unknown = {}, []
    for name, array in arrays.items():
        found = _match(dialect, name)
        if found is None:
            unknown.append(f"{name} {list(array.shape)}")
        elif isinstance(found, Drop):
            dropped[name] = found.reason
        else:
            rule, path = found
            mapped.setdefault(path, {})[rule.part] = (name, _relaid(array, rule.layout))
    ours, names = {}, {}
    for path, parts in mapped.items():
        names[path] = tuple(parts[part][0] for part in sorted(parts, key=_part_order))
        if None in parts:
            ours[path] = parts[None][1]
        elif len(parts) == 3:
            ours[path] = _Joined([parts[part][1] for part in range(3)])
        else:
            missing = [name for name in spell(dialect, path) if name not in names[path]]
            unknown.append(f"{', '.join(missing)} missing beside {names[path][0]}")
    if unknown:
        raise DialectError(
            f"it looks like {dialect.name}, whose rules do not know {_listed(unknown)}"
        )
    return Mapped(dialect, ours, names, dropped)


def write(arrays: Mapping[str, Array], dialect: Dialect) -> tuple[dict[str, Array], dict[str, str]]:
    """Our arrays under the names and in the layouts of a dialect; and what is left out, and why.

    Raises:
      DialectError: a parameter that the dialect cannot express.
    """
    written, left_out = [], {}
    stacks: dict[str, int] = {}  # layer by layer, as PyTorch orders its state
    for order, rule in enumerate(dialect.rules):
        if isinstance(rule, Map):
            stacks.setdefault(_stem(rule), order)
    for path, array in arrays.items():
        rules = _rules_of(dialect, path)
        reason = next((a.reason for a in dialect.absent if re.fullmatch(a.pattern, path)), None)
        if rules:
            (order, rule, layers), *parts = rules
            if parts:
                raise DialectError(f"{dialect.name} can be read here, but not written")
            name = rule.name.format(*layers)
            place = (stacks[_stem(rule)], layers, order)
            written.append((place, name, _relaid(array, rule.layout, back=True)))
        elif reason is not None:
            left_out[path] = reason
        else:
            raise DialectError(f"{dialect.name} has no name for {path}")
    written.sort(key=lambda row: row[0])
    return {name: array for _, name, array in written}, left_out


class Stated(NamedTuple):
    """What a JSON file of settings says of a model.

    values: flat keys of our configuration: heads and activation, which arrays do not say, and
      widths, depths and so on, which must agree with them.
    objection: why the model is computed in another way than CLIP; None: it is not.
    """

    values: dict[str, Any]
    objection: str | None


def stated(settings: Mapping[str, Any]) -> Stated | None:
    """Reads a Hugging Face `config.json` or an `open_clip_config.json`; None: it is neither.

    What equals the library's default may be left out of the file, so its defaults are filled in.
    """
    if isinstance(settings.get("model_cfg"), Mapping):
        found = _stated_by_open_clip(settings["model_cfg"])
    elif any(isinstance(settings.get(f"{tower}_config"), Mapping) for tower in ("vision", "text")):
        found = _stated_by_hugging_face(settings)
    else:
        return None
    for tower in ("vision", "text"):
        heads = found.values[f"model.{tower}_heads"]
        if found.objection is None and not (type(heads) is int and heads > 0):
            found = found._replace(
                objection=f"that {tower} has {heads!r} heads, which is no number"
            )
    return found


def _stated_by_hugging_face(settings: Mapping[str, Any]) -> Stated:
    towers = {}
    for tower in ("vision", "text"):
        # Old files have what differs from the default in a second place, which counts.
        parts = (settings.get(f"{tower}_config{end}") for end in ("", "_dict"))
        towers[tower] = {k: v for part in parts for k, v in _mapping(part).items()}
    vision, text = towers["vision"], towers["text"]
    values = {
        "model.patch_size": vision.get("patch_size", 32),
        "model.vision_width": vision.get("hidden_size", 768),
        "model.vision_depth": vision.get("num_hidden_layers", 12),
        "model.vision_heads": vision.get("num_attention_heads", 12),
        "model.text_width": text.get("hidden_size", 512),
        "model.text_depth": text.get("num_hidden_layers", 12),
        "model.text_heads": text.get("num_attention_heads", 8),
        "model.vocab_size": text.get("vocab_size", 49408),
        "model.embed_dim": settings.get("projection_dim", 512),
    }
    objection = None
    for tower, part in towers.items():
        if (epsilon := part.get("layer_norm_eps", 1e-5)) != 1e-5:
            objection = (
                f"{tower}_config.layer_norm_eps={epsilon}, but CLIP's 1e-05 is computed with"
            )
    used = {str(part.get("hidden_act", "quick_gelu")) for part in towers.values()}
    if len(used) == 1 and used <= {*config_lib.ACTIVATIONS}:
        values["model.activation"] = used.pop()
    else:
        objection = (
            f"hidden_act={', '.join(sorted(used))}, but both towers must have quick_gelu, or both "
            "gelu,"
        )
    return Stated(values, objection and f"{objection} here")


# What open_clip may say of a model without meaning another computation than CLIP's: anything, or
# one value.
_ANY = object()
_OPEN_CLIP_PLAIN = {
    "model_cfg": {
        **dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"), _ANY),
        # How arrays are called, and of what the losses here have none.
        **dict.fromkeys(("custom_text", "init_logit_scale", "nonscalar_logit_scale"), _ANY),
    },
    "vision_cfg": {
        **dict.fromkeys(("image_size", "layers", "width", "patch_size", "head_width"), _ANY),
        **{"patch_dropout": _ANY, "mlp_ratio": 4.0, "pool_type": "tok"},
        "pos_embed_type": "learnable",
    },
    "text_cfg": {
        **dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers"), _ANY),
        **{"mlp_ratio": 4.0, "pool_type": "argmax", "proj_type": "linear", "eos_id": 2},
    },
}


def _stated_by_open_clip(model: Mapping[str, Any]) -> Stated:
    vision, text = _mapping(model.get("vision_cfg")), _mapping(model.get("text_cfg"))
    objection = None
    for name, part in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        plain = _OPEN_CLIP_PLAIN[name]
        other = {
            key: value
            for key, value in part.items()
            if value and plain.get(key, False) not in (_ANY, value)
        }
        if other:
            objection = f"{name}={other}, which is no plain CLIP and is not computed here"
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    heads = None
    if type(width) is type(head_width) is int and 0 < head_width <= width:
        heads = width // head_width
    else:
        objection = f"vision_cfg.head_width={head_width!r} of a width of {width!r}"
    values = {
        "model.patch_size": vision.get("patch_size", 16),
        "model.vision_width": width,
        "model.vision_depth": vision.get("layers", 12),
        "model.vision_heads": heads,
        "model.text_width": text.get("width", 512),
        "model.text_depth": text.get("layers", 12),
        "model.text_heads": text.get("heads", 8),
        "model.vocab_size": text.get("vocab_size", 49408),
        "model.activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }
    if "embed_dim" in model:  # has no default
        values["model.embed_dim"] = model["embed_dim"]
    return Stated(values, objection)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def spell(dialect: Dialect, path: str) -> tuple[str, ...]:
    """What a parameter of ours is called there; () where it is not there."""
    return tuple(rule.name.format(*layers) for _, rule, layers in _rules_of(dialect, path))


def their_shape(dialect: Dialect, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that our parameter has in a file of the dialect (of one of its three parts)."""
    for _, rule, _ in _rules_of(dialect, path):
        if rule.part is not None:
            shape = (*shape[:-1], shape[-1] // 3)
        axes = _LAYOUTS[rule.layout]
        return shape if axes is None else tuple(shape[i] for i in np.argsort(axes))
    return shape


def absent_reason(dialect: Dialect, path: str, present: Collection[str]) -> str | None:
    """Why a file of the dialect may lack a parameter of ours; None: it may not.

    A part of the model is there as a whole or not at all: next to `present` parameters of the same
    part, a missing one is a defect of the file.
    """
    for absent in dialect.absent:
        if re.fullmatch(absent.pattern, path):
            there = any(re.fullmatch(absent.pattern, other) for other in present)
            return None if there else absent.reason
    return None


def _stem(rule: Map) -> str:
    return rule.name.partition("{}")[0]


@functools.cache
def _compiled(template: str) -> re.Pattern[str]:
    return re.compile("(0|[1-9][0-9]*)".join(re.escape(part) for part in template.split("{}")))


def _match(dialect: Dialect, name: str) -> Drop | tuple[Map, str] | None:
    for rule in dialect.rules:
        if isinstance(rule, Drop):
            if re.fullmatch(rule.pattern, name):
                return rule
        elif found := _compiled(rule.name).fullmatch(name):
            return rule, rule.path.format(*found.groups())
    return None


def _rules_of(dialect: Dialect, path: str) -> list[tuple[int, Map, tuple[int, ...]]]:
    found = []
    for order, rule in enumerate(dialect.rules):
        if isinstance(rule, Map) and (match := _compiled(rule.path).fullmatch(path)):
            found.append((order, rule, tuple(int(layer) for layer in match.groups())))
    return found


def _part_order(part: int | None) -> int:
    return -1 if part is None else part


def _listed(items: list[str], most: int = 20) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _relaid(array: Array, layout: str, *, back: bool = False) -> Array:
    axes = _LAYOUTS[layout]
    if axes is None or len(axes) != len(array.shape):
        return array  # a wrong rank is reported with its shape later
    return _Transposed(array, tuple(int(i) for i in np.argsort(axes)) if back else axes)


class _Transposed:
    def __init__(self, array: Array, axes: tuple[int, ...]):
        self._array, self._axes = array, axes
        self.shape = tuple(array.shape[i] for i in axes)
        self.dtype = array.dtype

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self._array.read().transpose(self._axes))


class _Joined:
    """Query, key and value side by side, as CLIP's own `in_proj`."""

    def __init__(self, parts: list[Array]):
        self._parts = parts
        widths = sum(part.shape[-1] if part.shape else 1 for part in parts)
        self.shape = (*parts[0].shape[:-1], widths)
        self.dtype = parts[0].dtype

    def read(self) -> np.ndarray:
        return np.concatenate([part.read() for part in self._parts], axis=-1)
