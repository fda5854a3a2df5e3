r"""ICFG-PEDES with the published settings (ViT-B/16 from CLIP, 60 epochs, 256 pairs a batch).

    python -m itself_jax.main --config=configs/icfg.py --config.data_root=DIR \
        --config.init_from=ViT-B-16.pt --workdir=RUN

DIR holds the benchmark's own folder, ICFG-PEDES/. ViT-B-16.pt is OpenAI's CLIP; the README
lists what else will do. Published R@1 / R@5 / R@10 / mAP on test:

    baseline  66.06 / 81.12 / 86.10 / 41.02
    sl        67.93 / 82.36 / 87.12 / 42.38
    mars      69.07 / 82.72 / 87.51 / 43.67
    sl_ats    68.76 / 82.74 / 87.45 / 43.35
    itself    69.23 / 82.84 / 87.62 / 43.80

These are the paper's figures, with CLIP's weights; this project has not reproduced them yet. Pick
an ablation with `configs/icfg.py:VARIANT`; variants combine (`:baseline,stride12`), and `:tiny`
tries data and machine in a minute with a small untrained model.

Time: nobody has run these 60 epochs with this code yet. On two CPU cores one pair takes about a
second forward and backward, so a CPU is for `:tiny` and for evaluating only.

ICFG-PEDES has no validation split: 310 training identities, drawn with seed 0, are held out as
val, and epoch and fusion weight are chosen on them. To train on all 3,102 afterwards, with the
epoch E and the weight A that this run has chosen:

    ... --config.train_on_all --config.last_epoch=E --config.eval.alpha=A --workdir=RUN2
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()  # the published settings
    config.dataset = "icfg_pedes"
    return config_lib.apply_variants(config, variants)
