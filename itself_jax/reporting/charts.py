"""The charts of a report, as PNGs whose bytes depend on the numbers alone.

Small figures for a page of any width: what tells lines apart is colour, dashes and markers alike.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib import axes as axes_lib
from matplotlib import figure, ticker
from matplotlib.backends import backend_agg

from itself_jax.reporting import content
from itself_jax.reporting import history as history_lib

_SIZE, _DPI = (4.4, 2.9), 160  # inches, dots per inch
# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F5F00", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DARK, GREY = "#1f2328", "#6b7280"
_STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": _DARK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "text.color": _DARK,
    "xtick.color": _DARK,
    "ytick.color": _DARK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-3, 5),
}
_MANY = 40  # points from which on markers would hide the line
_WIDE = 100.0  # ratio of largest to smallest from which on a scale is logarithmic

_TRAINING = {  # of one line each: title, axis
    "grad_norm": ("Gradient norm", "norm of the gradient"),
    "learning_rate": ("Learning rate of the encoders", "learning rate"),
    "pairs_per_second": ("Training speed", "pairs per second"),
}
_SPIKED = ("loss", "grad_norm")  # logarithmic where one large value would flatten the rest
_FROM_ZERO = ("bank", "pairs_per_second")
_LOSSES = {"loss": "all", "loss_tal": "TAL", "loss_cid": "CID and ID"}
_BANKS = {"bank_image": "patches of a picture", "bank_text": "words of a caption"}
_SOURCES = ("mars", "last", "layer", "mean", "std", "min_mean", "min_std")  # in this order
_MEASURED = {
    "patches_on_person": "Kept patches that touch the person",
    "patches_on_named": "Kept patches that touch what the caption names",
    "words_on_named": "Kept words that name an attribute",
    "pointing": "Pointing game: the most salient patch touches the attribute",
}
_POINTING = "pointing_"  # and an attribute: that one's share of `pointing`


class _Line(NamedTuple):
    """A line with its numbers; `style` counts colours, dashes and markers."""

    label: str
    x: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    style: int


class _Level(NamedTuple):
    """A horizontal line: what something else would reach."""

    label: str
    value: float
    colour: str
    dashes: tuple[int, tuple[int, int]]


def curves(history: history_lib.History) -> tuple[content.Chart, ...]:
    """What the run learned: validation by epoch; losses, k and all other numbers by step.

    What was never measured has no chart; what was measured once is a point.
    """
    found = [_validation(split, table, history) for split, table in history.validation.items()]
    training = {name: series for name, series in history.training.items() if len(series.at)}
    found.append(_by_step("loss", "Loss and its terms", "loss", _pick(training, _LOSSES)))
    for name, (title, axis) in _TRAINING.items():
        found.append(_by_step(name, title, axis, _pick(training, {name: title})))
    if (history.config.get("local") or {}).get("enabled", True):  # else there is no bank
        banks = _pick(training, _BANKS)
        found.append(_by_step("bank", "k: how many tokens are kept", "kept tokens", banks))
    for name in training.keys() - {*_LOSSES, *_BANKS, *_TRAINING}:
        found.append(_by_step(_slug(name), name, name, _pick(training, {name: name})))
    first = ("validation", "loss", "learning_rate", "grad_norm", "bank", "pairs_per_second")
    order = {name: place for place, name in enumerate(first)}
    drawn = [chart for chart in found if chart is not None]
    return tuple(sorted(drawn, key=lambda c: (order.get(c.name.split("-")[0], len(first)), c.name)))


def fusion(history: history_lib.History) -> tuple[content.Chart, ...]:
    """R@1 over the fusion weight α of each result, in both directions.

    Without a local branch there is one similarity and no chart.
    """
    return tuple(
        _fusion(result) for result in history.results if len({row.alpha for row in result.rows}) > 1
    )


def measured(history: history_lib.History) -> tuple[content.Chart, ...]:
    """Saliency measured against masks: a chart by epoch for each measure, a line a source.

    Of the single layers the best one at the last epoch is drawn. The pointing game of single
    attributes is one chart, of the tested epoch.
    """
    found = []
    names = [name for name in history.measured if not name.startswith(_POINTING)]
    for name in (*_MEASURED, *sorted(set(names) - _MEASURED.keys())):
        table = history.measured.get(name, {})
        lines = [
            _Line(label, *table[source], style)
            for style, (label, source) in enumerate(_shown(table, history).items())
        ]
        if not lines:
            continue
        title = _MEASURED.get(name, name.replace("_", " "))
        told = [f"{line.label} {_told(line, 'epoch', best='highest')}" for line in lines]
        chance = table.get(history_lib.CHANCE)
        if chance is not None and len(chance.at):
            # Its own line: chance may change with how many tokens are kept.
            lines.append(_Line(history_lib.CHANCE, *chance, -1))
            told.append(f"chance {_told(lines[-1], 'epoch')}")
        chart = _draw(
            f"measured-{_slug(name)}",
            title,
            lines,
            (),
            x="epoch",
            y="share",
            alt=f"{title}, as a share by epoch: {'; '.join(told)}.",
            bottom=0.0,
        )
        found.append(chart)
    return (*found, *_pointing(history))


def _shown(table: Mapping[str, history_lib.Series], history: history_lib.History) -> dict[str, str]:
    """Which sources of a measure are drawn, label → source: of all layers the best one."""
    local = history.config.get("local") or {}
    own = (local.get("saliency"), local.get("inference_saliency"))  # of the run itself
    known = [s for s in sorted(table, key=_place) if s != history_lib.CHANCE and len(table[s].at)]
    layers = [source for source in known if source.startswith("layer:")]
    best = max(layers, key=lambda source: table[source].value[-1], default=None)
    return {
        f"{source}, the best layer" if source == best and len(layers) > 1 else source: source
        for source in known
        if source == best or source in own or source not in layers
    }


def _pointing(history: history_lib.History) -> tuple[content.Chart, ...]:
    """The pointing game by attribute: a row an attribute, a mark a source; at most one chart."""
    tables = {
        name.removeprefix(_POINTING): table
        for name, table in history.measured.items()
        if name.startswith(_POINTING) and history_lib.CHANCE in table
    }
    epochs = sorted({int(at) for table in tables.values() for s in table.values() for at in s.at})
    if not epochs:
        return ()
    epoch = history.best_epoch if history.best_epoch in epochs else epochs[-1]

    def at_epoch(table: Mapping[str, history_lib.Series], source: str) -> float:
        series = table.get(source)
        found = np.flatnonzero(series.at == epoch) if series is not None else ()
        return float(series.value[found[0]]) if len(found) else np.nan

    attributes = sorted(tables, key=lambda name: at_epoch(tables[name], history_lib.CHANCE))
    overall = history.measured.get(_POINTING.rstrip("_"), next(iter(tables.values())))
    sources = _shown(overall, history)
    rows = np.arange(len(attributes))
    told = []
    with canvas("share of pictures that show it", "", height=0.9 + 0.26 * len(rows)) as axes:
        shown = {**sources, history_lib.CHANCE: history_lib.CHANCE}
        for style, (label, source) in enumerate(shown.items()):
            values = np.array([at_epoch(tables[name], source) for name in attributes])
            is_chance = source == history_lib.CHANCE
            axes.plot(
                values,
                rows,
                label=label,
                linestyle="",
                color=GREY if is_chance else COLOURS[style % len(COLOURS)],
                marker="|" if is_chance else MARKERS[style % len(MARKERS)],
                markersize=10 if is_chance else 5,
            )
            listed = zip(attributes, values.tolist(), strict=True)
            told.append(f"{label} " + ", ".join(f"{a} {v:.2f}" for a, v in listed))
        axes.set_yticks(rows, [_plain(name.replace("_", " ")) for name in attributes])
        axes.set_xlim(-0.02, 1.02)
        legend(axes)
        png = to_png(axes.figure)
    title = f"The pointing game by attribute, after epoch {epoch}"
    alt = f"Share of the pictures in which the most salient patch touches it: {'; '.join(told)}."
    return (content.Chart("measured-pointing-attributes", title, png, alt),)


def similarities(
    edges: Float[np.ndarray, " n_plus_1"],
    matched: Int[np.ndarray, " n"],
    unmatched: Int[np.ndarray, " n"],
) -> content.Chart:
    """How similar matched and unmatched pairs of picture and caption are.

    edges: of the bins, rising, n + 1 of them.
    matched, unmatched: how many pairs fall into each bin. Each is drawn as shares of its own sum,
      since nearly all pairs are unmatched.
    """
    centres = (edges[1:] + edges[:-1]) / 2
    told = []
    with canvas("similarity (cosine)", "share of the pairs") as axes:
        for label, counts, style in (("matched", matched, 0), ("unmatched", unmatched, 1)):
            total = int(counts.sum())
            shares = counts / max(total, 1)
            axes.stairs(
                shares,
                edges,
                label=f"{label} ({total:,})",
                color=COLOURS[style],
                linestyle=DASHES[style],
                linewidth=1.5,
                fill=False,
            )
            axes.stairs(shares, edges, color=COLOURS[style], fill=True, alpha=0.15)
            if total:
                mean = float((centres * shares).sum())
                told.append(f"{total:,} {label} pairs have a mean similarity of {_number(mean)}")
            else:
                told.append(f"there are no {label} pairs")
        filled = np.flatnonzero(matched + unmatched)
        if len(filled):
            axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        legend(axes)
        png = to_png(axes.figure)
    return content.Chart(
        "similarities",
        "Similarity of matched and unmatched pairs",
        png,
        f"Shares of pairs over their similarity: {', '.join(told)}.",
    )


def _validation(
    split: str, table: Mapping[str, history_lib.Series], history: history_lib.History
) -> content.Chart | None:
    lines = _pick(table, {"R1": "R@1", "mAP": "mAP"})
    if not lines:
        return None
    told = [f"{line.label} {_told(line, 'epoch', best='highest')}" for line in lines]
    chosen, word = history.best_epoch, "chosen" if history.finished else "the best so far"
    if chosen is not None:
        told.append(f"epoch {chosen} is {word}")
    return _draw(
        f"validation-{_slug(split)}",
        f"Text → image on {split}, after each epoch",
        lines,
        (),
        x="epoch",
        y="percent",
        alt=f"Text to image on {split} in percent: {'; '.join(told)}.",
        marked=None if chosen is None else (float(chosen), f"epoch {chosen}, {word}"),
    )


def _by_step(name: str, title: str, axis: str, lines: Sequence[_Line]) -> content.Chart | None:
    if not lines:
        return None
    best = "lowest" if name == "loss" else None
    told = [(line.label, _told(line, "step", best)) for line in lines]
    if len(lines) == 1:
        alt = f"{title} {told[0][1]}."
    else:
        alt = f"{title}, by step: {'; '.join(map(' '.join, told))}."
    values = np.concatenate([line.y for line in lines])
    is_log = name in _SPIKED and values.min() > 0 and values.max() > _WIDE * values.min()
    return _draw(
        name,
        title,
        lines,
        (),
        x="step",
        y=f"{axis} (log scale)" if is_log else axis,
        alt=alt,
        is_log=bool(is_log),
        bottom=0.0 if name in _FROM_ZERO else None,
    )


def _fusion(result: history_lib.Result) -> content.Chart:
    lines, levels, told = [], [], []
    for style, (direction, label) in enumerate(history_lib.DIRECTIONS.items()):
        scores = {r.alpha: r.metrics["R1"] for r in result.rows if r.direction == direction}
        if not scores:
            continue
        x = np.asarray(sorted(scores), np.float64)
        line = _Line(label, x, np.asarray([scores[a] for a in sorted(scores)]), style)
        lines.append(line)
        best = int(line.y.argmax())
        told.append(
            f"{label} {_number(line.y[0])} at α = {x[0]:g}, {_number(line.y[-1])} at "
            f"α = {x[-1]:g}, highest {_number(line.y[best])} at α = {x[best]:g}"
        )
        for kind, known, dashes in (
            ("oracle", result.oracle, (0, (4, 3))),
            ("chance", result.chance, (0, (1, 2))),
        ):
            if direction in known:
                value = known[direction]
                levels.append(_Level(f"{kind}, {label}", value, COLOURS[style], dashes))
                told.append(f"{kind} {_number(value)}")
    told.append(f"α = {result.chosen_alpha:g} is chosen")
    where = f"{result.dataset} {result.split}"
    return _draw(
        f"fusion-{_slug(result.dataset)}-{_slug(result.split)}",
        f"R@1 over the fusion weight α, {where}",
        lines,
        levels,
        x="α: 0 local alone, 1 global alone",
        y="R@1 in percent",
        alt=f"R@1 on {where} in percent over α: {'; '.join(told)}.",
        marked=(result.chosen_alpha, f"α = {result.chosen_alpha:g}, chosen"),
        bottom=0.0,
    )


def _draw(
    name: str,
    title: str,
    lines: Sequence[_Line],
    levels: Sequence[_Level],
    *,
    x: str,
    y: str,
    alt: str,
    marked: tuple[float, str] | None = None,  # a vertical line and its name
    is_log: bool = False,
    bottom: float | None = None,
) -> content.Chart:
    with canvas(x, y) as axes:
        for line in lines:
            is_chance = line.style < 0
            axes.plot(
                line.x,
                line.y,
                label=line.label,
                color=GREY if is_chance else COLOURS[line.style % len(COLOURS)],
                linestyle="--" if is_chance else DASHES[line.style % len(DASHES)],
                marker=None
                if len(line.x) > _MANY or (is_chance and len(line.x) > 1)
                else MARKERS[line.style % len(MARKERS)],
            )
        for level in levels:
            axes.axhline(
                level.value,
                label=level.label,
                color=level.colour,
                linestyle=level.dashes,
                linewidth=1.2,
            )
        if marked is not None:
            axes.axvline(marked[0], label=marked[1], color=_DARK, linewidth=1, linestyle=":")
        if is_log:
            axes.set_yscale("log")
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if x in ("step", "epoch"):
            axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
        if len(axes.lines) > 1:
            legend(axes)
        png = to_png(axes.figure)
    return content.Chart(name, title, png, alt)


@contextlib.contextmanager
def canvas(x: str, y: str, height: float = _SIZE[1]) -> Iterator[axes_lib.Axes]:
    """Empty axes in our style, whatever the user's own, which is back afterwards."""
    with panels([""], x, [y], height) as (axes,):
        yield axes


@contextlib.contextmanager
def panels(
    titles: Sequence[str],
    x: str,
    y: Sequence[str],
    height: float = _SIZE[1],
    width: float = _SIZE[0],
) -> Iterator[tuple[axes_lib.Axes, ...]]:
    """Axes side by side, as `canvas` has one: a title and a y axis each; inches of one of them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        drawing = figure.Figure(
            figsize=(width * len(titles), height),
            dpi=_DPI,
            facecolor="white",
            layout="constrained",
        )
        backend_agg.FigureCanvasAgg(drawing)
        found = tuple(drawing.subplots(1, len(titles), squeeze=False)[0])
        for axes, title, label in zip(found, titles, y, strict=True):
            axes.set_title(_plain(title), fontsize=9)
            axes.set_xlabel(x)
            axes.set_ylabel(_plain(label))
        yield found


def legend(axes: axes_lib.Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [_plain(label) for label in labels]
    columns = 2 if max(map(len, labels)) > 14 else min(len(labels), 4)
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def to_png(drawing: figure.Figure) -> bytes:
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})  # no version: same bytes
    return buffer.getvalue()


def _pick(table: Mapping[str, history_lib.Series], labels: Mapping[str, str]) -> list[_Line]:
    """The series that are there and not empty, as lines."""
    return [
        _Line(label, *table[name], style)
        for style, (name, label) in enumerate(labels.items())
        if name in table and len(table[name].at)
    ]


def _told(line: _Line, unit: str, best: str | None = None) -> str:
    """ "from 96.1 at step 10 to 12.3 at step 1380, lowest 11.9 at step 1300"."""
    if len(line.x) == 1:
        return f"{_number(line.y[0])} at {unit} {line.x[0]}"
    if (line.y == line.y[0]).all():
        return f"{_number(line.y[0])} throughout"
    text = (
        f"from {_number(line.y[0])} at {unit} {line.x[0]} to {_number(line.y[-1])} at "
        f"{unit} {line.x[-1]}"
    )
    if best is not None:
        at = int(line.y.argmax() if best == "highest" else line.y.argmin())
        text += f", {best} {_number(line.y[at])} at {unit} {line.x[at]}"
    return text


def _place(source: str) -> tuple[int, int, str]:
    """Sorts saliency sources: as `_SOURCES`, layers by number, then all others by name."""
    kind, _, layer = source.partition(":")
    place = _SOURCES.index(kind) if kind in _SOURCES else len(_SOURCES)
    return place, int(layer) if layer.isdigit() else 0, source


def _number(value: float) -> str:
    return f"{value:.4g}"


def _plain(text: str) -> str:
    """Text of a run in which no dollar begins a formula."""
    return text.replace("$", r"\$")


def _slug(text: str) -> str:
    """As a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-").lower() or "unnamed"
