"""The checkpoint that `configs/synthetic.py` starts from; it stands for CLIP.

    python -m itself_jax.main --config=configs/synthetic_pretrain.py --workdir=runs/pretrain
    python benchmarks/slim.py runs/pretrain itself_jax/data/synthetic_clip.npz

The method fine-tunes a dual encoder that has seen very many pairs of pictures and short texts; so
this trains one, with the baseline's losses alone, on 16,000 drawn people of another seed, none of
whom is in the data set that the method is then tried on. Their captions name one to four
attributes, where those name five to eight. (CLIP has seen other pictures than pedestrians; this has
seen nothing but them.) Less than an hour of two CPU cores.
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.dataset = "synthetic"
    config.synthetic.seed = 1
    config.synthetic.identities = (16_000, 100, 100)
    config.synthetic.images_per_identity = 2
    config.synthetic.named = (1, 4)

    model = config.model
    model.image_size = (48, 20)
    model.patch_size = 4
    model.vision_width = model.text_width = model.embed_dim = 128
    model.vision_depth = model.text_depth = 3
    model.vision_heads = model.text_heads = 8
    model.text_length = 48

    config.local.enabled = False
    config.loss.temperature = 0.05
    config.loss.margin = 0.3
    config.loss.mismatch_label = "extra_class"
    config.augment.pad = 2
    config.batch_size = 64
    config.num_epochs = 6
    config.warmup_epochs = 1
    config.optim.learning_rate = 3e-4
    config.optim.eps = 1e-8
    config.eval.watch = 0
    config.log_every = 50
    return config_lib.apply_variants(config, variants)
