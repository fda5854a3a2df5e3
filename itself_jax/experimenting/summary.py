"""What the runs of an experiment say together: means with errors over seeds, a table, a figure."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itself_jax import files, retrieval
from itself_jax.experimenting import plans
from itself_jax.reporting import charts

Records = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by arm, then by seed
Hits = Mapping[str, Sequence[int]]
_METRICS = {
    "R1": "R@1",
    "mAP": "mAP",
    "global_R1": "R@1, global alone",
    "local_R1": "R@1, local alone",
}
_DIGITS = {"attention": 2}  # nats; all else is in percent
_DIFFERENCES = {"R1": "difference", "mAP": "difference_mAP"}
_BOOTSTRAPS = 1000


class Mean(NamedTuple):
    """A mean over seeds with its standard error, None where one seed cannot tell."""

    mean: float
    error: float | None
    seeds: int

    def told(self, digits: int = 1, *, signed: bool = False) -> str:
        """ "41.2 ± 0.5", or "+3.1 ± 0.5" of a difference."""
        text = f"{abs(self.mean):.{digits}f}"
        is_zero = float(text) == 0
        sign = "−" if self.mean < 0 and not is_zero else "+" if signed and not is_zero else ""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{sign}{text}{error}"


class _Row(NamedTuple):
    """A line of a table: what it measured of each seed, and what it is compared to.

    hits: by seed, what `runs.found_first` tells of the R@1, where the record has it.
    """

    name: str
    values: dict[int, Mapping[str, float]]
    reference: str
    paper: float | None = None
    hits: dict[int, Hits] | None = None


def mean(values: Sequence[float]) -> Mean:
    """Of one value a seed.

    Raises:
      ValueError: there is none.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise ValueError("a mean of no seed")
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Mean(float(x.mean()), error, len(x))


def test_set_error(hits: Sequence[Hits], other: Sequence[Hits] | None = None) -> float:
    """Standard error of a mean R@1 over seeds, in points, by drawing the test set's identities.

    Identities are drawn with replacement, all seeds the same, with all their queries; the gallery
    stays.

    hits: of each seed, as `runs.found_first` tells.
    other: of another row and the same seeds; then the error is that of the difference.
    """
    found = np.mean([hit["found"] for hit in hits], axis=0)
    if other is not None:
        found = found - np.mean([hit["found"] for hit in other], axis=0)
    queries = np.asarray(hits[0]["queries"])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(queries), (_BOOTSTRAPS, len(queries)))
    return float((100 * found[drawn].sum(1) / queries[drawn].sum(1)).std(ddof=1))


def chosen(record: Mapping[str, Any], metric: str = "R1") -> float:
    """A run's result: text → image on test, at the fusion weight chosen on val."""
    name = retrieval.similarity_name(record["chosen_alpha"])
    return record["test"][f"t2i {name}"][metric]


def summarise(experiment: plans.Experiment, records: Records) -> dict[str, Any]:
    """All numbers of an experiment, plain.

    Returns:
      "rows" with R1 and further metrics, their difference to the row `compared_to` paired over the
      same seeds, by how much another test set would move that ("difference_error_of_test_set"), and
      the paper's value; "curves" {title: {line: {epoch: mean}}} where epochs are compared;
      "error_of_test_set": of a run's R1, mean over all runs; and what the runs had in common.
    """
    every = [record for by_seed in records.values() for record in by_seed.values()]
    by_epoch = experiment.asks == "early_evidence"
    rows = [] if by_epoch else _rows(experiment, records)
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "seeds": sorted({seed for by_seed in records.values() for seed in by_seed}),
        "error_of_test_set": float(np.mean([test_set_error([r["hits"]]) for r in every])),
        "chance_R1": every[0]["chance_R1"]["t2i"],
        "oracle_R1": every[0]["oracle_R1"],
        "rows": [_told(row, {other.name: other for other in rows}) for row in rows],
        "curves": _curves(records, experiment.asks) if by_epoch else {},
    }


def _rows(experiment: plans.Experiment, records: Records) -> list[_Row]:
    if not experiment.asks:
        return [
            _Row(
                arm.name,
                {seed: _of_test(record) for seed, record in records[arm.name].items()},
                experiment.reference,
                arm.paper,
                {seed: record["hits"] for seed, record in records[arm.name].items()},
            )
            for arm in experiment.arms
        ]
    rows = []
    for arm, by_seed in records.items():
        prefix = f"{arm}, " if len(records) > 1 else ""
        answers = {seed: record["answers"][experiment.asks] for seed, record in by_seed.items()}
        for name in next(iter(answers.values())):
            values = {seed: answer[name] for seed, answer in answers.items()}
            rows.append(_Row(prefix + name, values, prefix + experiment.reference))
    return rows


def _of_test(record: Mapping[str, Any]) -> dict[str, float]:
    """A run's result, and what either embedding finds alone, where there are two."""
    values = {"R1": chosen(record), "mAP": chosen(record, "mAP")}
    if "t2i local" in record["test"]:
        for part in ("global", "local"):
            values[f"{part}_R1"] = record["test"][f"t2i {part}"]["R1"]
    return values


def _told(row: _Row, all_rows: Mapping[str, _Row]) -> dict[str, Any]:
    """A row as plain values."""
    told: dict[str, Any] = {"row": row.name, "by_seed": {}}
    for metric in _METRICS:
        if all(metric in values for values in row.values.values()):
            by_seed = {seed: values[metric] for seed, values in row.values.items()}
            told[metric] = mean(list(by_seed.values()))._asdict()
            told["by_seed"][metric] = {str(seed): value for seed, value in by_seed.items()}
    told["compared_to"] = row.reference
    if row.name != row.reference:
        other = all_rows[row.reference]
        for metric, name in _DIFFERENCES.items():
            if metric in told:
                values = [
                    row.values[seed][metric] - other.values[seed][metric] for seed in row.values
                ]
                told[name] = mean(values)._asdict()
        if row.hits:
            told["difference_error_of_test_set"] = test_set_error(
                list(row.hits.values()), [other.hits[seed] for seed in row.hits]
            )
    told["paper"] = row.paper
    return told


def _curves(records: Records, question: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{title: {line: {epoch: mean}}} of answers by epoch: {epoch: {title: {line: value}}}."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, by_seed in records.items():
        for record in by_seed.values():
            for epoch, tables in record["answers"][question].items():
                for title, lines in tables.items():
                    table = found.setdefault(f"{title}, {arm}", {})
                    for line, value in lines.items():
                        table.setdefault(line, {}).setdefault(epoch, []).append(value)
    return {
        title: {
            line: {epoch: mean(values)._asdict() for epoch, values in by_epoch.items()}
            for line, by_epoch in table.items()
        }
        for title, table in found.items()
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a section of Markdown: its title, how to read it, its tables."""
    seeds, oracle = summary["seeds"], summary["oracle_R1"]
    lines = [
        f"### {summary['title']}",
        "",
        f"`{summary['experiment']}`, seeds {', '.join(map(str, seeds))}: mean ± standard error "
        f"over {len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}, in percent. Chance has R@1 "
        f"{summary['chance_R1']:.1f}"
        + (f", the oracle {oracle:.1f}" if oracle is not None else "")
        + f". Another test set of as many identities would move a run's R@1 by "
        f"{summary['error_of_test_set']:.1f} (bootstrap over identities)"
        + _on_differences(summary["rows"])
        + f". In the paper: {summary['paper']}.",
        "",
    ]
    if summary["rows"]:
        lines += _table(summary["rows"])
    for title, curves in summary["curves"].items():
        lines += _by_epoch(title, curves)
    return "\n".join(lines).rstrip() + "\n"


def _on_differences(rows: Sequence[Mapping[str, Any]]) -> str:
    if not any("difference" in row for row in rows):
        return ""
    both = any("difference_error_of_test_set" in row for row in rows)
    return "; differences are taken seed by seed" + (
        ", in brackets by how much another test set would move them" if both else ""
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = {key: label for key, label in _METRICS.items() if any(key in row for row in rows)}
    papers = any(row["paper"] is not None for row in rows)
    differences = {
        key: f"{_METRICS[metric]} less that of {_other(rows)}"
        for metric, key in _DIFFERENCES.items()
        if any(key in row for row in rows)
    }
    head = ["", *metrics.values(), *differences.values(), *(["paper's R@1"] * papers)]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row["row"], *(_cell(row, key) for key in metrics)]
        cells += [_cell(row, key, signed=True) for key in differences]
        if papers:
            cells.append("" if row["paper"] is None else f"{row['paper']:.2f}")
        lines.append(_line(cells))
    return [*lines, ""]


def _other(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows are compared to; of several arms each to its own."""
    return f"“{rows[0]['compared_to'].rpartition(', ')[2]}”"


def _cell(row: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    if key not in row:
        return ""
    of_test_set = row.get(f"{key}_error_of_test_set")
    bracket = "" if of_test_set is None else f" ({of_test_set:.1f})"
    return Mean(**row[key]).told(signed=signed) + bracket


def _by_epoch(title: str, curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    epochs = list(next(iter(curves.values())))
    digits = next((n for word, n in _DIGITS.items() if word in title), 1)
    lines = [_line([title, *(f"epoch {epoch}" for epoch in epochs)])]
    lines.append(_line(["---"] * (len(epochs) + 1)))
    for name, by_epoch in curves.items():
        told = (Mean(**by_epoch[epoch]).told(digits) for epoch in epochs)
        lines.append(_line([name, *told]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(summary: Mapping[str, Any]) -> bytes:
    """Rows or curves with their errors, as a PNG; the paper's values beside them if there are."""
    if summary["rows"]:
        return _dots(summary["rows"])
    of_last_arm = list(summary["curves"])[-1].rpartition(", ")[2]
    return _lines(
        {
            title: curves
            for title, curves in summary["curves"].items()
            if title.startswith(("R@1", "entropy")) and title.endswith(f", {of_last_arm}")
        }
    )


def _dots(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """R@1 on the left; on the right the differences, with the paper's own beside them."""
    places = np.arange(len(rows))[::-1]
    papers = {}
    by_name = {row["row"]: row for row in rows}
    for row, place in zip(rows, places, strict=True):
        other = by_name[row["compared_to"]]
        if "difference" in row and None not in (row["paper"], other["paper"]):
            papers[place] = row["paper"] - other["paper"]
    titles = ("R@1 in percent", f"R@1 less that of {_other(rows)}, in points")
    with charts.panels(titles, "", ["", ""], height=1.2 + 0.26 * len(rows)) as panels:
        for axes, key in zip(panels, ("R1", "difference"), strict=True):
            shown = [
                (Mean(**row[key]), y) for row, y in zip(rows, places, strict=True) if key in row
            ]
            axes.errorbar(
                [value.mean for value, _ in shown],
                [y for _, y in shown],
                xerr=[value.error or 0 for value, _ in shown],
                linestyle="",
                marker=charts.MARKERS[0],
                capsize=3,
                color=charts.COLOURS[0],
                label="here, ± standard error over seeds",
            )
            axes.set_ylim(-0.6, len(rows) - 0.4)
        panels[0].set_yticks(places, [row["row"] for row in rows])
        panels[1].set_yticks(places, [""] * len(rows))
        panels[1].axvline(0, color=charts.GREY, linewidth=1)
        if papers:
            panels[1].plot(
                list(papers.values()),
                list(papers),
                linestyle="",
                marker=charts.MARKERS[1],
                color=charts.COLOURS[1],
                label="the paper, other data",
            )
        charts.legend(panels[1])
        return charts.to_png(panels[0].figure)


def _lines(curves: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    titles = list(curves)
    units = ["nats" if "entropy" in title else "percent" for title in titles]
    with charts.panels(titles, "epoch", units, height=4.4, width=4.6) as panels:
        for axes, table in zip(panels, curves.values(), strict=True):
            for style, (name, by_epoch) in enumerate(table.items()):
                values = [Mean(**value) for value in by_epoch.values()]
                axes.errorbar(
                    [int(epoch) for epoch in by_epoch],
                    [value.mean for value in values],
                    yerr=[value.error or 0 for value in values],
                    linestyle=charts.DASHES[style % len(charts.DASHES)],
                    marker=charts.MARKERS[style % len(charts.MARKERS)],
                    color=charts.COLOURS[style % len(charts.COLOURS)],
                    capsize=2,
                    label=name,
                )
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        return charts.to_png(panels[0].figure)


def write(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """`NAME.json`, `NAME.md` and `NAME.png`, each as a whole.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = summary["experiment"]
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    for ending, content in (
        ("json", text.encode()),
        ("md", markdown(summary).encode()),
        ("png", figure(summary)),
    ):
        files.write(folder / f"{name}.{ending}", lambda file, content=content: file.write(content))
