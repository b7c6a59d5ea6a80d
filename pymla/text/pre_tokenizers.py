"""How each model's tokenizer cuts a text into pieces, which merges never join.

The regular expressions are the models' own (tokenizer.json, tokenization_kimi.py, tekken.json), or those that llama.cpp
has for the model where its own were not at hand (src/llama-vocab.cpp). llama.cpp approximates some of the others, as
its engine knows few Unicode categories. docs/tokenizers.md has the source of each, and where llama.cpp differs.
"""

from collections.abc import Iterable

from tokenizers import Regex, pre_tokenizers

_DEEPSEEK_LLM = (
    "[\r\n]",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
    "\\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    "\\p{N}+",
)
_DEEPSEEK_CODER = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+", "\\p{N}")
_DEEPSEEK_V3 = (
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """Contractions, words with a character in front, and numbers of as many digits as `digits` takes."""
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return "|".join((_CONTRACTION, r"[^\r\n\p{L}\p{N}]?\p{L}+", digits, others, _BLANKS))


def _cased_words(digits: str, *, contraction: str = "", but: str = "", line_ends: str = r"\r\n/") -> str:
    """As `_words`, cut before a capital that follows a small letter.

    Parameters
    ----------
    contraction : what may follow a word
    but : characters that words do not have
    line_ends : characters that may follow punctuation
    """
    either = rf"\p{{Lm}}\p{{Lo}}\p{{M}}{but}"
    large, small = rf"[\p{{Lu}}\p{{Lt}}{either}]", rf"[\p{{Ll}}{either}]"
    front = r"[^\r\n\p{L}\p{N}]?"
    words = f"{front}{large}*{small}+{contraction}|{front}{large}+{small}*{contraction}"
    return "|".join((words, digits, rf" ?[^\s\p{{L}}\p{{N}}]+[{line_ends}]*", _BLANKS))


_GPT_2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_LLAMA_3 = (_words(r"\p{N}{1,3}"),)
_QWEN_2 = (_words(r"\p{N}"),)
_GPT_4O = (_cased_words(r"\p{N}{1,3}", contraction=_CONTRACTION + "?"),)
_TEKKEN = (_cased_words(r"\p{N}"),)
_KIMI_K2 = (
    r"[\p{Han}]+|"
    + _cased_words(r"\p{N}{1,3}", contraction=_CONTRACTION + "?", but=r"&&[^\p{Han}]", line_ends=r"\r\n"),
)
_YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
    _cased_words(r"\p{N}", contraction=_CONTRACTION + "?"),
)
# llama.cpp's own, for files that do not say how their model splits text.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")


def pre_tokenizer(patterns: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Split a text by one expression after the other, and write its bytes in the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# Names that ``tokenizer.ggml.pre`` gives to patterns. `pymla convert` writes the first that fits.
_LLAMA_3_NAMES = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
_NAMES = {
    _DEEPSEEK_LLM: "deepseek-llm",
    _DEEPSEEK_CODER: "deepseek-coder",
    _DEEPSEEK_V3: "deepseek-v3 joyai-llm hunyuan-dense hy_v4",
    _LLAMA_3: f"glm4 glm5 chatglm-bpe {_LLAMA_3_NAMES} dbrx smaug-bpe",
    _KIMI_K2: "kimi-k2",
    _TEKKEN: "tekken",
    _GPT_4O: "gpt-4o kanana2 llama4 minimax-m2 talkie",
    _YOUTU: "youtu",
    _QWEN_2: "qwen2 deepseek-r1-qwen f2llmv2 hunyuan kormo megrez solar-open stablelm2",
    _GPT_2: "gigachat gpt-2 a.x-4.0 exaone4 granite-docling jais mellum modern-bert mpt olmo phi-2 trillion",
    _DEFAULT: "default",
}

#: Pre-tokenizers by the name that ``tokenizer.ggml.pre`` gives them.
PRE_TOKENIZERS = {
    name: made for patterns, names in _NAMES.items() for made in (pre_tokenizer(patterns),) for name in names.split()
}

#: Those of models that take a piece which is a token for that token, whether or not merges lead to it. llama.cpp merges
#: pieces of kimi-k2; Kimi's own tokenizer, tiktoken, looks them up first.
IGNORE_MERGES = frozenset(("glm4", "glm5", "kimi-k2", "tekken", "youtu", *_LLAMA_3_NAMES.split()))

#: Those of models that expect BOS in front of a text if the file does not say whether they do. llama.cpp has no BOS for
#: DeepSeek then; DeepSeek's own files all ask for one.
ADD_BOS = frozenset(("deepseek-llm", "deepseek-coder", "deepseek-v3", "tekken", *_LLAMA_3_NAMES.split()))
