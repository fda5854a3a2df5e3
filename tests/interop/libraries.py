"""CLIPs of other libraries, randomly initialised, saved as their libraries save them.

`python tests/interop/libraries.py tests/golden` remakes the two small ones that the other tests
read; everything here needs torch, transformers and open_clip (extra `interop`).
"""

import functools
import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import torch

_FOLDERS = ("hugging_face", "open_clip")


class Sizes(NamedTuple):
    """Of a CLIP; heads are those of either tower."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision: tuple[int, int, int]  # width, layers, heads
    text: tuple[int, int, int]
    text_length: int = 77
    vocab_size: int = 49408


SMALL = Sizes(24, 32, 8, (48, 3, 4), (32, 2, 4), text_length=16, vocab_size=64)
VIT_B32 = Sizes(512, 224, 32, (768, 12, 12), (512, 12, 8))
VIT_B16 = Sizes(512, 224, 16, (768, 12, 12), (512, 12, 8))


@functools.cache  # operators can be defined once
def torchvision() -> Any:
    """Imports torchvision next to a torch that it was not compiled with: open_clip needs it."""
    library = torch.library.Library("torchvision", "DEF")
    while True:
        try:
            import torchvision  # noqa: F401

            return library
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor x) -> Tensor")  # never called
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


def inputs(sizes: Sizes, rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Normalised pictures (b, y, x, 3), and ids (b, t) with SOT, EOT and pads."""
    rng = np.random.default_rng(0)
    side, vocab = sizes.image_size, sizes.vocab_size
    pictures = rng.normal(size=(rows, side, side, 3)).astype(np.float32)
    ids = np.zeros((rows, sizes.text_length), np.int32)
    for row, words in enumerate(np.linspace(3, sizes.text_length - 2, rows).astype(int)):
        ids[row, : words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
    return pictures, ids


def randomise(model: torch.nn.Module, *, half: bool) -> torch.nn.Module:
    """Fills every parameter with noise: no bias is zero, no scale one. half: exact in float16."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.ndim == 0:
            continue
        fan_in = value.shape[-1] if value.ndim == 2 else value[0].numel()
        noise = torch.randn(value.shape, generator=generator)
        scale = "norm" in name or "ln_" in name
        value.data = 0.1 * noise + float(scale and name.endswith("weight"))
        if value.ndim > 1:
            value.data = noise / fan_in**0.5
    return (model.half().float() if half else model).eval()


def hugging_face(sizes: Sizes, activation: str, *, half: bool = False) -> torch.nn.Module:
    """`transformers.CLIPModel`."""
    torchvision()  # transformers imports it where it is installed
    import transformers

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
        }

    vision = {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
    text = {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.text_length}
    ids = {"bos_token_id": sizes.vocab_size - 2, "eos_token_id": sizes.vocab_size - 1}
    config = transformers.CLIPConfig(
        vision_config=tower(*sizes.vision) | vision,
        text_config=tower(*sizes.text) | text | ids | {"pad_token_id": 0},
        projection_dim=sizes.embed_dim,
    )
    return randomise(transformers.CLIPModel(config), half=half)


def open_clip(
    sizes: Sizes, activation: str, *, half: bool = False, custom_text: bool = False
) -> torch.nn.Module:
    """`open_clip.CLIP` or `CustomTextCLIP`, with the settings it was made of as `settings`."""
    torchvision()
    import open_clip

    width, layers, heads = sizes.vision
    text_width, text_layers, text_heads = sizes.text
    settings = {
        "embed_dim": sizes.embed_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "width": width,
            "layers": layers,
            "head_width": width // heads,
        },
        "text_cfg": {
            "context_length": sizes.text_length,
            "vocab_size": sizes.vocab_size,
            "width": text_width,
            "layers": text_layers,
            "heads": text_heads,
        },
    }
    made = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = randomise(made(**settings), half=half)
    model.settings = settings | ({"custom_text": True} if custom_text else {})
    return model


def outputs(model: torch.nn.Module, pictures: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    """The library's own embeddings of pictures and captions, not normalised."""
    pixels = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        if hasattr(model, "visual_projection"):
            image = model.visual_projection(model.vision_model(pixels).pooler_output)
            text = model.text_projection(model.text_model(tokens).pooler_output)
        else:
            image, text = model.encode_image(pixels), model.encode_text(tokens)
    return [image.numpy(), text.numpy()]


def save_open_clip(model: torch.nn.Module, folder: pathlib.Path, dtype: torch.dtype) -> None:
    """As a folder of its hub: weights and `open_clip_config.json`."""
    folder.mkdir(exist_ok=True)
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model.settings}))


def save_archive(model: torch.nn.Module, sizes: Sizes, path: pathlib.Path) -> None:
    """A TorchScript archive with OpenAI's constants, from a model with OpenAI's names."""
    for name, value in (
        ("input_resolution", sizes.image_size),
        ("context_length", sizes.text_length),
        ("vocab_size", sizes.vocab_size),
    ):
        setattr(model, name, None)
        delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    pictures, ids = inputs(sizes, rows=2)
    pixels = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    traced = torch.jit.trace_module(
        model,
        {"encode_image": pixels, "encode_text": torch.from_numpy(ids.astype(np.int64))},
        check_trace=False,
    )
    traced.save(str(path))


def main(folder: pathlib.Path) -> None:
    """Writes the small fixtures: weights in float16, inputs and outputs."""
    pictures, ids = inputs(SMALL)
    models = hugging_face(SMALL, "quick_gelu", half=True), open_clip(SMALL, "gelu", half=True)
    for name, model in zip(_FOLDERS, models, strict=True):
        target = folder / name
        target.mkdir(exist_ok=True)
        image, text = outputs(model, pictures, ids)
        np.savez(target / "outputs.npz", pictures=pictures, ids=ids, image=image, text=text)
        if name == "open_clip":
            save_open_clip(model, target, torch.float16)
        else:
            model.half().save_pretrained(target)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
