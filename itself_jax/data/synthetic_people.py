"""Who walks through the synthetic data set: identities, without pixels or words about them.

People come in families of three near-twins that differ in one or two small details, so a caption
picks out one of them only by naming such a detail. All attribute values are short strings
("red cap", "none").
"""

import bisect
import dataclasses
import itertools

import numpy as np

COLOURS = ("black", "white", "grey", "red", "yellow", "green", "blue", "purple", "pink", "brown")
COLOUR_WORDS = {"grey": ("grey", "gray"), "purple": ("purple", "violet")}
ATTRIBUTES = (
    "sex build hair upper pattern sleeves lower shoes hat bag bag_side glasses carried scarf"
).split()
VIEWS = (
    "front",
    "back",
    "left",
    "right",
)  # left and right: the way the person faces on the picture

# kind → what a caption may call it (`synthetic_captions`).
UPPER = {
    "t-shirt": ("t-shirt", "tee"),
    "shirt": ("shirt", "button-up shirt"),
    "sweater": ("sweater", "pullover"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket",),
    "coat": ("coat", "overcoat"),
}
LOWER = {
    "trousers": ("trousers", "pants"),
    "jeans": ("jeans",),
    "shorts": ("shorts", "short pants"),
    "skirt": ("skirt",),
}
SHOES = {"sneakers": ("sneakers", "trainers", "sports shoes"), "boots": ("boots", "high boots")}
HATS = {
    "cap": ("cap", "baseball cap"),
    "beanie": ("beanie", "knitted hat"),
    "sun hat": ("sun hat", "wide-brimmed hat"),
}
BAGS = {
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "shoulder bag": ("shoulder bag", "messenger bag"),
}
CARRIED = {
    "umbrella": ("umbrella",),
    "suitcase": ("suitcase", "trolley case"),
    "book": ("book",),
    "phone": ("phone", "mobile phone"),
    "bottle": ("bottle of water", "water bottle"),
    "skateboard": ("skateboard",),
    "paper bag": ("paper bag", "brown paper bag"),
}
COLOURED_THINGS = ("umbrella", "suitcase", "book")  # the other carried things always look the same
PATTERNS = {
    "plain": ("plain", "plain-coloured"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "plaid"),
    "dotted": ("dotted", "polka-dot"),
}
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey")
# The details in which near-twins differ, and how often.
_DETAILS = {
    "shoes": 3.0,
    "hat": 3.0,
    "bag": 3.0,
    "carried": 3.0,
    "scarf": 2.5,
    "pattern": 2.0,
    "hair": 1.0,
    "glasses": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Person:
    """One identity; `details` are the attributes in which its family differs."""

    family: int
    attributes: dict[str, str]
    details: tuple[str, ...]


def pick(rng: np.random.Generator, options, weights=None):
    """One of `options`; unlike `rng.choice` it returns the Python object itself."""
    options = tuple(options)
    if weights is None:
        return options[int(rng.integers(len(options)))]
    bounds = list(itertools.accumulate(weights))
    return options[bisect.bisect(bounds, rng.random() * bounds[-1])]


def pick_several(rng: np.random.Generator, weights: dict[str, float], count: int) -> list[str]:
    """`count` different keys; each next one is drawn in proportion to the weights left."""
    # Of exponential waiting times with these rates, the shortest ones; much faster than rng.choice.
    waits = rng.standard_exponential(len(weights)) / np.asarray(list(weights.values()))
    names = list(weights)
    return [names[i] for i in np.argsort(waits)[:count]]


def split_value(value: str) -> tuple[str, str]:
    """A coloured thing → (colour, kind): "red cap" → ("red", "cap"); "phone" → ("", "phone")."""
    colour, _, kind = value.partition(" ")
    return (colour, kind) if colour in COLOURS else ("", value)


def _sample(rng: np.random.Generator, name: str, who: dict[str, str]) -> str:
    """A value of attribute `name` that agrees with those already in `who`."""
    colour = pick(rng, COLOURS)
    match name:
        case "sex":
            return pick(rng, ("man", "woman"))
        case "build":
            return pick(rng, ("slim", "average", "stocky"), (1, 2, 1))
        case "hair":
            colour = pick(rng, HAIR_COLOURS, (3, 3, 2, 1.5, 1.5))
            weights = (6, 1, 0, 1) if who["sex"] == "man" else (2, 5, 3, 0)
            length = pick(rng, ("short", "long", "ponytail", "bald"), weights)
            return length if length == "bald" else f"{length} {colour}"
        case "upper":
            return f"{colour} {pick(rng, UPPER, (4, 3, 2, 2, 2, 2))}"
        case "pattern":
            kind = split_value(who["upper"])[1]
            patterned = 0.15 if kind in ("jacket", "coat") else 0.55
            return pick(rng, PATTERNS, (1 - patterned, *[patterned / 3] * 3))
        case "sleeves":
            kind = split_value(who["upper"])[1]
            return pick(rng, ("short", "long")) if kind in ("t-shirt", "shirt") else "long"
        case "lower":
            kind = pick(rng, LOWER, (4, 3, 3, 3 if who["sex"] == "woman" else 0))
            if kind == "jeans":
                colour = pick(rng, ("blue", "black", "grey"), (3, 1, 1))
            return f"{colour} {kind}"
        case "shoes":
            return f"{colour} {pick(rng, SHOES, (2, 1))}"
        case "hat":
            return pick(rng, ("none", *(f"{colour} {kind}" for kind in HATS)), (4, 2, 2, 1.5))
        case "bag":
            return pick(rng, ("none", *(f"{colour} {kind}" for kind in BAGS)), (3, 3, 2, 2))
        case "bag_side":
            return pick(rng, ("left", "right")) if sided(who["bag"]) else "none"
        case "glasses":
            return pick(rng, ("none", "glasses", "sunglasses"), (5, 2, 2))
        case "carried":
            kind = pick(rng, ("none", *CARRIED), (6, 2, 2, 1, 1, 1, 1.5, 1))
            return f"{colour} {kind}" if kind in COLOURED_THINGS else kind
        case "scarf":
            return pick(rng, ("none", f"{colour} scarf"), (2, 1))
    raise ValueError(f"no attribute is called {name!r}; there are {', '.join(ATTRIBUTES)}")


def sided(bag: str) -> bool:
    """Whether the bag hangs on one side of its owner (a backpack does not)."""
    return bag != "none" and not bag.endswith("backpack")


def _other_value(rng: np.random.Generator, name: str, who: dict[str, str], taken: set[str]) -> str:
    """A value of detail `name` outside `taken` that changes nothing else about the person."""
    while True:
        value = _sample(rng, name, who)
        if name == "bag" and sided(value) != sided(who["bag"]):
            continue  # would change `bag_side` as well
        if name == "shoes" and value.split()[1] != who["shoes"].split()[1]:
            continue  # near-twins' shoes differ in colour only
        if value == "none" and rng.random() < 0.6:
            continue  # a caption says what is there more readily than what is not
        if value not in taken:
            return value


def family(rng: np.random.Generator, number: int) -> list[Person]:
    """Three near-twins: any two of them differ in one or two attributes of `details`."""
    base: dict[str, str] = {}
    for name in ATTRIBUTES:
        base[name] = _sample(rng, name, base)
    allowed = dict(_DETAILS)
    if split_value(base["upper"])[1] in ("jacket", "coat") and base["pattern"] == "plain":
        del allowed["pattern"]
    if base["hair"] == "bald":
        del allowed["hair"]
    first, second = pick_several(rng, allowed, 2)
    a, b, c = dict(base), dict(base), dict(base)
    way = pick(rng, ("both", "one", "each"), (5, 3, 3))
    if way in ("both", "one"):  # three values of the first detail (and of the second one)
        for name in (first, second) if way == "both" else (first,):
            b[name] = _other_value(rng, name, base, {a[name]})
            c[name] = _other_value(rng, name, base, {a[name], b[name]})
    else:  # one has another first detail, one another second detail
        b[first] = _other_value(rng, first, base, {a[first]})
        c[second] = _other_value(rng, second, base, {a[second]})
    details = (first,) if way == "one" else (first, second)
    members = [a, b, c]
    return [Person(number, members[i], details) for i in rng.permutation(3)]


def view(rng: np.random.Generator, person: Person, image: int) -> str:
    """How the person stands on its `image`-th picture; a bag on one side never hides behind it."""
    sides = ("left", "right")
    if person.attributes["bag_side"] != "none":  # facing left, the left side is the near one
        sides = (person.attributes["bag_side"],) * 2
    return pick(rng, (("front",), ("back",), sides, ("front", "back", *sides))[image % 4])
