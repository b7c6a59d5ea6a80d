"""Whether a file can be run, as far as the file alone tells: metadata, tokenizer, tensors, and their values.

`pymla.load` refuses a file for the first problem that `examine` finds, before it plans memory or compiles anything, and
``pymla inspect`` shows all of them. Nothing else is a reason to refuse a file, so the two always agree.

The check costs little: of the values it looks only at norms, biases and routers, and at a few pages of each other
tensor (`pymla.files.values`). `check_tensors` reads everything.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, cast

import numpy as np

from pymla import ggml
from pymla.engine.cache_layout import row_layout
from pymla.engine.forms import check_mode
from pymla.errors import PymlaError
from pymla.files import values
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.models.config import ModelConfig
from pymla.models.nextn import NEXTN
from pymla.models.tensors import TensorSpec, find, is_run, layer_of, model_tensors, nextn_tensors
from pymla.text.tokenizer import Tokenizer

T = TypeVar("T")
Found = tuple[TensorSpec, TensorInfo]


class Examined(NamedTuple):
    """The contents of a file, as far as they can be read, and the reasons why it cannot be run."""

    config: ModelConfig | None
    tokenizer: Tokenizer | None
    problems: list[PymlaError]

    def check(self) -> tuple[ModelConfig, Tokenizer]:
        """The configuration and the tokenizer.

        Raises
        ------
        PymlaError
            The first problem.
        """
        if self.problems:
            raise self.problems[0]
        return cast(ModelConfig, self.config), cast(Tokenizer, self.tokenizer)


def examine(
    file: ModelFile,
    cache_type: str = "q8_0",
    mla: str = "auto",
    *,
    dsa: bool = True,
    nextn: bool = False,
    check_tensors: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Examined:
    """Look for everything that keeps a file from running.

    Parameters
    ----------
    file : ModelFile
    cache_type, mla, dsa, nextn : as for `pymla.load`
        Not every type of cache holds every model's rows, and not every mode goes with sparse attention.
    check_tensors : whether to look at all values of all tensors, which reads the whole file
    progress : called with (bytes done, bytes in all) while all values are looked at

    Returns
    -------
    Examined
        With the problems in the order in which they matter: metadata, tokenizer, tensors, values.
    """
    problems: list[PymlaError] = []
    config = _collect(problems, lambda: ModelConfig.from_gguf(file))
    if config:
        config = config if dsa else config.dense()
        _collect(problems, lambda: check_mode(config, mla))
        _collect(problems, lambda: row_layout(config, cache_type, mla))
    tokenizer = _collect(problems, lambda: Tokenizer.from_gguf(file))
    if config and tokenizer:
        _collect(problems, lambda: _check_vocabulary(file, config, tokenizer))
    if config and _is_nextn_alone(file, config):
        problems.insert(
            0,
            PymlaError(
                f"{file.path}: the file holds nothing but layers that predict further tokens (nextn), for use beside "
                "the model's own file; take that one"
            ),
        )
    elif config:
        problems += _layer_problems(file, config)
        specs = model_tensors(config, file.tensors)
        if nextn and _collect(problems, lambda: _check_nextn(file, config)):
            specs += nextn_tensors(config, config.num_hidden_layers, file.tensors)
        tensors, found = _find_tensors(file, specs)
        problems += found
        problems += _factor_problems(file, tensors)
        problems += _value_problems(file, tensors, check_tensors, progress)
    return Examined(config, tokenizer, problems)


def _collect(problems: list[PymlaError], step: Callable[[], T]) -> T | None:
    """The result of a step, or None and a problem more."""
    try:
        return step()
    except PymlaError as error:
        problems.append(error)
        return None


def _check_vocabulary(file: ModelFile, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise PymlaError(
            f"{file.path}: metadata tokenizer.ggml.tokens has {tokenizer.vocab_size} tokens, and token_embd.weight "
            f"rows for {config.vocab_size}; convert the model again"
        )


def _is_nextn_alone(file: ModelFile, config: ModelConfig) -> bool:
    """Whether a file lacks all layers that run and has others, which predict further tokens."""
    layers = [layer for layer in map(layer_of, file.tensors) if layer is not None]
    further = any(".nextn." in name for name in file.tensors)
    return further and min(layers, default=0) >= config.num_hidden_layers


def _layer_problems(file: ModelFile, config: ModelConfig) -> Iterator[PymlaError]:
    """Tensors that contradict the metadata, which would leave them out or take them for others.

    Layers that predict further tokens (nextn) lie behind the others, and ``block_count`` includes them. A file may
    declare them and not hold them, or hold them behind ``block_count`` without declaring them: they are not run.
    """
    layers: dict[int, list[str]] = {}
    for name in file.tensors:
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(layer, []).append(name)
    run, key = config.num_hidden_layers, f"metadata {config.architecture}."
    count = f"{key}block_count is {run + config.num_nextn_predict_layers}"
    if config.num_nextn_predict_layers:
        count += f" with nextn_predict_layers {config.num_nextn_predict_layers}"
    for layer, names in sorted(layers.items()):
        nextn = next((name for name in names if ".nextn." in name), None)
        if layer >= run and not nextn:
            last = max(layer for layer, names in layers.items() if not any(".nextn." in name for name in names))
            yield PymlaError(
                f"{file.path}: {count}, so {run} layers would run, but tensor {names[0]} and others are there, of "
                f"{last + 1} layers; convert the model again or take another file"
            )
            break
        if layer < run and nextn:
            yield PymlaError(
                f"{file.path}: {count}, but tensor {nextn} says that layer {layer} is one that predicts further tokens "
                "and must not run with the others; convert the model again or take another file"
            )
            break
    if not config.n_shared_experts:
        shared = [name for name in file.tensors if name.endswith(".ffn_gate_shexp.weight")]
        if config.first_k_dense_replace < run and shared:
            yield PymlaError(
                f"{file.path}: tensor {shared[0]} is there, but {key}expert_shared_count says that no expert is "
                "shared; convert the model again"
            )


def _check_nextn(file: ModelFile, config: ModelConfig) -> bool:
    """True where a file says that it has a block that predicts further tokens (nextn).

    Raises
    ------
    PymlaError
        It says nothing of the kind, or its architecture has none.
    """
    key = f"{config.architecture}.nextn_predict_layers"
    if config.architecture not in NEXTN:
        raise PymlaError(f"{file.path}: models of architecture {config.architecture} have no block that `nextn` loads")
    if not config.num_nextn_predict_layers:
        raise PymlaError(
            f"{file.path}: the file has no block that predicts further tokens: metadata {key} is missing or 0; leave "
            "`nextn` out, or convert the model again with the block (--mtp)"
        )
    return True


def _find_tensors(file: ModelFile, specs: list[TensorSpec]) -> tuple[list[Found], list[PymlaError]]:
    """The tensors of a model that are as they should be, and a problem for each of the others; tensors of a type that
    does not run are one problem for each type."""
    tensors, problems, types = [], [], set()
    for spec in specs:
        info = file.tensors.get(spec.name)
        if info and info.qtype in types:
            continue
        try:
            tensors.append((spec, find(file, spec)))
        except PymlaError as error:
            problems.append(error)
            if info and not is_run(info.qtype):
                types.add(info.qtype)
    return tensors, problems


def _factor_problems(file: ModelFile, tensors: list[Found]) -> Iterator[PymlaError]:
    """A tensor of factors that a matrix has to be multiplied by, as files of NVFP4 have them; only factors of 1 can be
    left out."""
    for spec, _ in tensors:
        factors = file.tensors.get(f"{spec.name.removesuffix('.weight')}.scale")
        if factors is not None and not (factors.qtype == ggml.F32 and (factors.data.view(np.float32) == 1).all()):
            yield PymlaError(
                f"{factors.path}: tensor {factors.name} holds factors of tensor {spec.name}, which pymla does not "
                "apply; take a file of the model without such tensors"
            )
            break


def _value_problems(
    file: ModelFile,
    tensors: list[Found],
    everything: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[PymlaError]:
    """Tensors with NaN, infinity or holes (`pymla.files.values`)."""
    done, total = 0, sum(info.data.nbytes for _, info in tensors)
    if not everything:
        _fetch_ahead(file, tensors)

    def report(of_tensor: int) -> None:
        file.check_unchanged()
        if everything and progress:
            progress(done + of_tensor, total)

    for spec, info in tensors:
        if everything:
            file.prefault(names=[info.name])  # in larger steps than page faults read
        file.check_unchanged()
        if everything or _is_small(spec) or values.may_have_hole(info):
            scan = values.scan(info, report)
            if scan.first_not_finite is not None:
                yield PymlaError(_not_finite(info, scan, scan.first_not_finite))
            elif not spec.is_bias and (hole := scan.hole(info)):
                yield PymlaError(_hole(info, None if scan.is_zero else hole))
        done += info.data.nbytes


def _is_small(spec: TensorSpec) -> bool:
    """Whether all values of a tensor are looked at in any case: norms, biases, routers."""
    return spec.is_vector or spec.is_router


def _fetch_ahead(file: ModelFile, tensors: list[Found]) -> None:
    """Have everything read from disk that will be looked at."""
    for spec, info in tensors:
        starts, length = values.samples(info)
        size = values.block_bytes(info)
        pieces = ((start * size, (start + length) * size) for start in starts.tolist())
        file.fetch_ahead(info, [(0, info.data.nbytes)] if _is_small(spec) else pieces)


def _not_finite(info: TensorInfo, scan: values.Scan, first: int) -> str:
    what = "values" if info.qtype in ggml.FLOATS else "rows" if ggml.ROW_HEADER[info.qtype] else "blocks"
    return (
        f"{info.path}: tensor {info.name} holds NaN or infinity in {scan.not_finite} of {scan.blocks} {what}, the "
        f"first at {_index(info, first)}; the file is damaged, download or convert it again"
    )


def _hole(info: TensorInfo, hole: tuple[int, int] | None) -> str:
    """The message for zeros in a range of blocks; None: in all of them."""
    where = "throughout"
    if hole:
        first, stop = hole
        where = f"from {_index(info, first)} to {_index(info, stop - 1, last=True)}"
    return (
        f"{info.path}: tensor {info.name} is zero {where}, as an unfinished download leaves it; "
        "download or convert the file again"
    )


def _index(info: TensorInfo, block: int, last: bool = False) -> list[int]:
    """Of a block's first weight, or of its last."""
    blocks, rows = values.blocks_of_row(info), ggml.ROWS_TOGETHER[info.qtype]
    group, part = divmod(block, blocks)
    row, column = rows * group, info.shape[-1] // blocks * part
    if last:
        row, column = row + rows - 1, column + info.shape[-1] // blocks - 1
    return [int(i) for i in np.unravel_index(row * info.shape[-1] + column, info.shape)]
