"""The options that choose tokens: the fields of `pymla.text.sampling.SamplingParams`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from pymla.cli.inputs import biases, sequence_breakers
from pymla.cli.sections import SectionOption
from pymla.text.recommended import FIELDS
from pymla.text.sampling import SamplingParams

#: Defaults of the parameters, by their names.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}

_PLAIN, _REPETITION, _OTHER = "Sampling", "Penalties on repetition", "More samplers"

#: Options with one value: their names, the first of which is the parameter's, type, section and help.
_OPTIONS: list[tuple[tuple[str, ...], type, str, str]] = [
    (("temperature",), float, _PLAIN, "0: always the likeliest token."),
    (("dynatemp_range",), float, _PLAIN, "The temperature follows the entropy, so far up and down."),
    (("dynatemp_exponent", "dynatemp_exp"), float, _PLAIN, "How it follows the entropy."),
    (("top_k",), int, _PLAIN, "Of the k likeliest tokens; 0: all."),
    (("top_p",), float, _PLAIN, "Of the fewest tokens with this probability together."),
    (("min_p",), float, _PLAIN, "Of tokens with this share of the likeliest's probability."),
    (("top_n_sigma", "top_nsigma"), float, _PLAIN, "Of tokens so many standard deviations below the largest logit."),
    (("min_keep",), int, _PLAIN, "Tokens that top-p, min-p, typical-p and XTC leave at least."),
    (("repetition_penalty",), float, _REPETITION, "Divides logits of tokens that occurred."),
    (("frequency_penalty",), float, _REPETITION, "Taken off a logit each time its token occurred."),
    (("presence_penalty",), float, _REPETITION, "Taken off the logits of tokens that occurred."),
    (("penalty_window",), int, _REPETITION, "Tokens that the penalties look back on; 0: all."),
    (("dry_multiplier",), float, _REPETITION, "DRY: taken off tokens that continue a repetition; 0: off."),
    (("dry_base",), float, _REPETITION, "DRY: times this for each token that the repetition is longer."),
    (("dry_allowed_length",), int, _REPETITION, "DRY: tokens of a repetition from which on it is penalised."),
    (("dry_window",), int, _REPETITION, "DRY: tokens to look back on; 0: all."),
    (("typical_p", "typical"), float, _OTHER, "Of the most typical tokens with this probability together; 1: off."),
    (("xtc_probability",), float, _OTHER, "XTC: how often the likeliest tokens are excluded; 0: off."),
    (("xtc_threshold",), float, _OTHER, "XTC: probability of tokens of which only the least likely is left."),
    (("mirostat",), int, _OTHER, "1, 2: a version of Mirostat after the temperature, no other sampler; 0: off."),
    (("mirostat_tau", "mirostat_ent"), float, _OTHER, "Mirostat: bits of surprise per token."),
    (("mirostat_eta", "mirostat_lr"), float, _OTHER, "Mirostat: learning rate."),
    (("adaptive_target",), float, _OTHER, "adaptive_p, where --samplers has it: probability of chosen tokens."),
    (("adaptive_decay",), float, _OTHER, "adaptive_p: weight of a token in relation to the one after it."),
]


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets what was given of them as `sampling`, a dict."""

    @functools.wraps(command)
    def with_sampling(**given: Any) -> Any:
        sampling = {name: given.pop(name) for name in DEFAULTS}
        sampling["logit_bias"] = biases(sampling["logit_bias"])
        sampling["dry_sequence_breakers"] = sequence_breakers(sampling["dry_sequence_breakers"])
        return command(sampling=sampling, **given)

    for option in reversed(_click_options()):
        with_sampling = option(with_sampling)
    return with_sampling


def _click_options() -> list[Callable[[Any], Any]]:
    many = functools.partial(click.option, cls=SectionOption, multiple=True)
    one = functools.partial(click.option, cls=SectionOption)
    options = [_option(*each) for each in _OPTIONS]
    last_of_repetition = 1 + max(i for i, each in enumerate(_OPTIONS) if each[2] == _REPETITION)
    breakers = ", ".join(text.replace("\n", r"\n") for text in DEFAULTS["dry_sequence_breakers"])
    options.insert(
        last_of_repetition,
        many(
            "--dry-sequence-breaker",
            "dry_sequence_breakers",
            section=_REPETITION,
            metavar="TEXT",
            help=rf"DRY: a text that ends repetitions, with \n and the like; repeatable. none: no text. "
            f"[default: {breakers}]",
        ),
    )
    return [
        one(
            "--samplers",
            section=_PLAIN,
            metavar="NAME;NAME...",
            help="Samplers in their order; those that are left out are off. "
            f"[default: the file's, or {';'.join(DEFAULTS['samplers'])}]",
        ),
        *options,
        many("--logit-bias", section=_PLAIN, metavar="ID=VALUE", help="Add to a token's logit first; repeatable."),
        one("--seed", section=_PLAIN, type=click.IntRange(min=0), help="Same seed, same text."),
        one(
            "--logprobs",
            section=_PLAIN,
            type=click.IntRange(0, 1000),
            default=0,
            help="Report so many likely tokens for each, with --json.",
        ),
    ]


def _option(names: tuple[str, ...], kind: type, section: str, help_: str) -> Callable[[Any], Any]:
    spelled = ["--" + name.replace("_", "-") for name in names]
    of_file = "the file's, or " if names[0] in FIELDS else ""
    return click.option(
        *spelled,
        names[0],
        cls=SectionOption,
        section=section,
        type=kind,
        help=f"{help_} [default: {of_file}{DEFAULTS[names[0]]}]",
    )
