"""Parameter groups, Adam with coupled decay, and the schedule (method section 6)."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float

from itself_jax import config as config_lib


class Rule(NamedTuple):
    """Parameters whose path matches `pattern`, their rate and whether they decay.

    rate: factor of `optim.learning_rate`, or of `optim.local_learning_rate` where `local` is set;
      0 marks parameters without a gradient, which are neither moved nor decayed.
    """

    pattern: str
    rate: float
    decay: bool
    local: bool = False


# First match wins, and every parameter must match. Decay spares only what is called bias: LayerNorm
# and BatchNorm scales, embeddings and positions are decayed, as in the reference.
RULES = (
    Rule(r"(image|text)_grab/unused_.*", 0.0, False),
    Rule(r"(image|text)_grab/.*bias", 1.0, False, local=True),
    Rule(r"(image|text)_grab/.*", 1.0, True, local=True),
    Rule(r"(global|local)_heads/.*classifier/bias", 5.0, False),
    Rule(r"(global|local)_heads/.*classifier/kernel", 5.0, True),
    Rule(r".*bias", 2.0, False),
    Rule(r"(global|local)_heads/(pair_mlp/kernel|pair_norm/scale)", 1.0, True),
    Rule(r"(image|text)_encoder/.*(kernel|scale|embedding|projection)", 1.0, True),
)


# The parts of an encoder in the order in which they compute, up to its layers.
_BELOW = re.compile(r"(image|text)_encoder/(\w+_embedding|ln_pre)(/.*)?")
_LAYER = re.compile(r"(?:image|text)_encoder/transformer/layer_(\d+)/.*")


class Groups(NamedTuple):
    """Trees shaped like the parameters."""

    rate: Any  # peak learning rate, before the schedule's factor
    decay: Any  # coupled weight decay
    trained: Any  # False: the parameter receives no gradient


def groups(params: Any, settings: config_lib.Optim, *, freeze_layers: int = 0) -> Groups:
    """Assigns every parameter to the first rule that matches its whole path.

    freeze_layers: the embeddings and the first so many layers of both encoders are not trained;
      -1: nothing of the encoders is.

    Raises:
      ValueError: a parameter that no rule covers.
    """

    def match(path: tuple[Any, ...], _: Any) -> Rule:
        name = _path(path)
        for rule in RULES:
            if re.fullmatch(rule.pattern, name):
                return rule
        raise ValueError(f"no optimiser rule covers parameter {name!r}: add one to optim.RULES")

    def rate(rule: Rule) -> float:
        base = settings.local_learning_rate if rule.local else settings.learning_rate
        return rule.rate * base

    rules = jax.tree_util.tree_map_with_path(match, params)

    def over(function: Any) -> Any:
        return jax.tree.map(function, rules, is_leaf=lambda x: isinstance(x, Rule))

    return Groups(
        rate=over(rate),
        decay=over(lambda rule: settings.weight_decay if rule.decay else 0.0),
        trained=jax.tree_util.tree_map_with_path(
            lambda path, rule: rule.rate > 0 and not is_frozen(_path(path), freeze_layers),
            rules,
            is_leaf=lambda x: isinstance(x, Rule),
        ),
    )


def is_frozen(name: str, freeze_layers: int) -> bool:
    """Whether a parameter lies in the part of the encoders that `freeze_layers` leaves alone."""
    if freeze_layers == -1:
        return name.startswith(("image_encoder/", "text_encoder/"))
    if found := _LAYER.fullmatch(name):
        return int(found[1]) < freeze_layers
    return freeze_layers > 0 and _BELOW.fullmatch(name) is not None


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)


def learning_rate_factors(num_epochs: int, warmup_epochs: int) -> Float[np.ndarray, " s"]:
    """The schedule's factor for each epoch 1..E, in float64; index 0 repeats epoch 1.

    0.1 + 0.9(e − 1)/W for e ≤ W, then ½(1 + cos(π(e − 1 − W)/(E − W))).
    """
    epoch = np.maximum(np.arange(num_epochs + 1, dtype=np.float64), 1)
    cosine = 0.5 * (1 + np.cos(np.pi * (epoch - 1 - warmup_epochs) / (num_epochs - warmup_epochs)))
    warmup = 0.1 + 0.9 * (epoch - 1) / max(warmup_epochs, 1)
    return np.where(epoch <= warmup_epochs, warmup, cosine)


def adam(
    params: Any, settings: config_lib.Optim, *, freeze_layers: int = 0
) -> optax.GradientTransformation:
    """Adam with L2 decay added to the gradient (not AdamW); updates at the peak rates.

    The caller multiplies the updates by the schedule's factor of the epoch, which is traced.
    `params` may be shapes: only the paths matter.
    """
    group = groups(params, settings, freeze_layers=freeze_layers)

    def add_decay(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, Any]:
        decayed = jax.tree.map(
            lambda g, p, decay: g if decay == 0 else g + decay * p, updates, params, masked.decay
        )
        return decayed, state

    def scale(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, rate: -rate * u, updates, masked.rate), state

    def empty(_: Any) -> optax.EmptyState:
        return optax.EmptyState()

    # optax.masked hides the parameters without gradient: the group trees must hide them alike.
    hidden = optax.MaskedNode()
    masked = Groups(
        *(jax.tree.map(lambda x, t: x if t else hidden, tree, group.trained) for tree in group)
    )
    transform = optax.chain(
        optax.GradientTransformation(empty, add_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=settings.eps),
        optax.GradientTransformation(empty, scale),
    )
    return optax.masked(transform, group.trained)
