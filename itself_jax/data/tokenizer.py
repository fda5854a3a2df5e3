"""CLIP's byte-pair tokenizer (Radford et al. 2021), with a mask token in the vocabulary.

Equal to OpenAI's tokenizer except for one merge: the method gives the last id of the vocabulary,
49405, to `<|mask|>`. CLIP has the word "jekyll" there; here that word is cut into its pieces
("jeky", "ll"), where the reference's data loader stops with a KeyError.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ftfy
import numpy as np
import regex

from itself_jax.data import records

PAD = 0  # also the id of a word-internal "!", as in CLIP
MASK = 49405
SOT = 49406
EOT = 49407  # the largest id: argmax over a caption's ids finds the first EOT
VOCAB_SIZE = 49408

DEFAULT_PATH = pathlib.Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")

_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_SPECIAL = {"<|mask|>": MASK, "<|startoftext|>": SOT, "<|endoftext|>": EOT}
_PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|<\|mask\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_SPACE = regex.compile(r"\s+")
_WORD_END = "</w>"


class Vocabulary(NamedTuple):
    """The piece of every id, the id of every piece, and the rank of every merge of two pieces."""

    pieces: list[str]
    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]


class Tokenizer:
    """Text to token ids and back.

    Special tokens written out in a text (`<|mask|>`, `<|startoftext|>`, `<|endoftext|>`) become
    those tokens, as in the reference; a text with a literal `<|endoftext|>` is pooled there.

    Args:
      text_length: number of ids per text, SOT and EOT included; at least 2.
      vocabulary: CLIP's `bpe_simple_vocab_16e6.txt.gz`.
      vocab_size: ids that the model knows.

    Raises:
      records.DataError: the vocabulary file is missing or altered, or larger than the model's.
    """

    def __init__(
        self,
        text_length: int = 77,
        vocabulary: str | pathlib.Path = DEFAULT_PATH,
        *,
        vocab_size: int = VOCAB_SIZE,
    ):
        if text_length < 2:
            raise ValueError(f"text_length={text_length} must be at least 2, for SOT and EOT.")
        if vocab_size < VOCAB_SIZE:  # JAX would clip the ids and say nothing
            raise records.DataError(
                f"config.model.vocab_size={vocab_size}: the model knows fewer ids than the "
                f"{VOCAB_SIZE} of CLIP's vocabulary; use weights that were trained with all of it."
            )
        self.text_length = text_length
        self._vocabulary = pathlib.Path(vocabulary)
        self._pieces, self._ids, self._ranks = read_vocabulary(self._vocabulary)
        self._symbols = _byte_symbols()
        self._bytes = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        self._word_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    def __reduce__(self):
        return Tokenizer, (self.text_length, self._vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Returns (text_length,) int32 ids: SOT, the text, EOT, then PAD.

        A text that is too long is cut, with EOT as its last id.
        """
        ids = [SOT]
        room = self.text_length - 2
        for word in _PATTERN.findall(_clean(text)):
            ids.extend(self._word_ids(word))
            if len(ids) > room:
                break
        del ids[room + 1 :]
        ids.append(EOT)
        row = np.zeros(self.text_length, np.int32)
        row[: len(ids)] = ids
        return row

    def encode_batch(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (len(texts), text_length) int32 ids, one row per text."""
        rows = np.zeros((len(texts), self.text_length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = self.encode(text)
        return rows

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the cleaned, lower-case text of the ids up to the first EOT, without SOT.

        Without an EOT, trailing PADs are dropped.
        """
        ids = _until_end(ids)
        return self._text(i for i in ids if i not in (SOT, EOT)).strip()

    def tokens(self, ids: np.ndarray | Sequence[int]) -> list[str]:
        """Returns one readable piece per id, up to and with the first EOT (pads dropped).

        A piece that ends its word ends with a space, so that the pieces between SOT and EOT join
        to the text; a piece that holds part of a character shows as U+FFFD.
        """
        return [self._text([i]) for i in _until_end(ids)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _SPECIAL:
            return (_SPECIAL[word],)
        symbols = [self._symbols[byte] for byte in word.encode("utf-8")]
        symbols[-1] += _WORD_END
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:], strict=False)
            first, second = min(pairs, key=lambda pair: self._ranks.get(pair, math.inf))
            if (first, second) not in self._ranks:
                break
            merged = []
            at = 0
            while at < len(symbols):
                if symbols[at : at + 2] == [first, second]:
                    merged.append(first + second)
                    at += 2
                else:
                    merged.append(symbols[at])
                    at += 1
            symbols = merged
        return tuple(self._ids[symbol] for symbol in symbols)

    def _text(self, ids: Iterable[int]) -> str:
        data = bytearray()
        for i in ids:
            piece = self._pieces[i]
            if i >= MASK:
                data += piece.encode() + b" "
                continue
            data += bytes(self._bytes[symbol] for symbol in piece.removesuffix(_WORD_END))
            if piece.endswith(_WORD_END):
                data += b" "
        return data.decode("utf-8", errors="replace")


def _until_end(ids: np.ndarray | Sequence[int]) -> list[int]:
    ids = np.asarray(ids).tolist()
    if EOT in ids:
        return ids[: ids.index(EOT) + 1]
    while ids and ids[-1] == PAD:
        ids.pop()
    return ids


def _clean(text: str) -> str:
    # ftfy and HTML leave printable ASCII without "&" alone; skipping them is 4 times faster.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text).strip().lower()


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in of every byte value, by byte value."""
    printable = _printable_bytes()
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def _printable_bytes() -> list[int]:
    return [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


@functools.lru_cache(maxsize=1)
def read_vocabulary(path: pathlib.Path = DEFAULT_PATH) -> Vocabulary:
    """CLIP's vocabulary, with the mask token in it.

    Raises:
      records.DataError: the file is missing or altered.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise records.DataError(
            f"{path} cannot be read ({error.strerror}): CLIP's vocabulary comes with the package; "
            "reinstall itself_jax."
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != _SHA256:
        raise records.DataError(
            f"{path} is not CLIP's vocabulary: its sha256 is {found}, expected {_SHA256}; "
            "reinstall itself_jax."
        )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    # Line 0 is a header. 256 bytes, 256 bytes that end a word, the merges, 3 special tokens:
    # one merge fewer than CLIP has, which frees the id of `<|mask|>`.
    merges = [tuple(line.split()) for line in lines[1 : VOCAB_SIZE - 512 - 3 + 1]]
    symbols = _byte_symbols()
    printable = _printable_bytes()
    ordered = printable + [byte for byte in range(256) if byte not in printable]
    pieces = [symbols[byte] for byte in ordered]
    pieces += [piece + _WORD_END for piece in pieces]
    pieces += ["".join(merge) for merge in merges]
    pieces += _SPECIAL
    return Vocabulary(
        pieces,
        {piece: i for i, piece in enumerate(pieces)},
        {merge: rank for rank, merge in enumerate(merges)},
    )
