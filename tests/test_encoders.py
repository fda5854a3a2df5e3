"""The library's door: a path in, embeddings out."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import published
import pytest
from PIL import Image

import itself_jax
from itself_jax import config as config_lib
from itself_jax import encoders, fitting, weight_files, weights
from itself_jax.data import records

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = published.TINY._replace(vocab=49408)
SENTENCES = [
    "a man in a red jacket",
    "she carries a white bag over her left shoulder and wears blue shoes and a hat",
    "boots",
    "a boy with a green umbrella",
    "two people",
]


def quiet(line):
    del line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = published.write(tmp_path_factory.mktemp("model") / "best.pth", WORDS)
    return itself_jax.load(path, batch_size=4, image_size=(32, 16), log=quiet)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 20 + i, 3)).astype(np.uint8) for i in range(5)]


def test_embeddings_are_named_float32_arrays(model, pictures):
    image, text = model.encode_image(pictures), model.encode_text(SENTENCES)
    for embedding in (image, text):
        assert embedding.global_.shape == (5, 16) and embedding.local.shape == (5, 24)
        for array in embedding:
            assert isinstance(array, np.ndarray) and array.dtype == np.float32
            assert np.isfinite(array).all() and np.ptp(array, axis=0).max() > 0


def test_neighbours_and_padding_do_not_matter(model, pictures):
    """Five rows in batches of four; one row alone; the rows in another order."""
    for encode, rows in ((model.encode_image, pictures), (model.encode_text, SENTENCES)):
        together = encode(rows)
        for i in (0, 4):
            alone = encode(rows[i : i + 1])
            for one, all_of_them in zip(alone, together, strict=True):
                np.testing.assert_allclose(one[0], all_of_them[i], rtol=2e-5, atol=2e-6)
        backwards = encode(rows[::-1])
        for one, other in zip(backwards, together, strict=True):
            np.testing.assert_allclose(one[::-1], other, rtol=2e-5, atol=2e-6)


def test_a_picture_may_be_a_file_an_image_or_an_array(model, pictures, tmp_path):
    image = Image.fromarray(pictures[0])
    image.save(tmp_path / "a picture.png")
    forms = [tmp_path / "a picture.png", str(tmp_path / "a picture.png"), image, pictures[0]]
    rows = model.encode_image(forms).global_
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=2e-5, atol=2e-6)
    other = model.encode_image([pictures[1], *forms[1:]]).global_
    assert np.abs(other[0] - rows[0]).max() > 1e-3


def test_transparent_and_grey_pictures_are_made_rgb(model):
    grey = Image.new("L", (16, 32), 77)
    clear = Image.new("RGBA", (16, 32), (77, 77, 77, 0))
    rows = model.encode_image([grey, clear, Image.new("RGB", (16, 32), (77, 77, 77))]).global_
    np.testing.assert_allclose(rows[0], rows[2], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(rows[1], rows[2], rtol=2e-5, atol=2e-6)


def test_nothing_gives_nothing(model):
    for embedding in (model.encode_image([]), model.encode_text([])):
        assert embedding.global_.shape == (0, 16) and embedding.local.shape == (0, 24)


@pytest.mark.parametrize(
    "method, argument, message",
    [
        ("encode_image", "picture.png", "takes a list of pictures"),
        ("encode_image", Image.new("RGB", (2, 2)), "takes a list of pictures"),
        ("encode_image", [np.zeros((4, 4, 3))], r"picture 0 is an array of float64 \[4, 4, 3\]"),
        ("encode_image", [np.zeros((4, 4), np.uint8)], r"picture 0 is an array of uint8 \[4, 4\]"),
        ("encode_image", [Image.new("L", (2, 2)), 7], "picture 1 is int"),
        ("encode_text", "a man", "takes a list of sentences"),
        ("encode_text", ["a man", None], "sentence 1 is NoneType"),
    ],
)
def test_other_things_are_refused_by_name(model, method, argument, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(argument)


def test_files_that_are_no_pictures_are_named(model, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(records.DataError, match=r"text\.jpg"):
        model.encode_image([tmp_path / "text.jpg"])
    with pytest.raises(records.DataError, match=r"picture 0, .*missing\.jpg, cannot be read"):
        model.encode_image([tmp_path / "missing.jpg"])


def test_sentences_need_the_whole_vocabulary(tmp_path):
    path = published.write(tmp_path / "best.pth")
    small = itself_jax.load(path, image_size=(32, 16), log=quiet)
    with pytest.raises(records.DataError, match="vocab_size=64"):
        small.encode_text(["a man"])


def test_a_clip_without_local_branch_has_no_local_embedding():
    log = []
    model = itself_jax.load(GOLDEN / "hugging_face", image_size=(32, 32), log=log.append)
    picture = np.full((8, 8, 3), 9, np.uint8)
    assert model.encode_image([picture]).local is None
    assert model.encode_image([]).local is None
    assert model.config.model.text_length == 16
    assert any("global embedding alone" in line for line in log)


def test_heads_that_a_file_does_not_say_are_asked_for_by_their_names_here(tmp_path):
    """The golden model without its settings: 48 and 32 are no multiples of 64."""
    path = tmp_path / "weights.bin"
    path.write_bytes((GOLDEN / "open_clip" / "open_clip_pytorch_model.bin").read_bytes())
    with pytest.raises(
        config_lib.ConfigError,
        match=r"width 48 .*; set vision_heads \(on a command line --vision_h",
    ):
        itself_jax.load(path, image_size=(32, 32), log=quiet)
    with pytest.raises(config_lib.ConfigError, match=r"width 32 .*; set text_heads"):
        itself_jax.load(path, image_size=(32, 32), vision_heads=4, log=quiet)
    given = {"vision_heads": 4, "text_heads": 4, "activation": "gelu"}
    model = itself_jax.load(path, image_size=(32, 32), log=quiet, **given)
    with np.load(GOLDEN / "open_clip" / "outputs.npz") as file:
        ids, expected = jnp.asarray(file["ids"]), file["text"]
    encoded = model.training.model.apply(model.variables, ids, method="encode_text")
    error = np.abs(encoded.embedding.global_ - expected).max()
    assert error <= 2e-5 * np.abs(expected).max()


def test_a_model_knows_its_fusion_weight_and_where_it_comes_from(model, tmp_path):
    assert model.alpha is None and model.meta["epoch"] == 3
    assert model.source.name == "best.pth" and model.kind == "torch.save (zip), ITSELF"
    note = {"itself_jax": json.dumps({"best_alpha": 0.3})}
    for name, local, alpha in (("whole", True, 0.3), ("clip", False, 1.0)):
        path = tmp_path / f"{name}.pth"
        weight_files.write_torch(path, published.state(WORDS, local=local), extra=note)
        assert itself_jax.load(path, image_size=(32, 16), log=quiet).alpha == alpha


@pytest.mark.parametrize("folder", ["hugging_face", "open_clip"])
def test_embeddings_are_those_of_the_library_that_wrote_the_file(folder):
    """`outputs.npz` is what transformers and open_clip computed with these weights."""
    model = itself_jax.load(GOLDEN / folder, image_size=(32, 32), log=quiet)
    with np.load(GOLDEN / folder / "outputs.npz") as file:
        expected = {name: file[name] for name in file.files}
    apply = model.training.model.apply
    for method, given, wanted in (("image", "pictures", "image"), ("text", "ids", "text")):
        encoded = apply(model.variables, jnp.asarray(expected[given]), method=f"encode_{method}")
        error = np.abs(encoded.embedding.global_ - expected[wanted]).max()
        assert error <= 2e-5 * np.abs(expected[wanted]).max()


def test_the_settings_of_a_run_apply_to_its_weights(tmp_path):
    found = weights.open_(published.write(tmp_path / "best.pth"), quiet)
    made_with = config_lib.replace(
        config_lib.Config(),
        found.sizes
        | {
            "model.image_size": (32, 16),
            "model.text_length": 16,
            "local.inference_saliency": "mars",
        },
    )
    config = fitting.resolve(made_with, found, quiet, training=False)
    ready = encoders.of_weights(found, config, quiet)
    assert ready.config.local.inference_saliency == "mars"
    assert ready.encode_image([np.zeros((4, 4, 3), np.uint8)]).local.shape == (1, 24)
