"""Own data: JSONL and CSV in all their honest forms, and the line of everything else."""

import json

import miniature
import pytest

from itself_jax.data import own, records

LINE = {"image": "a.jpg", "caption": "a man", "id": "anna", "split": "train"}


def _jsonl(folder, *lines, name="data.jsonl"):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def _csv(folder, text, *, encoding="utf-8"):
    (folder / "data.csv").write_bytes(text.encode(encoding))
    return folder


def test_jsonl_and_csv_of_one_data_set_are_the_same(tmp_path):
    miniature.write(tmp_path / "1", "jsonl")
    miniature.write(tmp_path / "2", "csv")
    first, second = own.read(tmp_path / "1"), own.read(tmp_path / "2")
    assert first.records == second.records and len(first.records) == 22
    assert first.records[0] == records.Record(
        "pictures/person 0 \N{LATIN SMALL LETTER E WITH ACUTE}/0.jpg",
        "person-0",
        (
            "A person in a red coat walks on floor 0, side 0, door 0.",
            "A person in a red coat walks on floor 0, side 1, door 0.",
        ),
        "train",
    )
    assert first.images.load(3, (4, 2)).shape == (4, 2, 3)
    assert first.image_folder == str(tmp_path / "1") and first.dataset == "jsonl"


def test_lines_of_one_picture_become_one_record_at_the_first(tmp_path):
    _jsonl(
        tmp_path,
        {**LINE, "caption": "one"},
        {**LINE, "image": "b.jpg", "id": 7},
        "\n",
        {"image": "a.jpg", "captions": ["two", "three"], "id": "anna", "split": "train"},
    )
    assert own.read(tmp_path).records == (
        records.Record("a.jpg", "anna", ("one", "two", "three"), "train"),
        records.Record("b.jpg", "7", ("a man",), "train"),
    )


def test_no_split_anywhere_is_left_open(tmp_path):
    lines = [{**LINE, "split": None}, {"image": "b.jpg", "caption": "x", "id": "bob"}]
    assert [r.split for r in own.read(_jsonl(tmp_path, *lines)).records] == ["", ""]


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    line = json.dumps({**LINE, "caption": "a\u2028b"}, ensure_ascii=False) + "\r\n"
    assert own.read(_jsonl(tmp_path, line)).records[0].captions == ("a\u2028b",)


def test_csv_of_a_spreadsheet(tmp_path):
    """Byte order mark, CRLF, quoted commas, quotes and newlines, columns in any order."""
    text = (
        "\N{ZERO WIDTH NO-BREAK SPACE}Id, Caption ,image,extra\r\n"
        '7,"a man, in red",b c.jpg,\r\n'
        "\r\n"
        '7,"he says ""hi""\r\nand goes", b c.jpg ,1\r\n'
        "8,,d.jpg,\r\n"
    )
    assert own.read(_csv(tmp_path, text)).records == (
        records.Record("b c.jpg", "7", ("a man, in red", 'he says "hi"\r\nand goes'), ""),
        records.Record("d.jpg", "8", ("",), ""),
    )


def test_the_root_may_be_the_file_itself(tmp_path):
    _jsonl(tmp_path, LINE)
    _jsonl(tmp_path, {**LINE, "image": "other.jpg"}, name="other.jsonl")
    corpus = own.read(tmp_path / "other.jsonl")
    assert corpus.records[0].image == "other.jpg"
    assert corpus.images.name(0) == str(tmp_path / "other.jpg")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "b.jpg", "cap', r"line 2 is not valid JSON: Unterminated .* at column 20; wri"),
        ("[1]\n", r"line 2 must be an object, but is a list; write \{\"image\": \"a\.jpg\""),
        ("[" * 50_000 + "\n", r"line 2 is nested too deeply"),
        ({"caption": "x", "id": "1"}, r"line 2 lacks the field 'image' \(it has: caption, id\)"),
        ({"image": "b.jpg", "id": "1"}, r"line 2 lacks the field 'caption' \(it has: id, image\)"),
        ({"image": "b.jpg", "caption": "x"}, r"line 2 lacks the field 'id'"),
        ({**LINE, "id": 1.5}, r"line 2: field 'id' must be a text or an integer, but is 1\.5"),
        ({**LINE, "id": True}, r"field 'id' must be a text or an integer, but is True"),
        ({**LINE, "id": " "}, r"field 'id' must be a text or an integer, but is ' '"),
        ({**LINE, "caption": None}, r"line 2: field 'caption' must be a text or .* but is null"),
        ({**LINE, "caption": [1]}, r"line 2: field 'caption' must contain only text, but has 1"),
        ({**LINE, "split": "dev"}, r"line 2: field 'split' is 'dev'; it must be one of train, val"),
        ({**LINE, "split": 0}, r"line 2: field 'split' is 0; it must be one of train, val, test"),
        ({**LINE, "image": 3}, r"line 2: field 'image' must be the image's path as text, but is 3"),
        ({**LINE, "image": "../b.jpg"}, r"line 2: field 'image' is '\.\./b\.jpg'; paths must be r"),
        ({**LINE, "image": "/b.jpg"}, r"line 2: field 'image' is '/b\.jpg'; paths must be relati"),
        (
            {**LINE, "image": "b.jpg", "split": ""},
            r"line 2 has no split, as 1 of 2 lines, but the others have one; give it to all",
        ),
        ({**LINE, "id": "bob"}, r"line 2: 'a\.jpg' has id 'bob', but 'anna' at line 1; correct"),
        ({**LINE, "split": "val"}, r"line 2: 'a\.jpg' has split 'val', but 'train' at line 1"),
        (
            {**LINE, "image": ""},
            r"line 2: field 'image' is empty; name the picture that the caption describes",
        ),
        (
            {**LINE, "image": None, "id": "bob", "split": "test"},
            r"line 2: the query's identity 'bob' never occurs in the gallery of split 'test': field"
            r" 'image' is empty and no other line shows this identity; add its picture or remove",
        ),
        (
            # Anna's picture is in train, so it is not in the gallery of test.
            {**LINE, "image": None, "split": "test"},
            r"line 2: the query's identity 'anna' never occurs in the gallery of split 'test'",
        ),
    ],
)
def test_malformed_jsonl_is_named(tmp_path, line, message):
    _jsonl(tmp_path, LINE, line)
    with pytest.raises(records.DataError, match=message) as error:
        own.read(tmp_path)
    assert str(tmp_path / "data.jsonl") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.jpg,x\n", r"header lacks the column 'id' \(it has: image, caption\)"),
        ("image;caption;id\n", r"lacks the column 'image' .* by commas, not by ';'\.$"),
        ("image\tcaption\tid\n", r"lacks the column 'image' .* by commas, not by '\\t'"),
        ("a.jpg,x,1\n", r"its first line must be image,caption,id,split"),
        ("image,caption,id,id\n", r"the header names a column twice \(image, caption, id, id\)"),
        (
            "image,caption,id\na.jpg,a man, in red,1\n",
            r"line 2 has 4 values, but the header has 3 columns; put values with commas in double",
        ),
        (
            'image,caption,id\nz.jpg,"x\ny",1\na.jpg,"a man,1\nb.jpg,x,2\n',
            r"line 4 is not valid CSV: unexpected end of data; double quotes must come in pairs",
        ),
        ("image,caption,id\na.jpg,x,\n", r"line 2: column 'id' is empty"),
        ("image,caption,id,split\na.jpg,x,1,dev\n", r"line 2: column 'split' is 'dev'; it must"),
        ("image,caption,id\n../a.jpg,x,1\n", r"line 2: field 'image' is '\.\./a\.jpg'; paths"),
        ("image,caption,id\n,x,1\n", r"line 2: the query's identity '1' never occurs in the gall"),
        ("image,caption,id\n", r"data\.csv holds no record; write one line per caption"),
        ("", r"data\.csv holds no record"),
    ],
)
def test_malformed_csv_is_named(tmp_path, text, message):
    with pytest.raises(records.DataError, match=message) as error:
        own.read(_csv(tmp_path, text))
    assert str(tmp_path / "data.csv") in str(error.value)


def test_csv_in_another_encoding_is_named(tmp_path):
    text = "image,caption,id\na.jpg,caf\N{LATIN SMALL LETTER E WITH ACUTE},1\n"
    with pytest.raises(records.DataError, match=r"data\.csv cannot be read as UTF-8 .* in line 2"):
        own.read(_csv(tmp_path, text, encoding="latin-1"))


def test_a_root_without_own_data_says_what_it_holds(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(
        records.DataError,
        match=rf"dataset='jsonl' needs one \.jsonl or \.csv file in data_root={tmp_path}, which "
        r"holds photo\.jpg; write it there",
    ):
        own.read(tmp_path)
    with pytest.raises(records.DataError, match=r"photo\.jpg is a file that is neither \.jsonl no"):
        own.read(tmp_path / "photo.jpg")


def test_several_files_of_own_data_must_be_chosen_from(tmp_path):
    _csv(_jsonl(tmp_path, LINE), "image,caption,id\n")
    with pytest.raises(records.DataError, match=r"files of own data \(data\.csv, data\.jsonl\); p"):
        own.read(tmp_path)
