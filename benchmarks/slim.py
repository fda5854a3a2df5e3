"""The weights that the package ships, from a run: `python benchmarks/slim.py RUN FILE.npz`.

Both encoders of a run on the embedded data set, under OpenAI's names, in half precision and
compressed. Of the token embeddings, rows of words that its captions never had are zero; classifiers
and a local branch are left out.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from itself_jax import checkpoint, dialects, files, splits, weights, workdir
from itself_jax import config as config_lib
from itself_jax.data import tokenizer

_WORDS = "token_embedding.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=pathlib.Path, help="a work directory with a validated checkpoint"
    )
    parser.add_argument("file", type=pathlib.Path, help="the .npz to write")
    options = parser.parse_args()
    saved = workdir.Workdir(options.run, writes=False).saved_config()
    if saved is None:
        parser.error(f"{options.run} holds no run: train there first")
    config = config_lib.from_dict(saved["config"])
    try:
        found = weights.of_run(options.run, print)
    except checkpoint.CheckpointError as error:
        parser.error(str(error))
    encoders = {
        name: array
        for name, array in found.arrays.items()
        if not name.startswith((*weights.HEADS, *weights.LOCAL))
    }
    named, _ = dialects.write(encoders, dialects.WRITABLE["openai"])
    arrays = {name: np.asarray(array.read(), np.float16) for name, array in named.items()}
    captions = splits.read(config, config.dataset, "train", print).captions
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    seen = np.unique(np.append(words.encode_batch(captions), tokenizer.MASK))
    kept = np.zeros_like(arrays[_WORDS])
    kept[seen] = arrays[_WORDS][seen]
    arrays[_WORDS] = kept
    note = json.dumps(weights.describe(found, config))
    files.write(
        options.file,
        lambda file: np.savez_compressed(file, **arrays, **{weights.DESCRIPTION: note}),
    )
    print(
        f"{options.file}: {options.file.stat().st_size:,} bytes, {len(arrays)} arrays of epoch "
        f"{found.meta['epoch']}, {len(seen)} of {len(kept)} words, R@1 on val "
        f"{found.meta['best_score']:.1f}"
    )


if __name__ == "__main__":
    main()
