"""Conversations as text and as token ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.text.byte_alphabet import BYTES
from pymla.text.byte_level import ByteLevel
from pymla.text.chat import choose_template, encode, render
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import CONTROL, NORMAL, USER_DEFINED, with_control

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_deepseeks_own_format():
    text = render(None, MESSAGES, bos="<b>", eos="<e>")
    assert text == "<b>Be brief.\n\nUser: Hi\n\nAssistant: Hello<e>User: Bye\n\nAssistant:"


def test_template_of_the_file():
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | tojson }}{% endfor %}"
    assert render(template, MESSAGES[1:2]) == '[user]"Hi"'


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_bad_templates_are_refused(template):
    with pytest.raises(PymlaError, match="chat template"):
        render(template, MESSAGES)


# Token ids, and where BOS is ------------------------------------------------------------------------------------------

BOS, END, TOOL = 256, 257, 258
ALPHABET = sorted(BYTES)


def tokenizer(bos_id=BOS, add_bos=True, template=None, named=(), kinds=(CONTROL, CONTROL, USER_DEFINED)):
    """A token for each byte, BOS, a token that ends a text, and a user-defined one."""
    tokens = [*ALPHABET, "<|bos|>", "<|im_end|>", "<tool>"]
    kinds = with_control([NORMAL] * 256 + list(kinds), {END} if bos_id is None else {END, bos_id})
    vocabulary = ByteLevel(tokens, kinds, [], "deepseek-llm")
    made = Tokenizer(vocabulary, bos_id=bos_id, eos_ids=[END], add_bos=add_bos)
    made.special_tokens = {"eos_token": "<|im_end|>"} | ({} if bos_id is None else {"bos_token": "<|bos|>"})
    made.chat_template, made.chat_templates = template, dict(named)
    return made


def and_control(name, **options):
    """A token for each byte, and a control token."""
    return Tokenizer(ByteLevel([*ALPHABET, name], [NORMAL] * 256 + [CONTROL], [], "deepseek-llm"), **options)


def user(content):
    return [{"role": "user", "content": content}]


#: What stands in front of the messages, and how many BOS that is in a file that has one.
HEADS = {
    "": 0,
    "{{ bos_token }}": 1,
    "\n{{ bos_token }}": 1,
    "  {{- bos_token -}}  ": 1,
    "<|bos|>": 1,
    "{{ '<|' ~ 'bos|>' }}": 1,
    "You are brief.\n": 0,
    "You are brief.\n{{ bos_token }}": 1,
    "{% if messages %}{{ bos_token }}{% endif %}": 1,
    "{{ bos_token }}{{ bos_token }}": 2,
}
CONTENTS = ["x", "", "<|bos|>", "<|bos|>x", "x<|bos|>", "<|bos|><|bos|>", " <|bos|>\n", "<|bo", "\ufeffx", "<|im_end|>"]


TOKENIZERS = {
    (add_bos, kind): tokenizer(add_bos=add_bos, kinds=(kind, CONTROL, USER_DEFINED))
    for add_bos in (True, False)
    for kind in (CONTROL, USER_DEFINED, NORMAL)
}


@settings(max_examples=300, deadline=None)
@given(
    head=st.sampled_from(list(HEADS)),
    contents=st.lists(st.one_of(st.sampled_from(CONTENTS), st.text(max_size=6)), max_size=3),
    tail=st.sampled_from(["", "{{ bos_token }}", "\nAssistant:"]),
    each=st.sampled_from(["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content | tojson }}", "{{ m }}"]),
    add_bos=st.booleans(),
    kind=st.sampled_from([CONTROL, USER_DEFINED, NORMAL]),
)
def test_bos_is_as_the_template_says(head, contents, tail, each, add_bos, kind):
    """Where the template writes it, and nowhere else; in front if it writes none and the file asks for one. A message
    that spells it has no part in that."""
    contents = [content.encode(errors="ignore").decode() for content in contents]
    messages = [message for content in contents for message in user(content)]
    template = f"{head}{{% for m in messages %}}<{each}>{{% endfor %}}{tail}"
    made = TOKENIZERS[add_bos, kind]
    ids = encode(made, messages, chat_template=template)
    written = HEADS[head] if messages or "if messages" not in head else 0
    written += tail == "{{ bos_token }}"
    assert ids.count(BOS) == (written or add_bos)
    front = [BOS] if add_bos and not written else []
    assert ids[: len(front)] == front
    text = render(template, messages, bos="<|bos|>", eos="<|im_end|>")
    assert made.decode(ids[len(front) :], skip_special=False) == text


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_a_file_without_bos_has_none(head, add_bos):
    made = tokenizer(bos_id=None, add_bos=False, template=head + "{{ messages[0].content }}")
    assert encode(made, user("x")).count(BOS) == ("<|bos|>" in head or "~" in head)  # spelt out, it is a token


def test_built_in_template_has_one_bos():
    for add_bos in (True, False):
        ids = encode(tokenizer(add_bos=add_bos), user("<|bos|>Hi"))
        assert (ids[0], ids.count(BOS)) == (BOS, 1)
        assert tokenizer().decode(ids) == "User: <|bos|>Hi\n\nAssistant:"


@pytest.mark.parametrize("each", ["[:5]", ".split('|')[1]", "[::-1]", ".upper()", " | tojson(ensure_ascii=true)"])
def test_bos_that_a_template_tears_apart_is_text(each):
    template = f"{{{{ messages[0].content{each} }}}}"
    made = tokenizer(add_bos=False, template=template)
    ids = encode(made, user("a<|bos|>é"))
    assert made.decode(ids) == render(template, user("a<|bos|>é"))
    assert BOS not in ids


def test_bos_that_reads_the_same_backwards():
    made = and_control("|b|", bos_id=BOS, add_bos=True)
    made.special_tokens = {"bos_token": "|b|"}
    assert encode(made, user("|b|"), chat_template="\n{{ bos_token }}{{ messages[0].content }}").count(BOS) == 1


@pytest.mark.parametrize("bos", ["<|bos|>", "|b|", "｜ß｜", "||"])
@pytest.mark.parametrize("quoted", ["", " | tojson(ensure_ascii=true)"])
def test_bos_behind_a_message_that_spells_it(bos, quoted):
    """However the template quotes the message: it is the last token, and the only BOS."""
    made = and_control(bos, bos_id=BOS, add_bos=True)
    made.special_tokens = {"bos_token": bos}
    ids = encode(made, user(f"é{bos}é"), chat_template=f"{{{{ messages[0].content{quoted} }}}}{{{{ bos_token }}}}")
    assert (ids[-1], ids.count(BOS)) == (BOS, 1)


def test_bos_spelt_more_than_once():
    """With a BOS of the template between the ones that messages spell."""
    template = "{{ messages[0].content }}{{ bos_token }}{{ messages[1].content }}"
    made = tokenizer(add_bos=False, template=template)
    ids = encode(made, [*user("a<|bos|>b<|bos|>c"), *user("<|bos|><|bos|>d")])
    assert made.decode(ids, skip_special=False) == "a<|bos|>b<|bos|>c<|bos|><|bos|><|bos|>d"
    assert ids.count(BOS) == 1
    assert made.decode(ids[: ids.index(BOS)]) == "a<|bos|>b<|bos|>c"


def test_a_tokenizer_without_special_tokens():
    made = and_control("<x>")
    assert (made.special_tokens, made.chat_template, made.chat_templates, made.warnings) == ({}, None, {}, [])
    ids = encode(made, user("x"), chat_template="[{{ bos_token }}{{ eos_token }}]{{ eos_token is defined }}")
    assert made.decode(ids) == "[]True"


def test_errors_name_the_template():
    for options, name in ({}, "the model's chat template"), ({"where": "x.jinja"}, "x.jinja"):
        with pytest.raises(PymlaError, match=f"^{name}.*roles"):
            encode(tokenizer(), user("x"), chat_template="{{ raise_exception('roles') }}", **options)
    with pytest.raises(PymlaError, match=r"^the model's chat template.*roles"):
        render("{{ raise_exception('roles') }}", user("x"))
    assert render("{{ bos_token }}|{{ eos_token }}", user("x")) == "|"


def test_documents_of_a_conversation():
    template = "{% for document in documents %}{{ document.title }};{% endfor %}"
    ids = encode(tokenizer(), user("x"), chat_template=template, documents=[{"title": "a"}, {"title": "b"}])
    assert tokenizer().decode(ids) == "a;b;"


def test_other_control_tokens_of_a_message_are_tokens():
    ids = encode(tokenizer(template="{{ messages[0].content }}"), user("<|im_end|><tool>"))
    assert ids == [BOS, END, TOOL]


def test_variables_and_tools_of_a_conversation():
    template = "{{ bos_token }}{{ tools | tojson }}{{ documents }}{{ enable_thinking }}{{ add_generation_prompt }}"
    made = tokenizer(template=template)
    tools = [{"name": "<|bos|>"}]
    ids = encode(made, user("x"), tools=tools, variables={"enable_thinking": False, "add_generation_prompt": 0})
    assert made.decode(ids) == '[{"name": "<|bos|>"}]NoneFalse0'
    assert ids.count(BOS) == 1
    assert made.decode(encode(made, user("x"), chat_template="{{ messages[0].content }}{{ eos_token }}")) == "x"
    assert encode(made, user("x"), chat_template="{{ eos_token }}", variables={"eos_token": "y"})[-1] != END


def test_templates_by_name():
    named = {"tool_use": "tools", "rag": "rag"}
    assert choose_template(tokenizer(template="a", named=named)) == "a"
    assert choose_template(tokenizer(template="a", named=named), tools=[]) == "a"
    assert choose_template(tokenizer(template="a", named=named), tools=[{}]) == "tools"
    assert choose_template(tokenizer(template="a", named={"rag": "rag"}), tools=[{}]) == "a"
    assert choose_template(tokenizer(named={"rag": "rag"})) == "rag"
    assert choose_template(tokenizer()) is None
    with pytest.raises(PymlaError, match=r"the chat templates rag, tool_use .* `chat_template`"):
        choose_template(tokenizer(named=named))
    assert tokenizer().decode(encode(tokenizer(template="a", named=named), user("x"), tools=[{}])) == "tools"


def test_content_in_parts():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert render(None, user(parts)) == "User: Hi there\n\nAssistant:"


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_ids_are_those_of_transformers(template):
    """Which writes no BOS but the template's."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Bpe
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*ALPHABET, "<|bos|>", "<|im_end|>", "<tool>"])}
    bpe = Bpe(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|bos|>", "<|im_end|>", "<tool>"])
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|im_end|>", chat_template=template
    )
    for content in ("Hi é", "a<|im_end|>b<tool>", "\n x "):
        expected = oracle.apply_chat_template(user(content), return_dict=False)
        assert encode(tokenizer(add_bos=False, template=template), user(content)) == expected
