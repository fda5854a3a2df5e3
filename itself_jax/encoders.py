"""A trained model ready for use: pictures and sentences in, NumPy embeddings out."""

import os
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from itself_jax import config as config_lib
from itself_jax import fitting, step, weights
from itself_jax.data import images as image_files
from itself_jax.data import records, tokenizer
from itself_jax.models import itself

# How heads are set here and on the command lines that use this module.
HEADS = "{tower}_heads (on a command line --{tower}_heads)"


class Encoders:
    """Both encoders of one model; `load` makes it.

    Attributes:
      config: the settings in force; `config.model.image_size`, `config.local` and so on.
      variables: "params" and "batch_stats" as the model takes them, without classifiers.
      training: the pure functions `encode_images` and `encode_captions` that the methods compile.
      source: where the weights were read; None: they were made here.
      kind: what they are, in words.
      meta: what is known of their training, as `weights.Weights` has it.
    """

    def __init__(
        self,
        config: config_lib.Config,
        variables: dict[str, Any],
        training: step.Training,
        *,
        source: pathlib.Path | None = None,
        kind: str = "made here",
        meta: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        self.config, self.variables, self.training = config, variables, training
        self.source, self.kind, self.meta = source, kind, meta
        self._encode_images = jax.jit(training.encode_images)
        self._encode_captions = jax.jit(training.encode_captions)

    @property
    def alpha(self) -> float | None:
        """The fusion weight α that the run chose: 1.0 without a local branch, None if unknown."""
        return self.meta.get("best_alpha") if self.config.local.enabled else 1.0

    def encode_image(self, images: Any) -> itself.Embedding:
        """Embeds a list of pictures: paths, PIL images, or uint8 RGB arrays (height, width, 3).

        Each may have any size; it is resized straight to the model's height and width, as in
        training.

        Returns:
          `global_` (n, D) and `local` (n, M), or None without a local branch: float32, not
          normalised. The similarity of a sentence and a picture is α·cos of the global pair +
          (1 − α)·cos of the local one; `alpha` is that of the run.

        Raises:
          DataError: a file cannot be read as a picture; it is named.
          ValueError: a lone picture instead of a list, or an array of another form.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise ValueError("encode_image takes a list of pictures: put the one into [ ].")
        size = self.config.model.image_size
        return self._encode(
            self._encode_images, [_pixels(x, i, size) for i, x in enumerate(images)]
        )

    def encode_text(self, sentences: Any) -> itself.Embedding:
        """Embeds a list of sentences; the same form as `encode_image`.

        Raises:
          ValueError: a lone sentence instead of a list, or something that is no text.
          DataError: the model knows less than CLIP's vocabulary.
        """
        if isinstance(sentences, str):
            raise ValueError("encode_text takes a list of sentences: put the one into [ ].")
        for i, sentence in enumerate(sentences):
            if not isinstance(sentence, str):
                raise ValueError(f"sentence {i} is {type(sentence).__name__}, not text.")
        model = self.config.model
        words = tokenizer.Tokenizer(model.text_length, vocab_size=model.vocab_size)
        return self._encode(self._encode_captions, list(words.encode_batch(sentences)))

    def _encode(self, encode: Callable[..., Any], rows: list[np.ndarray]) -> itself.Embedding:
        """In batches of one size, the last one padded; a single row is not made to wait for 31."""
        batch_size = 1 if len(rows) == 1 else self.config.eval.batch_size
        parts = []
        for start in range(0, len(rows), batch_size):
            batch = np.stack(rows[start : start + batch_size])
            padding = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
            # The padding repeats the last row: a caption of pads alone would have no words.
            output = encode(self.variables, np.pad(batch, padding, mode="edge"))
            rows_of = slice(len(batch))
            parts.append(jax.tree.map(lambda x, rows=rows_of: np.asarray(x)[rows], output))
        if not parts:
            return self._nothing()
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def _nothing(self) -> itself.Embedding:
        model, local = self.config.model, self.config.local
        empty = np.zeros((0, model.embed_dim), np.float32)
        return itself.Embedding(
            empty, np.zeros((0, local.dim), np.float32) if local.enabled else None
        )


def load(
    path: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    stride: int | None = None,
    text_length: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    activation: str | None = None,
    precision: str | None = None,
    batch_size: int = 32,
    log: Callable[[str], None] = print,
) -> Encoders:
    """A model from everything that `config.init_from` takes: a work directory, `best.pth`, CLIP, …

    Of a run of this project its own settings apply. Else pictures have the size that the patch
    positions were trained for (384x128 where that was a square, as in pre-training), captions are
    as long as the weights know them, and the bank is the reference's (last layer, ratio 0.4).

    Args:
      path: of the weights.
      image_size: (height, width) that pictures are resized to; positions follow.
      stride: pixels between patches.
      text_length: ids of a caption, SOT and EOT included.
      vision_heads: attention heads of the image encoder, where the weights do not say them (or
        wrongly, by CLIP's rule of one for each 64 of the width).
      text_heads: of the text encoder.
      activation: "quick_gelu" or "gelu", where the weights say it wrongly or not at all.
      precision: compute type, "float32" or "bfloat16"; None: as the device does best.
      batch_size: pictures or sentences that are encoded at a time.
      log: takes one line for everything that was decided or left out.

    Raises:
      WeightsError, WeightFileError, CheckpointError, ConfigError: one sentence each.
    """
    found = weights.open_(path, log)
    changes = {} if found.config else fitting.native_picture(found, square=False)
    if found.config is None:
        text_length = text_length or found.text_length
    given = {
        "model.image_size": image_size,
        "model.stride": stride,
        "model.text_length": text_length,
        "model.vision_heads": vision_heads,
        "model.text_heads": text_heads,
        "model.activation": activation,
        "precision": precision,
        "eval.batch_size": batch_size,
    }
    config = fitting.resolve(
        found.config or config_lib.Config(),
        found,
        log,
        training=False,
        changes=changes | {key: value for key, value in given.items() if value is not None},
        ask=HEADS,
    )
    return of_weights(found, config, log)


def of_weights(
    found: weights.Weights, config: config_lib.Config, log: Callable[[str], None]
) -> Encoders:
    """The encoders of weights in a resolved configuration."""
    training = step.make(config, num_identities=1, steps_per_epoch=(1,) * config.num_epochs)
    state = jax.eval_shape(lambda: training.init(0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        fitting.encoders_only({"params": state.params, "batch_stats": state.batch_stats}),
    )
    variables = fitting.fit(found, template, config.model, log)
    return Encoders(
        config, variables, training, source=found.source, kind=found.kind, meta=found.meta
    )


def _pixels(picture: Any, index: int, size: tuple[int, int]) -> np.ndarray:
    if isinstance(picture, (str, os.PathLike)):
        name = os.fspath(picture)
        try:
            with open(name, "rb") as file:
                content = file.read()
        except OSError as error:
            raise records.DataError(
                f"picture {index}, {name}, cannot be read ({error.strerror}); give the path of an "
                "existing picture."
            ) from error
        return image_files.decode(content, name, size)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"picture {index} is an array of {picture.dtype} {list(picture.shape)}; expected "
                "uint8 (height, width, 3), RGB from 0 to 255."
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"picture {index} is {type(picture).__name__}; expected a path, a PIL image or an "
            "array."
        )
    height, width = size
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)
