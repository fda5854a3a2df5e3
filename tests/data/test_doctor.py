"""Every defect the doctor knows, one by one: its verdict, its count and its example."""

import io
import json
import zlib

import miniature
import numpy as np
import pytest
from PIL import Image

from itself_jax.data import benchmarks, datasets, doctor

SIZE = (40, 20)  # not tiny
SPLITS = ("train", "val", "test")


class Patient:
    """RSTPReid in small, to be spoilt and examined."""

    def __init__(self, root, **sizes):
        self.root = root
        self.folder = miniature.write(root, "rstp_reid", image_size=SIZE, **sizes)
        self.rows = json.loads((self.folder / "data_captions.json").read_text(encoding="utf-8"))

    def path(self, index):
        return self.folder / "imgs" / self.rows[index]["img_path"]

    def first(self, split):
        return next(i for i, row in enumerate(self.rows) if row["split"] == split)

    def examine(self, **options):
        (self.folder / "data_captions.json").write_text(json.dumps(self.rows), encoding="utf-8")
        corpus = datasets.files("rstp_reid", self.root)
        return doctor.examine(corpus, log=lambda line: None, **options)


@pytest.fixture
def patient(tmp_path):
    return Patient(tmp_path)


@pytest.fixture
def as_published(patient, monkeypatch):
    """The patient, with its own counts as the published ones."""
    counts = benchmarks.counts(datasets.files("rstp_reid", patient.root))
    monkeypatch.setitem(benchmarks.PUBLISHED, "rstp_reid", counts)
    return patient


def _only(report, name, verdict, count):
    """The check, after making sure that it alone (beside the counts) found something."""
    found = {c.name for c in report.checks if c.verdict != doctor.OK}
    assert found | {"published counts"} == {name, "published counts"}
    check = report.check(name)
    assert (check.verdict, check.count) == (verdict, count)
    assert check.advice and len(check.examples) <= max(count, 1)
    return check


def _jpeg(**options):
    file = io.BytesIO()
    pixels = np.random.default_rng(9).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


# ------------------------------------------------------------------------------ counts and splits


def test_good_data_is_all_ok(as_published):
    report = as_published.examine()
    assert [check.verdict for check in report.checks] == [doctor.OK] * len(report.checks)
    assert [check.count for check in report.checks] == [0] * len(report.checks)
    assert report.verdict == doctor.OK
    assert report.splits["train"] == benchmarks.Counts(6, 12, 24)


@pytest.mark.parametrize("dataset", ["jsonl", "csv"])
def test_good_own_data_is_all_ok(dataset, tmp_path):
    miniature.write(tmp_path, dataset, image_size=SIZE)
    report = doctor.examine(datasets.files("jsonl", tmp_path), log=lambda line: None)
    assert report.verdict == doctor.OK


def test_the_published_table_is_that_of_the_papers():
    total = {
        name: [sum(column) for column in zip(*counts.values(), strict=True)]
        for name, counts in benchmarks.PUBLISHED.items()
    }
    assert total == {
        "cuhk_pedes": [13003, 40206, 80440],
        "icfg_pedes": [4102, 54522, 54522],
        "rstp_reid": [4101, 20505, 41010],
    }


def test_a_subset_is_a_warning(patient):
    check = _only(patient.examine(), "published counts", doctor.WARNING, 9)
    assert check.examples[0] == "train: 6 identities instead of 3701"
    assert "cannot be compared" in check.advice


def test_more_than_published_is_an_error(as_published):
    extra = dict(as_published.rows[0], captions=["a third picture of her", "with two captions"])
    extra["img_path"] = "0000_c9_0009.jpg"
    (as_published.folder / "imgs" / "0000_c9_0009.jpg").write_bytes(_jpeg())
    as_published.rows.append(extra)
    check = _only(as_published.examine(), "published counts", doctor.ERROR, 2)
    expected = ("train: 13 images instead of 12", "train: 26 captions instead of 24")
    assert check.examples == expected


def test_a_val_of_ones_own_counts_as_train_for_icfg(tmp_path, monkeypatch):
    folder = miniature.write(tmp_path, "icfg_pedes", image_size=SIZE)
    counts = benchmarks.counts(datasets.files("icfg_pedes", tmp_path))
    monkeypatch.setitem(benchmarks.PUBLISHED, "icfg_pedes", counts)
    path = folder / "ICFG-PEDES.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows[:2]:
        row["split"] = "val"
    path.write_text(json.dumps(rows), encoding="utf-8")
    report = doctor.examine(datasets.files("icfg_pedes", tmp_path), log=lambda line: None)
    assert report.check("published counts").verdict == doctor.OK
    assert report.check("drawn splits").count == 0


def test_held_out_identities_of_icfg_are_told_and_fine(tmp_path):
    miniature.write(tmp_path, "icfg_pedes", image_size=SIZE)
    report = doctor.examine(datasets.files("icfg_pedes", tmp_path), log=lambda line: None)
    check = report.check("drawn splits")
    assert (check.verdict, check.count) == (doctor.OK, 1)
    assert check.advice.endswith("seed 0 (train 5, val 1, test 3)")
    assert set(report.splits) == {"train", "test"}


def _own(tmp_path, change):
    miniature.write(tmp_path, "jsonl", image_size=SIZE)
    path = tmp_path / "pictures.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if change(row) is not False]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return doctor.examine(datasets.files("jsonl", tmp_path), log=lambda line: None)


def test_own_data_without_splits_is_a_warning(tmp_path):
    report = _own(tmp_path, lambda row: row.update(split=""))
    check = _only(report, "drawn splits", doctor.WARNING, 22)
    assert "(train 9, val 1, test 1)" in check.advice


def test_too_few_identities_to_draw_splits_is_an_error(tmp_path):
    def change(row):
        row["split"] = ""
        return row["id"] in ("person-0", "person-1")

    check = _own(tmp_path, change).check("drawn splits")
    assert (check.verdict, check.count) == (doctor.ERROR, 1)
    assert "has 2 identities and no split" in check.advice


def test_empty_split_is_an_error_and_for_own_data_a_warning(patient, tmp_path):
    patient.rows = [row for row in patient.rows if row["split"] != "val"]
    check = _only(patient.examine(), "empty splits", doctor.ERROR, 1)
    assert check.examples == ("val",)
    report = _own(tmp_path / "own", lambda row: row["split"] == "test")
    assert _only(report, "empty splits", doctor.WARNING, 2).examples == ("train", "val")


# --------------------------------------------------------------------------------------- pictures


def test_missing_images_are_counted_with_their_folders_and_spelling(tmp_path):
    folder = miniature.write(tmp_path, "cuhk_pedes", image_size=SIZE)
    for path in (folder / "imgs" / "Market").iterdir():
        path.unlink()
    (folder / "imgs" / "CUHK01" / "0001001.png").rename(folder / "imgs/CUHK01/0001001.PNG")
    report = doctor.examine(datasets.files("cuhk_pedes", tmp_path), log=lambda line: None)
    check = _only(report, "missing images", doctor.ERROR, 9)
    assert check.examples[0] == "CUHK01/0001001.png (there is CUHK01/0001001.PNG)"
    assert "the folders Market are missing entirely" in check.advice
    assert "1 are there in another spelling" in check.advice
    assert report.verdict == doctor.ERROR


def test_links_out_of_the_folder_are_an_error(patient, tmp_path):
    patient.path(3).rename(tmp_path / "elsewhere.jpg")
    patient.path(3).symlink_to(tmp_path / "elsewhere.jpg")
    check = _only(patient.examine(), "links out of the folder", doctor.ERROR, 1)
    assert check.examples == (patient.rows[3]["img_path"],)


@pytest.mark.parametrize(
    ("content", "problem", "message"),
    [
        (b"", "1 empty", "is an empty file"),
        (_jpeg()[:-300], "1 truncated", "cannot be read as an image"),
        (b"<html>404</html>", "1 no image", "fits no image format"),
        (_jpeg()[:2] + b"\0" * 500, "1 no image", "fits no image format"),
    ],
)
def test_unreadable_images_are_an_error(patient, content, problem, message):
    patient.path(5).write_bytes(content)
    check = _only(patient.examine(), "unreadable images", doctor.ERROR, 1)
    assert check.advice.startswith(f"{problem}:")
    assert str(patient.path(5)) in check.examples[0] and message in check.examples[0]


def test_truncated_png_is_an_error(tmp_path):
    folder = miniature.write(tmp_path, "cuhk_pedes", image_size=SIZE)
    path = folder / "imgs" / "CUHK01" / "0001001.png"
    path.write_bytes(path.read_bytes()[:-200])
    report = doctor.examine(datasets.files("cuhk_pedes", tmp_path), log=lambda line: None)
    check = _only(report, "unreadable images", doctor.ERROR, 1)
    assert check.advice.startswith("1 truncated:") and str(path) in check.examples[0]


def test_a_folder_in_the_place_of_a_picture_is_unreadable(patient):
    patient.path(5).unlink()
    patient.path(5).mkdir()
    check = _only(patient.examine(), "unreadable images", doctor.ERROR, 1)
    assert check.advice.startswith("1 unreadable:")


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_a_decompression_bomb_is_an_error(patient, format_):
    """Only the header says 20,000 x 20,000: the refusal must come before any pixel."""
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, format_)
    content = bytearray(file.getvalue())
    if format_ == "PNG":  # width and height of IHDR, then its checksum
        content[16:24] = (20000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else:  # height and width after SOF0, its length and its precision
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = (20000).to_bytes(2, "big") * 2
    patient.path(5).write_bytes(content)
    check = _only(patient.examine(), "unreadable images", doctor.ERROR, 1)
    assert check.advice.startswith("1 too large:")
    assert "400000000 pixels" in check.examples[0]


def test_modes_other_than_rgb_are_a_warning(patient):
    rng = np.random.default_rng(1)
    for index, mode in enumerate(["L", "CMYK", "RGBA", "P", "I;16", "1", "LA"]):
        pixels = Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8))
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 60000, SIZE).astype(np.uint16))
        else:
            image = pixels.convert(mode)
        file = io.BytesIO()
        image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
        patient.path(index).write_bytes(file.getvalue())  # PIL goes by content, not by name
    check = _only(patient.examine(), "images not RGB", doctor.WARNING, 7)
    assert check.advice.startswith("1 1, 1 CMYK, 1 I;16, 1 L, 1 LA, 1 P, 1 RGBA: converted as PIL")


def test_exif_rotation_is_a_warning(patient):
    exif = Image.Exif()
    exif[0x0112] = 6
    patient.path(2).write_bytes(_jpeg(exif=exif))
    exif[0x0112] = 1  # upright: nothing to say
    with Image.open(patient.path(3)) as image:
        image.load()
        image.save(patient.path(3), exif=exif)
    check = _only(patient.examine(), "images rotated by EXIF", doctor.WARNING, 1)
    assert check.examples == (patient.rows[2]["img_path"],)


def test_animated_images_are_a_warning(patient):
    frames = [Image.new("RGB", SIZE[::-1], (40 * n, 0, 0)) for n in range(3)]
    frames[0].save(patient.path(2), "PNG", save_all=True, append_images=frames[1:])
    check = _only(patient.examine(), "animated images", doctor.WARNING, 1)
    assert check.examples == (patient.rows[2]["img_path"],)


@pytest.mark.parametrize(("size", "count"), [((31, 16), 1), ((32, 15), 1), ((32, 16), 0)])
def test_tiny_images_are_a_warning(patient, size, count):
    Image.new("RGB", size[::-1], (9, 8, 7)).save(patient.path(2))
    assert patient.examine().check("tiny images").count == count


def test_the_same_picture_in_two_splits_is_an_error(patient):
    train, test = patient.first("train"), patient.first("test")
    patient.path(test).write_bytes(patient.path(train).read_bytes())
    check = _only(patient.examine(), "images in two splits", doctor.ERROR, 1)
    names = [patient.rows[index]["img_path"] for index in (train, test)]
    assert check.examples == (f"{names[0]} = {names[1]} (test, train)",)


def test_in_the_published_files_a_leak_is_only_told(as_published):
    train, test = as_published.first("train"), as_published.first("test")
    as_published.path(test).write_bytes(as_published.path(train).read_bytes())
    check = _only(as_published.examine(), "images in two splits", doctor.WARNING, 1)
    assert "the published files have them" in check.advice


def test_a_leak_into_the_drawn_val_is_found(tmp_path):
    miniature.write(tmp_path, "icfg_pedes", image_size=SIZE)
    corpus = datasets.files("icfg_pedes", tmp_path)
    val = datasets.read("icfg_pedes", tmp_path, "val")
    train = datasets.read("icfg_pedes", tmp_path, "train")
    with open(val.images.name(0), "wb") as file:
        file.write(train.images.content(0))
    report = doctor.examine(corpus, log=lambda line: None)
    check = _only(report, "images in two splits", doctor.ERROR, 1)
    assert "(train, val)" in check.examples[0]


def test_the_same_picture_of_two_identities_is_a_warning(patient):
    patient.path(2).write_bytes(patient.path(0).read_bytes())
    check = _only(patient.examine(), "images of two identities", doctor.WARNING, 1)
    assert check.examples == ("0000_c1_0000.jpg = 0001_c1_0000.jpg",)


def test_the_same_picture_twice_is_a_warning(patient):
    patient.path(1).write_bytes(patient.path(0).read_bytes())
    _only(patient.examine(), "duplicate images", doctor.WARNING, 1)


# ------------------------------------------------------------------------- identities and captions


def test_an_identity_in_two_splits_is_an_error(patient):
    patient.rows[1]["split"] = "test"
    check = _only(patient.examine(), "identities in two splits", doctor.ERROR, 1)
    assert check.examples == ("0 (test, train)",)


def test_an_identity_with_one_pair_is_a_warning(tmp_path):
    patient = Patient(tmp_path, images_per_identity=1)
    patient.rows[4]["captions"] = patient.rows[4]["captions"][:1]
    check = _only(patient.examine(), "identities with one pair", doctor.WARNING, 1)
    assert check.examples == ("4",)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_captions_are_a_warning(patient, text):
    patient.rows[3]["captions"][1] = text
    check = _only(patient.examine(), "empty captions", doctor.WARNING, 1)
    assert check.examples == (patient.rows[3]["img_path"],)


@pytest.mark.parametrize("text", ["...", "\N{SLIGHTLY SMILING FACE}"])
def test_captions_without_words_are_a_warning(patient, text):
    patient.rows[3]["captions"][1] = text
    _only(patient.examine(), "captions without words", doctor.WARNING, 1)


def test_captions_cut_say_how_many_and_by_how_much(patient):
    # One id per word, SOT and EOT: 75 words fit 77 ids; 76 and 90 words lose 1 and 15.
    for index, words in enumerate((75, 76, 90)):
        patient.rows[index]["captions"][0] = f"{'man ' * (words - 1)}{'abc'[index]}"
    check = _only(patient.examine(), "captions cut", doctor.WARNING, 2)
    assert check.advice.startswith("cut at 77 tokens: 8.0 lost on average, 15 at most (longest: 92")
    assert check.examples[1].endswith("(15 of 92 lost)")
    report = patient.examine(text_length=92)
    assert report.check("captions cut").verdict == doctor.OK and report.text_length == 92


def test_a_caption_repeated_in_a_record_is_a_warning(patient):
    patient.rows[3]["captions"] = ["A man  waits.", "a man waits."]
    check = _only(patient.examine(), "captions repeated in a record", doctor.WARNING, 1)
    assert check.examples == (patient.rows[3]["img_path"],)


def test_one_caption_for_two_people_is_a_warning(patient):
    for index in (0, 2, 4):
        patient.rows[index]["captions"][0] = "A man walks."
    check = _only(patient.examine(), "captions of two identities", doctor.WARNING, 1)
    assert check.examples == ("'a man walks.' (3 identities)",)
    assert check.advice.startswith("3 captions say the same")


def test_the_same_caption_in_two_splits_is_fine(as_published):
    for split in ("train", "test"):
        as_published.rows[as_published.first(split)]["captions"][0] = "A man walks."
    assert as_published.examine().verdict == doctor.OK


@pytest.mark.parametrize(
    "text",
    [
        "a caf\N{REPLACEMENT CHARACTER} door",
        "a caf\u00c3\u00a9 door",  # UTF-8 read as Latin-1
        "the man\u00e2\u20ac\u2122s bag",  # UTF-8 read as Windows-1252
        "a \x93red\x94 coat",
        "half \ud83d",
    ],
)
def test_encoding_damage_is_a_warning(patient, text):
    patient.rows[3]["captions"][0] = text
    _only(patient.examine(), "encoding damage", doctor.WARNING, 1)


def test_honest_letters_are_no_damage(as_published):
    texts = ["un caf\u00e9 tr\u00e8s fra\u00eeche", "\u4e00\u4e2a\u7537\u4eba", "the man\u2019s"]
    for index, text in enumerate(texts):
        as_published.rows[index]["captions"][0] = text
    assert as_published.examine().verdict == doctor.OK


@pytest.mark.parametrize("text", ["a\x00b", "jekyll <|mask|>", "a man <|endoftext|> and more"])
def test_control_characters_and_special_tokens_are_a_warning(patient, text):
    patient.rows[3]["captions"][0] = text
    _only(patient.examine(), "control characters", doctor.WARNING, 1)


# ----------------------------------------------------------------------------------------- report


def test_the_table_is_aligned_and_shows_three_examples(patient):
    for index in range(4):
        patient.path(index).unlink()
    patient.rows[6]["captions"][0] = ""
    report = patient.examine()
    lines = report.table().splitlines()
    assert lines[0] == f"rstp_reid: {patient.folder}/data_captions.json"
    assert lines[3].split() == ["train", "6", "12", "24", "3701", "/", "18505", "/", "37010"]
    head = next(line for line in lines if line.startswith("CHECK"))
    at = lines.index("    " + ", ".join(row["img_path"] for row in patient.rows[:3]) + ", ...")
    assert lines[at - 1].startswith("missing images ")
    for name, verdict in (("missing images", "error"), ("empty captions", "warning")):
        line = next(line for line in lines if line.startswith(name))
        assert line.index(verdict) == head.index("VERDICT")
        assert line.index(report.check(name).advice) == head.index("WHAT TO DO")
    assert lines[-1] == "Errors: 1. Warnings: 2."


def test_the_report_as_json_holds_every_check(patient):
    patient.path(0).unlink()
    found = json.loads(json.dumps(patient.examine().to_json()))
    assert found["dataset"] == "rstp_reid" and found["verdict"] == "error"
    assert found["splits"]["val"] == {"identities": 2, "images": 4, "captions": 8}
    assert found["published"]["val"] == {"identities": 200, "images": 1000, "captions": 2000}
    check = next(check for check in found["checks"] if check["name"] == "missing images")
    assert (check["verdict"], check["count"]) == ("error", 1)
    assert check["examples"] == ["0000_c1_0000.jpg"]


def test_any_number_of_threads_finds_the_same(tmp_path):
    patient = Patient(tmp_path, identities=(20, 5, 5), images_per_identity=4)  # more than one chunk
    patient.path(70).write_bytes(b"")
    patient.path(5).write_bytes(_jpeg()[:-300])
    one, four = patient.examine(num_threads=1), patient.examine(num_threads=4)
    assert one == four and one.check("unreadable images").count == 2


def test_the_table_shortens_what_the_file_has_in_full(tmp_path):
    check = doctor.Check("duplicate images", doctor.WARNING, 1, "look", ("x" * 500,))
    report = doctor.Report("jsonl", "own.jsonl", 77, {}, (check,))
    assert max(map(len, report.table().splitlines())) <= 90
    assert report.to_json()["checks"][0]["examples"] == ("x" * 500,)
