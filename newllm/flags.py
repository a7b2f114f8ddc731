"""The command line: every setting is a flag, and what is wrong with one is a single sentence."""

import argparse
import math
import sys

from newllm.config import SETTINGS, checked, comments_of, hint
from newllm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser of every command: errors are one sentence, flags are written out, `-` is `_`."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see --help.")

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)


def parse_args(config_class, argv=None, description=None, extra=None):
    """Command line -> configuration. Every setting is a flag, `--no-NAME` for booleans.

    Args:
        config_class: the class with the values, from the root `config.py`.
        argv: arguments, default `sys.argv[1:]`.
        extra: function that adds a command's own flags to the parser.

    Returns:
        (configuration, namespace that holds the extra flags).
    """
    parser = Parser(description=description)
    if extra:
        extra(parser)
    group = parser.add_argument_group("settings (defaults are the values of config.py)")
    comments = comments_of(config_class)
    for name, setting in SETTINGS.items():
        sentence = f"{comments.get(name, '')} (default: {getattr(config_class, name, '')})"
        if setting.kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(setting.kind, tuple):
            options = dict(metavar="|".join(setting.kind))
        else:
            options = dict(metavar=setting.kind.__name__, type=flag(name, setting.kind))
        help_text = sentence.replace("%", "%%")
        group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, help=help_text, **options)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = hint(unknown[0].partition("=")[0], known)
        raise UserError(f"unknown argument '{unknown[0]}'{close}; see --help.")
    given = {name: value for name, value in vars(namespace).items() if name in SETTINGS}
    return config_class(**given), namespace


def flag(name, kind, bounds=None):
    """Type of a flag for argparse: its text as a value, checked as a setting would be, in the same words."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = text  # of the wrong type, as is said now
        return checked(name, value, kind, bounds)

    return convert


def numbers(name, kind=int, low=1, descending=False):
    """Type of a flag that takes several, in order: `1953,195` -> [195, 1953]. UserError for anything else."""

    def convert(text):
        try:
            values = sorted({kind(word) for word in text.split(",")}, reverse=descending)
        except ValueError:
            values = [0]
        if not low <= min(values) <= max(values) < math.inf:
            whole = "whole " if kind is int else ""
            wanted = f"{whole}numbers from {low:g} on with commas between, like 195,1953,3906"
            raise UserError(f"--{name} takes {wanted}, not '{text}'.")
        return values

    return convert


def _underscored(word):
    """`--num-samples=3` -> `--num_samples=3`: in a flag dashes are underscores, in its value they are not."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    name = flag[2:].replace("-", "_")
    if name.startswith("no_") and name[3:] in SETTINGS:
        name = "no-" + name[3:]
    return "--" + name + equals + value
