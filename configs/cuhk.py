r"""CUHK-PEDES with the published settings (ViT-B/16 from CLIP, 60 epochs, 256 pairs a batch).

    python -m itself_jax.main --config=configs/cuhk.py --config.data_root=DIR \
        --config.init_from=ViT-B-16.pt --workdir=RUN

DIR holds the benchmark's own folder, CUHK-PEDES/. ViT-B-16.pt is OpenAI's CLIP; the README
lists what else will do. Published R@1 / R@5 / R@10 / mAP on test:

    baseline  74.66 / 89.70 / 93.57 / 67.63
    sl        76.49 / 90.20 / 94.35 / 58.97 (mAP as printed)
    mars      76.90 / 90.46 / 94.35 / 69.71
    sl_ats    76.66 / 90.58 / 94.22 / 69.18
    itself    76.95 / 90.64 / 94.36 / 69.38

These are the paper's figures, with CLIP's weights; this project has not reproduced them yet. Pick
an ablation with `configs/cuhk.py:VARIANT`; variants combine (`:baseline,stride12`), and `:tiny`
tries data and machine in a minute with a small untrained model.

Time: nobody has run these 60 epochs with this code yet. On two CPU cores one pair takes about a
second forward and backward, so a CPU is for `:tiny` and for evaluating only.
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()  # the published settings
    config.dataset = "cuhk_pedes"
    return config_lib.apply_variants(config, variants)
