"""A report from what a run wrote and, where there are weights, from what its model answers."""

from collections.abc import Mapping

import numpy as np

from itself_jax import config as config_lib
from itself_jax import files, watching
from itself_jax.data import tokenizer
from itself_jax.reporting import answers, charts, content, examples, page
from itself_jax.reporting import history as history_lib

FOLDER = "report"  # of a work directory


def write(
    workdir: files.Path,
    material: examples.Material | None,
    *,
    evaluated: config_lib.Config | None = None,
    notes: tuple[str, ...] = (),
) -> files.Path:
    """Writes `report/` of a work directory and returns its `index.html`.

    material: of the weights to show; None leaves those parts out.
    evaluated: of an evaluation of weights that are not those of the directory's own run.
    notes: what is missing, and why.

    Raises:
      ReportError, OSError: one sentence.
    """
    history = history_lib.read(workdir, evaluated)
    notes = (*history.notes, *notes)
    strips = overlays = evolutions = failures = ()
    spread: tuple[content.Chart, ...] = ()
    asked = followed = ""
    if material is not None:
        local = material.config.local
        words = tokenizer.Tokenizer(
            material.config.model.text_length, vocab_size=material.config.model.vocab_size
        )
        asked = f"{material.split.dataset} {material.split.split}, α = {material.alpha:g}"
        if material.watched is not None:
            followed = f"{material.watched.dataset} {material.watched.split}"
        strips = examples.strips(material)
        failures = examples.failures(material)
        sources = dict.fromkeys(
            (local.saliency, local.inference_saliency, "mars", "last", "mean")
            if local.enabled
            else ("mars", "last", "mean")
        )
        overlays = examples.overlays(material, words, tuple(sources))
        looks = _validated(watching.saved(workdir), history)
        source = local.inference_saliency if local.enabled else "mars"
        evolutions = examples.evolutions(material, words, looks, source)
        spread = (
            charts.similarities(
                np.linspace(-1.0, 1.0, answers.BINS + 1),
                material.text_to_image.matched,
                material.text_to_image.unmatched,
            ),
        )
        if history.trained and not evolutions:
            notes += (_why_no_change(material, looks),)
    if history.trained and not history.measured:
        notes += (
            "Saliency was not measured: the data set has no masks, or the run did not watch.",
        )
    report = content.Report(
        title=history_lib.title(history),
        state=history_lib.state(history),
        asked=asked,
        followed=followed,
        facts=history_lib.facts(history),
        differences=history.differences,
        results=history_lib.tables(history),
        curves=charts.curves(history),
        fusion=(*charts.fusion(history), *spread),
        text_to_image=strips[0] if strips else (),
        image_to_text=strips[1] if strips else (),
        overlays=overlays,
        evolutions=evolutions,
        measured=charts.measured(history),
        failures=failures,
        notes=notes,
    )
    return page.write(workdir / FOLDER, report)


def _why_no_change(material: examples.Material, looks: Mapping[int, watching.Pairs]) -> str:
    if not looks:
        reason = "no epoch of the run left it"
    elif material.watched is None:
        reason = "the pictures of its validation are not at hand"
    else:
        reason = "it was of other pairs, or of another size of the model's input"
    return f"How what is kept changed in training is not shown: {reason}."


def _validated(
    looks: Mapping[int, watching.Pairs], history: history_lib.History
) -> dict[int, watching.Pairs]:
    """Without what a run left that was started anew, or went on from before it."""
    last = max((s.at.max() for t in history.validation.values() for s in t.values()), default=0)
    return {epoch: pairs for epoch, pairs in looks.items() if epoch <= last}
