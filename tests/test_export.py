"""Exports: the same numbers without this package, and nothing left behind when it goes wrong."""

import importlib.util
import json
import os
import pathlib
import re
import resource
import subprocess
import sys

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import itself_jax
from itself_jax import checkpoint, encoders, exporting, fitting, step, weights
from itself_jax import config as config_lib
from itself_jax.data import tokenizer
from itself_jax.models import saliency

pytest.importorskip("flatbuffers")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from itself_jax import onnx_graph  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ROOT / "tests" / "golden" / "small_s16_state.npz"
SENTENCES = ["A man in a red coat, with “blue” jeans", "she carries a bag", ""]


def quiet(line):
    del line


def settings(**changes):
    return tiny.settings("unused", precision="float32", **changes)


def ready(**changes):
    """The tiny model with random weights, in float32."""
    config = settings(**changes)
    training = step.make(config, num_identities=1, steps_per_epoch=(1,) * config.num_epochs)
    state = jax.eval_shape(lambda: training.init(0))
    shapes = fitting.encoders_only({"params": state.params, "batch_stats": state.batch_stats})
    rng = np.random.default_rng(0)

    def some(path, leaf):
        name = path[-1].key
        values = rng.normal(0, 0.1, leaf.shape) + (name in ("scale", "var"))
        return jnp.asarray(np.abs(values) if name == "var" else values, leaf.dtype)

    return encoders.Encoders(config, jax.tree_util.tree_map_with_path(some, shapes), training)


def encode(model, name, argument):
    """Our own result."""
    method = {"image": model.training.encode_images, "text": model.training.encode_captions}[name]
    return jax.jit(method)(model.variables, argument)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Forty programs that run once each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def one_batch(monkeypatch):
    """Compares with one batch size: each takes a compilation."""
    monkeypatch.setattr(exporting, "_BATCHES", (3,))


def pixels(n, size=(32, 16)):
    return np.random.default_rng(n).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def ids(n, length=16):
    words = ("a woman with a red bag " * n).split()
    rows = [" ".join(words[: 3 * i + 1]) for i in range(n)]  # some are cut
    return tokenizer.Tokenizer(length).encode_batch(rows)


def run_onnx(path, argument):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    kind = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64}[given.type]
    outputs = session.run(None, {given.name: argument.astype(kind)})
    return dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))


def run_stablehlo(path, argument):
    exported = jax.export.deserialize(path.read_bytes())
    with np.load(path.with_suffix(".npz")) as file:
        return exported.call(dict(file), argument)


def assert_same(found, expected, tolerance=2e-5):
    names = {"global": expected.global_, "local": expected.local}
    names = {name: value for name, value in names.items() if value is not None}
    assert set(found) == set(names)
    for name, value in names.items():
        golden_model.assert_close(found[name], value, tolerance, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished conversion's folder: the tiny model, with a fusion weight."""
    folder = tmp_path_factory.mktemp("source") / "run"
    model = ready()
    description = {"config": {k: config_lib.to_dict(model.config)[k] for k in ("model", "local")}}
    with checkpoint.Checkpoints(folder / "checkpoints", log=quiet) as checkpoints:
        meta = {"score": None, weights.DESCRIPTION: description, "best_alpha": 0.25}
        checkpoints.save(1, model.variables, meta)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    lines = []
    exporting.export(run, folder, lines.append, precision="float32")
    return folder, lines


# --- numbers -----------------------------------------------------------------------------------


def test_one_file_returns_what_the_model_returns_for_batches_of_any_size(exported):
    folder, _ = exported
    for name, rows in (("image", pixels(5)), ("text", ids(5))):
        expected = encode(ready(), name, rows)
        assert_same(run_stablehlo(folder / f"{name}.stablehlo", rows), expected)
        for n in (1, 3, 5):
            first = jax.tree.map(lambda x, n=n: x[:n], expected)
            assert_same(run_onnx(folder / f"{name}.onnx", rows[:n]), first)


def test_an_export_says_what_it_measured(exported):
    folder, lines = exported
    parity = json.loads((folder / "preprocessing.json").read_text())["difference_from_source"]
    assert set(parity) == {f"{t}.{k}" for t in ("image", "text") for k in ("onnx", "stablehlo")}
    assert all(set(p) == {"global", "local"} and max(p.values()) < 2e-5 for p in parity.values())
    assert sum("off at batches of 1 and 3" in line for line in lines) == 4


def test_settings_say_how_to_prepare_and_compare(exported, run):
    folder, _ = exported
    found = json.loads((folder / "preprocessing.json").read_text())
    assert found["image"]["size"] == [32, 16] and found["image"]["mean"][0] == 0.48145466
    assert (found["text"]["length"], found["text"]["end"]) == (16, 49407)
    assert found["embedding"] == {"global": 32, "local": 32, "normalised": False}
    assert found["similarity"]["alpha"] == 0.25
    assert found["source"] == {"path": str(run), "kind": "checkpoint of itself_jax"}
    assert found["stablehlo"]["jax"] == f"{jax.__version__} or newer"
    assert found["versions"]["itself_jax"] == itself_jax.__version__


def check_onnx(model, folder, images, captions):
    """The files of both towers, or of the one whose input is given, against the model."""
    given = {"image": images, "text": captions}
    for tower in exporting._towers(model):
        if given[tower.name] is not None:
            exporting._write_onnx(tower, folder, model)
            found = run_onnx(folder / f"{tower.name}.onnx", given[tower.name])
            assert_same(found, encode(model, tower.name, given[tower.name]))


def test_a_model_without_local_branch_returns_global_alone(tmp_path):
    model = ready(local__enabled=False)
    check_onnx(model, tmp_path, pixels(5), ids(5))
    for tower in exporting._towers(model):
        exporting._write_stablehlo(tower, tmp_path, model)
        program = jax.export.deserialize((tmp_path / f"{tower.name}.stablehlo").read_bytes())
        assert str([x.shape for x in program.out_avals]) == "[(batch, 32)]"


@pytest.mark.parametrize(
    "source, activation", (("mars", "quick_gelu"), ("mean", "gelu"), ("min_std", "quick_gelu"))
)
def test_other_saliency_selects_the_same_tokens_in_onnx(source, activation, tmp_path):
    model = ready(local__inference_saliency=source, model__activation=activation)
    check_onnx(model, tmp_path, pixels(5) if source == "mars" else None, ids(5))


def golden(**changes):
    """The small golden model, whose weights were trained."""
    config = config_lib.Config(
        model=golden_model.MODEL, local=config_lib.Local(dim=128), precision="float32"
    )
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config = config_lib.replace(config, changes)
    training = step.make(config, num_identities=1, steps_per_epoch=(1,) * config.num_epochs)
    variables = jax.tree.map(jnp.asarray, golden_model.variables())
    return encoders.Encoders(config, fitting.encoders_only(variables), training)


def test_trained_weights_and_mars_with_discard_in_both_formats(tmp_path, one_batch):
    model = golden(local__inference_saliency="mars", local__mars_discard=0.25)
    lines = []
    parity = exporting.write(model, tmp_path, lines.append)
    assert len(parity) == 4 and max(max(p.values()) for p in parity.values()) < 2e-5
    # 512 words are no vocabulary that a tokenizer could be written for.
    assert not (tmp_path / "tokenizer.json").exists() and "No tokenizer.json" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ("last", "layer:3", "mars", "mean", "std", "min_mean", "min_std")
)
@pytest.mark.parametrize("activation", ("quick_gelu", "gelu"))
def test_every_source_of_the_trained_model(source, activation, tmp_path):
    model = golden(local__inference_saliency=source, model__activation=activation)
    check_onnx(model, tmp_path, pixels(8, (96, 32)), golden_model.batch()["ids"])


# --- the files ---------------------------------------------------------------------------------


def test_stablehlo_is_for_every_platform_and_batch(exported):
    program = jax.export.deserialize((exported[0] / "image.stablehlo").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[-1].shape) == "(batch, 32, 16, 3)"


def test_onnx_is_valid_and_needs_no_new_operators(exported):
    for name, given in (("image", "pixels"), ("text", "ids")):
        path = exported[0] / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert [i.name for i in model.graph.input] == [given]
        assert [o.name for o in model.graph.output] == ["global", "local"]
        first = model.graph.output[0].type.tensor_type.shape.dim[0]
        assert first.dim_param == "batch"
        # What the published weights own and nobody uses stays out.
        assert not any("unused" in tensor.name for tensor in model.graph.initializer)


def test_weights_that_protobuf_cannot_hold_lie_in_a_file_of_their_own(tmp_path):
    def scale(arrays, x):
        return {"global": x @ arrays["w"] + arrays["b"][None]}

    arrays = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4)}
    (batch,) = jax.export.symbolic_shape("batch")
    argument = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    translated = onnx_graph.translate(scale, arrays, argument, name="x")
    files = onnx_graph.write(translated, tmp_path / "a.onnx", limit=63)
    assert [file.name for file in files] == ["a.onnx", "a.onnx.data"]
    assert files[0].stat().st_size < 1000 < 4096 < files[1].stat().st_size
    session = onnxruntime.InferenceSession(str(files[0]))
    x = np.array([[1, 0, 0], [0, 0, 2]], np.float32)
    (found,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(found, [[1, 2, 3, 4], [17, 19, 21, 23]])
    assert len(onnx_graph.write(translated, tmp_path / "b.onnx", limit=64)) == 1


def test_the_lowest_entries_are_the_same_ones_among_equals(tmp_path):
    # As a causal map has them: more zeros than are to be marked.
    rows = [[0.5, 0, 0, 0.1, 0, 0], [0, 0.3, 0.3, 0.3, 0.2, 0.4], [0, 0, 0, 0, 0, 1e-40]]
    values = np.array(rows, np.float32)
    expected = [[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(saliency.lowest(values, 3), np.array(expected, bool))
    (batch,) = jax.export.symbolic_shape("batch")
    translated = onnx_graph.translate(
        lambda arrays, x: {"mask": saliency.lowest(x, 3)},
        {},
        jax.ShapeDtypeStruct((batch, 6), jnp.float32),
        name="x",
    )
    (path,) = onnx_graph.write(translated, tmp_path / "lowest.onnx")
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": values})
    np.testing.assert_array_equal(found, np.array(expected, bool))


def forms(x):
    """Forms of indexing and shaping that the encoders have, and some that they could have."""
    k = jnp.argmax(x[:, :, 0], axis=1)
    return {
        "one": jnp.take_along_axis(x, k[:, None, None], axis=1)[:, 0],
        "stacked": jnp.take_along_axis(jnp.stack([x, -x]), k[None, :, None, None], axis=2)[1, :, 0],
        "sliced": jax.lax.slice(x, (0, 1, 1), (x.shape[0], 4, 3), (1, 2, 1)),
        "set": x.at[:, 2].set(k[:, None].astype(jnp.float32)).at[:, :, 0].set(7.0),
        "cells": jnp.concatenate([jnp.ones((x.shape[0], 1, 3)), x], axis=1)[:, 0, 2],
        "chosen": jnp.where((x > 0.5) & ~(x > 0.9), x, jnp.zeros(3)[None, None]).max(axis=(1, 2)),
        "product": jnp.einsum("bij,bkj->bik", x, x) @ jnp.ones((5, 2)),
        "flags": (x > 0.5).at[:, 0].set(True),
        "numbers": jnp.sum(x > 0.5, axis=1) - 2 * jnp.arange(3)[None],
        "squeezed": jnp.squeeze(jax.lax.slice_in_dim(x, 0, 1, axis=1), 1).T.T,
        "curves": jnp.tanh(x) + jax.lax.erf(x) + jnp.abs(-x) / jnp.exp(x),
    }


def test_indexing_and_shaping_in_every_form(tmp_path):
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 5, 3), jnp.float32)
    translated = onnx_graph.translate(lambda arrays, x: forms(x), {}, shape, name="x")
    (path,) = onnx_graph.write(translated, tmp_path / "forms.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for n in (1, 4):
        x = np.random.default_rng(n).random((n, 5, 3), np.float32)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"x": x}), strict=True))
        for name, value in jax.jit(forms)(x).items():
            assert found[name].dtype == value.dtype, name
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "function, message",
    (
        (lambda x: jax.lax.rev(x, (1,)), "operation 'rev' has no rule"),
        (lambda x: jnp.sort(x), "operation 'sort' has no rule"),
        (lambda x: x.at[:, jnp.sum(x).astype(int)].set(0.0), "'scatter' has a form"),
        (lambda x: x + jax.lax.broadcasted_iota(x.dtype, x.shape, 0), "'iota' has a form"),
        (lambda x: x * x.shape[0], "'dim_as_value' has no rule"),
    ),
)
def test_what_is_not_known_is_an_error_that_names_it(function, message):
    (batch,) = jax.export.symbolic_shape("batch")
    argument = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    with pytest.raises(onnx_graph.OnnxError, match=message):
        onnx_graph.translate(lambda arrays, x: {"y": function(x)}, {}, argument, name="x")


# --- without this package ----------------------------------------------------------------------

WITHOUT_JAX = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "itself_jax", "ftfy"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(folder, *arguments):
    command = [sys.executable, "-c", WITHOUT_JAX, folder / "example.py", *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=folder.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [line.split(" ", 6) for line in done.stdout.splitlines()]


def similarities(run, picture, sentences):
    model = itself_jax.load(run, precision="float32", log=quiet)
    cosines = []
    for image, text in zip(
        model.encode_image([picture]), model.encode_text(sentences), strict=True
    ):
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
        cosines.append(unit[1] @ unit[0][0])
    return np.stack([0.25 * cosines[0] + 0.75 * cosines[1], *cosines], axis=1)


def test_the_example_runs_without_jax_and_agrees(exported, run, tmp_path):
    folder, _ = exported
    picture = tmp_path / "picture.jpg"
    Image.fromarray(pixels(1, (70, 40))[0]).save(picture)
    words = tokenizer.Tokenizer(16)
    given = [",".join(map(str, np.trim_zeros(words.encode(text)))) for text in SENTENCES]
    if importlib.util.find_spec("tokenizers"):
        given += SENTENCES
    lines = example(folder, picture, *given)
    expected = similarities(run, picture, SENTENCES)
    assert [line[6] for line in lines] == given
    assert [line[0:6:2] for line in lines] == [["fused", "global", "local"]] * len(given)
    found = np.array([line[1:6:2] for line in lines], float)
    np.testing.assert_allclose(found[:3], expected, atol=2e-5)
    if len(given) > 3:
        np.testing.assert_array_equal(found[3:], found[:3])


def test_tokenizer_json_gives_the_ids_of_the_reference():
    tokenizers = pytest.importorskip("tokenizers")
    written = tokenizers.Tokenizer.from_str(json.dumps(exporting.tokenizer_json(77)))
    golden = json.loads((ROOT / "tests" / "golden" / "tokenize.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        assert written.encode(case["caption"]).ids == case["ids"], case["caption"]
    short, ours = json.dumps(exporting.tokenizer_json(8)), tokenizer.Tokenizer(8)
    short = tokenizers.Tokenizer.from_str(short)
    for text in (*SENTENCES, "one two three four five six seven", "Dr Jekyll’s <|mask|>", "é &lt;"):
        assert short.encode(text).ids == ours.encode(text).tolist(), text


# --- failures ----------------------------------------------------------------------------------


def tree(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture
def unwritten(monkeypatch):
    """Exports that take no time: one small file."""

    def write(ready, folder, log, *, formats):
        (folder / "image.onnx").write_text("new")
        return {}

    monkeypatch.setattr(exporting, "write", write)


def test_an_existing_export_is_replaced_when_told_so(run, tmp_path, unwritten):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "image.onnx").write_text("old")
    (tmp_path / "out" / "preprocessing.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(
        exporting.ExportError, match=r"out exists already: give another DST, or --f"
    ):
        exporting.export(run, tmp_path / "out", quiet)
    assert tree(tmp_path) == before
    exporting.export(run, tmp_path / "out", quiet, force=True)
    assert (tmp_path / "out" / "image.onnx").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_are_opened_once(run, tmp_path, unwritten, monkeypatch):
    opened, open_ = [], weights.open_
    monkeypatch.setattr(weights, "open_", lambda *given: opened.append(given) or open_(*given))
    exporting.export(run, tmp_path / "out", quiet)
    assert len(opened) == 1


def test_force_replaces_nothing_but_an_export(run, tmp_path, unwritten):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(exporting.ExportError, match=f"{name} is not an export"):
            exporting.export(run, tmp_path / name, quiet, force=True)
    (tmp_path / "empty").mkdir()
    exporting.export(run, tmp_path / "empty", quiet, force=True)
    with pytest.raises(exporting.ExportError, match="nowhere is no folder: create it"):
        exporting.export(run, tmp_path / "nowhere" / "out", quiet)


def test_a_full_disk_leaves_nothing_and_the_old_export(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preprocessing.json").write_text("{}")
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # less than the weights need
    try:
        with pytest.raises(
            exporting.ExportError, match=r"out cannot be written \(File too large\)"
        ):
            exporting.export(run, tmp_path / "out", quiet, force=True, formats=("onnx",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", exporting.FORMATS)
def test_a_file_that_computes_something_else_is_an_error_and_leaves_nothing(
    kind, run, tmp_path, monkeypatch, one_batch
):
    writer = getattr(exporting, f"_write_{kind}")

    def wrong(tower, folder, ready):
        call, files = writer(tower, folder, ready)
        return lambda x: {key: value * (1 + 3e-5) for key, value in call(x).items()}, files

    monkeypatch.setattr(exporting, f"_write_{kind}", wrong)
    with pytest.raises(exporting.ExportError, match=rf"image.{kind} differs .* 3\.\de-05 .* 2e-05"):
        exporting.export(run, tmp_path / "out", quiet, formats=(kind,), precision="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_tie_between_two_tokens_is_judged_by_other_pictures():
    calls = []

    def run(argument):
        calls.append(int(argument[0, 0]))
        return {"global": np.ones(2), "local": np.ones(2) + (argument[0, 0] == 0)}

    tower = exporting._Tower(
        *("image", "pixels", None, {}, None, None),
        probe=lambda n, seed: np.full((n, 1), seed),
        expected=lambda argument: {"global": np.ones(2), "local": np.ones(2)},
    )
    assert exporting._compare(tower, run, seed=0) == {"global": 0, "local": 1}
    assert exporting._compare(tower, run, seed=1) == {"global": 0, "local": 0}
    assert calls == [0, 0, 1, 1]


def test_nan_is_no_parity():
    tower = exporting._Tower(
        *("image", "pixels", None, {}, None, None),
        probe=lambda n, seed: np.zeros(n),
        expected=lambda argument: {"global": np.ones(2)},
    )
    found = exporting._compare(tower, lambda x: {"global": np.full(2, np.nan)}, seed=0)
    assert not found["global"] <= 1


def test_what_onnx_cannot_hold_is_named_with_its_saliency(tmp_path, monkeypatch):
    monkeypatch.delitem(onnx_graph._RULES, "top_k")
    message = r"the image encoder with saliency 'last' cannot .* 'top_k' .*; --formats=stablehlo"
    with pytest.raises(exporting.ExportError, match=message):
        exporting.write(ready(), tmp_path, quiet, formats=("onnx",))


@pytest.mark.parametrize("package", ("onnx", "onnxruntime"))
def test_a_missing_package_is_said_before_anything_is_read(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"onnx needs the package {package}, .*: pip install 'itself_jax\[export\]'"
    with pytest.raises(exporting.ExportError, match=message):
        exporting.export("nothing", tmp_path / "out", quiet)
    with pytest.raises(weights.WeightsError, match="nothing"):
        exporting.export("nothing", tmp_path / "out", quiet, formats=("stablehlo",))


# --- the command -------------------------------------------------------------------------------


def command(*arguments, code=None):
    program = ["-c", code] if code else ["-m", "itself_jax.export"]
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_the_command_writes_stablehlo_where_onnx_is_not_installed(run, tmp_path):
    code = """
import sys
sys.modules["onnx"] = sys.modules["onnxruntime"] = None
from absl import app
from itself_jax import export, exporting
exporting._compare = lambda tower, run, seed: {"global": 1e-6}
app.run(export.main, flags_parser=export.parse_flags)
"""
    out = tmp_path / "out"
    flags = ("--formats=stablehlo", "--text_length=12", "--image_size=48x16")
    status, printed, err = command(run, out, *flags, code=code)
    assert (status, err) == (0, [])
    # A StableHLO file holds the source's paths, so that its rounded size depends on where it lies.
    sizes = r"image\.stablehlo 0\.\d MB, image\.npz 0\.2 MB: global 1\.0e-06 off"
    assert re.search(sizes, printed)
    assert f"Written to {out}: " in printed
    names = {path.name for path in out.iterdir()}
    parts = {f"{t}.{k}" for t in ("image", "text") for k in ("npz", "stablehlo")}
    assert names == parts | {"preprocessing.json", "tokenizer.json"}
    found = json.loads((out / "preprocessing.json").read_text())
    assert found["image"]["size"] == [48, 16] and found["text"]["length"] == 12
    status, printed, err = command(run, out, *flags, "--formats=onnx", "--force", code=code)
    assert status == 1 and err == [
        "itself_jax: onnx needs the package onnx, which is not installed: "
        "pip install 'itself_jax[export]'"
    ]


REJECTED = {
    "a": "SRC and DST expected, got 1 names: python -m itself_jax.export SRC DST",
    "a b c": "SRC and DST expected, got 3 names",
    "a b --formats=onnx,tflite": "--formats=onnx,tflite must be of stablehlo,onnx",
    "a b --formats=": "--formats= must be of stablehlo,onnx",
    "a b --image_size=384": "--image_size=384 must be HEIGHTxWIDTH in pixels, e.g. 384x128",
    "a b --stride=0": "stride",
    "a b --precision=bfloat16": "--precision=bfloat16 needs --formats=stablehlo",
    "a b --precision=float16": "precision",
    "a b --activation=relu": "activation",
    "a b --forse": "Unknown command line flag 'forse'. Did you mean: force ?",
    "/nothing b": "/nothing",
    "RUN b --stride=64": "config.model.stride",
    "RUN b --vision_heads=3": "config.model.vision_heads=3: must divide the width 32",
    "RUN b --text_heads=0": "text_heads",
}
# A process of its own for each, without importing everything again.
FORK = """
import os, sys
from itself_jax import export
for line in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            export.main(export.parse_flags(["export", *line.split()]))
            os._exit(0)
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(stop.code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_exit_codes_and_one_sentence_each(run, tmp_path):
    lines = [line.replace("RUN", str(run)).replace(" b", f" {tmp_path}/b") for line in REJECTED]
    status, out, err = command(*lines, code=FORK)
    assert status == 0
    codes = [line for line in out.splitlines() if line in ("1", "2")]  # beside what `load` says
    assert codes == ["1" if line.startswith("/") else "2" for line in REJECTED]
    for line, message in zip(err, REJECTED.values(), strict=True):
        assert line.startswith("itself_jax: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_1_and_leaves_nothing(run, tmp_path):
    code = """
from absl import app
from itself_jax import export, exporting
def stop(ready, folder, log, *, formats):
    (folder / "image.onnx").write_text("half")
    raise KeyboardInterrupt
exporting.write = stop
app.run(export.main, flags_parser=export.parse_flags)
"""
    status, _, err = command(run, tmp_path / "out", code=code)
    assert (status, err) == (1, ["itself_jax: stopped; nothing was written"])
    assert list(tmp_path.iterdir()) == []
