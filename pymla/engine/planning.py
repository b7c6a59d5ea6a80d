"""Which part of a model goes to the GPU, and the memory that it takes there: arithmetic, before anything is loaded.

As in llama.cpp the last layers go to the GPU, with their cache, and behind them the output matrix; the first stay with
the CPU. Routed experts are most of a model's bytes, of which a token reads few: they can stay with the CPU by
themselves (``--cpu-moe``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from pymla.checks import refuse
from pymla.engine import costs
from pymla.engine.costs import MemoryPlan, cache_bytes, tensor_bytes
from pymla.errors import NoRoom
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement
from pymla.models.tensors import model_tensors
from pymla.pages import PAGE
from pymla.scratch import DEVICE_SLICE, SLICE

#: Bytes of the GPU that stay free: for the kernels' code, recorded steps and the gaps between arrays.
RESERVE = 384 << 20

#: The context that is made room for before parts of a model stay with the CPU, where nobody asked for another.
LEAST_CTX = 4096


class Split(NamedTuple):
    """What is on the GPU."""

    gpu_layers: int  # the last so many of L layers; L + 1: all of them, and the output matrix
    cpu_moe: bool = False  # the experts that the router chooses from stay with the CPU

    @classmethod
    def all(cls, config: ModelConfig) -> "Split":
        """Everything on the GPU."""
        return cls(config.num_hidden_layers + 1)

    def first(self, config: ModelConfig) -> int:
        """The first layer on the GPU; L where there is none."""
        return max(0, config.num_hidden_layers - self.gpu_layers)

    def output(self, config: ModelConfig) -> bool:
        """Whether the output matrix is on the GPU."""
        return self.gpu_layers > config.num_hidden_layers

    def apart(self, config: ModelConfig) -> bool:
        """Whether experts of layers on the GPU are on the CPU."""
        return self.cpu_moe and max(self.first(config), config.first_k_dense_replace) < config.num_hidden_layers

    def whole(self, config: ModelConfig) -> bool:
        """Whether everything is on the GPU; with it the embedding, of which a token needs a single row."""
        return self.output(config) and not self.apart(config)

    def placement(self, config: ModelConfig, host: ModuleType, device: ModuleType) -> Placement:
        """The backend of every part of a model: `device` what is on the GPU, `host` what is not."""
        first, layers = self.first(config), range(config.num_hidden_layers)
        routed = range(max(first, config.first_k_dense_replace) if self.cpu_moe else len(layers), len(layers))
        return Placement(
            embedding=device if self.whole(config) else host,
            layers=tuple(device if i >= first else host for i in layers),
            experts=tuple(device if i >= first and i not in routed else host for i in layers),
            output=device if self.output(config) else host,
        )

    def describe(self, config: ModelConfig) -> str:
        """In words."""
        layers = config.num_hidden_layers
        if self.output(config):
            text = f"all {layers} layers"
        elif self.gpu_layers == layers:
            text = f"all {layers} layers, the output matrix on the CPU"
        else:
            number = f" {self.gpu_layers}" if self.gpu_layers > 1 else ""
            text = f"the last{number} of {layers} layers"
        return text + (", routed experts on the CPU" if self.apart(config) else "")

    def options(self, config: ModelConfig) -> str:
        """As arguments of `pymla.load`, for messages."""
        layers = "" if self.output(config) else f"`gpu_layers` {self.gpu_layers}"
        return f"{layers} {'`cpu_moe`' if self.cpu_moe else ''}".strip()


@dataclass(frozen=True)
class Wish:
    """What the user asked for; None where it was left open.

    Raises
    ------
    PymlaError
        The number of layers is below 1.
    """

    ctx: int | None = None
    gpu_layers: int | None = None
    cpu_moe: bool = False

    def __post_init__(self):
        if self.gpu_layers is not None and self.gpu_layers < 1:
            refuse("gpu_layers", self.gpu_layers, "give a number from 1 on, or all; or choose `device` cpu")


class Choice(NamedTuple):
    """What is loaded where."""

    split: Split
    ctx: int  # tokens of the longest sequence
    device: MemoryPlan
    host: MemoryPlan


class Planner:
    """Memory of the GPU and of the CPU for any split of a model.

    Parameters
    ----------
    config : ModelConfig
    file : ModelFile
    cache_type, mla : str
        As for `Model`.
    """

    def __init__(self, config: ModelConfig, file: ModelFile, cache_type: str, mla: str):
        self.config, self.cache_type, self.mla = config, cache_type, mla
        self._file_bytes = file.nbytes
        self._parts = {}  # of each tensor that a backend takes as it is: what of the model it belongs to, its layer
        self._sizes = {name: tensor_bytes(tensor) for name, tensor in file.tensors.items()}
        for spec in model_tensors(config, file.tensors):
            # A k_b without kv_b is transposed before it goes anywhere.
            if spec.name in file.tensors and spec.stem != "attn_k_b":
                self._parts[spec.name] = spec.part, spec.layer
        self._derived = [costs.derived_bytes(config, file.tensors, [i]) for i in range(config.num_hidden_layers)]

    def uploaded(self, split: Split) -> list[str]:
        """The names of the tensors that the GPU takes as they are in the file."""
        config, first = self.config, split.first(self.config)
        there = {"output": split.output(config), "embedding": split.whole(config)}
        tied = "output.weight" not in self._sizes
        there["embedding"] |= tied and split.output(config)
        return [
            name
            for name, (part, layer) in self._parts.items()
            if there.get(part, layer >= first and not (split.cpu_moe and part == "experts"))
        ]

    def device(self, split: Split, ctx: int) -> MemoryPlan:
        """Memory of the GPU; its `total` must fit."""
        if not split.gpu_layers:
            return MemoryPlan(0, 0, 0, 0, 0)
        first = split.first(self.config)
        return MemoryPlan(
            weights=self._uploaded(split),
            derived=sum(self._derived[first:]),
            cache=self._cache(ctx, self.config.num_hidden_layers - first),
            scratch=costs.device_scratch_bytes(self.config, self.mla, ctx),
            process=RESERVE,
        )

    def host(self, split: Split, ctx: int) -> MemoryPlan:
        """Memory of the CPU; its `allocated` must fit, and `total` should."""
        first = split.first(self.config)
        # Routed experts get as many tokens at a time as the GPU computes.
        tokens = DEVICE_SLICE if split.apart(self.config) else SLICE if first else 0
        scratch = costs.scratch_bytes(self.config, self.mla, ctx, min(tokens, ctx)) if tokens else 0
        return MemoryPlan(
            weights=self._file_bytes - self._uploaded(split),
            derived=sum(self._derived[:first]),
            cache=self._cache(ctx, first),
            scratch=scratch,
            process=costs.PROCESS_BYTES,
        )

    def _uploaded(self, split: Split) -> int:
        return sum(self._sizes[name] for name in self.uploaded(split))

    def _cache(self, ctx: int, layers: int) -> int:
        return cache_bytes(self.config, self.cache_type, self.mla, ctx) * layers // self.config.num_hidden_layers


def choose(planner: Planner, wish: Wish, device: int, host: int) -> Choice:
    """The split and the context that fit, with as much on the GPU as there is room for.

    What was left open is chosen: everything on the GPU, or else everything but the routed experts, or else fewer
    layers; and the longest context that the model has and the memory holds, of `LEAST_CTX` tokens at least.

    Parameters
    ----------
    planner : Planner
    wish : Wish
    device, host : int
        Bytes of the GPU and of the CPU that can be allocated.

    Raises
    ------
    NoRoom
        It does not fit. The message has the plan and what would fit.
    """
    config, most = planner.config, wish.ctx or planner.config.context_length
    least = wish.ctx or min(LEAST_CTX, most)

    def fits(split, ctx):
        return planner.device(split, ctx).total <= device and planner.host(split, ctx).allocated <= host

    for split in _splits(config, wish):
        if fits(split, least):
            ctx = _longest(lambda ctx, split=split: fits(split, ctx), least, most)
            return Choice(split, ctx, planner.device(split, ctx), planner.host(split, ctx))
    raise NoRoom(_refusal(planner, wish, least, device, host, fits))


def _splits(config: ModelConfig, wish: Wish) -> Iterator[Split]:
    """What may be chosen, best first."""
    everything = config.num_hidden_layers + 1
    if wish.gpu_layers is not None:
        yield Split(min(wish.gpu_layers, everything), wish.cpu_moe)
        return
    yield Split(everything, wish.cpu_moe)
    for layers in range(everything, 0, -1):
        yield Split(layers, wish.cpu_moe or _has_experts(config))


def _has_experts(config: ModelConfig) -> bool:
    return config.first_k_dense_replace < config.num_hidden_layers


def _longest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The longest context that fits, in whole pages where it is not `most`; `least` does."""
    if fits(most):
        return most
    while most - least > PAGE:
        middle = (least + most) // 2 // PAGE * PAGE
        if middle <= least:
            break
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _refusal(planner, wish, ctx, device, host, fits):
    """Why nothing fits, and what would."""
    config = planner.config
    *_, split = _splits(config, wish)
    on_device, on_host = planner.device(split, ctx), planner.host(split, ctx)
    tokens = f"{ctx} tokens of context"
    if on_device.total > device:
        text = (
            f"the GPU's memory does not hold {split.describe(config)} with {tokens}: "
            f"weights {gib(on_device.weights + on_device.derived)}, cache {gib(on_device.cache)}, "
            f"scratch {gib(on_device.scratch)}, reserve {gib(on_device.process)}; {gib(device)} are free"
        )
    else:
        text = (
            f"not enough memory beside the GPU's for {tokens}: cache {gib(on_host.cache)}, "
            f"scratch {gib(on_host.scratch)}, derived weights {gib(on_host.derived)}, "
            f"process {gib(on_host.process)}; {gib(host)} are available"
        )
    found = []
    for moe in dict.fromkeys((wish.cpu_moe, wish.cpu_moe or _has_experts(config))):
        layers = next((n for n in range(split.gpu_layers, 0, -1) if fits(Split(n, moe), ctx)), 0)
        if layers:
            found.append(Split(layers, moe).options(config))
    if fits(split, PAGE):
        found.append(f"`ctx` {_longest(lambda tokens: fits(split, tokens), PAGE, ctx)}")
    return f"{text}. {'It fits with ' + ', or '.join(found) if found else 'Choose `device` cpu'}"


def gib(nbytes: int) -> str:
    """Bytes for a message."""
    return f"{nbytes / (1 << 30):.2f} GiB"
