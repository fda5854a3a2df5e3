"""Weights in the published layout, stated here once more and independently of `dialects`."""

import json
import pathlib
import re
import zlib
from typing import NamedTuple

import numpy as np

from itself_jax import weight_files


class Sizes(NamedTuple):
    """Of a published model; the defaults are tiny, with CLIP's whole vocabulary."""

    width: int = 64
    text_width: int = 64
    layers: int = 2
    embed: int = 16
    local: int = 24
    identities: int = 5
    patch: int = 8
    patches: int = 8
    length: int = 16
    vocab: int = 49408
    text_layers: int | None = None  # None: as many as the image encoder has


VIT_B16 = Sizes(768, 512, 12, 512, 4096, 11003, 16, 192, 77)
VIT_L14 = Sizes(1024, 768, 24, 768, 4096, 11003, 14, 27 * 9, 77, text_layers=12)
# 32x16 pictures in patches of 8, and a vocabulary that keeps the file small.
TINY = Sizes(vocab=64)


def shapes(sizes: Sizes, *, local: bool = True) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a published checkpoint's `model`, in its order."""
    d, t, e, m = sizes.width, sizes.text_width, sizes.embed, sizes.local
    classes = sizes.identities + 1
    base = {
        "positional_embedding": (sizes.length, t),
        "text_projection": (t, e),
        "visual.class_embedding": (d,),
        "visual.positional_embedding": (sizes.patches + 1, d),
        "visual.proj": (d, e),
        "visual.conv1.weight": (d, 3, sizes.patch, sizes.patch),
        **_norm("visual.ln_pre", d),
        **_blocks("visual.transformer", sizes.layers, d),
        **_norm("visual.ln_post", d),
        **_blocks("transformer", sizes.text_layers or sizes.layers, t),
        "token_embedding.weight": (sizes.vocab, t),
        **_norm("ln_final", t),
    }
    result = {f"base_model.{name}": shape for name, shape in base.items()}
    for branch, width in (("global", e), ("grab", m)) if local else (("global", e),):
        result |= {
            **_linear(f"classifier_{branch}", width, classes),
            **_linear(f"mlp_{branch}.0", 2 * width, width),
            **_norm(f"mlp_{branch}.1", width),
            **_linear(f"classifier_id_{branch}", width, classes),
        }
    for side, skips in (("visul", ("linear", "fc")), ("texual", ("linear",))) if local else ():
        stem = f"{side}_emb_layer"
        for skip in skips:
            result |= _linear(f"{stem}.{skip}", e, m)
        result |= _linear(f"{stem}.mlp.layers.0", e, m // 2)
        result |= _linear(f"{stem}.mlp.layers.1", m // 2, m)
        for norm, width in ((0, m // 2), (1, m)):
            name = f"{stem}.mlp.bns.{norm}"
            result |= _norm(name, width)
            result |= {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
            result[f"{name}.num_batches_tracked"] = ()
    return result


def state(sizes: Sizes = TINY, *, local: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 arrays; every one differs from every initial value."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes(sizes, local=local).items():
        values = 0.1 * rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("num_batches_tracked"):
            values = np.array(7, np.int64)
        elif name.endswith("running_var"):
            values = 1 + np.abs(values)
        elif len(shape) == 1 and name.endswith("weight"):
            values = 1 + values
        result[name] = values
    return result


def write(
    path: pathlib.Path, sizes: Sizes = TINY, *, local: bool = True, seed: int = 0, **changes
) -> pathlib.Path:
    """As `best.pth`. changes: arrays by name with `__` for `.`; None takes one out."""
    arrays = state(sizes, local=local, seed=seed)
    for name, value in changes.items():
        arrays[name.replace("__", ".")] = value
    arrays = {name: value for name, value in arrays.items() if value is not None}
    progress = {"num_epoch": 60, "iteration": 12, "epoch": 3}
    weight_files.write_torch(path, arrays, extra=progress, force=True)
    return path


class Random:
    """Numbers that are made when they are read: a whole model of them takes no memory."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str):
        self._name, self.shape, self.dtype = name, shape, np.dtype(dtype)

    def read(self) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(self._name.encode()))
        if self.dtype.kind == "i":
            return np.array(7, self.dtype)
        values = 0.1 * rng.standard_normal(self.shape, np.float32)
        if self._name.endswith("running_var"):
            values = 1 + np.abs(values)
        return values.astype(self.dtype)


def write_whole(path: pathlib.Path, sizes: Sizes) -> pathlib.Path:
    """A random model of full size with the number types of the published code, as `best.pth`."""
    golden = pathlib.Path(__file__).parent / "golden" / "itself_vitb16_keys.json"
    known = json.loads(golden.read_text())["full_stride16"]["state_dict"]
    arrays = {}
    for name, shape in shapes(sizes).items():
        _, dtype = known[re.sub(r"resblocks\.\d+", "resblocks.0", name)]
        arrays[name] = Random(name, shape, dtype)
    progress = {"num_epoch": 60, "iteration": 12, "epoch": 3}
    weight_files.write_torch(path, arrays, extra=progress)
    return path


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _blocks(stem: str, layers: int, d: int) -> dict[str, tuple[int, ...]]:
    result = {}
    for layer in range(layers):
        block = {
            "attn.in_proj_weight": (3 * d, d),
            "attn.in_proj_bias": (3 * d,),
            **_linear("attn.out_proj", d, d),
            **_norm("ln_1", d),
            **_linear("mlp.c_fc", d, 4 * d),
            **_linear("mlp.c_proj", 4 * d, d),
            **_norm("ln_2", d),
        }
        result |= {f"{stem}.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    return result
