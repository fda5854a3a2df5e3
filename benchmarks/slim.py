"""The weights that the package ships, from a run: `python benchmarks/slim.py RUN FILE.npz`.

Both encoders of a run on the embedded data set, under OpenAI's names, in half precision and
compressed. Of the token embeddings, rows of words that its captions never had are zero; classifiers
and a local branch are left out. Exit codes: 0 done; 1 failed, 2 a setting of the run is rejected or
the command line is wrong, each with one sentence.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from itself_jax import command, dialects, files, splits, weights, workdir
from itself_jax import config as config_lib
from itself_jax.data import tokenizer

_WORDS = "token_embedding.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=pathlib.Path, help="a work directory with a validated checkpoint"
    )
    parser.add_argument("file", type=pathlib.Path, help="the .npz to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    command.run(lambda: write(options.run, options.file), debug=options.debug)


def write(run: pathlib.Path, file: pathlib.Path) -> None:
    """Writes the encoders of a run; a reader of `file` sees the old one or the new one.

    Raises:
      ConfigError, WorkdirError, DataError, CheckpointError, WeightsError, OSError: one sentence.
    """
    saved = workdir.Workdir(run, writes=False).saved_config()
    if saved is None:
        raise workdir.WorkdirError(f"{run} holds no run: train there first")
    config = config_lib.from_dict(saved["config"])
    captions = splits.read(config, config.dataset, "train", print).captions
    found = weights.of_run(run, print)
    encoders = {
        name: array
        for name, array in found.arrays.items()
        if not name.startswith((*weights.HEADS, *weights.LOCAL))
    }
    named, _ = dialects.write(encoders, dialects.WRITABLE["openai"])
    arrays = {name: weights.halved(run, name, array.read()) for name, array in named.items()}
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    seen = np.unique(np.append(words.encode_batch(captions), tokenizer.MASK))
    kept = np.zeros_like(arrays[_WORDS])
    kept[seen] = arrays[_WORDS][seen]
    arrays[_WORDS] = kept
    note = json.dumps(weights.describe(found, config))
    try:
        files.write(
            file, lambda out: np.savez_compressed(out, **arrays, **{weights.DESCRIPTION: note})
        )
    except OSError as error:
        raise OSError(
            f"{file} cannot be written ({error.strerror or error}): make room there, or give "
            "another file."
        ) from error
    print(
        f"{file}: {file.stat().st_size:,} bytes, {len(arrays)} arrays of epoch "
        f"{found.meta['epoch']}, {len(seen)} of {len(kept)} words, R@1 on val "
        f"{found.meta['best_score']:.1f}"
    )


if __name__ == "__main__":
    main()
