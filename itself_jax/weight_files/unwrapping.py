"""From what a file holds to named arrays: wrappers are taken off, and it is said which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from itself_jax.weight_files import source as source_lib

# Under which names training programs keep the model, the likeliest first.
_WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights"),
    *("module", "params", "state"),
)
_PREFIXES = ("module.", "_orig_mod.")  # of torch's DataParallel and torch.compile
_MAX_DEPTH = 8
_SCALARS = (bool, int, float, str, type(None))
# Arrays may share their bytes (tied weights), but a small file must not stand for a terabyte.
_MAX_SHARING = 16
_FREE_SHARING = 64 << 20


class Unwrapped(NamedTuple):
    tensors: dict[str, source_lib.Tensor]
    metadata: dict[str, Any]
    notes: list[str]


def state_dict(source: source_lib.Source, content: Any) -> Unwrapped:
    """Finds the state dict in what `torch.save` wrote.

    Raises:
      WeightFileError: there is none, there are several, or it holds something else than arrays.
    """
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, dict):
            single = isinstance(content, source_lib.Tensor)
            source.refuse(
                f"holds {'a single array' if single else source_lib.show(content)} and not named "
                "arrays",
                "save a model's state_dict()",
            )
        inside = _model_in(source, content)
        for key, value in content.items():
            if type(key) is str and type(value) in _SCALARS and key.isprintable():
                metadata.setdefault(key, _clean(value))
        beside = [
            key for key, value in content.items() if key != inside and type(value) not in _SCALARS
        ]
        if inside is None:
            tensors = {k: v for k, v in content.items() if isinstance(v, source_lib.Tensor)}
            others = [key for key in beside if key not in tensors]
            if others:
                notes.append(f"left out what is no array: {_listed(others)}")
            break
        tail = f" (beside it: {_listed(beside)})" if beside else ""
        what = "a training state" if beside else "the file"
        notes.append(f"took {inside!r} of {what}{tail}")
        content = content[inside]
    else:
        source.refuse(f"holds dicts that are nested more than {_MAX_DEPTH} deep")
    for name in tensors:
        source_lib.check_name(source, name)
    _check_total(source, tensors)
    return Unwrapped(tensors, metadata, notes)


def _check_total(source: source_lib.Source, tensors: Mapping[str, source_lib.Tensor]) -> None:
    """Refuses names that share the same few bytes again and again."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_SHARING * source.size + _FREE_SHARING:
        source.refuse(
            f"would turn its {source.size} bytes into arrays of {total}",
            "do not trust this file",
        )


def without_prefix(
    tensors: dict[str, source_lib.Tensor],
) -> tuple[dict[str, source_lib.Tensor], list[str]]:
    """Removes what wrapping modules put before all names, and says so."""
    notes: list[str] = []
    while tensors:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                notes.append(f"removed the prefix {prefix!r}")
                break
        else:
            break
    return tensors, notes


def _model_in(source: source_lib.Source, content: dict[Any, Any]) -> str | None:
    """The key under which the model is, or None if `content` is the state dict itself.

    Raises:
      WeightFileError: it is neither.
    """
    if set(content) >= {"state", "param_groups"}:
        source.refuse(
            "holds the state of an optimiser and no weights",
            "give the file that the model's state_dict() was saved to",
        )
    inside = [key for key, value in content.items() if _holds_arrays(value)]
    for key in _WRAPPERS:
        if key in inside:
            return key
    if any(isinstance(value, source_lib.Tensor) for value in content.values()):
        return None
    # An optimiser has arrays too, two levels down, and is not what is looked for.
    inside = [key for key in inside if type(key) is str]
    if len(inside) == 1:
        return inside[0]
    if inside:
        source.refuse(
            f"holds several sets of arrays, {_listed(inside)}, and none is called "
            f"{', '.join(map(repr, _WRAPPERS[:4]))}",
            "save the one you want alone",
        )
    source.refuse(
        f"holds no arrays, but {_listed(list(content))}" if content else "holds no arrays",
        "give the file that a model's state_dict() was saved to",
    )


def _holds_arrays(value: Any) -> bool:
    """Whether `value` is a state dict, or wraps one under a known name."""
    seen: set[int] = set()  # a dict may occur in many places, also in itself
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and id(value) not in seen:
            if any(isinstance(item, source_lib.Tensor) for item in value.values()):
                return True
            seen.add(id(value))
            waiting += [value[key] for key in _WRAPPERS if key in value]
    return False


def _listed(keys: list[Any]) -> str:
    """Some keys in words."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ", ".join(map(source_lib.bare, keys[:8])) + more


def _clean(value: Any) -> Any:
    """A value without half characters, which could not be printed."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
