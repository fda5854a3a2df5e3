"""Peak memory of one real step in micro-batches: `python benchmarks/accumulation.py`.

ViT-B/16 on 384x128 with 11,003 identities, random weights and random pictures, float32 on the CPU:
256 pairs in 32 micro-batches of 8. One JSON line: the process's peak resident memory, what the
compiler planned, the loss and the time. Half an hour on two busy cores; `--batch_size=16
--micro_batches=2` tries it in two minutes.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from itself_jax import config as config_lib
from itself_jax import sharding, step
from itself_jax.data import batch as batch_lib


def random_batch(config: config_lib.Config, identities: int) -> batch_lib.Batch:
    """Pairs of random pixels and random captions of 5 to 60 words, two of each identity."""
    random, model, b = np.random.default_rng(0), config.model, config.batch_size
    captions = np.zeros((b, model.text_length), np.int32)
    start, end = model.vocab_size - 2, model.vocab_size - 1
    for row in captions:
        words = random.integers(5, 61)
        row[: words + 2] = [start, *random.integers(1, start, words), end]
    return batch_lib.Batch(
        images=random.integers(0, 256, (b, *model.image_size, 3), dtype=np.uint8),
        erase=np.zeros((b, 4), np.int32),
        captions=captions,
        pids=np.repeat(random.permutation(identities)[: b // 2], 2).astype(np.int32),
        epoch=np.array(1, np.int32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--micro_batches", type=int, default=32)
    parser.add_argument("--identities", type=int, default=11003)
    parser.add_argument("--remat", default="none")
    options = parser.parse_args()
    config = config_lib.replace(
        config_lib.Config(),
        {
            "batch_size": options.batch_size,
            "micro_batches": options.micro_batches,
            "remat": options.remat,
            "precision": "float32",
            "mesh.data": 1,
        },
    )
    training = step.make(
        config, num_identities=options.identities, steps_per_epoch=(133,) * config.num_epochs
    )
    mesh = sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    compiled = step.compile_step(training, template, mesh)
    planned = compiled.memory_analysis()
    state = step.init_state(training, template, 0)
    batch = sharding.shard_batch(mesh, random_batch(config, options.identities))
    before = time.monotonic()
    _, metrics = jax.block_until_ready(compiled(state, batch))
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    report = {
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "remat": config.remat,
        "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "planned_temporary_gb": planned.temp_size_in_bytes / 1e9,
        "planned_state_gb": planned.argument_size_in_bytes / 1e9,
        "loss": loss,
        "grad_norm": norm,
        "step_seconds": time.monotonic() - before,
        "jax": jax.__version__,
    }
    print(json.dumps(report), flush=True)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        sys.exit("accumulation.py: the step gave a loss or gradient that is not finite")


if __name__ == "__main__":
    main()
