"""Decoding is PIL's, pixel for pixel, whatever the file; damage is named."""

import io
import pickle
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from itself_jax.data import images, records

SIZE = (24, 16)


def _picture(height, width, channels=3):
    """Blocks of colour under noise: every block, edge and subsampling rule leaves its mark."""
    rng = np.random.default_rng(height * 1000 + width)
    blocks = rng.integers(0, 230, (height // 8 + 1, width // 8 + 1, channels))
    picture = np.kron(blocks, np.ones((8, 8, 1), int))[:height, :width]
    return (picture + rng.integers(0, 25, picture.shape)).astype(np.uint8)


def _encoded(picture, form, mode=None, **options):
    if picture.shape[-1] == 1:
        picture = picture[:, :, 0]
    content = io.BytesIO()
    image = Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(content, form, **options)
    return content.getvalue()


def _as_pil(content, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            shape = (size[1], size[0])
            return np.asarray(image.convert("RGB").resize(shape, Image.Resampling.BILINEAR))


def _check(content, size):
    pixels = images.decode(content, "name", size)
    assert pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(pixels, _as_pil(content, size))


def _jpegs():
    """(name, file bytes) of every kind of JPEG that PIL and simplejpeg can write."""
    shapes = [(1, 1), (7, 5), (8, 8), (16, 16), (17, 33), (61, 48), (100, 37)]
    for height, width in shapes:
        picture = _picture(height, width)
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            for quality in (30, 95):
                yield (
                    f"{height}x{width} {subsampling} {quality}",
                    _encoded(picture, "JPEG", subsampling=subsampling, quality=quality),
                )
        for subsampling in ("440", "411", "420", "422", "444", "Gray"):
            yield (
                f"{height}x{width} turbo {subsampling}",
                simplejpeg.encode_jpeg(picture, colorsubsampling=subsampling),
            )
        for options in (
            dict(progressive=True),
            dict(progressive=True, subsampling="4:4:4"),
            dict(optimize=True),
            dict(restart_marker_blocks=2),
            dict(keep_rgb=True),
            dict(comment="hello"),
            dict(icc_profile=b"no profile at all"),
            dict(dpi=(72, 72)),
        ):
            yield f"{height}x{width} {options}", _encoded(picture, "JPEG", **options)
        yield f"{height}x{width} grey", _encoded(picture, "JPEG", "L")
        yield f"{height}x{width} grey progressive", _encoded(picture, "JPEG", "L", progressive=True)
        yield f"{height}x{width} CMYK", _encoded(picture, "JPEG", "CMYK")


def test_every_kind_of_jpeg_is_pil_s_pixel_for_pixel():
    names = []
    for name, content in _jpegs():
        names.append(name)
        with Image.open(io.BytesIO(content)) as image:
            own = image.size[::-1]
        for size in (own, SIZE, (3, 50)):
            try:
                _check(content, size)
            except AssertionError as error:
                raise AssertionError(f"{name} at {size}") from error
    assert len(names) == len(set(names)) == 175


def test_jpegs_of_cameras_take_the_fast_way(monkeypatch):
    # Else the test above would compare PIL with itself.
    monkeypatch.setattr(images, "_decode_any", lambda content: pytest.fail("PIL was asked"))
    picture = _picture(61, 48)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for progressive in (False, True):
            content = _encoded(picture, "JPEG", subsampling=subsampling, progressive=progressive)
            images.decode(content, "name", SIZE)
    images.decode(_encoded(picture, "JPEG", "L"), "name", SIZE)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_not_applied(orientation):
    picture = _picture(16, 40)
    content = _encoded(picture, "JPEG", exif=_exif(orientation))
    np.testing.assert_array_equal(
        images.decode(content, "name", (16, 40)),
        images.decode(_encoded(picture, "JPEG"), "name", (16, 40)),
    )
    _check(content, SIZE)


@pytest.mark.parametrize(
    ("form", "modes"),
    [
        ("PNG", "RGB L P RGBA LA 1"),
        ("TIFF", "RGB L P RGBA LA 1 CMYK F"),
        ("WEBP", "RGB L P RGBA LA 1"),
        ("GIF", "RGB L P RGBA LA 1"),
        ("BMP", "RGB L P RGBA 1"),
        ("PPM", "RGB L RGBA 1"),
    ],
)
def test_other_formats_are_converted_as_pil_does(form, modes):
    for mode in modes.split():
        _check(_encoded(_picture(31, 22, 4), form, mode), SIZE)


def test_sixteen_bits_are_converted_as_pil_does():
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, "PNG")
    with Image.open(content) as image:
        assert image.mode.startswith("I;16")
    _check(content.getvalue(), SIZE)


def test_transparent_palette_warns_nobody():
    # PIL warns when it converts one; warnings are errors here.
    image = Image.fromarray(_picture(31, 22)).quantize(16)
    content = io.BytesIO()
    image.save(content, "PNG", transparency=bytes(range(0, 256, 16)))
    with Image.open(content) as image:
        assert isinstance(image.info["transparency"], bytes)
    _check(content.getvalue(), SIZE)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form):
    first, second = (Image.fromarray(np.full((20, 10, 3), value, np.uint8)) for value in (40, 200))
    content = io.BytesIO()
    first.save(content, form, save_all=True, append_images=[second])
    pixels = images.decode(content.getvalue(), "name", SIZE)
    assert abs(int(pixels.mean()) - 40) < 3
    _check(content.getvalue(), SIZE)


def test_size_is_height_and_width():
    content = _encoded(np.full((5, 7, 1), 200, np.uint8), "PNG")
    pixels = images.decode(content, "name", (6, 4))
    assert pixels.shape == (6, 4, 3) and (pixels == 200).all()


def test_shrinking_antialiases():
    stripes = np.repeat(np.asarray([[0, 0, 0, 0, 255, 255, 255, 255]] * 2, np.uint8), 3)
    content = _encoded(stripes.reshape(2, 8, 3), "PNG")
    # Output 0 lies at 2.0 of the input (pixel centres 0.5, 1.5, ...) and weighs its pixels by
    # 1 - distance/4: dark .625 + .875 + .875 + .625 = 3, bright .375 + .125 = .5, so
    # 255 * .5 / 3.5 = 36.4. Without antialiasing it would be 0.
    np.testing.assert_array_equal(images.decode(content, "name", (2, 2))[0, :, 0], [36, 219])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-40],
        lambda content: content[: len(content) // 2] + b"\xff\xd9",  # with an end marker
        lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
        lambda content: content[:200],
    ],
    ids=["half", "nearly all", "half and an end", "half and zeros", "header"],
)
def test_truncated_jpeg_is_an_error_and_never_grey(damage, mode, progressive):
    content = _encoded(_picture(96, 80), "JPEG", mode, progressive=progressive)
    images.decode(content, "good.jpg", SIZE)
    with pytest.raises(records.DataError, match=r"^a/bad\.jpg cannot be read as an image \(.*rest"):
        images.decode(damage(content), "a/bad.jpg", SIZE)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_other_truncated_files_are_errors(form):
    content = _encoded(_picture(96, 80), form)
    with pytest.raises(records.DataError, match="bad cannot be read as an image"):
        images.decode(content[: len(content) * 2 // 3], "bad", SIZE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"not an image", "its content fits no image format")],
)
def test_what_is_no_image_is_an_error(content, reason):
    with pytest.raises(records.DataError, match=rf"x\.jpg cannot be read as an image .*: {reason}"):
        images.decode(content, "x.jpg", SIZE)


def test_tail_and_flaw_that_pil_tolerates_are_tolerated():
    content = _encoded(_picture(40, 30), "JPEG", progressive=True)
    _check(content + b"a tail of a camera", SIZE)
    junk = content[:-2] + b"junk" * 100 + content[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(junk)
    _check(junk, SIZE)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused(form, monkeypatch):
    content = _encoded(_picture(40, 30), form)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    images.decode(content, "bomb", SIZE)  # PIL's error limit is twice its limit: 1200 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(
        records.DataError, match=r"^bomb is refused as a decompression bomb .*1200 pixels.*; repl"
    ):
        images.decode(content, "bomb", SIZE)


def test_twenty_thousand_squared_is_refused_without_decoding():
    # A header is enough for the size; nothing of the 1.2 GB may be allocated.
    content = bytearray(_encoded(_picture(8, 8), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(records.DataError, match="big is refused as .* bomb .*400000000 pixels"):
        images.decode(bytes(content), "big", SIZE)


@pytest.fixture
def files(tmp_path):
    names = [f"a b/{n}.png" for n in range(3)]
    (tmp_path / "a b").mkdir()
    for n, name in enumerate(names):
        Image.fromarray(np.full((4, 3, 3), 50 * n, np.uint8)).save(tmp_path / name)
    return images.ImageFiles(tmp_path, names)


def test_image_files_give_name_pixels_and_content(files, tmp_path):
    assert len(files) == 3
    path = tmp_path / "a b" / "2.png"
    assert files.name(2) == str(path)
    assert files.content(2) == path.read_bytes()
    assert (files.load(2, SIZE) == 100).all() and files.load(2, SIZE).shape == (*SIZE, 3)


def test_subset_and_pickled_copy_read_the_same(files):
    chosen = pickle.loads(pickle.dumps(files.subset([2, 0, 2])))
    assert [chosen.name(i) for i in range(len(chosen))] == [files.name(i) for i in (2, 0, 2)]
    assert [int(chosen.load(i, SIZE)[0, 0, 0]) for i in range(3)] == [100, 0, 100]


@pytest.mark.parametrize("damage", ["missing", "folder", "empty"])
def test_image_file_that_cannot_be_read_is_named(files, tmp_path, damage):
    path = tmp_path / "a b" / "1.png"
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "empty":
        path.touch()
    with pytest.raises(records.DataError, match=r"a b/1\.png cannot be read as an image .*restore"):
        files.load(1, SIZE)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 4, 50])
def test_ahead_keeps_the_order_and_its_depth(depth, num_threads):
    started = []

    def square(item):
        started.append(item)
        return item * item

    results = images.ahead(square, range(20), depth=depth, num_threads=num_threads)
    for item in range(20):
        assert next(results) == item * item
        assert len(started) <= min(item + 1 + depth, 20)
    assert next(results, None) is None and sorted(started) == list(range(20))


def test_ahead_raises_where_the_result_would_be():
    results = images.ahead(lambda item: 6 // item, [3, 0, 2], depth=3, num_threads=2)
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
