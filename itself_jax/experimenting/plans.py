"""The experiments: which settings are compared, and what the paper says about each.

An arm is one line of a table: what it changes of a configuration, by default
`configs/synthetic.py`. It names whatever its line claims, also what that file has anyway. Arms of
several experiments that come to the same settings are the same runs, trained once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Arm(NamedTuple):
    """One setting.

    changes: values by key of the configuration, or functions of the encoders' depth that give them.
    paper: R@1 in percent of the paper's own row, where it has one.
    """

    name: str
    changes: dict[str, Any | Callable[[int], Any]]
    paper: float | None = None


class Experiment(NamedTuple):
    """A question, the arms that answer it, and where the paper answers it.

    reference: the row to which the others are compared, seed by seed: an arm, or an answer of each
      arm.
    asks: what is asked of trained weights ("inference_saliency", …); "" compares test results.
    """

    name: str
    title: str
    paper: str
    arms: tuple[Arm, ...]
    reference: str
    asks: str = ""


def _early(depth: int) -> int:
    """The third layer of twelve, the first of three."""
    return depth // 5


def _middle(depth: int) -> int:
    return depth // 3


def _last(depth: int) -> int:
    return depth - 1


BASELINE = {"local.enabled": False}
_FULL = {"local.enabled": True, "local.saliency": "mars", "local.ats": True}
# In the paper the layer of lowest attention entropy, the third of twelve: an early one, as here the
# first of three is (whose entropy is not the lowest).
_SINGLE = {"local.saliency": lambda depth: f"layer:{_early(depth)}"}
_NO_ATS = {**_FULL, "local.ats": False}
_ON_RSTP = "RSTPReid, ViT-B/16 from CLIP, one run"

_VARIANTS = (
    Arm("baseline", BASELINE, 61.30),
    Arm("sl", {**_NO_ATS, **_SINGLE}, 65.00),
    Arm("mars", _NO_ATS, 66.95),
    Arm("sl_ats", {**_FULL, **_SINGLE}, 65.95),
    Arm("itself", _FULL, 67.30),
)
# Longer, since nothing is known at the start; ATS ends after three quarters, as with pre-training.
_UNTRAINED = {"init_from": None, "num_epochs": 8, "local.ats_horizon_steps": "6ep"}
_ITSELF = (Arm("itself", _FULL),)
_BOTH = (Arm("baseline", BASELINE), Arm("itself", _FULL))


def _layers(*layers: Callable[[int], int]) -> dict[str, Any]:
    return {**_NO_ATS, "local.mars_layers": lambda depth: tuple(layer(depth) for layer in layers)}


def _ats(end: float, *, per_epoch: bool) -> dict[str, Any]:
    return {**_FULL, "local.ratio_end": end, "local.ats_per_epoch": per_epoch}


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "variants",
            "What each part adds",
            f"ablation of the components ({_ON_RSTP})",
            _VARIANTS,
            "baseline",
        ),
        Experiment(
            "untrained",
            "What the local branch adds where nothing is pre-trained",
            "nothing; the paper starts from CLIP",
            (Arm("baseline", {**BASELINE, **_UNTRAINED}), Arm("itself", {**_FULL, **_UNTRAINED})),
            "baseline",
        ),
        Experiment(
            "layers",
            "Which layers MARS rolls over: early (E), middle (M), late (L)",
            f"choice of layers ({_ON_RSTP})",
            (
                Arm("E", _layers(_early), 65.00),
                Arm("E+M", _layers(_early, _middle), 66.15),
                Arm("M+L", {**_NO_ATS, "local.mars_layers": None}, 66.95),  # None means these
                Arm("E+L", _layers(_early, _last), 65.70),
                Arm("E+M+L", _layers(_early, _middle, _last), 65.95),
            ),
            "M+L",
        ),
        Experiment(
            "discard",
            "Which share of its attention MARS discards",
            f"discard ratio ({_ON_RSTP})",
            tuple(
                Arm(f"{share:.2f}", {**_NO_ATS, "local.mars_discard": share}, paper)
                for share, paper in ((0.10, 66.20), (0.25, 66.95), (0.45, 66.30))
            ),
            "0.25",
        ),
        Experiment(
            "ats",
            "How the number of kept tokens shrinks",
            f"ATS or none ({_ON_RSTP})",
            (
                Arm("none", _NO_ATS, 66.95),
                Arm("per step, to 0.5", _ats(0.5, per_epoch=False), 67.30),
                Arm("per epoch, to 0.5", _ats(0.5, per_epoch=True)),
                Arm("per step, to 0.3", _ats(0.3, per_epoch=False)),
            ),
            "none",
        ),
        Experiment(
            "inference_saliency",
            "The same weights, evaluated with another selection",
            "nothing; the released code trains with MARS and evaluates with the last layer at 0.4",
            _ITSELF,
            "last 0.4",
            "inference_saliency",
        ),
        Experiment(
            "mismatch_label",
            "What CID calls a mismatched pair",
            "nothing; the released code takes the largest identity of the batch for it",
            (
                Arm("extra class", {**_FULL, "loss.mismatch_label": "extra_class"}),
                Arm("batch_max", {**_FULL, "loss.mismatch_label": "batch_max"}),
            ),
            "extra class",
        ),
        Experiment(
            "protocol",
            "What choosing epoch and weight on the test split adds to R@1",
            "nothing; the released code chooses both on test",
            _BOTH,
            "both on val",
            "protocol",
        ),
        Experiment(
            "early_evidence",
            "What is left when the picture shows the k most salient patches alone, by epoch",
            "Fig. 2 (last layer, CUHK-PEDES) and Fig. 7 (entropy of attention)",
            _BOTH,
            "",
            "early_evidence",
        ),
    )
}
