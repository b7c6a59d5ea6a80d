"""The sweep: speed of prompts and of generation as the context grows.

A point of the sweep is what llama.cpp's relatives call a row of ``llama-sweep-bench``: with N_KV tokens in the cache,
first TG tokens are generated, one by one, and forgotten; then a prompt of PP tokens is appended, which stays. Token ids
are random, with a fixed seed; choosing a token from its logits is not part of the times.

>>> import pymla
>>> from pymla.measure import sweep
>>> model = pymla.load(ctx=128)                                   # doctest: +SKIP
>>> [row.n_kv for row in sweep.sweep(model, sweep.Settings(pp=32, tg=4, depths=(0, 64)))]  # doctest: +SKIP
[0, 64]
"""

import csv
import datetime
import importlib
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pymla import __version__, checks, cuda
from pymla.engine import costs
from pymla.errors import PymlaError

#: Columns of ``llama-sweep-bench``, and what comes behind them.
PEER_COLUMNS = ("PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s")
COLUMNS = (*PEER_COLUMNS, "PP share", "TG share", "cache MiB")
_WIDTHS = (6, 6, 6, 8, 8, 8, 8, 8, 8, 9)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Raises
    ------
    PymlaError
        A number is out of range, or the depths are not in ascending order.
    """

    pp: int = 512
    tg: int = 128
    depths: tuple = (0,)  # N_KV of each point
    repeat: int = 1
    seed: int = 1

    def __post_init__(self):
        if self.pp < 0 or self.tg < 0 or self.pp + self.tg == 0:
            raise PymlaError(f"`pp` is {self.pp} and `tg` {self.tg}: one of them must be above 0, and none below")
        if self.repeat < 1:
            raise PymlaError(f"`repeat` is {self.repeat}; 1 at least is expected")
        if not self.depths or min(self.depths) < 0 or list(self.depths) != sorted(set(self.depths)):
            given = ",".join(map(str, self.depths))
            raise PymlaError(
                f"`depths` is {given}; numbers of tokens from 0 on are expected, in ascending order, each once"
            )

    @property
    def tokens(self):
        """Tokens of context that the last point needs."""
        return self.depths[-1] + max(self.pp, self.tg)


def sweep_depths(ctx, pp, tg):
    """N_KV of ``llama-sweep-bench``: every `pp` tokens, as far as the context holds what is measured behind them."""
    return tuple(range(0, ctx - max(pp, tg) + 1, pp or tg or 1))


@dataclass(frozen=True)
class Row:
    """A point of the sweep. Times are those of all repetitions; rates come from their medians."""

    model: str  # the file's name
    mla: str
    cache_type: str
    device: str  # "cpu", "cuda" or "reference"; with a + between them where layers are on several
    threads: int
    pp: int
    tg: int
    n_kv: int
    pp_seconds: tuple
    tg_seconds: tuple
    pp_macs: int  # multiply-adds of the prompt
    tg_bytes: int  # bytes that generation reads
    cache_bytes: int  # of N_KV tokens

    @property
    def t_pp(self):
        """Seconds of the prompt; None without one."""
        return statistics.median(self.pp_seconds) if self.pp else None

    @property
    def t_tg(self):
        """Seconds of generation; None without any."""
        return statistics.median(self.tg_seconds) if self.tg else None

    @property
    def s_pp(self):
        """Tokens of the prompt per second."""
        return self.pp / self.t_pp if self.pp else None

    @property
    def s_tg(self):
        """Generated tokens per second."""
        return self.tg / self.t_tg if self.tg else None

    def shares(self, limits):
        """Shares of the device's limits: the prompt's of int8 multiply-adds, generation's of streamed bytes. A model on
        several devices has none: its layers run one after the other, each against another limit."""
        if "+" in self.device:
            return None, None
        pp = self.pp_macs / self.t_pp / limits.int8 if self.pp else None
        tg = self.tg_bytes / self.t_tg / limits.read if self.tg else None
        return pp, tg

    def cells(self, limits):
        """Values in the order of `COLUMNS`; None where nothing was measured."""
        mib = self.cache_bytes / (1 << 20)
        return (self.pp, self.tg, self.n_kv, self.t_pp, self.s_pp, self.t_tg, self.s_tg, *self.shares(limits), mib)


def sweep(language_model, settings, progress=None):
    """Measure the points one after the other; the cache is filled in between.

    Parameters
    ----------
    language_model : LanguageModel
        With a context of at least ``settings.tokens``.
    settings : Settings
    progress : callable(done, total), optional
        Tokens, those that only fill the cache or warm up included.

    Yields
    ------
    Row

    Raises
    ------
    PymlaError
        The context is too short.
    """
    ctx = language_model.model.ctx
    if settings.tokens > ctx:
        raise PymlaError(f"the measurement needs a context of {settings.tokens} tokens and has {ctx}; raise `ctx`")
    engine = _Engine(language_model, settings, progress)
    try:
        engine.warm_up()
        for depth in settings.depths:
            engine.fill(depth)
            tg_seconds = [engine.generate() for _ in range(settings.repeat)]
            pp_seconds = [engine.prompt(depth) for _ in range(settings.repeat)]
            yield engine.row(depth, pp_seconds, tg_seconds)
    finally:
        engine.free()


class _Engine:
    """One sequence of random tokens that grows."""

    def __init__(self, language_model, settings, progress):
        self._language_model, self._settings = language_model, settings
        self._model = language_model.model
        self._sequence = self._model.new_sequence()
        self._random = np.random.default_rng(settings.seed)
        self._progress = progress
        self._warm_tokens = min(64, self._model.ctx)
        pp, tg, depths = settings.pp, settings.tg, settings.depths
        # A point's prompt fills the cache for the next one, except where depths lie closer than that.
        filled = sum(max(0, b - a - pp) for a, b in zip((0, *depths), depths, strict=False)) + depths[0]
        self._total = self._warm_tokens + filled + settings.repeat * len(depths) * (pp + tg)
        self._done = 0

    def warm_up(self):
        """A short prompt and two generated tokens, of which the first records the step."""
        self._append(self._warm_tokens)
        for _ in range(2):
            self._truncate(self._warm_tokens - 1)
            self._step()
        self._truncate(0)

    def free(self):
        """Give the cache back, so that the model can be measured again."""
        self._model.free(self._sequence)

    def fill(self, depth):
        """Bring the cache to `depth` tokens."""
        if self._sequence.length > depth:
            self._truncate(depth)
        elif self._sequence.length < depth:
            self._append(depth - self._sequence.length)

    def generate(self):
        """Seconds of generating; the tokens are forgotten."""
        depth = self._sequence.length
        began = time.perf_counter()
        for _ in range(self._settings.tg):
            self._step()
        seconds = time.perf_counter() - began
        self._truncate(depth)
        self._report(self._settings.tg)
        return seconds

    def prompt(self, depth):
        """Seconds of a prompt at `depth` tokens, which stays in the cache."""
        self._truncate(depth)
        return self._append(self._settings.pp) if self._settings.pp else 0.0

    def row(self, depth, pp_seconds, tg_seconds):
        model, settings = self._language_model, self._settings
        kinds = {"cache_type": self._model.cache.cache_type, "mla": self._model.mla}
        ops = costs.step_ops(model.config, None, settings.pp, depth + settings.pp, **kinds) if settings.pp else ()
        # The bytes of a token grow evenly with the cache: the mean of first and last is that of all.
        ends = [
            costs.token_bytes(model.config, model.file.tensors, depth + n, **kinds) for n in (1, max(1, settings.tg))
        ]
        return Row(
            model=Path(model.file.path).name,
            mla=self._model.mla,
            cache_type=self._model.cache.cache_type,
            device=model.device,
            threads=thread_count(self._model),
            pp=settings.pp,
            tg=settings.tg,
            n_kv=depth,
            pp_seconds=tuple(pp_seconds),
            tg_seconds=tuple(tg_seconds),
            pp_macs=sum(op.macs for op in ops),
            tg_bytes=round(sum(ends) / 2 * settings.tg),
            cache_bytes=depth * self._model.cache.row_bytes,
        )

    def _append(self, count):
        """Seconds of a forward pass over random tokens."""
        tokens = self._tokens(count)
        began = time.perf_counter()
        self._forward(tokens, self._layers(count))
        seconds = time.perf_counter() - began
        self._report(count)
        return seconds

    def _step(self):
        self._forward(self._tokens(1))

    def _forward(self, tokens, progress=None):
        """A forward pass; where logits stay on a GPU, one of them is fetched, as a chosen token would be."""
        logits = self._model.step([(self._sequence, tokens)], progress=progress)
        self._model.backend.memory.to_host(logits[:, :1])

    def _truncate(self, length):
        self._model.cache.truncate(self._sequence, length)

    def _tokens(self, count):
        return self._random.integers(self._language_model.config.vocab_size, size=count, dtype=np.int32)

    def _layers(self, count):
        if not self._progress:
            return None
        return lambda done, total: self._progress(self._done + count * done // total, self._total)

    def _report(self, count):
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)


def thread_count(model):
    """Threads that a model's backends compute with."""
    counts = [getattr(backend, "thread_count", None) for backend in model.placement.backends]
    return max(count() if count else 1 for count in counts)


def measure_limits(device="cpu", threads=None):
    """The limits of the GPU for "cuda" (`pymla.cuda.limits.Limits`), else of the machine (`pymla.cpu.limits.Limits`)
    with so many threads, all usable cores by default.

    Raises
    ------
    PymlaError
        There are not so many cores.
    """
    from pymla import cpu

    cores = cpu.usable_cores()
    if threads is not None and not 1 <= threads <= cores:
        checks.refuse("threads", threads, f"this process may use 1 to {cores} cores")
    cpu.set_threads(threads or cores)
    limits = importlib.import_module(f"pymla.{'cuda' if device == 'cuda' else 'cpu'}.limits")
    return limits.measure()


def machine():
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(limits, device="cpu"):
    """What a table of rates is worth nothing without: machine, threads, limits, versions, date, as plain types."""
    from pymla import cpu

    about = {
        "device": device,
        "machine": machine(),
        "isa": cpu.ISA,
        "threads": cpu.thread_count(),
        "limits": {"read_bytes_per_second": limits.read, "int8_macs_per_second": limits.int8},
        "pymla": __version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        gpu = cuda.describe()
        about |= {"gpu": gpu["name"], "gpu_isa": "sm_{}{}".format(*gpu["capability"])}
    return about


def describe(about):
    """`facts` on one line."""
    limits = about["limits"]
    return (
        f"{describe_machine(about)}; reads {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"int8 {limits['int8_macs_per_second'] / 1e9:.0f} GMAC/s; pymla {about['pymla']}, {about['date'][:10]}"
    )


def describe_machine(about):
    """What computes, in words."""
    if about["device"] == "cuda":
        return f"{about['gpu']}, {about['gpu_isa']}, {about['machine']}"
    return f"{about['machine']}, {about['isa']}, {about['threads']} threads"


def header():
    """The table's first two lines."""
    names = (f"{name:>{width}}" for name, width in zip(COLUMNS, _WIDTHS, strict=True))
    rules = "|".join("-" * (width + 1 + (i > 0)) for i, width in enumerate(_WIDTHS))
    return f"|{' | '.join(names)} |\n|{rules}|"


def line(row, limits):
    """A row of the table; a dash where nothing was measured."""
    formats = ("d", "d", "d", ".3f", ".2f", ".3f", ".2f", ".1%", ".1%", ".2f")
    cells = (
        f"{'-' if value is None else format(value, spec):>{width}}"
        for value, spec, width in zip(row.cells(limits), formats, _WIDTHS, strict=True)
    )
    return f"|{' | '.join(cells)} |"


def report(rows, limits, about):
    """The run as plain types, for JSON."""
    return {**about, "rows": [_record(row, limits) for row in rows]}


def _record(row, limits):
    pp_share, tg_share = row.shares(limits)
    return {
        "model": row.model,
        "mla": row.mla,
        "cache_type": row.cache_type,
        "device": row.device,
        "threads": row.threads,
        "pp": row.pp,
        "tg": row.tg,
        "n_kv": row.n_kv,
        "t_pp": row.t_pp,
        "s_pp": row.s_pp,
        "t_tg": row.t_tg,
        "s_tg": row.s_tg,
        "pp_share": pp_share,
        "tg_share": tg_share,
        "cache_bytes": row.cache_bytes,
        "pp_seconds": list(row.pp_seconds),
        "tg_seconds": list(row.tg_seconds),
    }


def write_csv(stream, rows, limits):
    """The table with unrounded values, and with columns that say what each row was measured with."""
    writer = csv.writer(stream)
    writer.writerow(("model", "mla", "cache type", "device", "threads", *COLUMNS))
    for row in rows:
        cells = ("" if value is None else value for value in row.cells(limits))
        writer.writerow((row.model, row.mla, row.cache_type, row.device, row.threads, *cells))
