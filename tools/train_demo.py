"""Train the demo model: a small DeepSeek-V2 that writes Python, on the standard library's own source.

Needs torch, transformers and two cores for an hour. It writes a Hugging Face directory, then converts it
to GGUF. A run that was stopped goes on from its last checkpoint when it is started again.
"""

import hashlib
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import click
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pymla.make.convert import convert
from pymla.text.pre_tokenizers import PRE_TOKENIZERS

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

#: Folders of the standard library that hold tables, test data and code made by programs.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib-dynload", "__pycache__"}


def source_files(root: Path) -> list[Path]:
    """Python files of the standard library below `root`, sorted, without tests and tables."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and not path.relative_to(root).parts[0].startswith("config-")
    ]


def split_heldout(paths: list[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Training and held-out files: every twentieth by the hash of its name, the same on every machine."""

    def held_out(path: Path) -> bool:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[0] % 20 == 0

    return [p for p in paths if not held_out(p)], [p for p in paths if held_out(p)]


def read_texts(paths: list[Path]) -> list[str]:
    """Contents of the files that are UTF-8, with Unix line ends; empty ones are left out."""
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE behind the deepseek-llm pre-tokenizer, BOS and EOS as ids 0 and 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["deepseek-llm"]
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def build_model(vocab_size: int, context_length: int):
    """A DeepSeek-V2 of 5.3 M weights that llama.cpp and ik_llama.cpp load: q-LoRA, every K a multiple of 32.

    ik_llama.cpp wants an output matrix of its own, so the embeddings are not tied.
    """
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        routed_scaling_factor=2.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        max_position_embeddings=context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = DeepseekV2ForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def space_splits(tokenizer) -> dict[int, list[int]]:
    """Token ids that begin with a space, each with the ids of the text behind that space."""
    vocab = tokenizer.get_vocab()
    return {
        token_id: tokenizer.encode(tokenizer.decode([token_id])[1:], add_special_tokens=False).ids
        for token, token_id in vocab.items()
        if token.startswith("Ġ") and token.strip("Ġ") and not token.startswith("ĠĠ")
    }


def split_spaces(ids: list[int], tokenizer, share: float, rng: np.random.Generator) -> list[int]:
    """Cut the space off a share of the tokens that begin with one, as if a prompt had ended there.

    The pre-tokenizer puts a space into the word behind it, so a text that ends with a space, such as "def ", ends with
    tokens that no file contains in front of a word. A space behind others joins them, as it would in a prompt.
    """
    splits = space_splits(tokenizer)
    vocab = tokenizer.get_vocab()
    one_longer = {vocab["Ġ" * n]: vocab.get("Ġ" * (n + 1)) for n in range(1, 99) if "Ġ" * n in vocab}
    chosen = rng.random(len(ids)) < share
    found: list[int] = []
    for token_id, cut_off in zip(ids, chosen, strict=True):
        if not cut_off or token_id not in splits:
            found.append(token_id)
            continue
        joined = one_longer.get(found[-1]) if found else None
        if joined is not None:
            found[-1] = joined
        else:
            found.append(vocab["Ġ"])
        found.extend(splits[token_id])
    return found


class Windows:
    """Training windows: BOS, then text from the start of a random line. EOS stands between files.

    Parameters
    ----------
    texts : list[str]
    tokenizer : tokenizers.Tokenizer
    split : share of the tokens with a space in front that lose it, see `split_spaces`
    """

    def __init__(self, texts: list[str], tokenizer, split: float = 0.0):
        ids = []
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            ids.extend((*encoding.ids, 1))
        self.ids = np.array(split_spaces(ids, tokenizer, split, np.random.default_rng(0)), np.int64)
        newline = tokenizer.token_to_id("Ċ")
        self.starts = np.flatnonzero((self.ids[:-1] == newline) | (self.ids[:-1] == 1)) + 1

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        """Random windows, int64 (batch, length + 1)."""
        last = np.searchsorted(self.starts, len(self.ids) - length)
        starts = self.starts[rng.integers(0, last, batch)]
        rows = self.ids[starts[:, None] + np.arange(length)]
        return np.concatenate([np.zeros((batch, 1), np.int64), rows], axis=1)

    def fixed(self, length: int, limit: int) -> np.ndarray:
        """At most `limit` windows spread evenly over the text, int64 (windows, length + 1)."""
        count = len(self.ids) // length
        chosen = np.linspace(0, count - 1, min(limit, count)).astype(int)
        rows = self.ids[chosen[:, None] * length + np.arange(length)]
        return np.concatenate([np.zeros((len(rows), 1), np.int64), rows], axis=1)


def orthogonalise(update):
    """The nearest semi-orthogonal matrices by five Newton-Schulz steps (Muon, Jordan et al. 2024); (..., m, n)."""
    wide = update.mT if update.shape[-2] > update.shape[-1] else update
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if update.shape[-2] > update.shape[-1] else x


class Muon:
    """Momentum, orthogonalised per matrix; for hidden matrices only. Fused gate and up count as two matrices.

    Parameters
    ----------
    parameters : dict[str, torch.nn.Parameter]
        By name; (N, K) or (experts, N, K).
    """

    def __init__(self, parameters: dict, momentum: float = 0.95, weight_decay: float = 0.05):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.velocity = {}

    def step(self, lr: float):
        import torch

        with torch.no_grad():
            for name, p in self.parameters.items():
                v = self.velocity.setdefault(name, torch.zeros_like(p)).mul_(self.momentum).add_(p.grad)
                update = p.grad + self.momentum * v
                if name.endswith("gate_up_proj"):
                    update = update.unflatten(-2, (2, -1))
                update = orthogonalise(update)
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.mul_(1 - lr * self.weight_decay).add_(update.reshape(p.shape), alpha=-lr * scale)
                p.grad = None


def loss_of(model, windows, balance: float = 0.0):
    """Mean cross entropy in nats per token; with `balance`, plus the load-balancing loss of every router.

    The balancing loss is that of Switch Transformer: experts times the sum of (share of tokens, mean score).
    """
    import torch

    output = model(input_ids=windows[:, :-1], output_router_logits=balance > 0)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten())
    if not balance:
        return loss, loss
    total = loss
    for logits in output.router_logits:
        scores = logits.flatten(0, -2).softmax(-1)
        chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(model.config.num_experts_per_tok).indices, 1.0)
        total = total + balance * scores.shape[-1] * (scores.mean(0) * chosen.mean(0)).sum()
    return loss, total


def heldout_loss(model, windows: np.ndarray) -> float:
    """Mean cross entropy in nats per token over the windows."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, torch.from_numpy(window[None]))[0].item() for window in windows]
    model.train()
    return sum(losses) / len(losses)


def rate(done: float) -> float:
    """Share of the peak learning rate when `done` (0 to 1) of the time has gone: warm-up, then a cosine to zero."""
    return min(done / 0.01, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def window_length(done: float, context_length: int) -> int:
    """Short windows first: they are cheaper per token, and late in training a few long ones teach the positions."""
    return context_length // (4 if done < 0.6 else 2 if done < 0.85 else 1)


def train(model, data: Windows, heldout: np.ndarray, checkpoint: Path, *, minutes, batch_tokens, context_length, seed):
    """Train for `minutes` of running time, checkpoints counted; returns the steps taken."""
    import torch

    named = dict(model.named_parameters())
    by_adam = {n: p for n, p in named.items() if p.ndim < 2 or any(s in n for s in ("embed", "lm_head", "mlp.gate."))}
    others = list(by_adam.values())
    muon = Muon({n: p for n, p in named.items() if n not in by_adam})
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    spent, step, tokens = 0.0, 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.velocity = state["velocity"]
        spent, step, tokens = state["spent"], state["step"], state["tokens"]
        click.echo(f"goes on from {checkpoint}: step {step}, {spent / 60:.1f} min spent")

    def save():
        state = {"model": model.state_dict(), "adam": adam.state_dict(), "velocity": muon.velocity}
        state |= {"spent": spent, "step": step, "tokens": tokens}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    mean, began, saved = None, time.monotonic() - spent, spent
    while spent < 60 * minutes:
        done = spent / (60 * minutes)
        length = window_length(done, context_length)
        windows = data.sample(np.random.default_rng((seed, step)), batch_tokens // length, length)
        loss, total = loss_of(model, torch.from_numpy(windows), balance=0.01)
        total.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.param_groups[0]["lr"] = 3e-3 * rate(done)
        adam.step()
        adam.zero_grad()
        muon.step(0.02 * rate(done))
        step, tokens = step + 1, tokens + windows[:, 1:].size
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        spent = time.monotonic() - began
        if step % 20 == 0:
            click.echo(
                f"{spent / 60:6.1f} min  step {step:5d}  {tokens / 1e6:6.2f} M tokens  "
                f"{tokens / spent:5.0f} tokens/s  length {length:4d}  loss {mean:.4f}"
            )
        if spent - saved > 240:
            save()
            saved = spent
            click.echo(f"{spent / 60:6.1f} min  held-out loss {heldout_loss(model, heldout):.4f}")
    save()
    return step


def save(model, tokenizer, out: Path) -> None:
    """Write a Hugging Face folder."""
    model.config.use_cache = model.generation_config.use_cache = True
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def continuation(model, tokenizer, prompt: str, count: int) -> str:
    """The text that `count` greedily chosen tokens add to a prompt."""
    import torch

    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    found = model.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=1)
    return tokenizer.decode(found[0, ids.shape[1] :].tolist())


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", default=55.0, show_default=True, help="Wall-clock time to train for.")
@click.option("--vocab-size", default=2560, show_default=True)
@click.option("--context-length", default=1024, show_default=True)
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--gguf", type=click.Path(path_type=Path), help="Where the GGUF goes. [default: OUT/demo.gguf]")
@click.option("--heldout-out", type=click.Path(path_type=Path), help="Write the held-out text to this file.")
def main(out, minutes, vocab_size, context_length, batch_tokens, threads, seed, gguf, heldout_out):
    """Train the demo model into the folder OUT.

    \b
    Example:
      python tools/train_demo.py build/demo --minutes 55 --gguf pymla/demo.gguf
    """
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = (read_texts(paths) for paths in split_heldout(source_files(root), root))
    if heldout_out:
        heldout_out.write_text("".join(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(training, vocab_size)
    data, rest = Windows(training, tokenizer, split=0.03), Windows(held_out, tokenizer)
    nbytes = sum(len(text.encode()) for text in held_out)
    click.echo(
        f"Python {sys.version.split()[0]}: {len(training)} files, {len(data.ids) / 1e6:.2f} M tokens to train on; "
        f"{len(held_out)} files, {len(rest.ids) / 1e6:.2f} M tokens held out ({nbytes / len(rest.ids):.2f} bytes each)"
    )
    model = build_model(tokenizer.get_vocab_size(), context_length)
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights")
    heldout = rest.fixed(512, 64)
    train(
        model,
        data,
        heldout,
        out / "checkpoint.pt",
        minutes=minutes,
        batch_tokens=batch_tokens,
        context_length=context_length,
        seed=seed,
    )
    loss = heldout_loss(model, rest.fixed(512, 10**9))
    click.echo(f"held-out loss {loss:.4f} nats a token, {loss / math.log(2) * len(rest.ids) / nbytes:.4f} bits a byte")
    save(model, tokenizer, out)
    click.echo(f"greedily: {continuation(model, tokenizer, 'def ', 60)!r}")
    gguf = gguf or out / "demo.gguf"
    done = convert(out, gguf, qtype="q8_0", name="pymla demo")
    click.echo(f"{gguf}: {done.nbytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
