"""Names of arguments in messages, as the command line spells them."""

import re

import click


def as_options(message: object, command: click.Command) -> str:
    """A message of the package with the options of a command in place of the arguments that it names.

    >>> command = click.Command("generate", params=[click.Option(["-n", "--max-tokens"])])
    >>> as_options("`max_tokens` is -1; a number from 0 on is expected", command)
    '--max-tokens is -1; a number from 0 on is expected'
    """
    names = {each.name: max(each.opts, key=len) for each in command.params if isinstance(each, click.Option)}

    def name(found: re.Match[str]) -> str:
        return names[found[1]] + (found[2] or "") if found[1] in names else found[0]

    return re.sub(r"`(\w+)(\[[^`\]]*\])?`", name, str(message))
