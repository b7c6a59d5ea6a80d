"""Lines of text that tokenizers get wrong: the same ones in every version of Python.

Characters come from Unicode 3.2, whose database every Python has, and from lists of newer ones below.
"""

import itertools
import random
from functools import cache
from unicodedata import ucd_3_2_0 as unicode_3_2

LONG = "aA1 \n\t.Éя中あ한\u0301🦙é"

_WORDS = "the Quick brown FOX jumpedOver iPhone HTTPServer naïve Straße ΌΡΟΣ любовь МоскваСити ǅungla ʰmod ⅷ"
_NEWER = (
    "ᲐᲑᲒ ჀჁ ᏣᎳᎩ ꭰꭱ ꙮ ꚰ 𞤀𞤁𞤢 𐐀𐐨 𑄃𑄖 ߊߋ ⵣⴰ ꯀꯁ 𝐀𝐛𝟗 𝒜𝔷 ₿ ⸮ ꧁꧂ ︎ 🄰🅱 "
    "𠀀𪜀𫝀 㐂㐃 豈更 𠔜 ⺀⼀ 々〇〡 〆ヶ ゟヿ ｱｲｳ ㌀ ㍿ ꥠ ㆍ ㄅㄆ ㈱"
)
_SPACES = [
    *range(0x09, 0x0E),
    *range(0x1C, 0x21),
    *(0x85, 0xA0, 0x1680, 0x180E, 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF),
    *range(0x2000, 0x2010),
]
_EMOJI = "😀👍👩👨👧🦙🚀❤☺☃✌🏳🏴🇩🇪🇯🇵🧑🎉🫠⌚ⓂⒶ"
_JOINERS = ["\u200d", "\ufe0f", "\ufe0e", "\u20e3", "🏻", "🏿", "", "", " "]
_CONTRACTED = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
_CJK = [
    *(range(0x4E00, 0x9FA6), range(0x3400, 0x4DB6), range(0x20000, 0x2A6D7), range(0xF900, 0xFA2E)),
    *(range(0x3041, 0x3097), range(0x30A1, 0x30FB), range(0xAC00, 0xD7A4), range(0x1100, 0x115A)),
    *(range(0x3105, 0x312D), range(0x3000, 0x3030), range(0xFF01, 0xFF5F), range(0x41, 0x5B), range(0x61, 0x7B)),
    *(range(0x30, 0x3A), range(0x20, 0x30)),
]


@cache
def lines() -> tuple[str, ...]:
    """More than 2,000 lines, some of them empty or with line ends of their own, no two the same."""
    parts = (_scripts, _anything, _emoji, _digits, _blanks, _spaces, _controls, _marks, _contractions, _cjk, _private)
    parts += (_cases, _punctuation, _long)
    found = dict.fromkeys(line for number, part in enumerate(parts) for line in part(_Chance(number)))
    return ("", *found)


def special_lines(names):
    """Lines that spell special tokens: alone, in a row, among text, and not quite."""
    chance, names = _Chance(len(names)), list(names)
    for name in names:
        yield from (name, f" {name} ", f"a{name}b", f"{name}\n{name}", name[:-1], name[1:], name.swapcase())
        yield from (name + chance.of(names), f"1{name} the{name[0]}", f"{name[:-1]} {name[-1]}", f"é{name}中\t{name}")


class _Chance:
    """Draws that are the same in every version of Python, which promises it of `random` alone."""

    def __init__(self, seed):
        self._random = random.Random(seed).random

    def below(self, count):
        return int(self._random() * count)

    def of(self, several):
        return several[self.below(len(several))]

    def text(self, several, most):
        return "".join(self.of(several) for _ in range(1 + self.below(most)))


@cache
def _assigned(start, end):
    return [chr(code) for code in range(start, end) if unicode_3_2.category(chr(code)) not in ("Cn", "Cs", "Co")]


def _scripts(chance):
    """Words of every block's characters: alone, and among others."""
    for start in range(0, 0x30000, 64):
        found = _assigned(start, start + 64)
        if found and ((not 0x3400 <= start < 0xD7A4 and start < 0x20000) or start % 1024 == 0):
            yield "".join(found)
            yield " ".join(chance.text(found, 7) for _ in range(6))
            yield "".join(chance.text(found, 3) + chance.of(" aZ9.,\n'-") for _ in range(8))


def _anything(chance):
    everything = [*_assigned(0, 0x3400), *_assigned(0xF900, 0x20000)]
    for _ in range(200):
        yield chance.text(everything, 30)
    yield from _NEWER.split()
    yield _NEWER


def _emoji(chance):
    for _ in range(120):
        yield "".join(chance.of(_EMOJI) + chance.of(_JOINERS) for _ in range(1 + chance.below(8)))
    yield from ("👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "1️⃣2️⃣#️⃣", "👍🏿ok", "🏴\U000e0067\U000e0062\U000e007f")


def _digits(chance):
    for code in range(0x30000):
        if unicode_3_2.category(chr(code)) == "Nd" and unicode_3_2.digit(chr(code)) == 0:
            digits = [chr(code + value) for value in range(10)]
            yield from ("".join(digits[:4]), chance.text(digits, 12), f"x{chance.text(digits, 5)}y 7{digits[3]}")
    for length in range(1, 41):
        yield "7" * length
        yield f"v{'12' * length}.{'0' * length}e-{length} "
    others = [c for c in _assigned(0, 0x3400) if unicode_3_2.category(c) in ("No", "Nl")]
    for _ in range(30):
        yield chance.text([*others, *"0123456789 ,."], 12)
    yield from ("1,234,567.89", "0x1F 1e10 -3.5", "²½Ⅷ", "٣٤٥٦", "１２３４５", "𝟏𝟐𝟑𝟒", "3rd 2nd 1st", "1½2")


def _blanks(chance):
    """All runs of up to four blanks, tabs and line ends, between words and at the ends of a text."""
    for length in range(1, 5):
        for run in map("".join, itertools.product((" ", "\t", "\n", "\r\n"), repeat=length)):
            yield f"a{run}b" if length != 3 else f"{run}é{run}"
            if length < 3:
                yield from (run, f"{run}x", f"1{run}", f".{run}中")
    for length in (5, 7, 8, 15, 16, 17, 31, 33, 64, 127):
        for blank in " \n\t\r":
            yield f"{blank * length}{chance.of('ab1.中')}"
            yield f"x = {blank * length}\n"


def _spaces(_chance):
    for space in map(chr, _SPACES):
        yield from (space, f"a{space}b", f"{space}{space}a", f"a {space}\n", f"1{space} .{space}")


def _controls(_chance):
    for control in map(chr, (*range(0x20), *range(0x7F, 0xA0), 0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F))):
        yield from (f"a{control}b", f" {control}{control} 1")
    yield "".join(map(chr, range(0x20)))


def _marks(chance):
    marks = [c for c in _assigned(0, 0x3400) if unicode_3_2.category(c).startswith("M")]
    for _ in range(100):
        yield "".join(chance.of("aÉя中क1. '\n") + chance.text(marks, 3) for _ in range(4))
    yield from (
        "\u0301a",
        " \u0301a",
        "1\u0301a",
        ".\u0301A",
        "\n\u0301",
        "e\u0301E\u0301'S",
        "न\u093f\u094d र",
        "A\u0301b",
    )


def _contractions(_chance):
    for word in ("we", "WE", "Ünï", "中", "9", ""):
        for text in _CONTRACTED:
            yield " ".join(
                word + "".join(letters) for letters in itertools.product(*zip(text, text.upper(), strict=True))
            )
            yield f"{word}{text}x {word}{text.replace(chr(39), chr(0x2019))} {word} {text}\n{word}'{text}"
    yield from ("it'ſ it'ſx", "I'Ll'lL'd've", "'tis 'twas", "rock'n'roll", "'''", "s' t' 're''ve")


def _cjk(chance):
    for _ in range(220):
        ranges = [chance.of(_CJK) for _ in range(1 + chance.below(6))]
        yield "".join(chr(chance.of(codes)) for codes in ranges for _ in range(1 + chance.below(5)))
    yield from (
        "我在apple工作1314151天～",
        "「東京」はひらがなカタカナ",
        "한국어도 됩니다。",
        "中文English中文ENGLISH",
        "！？。，、…—“”",
    )


def _private(chance):
    private = [
        *map(chr, range(0xE000, 0xE010)),
        "\uf8ff",
        "\U000f0000",
        "\U0010fffd",
        "\ufffe",
        "\uffff",
        "\U0010ffff",
        "\ufffd",
    ]
    for _ in range(40):
        yield chance.text([*private, *"a 1.\n中"], 8)


def _cases(chance):
    words = _WORDS.split()
    for _ in range(120):
        yield chance.of(("", " ", "_", ".", "\t")).join(chance.of(words) for _ in range(1 + chance.below(5)))
    yield from (_WORDS, _WORDS.upper(), _WORDS.lower(), _WORDS.swapcase(), _WORDS.title())


def _punctuation(chance):
    for mark in map(chr, (*range(0x21, 0x30), *range(0x3A, 0x41), *range(0x5B, 0x61), *range(0x7B, 0x7F))):
        yield from (f"x{mark}y{mark}{mark} {mark}Word", f" {mark}{mark}\n\n{mark}\r\n/", f"{mark}中{mark}1{mark} ")
    for _ in range(60):
        yield chance.text("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~ \nab1", 16)
    yield from (
        '{"a": [1, 2.5e-3, null]}\n',
        "https://www.example.org/a?b=%20&c#d",
        "/* x */ // y\n\n\n",
        "</s><s>[INST] <0x0A> ▁",
    )


def _long(_chance):
    for character in LONG:
        yield character * 3000
    yield from ("ab" * 2000, "aB" * 2000, "中a" * 1500, " a" * 1500, "a\n" * 1500, "1a" * 1500, "e\u0301" * 1000)
