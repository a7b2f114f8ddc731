"""Schema of the configuration: which fields exist, their types and bounds, presets and command line flags.

The values live in the root `config.py`, one a line; the comment on that line is the flag's help text.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from newllm.errors import UserError


@dataclass(frozen=True)
class Range:
    """Closed interval a number must lie in; `above` makes the lower end open."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value):
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self):
        lower = f"{'>' if self.above else '>='} {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and <= {self.high:g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Dropout = Annotated[float, Range(0, 0.95)]

PRESETS = {
    "none": {},
    # The published ancestor's network: GPT-2 vocabulary, logits read the token stream through an untied matrix.
    "seed": dict(tokenizer="gpt2", context_dim=768, embed_dim=768, num_layers=6, token_layers=0, tie_weights=False),
}

# Settings in which `~` and `$NAME` are expanded: paths, and what may be one.
PLACES = {"data_source", "tokenizer", "embeddings", "cache_dir", "checkpoint_dir", "backup_dir"}

# What these settings are in files of versions that did not have them.
EARLIER = dict(data_split="", data_column="", context_adapter="none", adapter_rank=0, attention="auto")


@dataclass(init=False, eq=True)
class Config:
    """Every setting of a run. Immutable; `dataclasses.replace` makes a changed copy.

    Values are taken from the keyword, else the preset, else the class attribute of the subclass in the root `config.py`.

    Raises:
        UserError: unknown name (with the nearest right one), wrong type, value out of bounds, or an impossible combination.
    """

    preset: Literal[tuple(PRESETS)]

    data_source: str
    data_split: str
    data_column: str
    tokenizer: str
    vocab_size: Annotated[int, Range(257)]
    num_samples: Count
    num_tokens: CountOrZero
    max_seq_length: Annotated[int, Range(2)]
    val_samples: Count
    tune_share: Annotated[float, Range(0, 0.9)]
    cache_dir: str

    model_type: Literal["context", "window", "token", "gru", "lstm", "transformer"]
    context_dim: Annotated[int, Range(2)]
    embed_dim: Annotated[int, Range(2)]
    num_layers: Count
    token_layers: CountOrZero
    tie_weights: bool
    embeddings: str
    init_scale: Positive

    phase: Literal["both", "1"]
    phase1_max_iterations: CountOrZero
    phase1_shuffle: bool
    phase1_convergence_threshold: Positive
    phase1_min_converged_ratio: PositiveShare
    phase1_learning_rate: Positive
    phase1_batch_size: Count
    dist_reg: Literal["covariance", "logdet", "dispersion"]
    dist_reg_weight: Share
    context_noise: NonNegative

    phase2_epochs: Count
    phase2_learning_rate: Positive
    phase2_batch_size: Count
    untrained_control: bool
    freeze_context: bool
    whiten_context: bool
    context_lr_scale: NonNegative
    context_adapter: Literal["none", "lora"]
    adapter_rank: CountOrZero
    gradient_sweeps: CountOrZero
    dropout: Dropout
    token_dropout: Dropout
    warmup_ratio: Share
    patience: Count
    val_quick_frac: PositiveShare
    val_quick_every_n_batches: CountOrZero

    min_batches: Count
    weight_decay: NonNegative
    grad_clip: Positive
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    context_memory_mb: CountOrZero
    compile: bool
    attention: Literal["auto", "flash", "math"]
    gpu_memory_fraction: PositiveShare
    seed: CountOrZero

    save_checkpoint: bool
    load_checkpoint: bool
    checkpoint_dir: str
    save_every_n_batches: Count
    save_every_minutes: NonNegative
    keep_last: CountOrZero
    backup_dir: str
    backup_every_minutes: NonNegative
    max_minutes: NonNegative
    artifacts: bool
    trackers: Literal["none", "tensorboard", "trackio", "wandb"]

    def __init__(self, **given):
        known = field_types()
        for name in given:
            if name not in known:
                raise UserError(f"there is no setting '{name}'{_nearest(name, known)}.")
        preset = check_value("preset", given.get("preset", getattr(type(self), "preset", "none")))
        values = PRESETS[preset] | given
        for name in known:
            if name not in values and not hasattr(type(self), name):
                raise UserError(f"the setting '{name}' has no value in config.py; add a line for it.")
            value = values.get(name, getattr(type(self), name, None))
            object.__setattr__(self, name, check_value(name, value))
        if self.num_tokens:
            if self.num_tokens < self.max_seq_length:
                raise UserError(
                    f"num_tokens ({self.num_tokens}) is less than one sample of max_seq_length ({self.max_seq_length}) tokens."
                )
            object.__setattr__(self, "num_samples", self.num_tokens // self.max_seq_length)
            object.__setattr__(self, "num_tokens", 0)  # said once: a copy with another num_samples has that many

        if self.model_type != "context" and self.phase == "1":
            raise UserError(
                f"phase 1 trains contexts and model_type '{self.model_type}' learns none: use --phase both."
            )
        if self.model_type in ("gru", "lstm", "transformer") and (self.freeze_context or self.whiten_context):
            raise UserError(
                f"model_type '{self.model_type}' has no context: leave out freeze_context and whiten_context."
            )
        if self.context_adapter != "none" and (self.model_type != "context" or self.freeze_context):
            raise UserError("context_adapter fine-tunes F: leave it out with freeze_context or another model_type.")

    def __setattr__(self, name, value=None):
        raise dataclasses.FrozenInstanceError(
            f"a configuration is immutable: make a copy with another '{name}' (dataclasses.replace)"
        )

    __delattr__ = __setattr__

    def __init_subclass__(cls):
        for name in vars(cls):
            if not name.startswith("__") and name not in field_types():
                raise UserError(f"config.py sets '{name}', which is no setting{_nearest(name, field_types())}.")

    @property
    def train_tokens(self):
        """Token budget: predictions per pass over the training samples."""
        return self.num_samples * self.max_seq_length

    def to_dict(self):
        return dataclasses.asdict(self)

    def differences(self):
        """Settings that differ from the file's values, as {name: (file's value, value in effect)}."""
        file = {name: getattr(type(self), name, None) for name in field_types()}
        return {
            name: (file[name], value)
            for name, value in self.to_dict().items()
            if value != (expanded(file[name]) if name in PLACES and file[name] else file[name])
        }


def field_types():
    """Field name -> (type or tuple of choices, Range or None)."""
    types = {}
    for name, hint in typing.get_type_hints(Config, include_extras=True).items():
        if typing.get_origin(hint) is Literal:
            types[name] = (typing.get_args(hint), None)
        elif typing.get_origin(hint) is Annotated:
            types[name] = typing.get_args(hint)
        else:
            types[name] = (hint, None)
    return types


def check_value(name, value):
    """The value in its declared type (an int is a fine float), paths expanded, or a UserError that names the field."""
    value = checked(name, value, *field_types()[name])
    return expanded(value) if name in PLACES else value


def expanded(path):
    """A path (or a name) in which `~` and `$NAME` are what a shell makes of them.

    Raises:
        UserError: there is no such user or variable.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if (unknown := re.match(r"~\w*|.*?(\$\w+|\$\{\w+\})", found)) and not os.path.lexists(found):
        raise UserError(f"'{path}': {unknown[1] or unknown[0]} stands for nothing here; write the path out.")
    return found


def checked(name, value, kind, bounds):
    """The value, if it is of a kind (a type or a tuple of choices) and within bounds (a Range or None)."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise UserError(f"{name} must be one of {', '.join(kind)}, not {value!r}{_nearest(str(value), kind)}.")
        return value
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} must be of type {kind.__name__}, not {value!r}.")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}.")
    if bounds is not None and value not in bounds:
        raise UserError(f"{name} must be {bounds}, not {value}.")
    return value


def _nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [k for k in known if name and name in k][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def parse_args(config_class, argv=None, description=None, extra=None):
    """Command line -> configuration. Every field is a flag, `--no-NAME` for booleans; `-` and `_` are the same.

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
    settings = parser.add_argument_group("settings (defaults are the values of config.py)")
    helps = field_comments(config_class)
    for name, (kind, _) in field_types().items():
        default = str(getattr(config_class, name, "")).replace("%", "%%")
        options = dict(dest=name, default=argparse.SUPPRESS, help=f"{helps.get(name, '')} (default: {default})")
        if kind is bool:
            settings.add_argument(f"--{name}", action="store_true", **options)
            settings.add_argument(f"--no_{name}", action="store_false", **options | {"help": argparse.SUPPRESS})
        elif isinstance(kind, tuple):
            settings.add_argument(f"--{name}", metavar="|".join(kind), **options)
        else:
            settings.add_argument(f"--{name}", type=_converter(name, kind), metavar=kind.__name__, **options)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument '{unknown[0]}'{_nearest(unknown[0].split('=')[0], flags)}; see --help.")
    given = {name: value for name, value in vars(namespace).items() if name in field_types()}
    return config_class(**given), namespace


class Parser(argparse.ArgumentParser):
    """Parser of every command: errors are one sentence, flags are written out, `-` and `_` in them are the same."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see --help.")

    def parse_known_args(self, args=None, namespace=None):
        args = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)


def flag(name, kind, bounds=None):
    """Type of a script's own flag for argparse: checked as a setting of that name would be, in the same words."""
    return lambda text: checked(name, _converter(name, kind)(text), kind, bounds)


def _underscored(word):
    """`--num-samples=3` -> `--num_samples=3`: dashes and underscores are the same in a flag, not in its value."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


def _converter(name, kind):
    def convert(text):
        try:
            return kind(text.replace("_", "")) if kind is int else kind(text)
        except ValueError:
            raise UserError(f"{name} must be of type {kind.__name__}, not '{text}'.") from None

    return convert


def field_comments(config_class):
    """Field name -> the comment on its line in config.py, which is the one home of its description."""
    lines = re.findall(r"^    (\w+) = .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in lines}
