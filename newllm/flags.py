"""The command line: every setting is a flag, and what is wrong with one is a single sentence."""

import argparse
import itertools
import sys

from newllm.config import Config, checked, comments_of, hint, settings_of
from newllm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser of every command: errors are one sentence, flags are written out, `-` is `_`."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see --help.")

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        words = [_underscored(word) for word in words]
        _refuse_values(words)
        return super().parse_known_args(words, namespace)


def parse_args(config_class, argv=None, description=None, extra=None):
    """Command line -> configuration. Every setting is a flag, `--no-NAME` for booleans; `-` is `_`.

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
    flags = parser.add_argument_group("settings (defaults are the values of config.py)")
    comments, settings = comments_of(config_class), settings_of(Config)
    for name, setting in settings.items():
        default = getattr(config_class, name, "")
        sentence = f"{comments.get(name, '')} (default: {default})".replace("%", "%%")
        options = dict(dest=name, default=argparse.SUPPRESS, help=sentence)
        if setting.kind is bool:
            flags.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
        elif isinstance(setting.kind, tuple):
            flags.add_argument(f"--{name}", metavar="|".join(setting.kind), **options)
        else:
            kind = setting.kind
            flags.add_argument(f"--{name}", type=_converter(name, kind), metavar=kind.__name__, **options)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(
            f"unknown argument '{unknown[0]}'{hint(unknown[0].split('=')[0], options)}; see --help."
        )
    given = {name: value for name, value in vars(namespace).items() if name in settings}
    return config_class(**given), namespace


def flag(name, kind, bounds=None):
    """Type of a script's own flag for argparse: checked as a setting would be, in the same words."""
    return lambda text: checked(name, _converter(name, kind)(text), kind, bounds)


def _converter(name, kind):
    def convert(text):
        try:
            return kind(text.replace("_", "")) if kind is int else kind(text)
        except ValueError:
            raise UserError(f"{name} must be of type {kind.__name__}, not '{text}'.") from None

    return convert


def _underscored(word):
    """`--num-samples=3` -> `--num_samples=3`: in a flag dashes are underscores, in its value they are not."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--"):
        return word
    name = flag[2:].replace("-", "_")
    if name.startswith("no_") and name[3:] in settings_of(Config):
        name = "no-" + name[3:]
    return "--" + name + equals + value


def _refuse_values(words):
    """Raise UserError for `--compile False` or `--compile=1`: such a flag takes no value."""
    switches = {name for name, setting in settings_of(Config).items() if setting.kind is bool}
    for word, after in itertools.pairwise([*words, "--"]):
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").removeprefix("no-")
        if not value and not after.startswith("-"):
            value = after
        if value and flag.startswith("--") and name in switches:
            raise UserError(
                f"{flag} takes no value such as '{value}': --{name} alone is True, --no-{name} is False."
            )
