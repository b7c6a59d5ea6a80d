"""The generation loop: with a model that says what it is told, and with the demo model."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import pymla
from pymla.engine.cache import Sequence
from pymla.engine.generation import Generation, Stats
from pymla.errors import CacheFull, PymlaError
from pymla.text.byte_alphabet import BYTES
from pymla.text.byte_level import ByteLevel
from pymla.text.sampling import Sampler, SamplingParams
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import CONTROL, NORMAL

WORDS = ("Hel", "lo", "Ġwor", "ld", "END", "abab", "aba", "c")
BYTE = {byte: i for i, byte in enumerate(BYTES[character] for character in sorted(BYTES))}
EOS = 256 + len(WORDS)


class Script:
    """A model that predicts the tokens of a script one after the other, whatever it reads."""

    def __init__(self, tokens, ctx=1000, vocab_size=EOS + 1):
        self.tokens, self.ctx = tokens, ctx
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=2000)
        self.steps, self.freed = [], []
        self.turn = threading.RLock()

    def new_sequence(self):
        return Sequence()

    def free(self, sequence):
        self.freed.append(sequence)
        sequence.tokens.clear()

    def sampler(self, params, history):
        return Sampler(params, history)

    def step(self, batch, progress=None):
        ((sequence, new),) = batch
        assert new.dtype == np.int32
        if sequence.length + len(new) > self.ctx:
            raise CacheFull("full")
        sequence.tokens.extend(new)
        if progress:
            progress(1, 1)
        logits = np.zeros((1, self.config.vocab_size), np.float32)
        logits[0, self.tokens[len(self.steps)]] = 10
        self.steps.append(list(new))
        return logits


@pytest.fixture(scope="module")
def tokenizer():
    tokens = [*sorted(BYTES), *WORDS, "<|end|>"]
    kinds = [NORMAL] * (len(tokens) - 1) + [CONTROL]
    return Tokenizer(ByteLevel(tokens, kinds, [], "deepseek-llm"), eos_ids=[EOS])


@pytest.fixture(scope="module")
def demo():
    with pymla.load(ctx=128) as language_model:
        yield language_model


def word(*words):
    return [256 + WORDS.index(each) for each in words]


@pytest.fixture
def said(tokenizer):
    """The generation of a script, greedy, run to its end, and its pieces."""

    def run(tokens, ctx=1000, **options):
        options.setdefault("max_tokens", len(tokens))
        generation = Generation(Script(tokens, ctx), tokenizer, [1, 2, 3], SamplingParams(temperature=0), **options)
        return generation, list(generation)

    return run


# What ends a text -----------------------------------------------------------------------------------------------------


def test_max_tokens(said):
    generation, pieces = said(word("Hel", "lo", "Ġwor", "ld"), max_tokens=3)
    assert pieces == ["Hel", "lo", " wor"]
    assert generation.finish_reason == "length"
    assert generation.tokens == word("Hel", "lo", "Ġwor")
    # The last token is not put through the model: nobody asks what follows it.
    assert generation.model.steps == [[1, 2, 3], *([token] for token in word("Hel", "lo"))]


def test_no_tokens_at_all(said):
    generation, pieces = said(word("Hel"), max_tokens=0)
    assert (pieces, generation.finish_reason, generation.model.steps) == ([], "length", [])
    with pytest.raises(PymlaError, match="`max_tokens` is -1"):
        said(word("Hel"), max_tokens=-1)


def test_control_tokens_are_shown_on_demand(said):
    """The one that ends the text, too, unless a stop string ended it before."""
    generation, pieces = said([*word("Hel", "lo"), EOS], max_tokens=None, special=True)
    assert pieces == ["Hel", "lo", "<|end|>"]
    assert (generation.finish_reason, generation.tokens) == ("stop", word("Hel", "lo"))
    generation, pieces = said([*word("Hel", "lo"), EOS], max_tokens=None, special=True, stop=["<|"])
    assert ("".join(pieces), generation.finish_reason) == ("Hello", "stop")


def test_end_of_text(said):
    generation, pieces = said([*word("Hel", "lo"), EOS, *word("ld")], max_tokens=None)
    assert "".join(pieces) == "Hello"
    assert generation.finish_reason == "stop"
    assert generation.tokens == word("Hel", "lo")


def test_full_context(said):
    """Of 8 places the prompt takes 3, so that 5 tokens can follow it and be read, and a last one be predicted."""
    generation, pieces = said(word(*["lo"] * 9), ctx=8, max_tokens=None)
    assert "".join(pieces) == "lo" * 6
    assert generation.finish_reason == "context"
    assert generation.stats.generated_tokens == 6
    assert generation.stats.cache_tokens == 8


def test_a_prompt_may_fill_the_context(said):
    """The token that follows it need not be read."""
    generation, pieces = said(word("lo", "lo"), ctx=3, max_tokens=None)
    assert (pieces, generation.finish_reason) == (["lo"], "context")


def test_full_context_flushes_what_was_held_back(said):
    _, pieces = said(word(*["abab"] * 9), ctx=4, max_tokens=None, stop=("ababc",))
    assert "".join(pieces) == "abab" * 2


@pytest.mark.parametrize(
    ("words", "stop", "text"),
    [
        (["Hel", "lo", "Ġwor", "ld"], ("lo",), "Hel"),
        (["Hel", "lo", "Ġwor", "ld"], ("lly", "lw"), "Hello world"),
        (["Hel", "lo", "Ġwor", "ld"], ("o w",), "Hell"),
        (["Hel", "lo", "Ġwor", "ld"], ("ello worl",), "H"),
        (["Hel", "lo", "Ġwor", "ld"], ("world", "lo"), "Hel"),
        (["Hel", "lo", "Ġwor", "ld"], ("world", "lo w", "or"), "Hel"),
        (["Hel", "END", "lo"], ("lEN", "END"), "He"),
        (["abab", "c"], ("ababd", "abc"), "ab"),
        (["abab", "aba", "c"], ("ababac",), "ab"),
        (["Hel", "lo"], ("Hel",), ""),
        (["abab", "c"], ("ab",), ""),
        (["Hel", "lo", "Ġwor", "ld"], "lo", "Hel"),
    ],
)
def test_stop_strings(said, words, stop, text):
    """The text ends before the first stop string to be complete, wherever tokens begin and end."""
    generation, pieces = said([*word(*words), EOS], stop=stop)
    assert "".join(pieces) == text
    assert generation.finish_reason == "stop"
    assert all(pieces)


def test_nothing_is_computed_after_a_stop_string(said):
    generation, _ = said(word("Hel", "lo", "ld", "ld"), stop=("lo",))
    assert generation.finish_reason == "stop"
    assert generation.model.steps == [[1, 2, 3], word("Hel")]


def test_a_stop_string_of_several_in_one_token_is_the_earliest(said):
    _, pieces = said(word("END"), stop=("D", "N"))
    assert pieces == ["E"]


def test_held_back_text_comes_as_soon_as_it_is_safe(said):
    _, pieces = said(word("Hel", "lo", "lo", "ld", "c"), stop=("llold",))
    assert pieces == ["He", "llolo", "ld", "c"]


def test_held_back_text_comes_at_the_end(said):
    generation, pieces = said(word("Hel", "lo"), stop=("lowest",))
    assert pieces == ["He", "l", "lo"]
    assert generation.finish_reason == "length"
    assert "".join(said([*word("Hel", "lo"), EOS], stop=("lowest",))[1]) == "Hello"


def test_half_a_character_at_the_end_becomes_a_replacement(said):
    llama = [BYTE[byte] for byte in "🦙".encode()]
    _, pieces = said([*llama, *llama[:2]])
    assert pieces == ["🦙", "\N{REPLACEMENT CHARACTER}"]


# What is refused ------------------------------------------------------------------------------------------------------


def test_refusals(tokenizer):
    params = SamplingParams()
    with pytest.raises(PymlaError, match="prompt is empty"):
        Generation(Script([]), tokenizer, [], params)
    with pytest.raises(PymlaError, match=r"prompt has 9 tokens and the context holds 8.*`ctx`.*2000"):
        Generation(Script([], ctx=8), tokenizer, [1] * 9, params)
    with pytest.raises(PymlaError, match="`stop` has an empty text"):
        Generation(Script([]), tokenizer, [1], params, stop=("a", ""))
    with pytest.raises(PymlaError, match="`stop` is b'lo'; a text"):
        Generation(Script([]), tokenizer, [1], params, stop=b"lo")
    with pytest.raises(PymlaError, match="`progress` is 3; a function"):
        Generation(Script([]), tokenizer, [1], params, progress=3)
    Generation(Script([]), tokenizer, [1], SamplingParams(logit_bias={0: 1.0, EOS: 1.0}))
    with pytest.raises(PymlaError, match=f"`logit_bias` for token {EOS + 1}"):
        Generation(Script([]), tokenizer, [1], SamplingParams(logit_bias={EOS + 1: 1.0}))


# What it tells --------------------------------------------------------------------------------------------------------


def test_figures(said):
    generation, _ = said(word(*["lo"] * 5))
    stats = generation.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.cache_tokens) == (3, 5, 7)
    assert stats.prompt_seconds > 0
    assert stats.prompt_rate == pytest.approx(3 / stats.prompt_seconds)
    assert stats.generation_rate == pytest.approx(4 / stats.generation_seconds)


def test_nothing_is_told_before_the_first_piece(tokenizer):
    generation = Generation(Script([]), tokenizer, [1], SamplingParams())
    assert (generation.finish_reason, generation.tokens) == ("interrupted", [])
    assert generation.stats == Stats(0, 0.0, 0, 0.0, 0)
    assert (generation.max_tokens, generation.stop, generation.progress) == (None, (), None)
    for told in ("finish_reason", "sampled", "stats"):
        with pytest.raises(TypeError, match=told):
            Generation(Script([]), tokenizer, [1], SamplingParams(), **{told: None})


def test_seconds_are_those_of_the_models_steps(tokenizer, monkeypatch):
    """Two for the prompt and a quarter for each token; what a reader does in between takes no time."""
    clock = [1000.0]
    monkeypatch.setattr("pymla.engine.generation.time.perf_counter", lambda: clock[0])
    model = Script(word(*["lo"] * 5))

    def step(batch, progress=None):
        clock[0] += 0.25 if model.steps else 2.0
        return Script.step(model, batch, progress)

    monkeypatch.setattr(model, "step", step)
    generation = Generation(model, tokenizer, [1, 2, 3], SamplingParams(temperature=0), max_tokens=5)
    stats = generation.stats
    assert (stats.prompt_rate, stats.generation_rate) == (0, 0)
    for count, _ in enumerate(generation, 1):
        clock[0] += 60
        assert (stats.prompt_tokens, stats.prompt_seconds) == (3, 2.0)
        assert (stats.generated_tokens, stats.generation_seconds) == (count, 0.25 * (count - 1))
    assert (stats.prompt_rate, stats.generation_rate) == (1.5, 4.0)


def test_progress_is_that_of_the_prompt(said):
    calls = []
    said(word("Hel", "lo", "ld"), progress=lambda *each: calls.append(each))
    assert calls == [(1, 1)]


def test_a_generation_is_read_again_and_read_on(tokenizer):
    model = Script(word(*["lo"] * 4, "ld"))
    generation = Generation(model, tokenizer, [1, 2], SamplingParams(temperature=0), max_tokens=5)
    pieces = iter(generation)
    next(pieces), next(pieces)
    pieces.close()
    assert generation.finish_reason == "interrupted"
    assert generation.stats.cache_tokens == 3
    assert generation.tokens == word("lo", "lo")
    assert model.freed == []
    assert list(generation) == list(generation) == ["lo"] * 4 + ["ld"]
    assert len(model.steps) == 5
    assert generation.finish_reason == "length"
    assert len(model.freed) == 1


def test_two_readers_of_a_generation_get_the_same_pieces(tokenizer):
    model = Script(word(*["lo"] * 3))
    generation = Generation(model, tokenizer, [1], SamplingParams(temperature=0), max_tokens=3)
    first, second = iter(generation), iter(generation)
    assert [next(first), next(second), next(second), next(first), next(first), next(second)] == ["lo"] * 6
    assert (list(first), list(second), len(model.steps)) == ([], [], 3)


def test_an_interrupt_within_a_step_gives_the_cache_back(tokenizer, monkeypatch):
    model = Script(word(*["lo"] * 9))
    generation = Generation(model, tokenizer, [1, 2], SamplingParams(temperature=0))
    pieces = iter(generation)
    assert next(pieces) == "lo"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert len(model.freed) == 1
    assert generation.finish_reason == "interrupted"
    assert generation.stats.generated_tokens == 1
    pieces = iter(generation)
    assert next(pieces) == "lo"
    with pytest.raises(PymlaError, match="ended by KeyboardInterrupt; start another"):
        next(pieces)


def test_what_ended_a_generation_is_told_to_later_readers(tokenizer, monkeypatch):
    model = Script([])
    generation = Generation(model, tokenizer, [1, 2], SamplingParams(temperature=0))

    def broken(*_, **__):
        raise ValueError("no device")

    monkeypatch.setattr(model, "step", broken)
    with pytest.raises(ValueError, match="no device"):
        list(generation)
    for _ in range(2):
        with pytest.raises(PymlaError, match="this generation was ended by ValueError: no device; start another one"):
            list(generation)
    assert len(model.freed) == 1


# The demo model -------------------------------------------------------------------------------------------------------


def test_greedy_is_the_likeliest_token_of_the_logits():
    # A cache of float32, over which the two forms of attention differ by 8-bit activations alone.
    demo = pymla.load(ctx=128, cache_type="f32")
    prompt = demo.tokenize("def __init__(self")
    generation = demo.generation(prompt, max_tokens=12, temperature=0, logprobs=3)
    text = "".join(generation)
    # One pass over everything, with the attention of a prompt.
    logits = demo.logits([*prompt, *generation.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    for row, sampled in zip(logits, generation.sampled, strict=True):
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprobs[sampled.token] > logprobs.max() - 0.1
        assert sampled.logprob == pytest.approx(logprobs[sampled.token], abs=0.1)
        assert len(sampled.alternatives) == 3
        assert sampled.alternatives[0] == (sampled.token, sampled.logprob)
        assert sampled.alternatives[0][1] >= sampled.alternatives[1][1] >= sampled.alternatives[2][1]
    assert text == demo.detokenize(generation.tokens)


def test_same_seed_same_text(demo):
    texts = [demo.generate("def ", max_tokens=30, temperature=1.2, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("seed", range(3))
def test_pieces_make_up_the_text_of_the_tokens(demo, seed):
    generation = demo.generation("'🦙 ", max_tokens=60, temperature=5, top_k=0, min_p=0, top_p=1, seed=seed)
    pieces = list(generation)
    assert "".join(pieces) == demo.detokenize(generation.tokens)
    assert len(pieces) > 10


def test_options_reach_the_sampler(demo):
    greedy = demo.generation("x = ", max_tokens=6, temperature=0)
    list(greedy)
    first = greedy.tokens[0]
    banned = demo.generation("x = ", max_tokens=1, temperature=0, logit_bias={first: -float("inf")})
    list(banned)
    assert banned.tokens != [first]
    # The token that the bias forces would come again and again; a penalty that grows with each time breaks it off.
    forced = demo.generation("x = ", max_tokens=8, temperature=0, logit_bias={300: 100.0})
    list(forced)
    assert forced.tokens == [300] * 8
    broken = demo.generation("x = ", max_tokens=8, temperature=0, logit_bias={300: 100.0}, frequency_penalty=40.0)
    list(broken)
    assert broken.tokens[:2] == [300, 300]
    assert set(broken.tokens[5:]) - {300}
    # Penalties look back on the prompt, too.
    again = demo.generation([300, 300, 300, 300], max_tokens=1, temperature=0, logit_bias={300: 50.0})
    list(again)
    assert again.tokens == [300]
    never = demo.generation([300] * 4, max_tokens=1, temperature=0, logit_bias={300: 50.0}, presence_penalty=100.0)
    list(never)
    assert never.tokens != [300]


def test_repetitions_end_where_dry_is_on(demo):
    """A token may follow itself until two of them stand before two of them; with a sequence breaker in it, for ever."""
    options = {"max_tokens": 6, "temperature": 0, "logit_bias": {300: 100.0}, "dry_multiplier": 100, "dry_base": 1}
    generation = demo.generation("x = ", **options)
    list(generation)
    assert generation.tokens[:3] == [300] * 3
    assert generation.tokens[3] != 300
    text = demo.tokenizer.token_bytes(300).decode()
    breaking = demo.generation("x = ", **options, dry_sequence_breakers=[text[-1]])
    list(breaking)
    assert breaking.tokens == [300] * 6


def test_a_full_context_of_a_real_model(demo):
    prompt = demo.tokenize("def ")
    eos = dict.fromkeys(demo.tokenizer.eos_ids, -float("inf"))
    generation = demo.generation(prompt, temperature=0, logit_bias=eos)
    text = "".join(generation)
    assert generation.finish_reason == "context"
    assert generation.stats.cache_tokens == demo.model.ctx == 128
    assert generation.stats.generated_tokens == 128 - len(prompt) + 1
    assert text == demo.detokenize(generation.tokens)


def test_the_cache_is_free_after_every_end(demo):
    free = demo.model.cache.free_pages
    list(demo.generation("def ", max_tokens=3))
    assert demo.model.cache.free_pages == free
    pieces = demo.stream("def ", max_tokens=100)
    next(pieces)
    assert demo.model.cache.free_pages == free - 1
    pieces.close()
    assert demo.model.cache.free_pages == free
    with pytest.raises(PymlaError):
        demo.generate("def " * 500)
    assert demo.model.cache.free_pages == free


def test_two_texts_at_once_do_not_mix(demo):
    alone = [demo.generate(prompt, max_tokens=10, temperature=0) for prompt in ("def ", "import ")]
    streams = [demo.generation(prompt, max_tokens=10, temperature=0) for prompt in ("def ", "import ")]
    pieces = [iter(stream) for stream in streams]
    texts = ["", ""]
    for _ in range(11):
        for i in (0, 1):
            texts[i] += next(pieces[i], "")
    assert texts == alone
