"""From a file to a model that generates: device, memory plan, prefault, weights, kernels, tokenizer."""

import gc
import importlib.resources
import sys
from pathlib import Path

import numpy as np

from pymla import costs, cuda
from pymla.backends import Placement
from pymla.cache import row_layout
from pymla.config import ModelConfig
from pymla.errors import NoRoom, PymlaError
from pymla.generate import Generation
from pymla.memory import available_memory
from pymla.model import MLA_MODES, Model
from pymla.modelfile import ModelFile
from pymla.placement import LEAST_CTX, Planner, Split, Wish, choose, gib
from pymla.sampling import SamplingParams
from pymla.tokenizer import Tokenizer
from pymla.weights import Weights

#: What a model can run on; "auto" is the GPU where there is one that can be used.
DEVICES = ("auto", "cpu", "cuda", "reference")

#: Bytes per second that a disk gives a file that does not fit the memory; only for the warning.
_DISK = 1e9


def demo_path():
    """The small model that is part of the package: DeepSeek-V2's architecture, trained on Python's standard library."""
    return Path(str(importlib.resources.files("pymla") / "demo.gguf"))


def load(
    path=None,
    *,
    device="auto",
    gpu_layers=None,
    cpu_moe=False,
    cache_type="q8_0",
    mla="auto",
    threads=None,
    ctx=None,
    report=None,
):
    """Load a model.

    Parameters
    ----------
    path : str or Path, optional
        A GGUF file, or any part of a split one; the demo model by default.
    device : str
        "cuda": Numba kernels on an NVIDIA GPU; "cpu": on the processor; "auto": on the GPU where there is one;
        "reference": NumPy, slow, for comparison.
    gpu_layers : int or "all", optional
        The last so many layers go to the GPU, and with more than the model has the output matrix. By default as much of
        the model as fits.
    cpu_moe : bool
        Routed experts stay with the CPU.
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
        The file cannot be run, the memory does not suffice, or there is no such device.
    """
    report = report or Report()
    if device not in DEVICES:
        raise PymlaError(f"unknown device {device!r}; choose {', '.join(DEVICES)}")
    if str(mla) not in MLA_MODES:
        raise PymlaError(f"unknown MLA mode {mla!r}; choose {', '.join(MLA_MODES)}")
    wish = Wish(ctx, _layer_count(gpu_layers), cpu_moe)
    file = ModelFile.open(demo_path() if path is None else path)
    config = ModelConfig.from_gguf(file)
    row_layout(config, cache_type, str(mla))
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise PymlaError(
            f"{file.path}: metadata tokenizer.ggml.tokens has {tokenizer.vocab_size} tokens, and token_embd.weight "
            f"rows for {config.vocab_size}; convert the model again"
        )
    if ctx is not None and not 1 <= ctx <= config.context_length:
        raise PymlaError(f"--ctx {ctx}: this model's context goes from 1 to {config.context_length} tokens")
    planner = Planner(config, file, cache_type, str(mla))
    split, ctx = _plan(device, wish, planner, file, report)
    placement = _backends(device, split, config, threads, report)
    weights = _weights(file, config, placement, planner, split, report)
    model = Model(config, weights, placement, cache_type=cache_type, mla=str(mla), ctx=ctx)
    return LanguageModel(file, config, tokenizer, model)


def find_device(device):
    """What "auto" stands for here: "cuda", or "cpu" with the reason, as (device, reason). Others stand for themselves.

    Raises
    ------
    PymlaError
        "cuda" is asked for, and cannot be used.
    """
    if device == "auto":
        found, reason = cuda.available()
        return ("cuda", "") if found else ("cpu", reason.partition(";")[0])
    if device == "cuda":
        try:
            cuda.check()
        except PymlaError as error:
            raise PymlaError(f"--device cuda: {error}") from None
    return device, ""


class Report:
    """What loading has to tell; this one prints warnings to standard error and keeps the rest to itself."""

    def warn(self, message):
        """Something the user should know."""
        print(f"pymla: warning: {message}", file=sys.stderr)

    def running(self, where):
        """Where the model runs, where that was for pymla to choose, and why there."""

    def reading(self, done, total):
        """Bytes of the file that are present."""

    def arranging(self, done, total):
        """Layers whose tensors are found."""

    def uploading(self, done, total):
        """Bytes that are on the GPU."""

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
    def device(self):
        """Where it runs: "cpu", "cuda" or "reference"; with a + between them where its layers are on several."""
        return "+".join(backend.NAME for backend in self.model.placement.backends)

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
        """Let go of the weights and of the cache."""
        if self._model is None:
            return
        backends, self._model = self._model.placement.backends, None
        gc.collect()  # a recorded step knows its model, and the model knows it
        for backend in backends:
            backend.memory.release()

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


def _layer_count(gpu_layers):
    """``--gpu-layers`` as a number; "all" is more than any model has."""
    if gpu_layers is None or isinstance(gpu_layers, int):
        return gpu_layers
    if gpu_layers == "all":
        return sys.maxsize
    raise PymlaError(f"--gpu-layers {gpu_layers!r}: give a number from 1 on, or all")


def _plan(device, wish, planner, file, report):
    """What goes to the GPU, and the context: (Split, int).

    Raises
    ------
    PymlaError
        With the plan, where what was asked for does not fit.
    """
    found, reason = find_device(device)
    asked = wish.gpu_layers is not None or wish.cpu_moe
    if found != "cuda" and asked:
        why = f"there is none here: {reason}" if device == "auto" else f"--device is {device}"
        raise PymlaError(f"--gpu-layers and --cpu-moe are for a GPU, and {why}; leave them out")
    if found == "cuda":
        try:
            return _plan_gpu(wish, planner, file, asked, report)
        except NoRoom:
            if asked or device != "auto":
                raise
            reason = "the GPU's memory does not hold a layer of the model"
    if device == "auto":
        report.running(f"the CPU: {reason}")
    return Split(0), _plan_cpu(planner, file, wish.ctx, report)


def _plan_gpu(wish, planner, file, asked, report):
    from pymla.cuda import memory

    free, available, config = memory.free_memory(), available_memory(), planner.config
    split, ctx, _, on_host = choose(planner, wish, free, available)
    where = f"{cuda.describe()['name']}: {split.describe(config)}"
    if not (asked or split.whole(config)):
        whole = planner.device(Split.all(config), min(ctx, LEAST_CTX)).total
        where += f" (the whole model takes {gib(whole)}, and {gib(free)} are free)"
    report.running(where)
    if wish.ctx is None and ctx < config.context_length:
        report.warn(f"the memory holds a context of {ctx} tokens, of the model's {config.context_length}")
    _warn_of_disk(file, on_host, available, report)
    return split, ctx


def _plan_cpu(planner, file, ctx, report):
    """The context that fits the memory."""
    config, available = planner.config, available_memory()
    wanted = config.context_length if ctx is None else ctx

    def plan(tokens):
        return planner.host(Split(0), tokens)

    if plan(wanted).allocated > available and ctx is None:
        row = costs.row_bytes(config, planner.cache_type, planner.mla)
        spare = available - plan(64).allocated - costs.EXPANDED_BYTES
        wanted = max(64, min(wanted, int(spare * 0.9) // row // 64 * 64))
        if plan(wanted).allocated <= available:
            report.warn(f"the memory holds a context of {wanted} tokens, of the model's {config.context_length}")
    needed = plan(wanted)
    if needed.allocated > available:
        raise PymlaError(
            f"not enough memory for {wanted} tokens of context: cache {gib(needed.cache)}, "
            f"scratch {gib(needed.scratch)}, derived weights {gib(needed.derived)}, process {gib(needed.process)}; "
            f"{gib(available)} is available. "
            "Lower --ctx or choose a smaller --cache-type"
        )
    _warn_of_disk(file, needed, available, report)
    return wanted


def _warn_of_disk(file, needed, available, report):
    """Say so if weights do not stay in memory."""
    short = needed.total - available
    if short > 0:
        report.warn(
            f"{file.path} takes {gib(needed.weights)} and {gib(available)} of memory are available: about {gib(short)} "
            f"are read from disk again and again, up to {short / _DISK:.0f} s for a token"
        )


def _backends(device, split, config, threads, report):
    """Where each part of the model is, with kernels that are ready."""
    if device == "reference":
        from pymla import reference

        return Placement.on(reference, config.num_hidden_layers)
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise PymlaError(f"--threads {threads}: this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    gpu = cpu
    if split.gpu_layers:
        from pymla.cuda import backend as gpu
    placement = split.placement(config, cpu, gpu)
    for backend in placement.backends:
        backend.compile_all(report.compiling, report.warn)
    return placement


def _weights(file, config, placement, planner, split, report):
    """The weights, on their way to where they belong."""
    uploaded = set(planner.uploaded(split))
    on_device, on_host = planner.device(split, 1), planner.host(split, 1)
    if on_host.weights <= available_memory():
        file.prefault(report.reading, [name for name in file.tensors if name not in uploaded] if uploaded else None)
    total = on_device.weights + on_device.derived
    # Two bars at a time would take turns.
    arranging = None if total else report.arranging
    return Weights.from_gguf(file, config, arranging, placement, lambda done: report.uploading(done, total))
