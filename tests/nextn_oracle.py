"""Models with a block that predicts a further token, and what it computes: by the formulas of DeepSeek-V3's report
(section 2.2), with a layer of transformers, in float64 but for its norms and angles.

As transformers' `MtpModel`, which shares the embedding and the output matrix with the model in all cases.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_golden import random_model, save
from safetensors.torch import load_file, save_file

from pymla.make.convert import convert

#: Names in a checkpoint of the block's tensors outside its layer, by those of a model of one layer.
OWN = {"model.embed_tokens.": "embed_tokens.", "model.norm.": "shared_head.norm.", "lm_head.": "shared_head.head."}


class Oracle:
    """A random model of a shape with a block behind it, which has an embedding, a norm and an output matrix of its own
    or shares the model's.

    Parameters
    ----------
    shape : Shape
    seed : int
    own : bool
    """

    def __init__(self, shape, seed, own=True):
        self.shape, self.own = shape, own
        one_layer = dataclasses.replace(shape, num_hidden_layers=1, first_k_dense_replace=0, indexer_types=None)
        self.model, self.block = random_model(shape, seed), random_model(one_layer, seed + 1)
        for each in (self.model, self.block):
            each.set_experts_implementation("eager")  # others have no float64
        if not own:
            with torch.no_grad():
                for name in ("model.embed_tokens", "model.norm", "lm_head"):
                    self.block.get_submodule(name).weight.copy_(self.model.get_submodule(name).weight)
        generator, hidden = torch.Generator().manual_seed(seed + 2), shape.hidden_size
        noise = [torch.randn(size, generator=generator) for size in ((hidden,), (hidden,), (hidden, 2 * hidden))]
        self.enorm, self.hnorm, self.eh_proj = 1 + 0.2 * noise[0], 1 + 0.2 * noise[1], noise[2] / (2 * hidden) ** 0.5

    def write(self, path, **options):
        """Convert it to a GGUF file; `options` are convert's."""
        self.model.float(), self.block.float()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as of_block:
            save(self.model, self.shape, Path(folder))
            self.block.save_pretrained(of_block)
            place = f"model.layers.{self.shape.num_hidden_layers}."
            tensors = load_file(f"{folder}/model.safetensors") | dict(self._block_tensors(of_block, place))
            save_file({name: each.contiguous() for name, each in tensors.items()}, f"{folder}/model.safetensors")
            fixed = {"qtype": "f32", "pre": "deepseek-llm", "name": self.shape.name, "mtp": True}
            convert(folder, path, **fixed | options)
        return path

    def _block_tensors(self, folder, place):
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            outer = next((each for each in OWN if name.startswith(each)), None)
            if outer is None:
                yield name.replace("model.layers.0.", place), tensor
            elif self.own:
                yield place + OWN[outer] + "weight", tensor
        for name in ("enorm", "hnorm", "eh_proj"):
            yield f"{place}{name}.weight", getattr(self, name)

    @torch.no_grad()
    def hidden(self, tokens):
        """The model's hidden states behind its last norm, float64 (T, hidden)."""
        ids = torch.as_tensor(np.asarray(tokens, np.int64))[None]
        return self.model.double().model(ids).last_hidden_state[0].numpy()

    @torch.no_grad()
    def outputs(self, hidden, tokens):
        """The block's logits (n, V) and hidden states (n, hidden) from n of the model's, with the token behind each."""
        block = self.block.double()
        embedding = block.model.embed_tokens(torch.as_tensor(np.asarray(tokens, np.int64)))
        e, h = self._norm(embedding, self.enorm), self._norm(torch.as_tensor(hidden), self.hnorm)
        x = torch.cat([e, h], dim=1) @ self.eh_proj.double().T
        own = block.model(inputs_embeds=x[None]).last_hidden_state
        return block.lm_head(own)[0].numpy(), own[0].numpy()

    def drafted(self, hidden, tokens, count):
        """Tokens that follow greedily, with the block's hidden state in place of the model's from the second on."""
        hidden, tokens = np.asarray(hidden), list(tokens)
        first = len(tokens)
        for _ in range(count):
            logits, own = self.outputs(hidden, tokens)
            tokens.append(int(logits[-1].argmax()))
            hidden = np.concatenate([hidden, own[-1:]])
        return tokens[first:]

    def _norm(self, x, weight):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return x * scale * weight.double()
