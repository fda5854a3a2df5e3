"""Records of runs as `runs.results` makes them, with made-up numbers."""

from itself_jax import config as config_lib
from itself_jax.experimenting import runs


def record(rank1, *, seed=0, alpha=0.3, answers=None, config=None, found=(2, 0)):
    """Of a run whose chosen similarity has this R@1, and an mAP of half of it.

    found: of each person, how many of two queries have a right first answer.
    """
    return {
        "format": runs.FORMAT,
        "settings": runs.settings(config or config_lib.Config()),
        "seed": seed,
        "chosen_alpha": alpha,
        "best_epoch": 2,
        "test": {
            f"t2i fused@{alpha:g}": {"R1": rank1, "R5": 0.0, "R10": 0.0, "mAP": rank1 / 2},
            "t2i global": {"R1": 1.0, "R5": 0.0, "R10": 0.0, "mAP": 1.0},
        },
        "oracle_R1": 83.0,
        "chance_R1": {"t2i": 0.5, "i2t": 0.7},
        "hits": {"found": list(found), "queries": [2] * len(found)},
        "validations": [],
        "answers": answers or {},
    }
