"""The part of a model that goes to the GPU, and the memory that it takes there and on the host: arithmetic, before
anything is loaded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pymla import ggml
from pymla.checks import refuse
from pymla.engine.cache_layout import cache_bytes
from pymla.engine.memory_plan import (
    PROCESS_BYTES,
    MemoryPlan,
    derived_bytes,
    device_scratch_bytes,
    gib,
    scratch_bytes,
    tensor_bytes,
)
from pymla.engine.split import Split
from pymla.errors import NoRoom
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.tensors import layer_of, model_tensors, nextn_tensors
from pymla.pages import PAGE
from pymla.scratch import DEVICE, HOST, Portions

#: Whether a split and a context fit the memory.
Fits = Callable[[Split, int], bool]

#: Bytes of the GPU that stay free: for the kernels' code, recorded steps and the gaps between arrays.
RESERVE = 384 << 20

#: Tokens of context that a model gets, where nobody asked for another number, before parts of it stay with the CPU.
LEAST_CTX = 4096


@dataclass(frozen=True)
class Wish:
    """The options that the user gave; None where one was left open.

    Raises
    ------
    PymlaError
        The number of layers is below 1.
    """

    ctx: int | None = None
    gpu_layers: int | None = None
    cpu_moe: bool = False

    def __post_init__(self) -> None:
        if self.gpu_layers is not None and self.gpu_layers < 1:
            refuse("gpu_layers", self.gpu_layers, "give a number from 1 on, or all; or choose `device` cpu")


class Choice(NamedTuple):
    """The split and the context that were chosen, and the memory that they take."""

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
    cache_tokens : int
        Tokens that the cache holds at least, and that a step may have, of all sequences together.
    nextn : bool
        Whether the first block that predicts further tokens is loaded; its layer is where the last layer is.
    """

    def __init__(
        self,
        config: ModelConfig,
        file: ModelFile,
        cache_type: str,
        mla: str,
        cache_tokens: int = 1,
        nextn: bool = False,
    ):
        self.config, self.file, self.cache_type, self.mla, self.nextn = config, file, cache_type, mla, nextn
        self._cache_tokens = cache_tokens
        # The part and the layer of every tensor that a backend takes as it is in the file.
        self._parts: dict[str, tuple[str, int]] = {}
        self._sizes: dict[str, int] = {}  # as tensors are loaded
        layers = config.num_hidden_layers
        block = nextn_tensors(config, layers, file.tensors) if nextn else []
        for spec in [*model_tensors(config, file.tensors), *block]:
            # A k_b without kv_b is transposed before it goes anywhere.
            if spec.name in file.tensors and spec.stem != "attn_k_b":
                self._parts[spec.name] = spec.part, min(spec.layer, layers - 1)
                self._sizes[spec.name] = tensor_bytes(file.tensors[spec.name])
        #: Names of the tensors that are loaded as copies with plain rows.
        self.interleaved = {name for name in self._parts if file.tensors[name].qtype in ggml.PLAIN}
        #: Names of the tensors of layers that predict further tokens, which are not loaded.
        self.not_run = {name for name in file.tensors if (layer_of(name) or 0) >= layers + nextn}
        self._derived = [derived_bytes(config, file.tensors, self._with_block(range(i, i + 1))) for i in range(layers)]

    def uploaded(self, split: Split) -> list[str]:
        """The names of the tensors that the GPU takes as they are in the file."""
        config, first = self.config, split.first(self.config)
        there = {"output": split.output(config), "embedding": split.whole(config), "rope": False}
        tied = "output.weight" not in self._parts
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
            cache=self._cache(ctx, range(first, self.config.num_hidden_layers)),
            scratch=device_scratch_bytes(self.config, self.mla, max(ctx, self._cache_tokens)) + self._joined(DEVICE),
            process=RESERVE,
        )

    def host(self, split: Split, ctx: int) -> MemoryPlan:
        """Memory of the CPU; its `allocated` must fit, and `total` should."""
        first = split.first(self.config)
        # Routed experts get as many tokens at a time as the GPU computes.
        tokens = DEVICE.tokens if split.apart(self.config) else HOST.tokens if first else 0
        scratch = scratch_bytes(self.config, self.mla, ctx, min(tokens, ctx)) + self._joined(HOST) if tokens else 0
        uploaded = set(self.uploaded(split))
        # Of a tensor for the GPU a plain copy is made on its way there, of one after the other.
        passing = max((self._sizes[name] for name in self.interleaved & uploaded), default=0)
        return MemoryPlan(
            weights=self.file.nbytes - self.in_file(uploaded | self.interleaved | self.not_run),
            derived=sum(self._derived[:first]),
            cache=self._cache(ctx, range(first)),
            scratch=scratch,
            process=PROCESS_BYTES,
            plain=passing + sum(self._sizes[name] for name in self.interleaved - uploaded),
        )

    def read(self, split: Split) -> list[str] | None:
        """The names of the tensors that the CPU reads where they are in the file; None if these are all."""
        elsewhere = self.interleaved.union(self.not_run, self.uploaded(split))
        return [name for name in self.file.tensors if name not in elsewhere] if elsewhere else None

    def _uploaded(self, split: Split) -> int:
        return sum(self._sizes[name] for name in self.uploaded(split))

    def in_file(self, names: set[str]) -> int:
        """Bytes of tensors as they are in the file."""
        tensors = (self.file.tensors[name] for name in names)
        return sum(ggml.tensor_bytes(tensor.qtype, tensor.shape) for tensor in tensors)

    def _cache(self, ctx: int, layers: range) -> int:
        tokens = max(ctx, self._cache_tokens)
        return cache_bytes(self.config, self.cache_type, self.mla, tokens, self._with_block(layers))

    def _joined(self, portions: Portions) -> int:
        """Bytes of the hidden states of a slice, of the block's input that they are a part of, and of its int8 copy."""
        return portions.tokens * self.config.hidden_size * (4 + 2 * 5) if self.nextn else 0

    def _with_block(self, layers: range) -> list[int]:
        """Some layers, and the block's where the last one is among them."""
        last = self.config.num_hidden_layers - 1
        return [*layers, *([last + 1] if self.nextn and last in layers else [])]


def choose(planner: Planner, wish: Wish, device: int, host: int) -> Choice:
    """The split and the context that fit, with as much on the GPU as there is room for.

    Options that the wish leaves open are chosen: everything on the GPU, or else everything but the routed experts, or
    else fewer layers; and the longest context that the model has and the memory holds, of `LEAST_CTX` tokens at least.

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

    def fits(split: Split, ctx: int) -> bool:
        return planner.device(split, ctx).total <= device and planner.host(split, ctx).allocated <= host

    for split in _splits(config, wish):
        if fits(split, least):
            ctx = _longest(fits, split, least, most)
            return Choice(split, ctx, planner.device(split, ctx), planner.host(split, ctx))
    raise NoRoom(_refusal(planner, wish, least, device, host, fits))


def _splits(config: ModelConfig, wish: Wish) -> Iterator[Split]:
    """The splits that a wish permits, the best first."""
    everything = config.num_hidden_layers + 1
    if wish.gpu_layers is not None:
        yield Split(min(wish.gpu_layers, everything), wish.cpu_moe)
        return
    yield Split(everything, wish.cpu_moe)
    for layers in range(everything, 0, -1):
        yield Split(layers, wish.cpu_moe or _has_experts(config))


def _has_experts(config: ModelConfig) -> bool:
    return config.first_k_dense_replace < config.num_hidden_layers


def _longest(fits: Fits, split: Split, least: int, most: int) -> int:
    """The longest context that fits, given that `least` does: `most`, or else whole pages."""
    if fits(split, most):
        return most
    while most - least > PAGE:
        middle = (least + most) // 2 // PAGE * PAGE
        if middle <= least:
            break
        least, most = (middle, most) if fits(split, middle) else (least, middle)
    return least


def _refusal(planner: Planner, wish: Wish, ctx: int, device: int, host: int, fits: Fits) -> str:
    """The reason why nothing fits, and the options with which the model would."""
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
            f"not enough memory beside the GPU's for {tokens}: {on_host.describe_allocated()}; "
            f"{gib(host)} are available"
        )
    found = []
    for moe in dict.fromkeys((wish.cpu_moe, wish.cpu_moe or _has_experts(config))):
        layers = next((n for n in range(split.gpu_layers, 0, -1) if fits(Split(n, moe), ctx)), 0)
        if layers:
            found.append(Split(layers, moe).options(config))
    if fits(split, PAGE):
        found.append(f"`ctx` {_longest(fits, split, PAGE, ctx)}")
    return f"{text}. {'It fits with ' + ', or '.join(found) if found else 'Choose `device` cpu'}"
