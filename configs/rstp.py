r"""RSTPReid with the published settings (ViT-B/16 from CLIP, 60 epochs, 256 pairs a batch).

    python -m itself_jax.main --config=configs/rstp.py --config.data_root=DIR \
        --config.init_from=ViT-B-16.pt --workdir=RUN

DIR holds the benchmark's own folder, RSTPReid/. ViT-B-16.pt is OpenAI's CLIP; the README
lists what else will do. Published R@1 / R@5 / R@10 / mAP on test:

    baseline  61.30 / 80.85 / 87.65 / 49.12
    sl        65.00 / 85.45 / 90.15 / 52.26
    mars      66.95 / 85.15 / 90.40 / 53.05
    sl_ats    65.95 / 85.60 / 90.10 / 52.71
    itself    67.30 / 85.60 / 90.50 / 53.05

These are the paper's figures, with CLIP's weights; this project has not reproduced them yet. Pick
an ablation with `configs/rstp.py:VARIANT`; variants combine (`:baseline,stride12`), and `:tiny`
tries data and machine in a minute with a small untrained model.

Time: nobody has run these 60 epochs with this code yet. On two CPU cores one pair takes about a
second forward and backward, so a CPU is for `:tiny` and for evaluating only.
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()  # the published settings
    config.dataset = "rstp_reid"
    return config_lib.apply_variants(config, variants)
