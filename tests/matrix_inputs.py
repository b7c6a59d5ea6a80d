"""What the matrices of a model read, by the formulas of its papers: a forward pass in float64, tensor by tensor.

`tests/test_imatrix.py` compares the sums that `pymla imatrix` collects with these.
"""

import numpy as np
from definitions import attend, layer_norm, rms_norm, rotated, route, tempered

from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.deepseek32 import KEY_EPS


class MatrixInputs:
    """Sums of squared inputs of every matrix of a model on one text.

    Parameters
    ----------
    path : a GGUF file whose tensors are F32, with ``attn_kv_b``
    tokens : of the text, in which each sees those before it

    Attributes
    ----------
    sums, counts : dict of str and array (matrices, K), (matrices,)
    """

    def __init__(self, path, tokens):
        file = ModelFile.open(path)
        self._names = file.tensors.keys()
        self._w = {
            name: each.data.view(np.float32).reshape(each.shape).astype(np.float64)
            for name, each in file.tensors.items()
        }
        self._config, self._positions = ModelConfig.from_gguf(file), np.arange(len(tokens))
        self.sums, self.counts = {}, {}
        x = self._w["token_embd.weight"][tokens]
        for i in range(self._config.num_hidden_layers):
            self._blk = f"blk.{i}."
            x = x + self._attention(self._norm(x, "attn_norm"))
            x = x + self._network(self._norm(x, "ffn_norm"))
        self._blk = ""
        self._product("output" if self._has("output") else "token_embd", self._norm(x, "output_norm"))

    def _has(self, stem):
        return f"{self._blk}{stem}.weight" in self._names

    def _weight(self, stem, kind="weight"):
        return self._w.get(f"{self._blk}{stem}.{kind}")

    def _norm(self, x, stem):
        return rms_norm(x, self._weight(stem), self._config.rms_norm_eps)

    def _read(self, stem, x, expert=0, experts=1):
        """A tensor's matrix reads rows (n, K)."""
        name = f"{self._blk}{stem}.weight"
        self.sums.setdefault(name, np.zeros((experts, x.shape[1])))[expert] += (x**2).sum(0)
        self.counts.setdefault(name, np.zeros(experts, int))[expert] += len(x)

    def _product(self, stem, x):
        self._read(stem, x)
        return x @ self._weight(stem).T

    def _rotated(self, x, interleave):
        layout = "interleaved" if interleave else "neox"
        return rotated(x, self._positions, self._config.inv_freq(), self._config.rope_magnitude, layout)

    def _attention(self, h):
        c, tokens = self._config, len(h)
        heads, rank, nope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim
        if self._has("attn_q_a"):
            c_q = self._norm(self._product("attn_q_a", h), "attn_q_a_norm")
            q = self._product("attn_q_b", c_q)
        else:
            c_q, q = None, self._product("attn_q", h)
        q = self._rotated(q.reshape(tokens, heads, -1), c.rope_interleave)
        if c.attention_temperature:
            q = tempered(q, self._positions, c.attention_temperature.scale, c.attention_temperature.length)
        kv = self._product("attn_kv_a_mqa", h)
        c_kv, k_pe = self._norm(kv[:, :rank], "attn_kv_a_norm"), self._rotated(kv[:, None, rank:], c.rope_interleave)
        k_b, v_b = np.split(self._weight("attn_kv_b").reshape(heads, -1, rank), [nope], axis=1)
        latent_q = np.concatenate([np.einsum("thn,hnr->thr", q[..., :nope], k_b), q[..., nope:]], axis=2)
        keys, seen = np.concatenate([c_kv, k_pe[:, 0]], axis=1), self._seen(h, c_q)
        latent = np.array(
            [
                [attend(head, keys[own], c_kv[own], c.softmax_scale) for head in latent_q[t]]
                for t, own in enumerate(seen)
            ]
        )
        self._read("attn_kv_b", c_kv)
        self._read("attn_k_b", q[..., :nope].reshape(tokens, -1))
        self._read("attn_v_b", latent.reshape(tokens, -1))
        return self._product("attn_output", np.einsum("thr,hvr->thv", latent, v_b).reshape(tokens, -1))

    def _seen(self, h, c_q):
        """The positions that each token attends to."""
        indexer, tokens = self._config.indexer, len(h)
        if indexer is None:
            return [np.arange(t + 1) for t in range(tokens)]
        rope = self._config.qk_rope_head_dim
        q = self._product("indexer.attn_q_b", c_q).reshape(tokens, indexer.heads, -1)
        k = self._product("indexer.attn_k", h)
        k = layer_norm(k, self._weight("indexer.k_norm"), self._weight("indexer.k_norm", "bias"), KEY_EPS)[:, None]
        for each in (q, k):
            each[..., :rope] = self._rotated(each[..., :rope], indexer.interleave)
        weights = self._product("indexer.proj", h)
        seen = []
        for t in range(tokens):
            scores = weights[t] @ np.maximum(0, q[t] @ k[: t + 1, 0].T)
            seen.append(np.sort(np.argsort(-scores, kind="stable")[: indexer.top_k]))
        return seen

    def _network(self, h):
        c = self._config
        if not self._has("ffn_gate_inp"):
            return self._swiglu(h, "") if self._has("ffn_gate") else self._relu_squared(h)
        ids, weights = route(
            self._product("ffn_gate_inp", h), self._weight("exp_probs_b", "bias"), c.num_experts_per_tok, c
        )
        result = self._swiglu(h, "_shexp") if self._has("ffn_gate_shexp") else np.zeros_like(h)
        gate, up, down = self._experts()
        for e in range(c.n_routed_experts):
            tokens, slots = np.nonzero(ids == e)
            fused = self._has("ffn_gate_up_exps")
            for stem in ("ffn_gate_up_exps",) if fused else ("ffn_gate_exps", "ffn_up_exps"):
                self._read(stem, h[tokens], e, c.n_routed_experts)
            hidden = _silu(h[tokens] @ gate[e].T) * (h[tokens] @ up[e].T)
            self._read("ffn_down_exps", hidden, e, c.n_routed_experts)
            result[tokens] += weights[tokens, slots, None] * (hidden @ down[e].T)
        return result

    def _experts(self):
        if not self._has("ffn_gate_up_exps"):
            return [self._weight(f"ffn_{part}_exps") for part in ("gate", "up", "down")]
        both = self._weight("ffn_gate_up_exps")
        return *np.split(both, 2, axis=1), self._weight("ffn_down_exps")

    def _swiglu(self, h, suffix):
        hidden = _silu(self._product(f"ffn_gate{suffix}", h)) * self._product(f"ffn_up{suffix}", h)
        return self._product(f"ffn_down{suffix}", hidden)

    def _relu_squared(self, h):
        return self._product("ffn_down", np.maximum(self._product("ffn_up", h), 0) ** 2)


def _silu(x):
    return x / (1 + np.exp(-x))
