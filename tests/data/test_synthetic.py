"""The embedded data set: reproducible, in RSTPReid's form, truthful, neither easy nor hopeless."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from itself_jax.data import synthetic, synthetic_brush, synthetic_captions, synthetic_people

SIZES = (6, 3, 6)
ROOT = pathlib.Path(synthetic.__file__).resolve().parents[2]


def _silent(_: str) -> None:
    pass


def _build(root: pathlib.Path, **options) -> pathlib.Path:
    settings = {"identities": SIZES, "images_per_identity": 2, "workers": 1, "log": _silent}
    return synthetic.ensure(root, **{**settings, **options})


def _bytes(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return _build(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def world() -> synthetic.World:
    return synthetic.imagine(0, (400, 50, 150), 4)  # the default data set, without its pictures


def _read(folder: pathlib.Path, name: str):
    return json.loads((folder / name).read_text())


# ------------------------------------------------------------------------------ reproducible


def test_same_seed_gives_the_same_bytes_for_any_number_of_workers(folder, tmp_path):
    assert _bytes(_build(tmp_path / "again")) == _bytes(folder)
    assert _bytes(_build(tmp_path / "two", workers=2)) == _bytes(folder)


def test_another_seed_gives_other_pictures_and_captions(folder, tmp_path):
    other = _build(tmp_path, seed=1)
    assert other.name != folder.name
    ours, theirs = _bytes(folder), _bytes(other)
    assert ours["data_captions.json"] != theirs["data_captions.json"]
    pictures = {data for name, data in ours.items() if name.startswith("imgs/")}
    assert pictures.isdisjoint(data for name, data in theirs.items() if name.startswith("imgs/"))


def test_folder_name_carries_version_seed_and_sizes(folder):
    assert folder.name == f"synthetic-v{synthetic.VERSION}-seed0-6-3-6-x2"


# ------------------------------------------------------------------------------------ records


def test_records_have_the_form_of_rstpreid(folder):
    records = _read(folder, "data_captions.json")
    assert len(records) == sum(SIZES) * 2
    assert all(set(r) == {"id", "img_path", "captions", "split"} for r in records)
    assert all(len(r["captions"]) == 2 for r in records)
    for record in records:
        with Image.open(folder / "imgs" / record["img_path"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (80, 192))
    ids = {split: {r["id"] for r in records if r["split"] == split} for split in synthetic.SPLITS}
    assert [len(ids[split]) for split in synthetic.SPLITS] == list(SIZES)
    assert set.union(*ids.values()) == set(range(sum(SIZES)))
    assert {p.name for p in (folder / "imgs").iterdir()} == {r["img_path"] for r in records}


def test_default_sizes_give_the_promised_counts(world):
    records = world.records
    by_split = {s: sum(r["split"] == s for r in records) for s in synthetic.SPLITS}
    assert by_split == {"train": 1600, "val": 200, "test": 600}


# ------------------------------------------------------------------------------------- people


def test_members_of_a_family_differ_in_one_or_two_attributes_that_are_its_details():
    for number in range(60):
        members = synthetic_people.family(np.random.default_rng(number), number)
        assert len(members) == 3
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = members[i].attributes, members[j].attributes
            differing = {name for name in synthetic_people.ATTRIBUTES if a[name] != b[name]}
            assert 1 <= len(differing) <= 2
            assert differing <= set(members[i].details)


def test_families_never_straddle_splits():
    # 4 identities cut the second family of three; its rest must not turn up in val.
    people = synthetic.imagine(0, (4, 2, 5), 1).attributes["identities"]
    splits = [{p["split"] for p in people if p["family"] == f} for f in range(5)]
    assert splits == [{"train"}, {"train"}, {"val"}, {"test"}, {"test"}]


def test_every_identity_has_all_attributes(world):
    assert len(synthetic_people.ATTRIBUTES) >= 12
    for person in world.attributes["identities"]:
        assert list(person["attributes"]) == synthetic_people.ATTRIBUTES


# ----------------------------------------------------------------------------------- captions


def _vocabulary(name: str, value: str) -> list[tuple[str, ...]]:
    """Groups of words, of each of which the phrase must hold one; written out independently."""
    if value == "none":
        return [("no ",)]
    synonyms = {
        "grey": ("grey", "gray"),
        "purple": ("purple", "violet"),
        "blond": ("blond", "fair"),
        "man": ("man", "gentleman"),
        "woman": ("woman", "lady"),
        "slim": ("slim", "thin"),
        "stocky": ("stocky", "heavy-set"),
        "t-shirt": ("t-shirt", "tee"),
        "sweater": ("sweater", "pullover"),
        "hoodie": ("hoodie", "hooded sweatshirt"),
        "trousers": ("trousers", "pants"),
        "shorts": ("shorts", "short pants"),
        "sneakers": ("sneakers", "trainers", "sports shoes"),
        "beanie": ("beanie", "knitted hat"),
        "backpack": ("backpack", "rucksack"),
        "handbag": ("handbag", "purse"),
        "shoulder": ("shoulder", "messenger"),
        "suitcase": ("suitcase", "trolley case"),
        "bottle": ("bottle",),
        "striped": ("striped", "stripy"),
        "checked": ("checked", "plaid"),
        "dotted": ("dotted", "polka-dot"),
        "bald": ("bald", "shaved"),
        "sun": ("sun", "wide-brimmed"),
        "coat": ("coat", "overcoat"),
        "sunglasses": ("sunglasses", "dark glasses"),
        "glasses": ("glasses", "eyeglasses"),
    }
    return [synonyms.get(word, (word,)) for word in value.split()]


def test_captions_name_five_to_eight_true_attributes_in_words(world):
    people = {p["id"]: p["attributes"] for p in world.attributes["identities"]}
    counts = set()
    for record in world.records[::5]:
        about = world.attributes["pictures"][record["img_path"]]
        for caption, named in zip(record["captions"], about["named"], strict=True):
            counts.add(len(named))
            for name, phrase in named.items():
                assert phrase in caption.lower()
                for words in _vocabulary(name, people[record["id"]][name]):
                    assert any(word in phrase for word in words), (name, phrase, caption)
    assert counts == {5, 6, 7, 8}


def test_captions_name_no_colour_that_is_not_there(world):
    """Every colour word of a caption lies inside a phrase that names an attribute."""
    words = set(synthetic_people.COLOURS) | {"gray", "violet", "blond", "fair"}
    for record in world.records[::5]:
        about = world.attributes["pictures"][record["img_path"]]
        for caption, named in zip(record["captions"], about["named"], strict=True):
            spoken = [w for w in caption.lower().replace(",", " ").replace(".", " ").split()]
            told = " ".join(named.values()).split()
            for word in words:
                assert spoken.count(word) <= told.count(word), (word, caption)


def test_captions_are_plain_english_without_ids(world):
    captions = [c for record in world.records for c in record["captions"]]
    for caption in captions:
        assert caption.isascii() and not any(c.isdigit() for c in caption)
        assert caption[0].isupper() and caption.endswith(".")
        assert "  " not in caption and " a a " not in caption and " ," not in caption
        assert 1 <= caption.count(".") <= 3
    lengths = [len(c.split()) for c in captions]
    assert 20 <= np.median(lengths) <= 40 and min(lengths) >= 10 and max(lengths) <= 55
    assert len(set(captions)) > 0.99 * len(captions)


def test_a_side_is_named_only_together_with_its_bag():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        person = synthetic_people.family(rng, 0)[0]
        _, named = synthetic_captions.caption(rng, person, "front")
        assert "bag_side" not in named or "bag" in named


# -------------------------------------------------------------------------------------- masks


def test_masks_cover_the_picture_and_agree_with_their_table(folder):
    masks = _read(folder, "masks.json")
    records = _read(folder, "data_captions.json")
    assert set(masks["images"]) == {r["img_path"] for r in records}
    assert set(masks["regions"]) == set(synthetic_people.ATTRIBUTES)
    for name, shares in masks["images"].items():
        with Image.open(folder / "masks" / name.replace(".jpg", ".png")) as image:
            assert (image.mode, image.size) == ("L", (80, 192))
            labels = np.asarray(image)
        seen = {str(label): float(np.mean(labels == label)) for label in np.unique(labels) if label}
        assert set(shares) == set(seen) <= set(masks["labels"])
        assert all(abs(shares[label] - seen[label]) < 1e-5 for label in seen)
        assert 0.1 < sum(shares.values()) < 0.6  # a pedestrian, and some street


def test_a_label_is_seen_only_if_the_identity_has_the_thing(folder):
    labels, shares = (_read(folder, "masks.json")[key] for key in ("labels", "images"))
    about = _read(folder, "attributes.json")
    for name, seen in shares.items():
        who = about["identities"][about["pictures"][name]["id"]]["attributes"]
        things = {labels[label] for label in seen} & {"hat", "bag", "glasses", "carried", "scarf"}
        assert all(who[thing] != "none" for thing in things)


def test_masked_pixels_show_the_colour_that_the_attribute_names(folder):
    """Light and shade change a garment's colour, but it stays nearest to its own name's colour."""
    shares, about = _read(folder, "masks.json")["images"], _read(folder, "attributes.json")
    palette = {name: np.asarray(rgb, float) for name, rgb in synthetic_brush.RGB.items()}
    right = []
    for name in shares:
        who = about["identities"][about["pictures"][name]["id"]]["attributes"]
        with Image.open(folder / "imgs" / name) as image:
            picture = np.asarray(image, float)
        with Image.open(folder / "masks" / name.replace(".jpg", ".png")) as image:
            labels = np.asarray(image)
        for label, attribute in ((5, "lower"), (6, "shoes"), (7, "hat"), (8, "bag")):
            if who[attribute] == "none" or (labels == label).sum() < 60:
                continue
            shown = np.median(picture[labels == label], axis=0)
            nearest = min(palette, key=lambda colour: np.linalg.norm(palette[colour] - shown))
            right.append(nearest == who[attribute].split()[0])
    assert len(right) > 60 and np.mean(right) > 0.85


# ------------------------------------------------------------------------------------- oracle


def test_oracle_of_a_hand_sized_example():
    def person(number, **attributes):
        return {"id": number, "split": "test", "family": 0, "attributes": attributes}

    about = {
        "identities": [
            person(0, hat="red cap", shoes="white boots"),
            person(1, hat="red cap", shoes="black boots"),
            {**person(2, hat="red cap", shoes="white boots"), "split": "train"},
        ],
        "pictures": {
            # The hat is true of both test identities: 2 of the 3 pictures tied are of identity 0.
            "a": {"id": 0, "named": [{"hat": "red cap"}, {"shoes": "white boots"}]},
            "b": {"id": 0, "named": [{"hat": "red cap"}, {"hat": "red cap"}]},
            "c": {"id": 1, "named": [{"hat": "red cap"}, {"hat": "cap", "shoes": "black boots"}]},
            "d": {"id": 2, "named": [{"hat": "red cap"}]},
        },
    }
    # Identity 0: (2/3 + 1 + 2/3 + 2/3)/4 = 3/4; identity 1: (1/3 + 1)/2 = 2/3. Mean 17/24.
    assert synthetic.expected_rank1(about, "test") == pytest.approx(100 * 17 / 24)
    assert synthetic.expected_rank1(about, "train") == 100.0
    with pytest.raises(ValueError, match="no identity is in split 'val'"):
        synthetic.expected_rank1(about, "val")


def test_oracle_reads_the_folder(folder):
    expected = synthetic.expected_rank1(_read(folder, "attributes.json"), "test")
    assert synthetic.oracle_rank1(folder, "test") == expected
    assert 40 < expected <= 100


def test_full_size_oracle_finds_most_but_not_all(world):
    for split in ("val", "test"):
        assert 75 <= synthetic.expected_rank1(world.attributes, split) <= 90


# ------------------------------------------------------------------- building, and being stopped


def test_a_killed_build_is_cleared_away_and_does_not_disturb_the_next(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from itself_jax.data import synthetic\n"
        "synthetic.ensure(pathlib.Path(sys.argv[1]), identities=(60, 3, 6), workers=2)\n"
    )
    name = synthetic.folder_name(0, (60, 3, 6), 4)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".*.tmp/imgs/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / name).exists() and list(tmp_path.glob(".*.tmp"))
    # Same name, so that it must clear away what the other left; few pictures, to be quick.
    world = synthetic.imagine(0, (1, 1, 1), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "imagine", lambda *_: world)
        done = synthetic.ensure(tmp_path, identities=(60, 3, 6), workers=1, log=_silent)
    assert done.name == name
    deadline = time.monotonic() + 10
    while list(tmp_path.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.lock"]


def test_an_interrupt_leaves_no_temporary_folder(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_of_two_builders_the_second_waits_and_takes_the_first_ones_result(tmp_path, monkeypatch):
    drawn, messages, folders = [], [], []
    draw = synthetic._draw

    def slow(*arguments):
        drawn.append(1)
        time.sleep(0.3)
        return draw(*arguments)

    monkeypatch.setattr(synthetic, "_draw", slow)
    threads = [
        threading.Thread(target=lambda: folders.append(_build(tmp_path, log=messages.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 1 and len(folders) == 2 and folders[0] == folders[1]
    assert any(message.startswith("waiting for") for message in messages)


def test_an_existing_folder_is_used_as_it_is(folder):
    before = _bytes(folder)
    assert _build(folder.parent) == folder
    assert _bytes(folder) == before


def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synthetic, "_draw", full)
    with pytest.raises(OSError, match="cannot write the synthetic data set .*No space left") as e:
        _build(tmp_path)
    assert e.value.errno == errno.ENOSPC
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_a_root_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another data root"):
        _build(tmp_path / "file")


def test_a_drawing_process_that_fails_is_told(tmp_path):
    with pytest.raises(OSError, match="a drawing process failed: FileNotFoundError"):
        synthetic._draw_in_processes(tmp_path, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities": (0, 0, 0)}, "three counts"),
        ({"images_per_identity": 0}, "images_per_identity=0"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _build(tmp_path, **options)


def test_the_data_set_is_drawn_without_jax():
    code = "import sys; import itself_jax.data.synthetic; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_captions_name_as_many_attributes_as_asked_for():
    world = synthetic.imagine(3, (30, 0, 0), 2, (1, 4))
    pictures = world.attributes["pictures"].values()
    counts = [len(named) for picture in pictures for named in picture["named"]]
    assert set(counts) == {1, 2, 3, 4}
    # The people are the same; only what is said about them differs.
    usual = synthetic.imagine(3, (30, 0, 0), 2)
    assert usual.attributes["identities"] == world.attributes["identities"]
    assert usual == synthetic.imagine(3, (30, 0, 0), 2, (5, 8))
    names = [synthetic.folder_name(3, (30, 0, 0), 2, named) for named in ((5, 8), (1, 4))]
    assert names[0] == synthetic.folder_name(3, (30, 0, 0), 2) and names[1] != names[0]
