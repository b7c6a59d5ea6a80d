"""``pymla generate``: text from a prompt."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click

from pymla.cli import figures, interrupt
from pymla.cli.constraint_options import after_reasoning, constraint_options, constraints
from pymla.cli.device import check_tensors_option, device_options, dsa_option, override_option
from pymla.cli.inputs import argument, prompt_text, read, variables
from pymla.cli.output import write_json, write_text
from pymla.cli.sampling_options import sampling_options
from pymla.cli.sections import SectionCommand
from pymla.cli.speculation_options import check, speculation, speculation_options
from pymla.cli.terminal import Terminal
from pymla.engine.forms import MLA_MODES
from pymla.engine.generation import Generation
from pymla.engine.language_model import LanguageModel
from pymla.engine.loading import load
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES
from pymla.text.sampling import SamplingParams
from pymla.text.tokenizer import Tokenizer

EXAMPLES = """\b
Examples:
  pymla generate "def "
  pymla generate -m model.gguf --chat "Why is the sky blue?"
  pymla generate -m model.gguf --chat --template-var enable_thinking=false "Hi"
  pymla generate -m model.gguf --chat-template chatml.jinja --system "Be brief." "Hi"
  pymla generate -m model.gguf -f prompt.txt -n 100 --temperature 0 --quiet
  echo "Once upon a time" | pymla generate -m model.gguf --seed 7
  pymla generate -m model.gguf --dry-multiplier 0.8 --dry-sequence-breaker "\\n" "def "
  pymla generate -m model.gguf --samplers "top_k;xtc;temperature" --xtc-probability 0.5 "def "
  pymla generate -m model.gguf --mirostat 2 --mirostat-tau 4 "Once upon a time"
  pymla generate -m model.gguf --chat --json-schema person.json "Invent a person."
  pymla generate --regex "[0-9]{3}-[0-9]{4}" "My number is "
  pymla generate -m model.gguf --speculate ngram -f edit.txt --temperature 0
  pymla generate -m large.gguf --speculate draft --draft-model small.gguf "def "
  pymla generate -m large.gguf --device cuda --cpu-moe "def "
  pymla generate -m model.gguf --override-kv deepseek2.expert_used_count=int:4 "def "

Samplers are llama.cpp's, in its order unless --samplers gives another; the logit bias comes first. docs/sampling.md has
their formulas."""


@click.command(cls=SectionCommand, epilog=EXAMPLES)
@click.argument("prompt", required=False)
@click.option("-m", "--model", "path", type=click.Path(path_type=Path), help="GGUF file. [default: the demo model]")
@click.option("-f", "--file", "prompt_file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=0), default=256, show_default=True, help="Tokens to generate."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Jinja template instead of the model's own; as --chat.",
)
@click.option(
    "--template-var",
    "template_vars",
    multiple=True,
    metavar="NAME=VALUE",
    help="Variable of the chat template, with --chat; repeatable. VALUE is JSON (true, 3, [1, 2]), or else a text.",
)
@sampling_options
@click.option("--special", is_flag=True, help="Show control tokens by their names, the one that ends the text too.")
@click.option("--parse-special", is_flag=True, help="Read names of control tokens in the prompt as these tokens.")
@click.option("--stop", multiple=True, help="Text that ends the generation; repeatable.")
@constraint_options
@speculation_options
@click.option(
    "--ctx", type=click.IntRange(min=1), help="Tokens of context. [default: the model's, if the memory holds it]"
)
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="q8_0", show_default=True)
@click.option(
    "--mla",
    type=click.Choice(MLA_MODES),
    default="auto",
    show_default=True,
    help="Attention: 0 full K and V cache; 1 absorbed; 2 expanded prompt, absorbed generation, materialised scores; "
    "3 the same with online softmax; auto the cheaper in each step.",
)
@dsa_option
@click.option("--threads", type=int, help="[default: all usable cores]")
@device_options
@check_tensors_option
@override_option
@click.option(
    "--echo/--no-echo", default=None, help="Print the prompt first. [default: on, but for --chat, --json, --quiet]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens and figures.")
@click.option("--quiet", is_flag=True, help="Nothing but the generated text; no figures.")
def generate(
    path: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    chat: bool,
    system: str | None,
    chat_template: Path | None,
    template_vars: tuple[str, ...],
    sampling: dict[str, Any],
    special: bool,
    parse_special: bool,
    stop: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    grammar: Path | None,
    speculate: str | None,
    draft_model: Path | None,
    draft_tokens: int,
    echo: bool | None,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> int:
    """Generate text that continues PROMPT, given as an argument, in a file (-f) or on standard input.

    Text goes to standard output; figures and progress go to standard error.
    """
    SamplingParams.of(sampling)
    chat = chat or chat_template is not None
    for option, given in (("--system", system is not None), ("--template-var", template_vars)):
        if given and not chat:
            raise PymlaError(f"{option} is for conversations: give --chat, too")
    if parse_special and chat:
        raise PymlaError("--parse-special is for plain prompts: --chat reads control tokens anyway; leave it out")
    if sampling["logprobs"] and not as_json:
        raise PymlaError("--logprobs are part of the JSON report: give --json, too")
    check(speculate, draft_model)
    constrained = constraints(json_schema, regex, grammar)
    conversation = _Conversation.read(system, chat_template, template_vars) if chat else None
    text = prompt_text(prompt, prompt_file)
    terminal = Terminal(quiet)
    with terminal:
        language_model = load(path, report=terminal, nextn=speculate == "mtp", **rest)
        drafts = speculation(language_model, speculate, draft_model, draft_tokens, rest["threads"], terminal)
    if conversation is None:
        ids = _plain_ids(language_model, text, parse_special, terminal)
    else:
        ids = _chat_ids(language_model, text, conversation)
        constrained = after_reasoning(constrained, language_model, ids)
    terminal.begin("prompt, layers", enabled=not as_json)
    stops = tuple(map(argument, stop))
    options = sampling | {"max_tokens": max_tokens, "stop": stops, "special": special, "progress": terminal.prompt}
    generation = language_model.generation(ids, speculation=drafts, **options, **constrained)
    if echo is None:
        echo = not (chat or as_json or quiet)
    if echo and not as_json:
        write_text(text)
    generated = _run(generation, terminal, printing=not as_json)
    if as_json:
        write_json(({"prompt": text} if echo else {}) | figures.as_json(language_model, generation, generated))
    elif not quiet:
        click.echo()
    if generation.finish_reason == "context":
        terminal.warn(f"the context of {language_model.model.ctx} tokens is full; raise --ctx for more")
    if not quiet:
        click.echo(figures.as_line(language_model, generation), err=True)
    return interrupt.CODE if generation.finish_reason == "interrupted" else 0


class _Conversation(NamedTuple):
    """The parts of a conversation besides the prompt, with ``--chat``."""

    system: str | None
    template: str | None  # None: the model's own
    variables: dict[str, Any]
    path: Path | None  # of the template

    @classmethod
    def read(cls, system: str | None, path: Path | None, template_vars: Iterable[str]) -> "_Conversation":
        return cls(system, None if path is None else read(path), variables(template_vars), path)


def _plain_ids(language_model: LanguageModel, text: str, parse_special: bool, terminal: Terminal) -> list[int]:
    """Token ids of a prompt that is no conversation."""
    ids = language_model.tokenize(text, parse_special=parse_special)
    if not parse_special:
        _warn_of_bos(language_model.tokenizer, text, terminal)
    return ids


def _chat_ids(language_model: LanguageModel, text: str, conversation: _Conversation) -> list[int]:
    """Token ids of a conversation with one message of the user."""
    from pymla.text.chat import encode

    messages = [{"role": "system", "content": argument(conversation.system)}] if conversation.system else []
    messages.append({"role": "user", "content": text})
    name = f"{conversation.path}: this" if conversation.path else f"{language_model.file.path}: the model's"
    return encode(
        language_model.tokenizer,
        messages,
        chat_template=conversation.template,
        variables=conversation.variables,
        where=f"{name} chat template",
    )


def _run(generation: Generation, terminal: Terminal, printing: bool) -> str:
    """The text, printed as it comes, until it ends or the user interrupts it."""
    pieces = []
    try:
        with interrupt.graceful():
            for piece in generation:
                terminal.close()
                pieces.append(piece)
                if printing:
                    write_text(piece)
    except KeyboardInterrupt:
        pass
    finally:
        terminal.close()
    return "".join(pieces)


def _warn_of_bos(tokenizer: Tokenizer, text: str, terminal: Terminal) -> None:
    """Say so if a prompt begins with BOS, as one pasted from another program may."""
    bos = tokenizer.special_tokens.get("bos_token")
    if bos and text.startswith(bos):
        instead = "use --chat or --parse-special for control tokens"
        if tokenizer.add_bos:
            instead = "the model's BOS stands in front of it already"
        terminal.warn(f"the prompt begins with {bos}, which is read as text: {instead}; leave it out")
