"""From a file to a model that generates: device, memory plan, prefault, weights, kernels, tokenizer."""

import gc
import importlib.resources
import os
import sys
from pathlib import Path

import numpy as np

from pymla import checks, cuda, scratch
from pymla.engine import costs
from pymla.engine.filecheck import examine
from pymla.engine.generation import Generation
from pymla.engine.planning import LEAST_CTX, Planner, Split, Wish, choose, gib
from pymla.errors import NoRoom, PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.host.memory import available_memory
from pymla.models.deepseek2 import MLA_MODES, Model
from pymla.models.placement import Placement
from pymla.models.weights import Weights
from pymla.pages import CACHE_TYPES
from pymla.printable import one_line
from pymla.text.sampling import SamplingParams

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
    check_tensors=False,
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
        "auto", "0", "1", "2" or "3" (`pymla.models.deepseek2.MLA_MODES`).
    threads : int, optional
        All usable cores by default.
    ctx : int, optional
        Tokens of the longest sequence. By default the model's context length, cut to what the memory holds.
    check_tensors : bool
        Read the whole file first, and refuse it for NaN, infinity or holes in any tensor (`pymla.engine.filecheck`).
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
    report = _report(report)
    checks.choice("device", device, DEVICES)
    checks.choice("cache_type", cache_type, CACHE_TYPES)
    mla = checks.choice("mla", str(mla) if isinstance(mla, int) else mla, MLA_MODES)
    threads = None if threads is None else checks.integer("threads", threads, 1)
    ctx = None if ctx is None else checks.integer("ctx", ctx, 1)
    check_tensors = checks.flag("check_tensors", check_tensors)
    wish = Wish(ctx, _layer_count(gpu_layers), checks.flag("cpu_moe", cpu_moe))
    file = ModelFile.open(demo_path() if path is None else _path(path))
    found = examine(file, cache_type, mla, check_tensors=check_tensors, progress=report.checking)
    config, tokenizer = found.check()
    for warning in tokenizer.warnings:
        report.warn(warning)
    if ctx is not None and ctx > config.context_length:
        checks.refuse("ctx", ctx, f"this model's context goes from 1 to {config.context_length} tokens")
    planner = Planner(config, file, cache_type, mla)
    split, ctx = _plan(device, wish, planner, file, report)
    placement = _backends(device, split, config, threads, report)
    weights = _weights(file, config, placement, planner, split, report)
    model = Model(config, weights, placement, cache_type=cache_type, mla=mla, ctx=ctx)
    for backend in placement.backends:
        backend.compile_for(model, report.compiling, report.warn)
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
            raise PymlaError(f"`device` cuda: {error}") from None
    return device, ""


class Report:
    """What loading has to tell; this one prints warnings to standard error and keeps the rest to itself."""

    def warn(self, message):
        """Something the user should know."""
        print(f"pymla: warning: {one_line(message)}", file=sys.stderr)

    def running(self, where):
        """Where the model runs, where that was for pymla to choose, and why there."""

    def reading(self, done, total):
        """Bytes of the file that are present."""

    def checking(self, done, total):
        """Bytes of tensors whose values were looked at."""

    def arranging(self, done, total):
        """Layers whose tensors are found."""

    def uploading(self, done, total):
        """Bytes that are on the GPU."""

    def compiling(self, done, total, name):
        """Kernels that are compiled."""


class LanguageModel:
    """A model with its tokenizer. Use as a context manager, or `close` it, to unmap the file.

    Several threads may use one model. Calls of `generate` and `logits` wait for each other; the steps of streams take
    turns.

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
        model = self._model
        if model is None:
            raise PymlaError(f"{self.file.path}: this model was closed; load it again")
        return model

    def tokenize(self, text, add_bos=True, parse_special=False):
        """Token ids of a text (`Tokenizer.encode`)."""
        if not isinstance(text, str):
            checks.refuse("text", text, "a text is expected")
        return self.tokenizer.encode(text, add_bos, parse_special)

    def detokenize(self, ids):
        """The text of token ids (`Tokenizer.decode`)."""
        return self.tokenizer.decode(self._checked("ids", ids, empty=True).tolist())

    def logits(self, ids):
        """Logits after every token of a sequence, from an empty cache: float32 (T, vocabulary).

        Raises
        ------
        PymlaError
            The ids are none, too many for the context, or a logit is not finite.
        """
        ids = self._checked("ids", ids)
        model = self.model
        self.file.check_unchanged()
        sequence = model.new_sequence()
        try:
            logits = model.forward([(sequence, ids)], logits="all")
        finally:
            model.free(sequence)
        if not np.isfinite(logits).all():
            position, token = np.argwhere(~np.isfinite(logits))[0].tolist()
            raise PymlaError(
                f"{self.file.path}: the logit of token {token} after position {position} is {logits[position, token]}: "
                "the model's weights are damaged, or overflow"
            )
        return logits

    def generation(self, prompt, *, max_tokens=None, stop=(), progress=None, **sampling):
        """A text to be generated.

        Parameters
        ----------
        prompt : str, or sequence of int
            A text or token ids.
        max_tokens : int, optional
            By default until the model ends the text or the context is full.
        stop : str, or sequence of str
            Texts that end the generation.
        progress : callable(done, total), optional
            Layers of the prompt's pass.
        **sampling
            The fields of `SamplingParams`; None stands for a field's default.

        Returns
        -------
        Generation
            To iterate over.

        Raises
        ------
        PymlaError
        """
        params = SamplingParams.of(sampling)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked("prompt", prompt).tolist()
        model = self.model
        self.file.check_unchanged()
        return Generation(model, self.tokenizer, ids, params, max_tokens, stop, progress)

    def stream(self, prompt, **options):
        """Pieces of text as they are generated; options as for `generation`."""
        return iter(self.generation(prompt, **options))

    def generate(self, prompt, **options):
        """The whole generated text; options as for `generation`."""
        generation = self.generation(prompt, **options)
        with generation.model.turn:
            return "".join(generation)

    def close(self):
        """Let go of the weights and of the cache. A step that another thread runs is waited for; generations that are
        not at their end fail when they are read on."""
        model, self._model = self._model, None
        if model is None:
            return
        try:
            model.close()
        except PymlaError:
            self._model = model
            raise
        gc.collect()  # a recorded step knows its model, and the model knows it
        for backend in model.placement.backends:
            backend.memory.release()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _checked(self, name, ids, empty=False):
        """Token ids as int32 (T,)."""
        try:
            array = np.asarray(ids)
        except Exception:  # rows of different length, and whatever a caller's own class does
            array = np.array(None)
        if empty and array.shape == (0,):
            return array.astype(np.int32)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            texts = "a text, or " if name == "prompt" else ""
            checks.refuse(name, ids, f"{texts}token ids, a list of at least one integer, are expected")
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            raise PymlaError(
                f"token ids go from {array.min()} to {array.max()}; the vocabulary has {self.config.vocab_size}"
            )
        return array.astype(np.int32)


def _report(report):
    if report is None:
        return Report()
    missing = [name for name in vars(Report) if not name.startswith("_") and not callable(getattr(report, name, None))]
    if missing:
        checks.refuse(
            "report", report, f"it has no {', '.join(missing)}; derive its class from pymla.engine.loading.Report"
        )
    return report


def _path(path):
    """A path that the system takes."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        checks.refuse("path", path, "the path of a GGUF file is expected")
    if "\0" in os.fspath(path) or not os.fspath(path):
        checks.refuse("path", path, "no file can have this name")
    return path


def _layer_count(gpu_layers):
    """`gpu_layers` as a number; "all" is more than any model has."""
    if gpu_layers is None:
        return None
    if isinstance(gpu_layers, str):
        if gpu_layers == "all":
            return sys.maxsize
        checks.refuse("gpu_layers", gpu_layers, "a whole number from 1 on, or all, is expected")
    return checks.integer("gpu_layers", gpu_layers, 1)


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
        why = f"there is none here: {reason}" if device == "auto" else f"`device` is {device}"
        raise PymlaError(f"`gpu_layers` and `cpu_moe` are for a GPU, and {why}; leave them out")
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
        spare = available - plan(64).allocated - scratch.EXPANDED_BYTES
        wanted = max(64, min(wanted, int(spare * 0.9) // row // 64 * 64))
        if plan(wanted).allocated <= available:
            report.warn(f"the memory holds a context of {wanted} tokens, of the model's {config.context_length}")
    needed = plan(wanted)
    if needed.allocated > available:
        raise PymlaError(
            f"not enough memory for {wanted} tokens of context: cache {gib(needed.cache)}, "
            f"scratch {gib(needed.scratch)}, derived weights {gib(needed.derived)}, process {gib(needed.process)}; "
            f"{gib(available)} is available. "
            "Lower `ctx` or choose a smaller `cache_type`"
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
    """Where each part of the model is."""
    if device == "reference":
        from pymla import reference

        return Placement.on(reference, config.num_hidden_layers)
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        checks.refuse("threads", threads, f"this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    if cpu.thread_count() < (threads or cores):
        report.warn(
            f"the system lets this process start {cpu.thread_count()} of {threads or cores} threads, and kernels run "
            "slower; raise its limit on processes (ulimit -u), or give `threads`"
        )
    gpu = cpu
    if split.gpu_layers:
        from pymla.cuda import backend as gpu
    return split.placement(config, cpu, gpu)


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
