"""Fitting a model to this machine: the part of it that goes to the GPU, and the context.

`pymla.engine.planning` is the arithmetic; this module asks for the free memory, and tells the user of the choice.
"""

from pymla import cuda
from pymla.engine.cache_layout import row_bytes
from pymla.engine.devices import find_device
from pymla.engine.memory_plan import MemoryPlan, choice_bytes, gib
from pymla.engine.planning import LEAST_CTX, Planner, Wish, choose
from pymla.engine.report import Report
from pymla.engine.split import Split
from pymla.errors import NoRoom, PymlaError
from pymla.host.memory import available_memory
from pymla.pages import PAGE
from pymla.scratch import HOST

#: Bytes per second that a disk gives a file that does not fit the memory; only for the warning.
_DISK = 1e9


def fit(device: str, wish: Wish, planner: Planner, report: Report) -> tuple[Split, int]:
    """The part of a model that goes to the GPU, and the context.

    Parameters
    ----------
    device : one of `pymla.engine.devices.DEVICES`
    wish : Wish
    planner : Planner
    report : Report
        Told where the model runs, and if there is no room for the whole context or for all weights.

    Raises
    ------
    PymlaError
        The options do not fit the memory, and the message has the plan; or there is no such device.
    """
    found, reason = find_device(device)
    asked = wish.gpu_layers is not None or wish.cpu_moe
    if found != "cuda" and asked:
        why = f"there is none here: {reason}" if device == "auto" else f"`device` is {device}"
        raise PymlaError(f"`gpu_layers` and `cpu_moe` are for a GPU, and {why}; leave them out")
    if found == "cuda":
        try:
            return _fit_gpu(wish, planner, asked, report)
        except NoRoom:
            if asked or device != "auto":
                raise
            reason = "the GPU's memory does not hold a layer of the model"
    if device == "auto":
        report.running(f"the CPU: {reason}")
    return Split(0), _fit_cpu(planner, wish.ctx, report)


def _fit_gpu(wish: Wish, planner: Planner, asked: bool, report: Report) -> tuple[Split, int]:
    from pymla.cuda import memory

    free, available, config = memory.free_memory(), available_memory(), planner.config
    split, ctx, _, on_host = choose(planner, wish, free, available)
    where = f"{cuda.describe()['name']}: {split.describe(config)}"
    if not (asked or split.whole(config)):
        whole = planner.device(Split.all(config), min(ctx, LEAST_CTX)).total
        where += f" (the whole model takes {gib(whole)}, and {gib(free)} are free)"
    report.running(where)
    if wish.ctx is None and ctx < config.context_length:
        _warn_of_context(planner, ctx, report)
    _warn_of_disk(planner, on_host, available, report)
    return split, ctx


def _fit_cpu(planner: Planner, ctx: int | None, report: Report) -> int:
    """The context that fits the memory."""
    config, available = planner.config, available_memory()
    wanted = config.context_length if ctx is None else ctx

    def plan(tokens: int) -> MemoryPlan:
        return planner.host(Split(0), tokens)

    if plan(wanted).allocated > available and ctx is None:
        row = row_bytes(config, planner.cache_type, planner.mla, range(config.num_hidden_layers + planner.nextn))
        spare = available - plan(PAGE).allocated - HOST.most_expanded - choice_bytes(config, wanted)
        wanted = max(PAGE, min(wanted, int(spare * 0.9) // row // PAGE * PAGE))
        if plan(wanted).allocated <= available:
            _warn_of_context(planner, wanted, report)
    needed = plan(wanted)
    if needed.allocated > available:
        raise PymlaError(
            f"not enough memory for {wanted} tokens of context: {needed.describe_allocated()}; "
            f"{gib(available)} is available. Lower `ctx` or choose a smaller `cache_type`"
        )
    _warn_of_disk(planner, needed, available, report)
    return wanted


def _warn_of_context(planner: Planner, ctx: int, report: Report) -> None:
    """Say that the context is shorter than the model's."""
    report.warn(f"the memory holds a context of {ctx} tokens, of the model's {planner.config.context_length}")


def _warn_of_disk(planner: Planner, needed: MemoryPlan, available: int, report: Report) -> None:
    """Say so if weights do not stay in memory."""
    short = needed.total - available
    if short > 0:
        report.warn(
            f"{planner.file.path} takes {gib(needed.weights)} and {gib(available)} of memory are available: about "
            f"{gib(short)} are read from disk again and again, up to {short / _DISK:.0f} s for a token"
        )
