"""Constraints of ``pymla generate``."""

import json

import regex
from test_cli import refused, run  # noqa: F401  fixtures


def test_a_schema_as_text_or_in_a_file(run, tmp_path):  # noqa: F811
    schema = json.dumps({"enum": ["red", "green"], "x-guidance": {"whitespace_flexible": False}})
    path = tmp_path / "schema.json"
    path.write_text(schema)
    for given in (schema, path):
        code, out, _ = run("generate", "x", "--json-schema", given, "--seed", 1, "--json")
        assert code == 0
        told = json.loads(out)
        assert json.loads(told["text"]) in ("red", "green")
        assert told["finish_reason"] == "stop"


def test_a_regular_expression(run):  # noqa: F811
    code, out, _ = run("generate", "x", "--regex", "[0-9]{3}-é", "--quiet", "--seed", 1)
    assert code == 0
    assert regex.fullmatch("[0-9]{3}-é", out)


def test_a_grammar_of_either_notation(run, tmp_path):  # noqa: F811
    for name, text in (
        ("list.gbnf", 'root ::= ("- " [a-z] "\\n"){2}\n'),
        ("list.lark", 'start: ("- " /[a-z]\\n/){2}\n'),
    ):
        path = tmp_path / name
        path.write_text(text)
        code, out, _ = run("generate", "x", "--grammar", path, "--quiet", "--seed", 1)
        assert code == 0
        assert regex.fullmatch("(- [a-z]\n){2}", out)


def test_refusals(refused, tmp_path):  # noqa: F811
    damaged = tmp_path / "damaged.gbnf"
    damaged.write_text('root ::= "a" item\n')
    refused("generate", "x", "--grammar", damaged, parts=("--grammar: line 1, column 14", "there is no rule 'item'"))
    refused("generate", "x", "--grammar", tmp_path / "none", parts=("none: No such file",))
    refused("generate", "x", "--json-schema", tmp_path / "none.json", parts=("none.json: No such file",))
    refused("generate", "x", "--json-schema", "{", parts=("--json-schema: line 1, column 2",))
    refused("generate", "x", "--regex", "(", parts=("--regex: column 1: unclosed group",))
    refused(
        "generate", "x", "--regex", "a", "--json-schema", "{}", parts=("--json-schema and --regex", "one constraint")
    )


def test_a_constraint_is_for_the_answer(run, tmp_path):  # noqa: F811
    """Where the chat template has opened the reasoning, it may come to its end first."""
    template = tmp_path / "thinks.jinja"
    template.write_text("{{ messages[0].content }}<think>\n")
    given = ("generate", "x", "--regex", "[0-9]{2}", "--json", "--seed", 1, "-n", 4)
    _, out, _ = run(*given, "--chat-template", template)
    assert json.loads(out)["finish_reason"] == "length"
    template.write_text("{{ messages[0].content }}<think></think>")
    _, out, _ = run(*given, "--chat-template", template)
    assert regex.fullmatch("[0-9]{2}", json.loads(out)["text"])
