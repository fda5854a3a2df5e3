"""CLIP tokenizer: equal to the reference's ids, total on any text, back to text."""

import json
import pathlib
import pickle
import random

import numpy as np
import pytest

from itself_jax.data import records, tokenizer

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "tokenize.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def clip():
    return tokenizer.Tokenizer()


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["caption"][:30])
def test_ids_equal_the_reference(clip, case):
    ids = clip.encode(case["caption"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, case["ids"])
    assert ids.argmax() == case["argmax"]  # the first EOT


def test_special_ids_are_the_reference_s(clip):
    for text, i in GOLDEN["special"].items():
        assert clip.encode(text)[1] == i
    assert (tokenizer.MASK, tokenizer.SOT, tokenizer.EOT) == (49405, 49406, 49407)
    assert tokenizer.VOCAB_SIZE == tokenizer.EOT + 1


def test_jekyll_is_cut_into_pieces_and_never_the_mask(clip):
    # The last merge of CLIP, "jeky" + "ll", is the one that made way for <|mask|>.
    ids = clip.encode("Dr Jekyll")
    assert clip.tokens(ids) == ["<|startoftext|> ", "dr ", "jeky", "ll ", "<|endoftext|> "]
    assert tokenizer.MASK not in ids
    assert clip.decode(ids) == "dr jekyll"


def test_long_text_is_cut_with_eot_last():
    # "a " * 9 has 9 words; 6 ids leave room for SOT, 4 words, EOT.
    ids = tokenizer.Tokenizer(text_length=6).encode("a " * 9)
    np.testing.assert_array_equal(ids, [49406, 320, 320, 320, 320, 49407])


def test_cut_within_a_word_keeps_its_first_pieces():
    # "123456" is one id per digit (272..277): 5 ids leave room for three.
    ids = tokenizer.Tokenizer(text_length=5).encode("123456")
    np.testing.assert_array_equal(ids, [49406, 272, 273, 274, 49407])


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("", 0),
        (" \t\n ", 0),
        ("\x00", 0),
        ("a\x00man", 1),  # ftfy drops control characters
        ("...", 1),
        ("<|mask|>", 1),
        ("\N{SLIGHTLY SMILING FACE}", 1),
        ("\ud83d", 1),  # half an emoji, which JSON can express: becomes U+FFFD
        ("man " * 500, 75),
    ],
)
def test_any_text_tokenises(clip, text, num_words):
    ids = clip.encode(text)
    assert ids.shape == (77,) and ids[0] == tokenizer.SOT
    assert ids.argmax() == num_words + 1 and ids[num_words + 1] == tokenizer.EOT
    assert not ids[num_words + 2 :].any()


def test_html_is_unescaped_twice(clip):
    # ftfy leaves entities alone in a text with "<", so both rounds are the tokenizer's own.
    assert clip.decode(clip.encode("<b> bag &amp;amp; hat")) == "< b > bag & hat"
    assert clip.decode(clip.encode("<b> &amp;amp;amp;")) == "< b > & amp ;"


def test_word_internal_exclamation_mark_has_id_0_and_survives_decoding(clip):
    ids = [tokenizer.SOT, 0, 256, tokenizer.EOT, 0, 0]  # "!" inside a word, "!" that ends one
    assert clip.decode(ids) == "!!"
    assert clip.tokens(ids) == ["<|startoftext|> ", "!", "! ", "<|endoftext|> "]


def test_decoding_without_eot_drops_trailing_pads_only(clip):
    assert clip.decode([320, 786, 0, 0]) == "a man"


def test_tokens_between_sot_and_eot_join_to_the_text(clip):
    ids = clip.encode("A caf\u00e9 t-shirt, jekyll <|mask|>")
    pieces = clip.tokens(ids)
    assert len(pieces) == ids.argmax() + 1
    assert "".join(pieces[1:-1]).strip() == clip.decode(ids)
    assert clip.decode(ids) == "a caf\u00e9 t - shirt , jekyll <|mask|>"


def test_printable_ascii_needs_no_cleaning():
    # Skipping ftfy and HTML for such texts is an optimisation that must not change any of them.
    rng = random.Random(0)
    letters = [chr(i) for i in range(32, 127) if chr(i) != "&"]
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randrange(80)))
        cleaned = tokenizer.html.unescape(tokenizer.html.unescape(tokenizer.ftfy.fix_text(text)))
        assert " ".join(cleaned.split()).lower() == tokenizer._clean(text)


def test_batch_rows_equal_single_texts(clip):
    texts = ["a man", "", "two women"]
    rows = clip.encode_batch(texts)
    assert rows.shape == (3, 77) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[2], clip.encode("two women"))
    assert clip.encode_batch([]).shape == (0, 77)


def test_pickled_tokenizer_encodes_the_same():
    short = tokenizer.Tokenizer(text_length=9)
    again = pickle.loads(pickle.dumps(short))
    np.testing.assert_array_equal(again.encode("a red bag"), short.encode("a red bag"))


def test_text_length_below_two_is_rejected():
    with pytest.raises(ValueError, match="text_length=1 must be at least 2"):
        tokenizer.Tokenizer(text_length=1)


def test_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(records.DataError, match=r"none\.gz cannot be read .*reinstall itself_jax"):
        tokenizer.Tokenizer(vocabulary=tmp_path / "none.gz")


def test_altered_vocabulary_is_refused(tmp_path):
    altered = tmp_path / "vocabulary.gz"
    data = bytearray(tokenizer.DEFAULT_PATH.read_bytes())
    data[1000] ^= 1
    altered.write_bytes(data)
    with pytest.raises(records.DataError, match=r"vocabulary\.gz is not CLIP's .*sha256 is"):
        tokenizer.Tokenizer(vocabulary=altered)
