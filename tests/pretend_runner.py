"""A runner without a model: pages are counted, and logits come from a function of the tokens so far."""

import threading
from types import SimpleNamespace

import numpy as np

from pymla.engine.cache import Sequence
from pymla.engine.forward import Outputs
from pymla.errors import CacheFull, PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import Sampler


def pages_of(tokens):
    """Pages that so many tokens take."""
    return -(-tokens // PAGE)


class PretendRunner:
    """`pymla.engine.runner.Runner` over pages that are numbers, without sharing.

    Parameters
    ----------
    next_token : callable(tokens)
        The token that follows a text.
    """

    def __init__(self, next_token, *, ctx=1000, pages=1000, vocab_size=300):
        self.next_token, self.ctx, self.pages = next_token, ctx, pages
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=2000)
        self.turn = threading.RLock()
        self.sequences, self.steps, self.freed = [], [], []
        self.swaps, self.step_layers = 0, 1

    @property
    def room(self):
        return self.pages - sum(len(sequence.pages) for sequence in self.sequences)

    def new_sequence(self):
        self.sequences.append(Sequence())
        return self.sequences[-1]

    def free(self, sequence):
        self.freed.append(sequence)
        self.sequences.remove(sequence)
        sequence.tokens, sequence.pages, sequence.saved = [], [], None

    def fork(self, sequence):
        fork = self.new_sequence()
        fork.tokens = list(sequence.tokens)
        fork.saved = []  # its pages are its own, and are taken by its first step
        return fork

    def attach(self, sequence, tokens):
        return 0

    def keep(self, sequence):
        pass

    def truncate(self, sequence, length):
        del sequence.tokens[length:]
        sequence.pages = sequence.pages[: pages_of(length)]

    def swap_out(self, sequence):
        assert sequence.pages
        sequence.pages, sequence.saved = [], []
        self.swaps += 1

    def pages_needed(self, sequence, new_tokens):
        return pages_of(sequence.length + new_tokens) - len(sequence.pages)

    def sampler(self, params, history):
        return Sampler(params, history)

    def step(self, batch, rows, progress, hidden):
        """Texts grow; logits say which token follows."""
        assert len({id(sequence) for sequence, _ in batch}) == len(batch)
        for sequence, new in batch:
            assert new.dtype == np.int32
            assert len(new)
            assert sequence in self.sequences
            if sequence.length + len(new) > self.ctx:
                raise CacheFull("full")
            taken = self.pages_needed(sequence, len(new))
            assert taken <= self.room, "a step takes pages that others have"
            sequence.pages, sequence.saved = sequence.pages + [0] * taken, None
        if progress:
            progress(self.step_layers, self.step_layers)
        wanted, at = [], 0
        for sequence, new in batch:
            for i in range(len(new)):
                is_wanted = i == len(new) - 1 if rows is None else at in rows
                if is_wanted:
                    wanted.append(self.logits([*sequence.tokens, *new[: i + 1].tolist()]))
                at += 1
        for sequence, new in batch:
            sequence.tokens.extend(new.tolist())
        self.steps.append([new.tolist() for _, new in batch])
        return Outputs(np.array(wanted), None)

    def logits(self, tokens):
        """float32 (V,): NaN where the next token is None."""
        logits = np.zeros(self.config.vocab_size, np.float32)
        token = self.next_token(tokens)
        logits[token if token is not None else slice(None)] = 10 if token is not None else np.nan
        return logits

    def take(self, logits, rows):
        return logits[rows]

    def sample(self, samplers, logits, masks):
        results = []
        for sampler, row, mask in zip(samplers, logits, masks, strict=True):
            try:
                results.append(sampler.sample(row, mask))
            except PymlaError as error:
                results.append(error)
        return results
