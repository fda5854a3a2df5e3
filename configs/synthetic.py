"""The main job on the embedded data set: drawn pedestrians, a small model, two CPU cores.

    python -m itself_jax.main --config=configs/synthetic.py --workdir=runs/synthetic

A few minutes, the drawing of the data set included; the README says what to expect. Like the
method itself it fine-tunes a dual encoder that has seen many pairs: a small one that comes with the
package, made by `configs/synthetic_pretrain.py` from other drawn people. `:scratch` starts from
random numbers instead; `:VARIANT` picks an ablation, e.g. `:baseline` or `:scratch,baseline`.

Sizes of the model are those of the file, other ones need `:scratch`; so do other data sets, of
whose words the file knows few. `synthetic.seed=1` draws the very people that it was made from.
"""

import ml_collections

from itself_jax import config as config_lib


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.dataset = "synthetic"

    model = config.model
    model.image_size = (48, 20)  # the files have 192x80: colours survive, noise averages away
    model.patch_size = 4  # 12 x 5 patches
    model.vision_width = model.text_width = model.embed_dim = 128
    model.vision_heads = model.text_heads = 8
    model.text_length = 48  # k of words stays below the median caption

    local = config.local
    local.dim = 256
    # The source and about the k of training; five seeds see no difference, see docs/experiments.
    local.inference_saliency = "mars"
    local.ratio = 0.6

    config.loss.temperature = 0.05  # 0.015 looks at the hardest negatives alone, too early here
    config.loss.margin = 0.3  # with 0.1 half of the rows soon give no gradient, too early here
    config.loss.mismatch_label = "extra_class"
    config.augment.pad = 2  # the published 10 pixels are half of these pictures' width
    config.batch_size = 32
    config.warmup_epochs = 1
    config.optim.learning_rate = 3e-4
    config.optim.local_learning_rate = 2e-3
    config.optim.eps = 1e-8

    names = [name for name in variants.split(",") if name]
    if "scratch" in names:
        names.remove("scratch")
        model.vision_depth = model.text_depth = 2
        local.ats_horizon_steps = "10ep"
        config.num_epochs = 14
    else:
        config.init_from = "synthetic_clip"
        model.vision_depth = model.text_depth = 3
        local.ats_horizon_steps = "3ep"
        config.num_epochs = 4
    return config_lib.apply_variants(config, ",".join(names))
