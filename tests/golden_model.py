"""The small golden model: reference weights in our names, inputs, and how close is close enough."""

import functools
import pathlib
import re
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from itself_jax import config as config_lib
from itself_jax import step
from itself_jax.models import clip, itself, saliency

FOLDER = pathlib.Path(__file__).parent / "golden"
NUM_IDENTITIES = 7

MODEL = config_lib.Model(
    patch_size=16,
    image_size=(96, 32),
    vision_width=128,
    vision_depth=12,
    vision_heads=2,
    text_width=128,
    text_depth=12,
    text_heads=2,
    text_length=77,
    vocab_size=512,
    embed_dim=64,
)

# Reference name → our path. A torch linear's weight is transposed, a convolution's axes reordered.
_NAMES = (
    (r"base_model\.visual\.(class_embedding)", r"image_encoder/\1"),
    (r"base_model\.visual\.positional_embedding", "image_encoder/position_embedding"),
    (r"base_model\.visual\.proj", "image_encoder/projection"),
    (r"base_model\.visual\.conv1\.weight", "image_encoder/patch_embedding/kernel"),
    (r"base_model\.visual\.(ln_\w+)\.(\w+)", r"image_encoder/\1/\2"),
    (
        r"base_model\.visual\.transformer\.resblocks\.(\d+)\.(.*)",
        r"image_encoder/transformer/layer_\1/\2",
    ),
    (r"base_model\.transformer\.resblocks\.(\d+)\.(.*)", r"text_encoder/transformer/layer_\1/\2"),
    (r"base_model\.positional_embedding", "text_encoder/position_embedding"),
    (r"base_model\.text_projection", "text_encoder/projection"),
    (r"base_model\.token_embedding\.weight", "text_encoder/token_embedding/embedding"),
    (r"base_model\.ln_final\.(\w+)", r"text_encoder/ln_final/\1"),
    (r"classifier_id_(\w+)\.(\w+)", r"\1_heads/identity_classifier/\2"),
    (r"classifier_(\w+)\.(\w+)", r"\1_heads/pair_classifier/\2"),
    (r"mlp_(\w+)\.0\.(\w+)", r"\1_heads/pair_mlp/\2"),
    (r"mlp_(\w+)\.1\.(\w+)", r"\1_heads/pair_norm/\2"),
    (r"visul_emb_layer\.linear\.(\w+)", r"image_grab/unused_skip_\1"),
    (r"visul_emb_layer\.fc\.(\w+)", r"image_grab/skip/\1"),
    (r"texual_emb_layer\.linear\.(\w+)", r"text_grab/skip/\1"),
    (r"(\w+)_emb_layer\.mlp\.layers\.0\.(\w+)", r"\1_grab/mlp_in/\2"),
    (r"(\w+)_emb_layer\.mlp\.layers\.1\.(\w+)", r"\1_grab/mlp_out/\2"),
    (r"(\w+)_emb_layer\.mlp\.bns\.0\.(\w+)", r"\1_grab/norm/\2"),
    (r"(\w+)_emb_layer\.mlp\.bns\.1\.(\w+)", r"\1_grab/unused_norm_\2"),
)
_PARTS = (
    ("attn.in_proj_", "attention/in_proj/"),
    ("attn.out_proj.", "attention/out_proj/"),
    ("mlp.c_fc.", "mlp_in/"),
    ("mlp.c_proj.", "mlp_out/"),
    ("visul_", "image_"),
    ("texual_", "text_"),
    ("grab_heads", "local_heads"),
    ("running_", ""),
    ("num_batches_tracked", "batches"),
    (".", "/"),
)


def our_name(name: str) -> str:
    """The path of a reference tensor in our variables, without the collection."""
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            path = re.sub(pattern, replacement, name)
            for old, new in _PARTS:
                path = path.replace(old, new)
            scale = re.search(r"(ln_\w+|norm|pair_norm)[/_]weight$", path)
            return re.sub(r"weight$", "scale" if scale else "kernel", path)
    raise KeyError(name)


def our_array(name: str, value: np.ndarray) -> np.ndarray:
    """A reference tensor in our layout; gradients and deltas are laid out alike."""
    value = np.asarray(value)
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    transposed = value.ndim == 2 and name.endswith("weight") and "token_embedding" not in name
    return value.T if transposed else value


def variables(*, local: bool = True) -> dict:
    """{"params", "batch_stats"} of the small golden state, float32."""
    result: dict = {"params": {}, "batch_stats": {}}
    with np.load(FOLDER / "small_s16_state.npz") as state:
        for name in state.files:
            path = our_name(name)
            if not local and path.split("/")[0] in ("image_grab", "text_grab", "local_heads"):
                continue
            statistic = re.search(r"/(unused_norm_)?(mean|var|batches)$", path)
            node = result["batch_stats" if statistic else "params"]
            *parents, leaf = path.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            value = our_array(name, state[name])
            node[leaf] = value.astype(np.int32 if leaf.endswith("batches") else np.float32)
    return result


def batch() -> dict[str, np.ndarray]:
    """Pictures (8, 96, 32, 3) already normalised, ids (8, 77), pids (8,)."""
    with np.load(FOLDER / "batch_mixed.npz") as data:
        return {
            "images": data["images"].astype(np.float32).transpose(0, 2, 3, 1),
            "ids": data["caption_ids"].astype(np.int32),
            "pids": data["pids"].astype(np.int32),
        }


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one golden file."""
    with np.load(FOLDER / name) as data:
        return {key: data[key] for key in data.files}


def build(**local) -> itself.ITSELF:
    """The small model; keyword arguments are settings of the local branch."""
    settings = config_lib.Local(dim=128, **local)
    return itself.ITSELF(MODEL, settings, NUM_IDENTITIES)


def flat(tree) -> dict[str, np.ndarray]:
    """Leaves of a nested dict by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"{what}: error {error:.2e} exceeds {tolerance:.0e}"


class Run(NamedTuple):
    """One training-mode forward and backward pass of the small golden model."""

    loss: step.Loss
    image: itself.Encoded
    text: itself.Encoded
    gradients: dict


# Reference configuration → our saliency source and the optimiser step of ATS (None: ratio 0.4).
SOURCES = ("mars", "mean", "std", "layer:5", "last")
CONFIGS = {
    "custom_none": ("mars", None),
    "custom_s1": ("mars", 1),
    "custom_s100": ("mars", 100),
    "custom_s725": ("mars", 725),
    "custom_s1450": ("mars", 1450),
    "custom_s5000": ("mars", 5000),
    "mean_none": ("mean", None),
    "mean_s1": ("mean", 1),
    "std_none": ("std", None),
    "std_s725": ("std", 725),
    "layer5_none": ("layer:5", None),
    "layerlast_none": ("last", None),
    "sl": ("last", None),
    "sl_step1": ("last", None),  # the reference ignores ATS there
}


def compute_loss(
    model: itself.ITSELF, settings: config_lib.Loss, variables, images, ids, pids, k
) -> step.Loss:
    """A training-mode forward pass and the plain sum of all terms, without the step's phases."""
    image, text, batch_stats = step.encode(model, variables, images, ids, k)
    return step.sum_losses(
        model, settings, variables["params"], image.embedding, text.embedding, pids, batch_stats
    )


def _objective(model: itself.ITSELF):
    """The total of `compute_loss` and the `Run` around it; `step.encode` is listened to."""
    encode = step.encode

    def objective(params, batch_stats, batch, k):
        encoded = []

        def recorded(*args):
            encoded.append(encode(*args))
            return encoded[-1]

        variables = {"params": params, "batch_stats": batch_stats}
        with mock.patch.object(step, "encode", recorded):
            loss = compute_loss(model, config_lib.Loss(), variables, *batch, k)
        return loss.total, Run(loss, *encoded[0][:2], {})

    return objective


@functools.cache
def train_pass():
    """The jitted `compute_loss` and its gradient; the saliency source is an argument.

    Compiling 24 layers takes half a minute, so one program serves every configuration: it computes
    all saliencies by the functions under test and a traced index picks the one to select with.
    `plain_pass` picks nothing.
    """
    model = build()
    parse, of = saliency.parse_source, saliency.saliency

    def every_layer(name, depth, **kwargs):
        return saliency.Source("all", tuple(range(depth)), 0.25)

    def run(params, batch_stats, batch, source, k):
        def chosen(attention, _, query, *, causal=False):
            all_of_them = [of(attention, parse(name, 12), query, causal=causal) for name in SOURCES]
            return jnp.stack(all_of_them)[source]

        with (
            mock.patch.object(saliency, "parse_source", every_layer),
            mock.patch.object(saliency, "saliency", chosen),
        ):
            objective = jax.grad(_objective(model), has_aux=True)
            gradients, result = objective(params, batch_stats, batch, k)
        return result._replace(gradients=gradients)

    return jax.jit(run)


def plain_pass(
    model: itself.ITSELF,
    state: dict,
    k: itself.BankLimits,
    *,
    backward: bool = True,
    compiler_options: dict | None = None,
) -> Run:
    """One pass of a model over the golden batch just as a step does it: its own compilation.

    Without `backward` there are no gradients: compiling takes seconds and not half a minute.
    """

    def run(*args):
        if not backward:
            return _objective(model)(*args)[1]
        gradients, result = jax.grad(_objective(model), has_aux=True)(*args)
        return result._replace(gradients=gradients)

    k = itself.BankLimits(*(np.int32(x) for x in k))
    compiled = jax.jit(run, compiler_options=compiler_options)
    return jax.device_get(
        compiled(state["params"], state["batch_stats"], tuple(batch().values()), k)
    )


@functools.cache
def limits(current_step: int | None) -> itself.BankLimits:
    """k of the small model at one optimiser step, by the functions under test."""
    if current_step is None:
        return itself.bank_limits(MODEL, config_lib.Local(ats=False), True)
    table = step.bank_schedule(config_lib.Config(model=MODEL), (1,))
    return itself.BankLimits(*(int(k) for k in table[min(current_step, len(table) - 1)]))


@functools.cache
def golden_run(config: str) -> Run:
    """The pass of one golden configuration from the stored state, on the host."""
    if config == "only_global":  # a model of its own: it has neither GRAB nor local heads
        # Compiled at low effort in half the time; it runs once.
        options = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "fusion"}
        model = build(enabled=False)
        return plain_pass(model, variables(local=False), limits(None), compiler_options=options)
    source, current_step = CONFIGS[config]
    return run(variables(), source, limits(current_step))


def run(state: dict, source: str, k: itself.BankLimits) -> Run:
    """One pass over the golden batch."""
    result = train_pass()(
        state["params"],
        state["batch_stats"],
        tuple(batch().values()),
        np.int32(SOURCES.index(source)),
        itself.BankLimits(*(np.int32(x) for x in k)),
    )
    return jax.device_get(result)


def error(actual, expected) -> float:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


class Features(NamedTuple):
    """Inference on the golden batch: towers with all maps, and encodings by inference source."""

    image: clip.TowerOutput
    text: clip.TowerOutput
    encoded: dict[str, tuple[itself.Encoded, itself.Encoded]]


@functools.cache
def features() -> Features:
    """Both encoders with the attention of all layers, and the local branch fed by two sources."""
    layers = tuple(range(12))

    def run(state, images, ids):
        image = build().apply(
            state, images, method=lambda m, x: m.image_encoder(x, map_layers=layers)
        )
        text = build().apply(state, ids, method=lambda m, x: m.text_encoder(x, map_layers=layers))
        encoded = {}
        for source in ("last", "mars"):
            model = build(inference_saliency=source)
            encoded[source] = (
                model.apply(state, images, method="encode_image"),
                model.apply(state, ids, method="encode_text"),
            )
        return Features(image, text, encoded)

    data = batch()
    return jax.device_get(jax.jit(run)(variables(), data["images"], data["ids"]))
