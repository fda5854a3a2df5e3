"""Pictures of a report: small crops, and heat over patches with the kept ones outlined."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from itself_jax import config as config_lib
from itself_jax.data import records, remote
from itself_jax.reporting import content

UNREADABLE = (records.DataError, remote.CopyError)
_CROP_HEIGHT = 144
VIEW_HEIGHT = 240
_HEAT = 0.4  # its share of a pixel's colour
_FADED = 0.7  # the share of white where a patch is not kept
_COLOURS = 64  # of a PNG's palette: a third of the bytes, and nobody sees it


def picture(split: records.Split, index: int, model: config_lib.Model, height: int) -> Image.Image:
    """A picture of a split, with the proportions in which the model sees it.

    Raises:
      DataError, CopyError: it cannot be read.
    """
    size = (height, max(1, round(height * model.image_size[1] / model.image_size[0])))
    try:
        return Image.fromarray(split.images.load(index, size))
    except records.DataError:  # a packed set of resized pictures has them in its own size alone
        pixels = split.images.load(index, model.image_size)
        return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def crop(
    split: records.Split, index: int, model: config_lib.Model, height: int = _CROP_HEIGHT
) -> content.Crop:
    """A small JPEG; without content where the file cannot be read."""
    name = split.image_paths[index]
    try:
        drawn = picture(split, index, model, height)
    except UNREADABLE:
        return content.Crop(name, None)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=85)
    return content.Crop(name, file.getvalue())


def heat(
    drawn: Image.Image,
    saliency: Float[np.ndarray, " n"],
    kept: Int[np.ndarray, " k"],
    model: config_lib.Model,
) -> bytes:
    """The picture in grey, kept patches coloured by their saliency and outlined, others faded.

    Args:
      saliency: of the patches, row by row, ≥ 0; colours go from the least to the most salient one,
        of all patches.
      kept: indices of patches.

    Returns:
      A PNG.
    """
    colours = matplotlib.colormaps["plasma"](_unit(saliency).reshape(model.grid))[..., :3]
    grey = np.asarray(drawn.convert("L").convert("RGB"), np.float32)
    size = (drawn.width, drawn.height)
    over = Image.fromarray((255 * colours).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    mixed = (1 - _HEAT) * grey + _HEAT * np.asarray(over, np.float32)
    is_kept = np.zeros(model.grid, bool)
    is_kept.flat[kept] = True
    cells = np.asarray(Image.fromarray(is_kept).resize(size, Image.Resampling.NEAREST))
    mixed = np.where(cells[..., None], mixed, (1 - _FADED) * grey + _FADED * 255)
    result = Image.fromarray(mixed.astype(np.uint8))
    pen = ImageDraw.Draw(result)
    for colour, width in (("black", 4), ("white", 2)):
        for line in _outline(kept, model.grid, size):
            pen.line(line, fill=colour, width=width)
    file = io.BytesIO()
    result.quantize(_COLOURS).save(file, "PNG", optimize=True)
    return file.getvalue()


def _unit(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _outline(
    kept: Int[np.ndarray, " k"], grid: tuple[int, int], size: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """The sides between a kept cell and one that is not: x0, y0, x1, y1 in pixels.

    Overlapping patches have cells of one stride, so that the cells fill the picture.
    """
    rows, columns = grid
    is_kept = np.zeros((rows + 2, columns + 2), bool)
    is_kept[1 + kept // columns, 1 + kept % columns] = True
    across, down = size[0] / columns, size[1] / rows
    lines = []
    for y, x in np.ndindex(rows + 1, columns + 1):
        here = is_kept[y + 1, x + 1]
        if here != is_kept[y, x + 1] and x < columns:
            lines.append((x * across, y * down, (x + 1) * across, y * down))
        if here != is_kept[y + 1, x] and y < rows:
            lines.append((x * across, y * down, x * across, (y + 1) * down))
    return [_inside(line, size) for line in lines]


def _inside(line: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Lines on the border of a picture would be cut in half."""
    x0, x1 = (float(min(max(x, 1), size[0] - 2)) for x in line[::2])
    y0, y1 = (float(min(max(y, 1), size[1] - 2)) for y in line[1::2])
    return x0, y0, x1, y1
