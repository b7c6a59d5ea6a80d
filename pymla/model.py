"""The transformer of DeepSeek-V2 and V3, on one screen.

A forward pass takes new tokens of one or several sequences, writes their cache rows and returns logits. `be` is the
backend: `pymla.cpu` or `pymla.reference`. Layers run one after the other over all tokens, with intermediate results in
slices, so that scratch stays bounded and each layer's keys and values are expanded once.
"""

import numpy as np

from pymla.cache import PAGE, PagedCache, Sequence, Step
from pymla.costs import EXPANDED_BYTES, SLICE, cheaper_form, expanded_bytes
from pymla.errors import PymlaError
from pymla.ggml import QUANTISED

#: auto: whichever takes fewer multiply-adds, per sequence and step. 0: full K and V cache. 1: absorbed always.
#: 2: expanded prompt, absorbed generation with materialised scores. 3: the same with online softmax.
MLA_MODES = ("auto", "0", "1", "2", "3")

#: Steps of up to so many sequences by one token each are recorded and replayed (`Graph`). Not with ``--mla 2``: the
#: scores of the longest context would be kept for every layer.
GRAPH_TOKENS = 8


class Model:
    """Weights, a backend and a cache.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
    backend : module
    cache_type : str
        One of `pymla.cache.CACHE_TYPES`.
    mla : str
        One of `MLA_MODES`.
    ctx : int
        The longest sequence, in tokens.
    cache_tokens : int, optional
        Tokens that the cache holds for all sequences together; `ctx` by default.
    dtype : float32 or float64
        Of intermediate results. Only the reference computes in float64.
    """

    def __init__(
        self, config, weights, backend, *, cache_type="q8_0", mla="auto", ctx, cache_tokens=None, dtype=np.float32
    ):
        if mla not in MLA_MODES:
            raise PymlaError(f"unknown MLA mode {mla!r}; choose {', '.join(MLA_MODES)}")
        self.config, self.weights, self.backend, self.mla, self.ctx = config, weights, backend, mla, ctx
        self.dtype = dtype
        self.inv_freq = config.inv_freq()
        self.cache = PagedCache(config, cache_type, mla, -(-(cache_tokens or ctx) // 64), ctx)
        self._graphs = {}
        self._expanded_memory = None, None

    def new_sequence(self):
        """An empty sequence."""
        return Sequence()

    def free(self, sequence):
        """Give a sequence's cache back."""
        self.cache.free(sequence)

    def forward(self, batch, logits="last", progress=None):
        """Append tokens to sequences and predict what follows them.

        Parameters
        ----------
        batch : list of (Sequence, int array)
            At least one token each. An interrupted pass leaves the sequences as they were.
        logits : "last" or "all"
        progress : callable(done, total), optional
            Layers.

        Returns
        -------
        float32 array (len(batch), V), after the last token of each sequence, or (T, V), after every token

        Raises
        ------
        CacheFull
            Before anything is computed.
        """
        step = self.cache.extend(batch)
        runs = self._runs(batch)
        if len(batch) == len(step.tokens) <= GRAPH_TOKENS and self.mla != "2":
            result = self._replay(step, runs)
        else:
            rows = slice(None) if logits == "all" else np.cumsum([len(new) for _, new in batch]) - 1
            result = self._step(step, runs, rows, progress)
            self._expanded_memory = None, None
        self.cache.advance(batch)
        return result.astype(np.float32)

    def _replay(self, step, runs):
        """The step of a few sequences that go on by one token each: recorded once, with arrays of its own for the
        input."""
        size = len(step.tokens)
        if size not in self._graphs:
            tables = np.zeros((size, -(-self.ctx // PAGE)), np.int32)
            own = Step(*(np.zeros(size, np.int32) for _ in range(4)), tables)
            self._graphs[size] = own, self.backend.Graph(lambda: self._step(own, runs, slice(None)))
        own, graph = self._graphs[size]
        for mine, new in zip(own[:4], step[:4], strict=True):
            mine[:] = new
        own.block_tables[:, : step.block_tables.shape[1]] = step.block_tables
        return graph.replay()

    def _step(self, step, runs, rows, progress=None):
        """Logits after the tokens `rows`."""
        be, config, weights = self.backend, self.config, self.weights
        tokens = len(step.tokens)
        cos_sin = be.rope.angles(
            step.positions, self.inv_freq, config.rope_magnitude, self._empty(tokens, len(self.inv_freq), 2)
        )
        x = be.quant.embedding_rows(weights.token_embd, step.tokens, self._empty(tokens, config.hidden_size))
        for i, (layer, cache) in enumerate(zip(weights.layers, self.cache.layers, strict=True)):
            self._attention(layer, cache, x, step, cos_sin, runs)
            self._feed_forward(layer, x)
            if progress:
                progress(i + 1, config.num_hidden_layers)
        x = x[rows]
        h = be.quant.Activation(self._norm(x, weights.output_norm))
        return be.quant.matmul(weights.output, h, self._empty(len(x), config.vocab_size))

    def _attention(self, layer, cache, x, step, cos_sin, runs):
        """``x += W_o attention(norm(x))``, and the tokens' rows into the cache."""
        be = self.backend
        for part in slices(0, len(x)):
            self._store(layer, cache, x[part], step.slots[part], cos_sin[part])
        for form, start, stop, length in runs:
            if form == "expanded":
                attended = self._expanded(
                    layer, cache, x[start:stop], step.part(start, stop), cos_sin[start:stop], length
                )
                self._project(layer, x[start:stop], attended)
                continue
            for part in slices(start, stop):
                q = self._queries(layer, x[part], cos_sin[part])
                out = self._empty(len(q), self.config.num_attention_heads, self.config.v_head_dim)
                if form == "full":
                    be.attention.full(q, *cache, step.part(part.start, part.stop), self.config.softmax_scale, out)
                else:
                    self._absorbed(layer, cache, q, step.part(part.start, part.stop), out)
                self._project(layer, x[part], out.reshape(len(q), -1))

    def _queries(self, layer, x, cos_sin, heads=slice(None)):
        """Rotated queries of some heads, (T, H, nope + R)."""
        be, config = self.backend, self.config
        h = be.quant.Activation(self._norm(x, layer.attn_norm))
        w = layer.attn_q
        if config.q_lora_rank:
            low = be.quant.matmul(layer.attn_q_a, h, self._empty(len(x), config.q_lora_rank))
            h, w = be.quant.Activation(self._norm(low, layer.attn_q_a_norm)), layer.attn_q_b
        start, stop, _ = heads.indices(config.num_attention_heads)
        w = w.rows(start * config.qk_head_dim, stop * config.qk_head_dim)
        q = be.quant.matmul(w, h, self._empty(len(x), len(w.data)))
        return be.rope.rope_interleaved(q.reshape(len(x), -1, config.qk_head_dim), cos_sin)

    def _store(self, layer, cache, x, slots, cos_sin):
        """The cache rows of tokens: ``c_kv`` normalised and ``k_pe`` rotated, or keys and values of all heads."""
        be, config = self.backend, self.config
        h = be.quant.Activation(self._norm(x, layer.attn_norm))
        rank = config.kv_lora_rank
        kv = be.quant.matmul(layer.attn_kv_a_mqa, h, self._empty(len(x), len(layer.attn_kv_a_mqa.data)))
        be.rope.rope_interleaved(kv[:, None], cos_sin)
        rows = self._norm(kv[:, :rank], layer.attn_kv_a_norm), kv[:, rank:]
        if self.mla == "0":
            kv = self._keys_values(len(x), config.num_attention_heads, exact=True)
            be.attention.expand(rows[0], np.ascontiguousarray(rows[1]), layer.attn_k_b, layer.attn_v_b, kv)
            rows = kv.keys.reshape(len(x), -1), kv.values.reshape(len(x), -1)
        for each, tensor in zip(rows, cache, strict=True):
            be.attention.store(each, slots, tensor)

    def _absorbed(self, layer, cache, q, step, out):
        """Attention in the latent space: ``W_k_b`` goes into the queries, ``W_v_b`` onto the result."""
        be, config = self.backend, self.config
        latent_q = self._empty(*q.shape[:2], config.kv_lora_rank + config.qk_rope_head_dim)
        be.attention.absorb(q, layer.attn_k_b, latent_q)
        latent = self._empty(*q.shape[:2], config.kv_lora_rank)
        attend = be.attention.absorbed_materialised if self.mla == "2" else be.attention.absorbed
        attend(latent_q, *cache, step, config.softmax_scale, latent)
        be.quant.matmul_heads(layer.attn_v_b, latent, out)

    def _expanded(self, layer, cache, x, step, cos_sin, length):
        """Attention of one sequence over keys and values of as many heads at a time as fit the scratch."""
        be, config = self.backend, self.config
        table = step.block_tables[step.seq_of[0]]
        c_kv = be.attention.load(cache.latent, table, self._empty(length, config.kv_lora_rank))
        k_pe = be.attention.load(cache.rope, table, self._empty(length, config.qk_rope_head_dim))
        out = self._empty(len(x), config.num_attention_heads, config.v_head_dim)
        # Keys and values need no more bits than the cache row that they come from.
        exact = cache.latent.qtype not in QUANTISED
        at_once = max(1, EXPANDED_BYTES // expanded_bytes(config, length, exact))
        for heads in slices(0, config.num_attention_heads, at_once):
            k_b, v_b = layer.attn_k_b.rows(heads.start, heads.stop), layer.attn_v_b.rows(heads.start, heads.stop)
            kv = be.attention.expand(c_kv, k_pe, k_b, v_b, self._keys_values(length, heads.stop - heads.start, exact))
            for part in slices(0, len(x)):
                q = self._queries(layer, x[part], cos_sin[part], heads)
                attended = self._empty(*q.shape[:2], config.v_head_dim)
                be.attention.expanded(q, kv, step.positions[part], config.softmax_scale, attended)
                out[part, heads] = attended
        return out.reshape(len(x), -1)

    def _project(self, layer, x, attended):
        """``x += W_o attended``."""
        be = self.backend
        for part in slices(0, len(x)):
            h = be.quant.Activation(attended[part])
            be.norm.add(x[part], be.quant.matmul(layer.attn_output, h, self._empty(*x[part].shape)))

    def _feed_forward(self, layer, x):
        """``x += FFN(norm(x))``: dense, or the experts that the router chooses and the shared ones."""
        be, config = self.backend, self.config
        for part in slices(0, len(x)):
            h = be.quant.Activation(self._norm(x[part], layer.ffn_norm))
            out = self._empty(*x[part].shape)
            if layer.ffn_gate is not None:
                be.norm.add(x[part], be.moe.ffn(h, layer.ffn_gate, layer.ffn_up, layer.ffn_down, out))
            if layer.ffn_gate_inp is not None:
                scores = be.quant.matmul(layer.ffn_gate_inp, h, self._empty(len(out), config.n_routed_experts))
                ids = np.empty((len(out), config.num_experts_per_tok), np.int32)
                weights = self._empty(*ids.shape)
                be.moe.router(scores, layer.exp_probs_b, config, ids, weights)
                experts = layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps
                be.norm.add(x[part], be.moe.experts(h, ids, weights, *experts, out))

    def _runs(self, batch):
        """The forms of attention of a step: (form, first token, behind the last, tokens in the cache then) of
        neighbours.

        A run of the expanded form is one sequence; the other forms take several at once.
        """
        runs, stop = [], 0
        for sequence, new in batch:
            start, stop, length = stop, stop + len(new), sequence.length + len(new)
            form = self._form(len(new), length)
            if runs and form == runs[-1][0] != "expanded":
                runs[-1] = (form, runs[-1][1], stop, length)
            else:
                runs.append((form, start, stop, length))
        return runs

    def _form(self, tokens, cached):
        if self.mla == "auto":
            return cheaper_form(self.config, tokens, cached)
        if self.mla == "0":
            return "full"
        return "absorbed" if self.mla == "1" or tokens == 1 else "expanded"

    def _norm(self, x, weight):
        return self.backend.norm.rms_norm(x, weight, self.config.rms_norm_eps, self._empty(*x.shape))

    def _keys_values(self, length, heads, exact):
        """Memory for expanded keys and values. It is kept for the next layer: to take it from the system costs as much
        as to fill it."""
        wanted = length, heads, exact
        if self._expanded_memory[0] != wanted:
            size, v = self.config.qk_head_dim, self.config.v_head_dim
            self._expanded_memory = (
                wanted,
                self.backend.attention.keys_values(length, heads, size, v, exact, self.dtype),
            )
        return self._expanded_memory[1]

    def _empty(self, *shape):
        return np.empty(shape, self.dtype)


def slices(start, stop, size=SLICE):
    """Slices of at most `size` from `start` to `stop`."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
