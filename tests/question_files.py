"""Files of questions in llama.cpp's three forms, made of a text."""

import struct
from pathlib import Path

TEXT = Path(__file__).parent / "golden" / "perplexity.txt"

#: Sentences with a word left out, both words, and the right one.
SENTENCES = (
    ("The function returns the sum, so the _ is added to the result.", "value", "color", 1),
    ("A list holds more items than a tuple of two, so the _ is longer.", "tuple", "list", 2),
    ("The file was closed before the text was written, so the _ is empty.", "file", "writer", 1),
    ("The key is not in the dictionary, so _ raises an error.", "getting it", "printing it", 1),
    ("The thread waits for the lock because another _ holds it.", "thread", "string", 1),
    ("Set the flag to false when the _ ends", "loop", "color", 1),
    ("The parser reads the header first and then the _ of the message.", "comma", "body", 2),
    ('An object with the name "x" is _, and the other one is not.', "returned", "green", 1),
)


def lines(text: str) -> list[str]:
    """The lines of a text that have some words, without the spaces around them."""
    return [line.strip() for line in text.splitlines() if len(line.split()) > 3]


def questions(text: str, count: int) -> list[tuple[str, list[str], int]]:
    """(context, four endings, the right one): a line, the line behind it, and three lines from elsewhere."""
    found = lines(text)
    made = []
    for i in range(count):
        at = 3 * i % (len(found) - 1)
        right = i % 4
        endings = [found[(at + 7 + 11 * j) % len(found)] for j in range(4)]
        endings[right] = found[at + 1]
        made.append((found[at], endings, right))
    return made


def hellaswag(made) -> bytes:
    """Six lines a task."""
    return "".join("\n".join((context, str(right), *endings, "")) for context, endings, right in made).encode()


def winogrande(sentences=SENTENCES) -> bytes:
    """A line of comma-separated values a task."""
    rows = [
        (
            str(i),
            '"' + sentence.replace('"', '""') + '"' if "," in sentence or '"' in sentence else sentence,
            *words,
            str(right),
        )
        for i, (sentence, *words, right) in enumerate(sentences)
    ]
    return "".join(",".join(row) + "\n" for row in rows).encode()


def text(value: str) -> bytes:
    """A text of the binary form."""
    data = value.encode()
    return struct.pack("<I", len(data)) + data


def answers(texts, labels) -> bytes:
    """A list of answers of the binary form."""
    return struct.pack("<I", len(texts)) + b"".join(map(text, texts)) + struct.pack(f"<{len(labels)}i", *labels)


def multiple_choice(made) -> bytes:
    """The binary form, with a task of three answers now and then."""
    tasks = []
    for i, (context, endings, right) in enumerate(made):
        kept = endings[: max(3, right + 1)] if i % 3 == 0 else endings
        first = answers(kept, [int(j == right) for j in range(len(kept))])
        tasks.append(text(context) + first + answers([], []))
    offsets, at = [], 4 + 4 * len(tasks)
    for task in tasks:
        offsets.append(at)
        at += len(task)
    return struct.pack(f"<{1 + len(tasks)}I", len(tasks), *offsets) + b"".join(tasks)
