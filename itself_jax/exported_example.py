"""Compares a picture with sentences, from an export alone: no JAX, no itself_jax.

    pip install numpy onnxruntime pillow tokenizers
    python example.py picture.jpg "a man in a red coat" "a woman with a backpack"

A caption may also be given as its token ids (49406,320,786,49407); `tokenizers` is not needed then.
"""

import json
import pathlib
import re
import sys

import numpy as np
import onnxruntime
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
SETTINGS = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))


def pixels(path):
    height, width = SETTINGS["image"]["size"]
    picture = Image.open(path).convert("RGB")
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.uint8)


def token_ids(caption):
    if re.fullmatch(r"\d+(,\d+)+", caption):
        ids = [int(i) for i in caption.split(",")]
        return ids + [SETTINGS["text"]["pad"]] * (SETTINGS["text"]["length"] - len(ids))
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(caption).ids


def encode(name, inputs):
    """Unit vectors by name: "global", and "local" where the model has it."""
    session = onnxruntime.InferenceSession(str(FOLDER / name))
    outputs = session.run(None, {session.get_inputs()[0].name: inputs})
    names = [output.name for output in session.get_outputs()]
    return {
        name: output / np.linalg.norm(output, axis=1, keepdims=True)
        for name, output in zip(names, outputs, strict=True)
    }


def main(path, *captions):
    image = encode("image.onnx", pixels(path)[None])
    text = encode("text.onnx", np.array([token_ids(caption) for caption in captions], np.int64))
    similarity = {name: (text[name] @ image[name].T)[:, 0] for name in image}
    alpha = SETTINGS["similarity"]["alpha"]
    if alpha is not None and "local" in similarity:
        fused = alpha * similarity["global"] + (1 - alpha) * similarity["local"]
        similarity = {"fused": fused, **similarity}
    for i, caption in enumerate(captions):
        print(*(f"{name} {values[i]:.5f}" for name, values in similarity.items()), caption)


if __name__ == "__main__":
    main(*sys.argv[1:])
