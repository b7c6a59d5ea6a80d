"""Text to token ids and back, from the tokenizer in a GGUF file.

Byte-level BPE (``tokenizer.ggml.model`` "gpt2"): text is split by the pre-tokenizer's regular expressions, one after
the other, each piece's UTF-8 bytes are written as printable characters, and the tokenizers package merges them.
"""

import codecs
import re
from functools import cache

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Bpe

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.printable import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Regular expressions of llama.cpp's src/llama-vocab.cpp, which are those of the models' tokenizer.json.
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


def _pre_tokenizer(patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


#: Pre-tokenizers by the name that ``tokenizer.ggml.pre`` gives them.
PRE_TOKENIZERS = {
    "deepseek-llm": _pre_tokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": _pre_tokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": _pre_tokenizer(_DEEPSEEK_V3),
}

#: Names of tokens that end a text whatever the metadata says, as in llama.cpp (src/llama-vocab.cpp). The last two are
#: those of DeepSeek-Coder and GLM.
_END_NAMES = frozenset(
    (
        "<｜end▁of▁sentence｜>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|tool_response>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<eos>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<|EOT|>",
        "<|user|>",
    )
)

#: Tokens of fill-in-the-middle that end a text, by the key of their id, with the names they have where there is no key.
_FIM_NAMES = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

#: Special tokens that end a text, by the key of their id.
_END_KEYS = ("eos", "eot", "eom", *_FIM_NAMES)

#: Names that chat templates have for special tokens, by the key of their id; GGUF spells "seperator" so.
_TEMPLATE_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}


class Tokenizer:
    """A model's tokenizer.

    Attributes
    ----------
    vocab_size : int
        Tokens in the file. A model's matrices may have rows for more.
    bos_id : int or None
    eos_ids : frozenset of int
        Tokens that end a text.
    add_bos : bool
        Whether the model expects BOS in front of a text.
    special_tokens : dict of str to str
        Special tokens by the names that chat templates have for them: "bos_token", "eos_token", "unk_token" …
    chat_template : str or None
    chat_templates : dict of str to str
        Templates that the file has by name, as "tool_use".
    warnings : list of str
        What is odd in the file, and what was made of it.
    """

    def __init__(self, tokens, kinds, merges, pre, *, where="tokenizer", bos_id=None, eos_ids=(), add_bos=False):
        if pre not in PRE_TOKENIZERS:
            raise PymlaError(
                f"{where}: metadata tokenizer.ggml.pre is {pre!r}, which pymla does not know; it knows "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
        self._tokens, self._kinds = tokens, list(kinds)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        missing = sum(character not in vocabulary for character in _byte_alphabet())
        if missing:
            raise PymlaError(f"{where}: metadata tokenizer.ggml.tokens lacks {missing} of the 256 bytes")
        try:
            self._bpe = Bpe(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
        except Exception as error:  # the tokenizers package raises nothing more precise
            raise PymlaError(f"{where}: metadata tokenizer.ggml.merges cannot be used: {error}") from error
        self._bpe.pre_tokenizer = PRE_TOKENIZERS[pre]
        self._ids = vocabulary
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_ids = self._ends(eos_ids)
        for token in self.eos_ids | {bos_id} - {None}:
            if self._kinds[token] in (NORMAL, USER_DEFINED) and not self._is_ordinary(token):
                self._kinds[token] = CONTROL  # the file says so elsewhere
        self._whole = _splitter(tokens, self._kinds, (USER_DEFINED,))
        self._special = _splitter(tokens, self._kinds, (USER_DEFINED, CONTROL, UNKNOWN))
        self.add_bos = add_bos
        self.special_tokens = {}
        self.chat_template = None
        self.chat_templates = {}
        self.warnings = []

    @classmethod
    def from_gguf(cls, file):
        """The tokenizer of a model file, or of a file that has nothing but a vocabulary.

        Parameters
        ----------
        file : str, Path or ModelFile

        Raises
        ------
        PymlaError
            The tokenizer is of a kind that is not implemented, or its metadata is damaged.
        """
        if not isinstance(file, ModelFile):
            file = ModelFile.open(file)
        model = file.get("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.model is {model!r}; pymla runs 'gpt2' (byte-level BPE)"
            )
        tokens = _strings(file, "tokenizer.ggml.tokens")
        merges = _strings(file, "tokenizer.ggml.merges")
        kinds = file.get("tokenizer.ggml.token_type", list, None)
        if kinds is None:
            kinds = [NORMAL] * len(tokens)
        elif isinstance(kinds, list) or not np.issubdtype(kinds.dtype, np.integer):
            raise PymlaError(f"{file.path}: metadata tokenizer.ggml.token_type is no array of integers")
        else:
            kinds = kinds.tolist()
        if len(kinds) != len(tokens):
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.token_type has {len(kinds)} entries, for {len(tokens)} tokens"
            )
        for merge in merges:
            if merge.count(" ") != 1:
                raise PymlaError(
                    f"{file.path}: metadata tokenizer.ggml.merges has {merge!r}; two tokens and a space expected"
                )
        ids, warnings = special_ids(file, len(tokens))
        more_ends, more_warnings = _eos_token_ids(file, len(tokens))
        bos_id = ids.get("bos")
        tokenizer = cls(
            tokens,
            kinds,
            merges,
            file.get("tokenizer.ggml.pre", str),
            where=file.path,
            bos_id=bos_id,
            eos_ids=more_ends | {ids[key] for key in _END_KEYS if key in ids} | _fim_ends(tokens, ids),
            add_bos=file.get("tokenizer.ggml.add_bos_token", bool, bos_id is not None) and bos_id is not None,
        )
        tokenizer.warnings = warnings + more_warnings
        if tokenizer.eos_ids:
            ids.setdefault("eos", min(tokenizer.eos_ids))
        tokenizer.special_tokens = {
            name: tokenizer.token_bytes(ids[key]).decode(errors="replace")
            for key, name in _TEMPLATE_NAMES.items()
            if key in ids
        }
        tokenizer.chat_template, tokenizer.chat_templates = _chat_templates(file)
        return tokenizer

    def encode(self, text, add_bos=True, parse_special=False):
        """Token ids of a text.

        Parameters
        ----------
        text : str
        add_bos : bool
            Put BOS in front, if the file says that the model expects it. One that the text spells there already, with
            `parse_special`, is it.
        parse_special : bool
            Take control tokens that are spelt out in the text for what they say. User-defined tokens always are.

        Raises
        ------
        PymlaError
            The text has a lone surrogate: it did not come from valid UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PymlaError(
                f"the text has an invalid character at position {error.start}; it must be valid UTF-8"
            ) from None
        ids = []
        splitter = self._special if parse_special else self._whole
        for i, piece in enumerate(splitter.split(text) if splitter else [text]):
            if i % 2:
                ids.append(self._ids[piece])
            elif piece:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.add_bos and ids[:1] != [self.bos_id] else ids

    def token_bytes(self, token):
        """The bytes that a token stands for; a control token's are its name."""
        if not 0 <= token < len(self._tokens):
            raise PymlaError(f"token id {token} is outside the vocabulary of {len(self._tokens)}")
        text = self._tokens[token]
        if self._kinds[token] == NORMAL:
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in text):
                return bytes(alphabet[character] for character in text)
        return text.encode()

    def is_special(self, token):
        """Whether a token is left out of decoded text: control, unknown and unused tokens."""
        return not 0 <= token < len(self._kinds) or self._kinds[token] in (CONTROL, UNKNOWN, UNUSED)

    def decode(self, ids, skip_special=True):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_special and 0 <= i < self.vocab_size and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def _ends(self, ids):
        """Tokens that end a text: those given, and those of a known name, whatever their type, as in llama.cpp."""
        ends = {*ids, *(self._ids[name] for name in _END_NAMES if name in self._ids)}
        names = {self._tokens[token]: token for token in ends}
        # gpt-oss and Solar end a text otherwise, and put <|end|> between a text's parts; Gemma 4 has </s> as text.
        if names.keys() & {"<|call|>", "<|calls|>"} and names.keys() & {"<|return|>", "<|flush|>"}:
            ends.discard(names.get("<|end|>"))
        if "<|tool_response>" in names:
            ends.discard(names.get("</s>"))
        return frozenset(ends)

    def _is_ordinary(self, token):
        """Whether merges make a token from its text, so that it is no special token."""
        try:
            text = self.token_bytes(token).decode()
        except UnicodeDecodeError:  # part of a character
            return True
        return self._bpe.encode(text, add_special_tokens=False).ids == [token]

    def stream(self):
        """A `TextStream` that decodes tokens one by one."""
        return TextStream(self)


class TextStream:
    """Text from tokens as they come, never half a character."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        """The characters that are complete with this token."""
        if self._tokenizer.is_special(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self):
        """What is left at the end: U+FFFD for a character that never became complete."""
        return self._decoder.decode(b"", final=True)


@cache
def _byte_alphabet():
    """The printable character of each byte in byte-level BPE: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _splitter(tokens, kinds, wanted):
    """A regular expression that finds tokens of some kinds, the longest first, or None."""
    found = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind in wanted and t), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None


def _strings(file, key):
    values = file.get(key, list)
    if not isinstance(values, list):
        raise PymlaError(f"{file.path}: metadata {key} is an array of numbers; strings are expected")
    return values


def special_ids(file, count):
    """Special tokens that a file names, by its keys ``tokenizer.ggml.*_token_id``.

    Parameters
    ----------
    file : ModelFile
    count : int
        Tokens in the vocabulary.

    Returns
    -------
    ids : dict of str to int
        By the key without "_token_id", as "bos". An id outside the vocabulary is left out: converters write -1, or
        4294967295, for a token that is not there. So is one that is no integer, where `Tokenizer` can do without.
    warnings : list of str
        One for each id that is left out.

    Raises
    ------
    PymlaError
        BOS, or a token that ends a text, is no integer.
    """
    ids, warnings = {}, []
    for key, value in file.metadata.items():
        name = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
        if key != f"tokenizer.ggml.{name}_token_id":
            continue
        token = file.get(key, int) if name in ("bos", "eos", "eot", "eom") else value
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < count:
            ids[name] = token
        else:
            warnings.append(_outside(file, key, token, count))
    return ids, warnings


def _eos_token_ids(file, count):
    """Tokens of the array ``tokenizer.ggml.eos_token_ids``, which Ollama writes, and warnings as of `special_ids`."""
    key = "tokenizer.ggml.eos_token_ids"
    values = file.get(key, list, [])
    if len(values) and (isinstance(values, list) or not np.issubdtype(values.dtype, np.integer)):
        raise PymlaError(f"{file.path}: metadata {key} is no array of integers")
    tokens = [int(value) for value in values]
    outside = [_outside(file, key, token, count) for token in tokens if not 0 <= token < count]
    return {token for token in tokens if 0 <= token < count}, outside


def _outside(file, key, token, count):
    return (
        f"{file.path}: metadata {key} is {shown(token)}, and the vocabulary has {count} tokens; it is taken as absent"
    )


def _fim_ends(tokens, ids):
    """Tokens of fill-in-the-middle that end a text, found by name where the metadata has no id for them."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = (
        [vocabulary[name] for name in names if name in vocabulary]
        for key, names in _FIM_NAMES.items()
        if key not in ids
    )
    return {each[0] for each in found if each}


def _chat_templates(file):
    """The default chat template of a file, or None, and those it has by name."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): file.get(key, str) for key in file.metadata if key.startswith(prefix)}
    return file.get("tokenizer.chat_template", str, named.get("default")), named
