"""What is said about the people of the synthetic data set: English captions of varied form.

A caption names 5–8 attributes of one identity, or as many as asked for, in one to three sentences.
It says nothing that is not true of the identity, but may name what its picture happens to hide.
"""

from typing import NamedTuple

import numpy as np

from itself_jax.data import synthetic_people as people

NAMED = (5, 8)  # attributes that a caption names: fewest, most
NOUNS = {
    "man": ("man", "man", "gentleman"),
    "woman": ("woman", "woman", "lady"),
    "": ("person", "pedestrian"),
}
BUILD_WORDS = {"slim": ("slim", "thin"), "stocky": ("stocky", "heavy-set")}

# How readily a describer names a thing, before `_weight` looks at this person.
_WEIGHTS = {
    "sex": 12.0,
    "build": 0.6,
    "hair": 1.6,
    "upper": 8.0,
    "pattern": 1.2,
    "sleeves": 0.5,
    "lower": 6.0,
    "shoes": 1.8,
    "hat": 2.2,
    "bag": 2.2,
    "bag_side": 0.5,
    "glasses": 1.2,
    "carried": 2.4,
    "scarf": 1.8,
}
# A describer names what sets a person apart; this factor sets how often, and with it how well the
# attribute oracle can do (`synthetic.oracle_rank1` on the test split: 75–90 %).
_TELLING = 1.5


def caption(
    rng: np.random.Generator,
    person: people.Person,
    view: str,
    named: tuple[int, int] = NAMED,
) -> tuple[str, dict[str, str]]:
    """A sentence or three about `person` → (text, {attribute: the words that name it}).

    Names from `named[0]` to `named[1]` attributes; those that `view` hides are named less often.
    """
    names = _choose(rng, person, view, named)
    writer = _Writer(rng, person.attributes, names)
    return writer.write(), writer.named


def _weight(name: str, person: people.Person, view: str) -> float:
    value = person.attributes[name]
    telling = name in person.details
    weight = _WEIGHTS[name] * (_TELLING if telling else 1.0)
    if value in ("none", "average"):
        return weight / 4 if telling and name in ("hat", "bag", "glasses", "scarf") else 0.0
    if value == "plain" and not telling:
        return 0.1
    if name == "sleeves" and people.split_value(person.attributes["upper"])[1] not in (
        "t-shirt",
        "shirt",
    ):
        return 0.0  # nobody says that a coat has long sleeves
    if name == "glasses" and view == "back":
        return weight / 4
    return weight


def _choose(
    rng: np.random.Generator, person: people.Person, view: str, named: tuple[int, int]
) -> set[str]:
    """Which attributes to name: weighted, without repetition."""
    weights = {name: _weight(name, person, view) for name in people.ATTRIBUTES}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    counts = tuple(range(named[0], named[1] + 1))
    often = tuple(2 if count in named else 3 for count in counts)
    count = min(len(weights), int(people.pick(rng, counts, often)))
    names = set(people.pick_several(rng, weights, count))
    if "bag_side" in names and "bag" not in names:
        names = names - {"bag_side"} | {"bag"}  # a side alone says nothing
    return names


class _Predicate(NamedTuple):
    """One thing to say: "wearing a cap", "wears a cap", "a cap is worn" (or no passive form)."""

    participle: str
    finite: str
    passive: str = ""


def _join(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    # "X and Y, and Z": a comma keeps a list inside a list readable.
    comma = "," if any(" and " in part for part in parts) else ""
    return f"{', '.join(parts[:-1])}{comma} and {parts[-1]}"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class _Writer:
    """Builds one caption; `named` fills with the words used for each attribute."""

    def __init__(self, rng: np.random.Generator, attributes: dict[str, str], names: set[str]):
        self.rng, self.attributes, self.names = rng, attributes, names
        self.named: dict[str, str] = {}
        sex = attributes["sex"] if "sex" in names else ""
        self.noun = people.pick(rng, NOUNS[sex])
        if sex:
            self._say("sex", self.noun)
        self.pronoun = {"man": "he", "woman": "she", "": f"the {self.noun}"}[sex]
        self.possessive = {"man": "his", "woman": "her", "": "the"}[sex]
        self.adjective = ""
        if "build" in names:
            self.adjective = (
                self._say("build", people.pick(rng, BUILD_WORDS[attributes["build"]])) + " "
            )

    def _say(self, name: str, words: str) -> str:
        self.named[name] = words
        return words

    def _thing(self, name: str, kinds: dict[str, tuple[str, ...]]) -> str:
        colour, kind = people.split_value(self.attributes[name])
        words = people.pick(self.rng, kinds[kind])
        if colour:
            words = f"{people.pick(self.rng, people.COLOUR_WORDS.get(colour, (colour,)))} {words}"
        return self._say(name, words)

    def _upper(self) -> str:
        rng, value = self.rng, self.attributes
        colour, kind = people.split_value(value["upper"])
        before, after = [], ""
        if "sleeves" in self.names:
            if rng.random() < 0.5:
                before.append(self._say("sleeves", f"{value['sleeves']}-sleeved"))
            else:
                after = " with " + self._say("sleeves", f"{value['sleeves']} sleeves")
        if "upper" in self.names:
            before.append(people.pick(rng, people.COLOUR_WORDS.get(colour, (colour,))))
            noun = people.pick(rng, people.UPPER[kind])
        else:
            noun = "top" if kind not in ("jacket", "coat") else "garment"
        if "pattern" in self.names:
            word = self._say("pattern", people.pick(rng, people.PATTERNS[value["pattern"]]))
            before.insert(int(rng.integers(len(before) + 1)) if word == "striped" else 0, word)
        words = " ".join([*before, noun])
        if "upper" in self.names:
            self._say("upper", words)
        return _a(words) + after

    def _clothes(self) -> list[str]:
        worn = []
        if self.names & {"upper", "pattern", "sleeves"}:
            worn.append(self._upper())
        if "lower" in self.names:
            words = self._thing("lower", people.LOWER)
            worn.append(_a(words) if words.endswith("skirt") else words)
        for name, kinds in (
            ("shoes", people.SHOES),
            ("hat", people.HATS),
            ("scarf", {"scarf": ("scarf",)}),
        ):
            if name in self.names and self.attributes[name] != "none":
                words = self._thing(name, kinds)
                worn.append(words if name == "shoes" else _a(words))
        return worn

    def _hair(self) -> "_Predicate":
        rng = self.rng
        if self.attributes["hair"] == "bald":
            words = self._say("hair", people.pick(rng, ("bald head", "shaved head")))
            return _Predicate(f"with a {words}", f"has a {words}")
        length, colour = self.attributes["hair"].split()
        colour = people.pick(
            rng, {"blond": ("blond", "fair"), **people.COLOUR_WORDS}.get(colour, (colour,))
        )
        if length == "ponytail":
            words = self._say("hair", f"{colour} ponytail")
            return _Predicate(f"with a {words}", f"has a {words}")
        if rng.random() < 0.25:
            words = self._say("hair", f"{length} and {colour}")
            return _Predicate(f"whose hair is {words}", f"has hair that is {words}")
        words = self._say("hair", f"{length} {colour} hair")
        return _Predicate(f"with {words}", f"has {words}")

    def _bag(self) -> _Predicate:
        rng, words = self.rng, _a(self._thing("bag", people.BAGS))
        kind = people.split_value(self.attributes["bag"])[1]
        if kind == "backpack":
            words += people.pick(rng, ("", f" on {self.possessive} back"))
        elif "bag_side" in self.names:
            side = self.attributes["bag_side"]  # in the person's own frame
            if kind == "handbag":
                where = f"in {self.possessive} {self._say('bag_side', f'{side} hand')}"
            else:
                where = f"at {self.possessive} {self._say('bag_side', f'{side} side')}"
            words += " " + where
        if rng.random() < 0.5:
            return _Predicate(f"carrying {words}", f"carries {words}", f"{words} is carried")
        return _Predicate(f"with {words}", f"has {words}")

    def _carried(self) -> _Predicate:
        words = _a(self._thing("carried", people.CARRIED))
        verbs = {
            "umbrella": (("holding up", "holds up"), ("walking under", "walks under")),
            "suitcase": (("pulling", "pulls"), ("rolling along", "rolls along")),
            "phone": (("looking at", "looks at"), ("holding", "holds")),
        }.get(
            people.split_value(self.attributes["carried"])[1],
            (("holding", "holds"), ("carrying", "is carrying")),
        )
        participle, finite = people.pick(self.rng, verbs)
        return _Predicate(f"{participle} {words}", f"{finite} {words}")

    def _glasses(self) -> _Predicate:
        options = ("glasses", "eyeglasses")
        if self.attributes["glasses"] == "sunglasses":
            options = ("sunglasses", "dark glasses")
        words = self._say("glasses", people.pick(self.rng, options))
        return _Predicate(f"with {words}", f"wears {words}", f"{words} are worn")

    def _worn(self) -> list[_Predicate]:
        """What the person wears, in one predicate or two."""
        rng, clothes = self.rng, self._clothes()
        groups = [clothes] if clothes else []
        if len(clothes) > 2 and rng.random() < 0.7:
            clothes = [clothes[i] for i in rng.permutation(len(clothes))]
            cut = int(rng.integers(1, len(clothes)))
            groups = [clothes[:cut], clothes[cut:]]
        forms = [("wearing", "wears"), ("in", "is wearing"), ("wearing", "has on")]
        found = []
        for group, i in zip(groups, rng.permutation(len(forms)), strict=False):
            words = _join(group)
            one = len(group) == 1 and words.startswith("a ")
            passive = f"{words} {'is' if one else 'are'} worn"
            found.append(_Predicate(f"{forms[i][0]} {words}", f"{forms[i][1]} {words}", passive))
        return found

    def _predicates(self) -> list[_Predicate]:
        """Everything to be said, in random order."""
        rng, value = self.rng, self.attributes
        found = self._worn()
        for name, say in (
            ("hair", self._hair),
            ("glasses", self._glasses),
            ("bag", self._bag),
            ("carried", self._carried),
        ):
            if name in self.names and value[name] != "none":
                found.append(say())
        gone = [
            self._say(name, f"no {name}")
            for name in ("hat", "bag", "glasses", "scarf")
            if name in self.names and value[name] == "none"
        ]
        if gone:
            found.append(_Predicate(f"with {_join(gone)}", f"has {_join(gone)}"))
        if len(found) < 3 or rng.random() < 0.3:
            place = people.pick(
                rng, ("along the street", "down the road", "past the camera", "outside")
            )
            found.append(_Predicate(f"walking {place}", f"is walking {place}"))
        return [found[i] for i in rng.permutation(len(found))]

    def _sentence(self, subject: str, predicates: list[_Predicate], first: bool) -> str:
        rng = self.rng
        form = people.pick(rng, ("finite", "noun", "front", "there", "passive"))
        if form == "passive" and len(predicates) == 1 and predicates[0].passive:
            subject = {"he": "him", "she": "her"}.get(subject, subject)
            return f"{predicates[0].passive} by {subject}"
        # "with" and "whose" lean on the noun, "in" on the noun or on a "with".
        leaning = [p for p in predicates if p.participle.startswith(("with", "whose"))]
        verbal = [p for p in predicates if p not in leaning]
        ordered = leaning + verbal
        if form == "there" and first:
            subject = "a " + subject.split(" ", 1)[1]
            opening = people.pick(rng, ("there is", "this is", "the picture shows", "we see"))
            parts = [_join([p.participle for p in group]) for group in (leaning, verbal) if group]
            return f"{opening} {subject} {', '.join(parts)}"
        if form == "front" and verbal and len(predicates) > 1:
            rest = [p.finite for p in ordered if p is not verbal[0]]
            return f"{verbal[0].participle}, {subject} {_join(rest)}"
        if form == "noun" and len(predicates) > 1 and " " in subject:
            rest = [p.finite for p in ordered[1:]]
            return f"{subject} {ordered[0].participle} {_join(rest)}"
        return f"{subject} {_join([p.finite for p in predicates])}"

    def write(self) -> str:
        """The caption; call once."""
        rng, predicates = self.rng, self._predicates()
        count = min(len(predicates), int(people.pick(rng, (1, 2, 3), (1, 4, 2))))
        if len(predicates) > 3:
            count = max(count, 2)  # four predicates in one sentence read as a list
        cuts = np.linspace(0, len(predicates), count + 1).round().astype(int)
        described = f"{self.adjective}{self.noun}"
        sentences = []
        for i in range(count):
            subject = people.pick(rng, (f"a {described}", f"the {described}", f"this {described}"))
            if i:
                subject = people.pick(rng, (self.pronoun, self.pronoun, f"the {self.noun}"))
            sentence = self._sentence(subject, predicates[cuts[i] : cuts[i + 1]], i == 0)
            sentences.append(sentence[0].upper() + sentence[1:] + ".")
        return " ".join(sentences)
