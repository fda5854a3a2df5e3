"""What a run wrote while it learned: settings, metrics by step and epoch, result tables."""

import collections
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from itself_jax import config as config_lib
from itself_jax import evaluate, files, retrieval, workdir
from itself_jax.reporting import content

CHANCE = "chance"  # beside the sources of a measured saliency: what chance would give
DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}
_SALIENCY = "saliency/"
_NOT_MEASURED = ("step", "epoch", "split")


class ReportError(RuntimeError):
    """There is no run to report on; the message is one sentence for the user."""


class Series(NamedTuple):
    """A number over steps or epochs, in their order; what was not finite is left out."""

    at: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


class ResultRow(NamedTuple):
    """One similarity in one direction ("t2i", "i2t"): its metrics in percent, by name.

    alpha: weight of the global similarity: 1 of "global", 0 of "local", 0.68 of "fused@0.68".
    """

    direction: str
    similarity: str
    alpha: float
    metrics: dict[str, float]


class Result(NamedTuple):
    """A file of `results/`. `chance` and `oracle` are R@1 in percent by direction, or empty."""

    dataset: str
    split: str
    queries: int  # captions
    gallery: int  # pictures
    protocol: str
    captions: str  # "all", or "single": the first of each picture
    chosen_alpha: float
    rows: tuple[ResultRow, ...]
    skipped: dict[str, int]  # queries without a right answer, by direction
    chance: dict[str, float]
    oracle: dict[str, float]


class History(NamedTuple):
    """A run as its directory tells it.

    differences: (key, default, value) of every setting that is not the published one, as text.
    training: by name of the metric (loss, loss_tal, grad_norm, …), over steps.
    validation: by split, then by name of the metric (R1, mAP, alpha, …; percent), over epochs.
    measured: saliency against masks as shares: by name (patches_on_person, pointing, …), then by
      source (mars, last, …, chance), over epochs.
    trained: whether a run of this directory made the weights; else they were evaluated only.
    running: whether a run has the directory now; None where that cannot be known.
    step, epoch: the last ones in the metrics; 0 before the first.
    epochs: after how many the run ends.
    best_epoch: the one that is tested: chosen, or so far the best; None before a validation.
    notes: what could not be read, one sentence each.
    """

    path: files.Path
    config: dict[str, Any]
    differences: tuple[tuple[str, str, str], ...]
    versions: dict[str, str]
    device: str | None
    compute_dtype: str | None
    revision: str | None
    training: dict[str, Series]
    validation: dict[str, dict[str, Series]]
    measured: dict[str, dict[str, Series]]
    results: tuple[Result, ...]
    finished: bool
    trained: bool
    running: bool | None
    step: int
    epoch: int
    epochs: int
    best_epoch: int | None
    notes: tuple[str, ...]


def read(path: str | os.PathLike, evaluated: config_lib.Config | None = None) -> History:
    """Reads a work directory, also one whose run goes on meanwhile, on a disk or in a bucket.

    Results of other weights, which an evaluation may have written over the run's own, are left out
    with a note.

    evaluated: of an evaluation of other weights that wrote its results here; of the directory's own
      run, if there is one, nothing is then shown.

    Raises:
      ReportError: it is no run's, no step has been logged yet, or a file of it is damaged.
    """
    notes: list[str] = []
    tables = _Tables()
    try:
        directory = workdir.Workdir(path, writes=False)
        saved = {} if evaluated is not None else directory.saved_config()
    except workdir.WorkdirError as error:
        raise ReportError(str(error)) from error
    if saved is None:
        raise ReportError(
            f"{directory.path / 'config.json'} does not exist: give the --workdir of a run, which "
            "writes it at its start."
        )
    if evaluated is None:
        for number, record in _records(directory.path / "metrics.jsonl", notes):
            tables.add(record, f"{directory.path / 'metrics.jsonl'}, line {number}")
        config = saved["config"]
    else:
        config = config_lib.to_dict(evaluated)
        notes.append("These weights were evaluated only: nothing is known here of their training.")
    finished = directory.finished() if evaluated is None else None
    validation = {split: _series(table) for split, table in tables.validation.items()}
    return History(
        path=directory.path,
        config=config,
        differences=_differences(config),
        versions={str(k): str(v) for k, v in _mapping(saved.get("versions")).items()},
        device=saved.get("device"),
        compute_dtype=saved.get("compute_dtype"),
        revision=saved.get("git_revision"),
        training=_series(tables.training),
        validation=validation,
        measured={name: _series(table) for name, table in tables.measured.items()},
        results=_results(
            directory.path / "results",
            None if evaluated is None else evaluated.init_from,
            config.get("dataset"),
            notes,
        ),
        finished=finished is not None,
        trained=evaluated is None,
        running=False if finished is not None else directory.is_in_use(),
        step=tables.step,
        epoch=tables.epoch,
        epochs=config.get("last_epoch") or config.get("num_epochs") or tables.epoch,
        best_epoch=_best_epoch(config, finished, validation),
        notes=tuple(notes),
    )


def title(history: History) -> str:
    """The run in a few words: "synthetic, MARS + ATS"."""
    local = _mapping(history.config.get("local"))
    method = "global branch only"
    if local.get("enabled", True):
        source = str(local.get("saliency", "mars"))
        method = "MARS" if source == "mars" else f"saliency {source}"
        method += " + ATS" if local.get("ats", True) else ""
    return f"{history.config.get('dataset')}, {method}"


def state(history: History) -> str:
    """How far the run has come: "finished", "epoch 5 of 14, still running"."""
    if not history.trained:
        return "evaluated only"
    if history.finished:
        return "finished"
    end = {True: "still running", False: "stopped", None: "not finished"}[history.running]
    if not history.epoch:
        return f"no step logged yet, {end}"
    return f"epoch {history.epoch} of {history.epochs}, {end}"


def facts(history: History) -> tuple[tuple[str, str], ...]:
    """What is worth knowing about the run beside its settings, as label and value."""
    found = []
    for result in history.results:
        scores = [
            f"{row.metrics['R1']:.2f} % {DIRECTIONS[row.direction]}"
            for row in result.rows
            if row.similarity == retrieval.similarity_name(result.chosen_alpha)
        ]
        where = f"R@1, {result.dataset} {result.split}"
        found.append((where, f"{', '.join(scores)} (α = {result.chosen_alpha:g})"))
    found.append(("Directory", str(history.path)))
    if history.trained:
        steps = f"{history.step:,}, in epoch {history.epoch} of {history.epochs}"
        found.append(("Steps", steps))
    if history.best_epoch is not None:
        label = "Tested epoch" if history.finished else "Best epoch so far"
        found.append((label, str(history.best_epoch)))
    speed = history.training.get("pairs_per_second")
    if speed is not None and len(speed.value):
        found.append(("Speed", f"{np.median(speed.value):.4g} pairs per second (median)"))
    if history.device:
        found.append(("Device", f"{history.device}, {history.compute_dtype or 'unknown type'}"))
    if history.revision:
        found.append(("Revision", history.revision[:12]))
    if history.versions:
        listed = ", ".join(f"{name} {version}" for name, version in history.versions.items())
        found.append(("Versions", listed))
    return tuple(found)


def tables(history: History) -> tuple[content.Table, ...]:
    """A table for each result and direction, in percent, with chance and oracle where known."""
    return tuple(
        _table(result, direction)
        for result in history.results
        for direction in DIRECTIONS
        if any(row.direction == direction for row in result.rows)
    )


def _table(result: Result, direction: str) -> content.Table:
    asked, ranked = f"{result.queries:,} captions", f"{result.gallery:,} pictures"
    if result.captions == "single":
        asked += " (the first of each picture)"
    if direction == "i2t":
        asked, ranked = ranked, asked
    skipped = result.skipped.get(direction, 0)
    rows = sorted(
        (row for row in result.rows if row.direction == direction), key=lambda row: row.alpha
    )
    cells = [
        (row.similarity, *(f"{row.metrics[name]:.2f}" for name in evaluate.METRICS)) for row in rows
    ]
    for label, known in (("chance", result.chance), ("oracle", result.oracle)):
        if direction in known:
            blank = ("",) * (len(evaluate.METRICS) - 1)
            cells.append((label, f"{known[direction]:.2f}", *blank))
    name = retrieval.similarity_name(result.chosen_alpha)
    chosen = [i for i, row in enumerate(rows) if row.similarity == name]
    return content.Table(
        caption=(
            f"{result.dataset} {result.split}, {DIRECTIONS[direction]}: {asked} rank {ranked}; "
            f"percent, protocol {result.protocol}"
            + (f"; {skipped:,} queries without a right answer are left out" if skipped else "")
        ),
        columns=("similarity", "R@1", "R@5", "R@10", "mAP", "mINP", "rSum"),
        rows=tuple(cells),
        marked=chosen[0] if chosen else None,
    )


def _read_json(file: files.Path) -> Any:
    with files.reaching(file):
        return json.loads(file.read_text(encoding="utf-8"))


def _records(file: files.Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with its number, from 1; a last one that is half-written is noted."""
    try:
        with files.reaching(file):
            lines = file.read_bytes().decode(errors="replace").rstrip("\n").split("\n")
    except FileNotFoundError as error:
        raise ReportError(
            f"{file} does not exist: the run has logged no step yet; wait until it has."
        ) from error
    except OSError as error:
        raise ReportError(
            f"{file} cannot be read ({error.strerror or error}): give a --workdir that you may "
            "read."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            if number == len(lines):
                notes.append(
                    f"The last line of {file.name} (line {number}) is half-written and left out: "
                    "the run was writing it, or was killed."
                )
                return
            raise ReportError(
                f"{file}, line {number} is damaged ({error}): restore the file, or delete that "
                "line."
            ) from error
        yield number, record


class _Tables:
    """Metrics as {name: {step or epoch: value}}; what is written twice counts as the last."""

    def __init__(self) -> None:
        self.training: dict[str, dict[int, float]] = collections.defaultdict(dict)
        self.validation: dict[str, dict[str, dict[int, float]]] = {}
        self.measured: dict[str, dict[str, dict[int, float]]] = {}
        self.step = self.epoch = 0

    def add(self, record: dict[str, Any], where: str) -> None:
        step, epoch, split = (record.get(name) for name in _NOT_MEASURED)
        for name, value in (("step", step), ("epoch", epoch)):
            if type(value) is not int:
                raise ReportError(
                    f"{where}: {name} is {value!r} and should be a whole number; restore the file, "
                    "or delete that line."
                )
        self.step, self.epoch = max(self.step, step), max(self.epoch, epoch)
        for name, value in record.items():
            if name in _NOT_MEASURED or type(value) not in (int, float) or not math.isfinite(value):
                continue
            if name.startswith(_SALIENCY) and name.count("/") == 2:
                _, what, source = name.split("/")
                self.measured.setdefault(what, {}).setdefault(source, {})[epoch] = value
            elif split is None:
                self.training[name][step] = value
            else:
                self.validation.setdefault(str(split), {}).setdefault(name, {})[epoch] = value


def _series(table: Mapping[str, Mapping[int, float]]) -> dict[str, Series]:
    return {
        name: Series(
            np.asarray(sorted(values), np.int64),
            np.asarray([values[at] for at in sorted(values)], np.float64),
        )
        for name, values in table.items()
    }


def _differences(config: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    default = config_lib.Config()
    known = config_lib.flatten(config_lib.to_dict(default))
    saved = config_lib.flatten(config)
    return tuple(
        (key, content.to_text(known[key]) if key in known else "no such key", content.to_text(old))
        for key, (old, _) in config_lib.differences(config, default).items()
        if key in saved  # the others came after the run, which says nothing about them
    )


def _results(
    folder: files.Path, source: str | None, own: str | None, notes: list[str]
) -> tuple[Result, ...]:
    """Every result of these weights that can be read, the run's own data set first.

    source: what the files call the weights; None: the directory's own.
    """
    found = []
    try:
        with files.reaching(folder):
            names = sorted(p for p in folder.iterdir() if p.name.endswith(".json"))
    except OSError:  # nothing was tested yet
        names = []
    for file in names:
        if file.name.startswith(".tmp-"):
            continue
        try:
            saved = _read_json(file)
            whose = saved.get("weights", {}).get("source")  # the first runs had only their own
            if whose == source:
                found.append(_result(saved))
            else:
                named = "this directory's own run" if whose is None else f"the weights {whose}"
                how = "; --mode=eval with the run's configuration tests its own" * (source is None)
                notes.append(f"results/{file.name} is of {named} and left out{how}.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(
                f"results/{file.name} cannot be read ({error!r}), so its table is missing."
            )
    return tuple(sorted(found, key=lambda r: (r.dataset != own, r.dataset, r.split)))


def _result(saved: dict[str, Any]) -> Result:
    oracle = saved.get("oracle_R1")  # of a caption's attributes: text → image
    return Result(
        dataset=str(saved["dataset"]),
        split=str(saved["split"]),
        queries=int(saved["queries"]),
        gallery=int(saved["gallery"]),
        protocol=str(saved["protocol"]),
        captions=str(saved.get("captions", "all")),
        chosen_alpha=float(saved["chosen_alpha"]),
        rows=tuple(
            ResultRow(
                row["direction"],
                row["similarity"],
                _alpha(row["similarity"]),
                {name: float(row[name]) for name in evaluate.METRICS},
            )
            for row in saved["rows"]
        ),
        skipped={name: int(count) for name, count in saved["skipped_queries"].items()},
        chance=_by_direction(saved.get("chance_R1")),
        oracle=_by_direction(oracle if isinstance(oracle, dict) else {"t2i": oracle}),
    )


def _alpha(similarity: str) -> float:
    known = {"global": 1.0, "local": 0.0}
    return known[similarity] if similarity in known else float(similarity.partition("@")[2])


def _by_direction(saved: dict[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (saved or {}).items() if value is not None}


def _best_epoch(
    config: Mapping[str, Any],
    finished: dict[str, Any] | None,
    validation: Mapping[str, Mapping[str, Series]],
) -> int | None:
    if finished is not None and finished.get("best_epoch") is not None:
        return int(finished["best_epoch"])
    protocol = _mapping(config.get("eval")).get("protocol", "val")
    scores = validation.get("test" if protocol == "paper" else "val", {}).get("R1")
    if scores is None or not len(scores.at):
        return None
    # As the run itself: the first of equal ones; trained on everyone, the last epoch.
    everyone = config.get("train_on_all") and protocol == "val"
    return int(scores.at[-1 if everyone else np.argmax(scores.value)])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
