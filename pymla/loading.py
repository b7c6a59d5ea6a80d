"""From a file to a model that generates: memory plan, prefault, weights, kernels, tokenizer."""

import importlib.resources
import sys
from pathlib import Path

import numpy as np

from pymla import costs
from pymla.cache import row_layout
from pymla.config import ModelConfig
from pymla.errors import PymlaError
from pymla.generate import Generation
from pymla.memory import available_memory
from pymla.model import MLA_MODES, Model
from pymla.modelfile import ModelFile
from pymla.sampling import SamplingParams
from pymla.tokenizer import Tokenizer
from pymla.weights import Weights

DEVICES = ("auto", "cpu", "reference")

#: Bytes per second that a disk gives a file that does not fit the memory; only for the warning.
_DISK = 1e9


def demo_path():
    """The small model that is part of the package: DeepSeek-V2's architecture, trained on Python's standard library."""
    return Path(str(importlib.resources.files("pymla") / "demo.gguf"))


def load(path=None, *, device="auto", cache_type="q8_0", mla="auto", threads=None, ctx=None, report=None):
    """Load a model.

    Parameters
    ----------
    path : str or Path, optional
        A GGUF file, or any part of a split one; the demo model by default.
    device : str
        "auto" and "cpu": Numba kernels; "reference": NumPy, slow, for comparison.
    cache_type : str
        "f32", "f16", "bf16" or "q8_0".
    mla : str
        "auto", "0", "1", "2" or "3" (`pymla.model.MLA_MODES`).
    threads : int, optional
        All usable cores by default.
    ctx : int, optional
        Tokens of the longest sequence. By default the model's context length, cut to what the memory holds.
    report : Report, optional
        Told of progress and warnings.

    Returns
    -------
    LanguageModel

    Raises
    ------
    PymlaError
        The file cannot be run, or the memory does not suffice.
    """
    report = report or Report()
    if device not in DEVICES:
        hint = "; this version has no CUDA backend" if device == "cuda" else ""
        raise PymlaError(f"unknown device {device!r}; choose {', '.join(DEVICES)}{hint}")
    if str(mla) not in MLA_MODES:
        raise PymlaError(f"unknown MLA mode {mla!r}; choose {', '.join(MLA_MODES)}")
    file = ModelFile.open(demo_path() if path is None else path)
    config = ModelConfig.from_gguf(file)
    row_layout(config, cache_type, str(mla))
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise PymlaError(
            f"{file.path}: metadata tokenizer.ggml.tokens has {tokenizer.vocab_size} tokens, and token_embd.weight "
            f"rows for {config.vocab_size}; convert the model again"
        )
    ctx = _plan(file, config, cache_type, str(mla), ctx, report)
    if file.nbytes <= available_memory():
        file.prefault(report.reading)
    weights = Weights.from_gguf(file, config, report.arranging)
    backend = _backend(device, threads, report)
    model = Model(config, weights, backend, cache_type=cache_type, mla=str(mla), ctx=ctx)
    return LanguageModel(file, config, tokenizer, model)


class Report:
    """What loading has to tell; this one prints warnings to standard error and keeps progress to itself."""

    def warn(self, message):
        """Something the user should know."""
        print(f"pymla: warning: {message}", file=sys.stderr)

    def reading(self, done, total):
        """Bytes of the file that are present."""

    def arranging(self, done, total):
        """Layers whose tensors are found."""

    def compiling(self, done, total, name):
        """Kernels that are compiled."""


class LanguageModel:
    """A model with its tokenizer. Use as a context manager, or `close` it, to unmap the file.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer
    model : Model
    file : ModelFile
    """

    def __init__(self, file, config, tokenizer, model):
        self.file, self.config, self.tokenizer, self._model = file, config, tokenizer, model

    @property
    def model(self):
        if self._model is None:
            raise PymlaError(f"{self.file.path}: this model was closed; load it again")
        return self._model

    def tokenize(self, text, add_bos=True, parse_special=False):
        """Token ids of a text (`Tokenizer.encode`)."""
        return self.tokenizer.encode(text, add_bos, parse_special)

    def detokenize(self, ids):
        """The text of token ids (`Tokenizer.decode`)."""
        return self.tokenizer.decode(ids)

    def logits(self, ids):
        """Logits after every token of a sequence, from an empty cache: float32 (T, vocabulary)."""
        ids = self._checked(ids)
        sequence = self.model.new_sequence()
        try:
            return self.model.forward([(sequence, ids)], logits="all")
        finally:
            self.model.free(sequence)

    def generation(self, prompt, *, max_tokens=None, stop=(), progress=None, **sampling):
        """A `Generation` to iterate over; `prompt` is a text or token ids, `sampling` the fields of
        `SamplingParams`."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked(prompt).tolist()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return Generation(self.model, self.tokenizer, ids, SamplingParams(**sampling), max_tokens, stop, progress)

    def stream(self, prompt, **options):
        """Pieces of text as they are generated; options as for `generation`."""
        return iter(self.generation(prompt, **options))

    def generate(self, prompt, **options):
        """The whole generated text; options as for `generation`."""
        return "".join(self.stream(prompt, **options))

    def close(self):
        """Let go of the weights."""
        self._model = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _checked(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise PymlaError("token ids must be a list of at least one integer")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise PymlaError(
                f"token ids go from {ids.min()} to {ids.max()}; the vocabulary has {self.config.vocab_size}"
            )
        return ids.astype(np.int32)


def _plan(file, config, cache_type, mla, ctx, report):
    """The context that fits the memory.

    Raises
    ------
    PymlaError
        With the plan, where what was asked for does not fit.
    """
    if ctx is not None and not 1 <= ctx <= config.context_length:
        raise PymlaError(f"--ctx {ctx}: this model's context goes from 1 to {config.context_length} tokens")
    available = available_memory()
    wanted = config.context_length if ctx is None else ctx

    def plan(tokens):
        return costs.memory_plan(config, file, cache_type, mla, tokens, min(costs.SLICE, tokens))

    if plan(wanted).allocated > available and ctx is None:
        row = costs.row_bytes(config, cache_type, mla)
        spare = available - plan(64).allocated - costs.EXPANDED_BYTES
        wanted = max(64, min(wanted, int(spare * 0.9) // row // 64 * 64))
        if plan(wanted).allocated <= available:
            report.warn(f"the memory holds a context of {wanted} tokens, of the model's {config.context_length}")
    needed = plan(wanted)
    if needed.allocated > available:
        raise PymlaError(
            f"not enough memory for {wanted} tokens of context: cache {_gib(needed.cache)}, "
            f"scratch {_gib(needed.scratch)}, derived weights {_gib(needed.derived)}, process {_gib(needed.process)}; "
            f"{_gib(available)} is available. "
            "Lower --ctx or choose a smaller --cache-type"
        )
    short = needed.total - available
    if short > 0:
        report.warn(
            f"{file.path} takes {_gib(file.nbytes)} and {_gib(available)} of memory are available: about {_gib(short)} "
            f"are read from disk again and again, up to {short / _DISK:.0f} s for a token"
        )
    return wanted


def _gib(nbytes):
    return f"{nbytes / (1 << 30):.2f} GiB"


def _backend(device, threads, report):
    if device == "reference":
        from pymla import reference

        return reference
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise PymlaError(f"--threads {threads}: this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    if cpu.cache_dir_warning():
        report.warn(cpu.cache_dir_warning())
    cpu.compile_all(report.compiling if cpu.needs_compiling() else None)
    return cpu
