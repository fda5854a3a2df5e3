"""Weights from one kind of file to another, and the report."""

import errno
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import golden_model
import jax
import numpy as np
import published
import pytest

import itself_jax
from itself_jax import converting, encoders, weight_files, weights

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
KINDS = ("a.pth", "a.safetensors", "a.npz", "folder")


def quiet(line):
    del line


@pytest.fixture
def unprobed(monkeypatch):
    """Without the compilation of the probe."""
    monkeypatch.setattr(converting, "_probe", lambda source: [])


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "itself_jax.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def contents(path):
    file = weight_files.read(path)
    return {name: tensor.read() for name, tensor in file.tensors.items()}


def assert_same(path, other):
    """Key for key in order, type and every bit."""
    given, expected = contents(path), contents(other)
    assert list(given) == list(expected)
    for name, values in expected.items():
        assert given[name].dtype == values.dtype and given[name].shape == values.shape, name
        assert given[name].tobytes() == values.tobytes(), name


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The golden model in the published layout, written by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("golden")
    done = command(GOLDEN / "small_s16_state.npz", folder / "best.pth")
    assert done.returncode == 0, done.stderr
    return folder / "best.pth", done.stdout


def test_the_published_file_has_the_types_and_values_of_the_reference(best):
    keys = json.loads((GOLDEN / "itself_vitb16_keys.json").read_text())["full_stride16"]
    given = contents(best[0])
    with np.load(GOLDEN / "small_s16_state.npz") as expected:
        assert sorted(given) == sorted(expected.files) == sorted(keys["state_dict"])
        for name, (_, dtype) in keys["state_dict"].items():
            assert given[name].dtype == dtype, name
            np.testing.assert_array_equal(given[name], expected[name])


@pytest.mark.slow
def test_round_trips_are_bit_identical(best, tmp_path, unprobed):
    """float16 → float32 in every kind of file → float16, and each kind into each other."""
    source = converting.examine(best[0], quiet)
    for kind in KINDS:
        converting.write(source, tmp_path / kind, quiet)
    for kind in KINDS:
        again = converting.examine(tmp_path / kind, quiet)
        converting.write(again, tmp_path / f"of {kind}.pth", quiet)
        assert_same(tmp_path / f"of {kind}.pth", best[0])
    converting.write(again, tmp_path / "b.npz", quiet)  # from Orbax
    assert_same(tmp_path / "b.npz", tmp_path / "a.npz")


def cost(*arguments):
    """Runs the command: its wall-clock seconds and the most memory it had, in bytes."""
    started = time.monotonic()
    program = [sys.executable, "-m", "itself_jax.convert", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.monotonic() - started, usage.ru_maxrss * 1024


@pytest.mark.slow
def test_a_whole_model_goes_both_ways_bit_for_bit_in_bounded_memory(tmp_path):
    """ViT-B/16 with all the people of CUHK-PEDES: 310 M parameters, 1.2 GB as float32."""
    best = published.write_whole(tmp_path / "best.pth", published.VIT_B16)
    for source, path in (("best.pth", "folder"), ("folder", "again.pth")):
        seconds, memory = cost(tmp_path / source, tmp_path / path)
        print(f"{source} to {path}: {seconds:.0f} s, {memory / 1e9:.2f} GB")
        assert memory < 4e9
    given, expected = weight_files.read(tmp_path / "again.pth").tensors, weight_files.read(best)
    assert list(given) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        values, wanted = given[name].read(), tensor.read()
        assert (values.dtype, values.shape) == (wanted.dtype, wanted.shape), name
        assert values.tobytes() == wanted.tobytes(), name


def test_progress_survives_every_kind(tmp_path, unprobed):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    for kind in KINDS:
        converting.write(source, tmp_path / kind, quiet)
        converting.write(
            converting.examine(tmp_path / kind, quiet), tmp_path / "b.pth", quiet, force=True
        )
        metadata = weight_files.read(tmp_path / "b.pth").metadata
        progress = {key: metadata[key] for key in ("num_epoch", "iteration", "epoch")}
        assert progress == {"num_epoch": 60, "iteration": 12, "epoch": 3}


def embeddings(model, variables, images, ids):
    return (
        model.apply(variables, images, method="encode_image").embedding,
        model.apply(variables, ids, method="encode_text").embedding,
    )


def test_the_golden_features_come_out_of_every_kind(best, tmp_path, unprobed):
    source = converting.examine(best[0], quiet)
    golden, batch = golden_model.load("golden_f32_mixed_s16.npz"), golden_model.batch()
    compiled = None
    for kind in KINDS:
        path = converting.write(source, tmp_path / kind, quiet)
        found = weights.open_(path, quiet)
        ready = encoders.of_weights(found, source.config, quiet)
        compiled = compiled or jax.jit(functools.partial(embeddings, ready.training.model))
        for side, embedding in zip(
            ("image", "text"), compiled(ready.variables, batch["images"], batch["ids"]), strict=True
        ):
            for given, name in (
                (embedding.global_, f"feat/encode_{side}"),
                (embedding.local, f"feat/encode_{side}_grab_eval/stable"),
            ):
                golden_model.assert_close(given, golden[name], 2e-5, f"{kind} {name}")


def test_the_report_of_a_published_file(best):
    lines = dict(line.split(maxsplit=1) for line in best[1].splitlines() if "  " in line)
    assert lines["arrays"] == "351 mapped, 0 absent, 0 dropped"
    with np.load(GOLDEN / "small_s16_state.npz") as state:
        learnt = [n for n in state.files if "running" not in n and "tracked" not in n]
        count = sum(state[name].size for name in learnt)
    assert lines["parameters"].startswith(f"{count:,}: encoders ")
    digest = hashlib.sha256((GOLDEN / "small_s16_state.npz").read_bytes()).hexdigest()
    assert lines["sha256"].startswith(digest)
    assert lines["activation"] == "quick_gelu" and lines["identities"] == "7"
    assert "6x2 patches" in lines["image"] and "heads 2" in lines["image"]
    assert "best.pth: 351 arrays under the names of ITSELF" in best[1]


def test_the_probe_tells_models_apart(tmp_path):
    """The same numbers from another file of the same weights, others from other weights."""

    def probe(path):
        log = []
        converting.examine(path, log.append, {"model.image_size": (32, 16)})
        return [line for line in log if line.startswith("probe")]

    image, text = probe(published.write(tmp_path / "best.pth"))
    assert all("global" in line and "local" in line for line in (image, text))
    arrays = contents(tmp_path / "best.pth")
    weight_files.write_npz(tmp_path / "same.npz", arrays)
    assert probe(tmp_path / "same.npz") == [image, text]
    arrays["base_model.visual.proj"] = arrays["base_model.visual.proj"] * 1.01
    arrays["texual_emb_layer.linear.bias"] = arrays["texual_emb_layer.linear.bias"] * 1.01
    weight_files.write_torch(tmp_path / "other.pth", arrays)
    other_image, other_text = probe(tmp_path / "other.pth")
    assert image != other_image and text != other_text


def test_a_clip_file_is_reported_and_converted(tmp_path, unprobed):
    log = []
    source = converting.examine(GOLDEN / "hugging_face", log.append)
    (arrays,) = [line for line in log if line.startswith("arrays")]
    assert "93 mapped, 50 absent (42: the file has no local branch; 8: the file has no" in arrays
    assert "1 dropped (1: the losses have no learnt temperature)" in arrays
    for path, kwargs in (("clip.safetensors", {"layout": "openai"}), ("folder", {})):
        converting.write(source, tmp_path / path, quiet, **kwargs)
        again = converting.examine(tmp_path / path, quiet)
        assert again.config.model == source.config.model
        for name, array in source.weights.arrays.items():
            expected = weights.read(source.weights, name, array)
            np.testing.assert_array_equal(
                weights.read(again.weights, name, again.weights.arrays[name]), expected
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_stays_a_clip_under_the_published_names(kind, tmp_path, unprobed):
    """It is what training starts from, not a model of IRRA; its squares are still resized."""
    source = converting.examine(GOLDEN / "open_clip", quiet)
    converting.write(source, tmp_path / kind, quiet)
    found = weights.open_(tmp_path / kind, quiet)
    assert found.num_identities is None and not found.has_local
    assert found.sizes["model.activation"] == "gelu" and found.sizes["model.vision_heads"] == 4
    assert found.origin.name == "CLIP" and found.kind.endswith(", CLIP (converted)")
    log = []
    # As many patches as the 4x4 of pre-training.
    ready = itself_jax.load(tmp_path / kind, image_size=(64, 16), log=log.append)
    assert ready.config.model.grid == (8, 2)
    assert any("of a 4x4 grid were resized to 8x2" in line for line in log)


def test_openai_names_say_what_they_leave_out(tmp_path, unprobed):
    log = []
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    converting.write(source, tmp_path / "clip.npz", log.append, layout="openai")
    assert "visual.conv1.weight" in contents(tmp_path / "clip.npz")
    assert any(line.startswith("left out") and "no local branch" in line for line in log)


def test_a_state_of_openai_names_is_nothing_else_and_says_what_it_cannot(tmp_path, unprobed):
    log = []
    converting.write(
        converting.examine(published.write(tmp_path / "best.pth"), quiet),
        tmp_path / "clip.pt",
        log.append,
        layout="openai",
    )
    file = weight_files.read(tmp_path / "clip.pt")
    assert file.metadata == {} and not [line for line in log if "WARNING" in line]
    source = converting.examine(GOLDEN / "open_clip", quiet)
    converting.write(source, tmp_path / "other.pt", log.append, layout="openai")
    assert "cannot say activation gelu, vision_heads 4, text_heads 4" in log[-2]


def test_openai_names_have_the_temperature_that_their_loader_asks_for(tmp_path, unprobed):
    def converted(path, name):
        """Through another kind of file, and what was said of it."""
        log = []
        between = converting.write(converting.examine(path, quiet), tmp_path / f"{name}1", quiet)
        source = converting.examine(between, quiet)
        converting.write(source, tmp_path / f"{name}.pt", log.append, layout="openai")
        return contents(tmp_path / f"{name}.pt")["logit_scale"], "".join(log)

    given = weight_files.read(GOLDEN / "open_clip").tensors["logit_scale"].read()
    found, said = converted(GOLDEN / "open_clip", "a")
    assert found == given.astype(np.float32) and "logit_scale" not in said
    assert (found.shape, found.dtype) == ((), np.float32)
    found, said = converted(published.write(tmp_path / "best.pth"), "b")
    assert found == np.float32(np.log(1 / 0.07)) and "logit_scale  2.6593, with which" in said


def test_a_picture_that_contradicts_the_positions_is_refused(tmp_path, unprobed):
    path = published.write(tmp_path / "best.pth")
    with pytest.raises(weights.WeightsError, match="for 8 patches, but a picture of 64x64 has 8x8"):
        converting.examine(path, quiet, {"model.image_size": (64, 64)})


def test_float16_says_what_it_rounds(tmp_path, unprobed):
    log = []
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    converting.write(source, tmp_path / "half.pth", log.append)
    (line,) = [line for line in log if line.startswith("rounding")]
    written = contents(tmp_path / "half.pth")
    rounded = {
        name: values
        for name, values in published.state().items()
        if written[name].dtype == np.float16
    }
    inexact = sum(int((v.astype(np.float16) != v).sum()) for v in rounded.values())
    assert f" {inexact:,} values" in line and inexact > 1000
    log.clear()
    converting.write(source, tmp_path / "whole.pth", log.append, dtype="float32")
    assert not [line for line in log if line.startswith("rounding")]
    assert_same(tmp_path / "whole.pth", tmp_path / "best.pth")


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path, unprobed):
    bad = published.state()["base_model.visual.proj"]
    bad[0, 0] = 7e4
    path = published.write(tmp_path / "best.pth", base_model__visual__proj=bad)
    source = converting.examine(path, quiet)
    with pytest.raises(weights.WeightsError, match=r"visual\.proj holds 70000, which float16"):
        converting.write(source, tmp_path / "half.pth", quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]
    converting.write(source, tmp_path / "whole.pth", quiet, dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_replaced_by_force_only(kind, tmp_path, unprobed):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    target = tmp_path / "out" / kind
    if kind == "folder":
        target.mkdir(parents=True)
        (target / "mine").write_text("mine")
        with pytest.raises(weights.WeightsError, match="that no conversion wrote"):
            converting.write(source, target, quiet, force=True)
        assert [path.name for path in target.iterdir()] == ["mine"]
        (target / "mine").rename(target / "checkpoints")
    else:
        target.parent.mkdir()
        target.write_text("mine")
    with pytest.raises((weights.WeightsError, weight_files.WeightFileError), match="--force") as no:
        converting.write(source, target, quiet)
    assert str(target) in str(no.value)
    assert (target / "checkpoints" if kind == "folder" else target).read_text() == "mine"
    converting.write(source, target, quiet, force=True)
    assert [p.name for p in target.parent.iterdir()] == [kind]
    assert converting.examine(target, quiet).weights.num_identities == 5


def test_what_a_killed_conversion_had_put_aside_is_back_before_the_next_one(tmp_path, unprobed):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    target = tmp_path / "out" / "folder"
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (target.parent / f".folder.{killed.pid}.old" / "checkpoints").mkdir(parents=True)
    left = target.parent / f".folder.{killed.pid}.tmp"
    left.mkdir()
    os.utime(left, (0, 0))
    with pytest.raises(weights.WeightsError, match="folder exists already: .* --force"):
        converting.write(source, target, quiet)
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert (target / "checkpoints").is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_numbers_stop_a_conversion_and_leave_nothing(kind, tmp_path, unprobed):
    """Met in the middle of writing, after other arrays are written."""
    bad = published.state()["texual_emb_layer.mlp.layers.1.bias"]
    bad[3] = np.nan
    path = published.write(tmp_path / "best.pth", texual_emb_layer__mlp__layers__1__bias=bad)
    source = converting.examine(path, quiet)
    with pytest.raises(weights.WeightsError, match=r"texual_emb_layer\.mlp\.layers\.1\.bias"):
        converting.write(source, tmp_path / "out" / kind, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_folders_that_were_there_stay(tmp_path, unprobed):
    bad = published.state()["classifier_grab.bias"] * np.nan
    source = converting.examine(
        published.write(tmp_path / "best.pth", classifier_grab__bias=bad), quiet
    )
    (tmp_path / "mine").mkdir()
    with pytest.raises(weights.WeightsError):
        converting.write(source, tmp_path / "mine" / "new" / "a.npz", quiet)
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(weights.WeightsError, match="cannot be written .Not a directory"):
        converting.write(source, tmp_path / "file" / "a.npz", quiet)


def test_a_check_reads_what_no_encoder_needs(tmp_path, unprobed):
    bad = published.state()["classifier_grab.bias"]
    bad[2] = np.nan
    log = []
    converting.verify(converting.examine(published.write(tmp_path / "a.pth"), quiet), log.append)
    (line,) = log
    assert "are finite" in line
    path = published.write(tmp_path / "best.pth", classifier_grab__bias=bad)
    with pytest.raises(
        weights.WeightsError, match=r"classifier_grab\.bias holds 1 values that are"
    ):
        converting.verify(converting.examine(path, quiet), quiet)


@pytest.mark.parametrize("name", ["model.bin", "a.ckpt", "a.PKL", "a.tar", "a.onnx", "a.pth.gz"])
def test_endings_of_nothing_that_is_written_are_refused(name, tmp_path):
    with pytest.raises(converting.DestinationError, match=r"ends in \.\w+, as no file .* \.pth, "):
        converting.ending(tmp_path / name, layout=None, dtype=None)


def test_endings_count_in_either_case_and_numbers_are_none(tmp_path, unprobed):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    converting.write(source, tmp_path / "a.PTH", quiet)
    converting.write(source, tmp_path / "a.NPZ", quiet)
    converting.write(source, tmp_path / "run-1.5", quiet)
    assert weight_files.read(tmp_path / "a.PTH").kind == "torch.save (zip)"
    assert weight_files.read(tmp_path / "a.NPZ").kind == "npz"
    assert (tmp_path / "run-1.5" / "checkpoints").is_dir()


@pytest.mark.parametrize("given", [{"layout": "published"}, {"dtype": "float32"}])
def test_a_folder_has_neither_layout_nor_number_type(given, tmp_path, unprobed):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)
    with pytest.raises(converting.DestinationError, match=f"--{list(given)[0]}=.* is for files"):
        converting.write(source, tmp_path / "folder", quiet, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_a_full_disk_leaves_no_folder(tmp_path, unprobed, monkeypatch):
    source = converting.examine(published.write(tmp_path / "best.pth"), quiet)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(weights.WeightsError, match="folder cannot be written .No space left"):
        converting.write(source, tmp_path / "folder", quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_a_known_file_is_recognised_by_its_checksum(tmp_path, unprobed, monkeypatch):
    path = published.write(tmp_path / "best.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(converting._KNOWN, digest, "OpenAI's ViT-X/3")
    log = []
    converting.examine(path, log.append)
    assert any(line.startswith("sha256") and "(OpenAI's ViT-X/3)" in line for line in log)


def test_the_command_checks_without_writing(tmp_path):
    path = published.write(tmp_path / "best.pth")
    done = command(path, "--check", "--activation=gelu", "--image_size=32x16")
    assert done.returncode == 0, done.stderr
    assert "activation   gelu" in done.stdout and "probe" in done.stdout
    assert "statistics are finite" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("nowhere.pth", "out.pth"), 1, "nowhere.pth"),
        (("one",), 2, "DST"),
        (("one", "two", "three"), 2, "expected, got 3 names"),
        (("a", "b", "--layout=theirs"), 2, "layout"),
        (("a", "b", "--image_size=big"), 2, "--image_size=big must be HEIGHTxWIDTH"),
        (("a", "b", "--nonsense"), 2, "nonsense"),
        (("a", "b.bin"), 2, "ends in .bin"),
        (("a", "b", "--layout=published"), 2, "--layout=published is for files"),
    ],
)
def test_failures_are_one_sentence_and_an_exit_code(arguments, code, message, tmp_path):
    done = command(*arguments)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert message in line and "Traceback" not in done.stderr
