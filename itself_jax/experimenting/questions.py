"""What is asked of the weights of a run beside its own results, on its test split.

Nothing here is trained. Fusion weights are chosen on val, epochs too, unless that is the question.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from itself_jax import (
    assessment,
    checkpoint,
    fitting,
    hosts,
    interrupt,
    retrieval,
    sharding,
    splits,
    step,
    weights,
    workdir,
)
from itself_jax import config as config_lib
from itself_jax.data import masks, records
from itself_jax.experimenting import runs

RATIOS = (0.2, 0.4, 0.5, 0.6, 0.8)
SHOWN = (0.5, 0.25)  # shares of the patches that a picture still shows
_SOURCES = ("mars", "last", "random")
_MEASURED = {
    "patches_on_person": "kept patches on the person",
    "patches_on_named": "kept patches on what the caption names",
    "pointing": "pointing game",
    "words_on_named": "kept words that name an attribute",
}


def ask(question: str, run: runs.Run, record: dict[str, Any], log: runs.Log) -> dict[str, Any]:
    """The answer of one run, plain values for its record.

    Raises:
      ExperimentError, DataError: its weights or the data set are gone.
    """
    return _QUESTIONS[question](run, record, log)


class _Trained:
    """A run's best weights and splits, read once for all that is asked of it."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run
        alone = {"mesh.data": 1, "mesh.model": 1, "sharding": "replicated"}
        alone["eval.dump_embeddings"] = False
        self.best = self._read()
        config = config_lib.replace(run.config, alone)
        self.config = fitting.resolve(config, self.best, _quiet, training=False)
        self.test = splits.read(self.config, self.config.dataset, "test", _quiet)
        self.val = splits.read(self.config, self.config.dataset, "val", _quiet)

    def of_epoch(self, at_step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The weights of another epoch, where those of `like` are."""
        return fitting.fit(self._read(at_step), like, self.config.model, _quiet)

    def _read(self, at_step: int | None = None) -> weights.Weights:
        try:
            return weights.of_run(self.run.workdir, _quiet, step=at_step)
        except checkpoint.CheckpointError as error:
            raise runs.gone(self.run, error) from error


class _Model:
    """Compiled encoders for the weights of any epoch, under changed settings."""

    def __init__(
        self, trained: _Trained, changes: dict[str, Any], truth: masks.Truth | None = None
    ) -> None:
        self.this, self.variables = assessment.ready(
            config_lib.replace(trained.config, changes),
            workdir.Workdir(trained.run.workdir, writes=False),
            sharding.make_mesh(trained.config, jax.local_devices()[:1]),
            trained.best,
            trained.test,
            interrupt.Interrupts(),
            hosts.Hosts(),
            _quiet,
            truth,
        )

    def rank(
        self, variables: dict[str, Any], split: records.Split, alpha: float | None = None
    ) -> list[retrieval.Row]:
        """Text to image, a row for each fusion weight."""
        rows, _ = assessment.encode_and_rank(self.this, variables, split, alpha)
        return [row for row in rows if row.direction == "t2i"]


def _quiet(line: str) -> None:
    del line


def _inference_saliency(run: runs.Run, record: dict[str, Any], log: runs.Log) -> dict[str, Any]:
    """R@1 on test for each selection at inference; the fusion weight is chosen on val each time."""
    trained, found = _Trained(run), {}
    for source in ("last", "mars"):
        for ratio in RATIOS:
            log(f"  {run.workdir}: {source} at {ratio:g}")
            changes = {"local.inference_saliency": source, "local.ratio": ratio}
            model = _Model(trained, {**changes, "eval.watch": 0})
            alpha = retrieval.choose_alpha(model.rank(model.variables, trained.val))
            rows = {
                row.alpha: row.metrics for row in model.rank(model.variables, trained.test, alpha)
            }
            found[f"{source} {ratio:g}"] = {
                "alpha": alpha,
                "R1": rows[alpha].R1,
                "mAP": rows[alpha].mAP,
                "local_R1": rows[0.0].R1,
            }
    return found


def _protocol(run: runs.Run, record: dict[str, Any], log: runs.Log) -> dict[str, Any]:
    """R@1 on test when epoch and fusion weight are chosen on val, on test, or one of them.

    And of the last epoch, which is no choice at all, with the weight chosen on val.
    """
    trained = _Trained(run)
    model = _Model(trained, {"eval.watch": 0})
    best, by_alpha, by_epoch = None, {}, {}  # of epochs: all weights; the one chosen on val
    for line in record["validations"]:
        log(f"  {run.workdir}: epoch {line['epoch']} on test")
        variables = trained.of_epoch(line["step"], model.variables)
        rows = model.rank(variables, trained.test, line["alpha"])
        by_alpha[line["epoch"]] = [row.metrics for row in rows]
        by_epoch[line["epoch"]] = assessment.chosen_row(rows, line["alpha"]).metrics
        if best is None or line["R1"] > best["R1"]:
            best = line
    every = [metrics for of_epoch in by_alpha.values() for metrics in of_epoch]
    found = {
        "both on val": by_epoch[best["epoch"]],
        "last epoch": by_epoch[max(by_epoch)],
        "epoch on test": max(by_epoch.values(), key=_by_rank1),
        "α on test": max(by_alpha[best["epoch"]], key=_by_rank1),
        "both on test": max(every, key=_by_rank1),
    }
    return {name: {"R1": metrics.R1, "mAP": metrics.mAP} for name, metrics in found.items()}


def _by_rank1(metrics: retrieval.Metrics) -> tuple[float, float]:
    return metrics.R1, metrics.mAP


def _early_evidence(run: runs.Run, record: dict[str, Any], log: runs.Log) -> dict[str, Any]:
    """By epoch: R@1 on whole pictures and on parts, the entropy of attention, where saliency lies.

    Entropy is in nats, of each layer's attention, mean over rows and pictures or captions. Where
    saliency lies is measured where the data set has masks.
    """
    trained = _Trained(run)
    truth = splits.masks_of(trained.config, trained.test, _quiet)
    model = _Model(trained, {"eval.watch": 1}, truth)
    watcher, by_epoch = model.this.watcher, {}
    for line in record["validations"]:
        log(f"  {run.workdir}: epoch {line['epoch']} on parts of its pictures")
        variables, alpha = trained.of_epoch(line["step"], model.variables), line["alpha"]
        seen = watcher.see(variables, trained.test)
        shown_parts = {"whole": _rank1(model, variables, trained.test, alpha)}
        patches = seen.image.saliency.shape[2] - 1
        rng = np.random.default_rng([run.seed, line["epoch"]])
        for source in _SOURCES:
            if source == "random":
                scores = rng.random((len(trained.test.images), patches))
            else:
                scores = seen.image.saliency[watcher.sources.index(source), :, 1:]
            order = np.argsort(-scores, axis=1, kind="stable")
            for share in SHOWN:
                kept = order[:, : int(patches * share)]
                shown = parts(trained.test, kept, trained.config.model)
                name = f"{source}, {share:.0%} of the patches"
                shown_parts[name] = _rank1(model, variables, shown, alpha)
        found = {"R@1": shown_parts}
        for side, attention in (("image", seen.image), ("text", seen.text)):
            layers = attention.entropy.mean(axis=0).round(4).tolist()
            found[f"entropy of attention ({side})"] = {
                f"layer {layer}": value for layer, value in enumerate(layers)
            }
        for name, value in (watcher.measure(seen) if truth else {}).items():
            _, measure, source = name.split("/")
            if measure in _MEASURED:
                found.setdefault(_MEASURED[measure], {})[source] = round(100 * value, 3)
        by_epoch[str(line["epoch"])] = found
    return by_epoch


def _rank1(model: _Model, variables: dict[str, Any], split: records.Split, alpha: float) -> float:
    return assessment.chosen_row(model.rank(variables, split, alpha), alpha).metrics.R1


def parts(
    split: records.Split, patches: Int[np.ndarray, "g k"], model: config_lib.Model
) -> records.Split:
    """The split with pictures that show these patches alone, CLIP's mean colour elsewhere."""
    return dataclasses.replace(split, images=_Parts(split.images, patches, model))


class _Parts:
    """Pictures of which only some patches are left, at the size of the model's input."""

    def __init__(
        self, whole: Any, patches: Int[np.ndarray, "g k"], model: config_lib.Model
    ) -> None:
        self._whole, self._patches, self._model = whole, patches, model

    def __len__(self) -> int:
        return len(self._whole)

    def name(self, index: int) -> str:
        return self._whole.name(index)

    def load(self, index: int, size: tuple[int, int]) -> UInt8[np.ndarray, "y x 3"]:
        picture = self._whole.load(index, size)
        result = np.empty_like(picture)
        result[:] = np.round(255 * np.asarray(step.IMAGE_MEAN)).astype(np.uint8)
        stride, patch = self._model.stride or self._model.patch_size, self._model.patch_size
        for top, left in self._corners(index):
            box = (
                slice(top * stride, top * stride + patch),
                slice(left * stride, left * stride + patch),
            )
            result[box] = picture[box]
        return result

    def _corners(self, index: int) -> Iterator[tuple[int, int]]:
        columns = self._model.grid[1]
        return (divmod(int(patch), columns) for patch in self._patches[index])


_QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "inference_saliency": _inference_saliency,
    "protocol": _protocol,
    "early_evidence": _early_evidence,
}
