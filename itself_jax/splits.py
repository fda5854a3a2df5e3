"""Which data a run reads: the splits of its data sets, and the folder of the embedded one."""

import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from itself_jax import config as config_lib
from itself_jax import weights
from itself_jax.data import datasets, masks, pipeline, records, remote, synthetic, tokenizer

Log = Callable[[str], None]


def read(config: config_lib.Config, dataset: str, split: str, log: Log) -> records.Split:
    """One split; the embedded data set is generated when its cache folder is not there yet.

    Query captions are all of a picture's, or its first one with `eval.captions="single"`; training
    always uses all.
    """
    root = config.data_root
    if dataset == "synthetic":
        root = synthetic_folder(config, log)
    elif root is None:
        raise config_lib.ConfigError(
            f"config.data_root is not set: dataset {dataset!r} needs the folder that holds the "
            "benchmark's own folder (jsonl: the file of own data or its folder)."
        )
    found = datasets.read(
        dataset,
        root,
        split,
        image_size=config.model.image_size,
        # The reference, which validates on test, holds nobody out.
        train_on_all=config.train_on_all or holds_nobody_out(config, dataset),
    )
    single = split != "train" and config.eval.captions == "single"
    return found.single_caption() if single else found


def holds_nobody_out(config: config_lib.Config, dataset: str) -> bool:
    """Whether the identities that would become `val` are trained on, as by the reference."""
    return config.eval.protocol == "paper" and dataset == "icfg_pedes"


def read_tests(config: config_lib.Config, log: Log) -> list[records.Split]:
    """The test splits of the run's own and the further data sets."""
    names = dict.fromkeys((config.dataset, *config.eval_datasets))
    return [read(config, name, "test", log) for name in names]


def stream(
    config: config_lib.Config,
    split: records.Split,
    words: tokenizer.Tokenizer,
    *,
    shard: tuple[int, int] = (0, 1),
) -> pipeline.TrainStream:
    """The batches of a training, as the configuration has them; `shard` is this host's part."""
    return pipeline.TrainStream(
        split,
        words,
        image_size=config.model.image_size,
        batch_size=config.batch_size,
        num_instances=config.num_instances,
        num_epochs=config.num_epochs,
        seed=config.seed,
        augment_image=config.augment.image,
        augment_caption=config.augment.text,
        augment_pad=config.augment.pad,
        num_workers=config.num_workers,
        shard=shard,
    )


def masks_of(config: config_lib.Config, split: records.Split, log: Log) -> masks.Truth | None:
    """The masks beside the files of `config.dataset`, where it has some; not those in buckets.

    Raises:
      DataError: they are there and cannot be used.
    """
    if config.dataset == "synthetic":
        return masks.find(synthetic_folder(config, log), split)
    if not remote.is_local(config.data_root):
        return None
    try:
        file = datasets.annotation(config.dataset, remote.path(config.data_root))
    except records.MissingError:  # a packed set without its files
        return None
    return masks.find(pathlib.Path(file).parent, split)


def synthetic_folder(config: config_lib.Config, log: Log) -> pathlib.Path:
    """The embedded data set's cache folder, under `data_root` or the user's cache folder."""
    root = pathlib.Path(config.data_root) if config.data_root else remote.user_cache()
    return synthetic.ensure(
        root.expanduser(),
        seed=config.synthetic.seed,
        identities=config.synthetic.identities,
        images_per_identity=config.synthetic.images_per_identity,
        named=config.synthetic.named,
        log=log,
    )


def validation_name(config: config_lib.Config) -> str:
    """The split that chooses epoch and fusion weight; the reference chooses them on test."""
    return "test" if config.eval.protocol == "paper" else "val"


def facts(
    splits: Sequence[records.Split],
    pretrained: weights.Weights | None,
    truth: masks.Truth | None = None,
) -> dict[str, Any]:
    """What every process must have read alike, by name."""
    seen = None
    if truth is not None:
        seen = f"{zlib.crc32(repr((truth.regions, truth.named)).encode()):08x}"
    found: dict[str, Any] = {"masks": seen}
    for split in splits:
        people = zlib.crc32(np.ascontiguousarray(split.caption_ids, np.int64).tobytes())
        # Own data may hold half a surrogate pair, which the tokenizer takes.
        words = zlib.crc32("\n".join(split.captions).encode("utf-8", "surrogatepass"))
        found[f"data {split.dataset} {split.split}"] = (
            f"{len(split.captions)} captions, {len(split.images)} pictures, checksum "
            f"{words ^ people:08x}"
        )
    if pretrained is not None:
        checksum = 0
        for name, array in sorted(pretrained.arrays.items()):
            checksum = zlib.crc32(f"{name} {array.shape}".encode(), checksum)
            if name.endswith(("projection", "skip/kernel")):  # of megabytes, and trained
                checksum = zlib.crc32(np.ascontiguousarray(array.read()).tobytes(), checksum)
        found["checksum of the weights"] = f"{checksum:08x}"
    return found
