"""The main job on the embedded data set: procedural pedestrians, a small model, two CPU cores.

python -m itself_jax.main --config=configs/synthetic.py --workdir=/tmp/synthetic
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.dataset = "synthetic"
    model = config.model
    model.image_size = (96, 40)
    model.patch_size = 8
    model.vision_width = model.text_width = 128
    model.vision_depth = model.text_depth = 4
    model.vision_heads = model.text_heads = 4
    model.embed_dim = 128
    model.text_length = 40
    config.local.dim = 256
    config.local.ats_horizon_steps = "10ep"
    config.batch_size = 64
    config.num_epochs = 18
    config.warmup_epochs = 2
    config.optim.learning_rate = 5e-4
    config.optim.local_learning_rate = 1e-3
    config.optim.eps = 1e-8
    return config_lib.apply_variants(config, variants)
