"""Files that transformers, open_clip and TorchScript write, against what these libraries compute.

The small models that `tests/golden` holds are tested without any of them; here they are asked anew.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import itself_jax
from itself_jax import converting, weight_files, weights

torch = pytest.importorskip("torch", reason="needs the extra `interop`")
pytest.importorskip("transformers", reason="needs the extra `interop`")
torch.set_num_threads(1)

import libraries  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries
FULL = {"B/32": libraries.VIT_B32, "B/16": libraries.VIT_B16}


def quiet(line):
    del line


def assert_embeds_alike(path, model, sizes, **options):
    """The largest difference, relative to the largest value."""
    pictures, ids = libraries.inputs(sizes)
    expected = libraries.outputs(model, pictures, ids)
    size = (sizes.image_size, sizes.image_size)
    loaded = itself_jax.load(path, image_size=size, log=quiet, **options)
    for method, given, wanted in zip(("image", "text"), (pictures, ids), expected, strict=True):
        apply = jax.jit(loaded.training.model.apply, static_argnames="method")
        given = apply(loaded.variables, given, method=f"encode_{method}").embedding.global_
        error = np.abs(given - wanted).max() / np.abs(wanted).max()
        assert error <= 2e-5, f"{method}: {error:.1e}"
    return loaded


def saved(library: str, model, folder: pathlib.Path) -> pathlib.Path:
    if library != "hugging_face":
        libraries.save_open_clip(model, folder, torch.float32)
    else:
        model.save_pretrained(folder)
    return folder


LIBRARIES = {
    "hugging_face": libraries.hugging_face,
    "open_clip": libraries.open_clip,
    "custom_text": functools.partial(libraries.open_clip, custom_text=True),
}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_small_models(library, activation, tmp_path):
    model = LIBRARIES[library](libraries.SMALL, activation)
    folder = saved(library, model, tmp_path / "model")
    loaded = assert_embeds_alike(folder, model, libraries.SMALL)
    assert loaded.config.model.activation == activation


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("library", ["hugging_face", "open_clip"])
def test_published_sizes(library, name, tmp_path):
    activation = "quick_gelu" if library == "hugging_face" else "gelu"
    model = LIBRARIES[library](FULL[name], activation)
    assert_embeds_alike(saved(library, model, tmp_path / "model"), model, FULL[name])


def test_sharded_folders(tmp_path):
    model = libraries.hugging_face(libraries.SMALL, "gelu")
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_embeds_alike(tmp_path / "model", model, libraries.SMALL)


def test_states_of_another_library_in_a_training_state(tmp_path):
    """As open_clip's training saves it, of a model that runs on several devices."""
    model = libraries.open_clip(
        libraries.SMALL._replace(vision=(64, 2, 1), text=(64, 2, 1)), "gelu"
    )
    sizes = libraries.SMALL._replace(vision=(64, 2, 1), text=(64, 2, 1))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, path)
    assert_embeds_alike(path, model, sizes, activation="gelu")
    assert weights.open_(path, quiet).meta["epoch"] == 3


def test_archives_as_openai_makes_them_read_like_the_state(tmp_path):
    sizes = libraries.SMALL._replace(vision=(64, 3, 1), text=(64, 2, 1))
    model = libraries.open_clip(sizes, "quick_gelu")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    libraries.save_archive(model, sizes, tmp_path / "ViT.pt")
    file = weight_files.read(tmp_path / "ViT.pt")
    assert file.kind == "TorchScript"
    for name, value in state.items():
        np.testing.assert_array_equal(file.tensors[name].read(), value.numpy(), err_msg=name)
    # What open_clip says of another model in the same folder is not said of it.
    settings = model.settings | {"quick_gelu": False}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    loaded = assert_embeds_alike(tmp_path / "ViT.pt", model, sizes)
    assert loaded.config.model.activation == "quick_gelu"


def test_what_we_write_is_what_torch_reads(tmp_path, monkeypatch):
    """A conversion to OpenAI's names goes back into open_clip's own model."""
    monkeypatch.setattr(converting, "_probe", lambda source: [])
    model = libraries.open_clip(libraries.SMALL, "gelu")
    model.logit_scale.data.fill_(4.5)  # not as training begins
    folder = saved("open_clip", model, tmp_path / "model")
    converting.write(converting.examine(folder, quiet), tmp_path / "a.pt", quiet, layout="openai")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    again = libraries.open_clip(libraries.SMALL, "gelu")
    for value in again.parameters():
        value.data.zero_()
    again.load_state_dict(state)  # as strict as OpenAI's own
    assert again.logit_scale == model.logit_scale
    inputs = libraries.inputs(libraries.SMALL)
    for given, wanted in zip(
        libraries.outputs(again, *inputs), libraries.outputs(model, *inputs), strict=True
    ):
        np.testing.assert_array_equal(given, wanted)
