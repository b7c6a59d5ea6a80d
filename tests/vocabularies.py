"""Small tokenizers for tests of constraints and answers."""

import numpy as np

from pymla.text.byte_alphabet import CHARACTERS
from pymla.text.byte_level import ByteLevel
from pymla.text.sentencepiece import SentencePiece
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED


def bytewise(control=("<end>",), user_defined=(), eos=("<end>",), template=None):
    """A tokenizer of single bytes, whose ids are the bytes, and of special tokens behind them."""
    tokens = [*CHARACTERS, *control, *user_defined]
    kinds = [NORMAL] * 256 + [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    made = Tokenizer(ByteLevel(tokens, kinds, [], "gpt-2"), eos_ids=[tokens.index(name) for name in eos])
    made.chat_template = template
    return made


def sentencepiece():
    """A SentencePiece tokenizer of bytes and a few words."""
    words = ["▁", "▁yes", "▁no", "yes", "ye", "no", "s", "e", "y", "n", "o", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    scores = np.array([0.0] * 259 + [float(len(word)) for word in words], np.float32)
    return Tokenizer(SentencePiece(tokens, kinds, scores), bos_id=1, eos_ids=[2], add_bos=True)


def bits(mask, size):
    """The tokens that a mask allows, below `size`; none is allowed from there on."""
    found = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert (found < size).all()
    return set(found.tolist())
