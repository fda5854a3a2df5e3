"""Paints one person of the synthetic data set: a picture and a label map of the same size.

The surroundings and the light are here, the person is in `synthetic_figure`. All is painted at
twice the final size.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from itself_jax.data import synthetic_brush, synthetic_figure

HEIGHT, WIDTH = 192, 80  # pixels
_OVERSAMPLE = 2


@dataclasses.dataclass(frozen=True)
class Painting:
    """`picture` is RGB, `labels` mode L with the values of `LABELS` (0: background)."""

    picture: Image.Image
    labels: Image.Image


# --------------------------------------------------------------------------------- surroundings


def _background(rng: np.random.Generator) -> Image.Image:
    """A wall and a ground of dull colours with a few blurred things."""

    def dull(low: int, high: int) -> tuple[int, ...]:
        grey = rng.uniform(low, high)
        return tuple(int(np.clip(grey + d, 0, 255)) for d in rng.uniform(-12, 12, 3))

    # At the final size, which is enough for what is out of focus.
    width, height = WIDTH, HEIGHT
    picture = Image.new("RGB", (width, height), dull(120, 215))
    draw = ImageDraw.Draw(picture)
    horizon = height * rng.uniform(0.55, 0.85)
    for _ in range(int(rng.integers(2, 6))):  # doors, windows, posters, cars
        x, y = rng.uniform(-0.2, 1.0) * width, rng.uniform(-0.1, 0.5) * height
        w, h = rng.uniform(0.1, 0.6) * width, rng.uniform(0.05, 0.4) * height
        draw.rectangle((x, y, x + w, min(y + h, horizon)), fill=dull(70, 225))
    draw.rectangle((0, horizon, width, height), fill=dull(95, 190))
    for _ in range(int(rng.integers(0, 4))):  # paving
        y = rng.uniform(horizon, height)
        draw.line((0, y, width, y + rng.uniform(-10, 10)), fill=dull(90, 200), width=2)
    for _ in range(int(rng.integers(0, 3))):  # poles and trunks
        x, w = rng.uniform(0, width), rng.uniform(2, 7)
        draw.rectangle((x, 0, x + w, horizon + rng.uniform(0, 20)), fill=dull(60, 150))
    if rng.random() < 0.35:  # a bush
        x, r = rng.uniform(0, width), rng.uniform(8, 22)
        grey = rng.uniform(80, 120)
        leaf = (int(grey * 0.8), int(grey), int(grey * 0.7))
        draw.ellipse((x - r, horizon - r, x + r, horizon + r), fill=leaf)
    picture = picture.filter(ImageFilter.BoxBlur(float(rng.uniform(0.4, 1.6))))
    return picture.resize((width * _OVERSAMPLE, height * _OVERSAMPLE), Image.Resampling.BILINEAR)


def _occlude(rng: np.random.Generator, picture: Image.Image, labels: Image.Image) -> None:
    """A post, a bollard or a fence in front of the person; small, and without a label."""
    width, height = picture.size
    grey = int(rng.uniform(70, 170))
    colour = (grey, grey, int(grey * 0.96))
    match int(rng.integers(3)):
        case 0:
            x = rng.uniform(0.05, 0.9) * width
            boxes = [(x, 0, x + rng.uniform(6, 13), height)]
        case 1:
            x, w = rng.uniform(0, 0.8) * width, rng.uniform(20, 40)
            boxes = [(x, rng.uniform(0.72, 0.85) * height, x + w, height)]
        case _:
            y = rng.uniform(0.45, 0.8) * height
            boxes = [(0, y, width, y + 7), (0, y + 22, width, y + 29)]
    for box in boxes:
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
        ImageDraw.Draw(labels).rectangle(box, fill=0)


def _light(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """A gain, a slight cast and a gradient; never so strong that colours change their name."""
    width, height = picture.size
    y, x = np.ogrid[:height, :width]
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
    factor = rng.uniform(0.82, 1.1) * (1 + rng.uniform(0, 0.22) * ramp)
    cast = rng.uniform(0.96, 1.04, 3)
    pixels = np.asarray(picture, np.float32) * (factor[..., None] * cast).astype(np.float32)
    grain = np.float32(rng.uniform(0.5, 5.0))
    pixels += grain * rng.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def paint(who: dict[str, str], view: str, skin_tone: int, rng: np.random.Generator) -> Painting:
    """One picture of the person with attributes `who`; `rng` decides all that is not given."""
    width, height = WIDTH * _OVERSAMPLE, HEIGHT * _OVERSAMPLE
    background = _background(rng)
    umbrella = who["carried"].endswith("umbrella")
    head_room = 21.0 if umbrella else 9.0  # units above the head that must stay on the picture
    tallest = 0.97 * height / (100 + head_room)
    scale = tallest * float(rng.uniform(0.88, 1.0))
    spare = 0.97 * height - scale * (100 + head_room)
    top = scale * head_room + spare * float(rng.uniform(0.2, 1.0)) + 0.01 * height
    left = width / 2 + float(rng.uniform(-0.06, 0.06)) * width
    shadow = ImageDraw.Draw(background)
    sole, half = top + 100 * scale, 17 * scale
    ground = tuple(int(c * 0.6) for c in background.getpixel((width // 2, height - 3)))
    shadow.ellipse((left - half, sole - 3 * scale, left + half, sole + 2 * scale), fill=ground)

    lean = float(rng.uniform(-0.03, 0.03))
    if view == "left":  # drawn facing right on a mirrored background
        background = background.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = width - left
    brush = synthetic_brush.Brush(background, scale, left, top, lean)
    skin = synthetic_figure.SKIN[skin_tone % len(synthetic_figure.SKIN)]
    synthetic_figure.Figure(rng, who, view, skin, brush).paint()
    picture, labels = brush.picture, brush.labels
    if view == "left":
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        _occlude(rng, picture, labels)
    picture = picture.reduce(_OVERSAMPLE)
    labels = labels.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.BoxBlur(float(rng.uniform(0.1, 0.9))))
    return Painting(_light(rng, picture), labels)
