"""``pymla generate``: text from a prompt."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pymla.cli import interrupt
from pymla.cli.device import check_tensors_option, device_options
from pymla.cli.options import as_options
from pymla.cli.output import write_json, write_text
from pymla.engine.loading import Report, load
from pymla.errors import PymlaError
from pymla.files.textfile import decode
from pymla.models.deepseek2 import MLA_MODES
from pymla.printable import one_line, shown
from pymla.text.sampling import SamplingParams

DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}

EXAMPLES = """\b
Examples:
  pymla generate "def "
  pymla generate -m model.gguf --chat "Why is the sky blue?"
  pymla generate -m model.gguf --chat --template-var enable_thinking=false "Hi"
  pymla generate -m model.gguf --chat-template chatml.jinja --system "Be brief." "Hi"
  pymla generate -m model.gguf -f prompt.txt -n 100 --temperature 0 --quiet
  echo "Once upon a time" | pymla generate -m model.gguf --seed 7
  pymla generate -m large.gguf --device cuda --cpu-moe "def "

Tokens are chosen in llama.cpp's order: logit bias, penalties, top-k, top-p, min-p, temperature."""


def _sampling(name, kind, help_):
    option = "--" + name.replace("_", "-")
    return click.option(option, name, type=kind, default=DEFAULTS[name], show_default=True, help=help_)


@click.command(epilog=EXAMPLES)
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
@_sampling("temperature", float, "0: always the likeliest token.")
@_sampling("top_k", int, "Of the k likeliest tokens; 0: all.")
@_sampling("top_p", float, "Of the fewest tokens with this probability together.")
@_sampling("min_p", float, "Of tokens with this share of the likeliest's probability.")
@_sampling("repetition_penalty", float, "Divides logits of tokens that occurred.")
@_sampling("frequency_penalty", float, "Taken off a logit each time its token occurred.")
@_sampling("presence_penalty", float, "Taken off the logits of tokens that occurred.")
@_sampling("penalty_window", int, "Tokens that the penalties look back on; 0: all.")
@click.option("--logit-bias", multiple=True, metavar="ID=VALUE", help="Add to a token's logit; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same text.")
@click.option("--stop", multiple=True, help="Text that ends the generation; repeatable.")
@click.option(
    "--logprobs", type=click.IntRange(0, 1000), default=0, help="Report so many likely tokens for each, with --json."
)
@click.option(
    "--ctx", type=click.IntRange(min=1), help="Tokens of context. [default: the model's, if the memory holds it]"
)
@click.option("--cache-type", type=click.Choice(["f32", "f16", "bf16", "q8_0"]), default="q8_0", show_default=True)
@click.option(
    "--mla",
    type=click.Choice(MLA_MODES),
    default="auto",
    show_default=True,
    help="Attention: 0 full K and V cache; 1 absorbed; 2 expanded prompt, absorbed generation, materialised scores; "
    "3 the same with online softmax; auto the cheaper in each step.",
)
@click.option("--threads", type=int, help="[default: all usable cores]")
@device_options
@check_tensors_option
@click.option(
    "--echo/--no-echo", default=None, help="Print the prompt first. [default: on, but for --chat, --json, --quiet]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens and figures.")
@click.option("--quiet", is_flag=True, help="Nothing but the generated text; no figures.")
def generate(
    path,
    prompt,
    prompt_file,
    max_tokens,
    chat,
    system,
    chat_template,
    template_vars,
    logit_bias,
    seed,
    stop,
    logprobs,
    echo,
    as_json,
    quiet,
    **rest,
):
    """Generate text that continues PROMPT, given as an argument, in a file (-f) or on standard input.

    Text goes to standard output; figures and progress go to standard error.
    """
    options = {name: rest.pop(name) for name in list(rest) if name in DEFAULTS}
    options |= {"logit_bias": _biases(logit_bias), "seed": seed, "logprobs": logprobs}
    SamplingParams(**options)
    chat = chat or chat_template is not None
    for option, given in (("--system", system is not None), ("--template-var", template_vars)):
        if given and not chat:
            raise PymlaError(f"{option} is for conversations: give --chat, too")
    if logprobs and not as_json:
        raise PymlaError("--logprobs are part of the JSON report: give --json, too")
    template = None if chat_template is None else _read(chat_template)
    variables = _variables(template_vars)
    text = _prompt(prompt, prompt_file)
    terminal = Terminal(quiet)
    with terminal:
        language_model = load(path, report=terminal, **rest)
    if chat:
        name = f"{chat_template}: this" if chat_template else f"{language_model.file.path}: the model's"
        ids = _conversation(language_model.tokenizer, text, system, template, variables, f"{name} chat template")
    else:
        ids = language_model.tokenize(text)
        _warn_of_bos(language_model.tokenizer, text, terminal)
    terminal.begin("prompt, layers", enabled=not as_json)
    stop = tuple(map(_argument, stop))
    generation = language_model.generation(ids, max_tokens=max_tokens, stop=stop, progress=terminal.prompt, **options)
    if echo is None:
        echo = not (chat or as_json or quiet)
    if echo and not as_json:
        write_text(text)
    pieces = []
    try:
        with interrupt.graceful():
            for piece in generation:
                terminal.close()
                pieces.append(piece)
                if not as_json:
                    write_text(piece)
    except KeyboardInterrupt:
        pass
    finally:
        terminal.close()
    if as_json:
        write_json(({"prompt": text} if echo else {}) | _report(language_model, generation, "".join(pieces)))
    elif not quiet:
        click.echo()
    if generation.finish_reason == "context":
        terminal.warn(f"the context of {language_model.model.ctx} tokens is full; raise --ctx for more")
    if not quiet:
        click.echo(_figures(language_model, generation), err=True)
    return interrupt.CODE if generation.finish_reason == "interrupted" else 0


class Terminal(Report):
    """Progress and warnings on standard error. A bar appears only for work that takes longer than a second."""

    def __init__(self, quiet=False):
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bar = None
        self._task = None
        self.begin("")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def begin(self, title, enabled=True):
        """Another piece of work starts."""
        self.close()
        self._title, self._began = title, time.monotonic()
        self._enabled = enabled and not self._quiet

    def close(self):
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
        self._bar = None
        interrupt.terminal_reset = b""

    def warn(self, message):
        message = as_options(message, click.get_current_context().command)
        click.echo(f"pymla: warning: {one_line(message)}", err=True)

    def running(self, where):
        if not self._quiet:
            click.echo(f"pymla: running on {one_line(where)}", err=True)

    def reading(self, done, total):
        self._show("reading the model, MiB", done >> 20, total >> 20)

    def checking(self, done, total):
        self._show("checking tensors, MiB", done >> 20, total >> 20)

    def arranging(self, done, total):
        self._show("arranging weights, layers", done, total)

    def uploading(self, done, total):
        self._show("sending weights to the GPU, MiB", done >> 20, total >> 20)

    def compiling(self, done, total, name):
        self._show("compiling kernels (once; they are kept on disk)", done, total, delay=0)

    def prompt(self, done, total):
        self._show("prompt, layers", done, total)

    def _show(self, title, done, total, delay=1.0):
        if title != self._title:
            self.begin(title)
        if not self._enabled or time.monotonic() - self._began < delay:
            return
        if not self._console.is_terminal:
            if self._bar is None and done < total:
                click.echo(f"pymla: {title} …", err=True)
                self._bar = _NoBar()
            return
        if self._bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            # Without a thread of its own, which a limit on processes may refuse.
            self._bar = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
            interrupt.terminal_reset = interrupt.WITHOUT_BAR
            self._bar.start()
            self._task = self._bar.add_task(title, total=total)
        self._bar.update(self._task, completed=done, total=total, refresh=True)


class _NoBar:
    """Stands for a bar where standard error is no terminal: the title was printed once."""

    def stop(self):
        pass


def _biases(pairs):
    biases = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise PymlaError(f"--logit-bias {pair!r}: write ID=VALUE, as in 42=-1.5") from None
    return biases


def _variables(pairs):
    """Variables of a chat template, from NAME=VALUE."""
    variables = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (separator and name.isidentifier()):
            raise PymlaError(f"--template-var {shown(pair)}: write NAME=VALUE, as in enable_thinking=false")
        if name == "messages":
            raise PymlaError("--template-var messages: the messages are the prompt and --system")
        variables[name] = _json_or_text(value)
    return variables


def _json_or_text(value):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(value, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _argument(value)


def _prompt(prompt, prompt_file):
    if prompt is not None and prompt_file is not None:
        raise PymlaError("give the prompt as an argument or with -f, not both")
    if prompt is not None:
        return _argument(prompt)
    if prompt_file is not None:
        return _read(prompt_file)
    if sys.stdin.isatty():
        click.echo("pymla: reading the prompt from the terminal; an end of file (Ctrl-D) ends it", err=True)
    try:
        return decode(sys.stdin.buffer.read(), "standard input")
    except OSError as error:
        raise PymlaError(f"standard input: {error.strerror}") from None


def _read(path):
    """The text of a file."""
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise PymlaError(f"{path}: {error.strerror}") from None


def _argument(text):
    """An argument as it was typed: in a locale without UTF-8, Python has kept its bytes in surrogates."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def _conversation(tokenizer, text, system, template, variables, where):
    """Token ids of a conversation with one message of the user."""
    from pymla.text.chat import encode

    messages = [{"role": "system", "content": _argument(system)}] if system else []
    messages.append({"role": "user", "content": text})
    return encode(tokenizer, messages, chat_template=template, variables=variables, where=where)


def _warn_of_bos(tokenizer, text, terminal):
    """Say so if a prompt begins with BOS, as one pasted from another program may."""
    bos = tokenizer.special_tokens.get("bos_token")
    if bos and text.startswith(bos):
        instead = (
            "the model's BOS stands in front of it already" if tokenizer.add_bos else "use --chat for control tokens"
        )
        terminal.warn(f"the prompt begins with {bos}, which is read as text: {instead}; leave it out")


def _report(language_model, generation, text):
    stats = dataclasses.asdict(generation.stats)
    stats |= {"prompt_tokens_per_second": generation.stats.prompt_rate}
    stats |= {
        "generated_tokens_per_second": generation.stats.generation_rate,
        "memory_bound": _share(language_model, generation),
    }
    report = {
        "model": str(language_model.file.path),
        "device": language_model.device,
        "text": text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "stats": stats,
    }
    if generation.params.logprobs:
        report["logprobs"] = [
            {"token": s.token, "logprob": s.logprob, "top": [{"token": t, "logprob": p} for t, p in s.alternatives]}
            for s in generation.sampled
        ]
    return report


def _figures(language_model, generation):
    stats, cache = generation.stats, language_model.model.cache
    share = _share(language_model, generation)
    return (
        f"prompt {stats.prompt_tokens} tokens, {stats.prompt_rate:.1f} tokens/s | "
        f"generated {stats.generated_tokens}, {stats.generation_rate:.1f} tokens/s"
        + (f", {share:.0%} of the memory bound" if share else "")
        + f" | cache {stats.cache_tokens} tokens, {stats.cache_tokens * cache.row_bytes / (1 << 20):.1f} MiB"
        + (" | interrupted" if generation.finish_reason == "interrupted" else "")
    )


def _share(language_model, generation):
    """Bytes read per second while generating, as a share of what this machine streams from memory; 0 where too little
    was generated, a GPU computed, or an interrupt leaves no time to measure."""
    from pymla.engine.costs import token_bytes
    from pymla.host.memory import streaming_read

    interrupted = generation.finish_reason == "interrupted"
    if interrupted or generation.stats.generated_tokens < 2 or "cuda" in language_model.device:
        return 0.0
    model = language_model.model
    each = token_bytes(
        language_model.config,
        language_model.file.tensors,
        max(1, generation.stats.cache_tokens),
        cache_type=model.cache.cache_type,
        mla=model.mla,
    )
    return each * generation.stats.generation_rate / streaming_read()
