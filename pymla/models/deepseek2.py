"""The transformer of DeepSeek-V2 and V3, on one screen.

A forward pass takes new tokens of one or several sequences, writes their cache rows and returns logits. `be` is the
backend of a part of the model (`pymla.models.placement`), in whose memory that part's arrays lie. Layers run one after
the other over all tokens, with intermediate results in slices, so that scratch stays bounded and each layer's keys and
values are expanded once.
"""

import os
import threading
import weakref
from types import ModuleType
from typing import NamedTuple

import numpy as np

from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.costs import cheaper_form
from pymla.errors import PymlaError
from pymla.models.placement import Placement, moved, moved_input
from pymla.pages import PAGE, Step

#: auto: whichever takes fewer multiply-adds, per sequence and step. 0: full K and V cache. 1: absorbed always.
#: 2: expanded prompt, absorbed generation with materialised scores. 3: the same with online softmax.
MLA_MODES = ("auto", "0", "1", "2", "3")


class Run(NamedTuple):
    """Neighbouring tokens of a step whose attention takes one form; of one sequence where that is the expanded one."""

    form: str  # "absorbed", "expanded" or "full"
    start: int
    stop: int
    sequence: int  # of the first token: its row of the block tables
    length: int  # tokens in the last sequence's cache after the step


class Tokens(NamedTuple):
    """Tokens of a step on a backend, as all layers there take them."""

    backend: ModuleType
    step: Step
    cos_sin: object  # float array (T, R // 2, 2)
    memory: dict  # for expanded keys and values

    def part(self, start, stop):
        """Some of the tokens."""
        return self._replace(step=self.step.part(start, stop), cos_sin=self.cos_sin[start:stop])


class Model:
    """Weights, a cache, and the backends that compute.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
        Each in the memory of its backend.
    backend : module or Placement
        One for everything, or one for each part.
    cache_type : str
        One of `pymla.pages.CACHE_TYPES`.
    mla : str
        One of `MLA_MODES`.
    ctx : int
        The longest sequence, in tokens.
    cache_tokens : int, optional
        Tokens that the cache holds for all sequences together; `ctx` by default.
    dtype : float32 or float64
        Of intermediate results. Only the reference computes in float64.

    Attributes
    ----------
    placement : Placement
    backend : module
        The output's.
    turn : RLock
        Held during a step. Whoever reads what `step` returned, or wants several steps without another caller's between
        them, holds it as well.
    """

    def __init__(
        self, config, weights, backend, *, cache_type="q8_0", mla="auto", ctx, cache_tokens=None, dtype=np.float32
    ):
        if mla not in MLA_MODES:
            raise PymlaError(f"unknown MLA mode {mla!r}; choose {', '.join(MLA_MODES)}")
        layers = config.num_hidden_layers
        self.placement = backend if isinstance(backend, Placement) else Placement.on(backend, layers)
        self.config, self.weights, self.backend, self.mla, self.ctx = config, weights, self.placement.output, mla, ctx
        self.dtype = dtype
        inv_freq = config.inv_freq()
        self._inv_freq = {be: be.memory.to_device(inv_freq) for be in self.placement.backends}
        pages = -(-(cache_tokens or ctx) // PAGE)
        self.cache = PagedCache(config, cache_type, mla, pages, ctx, self.placement.layers)
        # Steps of some sequences by one token each are recorded, where all of a model is on one backend. Not with
        # ``--mla 2``: the scores of the longest context would be kept for every layer.
        self._recorded = len(self.placement.backends) == 1 and mla != "2"
        self._graphs = {}
        self.turn = threading.RLock()
        self._stepping = False
        _models.add(self)

    def close(self):
        """Let go of the weights and of the cache, once the step that runs is done."""
        with self.turn:
            self._refuse_if_stepping()
            self.weights, self._graphs, self.cache.layers = None, {}, []

    def new_sequence(self):
        """An empty sequence."""
        return Sequence()

    def free(self, sequence):
        """Give a sequence's cache back."""
        self.cache.free(sequence)

    def sampler(self, params, history=()):
        """What chooses tokens for one sequence from rows of `step`'s logits (`pymla.text.sampling.Sampler`)."""
        return self.backend.sampling.Sampler(params, history)

    def forward(self, batch, logits="last", progress=None):
        """Append tokens to sequences and predict what follows them.

        Parameters
        ----------
        batch : list of (Sequence, int array)
            At least one token each. An interrupted pass leaves the sequences as they were.
        logits : "last" or "all"
        progress : callable(done, total), optional
            Layers. A GPU may be behind.

        Returns
        -------
        float32 array (len(batch), V), after the last token of each sequence, or (T, V), after every token

        Raises
        ------
        CacheFull
            Before anything is computed.
        PymlaError
            The model was closed, or `progress` of a step asks for another step.
        """
        with self.turn:
            return self.backend.memory.to_host(self.step(batch, logits, progress)).astype(np.float32)

    def step(self, batch, logits="last", progress=None):
        """`forward` with logits that stay in the memory of `backend`, where the next step may overwrite them: hold
        `turn` until they are read."""
        with self.turn:
            self._refuse_if_stepping()
            if self.weights is None:
                raise PymlaError("this model was closed; load it again")
            self._stepping = True
            try:
                return self._step(batch, logits, progress)
            finally:
                self._stepping = False

    def _refuse_if_stepping(self):
        # Only the thread that holds the turn gets here, so this is a step's own call of `progress`.
        if self._stepping:
            raise PymlaError("a model cannot be used by the progress callback of its own step; use it afterwards")

    def _step(self, batch, logits, progress):
        step = self.cache.extend(batch)
        runs = self._runs(batch)
        size = self.backend.Graph.size(len(batch)) if self._recorded and len(batch) == len(step.tokens) else None
        if size:
            result = self._replay(step, runs, size)
        else:
            rows = None if logits == "all" else np.cumsum([len(new) for _, new in batch]) - 1
            result = self._compute({be: step.on(be) for be in self.placement.backends}, runs, rows, progress)
        self.cache.advance(batch)
        return result

    def _replay(self, step, runs, size):
        """The step of sequences that go on by one token each, as part of one of `size` sequences: recorded once, with
        memory of its own for the input. The last sequence stands for those that are not there: its token is computed
        again, and its cache rows are written again as they are."""
        be, count, pages = self.backend, len(step.tokens), -(-self.ctx // PAGE)
        if size not in self._graphs:
            packed = be.memory.empty(((4 + pages) * size,), np.int32)
            own, runs = Step.unpacked(packed, size, size), [runs[0]._replace(stop=size)]
            self._graphs[size] = packed, be.Graph(lambda: self._compute({be: own}, runs, None))
        packed, graph = self._graphs[size]
        if size > count:
            sources = np.minimum(np.arange(size), count - 1)
            step = Step(*(array[sources] for array in step))._replace(seq_of=np.arange(size, dtype=np.int32))
        be.memory.write(packed, step.packed(pages))
        return graph.replay()[:count]

    def _compute(self, steps, runs, rows, progress=None):
        """Logits after the tokens `rows`, or after all. `steps` are the step in the memory of each backend."""
        config, weights, place = self.config, self.weights, self.placement
        tokens = {be: Tokens(be, step, self._angles(be, step.positions), {}) for be, step in steps.items()}
        be = place.embedding
        ids = steps[be].tokens
        x = be.quant.embedding_rows(weights.token_embd, ids, self._empty(be, len(ids), config.hidden_size))
        for i, (layer, cache) in enumerate(zip(weights.layers, self.cache.layers, strict=True)):
            x, be = moved(x, be, place.layers[i]), place.layers[i]
            attended = self._attention(layer, cache, x, tokens[be], runs)
            self._feed_forward(layer, x, attended, be, place.experts[i])
            if progress:
                progress(i + 1, config.num_hidden_layers)
        if rows is not None:
            x = be.memory.take(x, rows)
        x, be = moved(x, be, place.output), place.output
        h = self._normed(be, x, weights.output_norm)
        return be.quant.matmul(weights.output, h, self._empty(be, len(x), config.vocab_size))

    def _attention(self, layer, cache, x, tokens, runs):
        """What attention gives of all heads, (T, H * v), for ``norm(x)``; and the tokens' rows into the cache."""
        be, config = tokens.backend, self.config
        out = self._empty(be, len(x), config.num_attention_heads, config.v_head_dim)
        for run in runs:
            if run.form == "expanded":
                own, of_run = tokens.part(run.start, run.stop), slice(run.start, run.stop)
                self._expanded(layer, cache, x[of_run], own, run, out[of_run])
                continue
            for part in slices(run.start, run.stop, be.SLICE):
                own = tokens.part(part.start, part.stop)
                h = self._normed(be, x[part], layer.attn_norm)
                self._store(layer, cache, h, own)
                q = self._queries(layer, h, own)
                if run.form == "full":
                    be.attention.full(q, *cache, own.step, config.softmax_scale, out[part])
                else:
                    self._absorbed(layer, cache, q, own, out[part])
        return out.reshape(len(x), -1)

    def _queries(self, layer, h, tokens, heads=slice(None)):
        """Rotated queries of some heads, (T, H, nope + R)."""
        be, config, count = tokens.backend, self.config, len(h.x)
        w = layer.attn_q
        if config.q_lora_rank:
            low = be.quant.matmul(layer.attn_q_a, h, self._empty(be, count, config.q_lora_rank))
            h, w = self._normed(be, low, layer.attn_q_a_norm), layer.attn_q_b
        start, stop, _ = heads.indices(config.num_attention_heads)
        w = w.rows(start * config.qk_head_dim, stop * config.qk_head_dim)
        q = be.quant.matmul(w, h, self._empty(be, count, len(w.data)))
        return be.rope.rope_interleaved(q.reshape(count, -1, config.qk_head_dim), tokens.cos_sin)

    def _store(self, layer, cache, h, tokens):
        """The cache rows of tokens: ``c_kv`` normalised and ``k_pe`` rotated, or keys and values of all heads."""
        be, config, count = tokens.backend, self.config, len(h.x)
        rank = config.kv_lora_rank
        kv = be.quant.matmul(layer.attn_kv_a_mqa, h, self._empty(be, count, len(layer.attn_kv_a_mqa.data)))
        be.rope.rope_interleaved(kv[:, None], tokens.cos_sin)
        c_kv = self._empty(be, count, rank)
        rows = be.norm.rms_norm(kv[:, :rank], layer.attn_kv_a_norm, config.rms_norm_eps, c_kv), kv[:, rank:]
        if self.mla == "0":
            kv = self._keys_values(tokens, count, config.num_attention_heads, exact=True)
            be.attention.expand(*rows, layer.attn_k_b, layer.attn_v_b, kv)
            rows = kv.keys.reshape(count, -1), kv.values.reshape(count, -1)
        for each, tensor in zip(rows, cache, strict=True):
            be.attention.store(each, tokens.step.slots, tensor)

    def _absorbed(self, layer, cache, q, tokens, out):
        """Attention in the latent space: ``W_k_b`` goes into the queries, ``W_v_b`` onto the result."""
        be, config = tokens.backend, self.config
        latent_q = self._empty(be, *q.shape[:2], config.kv_lora_rank + config.qk_rope_head_dim)
        be.attention.absorb(q, layer.attn_k_b, latent_q)
        latent = self._empty(be, *q.shape[:2], config.kv_lora_rank)
        attend = be.attention.absorbed_materialised if self.mla == "2" else be.attention.absorbed
        attend(latent_q, *cache, tokens.step, config.softmax_scale, latent)
        be.quant.matmul_heads(layer.attn_v_b, latent, out)

    def _expanded(self, layer, cache, x, tokens, run, out):
        """Attention of one sequence, whose rows are stored first, over keys and values of as many heads at a time as
        fit the scratch."""
        be, config = tokens.backend, self.config
        for part in slices(0, len(x), be.SLICE):
            h = self._normed(be, x[part], layer.attn_norm)
            self._store(layer, cache, h, tokens.part(part.start, part.stop))
        table = tokens.step.block_tables[run.sequence]
        c_kv = be.attention.load(cache.latent, table, self._empty(be, run.length, config.kv_lora_rank))
        k_pe = be.attention.load(cache.rope, table, self._empty(be, run.length, config.qk_rope_head_dim))
        # Keys and values need no more bits than the cache row that they come from.
        exact = self.cache.exact
        at_once = be.attention.heads_at_once(config, run.length, exact)
        for heads in even_slices(config.num_attention_heads, at_once):
            k_b, v_b = layer.attn_k_b.rows(heads.start, heads.stop), layer.attn_v_b.rows(heads.start, heads.stop)
            kv = self._keys_values(tokens, run.length, heads.stop - heads.start, exact)
            be.attention.expand(c_kv, k_pe, k_b, v_b, kv)
            for part in slices(0, len(x), be.SLICE):
                own = tokens.part(part.start, part.stop)
                q = self._queries(layer, self._normed(be, x[part], layer.attn_norm), own, heads)
                be.attention.expanded(q, kv, own.step.positions, config.softmax_scale, out[part, heads])

    def _feed_forward(self, layer, x, attended, be, experts):
        """``x += W_o attended``, then ``x += FFN(norm(x))``: dense, or the routed experts, which may have a backend of
        their own, and the shared ones."""
        own = None if layer.ffn_gate is None else (layer.ffn_gate, layer.ffn_up, layer.ffn_down)
        for part in slices(0, len(x), be.SLICE):
            h = be.quant.Activation(attended[part])
            projected = be.quant.matmul(layer.attn_output, h, self._empty(be, *x[part].shape))
            h = self._normed(be, x[part], layer.ffn_norm, projected)
            if layer.ffn_gate_inp is None:
                be.moe.ffn(h, *own, x[part], add=True)
                continue
            of_experts = layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps
            routed = self._routed(layer, h, be, experts)
            if experts is be:
                be.moe.experts(*routed, *of_experts, x[part], shared=own, add=True)
                continue
            # A GPU computes the shared experts while the host computes the others.
            if own:
                be.moe.ffn(h, *own, x[part], add=True)
            out = experts.moe.experts(*routed, *of_experts, self._empty(experts, *x[part].shape))
            be.norm.add(x[part], moved(out, experts, be))

    def _routed(self, layer, h, be, experts):
        """The input of the routed experts on their backend: activations, the chosen experts and their weights."""
        config, count = self.config, len(h.x)
        scores = be.quant.matmul(layer.ffn_gate_inp, h, self._empty(be, count, config.n_routed_experts))
        ids = be.memory.empty((count, config.num_experts_per_tok), np.int32)
        weights = self._empty(be, *ids.shape)
        be.moe.router(scores, layer.exp_probs_b, config, ids, weights)
        return moved_input(h, be, experts), moved(ids, be, experts), moved(weights, be, experts)

    def _runs(self, batch):
        """The runs of a step."""
        runs, stop = [], 0
        for b, (sequence, new) in enumerate(batch):
            start, stop, length = stop, stop + len(new), sequence.length + len(new)
            form = self._form(len(new), length)
            if runs and form == runs[-1].form != "expanded":
                runs[-1] = runs[-1]._replace(stop=stop, length=length)
            else:
                runs.append(Run(form, start, stop, b, length))
        return runs

    def _form(self, tokens, cached):
        if self.mla == "auto":
            return cheaper_form(self.config, tokens, cached)
        if self.mla == "0":
            return "full"
        return "absorbed" if self.mla == "1" or tokens == 1 else "expanded"

    def _angles(self, be, positions):
        inv_freq = self._inv_freq[be]
        out = self._empty(be, len(positions), len(inv_freq), 2)
        return be.rope.angles(positions, inv_freq, self.config.rope_magnitude, out)

    def _normed(self, be, x, weight, y=None):
        """What matrices read of normalised rows, once `y` is added to these."""
        return be.norm.normed(x, weight, self.config.rms_norm_eps, self._empty(be, *x.shape), y)

    def _keys_values(self, tokens, length, heads, exact):
        """Memory for expanded keys and values. It is kept for the next layer: to take it from the system costs as much
        as to fill it."""
        wanted = length, heads, exact
        if wanted not in tokens.memory:
            tokens.memory.clear()
            size, v = self.config.qk_head_dim, self.config.v_head_dim
            made = tokens.backend.attention.keys_values(length, heads, size, v, exact, self.dtype)
            tokens.memory[wanted] = made
        return tokens.memory[wanted]

    def _empty(self, be, *shape):
        return be.memory.empty(shape, self.dtype)


_models = weakref.WeakSet()


def _forget_turns():
    """In a forked child no other thread goes on, so none gives back the turn that it had. The step that it was in is
    not finished there, as after an interrupt."""
    for model in _models:
        model.turn, model._stepping = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turns)


def slices(start, stop, size):
    """Slices of at most `size` from `start` to `stop`."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def even_slices(stop, size):
    """As few slices of at most `size` from 0 to `stop`, of about the same size: a short one would keep few of a GPU's
    multiprocessors busy for as long as a long one keeps all."""
    count = -(-stop // size)
    return [slice(i * stop // count, (i + 1) * stop // count) for i in range(count)]
