"""Twenty optimiser steps of the main job beside the PyTorch twin, from one published file.

The data set is one batch, 16 identities with two pairs each, so that its order cannot matter; the
input is not augmented. Rates and schedule are the published ones.
"""

import json
import sys

import numpy as np
import published
import pytest
import tiny
from PIL import Image

from itself_jax import config as config_lib
from itself_jax import interrupt, step, train, weight_files
from itself_jax.data import tokenizer

torch = pytest.importorskip("torch", reason="needs the extra `interop`")
torch.set_num_threads(1)  # two of them wait for each other where others work, too
sys.path.insert(0, str(tiny.ROOT))  # benchmarks/ is no package of ours

STEPS, PEOPLE = 20, 16
SIZES = published.Sizes(
    layers=4, embed=32, local=64, identities=PEOPLE, patch=16, patches=12, length=24
)
WORDS = "man woman red blue green white black jacket shirt bag hat shoes walks left long".split()
VARIANTS = {
    "itself": {},
    "sl": {"local.saliency": "layer:0", "local.ats": False},
    "baseline": {"local.enabled": False},
}


def write_data(folder) -> list[dict]:
    """Own data: one batch to learn from, four people each to validate and test on."""
    rng = np.random.default_rng(0)
    records = []
    for person in range(PEOPLE + 8):
        split = "train" if person < PEOPLE else ("val" if person < PEOPLE + 4 else "test")
        for picture in range(2):
            name = f"{person:02}-{picture}.png"
            # 96x32 already: no resizing, so that both programs get these very pixels.
            pixels = rng.integers(0, 256, (96, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
            caption = " ".join(rng.choice(WORDS, rng.integers(4, 20)))
            records.append({"image": name, "caption": caption, "id": person, "split": split})
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "people.jsonl").write_text("".join(lines))
    return records


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """The folder, and the one batch as the twin takes it."""
    folder = tmp_path_factory.mktemp("one batch")
    chosen = [record for record in write_data(folder) if record["split"] == "train"]
    pixels = np.stack([np.asarray(Image.open(folder / record["image"])) for record in chosen])
    mean, std = np.array(step.IMAGE_MEAN), np.array(step.IMAGE_STD)
    images = ((pixels / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    words = tokenizer.Tokenizer(SIZES.length)
    ids = words.encode_batch([record["caption"] for record in chosen])
    arrays = (images, ids.astype(np.int64), np.array([record["id"] for record in chosen]))
    return folder, tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "best.pth", SIZES)


def ours(folder, best, variant, path) -> list[dict]:
    """`metrics.jsonl` of the main job."""
    config = config_lib.replace(
        config_lib.Config(),
        {
            "dataset": "jsonl",
            "data_root": str(folder),
            "init_from": str(best),
            "model.image_size": (96, 32),
            "model.text_length": SIZES.length,
            "augment.image": False,
            "augment.text": False,
            "batch_size": 2 * PEOPLE,
            "last_epoch": STEPS,  # one step an epoch, of the published sixty
            "log_every": 1,
            "eval.batch_size": 8,
            "mesh.data": 1,
            **VARIANTS[variant],
        },
    )
    train.run(config, path, interrupt.Interrupts())
    return tiny.train_lines(path)


def theirs(best, batch, variant) -> list:
    from benchmarks import twin

    heads = SIZES.width // 64
    sizes = twin.Sizes(
        patch_size=SIZES.patch,
        stride=SIZES.patch,
        image_size=(96, 32),
        vision_width=SIZES.width,
        vision_depth=SIZES.layers,
        vision_heads=heads,
        text_width=SIZES.text_width,
        text_depth=SIZES.layers,
        text_heads=heads,
        text_length=SIZES.length,
        embed_dim=SIZES.embed,
        local_dim=SIZES.local,
        num_identities=PEOPLE,
    )
    changes = VARIANTS[variant]
    settings = twin.Settings(
        local=changes.get("local.enabled", True),
        saliency=changes.get("local.saliency", "mars"),
        ats=changes.get("local.ats", True),
    )
    model = twin.Twin(sizes, settings)
    wanted = model.state_dict()
    state = {name: tensor.read() for name, tensor in weight_files.read(best).tensors.items()}
    # The baseline has no local branch to load.
    model.load_state_dict({name: torch.from_numpy(state[name].copy()) for name in wanted})
    trainer = twin.Trainer(model)
    return [trainer.train_step(*batch, step=i, epoch=i) for i in range(1, STEPS + 1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_are_those_of_the_twin(variant, batch, best, tmp_path, capsys):
    folder, arrays = batch
    lines, expected = ours(folder, best, variant, tmp_path / "run"), theirs(best, arrays, variant)
    assert len(lines) == len(expected) == STEPS
    assert "the classifiers start anew" not in capsys.readouterr().out
    worst = {}
    for line, metrics in zip(lines, expected, strict=True):
        for name in ("loss", "loss_tal", "loss_cid", "grad_norm", "learning_rate"):
            wanted = float(getattr(metrics, name))
            error = abs(line[name] - wanted) / abs(wanted)
            worst[name] = max(worst.get(name, 0.0), error)
            limit = 1e-3 if name == "grad_norm" else 1e-4
            assert error <= limit, (line["step"], name, line[name], wanted)
        if variant != "baseline":
            for name in ("bank_image", "bank_text"):
                assert line[name] == getattr(metrics, name)
    # Twenty steps must have moved something, or equality would say nothing.
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 1e-3 * lines[0]["loss"]
    with capsys.disabled():
        print(f"\n{variant}: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
