"""Collecting an importance matrix: a model reads a text, piece by piece, and the squares of what its matrices read are
added up, column by column (`pymla.make.importance`).

The text is cut as llama.cpp's ``tools/imatrix/imatrix.cpp`` cuts it: into chunks of `ctx` tokens, each read on its own,
with BOS in the place of its first token. Attention is absorbed throughout, so that `attn_k_b` and `attn_v_b` are seen
to read what they read when a model generates: queries, and latent rows weighted by attention. In chunks of 512 tokens
that takes a few percent more multiply-adds than the expanded form. The cache is float32.

Tensors that read the same share their sums: gate and up, the matrices that read a layer's normalised input, and those
of an indexer, which need not run for it. `attn_kv_b`, which multiplies latent rows, has an entry in every layout of a
file, as `attn_k_b` and `attn_v_b` have.

Squares are added in float64; llama.cpp adds them in float32. That takes 16 bytes for each column of each matrix: 8 for
the chunk that is being read, and 8 for those before it. For DeepSeek-V3's experts that is 2.2 GB.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pymla.backend import Array
from pymla.engine.model import Model
from pymla.engine.slices import slices
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.files.imatrix_entries import Entry
from pymla.files.kl_base import first_record
from pymla.make.importance import Importance
from pymla.make.observed_backend import address, observed
from pymla.make.perplexity import Mean, log_sums_of, perplexity
from pymla.models.placement import Placement
from pymla.models.tensors import TensorSpec, layer_tensors
from pymla.models.weights import Layer
from pymla.pages import LayerCache

#: Tokens of a chunk by default, as in llama.cpp.
CTX = 512

#: Rows that are squared at a time, so that they stay in a cache.
_ROWS = 64


class _Total(NamedTuple):
    """Sums of whole chunks."""

    sums: np.ndarray  # float64 (matrices, K)
    counts: np.ndarray  # int64 (matrices,)
    chunks: int


class _Inputs:
    """Sums of squares of what some tensors read: of the chunk that is being read, and of those before it.

    Parameters
    ----------
    names : sequence of str
        The tensors.
    matrices : int
        Experts; 1 where all inputs count together.
    columns : int
        Columns of a matrix, or of the matrices of all heads together.
    """

    def __init__(self, names: Sequence[str], matrices: int, columns: int):
        self.names = tuple(names)
        self._sums, self._counts = np.zeros((matrices, columns)), np.zeros(matrices, np.int64)
        self.total = _Total(np.zeros_like(self._sums), np.zeros_like(self._counts), 0)

    def begin(self) -> None:
        """Forget a chunk that was not read to its end."""
        self._sums.fill(0)
        self._counts.fill(0)

    def add(self, x: np.ndarray, matrix: int = 0) -> None:
        """Rows (n, K) of the chunk that is being read."""
        for part in slices(0, len(x), _ROWS):
            wide = x[part].astype(np.float64)
            self._sums[matrix] += np.einsum("tk,tk->k", wide, wide)
        self._counts[matrix] += len(x)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self._sums).all())

    def commit(self, chunk: int) -> None:
        """Add chunk number `chunk` to the total, unless that was done. An interrupt leaves it done or not."""
        sums, counts, chunks = self.total
        if chunks < chunk:
            self.total = _Total(sums + self._sums, counts + self._counts, chunk)


class Collector:
    """Collects the importance matrix of a model.

    Parameters
    ----------
    model : Model
        Its weights and its placement are shared; its cache is left alone.
    file : ModelFile
        That the weights come from.
    ctx : int
        Tokens of the longest chunk.
    process_output : bool
        Whether the output matrix has an entry as well: that of the embeddings, where the two are one.
    dtype : float32 or float64
        Of intermediate results. Only the reference computes in float64.

    Attributes
    ----------
    chunks : int
        Chunks that were read to their end.
    """

    def __init__(
        self,
        model: Model,
        file: ModelFile,
        ctx: int = CTX,
        *,
        process_output: bool = False,
        dtype: Any = np.float32,
    ):
        if model.weights is None:
            raise PymlaError(f"{file.path}: this model was closed; load it again")
        self._file, self._output = file, process_output
        watched: dict[int, _Inputs] = {}
        place = _around(model.placement, watched)
        self._model = Model(model.config, model.weights, place, cache_type="f32", mla="1", ctx=ctx, dtype=dtype)
        for where, inputs in _inputs(self._model, file.tensors, process_output):
            watched[address(where)] = inputs
        self._inputs = list(watched.values())
        self.chunks = 0

    def read(self, tokens: np.ndarray, logits: bool = False) -> np.ndarray | None:
        """Read a chunk, int32 (T,), and add what its matrices read. Interrupted, it adds nothing.

        Returns
        -------
        float32 array (T, V)
            Logits after every token, if they are wanted.

        Raises
        ------
        PymlaError
            Something that a matrix read is not finite. The chunk is left out.
        """
        self._file.check_unchanged()
        for inputs in self._inputs:
            inputs.begin()
        sequence = self._model.new_sequence()
        try:
            found = self._model.forward([(sequence, tokens)], "all" if logits or self._output else "last")
        finally:
            self._model.free(sequence)
        for inputs in self._inputs:
            if not inputs.is_finite:
                raise PymlaError(
                    f"{self._file.path}: what {inputs.names[0]} multiplies is not finite in chunk {self.chunks + 1}: "
                    "the model's weights are damaged, or overflow"
                )
        self.chunks += 1
        self._commit()
        return found if logits else None

    def importance(self, datasets: Sequence[str] = (), chunk_size: int = CTX) -> Importance:
        """The sums so far; arguments as of `Importance`."""
        self._commit()
        entries: dict[str, Entry] = {}
        for inputs in self._inputs:
            entry = Entry(inputs.total.sums, inputs.total.counts)
            entries |= dict.fromkeys(inputs.names, entry)
        return Importance(entries, datasets, chunk_size, self._file.path)

    def _commit(self) -> None:
        for inputs in self._inputs:
            inputs.commit(self.chunks)


class Perplexity:
    """Perplexity of the second halves of chunks (`pymla.make.perplexity`)."""

    def __init__(self) -> None:
        self._losses: list[np.ndarray] = []

    def add(self, logits: np.ndarray, tokens: np.ndarray) -> None:
        """Logits float32 (T, V) after every token of a chunk (T,)."""
        first = first_record(len(tokens))
        counted, following = logits[first : len(tokens) - 1], tokens[first + 1 :]
        if len(counted):
            log_sums = log_sums_of(counted, "a chunk")
            self._losses.append(log_sums - counted[np.arange(len(counted)), following])

    @property
    def estimate(self) -> Mean:
        """The perplexity and its standard error so far; NaN where no token was predicted."""
        return perplexity(self._losses) if self._losses else Mean(math.nan, math.nan)


def chunks_of(
    ids: Sequence[int], bos_id: int | None, ctx: int = CTX, first: int = 0, limit: int | None = None
) -> np.ndarray:
    """Chunks of a text: int32 (n, ctx).

    Parameters
    ----------
    ids : sequence of int
        The text's tokens, BOS first where the model expects it.
    bos_id : int, optional
        Takes the place of the first token of every chunk.
    first, limit : int
        How many chunks are left out at the beginning, and how many there are at most.

    Raises
    ------
    PymlaError
        No chunk is left.
    """
    count = len(ids) // ctx
    if not count:
        raise PymlaError(f"the text has {len(ids)} tokens, and a chunk {ctx}; take a longer text, or lower `ctx`")
    if first >= count:
        raise PymlaError(f"`from_chunk` is {first}, and the text has {count} chunks of {ctx} tokens; lower it")
    chunks = np.array(ids[: count * ctx], np.int32).reshape(count, ctx)[first:][:limit]
    if bos_id is not None:
        chunks[:, 0] = bos_id
    return chunks


def collect(
    collector: Collector,
    chunks: np.ndarray,
    perplexity: Perplexity | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Read chunks (n, ctx).

    Parameters
    ----------
    perplexity : Perplexity, optional
        Estimated meanwhile.
    progress : callable(done, total)
        Told of each chunk that was read. It may look at the collector and the perplexity.

    Raises
    ------
    PymlaError
        As `Collector.read`.
    """
    for done, tokens in enumerate(chunks, 1):
        logits = collector.read(tokens, logits=perplexity is not None)
        if perplexity is not None and logits is not None:
            perplexity.add(logits, tokens)
        progress(done, len(chunks))


def _around(place: Placement, watched: dict[int, _Inputs]) -> Placement:
    """A placement on backends that show what `watched` matrices read."""
    around = {backend: observed(backend, watched) for backend in place.backends}
    return Placement(
        around[place.embedding],
        tuple(around[each] for each in place.layers),
        tuple(around[each] for each in place.experts),
        around[place.output],
    )


def _inputs(model: Model, names: Container[str], output: bool) -> Iterator[tuple[Array, _Inputs]]:
    """What is watched: matrices and caches by their arrays, and the tensors whose inputs are seen there."""
    assert model.weights is not None  # it was just made
    weights = model.weights
    for i, (layer, cache) in enumerate(zip(weights.layers, model.cache.layers, strict=True)):
        specs = {spec.field: spec for spec in layer_tensors(model.config, i, names)}
        yield from _of_attention(model, layer, cache, specs, i)
        yield from _of_networks(layer, specs)
    if output:
        name = "output.weight" if "output.weight" in names else "token_embd.weight"
        yield weights.output.data, _Inputs([name], 1, model.config.hidden_size)


def _of_attention(
    model: Model, layer: Layer, cache: LayerCache, specs: dict[str, TensorSpec], index: int
) -> Iterator[tuple[Array, _Inputs]]:
    config = model.config
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    hidden = "attn_q", "attn_q_a", "attn_kv_a_mqa", "indexer_attn_k", "indexer_proj"
    yield layer.attn_kv_a_mqa.data, _shared(specs, *hidden)
    if layer.attn_q_b is not None:
        yield layer.attn_q_b.data, _shared(specs, "attn_q_b", "indexer_attn_q_b")
    of_heads = (
        ("attn_kv_b", cache[0].data, rank),
        ("attn_k_b", layer.attn_k_b.data, heads * config.qk_nope_head_dim),
        ("attn_v_b", layer.attn_v_b.data, heads * rank),
    )
    for stem, where, columns in of_heads:
        yield where, _Inputs([f"blk.{index}.{stem}.weight"], 1, columns)
    yield layer.attn_output.data, _shared(specs, "attn_output")


def _of_networks(layer: Layer, specs: dict[str, TensorSpec]) -> Iterator[tuple[Array, _Inputs]]:
    """Of the dense network or the shared experts, of the router and of the routed experts."""
    if layer.ffn_up is not None:
        first = layer.ffn_up if layer.ffn_gate is None else layer.ffn_gate
        yield first.data, _shared(specs, "ffn_gate", "ffn_up")
        yield layer.ffn_down.data, _shared(specs, "ffn_down")
    if layer.ffn_gate_inp is not None:
        yield layer.ffn_gate_inp.data, _shared(specs, "ffn_gate_inp")
        yield layer.ffn_gate_exps.data, _shared(specs, "ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps")
        yield layer.ffn_down_exps.data, _shared(specs, "ffn_down_exps")


def _shared(specs: dict[str, TensorSpec], *fields: str) -> _Inputs:
    """The inputs of those of some tensors that the layer has."""
    own = [specs[field] for field in fields if field in specs]
    shape = own[0].shapes[0]
    return _Inputs([spec.name for spec in own], math.prod(shape[:-2]), shape[-1])
