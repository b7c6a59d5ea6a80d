"""Small byte-pair vocabularies for tests, whose tokens reach across all that pre-tokenizers cut apart."""

import functools
import itertools
import json
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pymla.text.byte_alphabet import BYTES, CHARACTERS


class BytePairs(NamedTuple):
    """Tokens of byte-pair encoding, the 256 bytes first."""

    ranks: dict  # ids by the bytes of a token
    merges: list  # as GGUF has them

    @property
    def tokens(self):
        """Texts in the byte alphabet."""
        return [written(token) for token in self.ranks]


@functools.cache
def trained(texts, size):
    """Tokens that are frequent in some texts, each of which is left in one piece.

    A token is left out if its own bytes are not merged to it: tiktoken, which looks a whole piece up first, would find
    it and others would not.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(BYTES), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    found = BytePairs({bytes((byte,)): byte for byte in range(256)}, [])
    for pair in json.loads(bpe.to_str())["model"]["merges"]:
        token = bytes(BYTES[character] for character in "".join(pair))
        parts = _merged(token, found.ranks, len(found.ranks))
        if token not in found.ranks and len(parts) == 2:
            found.ranks[token] = len(found.ranks)
            found.merges.append(" ".join(map(written, parts)))
    return found


def written(token):
    """Bytes in the byte alphabet."""
    return "".join(CHARACTERS[byte] for byte in token)


def merges(ranks):
    """The merges that lead to tokens, as GGUF has them, from the ranks of their bytes."""
    parts = (_merged(token, ranks, rank) for token, rank in ranks.items() if len(token) > 1)
    return [" ".join(map(written, pair)) for pair in parts if len(pair) == 2]


def _merged(token, ranks, below):
    """The parts that the bytes of a token are merged to by tokens of lower ranks."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        pairs = ((ranks.get(left + right, below), at) for at, (left, right) in enumerate(itertools.pairwise(parts)))
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
