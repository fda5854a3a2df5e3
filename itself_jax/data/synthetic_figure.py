"""The people of the synthetic data set, as shapes: bodies, clothes and belongings.

Units are the brush's; side views are drawn facing right and mirrored by `synthetic_draw`. What is
distinctive is painted generously: it must survive being read at 96 x 40 pixels.
"""

import math

import numpy as np

from itself_jax.data import synthetic_brush as brushes
from itself_jax.data import synthetic_people as people

SKIN = ((244, 206, 176), (226, 178, 140), (190, 138, 98), (136, 92, 62))
_HAIR = {
    "black": (26, 22, 22),
    "brown": (98, 58, 30),
    "blond": (226, 190, 96),
    "red": (184, 76, 28),
    "grey": (164, 164, 166),
}


class Figure:
    """Paints one person; `near` and `far` below are the sides towards and away from the viewer."""

    def __init__(self, rng: np.random.Generator, who: dict[str, str], view: str, skin, brush):
        self.rng, self.who, self.view, self.brush = rng, who, view, brush
        self.skin = skin
        self.side_on = view in ("left", "right")
        self.wide = {"slim": 0.84, "average": 1.0, "stocky": 1.24}[who["build"]]
        man = who["sex"] == "man"
        self.shoulder = (11.5 if man else 9.6) * (0.5 + 0.5 * self.wide) * self.wide**0.5
        self.waist = (9.0 if man else 7.0) * self.wide
        self.hip = (9.0 if man else 10.2) * self.wide
        if self.side_on:
            depth = 0.66
            self.shoulder, self.waist = self.shoulder * depth, self.waist * 0.8
            self.hip *= 0.74
        self.upper_kind = people.split_value(who["upper"])[1]
        self.lower_kind = people.split_value(who["lower"])[1]
        self.bag_kind = people.split_value(who["bag"])[1]
        self.carried_kind = people.split_value(who["carried"])[1]
        # On the picture, the person's left is at the right (+1) when seen from the front.
        left = 1 if view == "front" else -1
        self.bag_hand = left if who["bag_side"] == "left" else -left
        if self.side_on:
            self.bag_hand = 1  # the view was chosen so that the bag is on the near side
        elif who["bag_side"] == "none":
            self.bag_hand = int(people.pick(rng, (-1, 1)))
        self.stride = float(rng.uniform(3.0, 9.0)) * people.pick(rng, (-1, 1))
        self.swing = float(rng.uniform(0.5, 4.0)) * people.pick(rng, (-1, 1))

    def paint(self) -> None:
        back = self.view == "back"
        self._umbrella()
        if self.bag_kind == "backpack" and not back:
            self._backpack()
        if not back:
            self._hair_behind()
        hands = self._arm_paths()
        if self.side_on:
            self._arm(hands[-1], far=True)
            self._carried(hands[-1][-1])
        self._legs()
        self._torso()
        for side in (1,) if self.side_on else (-1, 1):
            self._arm(hands[side], far=False)
        self.brush.pattern(self.who["pattern"], people.split_value(self.who["upper"])[0])
        self._fastening()
        self._hands(hands)
        if self.bag_kind == "backpack":
            self._backpack() if back else self._straps()
        self._neck_and_head()
        self._scarf()
        if back:
            self._hair_behind()
        self._hat()
        self._side_bag(hands[self.bag_hand][-1])
        if not self.side_on:
            self._carried(hands[-self.bag_hand][-1])

    def _arm_paths(self) -> dict[int, list[tuple[float, float]]]:
        """Shoulder, elbow, hand of both arms: by picture side, or near (1) and far (-1)."""
        paths = {}
        for side in (-1, 1):
            if self.side_on:
                swing = self.swing * side
                path = [(0.0, 21.5), (swing - 1.0, 35.0), (swing * 1.9 + 1.5, 47.5)]
            else:
                x, swing = self.shoulder - 2.0, self.swing
                path = [
                    (x, 21.5),
                    (x + 3.0, 35.0 + 0.2 * swing),
                    (x + 3.2, 48.0 + side * swing / 3),
                ]
                path = [(side * px, py) for px, py in path]
            paths[side] = path
        busy = -1 if self.side_on else -self.bag_hand
        out = 1 if self.side_on else busy
        x0, reach = paths[busy][0][0], self.shoulder
        if self.carried_kind in ("phone", "book"):  # held up
            hand = (x0 + 13.5, 33.0) if self.side_on else (busy * (reach + 3.5), 32.0)
            paths[busy][1:] = [(x0 + out * 4.5, 36.0), hand]
        elif self.carried_kind == "umbrella":
            hand = (x0 + 9.0, 27.0) if self.side_on else (busy * (reach + 2.5), 26.0)
            paths[busy][1:] = [(x0 + out * 5.0, 37.0), hand]
        elif self.carried_kind == "bottle":
            hand = (x0 + 12.0, 40.0) if self.side_on else (busy * (reach + 4.0), 42.0)
            paths[busy][1:] = [(x0 + out * 4.0, 36.0), hand]
        elif self.carried_kind != "none" and self.side_on:  # hangs from the far hand, in front
            paths[busy][1:] = [(x0 + 5.0, 36.0), (x0 + 10.0, 47.0)]
        return paths

    def _arm(self, path, *, far: bool) -> None:
        width = 5.6 * self.wide**0.5
        colour = brushes.shade(brushes.rgb_of(self.who["upper"]), 0.78 if far else 0.9)
        skin = brushes.shade(self.skin, 0.82 if far else 1.0)
        (xa, ya), (xb, yb), (xc, yc) = path
        self.brush.limb(path, (width, width * 0.9, width * 0.75), skin, "body")
        if self.who["sleeves"] == "long":
            cuff = (xb + 0.85 * (xc - xb), yb + 0.85 * (yc - yb))
            widths = (width * 1.15, width * 1.1, width)
            self.brush.limb(((xa, ya), (xb, yb), cuff), widths, colour, "sleeves")
        else:
            cuff = (xa + 0.62 * (xb - xa), ya + 0.62 * (yb - ya))
            self.brush.limb(((xa, ya), cuff), (width * 1.2, width * 1.3), colour, "sleeves")

    def _hands(self, hands) -> None:
        for side in (1,) if self.side_on else (-1, 1):
            self.brush.ellipse(*hands[side][-1], 2.5, 2.8, self.skin, "body")

    def _legs(self) -> None:
        colour, brush = brushes.rgb_of(self.who["lower"]), self.brush
        width = 8.6 * self.wide**0.6
        for side in (-1, 1):  # the far leg first
            if self.side_on:
                step = self.stride * side
                path = [(0.0, 52.0), (step * 0.62 + 0.6, 72.0), (step * 1.35, 94.0)]
            else:
                x = self.hip * 0.52
                lift = max(0.0, side * self.stride) * 0.35
                path = [(side * x, 52.0), (side * x * 1.05, 72.0), (side * x * 1.1, 94.0 - lift)]
            tone = 0.8 if self.side_on and side == -1 else 1.0 if side == 1 else 0.93
            widths = (width * 1.1, width * 0.92, width * 0.72)
            if self.lower_kind in ("shorts", "skirt"):
                thin = tuple(w * 0.8 for w in widths)
                brush.limb(path, thin, brushes.shade(self.skin, tone), "body")
            if self.lower_kind == "shorts":
                (xa, ya), (xb, yb) = path[0], path[1]
                knee = (xa + 0.8 * (xb - xa), ya + 0.8 * (yb - ya))
                wide = (width * 1.2, width * 1.25)
                brush.limb((path[0], knee), wide, brushes.shade(colour, tone), "lower")
            elif self.lower_kind in ("trousers", "jeans"):
                widths = (
                    widths[0],
                    widths[1],
                    width * (0.95 if self.lower_kind == "jeans" else 0.8),
                )
                brush.limb(path, widths, brushes.shade(colour, tone), "lower")
                if self.lower_kind == "jeans":  # turn-ups and a light seam
                    x, y = path[2]
                    light = brushes.shade(colour, 1.0)
                    light = tuple((c + 2 * 225) // 3 for c in light)
                    brush.box(x - width * 0.5, y - 6.5, x + width * 0.5, y - 3.5, light, "lower")
                    seam = [(px + side * width * 0.32, py) for px, py in path]
                    brush.limb(seam, (0.9, 0.9, 0.9), light, "lower")
            self._shoe(path[2], tone, side)
        if self.lower_kind == "skirt":
            hem = self.hip * 1.28 + (abs(self.stride) * 0.3 if self.side_on else 0.0)
            top = self.waist * 0.95
            skirt = ((-top, 46), (top, 46), (hem, 72), (-hem, 72))
            brush.polygon(skirt, colour, "lower")
            for x in (-0.45, 0.0, 0.45):
                fold = ((top * x, 52), (hem * x + 0.5, 72), (hem * x - 0.5, 72))
                brush.polygon(fold, brushes.shade(colour, 0.75), "lower")
        else:
            brush.box(-self.hip * 0.98, 46, self.hip * 0.98, 54, colour, "lower")

    def _shoe(self, ankle, tone: float, side: int) -> None:
        colour, kind = people.split_value(self.who["shoes"])
        rgb, (x, y), brush = brushes.shade(brushes.RGB[colour], tone), ankle, self.brush
        if kind == "boots":
            brush.limb(((x, y - 9.0), (x, y + 2.0)), (8.4, 7.2), rgb, "shoes")
        sole = brushes.RGB["white"] if colour != "white" else (70, 70, 74)
        if kind == "boots":
            sole = brushes.shade(rgb, 0.55)
        if self.side_on:
            brush.ellipse(x + 2.4, y + 3.0, 6.8, 3.6, rgb, "shoes")
            brush.box(x - 3.6, y + 4.2, x + 9.0, y + 6.0, sole, "shoes")
        else:
            out = x + side * 1.0
            brush.ellipse(out, y + 2.4, 4.8, 4.2, rgb, "shoes")
            brush.box(out - 4.6, y + 4.6, out + 4.6, y + 6.0, sole, "shoes")

    def _torso(self) -> None:
        colour, shoulder, waist, hip = (
            brushes.rgb_of(self.who["upper"]),
            self.shoulder,
            self.waist,
            self.hip,
        )
        bottom = {"coat": 70.0, "hoodie": 52.0, "jacket": 53.0, "sweater": 51.0}.get(
            self.upper_kind, 49.5
        )
        flare = 1.3 if self.upper_kind == "coat" else 1.0
        outline = (
            (-shoulder * 0.45, 17.0),
            (shoulder * 0.45, 17.0),
            (shoulder, 20.5),
            (waist, 38.0),
            (hip, 49.0),
            (hip * flare, bottom),
            (-hip * flare, bottom),
            (-hip, 49.0),
            (-waist, 38.0),
            (-shoulder, 20.5),
        )
        self.brush.polygon(outline, colour, "upper")

    def _fastening(self) -> None:
        """What tells the kinds of garment apart: buttons, zip, hood, hem, lapels."""
        colour, brush = brushes.rgb_of(self.who["upper"]), self.brush
        dark = brushes.darker(colour)
        front = self.view == "front"
        middle = 0.0 if front else self.shoulder * 0.75
        shown = front or self.side_on
        if self.upper_kind == "t-shirt" and front:
            brush.ellipse(0, 17.5, 4.6, 3.2, self.skin, "body")
        elif self.upper_kind == "shirt" and front:
            brush.polygon(((-5, 16.6), (0, 22), (5, 16.6)), self.skin, "body")
            brush.polygon(((-6.4, 16), (-1, 21.5), (-5, 23.5)), dark, "upper")
            brush.polygon(((6.4, 16), (1, 21.5), (5, 23.5)), dark, "upper")
            brush.box(-0.6, 22, 0.6, 49, dark, "upper")
        elif self.upper_kind == "sweater":
            brush.box(-self.hip, 47.6, self.hip, 51, dark, "upper")
        elif self.upper_kind == "hoodie":
            if not front:
                brush.ellipse(-2.5 if self.side_on else 0, 20.5, 6.4, 5.4, dark, "upper")
            else:
                brush.polygon(((-7.5, 16), (7.5, 16), (4, 22), (-4, 22)), dark, "upper")
                brush.polygon(((-5, 39), (5, 39), (7.4, 47), (-7.4, 47)), dark, "upper")
        elif self.upper_kind == "jacket" and shown:
            if front:
                brush.polygon(
                    ((-2.6, 17), (2.6, 17), (3.6, 53), (-3.6, 53)), (226, 226, 222), "upper"
                )
            brush.box(-self.hip, 49.6, self.hip, 53, dark, "upper")
        elif self.upper_kind == "coat" and shown:
            brush.box(middle - 0.7, 22, middle + 0.7, 70, dark, "upper")
            for y in (28, 37, 46):
                brush.ellipse(middle - 2.2, y, 1.3, 1.3, dark, "upper")
        if self.upper_kind in ("jacket", "coat") and self.view == "back":
            brush.box(-self.hip, 45.5, self.hip, 47.5, dark, "upper")

    # ------------------------------------------------------------------------- head

    def _neck_and_head(self) -> None:
        brush, nose = self.brush, 1.2 if self.side_on else 0.0
        brush.box(
            -2.6,
            12,
            2.6,
            18.2 if self.view != "back" else 16.8,
            brushes.shade(self.skin, 0.85),
            "body",
        )
        brush.ellipse(nose * 0.6, 8.2, 6.0, 7.6, self.skin, "body")
        if self.side_on:
            brush.polygon(((6.0, 7.4), (8.2, 10.2), (6.0, 10.8)), self.skin, "body")
        self._hair_on_head()
        if self.view == "back":
            return
        dark = (40, 30, 30)
        if self.side_on:
            brush.ellipse(4.4, 8.4, 0.7, 0.8, dark, "body")
            brush.box(4.0, 12.6, 6.2, 13.3, (170, 70, 70), "body")
        else:
            for x in (-2.4, 2.4):
                brush.ellipse(x, 8.4, 0.8, 0.9, dark, "body")
            brush.box(-1.8, 12.3, 1.8, 13.2, (170, 70, 70), "body")
        self._glasses()

    def _hair_rgb(self):
        return _HAIR[self.who["hair"].split()[1]]

    def _hair_on_head(self) -> None:
        if self.who["hair"] == "bald":
            return
        rgb, brush = self._hair_rgb(), self.brush
        if self.view == "back":
            brush.ellipse(0, 7.6, 6.5, 7.8, rgb, "hair")
            return
        crown = [(6.6 * math.cos(t), 7.2 - 7.6 * math.sin(t)) for t in np.linspace(0, math.pi, 13)]
        if self.side_on:
            crown[0] = (5.6, 4.4)
            brush.polygon(
                (*crown, (-6.4, 11.5), (-2.0, 11.5), (-1.0, 6.0), (4.6, 4.6)), rgb, "hair"
            )
        else:
            brush.polygon(
                (*crown, (-5.4, 9.4), (-5.0, 5.2), (0, 3.8), (5.0, 5.2), (5.4, 9.4)), rgb, "hair"
            )

    def _hair_behind(self) -> None:
        """Long hair and ponytails: behind the head, so under it from the front."""
        length = self.who["hair"].split()[0]
        if length not in ("long", "ponytail"):
            return
        rgb, brush = self._hair_rgb(), self.brush
        if length == "long":
            if self.side_on:
                brush.polygon(((-6.6, 5), (0, 4), (-2.2, 24), (-9.0, 27)), rgb, "hair")
                return
            brush.polygon(((-6.6, 5), (6.6, 5), (9.4, 26), (-9.4, 26)), rgb, "hair")
        elif self.side_on:
            brush.limb(((-6.0, 5.5), (-10.5, 9.0), (-10.5, 20.0)), (4.0, 5.0, 2.0), rgb, "hair")
        elif self.view == "back":
            brush.limb(
                ((0, 8), (0, 14), (0, 26)), (4.0, 6.0, 2.0), brushes.shade(rgb, 0.75), "hair"
            )
        else:  # over one shoulder
            brush.limb(((4.5, 3.0), (9.0, 8.0), (9.5, 19.0)), (4.0, 5.0, 2.0), rgb, "hair")

    def _glasses(self) -> None:
        kind, brush = self.who["glasses"], self.brush
        if kind == "none":
            return
        rim = (20, 20, 24)
        lens = rim if kind == "sunglasses" else (216, 236, 248)
        centres = (4.6,) if self.side_on else (-3.0, 3.0)
        brush.box(-2.0 if self.side_on else -6.2, 7.6, 6.2, 8.5, rim, "glasses")
        for x in centres:
            brush.ellipse(x, 8.6, 2.7, 2.4, rim, "glasses")
            brush.ellipse(x, 8.6, 1.7, 1.5, lens, "glasses")

    def _hat(self) -> None:
        if self.who["hat"] == "none":
            return
        colour, kind = people.split_value(self.who["hat"])
        rgb, brush = brushes.RGB[colour], self.brush
        dark = brushes.darker(rgb)
        tall = 9.0 if kind == "beanie" else 7.8
        dome = [(7.0 * math.cos(t), 4.4 - tall * math.sin(t)) for t in np.linspace(0, math.pi, 13)]
        brush.polygon(dome, rgb, "hat")
        match kind:
            case "cap":
                if self.side_on:
                    brush.polygon(((2, 2.6), (7, 2.6), (13.5, 5.4), (2, 5.4)), dark, "hat")
                elif self.view == "front":
                    brush.polygon(((-6, 2.8), (6, 2.8), (8, 6.2), (-8, 6.2)), dark, "hat")
                else:
                    brush.ellipse(0, 3.6, 2.6, 1.6, dark, "hat")
            case "beanie":
                brush.box(-7.3, 1.6, 7.3, 5.4, dark, "hat")
                brush.ellipse(0, -5.6, 2.6, 2.6, dark, "hat")
            case "sun hat":
                brush.ellipse(0, 4.0, 14.0, 2.6, rgb, "hat")
                brush.box(-7.0, 0.4, 7.0, 2.6, dark, "hat")

    def _scarf(self) -> None:
        if self.who["scarf"] == "none":
            return
        rgb, brush = brushes.rgb_of(self.who["scarf"]), self.brush
        dark = brushes.darker(rgb)
        brush.ellipse(0, 17.6, 7.6 if not self.side_on else 6.4, 3.4, rgb, "scarf")
        if self.view == "front":
            brush.polygon(((1.0, 18), (6.4, 18), (7.2, 37), (2.6, 37)), rgb, "scarf")
            brush.box(2.5, 34, 7.2, 35.6, dark, "scarf")
        elif self.view == "back":
            brush.polygon(((-6.4, 18), (-1.0, 18), (-2.4, 33), (-7.0, 33)), rgb, "scarf")
        else:
            brush.polygon(((1.5, 18), (6.0, 18), (8.6, 35), (4.2, 36)), rgb, "scarf")
        brush.box(-6.6, 17.0, 6.6, 18.0, dark, "scarf")

    # ---------------------------------------------------------------------- belongings

    def _backpack(self) -> None:
        rgb, brush = brushes.rgb_of(self.who["bag"]), self.brush
        dark = brushes.darker(rgb)
        if self.view == "back":
            w = max(8.6, self.shoulder * 0.82)
            brush.limb(((0, 26.5), (0, 40.0)), (2 * w, 2 * w * 0.95), rgb, "bag")
            brush.box(-w, 27, w, 43, rgb, "bag")
            brush.box(-w * 0.7, 36, w * 0.7, 45, dark, "bag")
            brush.box(-w * 0.9, 24, w * 0.9, 25.4, dark, "bag")
        elif self.side_on:
            x = -self.shoulder - 4.0
            brush.limb(((x, 25), (x - 0.8, 41)), (11.5, 13.0), rgb, "bag")
            brush.box(x - 6.0, 35, x - 1.0, 44, dark, "bag")
        else:  # its edges show beside the body
            w = self.shoulder + 6.0
            edges = ((-w * 0.7, 15.5), (w * 0.7, 15.5), (w, 23), (w, 45), (-w, 45), (-w, 23))
            brush.polygon(edges, rgb, "bag")

    def _straps(self) -> None:
        rgb, brush = brushes.rgb_of(self.who["bag"]), self.brush
        if self.side_on:
            brush.limb(((-1.5, 18), (2.4, 25), (-3.5, 38)), (3.0, 3.2, 2.6), rgb, "bag")
            return
        for side in (-1, 1):
            x = side * self.shoulder * 0.58
            brush.limb(((x, 17.6), (x * 1.05, 30), (x * 1.35, 40)), (3.6, 3.6, 3.0), rgb, "bag")

    def _side_bag(self, hand) -> None:
        """A handbag in the hand, or a shoulder bag at the hip with its strap across the body."""
        brush, (x, y) = self.brush, hand
        if self.bag_kind not in ("handbag", "shoulder bag"):
            return
        rgb = brushes.rgb_of(self.who["bag"])
        dark = brushes.darker(rgb)
        side = self.bag_hand
        if self.bag_kind == "handbag":
            x += 0.0 if self.side_on else side * 1.5
            arch = ((x - 3.6, y + 8), (x - 2.2, y + 1.5), (x + 2.2, y + 1.5), (x + 3.6, y + 8))
            brush.limb(arch, (1.4, 1.4, 1.4, 1.4), dark, "bag")
            brush.polygon(
                ((x - 5.2, y + 7), (x + 5.2, y + 7), (x + 7, y + 18), (x - 7, y + 18)), rgb, "bag"
            )
            brush.box(x - 1.3, y + 7, x + 1.3, y + 10.5, dark, "bag")
            return
        hip = 0.0 if self.side_on else side * (self.hip + 2.0)
        start = -3.0 if self.side_on else -side * self.shoulder * 0.6
        brush.limb(((start, 17.5), (hip, 45.0)), (2.6, 2.6), dark, "bag")
        brush.box(hip - 7.4, 42, hip + 7.4, 56, rgb, "bag")
        brush.box(hip - 7.4, 42, hip + 7.4, 47.5, dark, "bag")

    def _umbrella(self) -> None:
        if self.carried_kind != "umbrella":
            return
        rgb, brush = brushes.rgb_of(self.who["carried"]), self.brush
        x = self.shoulder * 0.0 + 9.0 if self.side_on else -self.bag_hand * (self.shoulder + 2.5)
        middle = x * 0.45
        brush.limb(((x, 32), (x, -8)), (1.5, 1.5), (60, 60, 64), "carried")
        angles = np.linspace(0, math.pi, 15)
        dome = [(middle + 21 * math.cos(t), -6 - 13 * math.sin(t)) for t in angles]
        brush.polygon(dome, rgb, "carried")
        dark = brushes.darker(rgb)
        for i in (1, 3):
            a, b = middle - 21 + 10.5 * i, middle - 21 + 10.5 * (i + 1)
            brush.polygon(((middle, -19), (a, -6), (b, -6)), dark, "carried")

    def _carried(self, hand) -> None:
        brush, (x, y) = self.brush, hand
        kind, out = self.carried_kind, 1 if self.side_on else -self.bag_hand
        match kind:
            case "none":
                return
            case "umbrella":
                brush.limb(((x, y + 5), (x, y - 12)), (1.5, 1.5), (60, 60, 64), "carried")
            case "suitcase":
                rgb, x = brushes.rgb_of(self.who["carried"]), x + out * 4.5
                dark = brushes.darker(rgb)
                brush.box(x - 3.4, y, x - 2.4, 70, (90, 90, 94), "carried")
                brush.box(x + 2.4, y, x + 3.4, 70, (90, 90, 94), "carried")
                brush.box(x - 3.4, y - 0.5, x + 3.4, y + 1.0, (60, 60, 64), "carried")
                brush.box(x - 7.2, 66, x + 7.2, 96, rgb, "carried")
                for dx in (-3.6, 0.0, 3.6):
                    brush.box(x + dx - 0.5, 68, x + dx + 0.5, 94, dark, "carried")
                for dx in (-5.4, 5.4):
                    brush.ellipse(x + dx, 98, 1.8, 1.8, (30, 30, 32), "carried")
            case "book":
                rgb = brushes.rgb_of(self.who["carried"])
                brush.box(x - 5.6, y - 8.5, x + 5.6, y + 6.5, rgb, "carried")
                brush.box(x + 3.8, y - 7.7, x + 5.6, y + 6.5, (244, 240, 226), "carried")
            case "phone":
                brush.box(x - 3.0, y - 8.5, x + 3.0, y + 2.0, (22, 22, 26), "carried")
                brush.box(x - 2.0, y - 7.2, x + 2.0, y + 0.4, (120, 220, 250), "carried")
            case "bottle":
                brush.box(x - 2.6, y - 6.0, x + 2.6, y + 6.5, (96, 210, 236), "carried")
                brush.box(x - 2.6, y - 1.2, x + 2.6, y + 2.2, (244, 246, 250), "carried")
                brush.box(x - 1.4, y - 9.4, x + 1.4, y - 6.0, (20, 80, 180), "carried")
            case "skateboard":
                x += out * 3.0
                brush.limb(((x, 34), (x, 66)), (8.0, 8.0), (240, 136, 28), "carried")
                for wheel in (38, 62):
                    brush.ellipse(x + out * 4.6, wheel, 2.2, 2.6, (40, 40, 44), "carried")
            case "paper bag":
                x += out * 2.0
                brush.limb(
                    ((x - 3, y + 6), (x, y), (x + 3, y + 6)),
                    (1.2, 1.2, 1.2),
                    (90, 64, 40),
                    "carried",
                )
                brush.box(x - 6.4, y + 5, x + 6.4, y + 22, (208, 168, 112), "carried")
                brush.box(x - 6.4, y + 5, x - 4.2, y + 22, (170, 132, 82), "carried")
        if kind in ("book", "phone", "bottle"):  # the fingers
            brush.ellipse(x - out * 1.5, y + 2.0, 2.3, 2.0, self.skin, "body")
