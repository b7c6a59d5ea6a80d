"""Options that several commands have: the device that a model runs on, sparse attention, how thoroughly its file is
checked, and metadata in place of the file's own."""

from collections.abc import Callable
from typing import Any

import click

from pymla.cli.inputs import overrides
from pymla.engine.devices import DEVICES
from pymla.files.overrides import Value


class _Layers(click.ParamType):
    """A number of layers, or all."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "all":
            return value
        return click.IntRange(min=1).convert(value, param, ctx)


check_tensors_option = click.option(
    "--check-tensors",
    is_flag=True,
    help="Read the whole file first, and refuse it for NaN, infinity or holes anywhere.",
)


dsa_option = click.option(
    "--dsa",
    type=click.Choice(("on", "off")),
    default="on",
    show_default=True,
    callback=lambda _context, _option, value: value == "on",
    help="Sparse attention, in models that have it; off: attend to all positions.",
)


def _overrides(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Value]:
    return overrides(pairs)


override_option = click.option(
    "--override-kv",
    "overrides",
    multiple=True,
    metavar="KEY=TYPE:VALUE",
    callback=_overrides,
    help="Metadata in place of the file's own, as deepseek2.expert_used_count=int:4; TYPE is int, float, bool or str. "
    "Repeatable.",
)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--device``, ``--gpu-layers`` and ``--cpu-moe``."""
    for option in (
        click.option("--cpu-moe", is_flag=True, help="Keep the routed experts, most of a model's bytes, on the CPU."),
        click.option(
            "-ngl",
            "--gpu-layers",
            type=_Layers(),
            metavar="N|all",
            help="Layers on the GPU, the last ones; the first run on the CPU. [default: what fits]",
        ),
        click.option(
            "--device",
            type=click.Choice(DEVICES),
            default="auto",
            show_default=True,
            help="auto: the GPU where there is one; reference: NumPy, slow.",
        ),
    ):
        command = option(command)
    return command
