"""The operations of a backend, each listed once: what a model is computed with, on whatever hardware.

A backend is a module: `pymla.reference` (NumPy, the definition), `pymla.cpu` and `pymla.cuda.backend`. `Backend` lists
its members, and every member that is a module has a Protocol of its own here. All backends have these names and these
signatures; ``tests/test_backend.py`` compares them. `pymla.contract` has the checks of the arguments.

Letters of the shapes: T tokens of a step, S rows of a cache that a sequence has, B sequences of a step, H heads,
E experts, k experts of a token, K columns and N rows of a matrix, V tokens of the vocabulary, R rotated numbers of a
key. A key has nope + R numbers, a value v, and a row of a latent cache rank + R.

What holds for every operation:

- Arrays lie in the backend's own memory (`Memory`). "float" is float32; the reference takes float64 as well, and
  computes in it.
- `out` comes last and belongs to the caller, who may ask for part of a larger array where rows need not be contiguous.
  The operation fills it and returns it. On a GPU it is filled when `Memory.to_host` returns.
- A `PymlaError` names the operation, the argument, what it is and what it must be: for a shape, a dtype, an array that
  is not contiguous where a kernel goes through it by address, and a type that the backend does not run. Values of
  indices (tokens, experts, slots, positions, pages) are compared with what they index where the host can read them. A
  GPU takes an index that is out of range for the last one in range; while a `StepGraph` records, indices mean nothing
  yet.
- Nothing but the rows that the docstring names is read. Rows of the cache behind a sequence's end may hold anything.

"Cost" is the arithmetic in multiply-adds and the bytes read from memory at least, without the caller's own arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pymla.pages import LatentCache, Step
from pymla.tensor import QTensor

if TYPE_CHECKING:
    from pymla.errors import PymlaError
    from pymla.models.config import ModelConfig
    from pymla.text.sampling import Candidates, Sampled, SamplingParams

#: A NumPy array, or on a GPU a `pymla.cuda.memory.DeviceArray`: both have shape, strides, dtype and views.
Array = Any
#: Called with what is done and how much there is in all.
Progress = Callable[[int, int], object]


class MatrixInput(Protocol):
    """The input of one or several matrices; backends keep it quantised beside, so that it is quantised once."""

    x: Array  # float (T, K)


class KeysValues(Protocol):
    """Expanded keys and values of one sequence, in the form that the backend multiplies. `Attention.keys_values` makes
    them, `Attention.expand` fills them, `Attention.expanded` reads them; nobody else looks inside."""


class Quant(Protocol):
    """Products with matrices in ggml blocks (`pymla.tensor.QTensor`) of the types ``ggml.SUPPORTED``.

    The fast backends multiply types of ``ggml.QUANTISED`` on integers: activations are rounded to int8 with a float32
    scale for every 32 numbers.
    """

    def Activation(self, x: Array) -> MatrixInput:
        """The input of matrices.

        Parameters
        ----------
        x : float array (T, K), contiguous
            It must not change while the result is used.
        """

    def matmul(self, w: QTensor, activation: MatrixInput, out: Array) -> Array:
        """``out = x @ W.T``, or the products of several matrices next to each other.

        Parameters
        ----------
        w : QTensor of N rows and K columns, or of M such matrices
        activation : Activation of (T, K)
        out : float array (T, N), or (T, M * N), contiguous

        Notes
        -----
        Cost: T * M * N * K multiply-adds; the bytes of `w`, once.
        """

    def matmul_heads(self, w: QTensor, x: Array, out: Array) -> Array:
        """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``.

        Parameters
        ----------
        w : QTensor of H matrices of N rows and K columns
        x : float array (T, H, K), contiguous
        out : float array (T, H, N), contiguous

        Notes
        -----
        Cost: T * H * N * K multiply-adds; the bytes of `w`, once.
        """

    def matmul_heads_transposed(self, w: QTensor, x: Array, out: Array) -> Array:
        """``out[t, h] = W[h].T @ x[t, h]``.

        Parameters
        ----------
        w : QTensor of H matrices of N rows and K columns
        x : float array (T, H, N)
            May be part of a wider last axis, as `out` may.
        out : float array (T, H, K)

        Notes
        -----
        Cost: T * H * N * K multiply-adds; the bytes of `w`, once.
        """

    def embedding_rows(self, w: QTensor, tokens: Array, scale: float, out: Array) -> Array:
        """Rows of the embedding matrix as numbers: ``out[t] = scale * W[tokens[t]]``.

        Parameters
        ----------
        w : QTensor of V rows and K columns
        tokens : int32 array (T,), from 0 to V - 1
        scale : float
            1 gives the rows themselves.
        out : float array (T, K), contiguous

        Notes
        -----
        Cost: the bytes of T rows.
        """


class Norm(Protocol):
    """Normalisation and the residual sum."""

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> Array:
        """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis.

        Parameters
        ----------
        x : float array (T, K), with contiguous rows
        weight : float32 array (K,)
        eps : float, at least 0
        out : float array (T, K), with contiguous rows
            May be `x` itself.

        Notes
        -----
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
        """

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> Array:
        """``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` along the last axis.

        Parameters
        ----------
        x : float array (T, K), with contiguous rows
        weight, bias : float32 array (K,)
        eps : float, at least 0
        out : float array (T, K), contiguous
            May be `x` itself.

        Notes
        -----
        Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 4; the variance is that of K numbers, not K - 1.
        """

    def normed(self, x: Array, weight: Array, eps: float, out: Array, y: Array | None = None) -> MatrixInput:
        """The input of a layer's matrices: ``x += y``, then ``out = rms_norm(x)``.

        Parameters
        ----------
        x : float array (T, K), contiguous
        weight, eps
            As for `rms_norm`.
        out : float array (T, K), contiguous
        y : float array (T, K), contiguous, optional
            The residual connection.

        Returns
        -------
        Activation of `out`
        """

    def add(self, x: Array, y: Array) -> Array:
        """``x += y``, both float arrays (T, K), contiguous: the residual connection. Returns `x`."""


class Rope(Protocol):
    """Rotary position embedding, on the two layouts of pairs that models have."""

    def angles(self, positions: Array, inv_freq: Array, magnitude: float, out: Array) -> Array:
        """Cosine and sine of every position and frequency, times `magnitude`.

        Parameters
        ----------
        positions : int32 array (T,)
        inv_freq : float64 array (R // 2,)
            Radians per position (`ModelConfig.inv_freq`).
        magnitude : float
            `ModelConfig.rope_magnitude`.
        out : float array (T, R // 2, 2), contiguous
            The last axis holds cosine and sine. Angles are taken in float64: in float32, position 100,000 has an error
            of 0.004 radians.
        """

    def rope_interleaved(self, x: Array, cos_sin: Array) -> Array:
        """Rotate pairs (2i, 2i + 1) of the last R numbers of every head, in place. Returns `x`.

        Parameters
        ----------
        x : float array (T, H, D)
            D ≥ R; the first D - R numbers stay as they are. Any strides.
        cos_sin : float array (T, R // 2, 2)
            From `angles`.

        Notes
        -----
        Su et al., "RoFormer" (2021), equation 34; the interleaved layout of llama.cpp's ``LLAMA_ROPE_TYPE_NORM``.
        """

    def rope_neox(self, x: Array, cos_sin: Array) -> Array:
        """Rotate pairs (i, i + R / 2) of the last R numbers of every head, in place. Returns `x`.

        Parameters
        ----------
        x, cos_sin
            As for `rope_interleaved`.

        Notes
        -----
        The layout of GPT-NeoX and llama.cpp's ``LLAMA_ROPE_TYPE_NEOX``, transformers' ``rotate_half``.
        """

    def temper(self, x: Array, positions: Array, scale: float, length: int) -> Array:
        """Multiply the queries of every token by the attention temperature of its position, in place:
        ``x[t] *= 1 + scale * ln(1 + positions[t] // length)``. Returns `x`.

        Queries below position `length` stay as they are.

        Parameters
        ----------
        x : float array (T, H, D), contiguous
        positions : int32 array (T,)
        scale : float
        length : int
            At least 1.

        Notes
        -----
        ``llm_graph_input_attn_temp`` of llama.cpp; ``get_llama_4_attn_scale`` of transformers' Mistral4.
        """


class MoE(Protocol):
    """The mixture of experts: which experts a token goes to, and what they compute."""

    def router(self, logits: Array, bias: Array | None, config: ModelConfig, ids: Array, weights: Array) -> None:
        """Choose the experts of every token.

        Parameters
        ----------
        logits : float array (T, E), contiguous
            Product of the router's matrix; it stays as it is.
        bias : float32 array (E,) or None
            ``exp_probs_b``: added to the scores for the choice only, never to the weights.
        config : ModelConfig
            ``scoring_func`` ("softmax" or "sigmoid"), ``n_group`` (a divisor of E), ``topk_group`` (1 to ``n_group``),
            ``group_score`` ("max" or "top2"), ``norm_topk_prob`` and ``routed_scaling_factor``.
        ids : int32 array (T, k), contiguous
            Out: the chosen experts, best first; of equal ones the lower first. k is at most the number of experts in
            ``topk_group`` groups.
        weights : float array (T, k), contiguous
            Out: their weights.

        Notes
        -----
        DeepSeek-V2 (2024), section 2.2, with group-limited routing as the model's own code does it (a group counts as
        its best expert); DeepSeek-V3 (2024), section 2.1.2 (a group counts as the sum of its two best). Experts outside
        the chosen groups are never chosen.
        """

    def experts(
        self,
        activation: MatrixInput,
        ids: Array,
        weights: Array,
        gate: QTensor,
        up: QTensor,
        down: QTensor,
        out: Array,
        shared: tuple[QTensor, QTensor, QTensor] | None = None,
        add: bool = False,
    ) -> Array:
        """``out[t] = Σ weights[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`` over the experts
        e = ids[t, j], and what the shared experts give every token.

        Parameters
        ----------
        activation : Activation of (T, K)
        ids : int32 array (T, k), contiguous, from 0 to E - 1
            In any order; one expert may be chosen by all tokens, or by none.
        weights : float array (T, k), contiguous
        gate, up : QTensor of E matrices of F rows and K columns
        down : QTensor of E matrices of K rows and F columns
        out : float array (T, K), contiguous
        shared : (gate, up, down), optional
            As for `ffn`: those of all shared experts as one network, whose width is a multiple of F.
        add : bool
            Add to `out` instead of overwriting it.

        Notes
        -----
        Cost: 3 * T * k * F * K multiply-adds, and those of the shared experts; the bytes of each chosen expert, once.
        """

    def ffn(
        self, activation: MatrixInput, gate: QTensor, up: QTensor, down: QTensor, out: Array, add: bool = False
    ) -> Array:
        """The dense feed-forward network: ``out = down @ (silu(gate @ x) * (up @ x))``.

        Parameters
        ----------
        activation : Activation of (T, K)
        gate, up : QTensor of F rows and K columns
        down : QTensor of K rows and F columns
        out : float array (T, K), contiguous
        add : bool
            Add to `out` instead of overwriting it.

        Notes
        -----
        Cost: 3 * T * F * K multiply-adds; the bytes of the three matrices, once.
        """

    def relu_squared(self, x: Array) -> Array:
        """``x = max(x, 0)²`` of a float array (T, K), contiguous: the nonlinearity of a dense network without a gate.
        Returns `x`.

        Notes
        -----
        So et al., "Primer" (2021), section 3; transformers' ``relu2``.
        """


class Attention(Protocol):
    """Multi-head latent attention over a paged cache, in its forms.

    The row of position p of a sequence lies in slot ``block_table[p // 64] * 64 + p % 64`` (`pymla.pages`). Lengths say
    what is attended to: the token at position p sees positions 0 to p of its sequence, and no other row is read.

    DeepSeek-V2 (2024), section 2.1 and appendix C.
    """

    def latent_cache(self, layout: Sequence[tuple[int, int]], slots: int) -> LatentCache:
        """Memory for ``c_kv`` and ``k_pe`` of so many slots, a multiple of 64. Its contents are not set.

        Parameters
        ----------
        layout : two pairs (type, numbers of a row), from `pymla.engine.cache_layout.row_layout`
            A backend may keep the rows in a form of its own, of the same precision.
        slots : int
        """

    def store(self, rows: Array, slots: Array, cache: QTensor) -> None:
        """Write rows into the cache, rounded to its type.

        Parameters
        ----------
        rows : float or float16 array (T, W)
            May be columns of a wider array.
        slots : int32 array (T,), from 0 to the cache's slots - 1
        cache : QTensor of rows of W numbers
            Of `latent_cache`, or of a ggml type of `pymla.pages.CACHE_TYPES`.
        """

    def load(self, cache: QTensor, block_table: Array, out: Array) -> Array:
        """The first rows of a sequence as numbers.

        Parameters
        ----------
        cache : as for `store`
        block_table : int32 array (pages,)
            Pages of the cache; S is at most 64 * pages.
        out : float array (S, W), contiguous
        """

    def absorb(self, q: Array, k_b: QTensor, out: Array) -> Array:
        """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

        Parameters
        ----------
        q : float array (T, H, nope + R), contiguous
        k_b : QTensor of H matrices of nope rows and rank columns
        out : float array (T, H, rank + R), contiguous

        Notes
        -----
        Cost: T * H * nope * rank multiply-adds; the bytes of `k_b`, once.
        """

    def absorbed(self, q: Array, latent: QTensor, rope: QTensor, step: Step, scale: float, out: Array) -> Array:
        """Attention in the latent space: multi-query, with keys of rank + R numbers and values of rank numbers.

        ``out[t, h] = Σ softmax(scale * q[t, h] · [c_kv; k_pe])[p] * c_kv[p]`` over the positions
        p ≤ ``step.positions[t]``.

        Parameters
        ----------
        q : float array (T, H, rank + R), contiguous
            From `absorb`; the last R numbers are rotated.
        latent, rope : QTensor of slots × rank and slots × R
            ``c_kv`` and ``k_pe`` of the layer.
        step : Step
            ``seq_of`` (T,), ``positions`` (T,) and ``block_tables`` (B, pages) are read.
        scale : float
        out : float array (T, H, rank), with contiguous rows

        Notes
        -----
        Cost: a token multiplies H * (2 * rank + R) for every position that it sees; the cached rows of its sequence are
        read once for all heads.
        """

    def absorbed_materialised(
        self, q: Array, latent: QTensor, rope: QTensor, step: Step, scale: float, out: Array
    ) -> Array:
        """`absorbed` with the scores of all positions in memory at once instead of an online softmax (``--mla 2``)."""

    def index_cache(self, qtype: int, width: int, slots: int) -> QTensor:
        """Memory for the indexer's keys of so many slots, a multiple of 64. Its contents are not set; `store` writes
        rows into it.

        Parameters
        ----------
        qtype : int
            F32, F16, BF16 or Q8_0. A backend may keep the rows in a form of its own, of the same precision.
        width : int
            Numbers of a key, D, a multiple of 32.
        slots : int
        """

    def choose(self, q: Array, weights: Array, keys: QTensor, step: Step, out: Array) -> Array:
        """The positions that each token attends to: the lightning indexer of sparse attention.

        The score of position s for token t is ``I[t, s] = Σ_h weights[t, h] * max(0, q[t, h] · keys[s])``, for s ≤ p,
        where p is the token's position.

        Parameters
        ----------
        q : float array (T, H, D), contiguous
            The indexer's queries, rotated. H is the number of the indexer's heads.
        weights : float array (T, H), contiguous
            Of any sign.
        keys : QTensor of slots × D
            Of `index_cache`.
        step : Step
            As for `absorbed`.
        out : int32 array (T, k), contiguous
            Out: the k positions of the largest scores, in ascending order; of equal scores the lower position. A token
            with p < k sees them all: it gets 0 to p, and behind them -1, and no key is read for it.

        Notes
        -----
        Cost: a token with p ≥ k multiplies H * D for every position that it sees; the keys of its sequence are read
        once.

        DeepSeek-V3.2-Exp (2025), section 2.1, equation 1.
        """

    def sparse(
        self, q: Array, latent: QTensor, rope: QTensor, step: Step, chosen: Array, scale: float, out: Array
    ) -> Array:
        """`absorbed` over the chosen positions alone: no other row of the cache is read.

        Parameters
        ----------
        q, latent, rope, step, scale, out
            As for `absorbed`.
        chosen : int32 array (T, k), contiguous
            From `choose`: ascending positions from 0 to ``step.positions[t]``, one at least; -1 from the end of them
            on.

        Notes
        -----
        Cost: a token multiplies H * (2 * rank + R) for every chosen position, and reads its rows once for all heads.

        DeepSeek-V3.2-Exp (2025), section 2.1, equation 2.
        """

    def heads_at_once(self, config: ModelConfig, tokens: int, exact: bool) -> int:
        """How many heads' expanded keys and values of so many tokens the backend likes to have at a time; at least 1.

        Parameters
        ----------
        config : ModelConfig
            Its head sizes.
        tokens : int
            Rows of the longest sequence.
        exact : bool
            As for `keys_values`.
        """

    def keys_values(
        self, tokens: int, heads: int, nope: int, rotated: int, v: int, exact: bool, dtype: Any = np.float32
    ) -> KeysValues:
        """Memory for expanded keys and values, not set.

        Parameters
        ----------
        tokens, heads, nope, rotated, v : int
            S, H, numbers of a key that are not rotated, and that are, R, and numbers of a value.
        exact : bool
            Whether they are kept in `dtype`; otherwise in whatever is fastest, which is as precise as a Q8_0 cache.
            A GPU keeps float16 always.
        dtype : float32 or float64
            float64 on the reference alone.
        """

    def expand(self, c_kv: Array, k_pe: Array, k_b: QTensor, v_b: QTensor, out: KeysValues) -> KeysValues:
        """Keys and values of some heads from latent rows: ``k = [W_k_b c_kv; k_pe]``, ``v = W_v_b c_kv``.

        Parameters
        ----------
        c_kv : float array (S, rank), contiguous
        k_pe : float array (S, R)
            Rotated; all heads share it. May be columns of a wider array.
        k_b : QTensor of H matrices of nope rows and rank columns
        v_b : QTensor of H matrices of v rows and rank columns
        out : KeysValues of S tokens

        Notes
        -----
        Cost: S * H * (nope + v) * rank multiply-adds; the bytes of `k_b` and `v_b`, once.
        """

    def expanded(self, q: Array, keys_values: KeysValues, positions: Array, scale: float, out: Array) -> Array:
        """Causal attention of one sequence over expanded keys and values.

        Parameters
        ----------
        q : float array (T, H, nope + R), contiguous
        keys_values : KeysValues of S tokens
        positions : int32 array (T,), ascending, from 0 to S - 1
            Position p attends to the first p + 1 rows.
        scale : float
        out : float array (T, H, v), with contiguous rows
            May be some heads of a larger array.

        Notes
        -----
        Cost: a token multiplies H * (nope + R + v) for every position that it sees.
        """

    def full(self, q: Array, keys: QTensor, values: QTensor, step: Step, scale: float, out: Array) -> Array:
        """Attention over a cache of whole keys and values (``--mla 0``).

        Parameters
        ----------
        q : float array (T, H, nope + R), contiguous
        keys : QTensor of slots × H * (nope + R)
        values : QTensor of slots × H * v
            Types of `pymla.pages.CACHE_TYPES` whose blocks divide a head's numbers.
        step, scale
            As for `absorbed`.
        out : float array (T, H, v), with contiguous rows

        Notes
        -----
        Cost: a token multiplies H * (nope + R + v) for every position that it sees, and reads a row of its own for
        every head and position.
        """


class Memory(Protocol):
    """Where a backend's arrays lie, and how they get there."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array whose elements are not set.

        Raises
        ------
        PymlaError
            The device is full.
        """

    def release(self) -> None:
        """Give memory that no array uses back to the system, which a GPU's memory needs."""

    def to_device(self, array: np.ndarray, progress: Progress | None = None) -> Array:
        """A NumPy array in the backend's memory: itself in the host's, a copy on a GPU. `progress` gets bytes."""

    def to_host(self, array: Array) -> np.ndarray:
        """An array of the backend as a NumPy array: itself in the host's memory, a copy on a GPU, which waits for all
        work that was launched."""

    def write(self, target: Array, array: np.ndarray) -> None:
        """Copy a NumPy array into an array of the backend of its shape and dtype. It may change afterwards."""

    def copy(self, source: Array, target: Array) -> None:
        """Copy an array into another one of its shape and dtype, both contiguous and in the backend's memory."""

    def take(self, array: Array, rows: np.ndarray) -> Array:
        """Some rows of a contiguous array (T, …), copied: an array (n, …). `rows` is a NumPy array of int (n,)."""


class TokenSampler(Protocol):
    """Draws tokens for one sequence. Same parameters, seed and logits: same tokens, on one kind of backend.

    Parameters
    ----------
    params : SamplingParams
        With DRY, sequence breakers are tokens (`SamplingParams.for_tokenizer`).
    history : iterable of int
        Tokens so far, which the penalties look back on.
    """

    def __init__(self, params: SamplingParams, history: Iterable[int] = ()) -> None: ...

    def sample(self, logits: Array, mask: np.ndarray | None = None) -> Sampled:
        """The next token after logits, float32 (V,), in the backend's memory. It becomes part of the history.

        Parameters
        ----------
        logits : float32 array (V,)
        mask : uint32 NumPy array (ceil(V / 32),), optional
            Bit i % 32 of word i // 32 tells whether token i is allowed; tokens beyond its end are not. None: all are.

        Raises
        ------
        PymlaError
            A logit is not a number, a biased token is outside the vocabulary, or no token is allowed.
        """

    def distribution(self, logits: Array, mask: np.ndarray | None = None) -> Candidates:
        """The distribution that `sample` draws from, in the host's memory. Asking for it does not change it; `accept`
        learns from the last one."""

    def random(self) -> float:
        """A number in [0, 1) of the sampler's own stream, for draws from what is made of distributions."""

    def accept(self, token: int) -> None:
        """Go on to the next token after this one, which need not be what `sample` would have chosen."""

    def choose(self, token: int, logits: Array) -> Sampled:
        """Accept a token that may be another one than `sample` would have chosen, after logits (V,), and report it."""

    def copy(self) -> TokenSampler:
        """A sampler in the same state, that draws the same numbers; neither changes the other."""


class Sampling(Protocol):
    """Choosing the next token."""

    @property
    def Sampler(self) -> type[TokenSampler]:
        """`TokenSampler` of this backend."""

    def sample_batch(
        self,
        samplers: Sequence[TokenSampler],
        logits: Array,
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> list[Sampled | PymlaError]:
        """The next token of every sequence: what `TokenSampler.sample` gives for each row, or the error that it raises.

        Parameters
        ----------
        samplers : sequence of TokenSampler
            B different ones.
        logits : float32 array (B, V)
        masks : sequence of (uint32 NumPy array (ceil(V / 32),) or None), optional
            B masks as for `TokenSampler.sample`. None: every token is allowed.
        """


class Rates(Protocol):
    """What bounds a model's speed."""

    @property
    def read(self) -> float:
        """Bytes per second streamed from memory: bounds generation, which reads every weight once."""

    @property
    def int8(self) -> float:
        """Multiply-adds per second of the int8 products that the backend runs: bounds prompts."""


class Limits(Protocol):
    """What the hardware can do at best, measured with the instructions that kernels use."""

    def measure(self) -> Rates:
        """Measure both limits, in some seconds at most."""


class StepGraph(Protocol):
    """A step whose launches are recorded once and repeated by `replay`, without Python.

    Everything that changes from replay to replay must lie in arrays that the function was recorded with: what it
    computes in Python may be computed once. These arrays must live as long as the graph.

    Parameters
    ----------
    function : callable()
        May call operations and `Memory.empty`, but nothing that copies from or to the host.
    """

    def __init__(self, function: Callable[[], Any]) -> None: ...

    @staticmethod
    def size(sequences: int) -> int | None:
        """Sequences of the recorded step that serves a step of `sequences` sequences, at least as many; None: such a
        step is not recorded."""

    def replay(self) -> Any:
        """Run the step. Returns what the function returned; its arrays are filled again."""


class Backend(Protocol):
    """A backend. Its submodules have the Protocols of this module."""

    @property
    def NAME(self) -> str:
        """What messages call it: "reference", "cpu" or "cuda"."""

    @property
    def IN_HOST_MEMORY(self) -> bool:
        """Whether its arrays are in the host's memory, whose speed bounds it."""

    @property
    def SLICE(self) -> int:
        """Tokens of a prompt whose intermediate results exist at a time."""

    @property
    def attention(self) -> Attention:
        """`Attention`."""

    @property
    def limits(self) -> Limits:
        """`Limits`. Kernels that it compiles serve nothing else, so it is imported when it is asked for."""

    @property
    def memory(self) -> Memory:
        """`Memory`."""

    @property
    def moe(self) -> MoE:
        """`MoE`."""

    @property
    def norm(self) -> Norm:
        """`Norm`."""

    @property
    def quant(self) -> Quant:
        """`Quant`."""

    @property
    def rope(self) -> Rope:
        """`Rope`."""

    @property
    def sampling(self) -> Sampling:
        """`Sampling`."""

    @property
    def Graph(self) -> type[StepGraph]:
        """`StepGraph` of this backend."""

    def thread_count(self) -> int:
        """Threads of this process that the backend computes with; 1 where none but the caller's own."""

    def compile_for(
        self,
        model: Any,
        progress: Callable[[int, int, str], object] | None = None,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        """Compile the kernels that a model launches on this backend, or load them from the cache.

        Parameters
        ----------
        model : pymla.engine.model.Model
        progress : callable(done, total, name), optional
            Told of each kernel that has to be compiled.
        warn : callable(message), optional
            Told once what is wrong with the cache.
        """
