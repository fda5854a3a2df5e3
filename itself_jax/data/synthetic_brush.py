"""The brush of the synthetic data set: what it paints lands on a picture and on a label map.

Shapes are given in a person's units: 100 from the top of the head (y = 0) to the soles (y = 100),
x = 0 in the middle of the body.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from itself_jax.data import synthetic_people as people

Number = int | float

# Label map value → the attribute that is seen there. Sleeves are the arms' part of the upper
# garment; `REGIONS` gives all labels on which an attribute shows.
LABELS = {
    1: "body",
    2: "hair",
    3: "upper",
    4: "sleeves",
    5: "lower",
    6: "shoes",
    7: "hat",
    8: "bag",
    9: "glasses",
    10: "carried",
    11: "scarf",
}
_LABEL = {name: label for label, name in LABELS.items()}
REGIONS = {
    "sex": (1, 2, 3, 4, 5),
    "build": (1, 3, 4, 5),
    "hair": (2,),
    "upper": (3, 4),
    "pattern": (3, 4),
    "sleeves": (4,),
    "lower": (5,),
    "shoes": (6,),
    "hat": (7,),
    "bag": (8,),
    "bag_side": (8,),
    "glasses": (9,),
    "carried": (10,),
    "scarf": (11,),
}

RGB = {
    "black": (30, 30, 34),
    "white": (242, 242, 238),
    "grey": (150, 152, 156),
    "red": (212, 28, 36),
    "yellow": (246, 208, 30),
    "green": (28, 142, 58),
    "blue": (34, 84, 214),
    "purple": (118, 40, 168),
    "pink": (250, 140, 188),
    "brown": (122, 72, 32),
}


class Brush:
    """Paints shapes, given in the person's units, on the picture and on the label map at once."""

    def __init__(self, background: Image.Image, scale: Number, x: Number, y: Number, lean: Number):
        self.picture, self.labels = background, Image.new("L", background.size)
        self._draw, self._mark = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        self.scale, self._x, self._y, self._lean = scale, x, y, lean

    def at(self, x: Number, y: Number) -> tuple[float, float]:
        """Pixel position of a point; the body leans about its soles."""
        return self._x + self.scale * (x + self._lean * (100 - y)), self._y + self.scale * y

    def polygon(self, points, colour, label: str) -> None:
        pixels = [self.at(*point) for point in points]
        self._draw.polygon(pixels, fill=colour)
        self._mark.polygon(pixels, fill=_LABEL[label])

    def ellipse(self, x: Number, y: Number, rx: Number, ry: Number, colour, label: str) -> None:
        (x, y), rx, ry = self.at(x, y), rx * self.scale, ry * self.scale
        self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
        self._mark.ellipse((x - rx, y - ry, x + rx, y + ry), fill=_LABEL[label])

    def limb(self, points, widths, colour, label: str) -> None:
        """A tapering tube along `points` with full `widths`, round at every point."""
        for (x, y), width in zip(points, widths, strict=True):
            self.ellipse(x, y, width / 2, width / 2, colour, label)
        for i in range(len(points) - 1):
            (xa, ya), (xb, yb) = points[i], points[i + 1]
            length = math.hypot(xb - xa, yb - ya) or 1.0
            nx, ny = (ya - yb) / length / 2, (xb - xa) / length / 2
            a, b = widths[i], widths[i + 1]
            corners = (
                (xa + nx * a, ya + ny * a),
                (xb + nx * b, yb + ny * b),
                (xb - nx * b, yb - ny * b),
                (xa - nx * a, ya - ny * a),
            )
            self.polygon(corners, colour, label)

    def box(self, x0: Number, y0: Number, x1: Number, y1: Number, colour, label: str) -> None:
        self.polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour, label)

    def pattern(self, kind: str, colour: str) -> None:
        """Stripes, checks or dots over all that is labelled upper garment or sleeve so far."""
        if kind == "plain":
            return
        ink = RGB["black" if colour in ("white", "grey", "yellow", "pink") else "white"]
        upper = np.isin(np.asarray(self.labels), (_LABEL["upper"], _LABEL["sleeves"]))
        left, top, right, bottom = Image.fromarray(upper).getbbox()
        x0, y0 = self.at(0, 18)
        x = (np.arange(left, right) - x0)[None, :] / self.scale
        y = (np.arange(top, bottom) - y0)[:, None] / self.scale
        match kind:
            case "striped":
                on = y % 7 < 2.8
            case "checked":  # bars both ways
                on = (x % 6.5 < 1.5) | (y % 6.5 < 1.5)
            case "dotted":
                row = np.floor(y / 5.2)
                on = np.hypot((x + 2.9 * row) % 5.8 - 2.9, y % 5.2 - 2.6) < 1.45
        inked = upper[top:bottom, left:right] & on
        self.picture.paste(ink, (left, top), Image.fromarray(inked))


def shade(colour, factor: Number) -> tuple[int, ...]:
    """The colour, darker (factor < 1) or lighter."""
    return tuple(int(min(255, max(0, c * factor))) for c in colour)


def darker(colour) -> tuple[int, ...]:
    """For details on a thing of this colour; on black a grey, which shows."""
    return shade(colour, 0.64) if sum(colour) > 150 else (68, 68, 74)


def rgb_of(value: str) -> tuple[int, int, int]:
    """The paint for an attribute's value such as "red cap"."""
    return RGB[people.split_value(value)[0]]
