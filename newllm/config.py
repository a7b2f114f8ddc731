"""Schema of the configuration: which fields exist, their types and bounds, presets and command line flags.

The values live in the root `config.py`, one a line; the comment on that line is the flag's help text.
"""

import argparse
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import re
import shlex
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
    "seed": dict(
        tokenizer="gpt2", context_dim=768, embed_dim=768, num_layers=6, token_layers=0, tie_weights=False
    ),
}

# How other trainers and guides call settings of this one: what to give here -> their names.
ELSEWHERE = {
    "--phase2_learning_rate (Phase 1: --phase1_learning_rate)": "lr learning_rate base_lr max_lr lr_rate",
    "--phase2_epochs (sweeps of Phase 1: --phase1_max_iterations)": "epochs num_epochs n_epochs max_epochs num_train_epochs",
    "--phase1_max_iterations": "phase1_epochs phase1_iterations max_iterations iterations",
    "--phase2_batch_size (Phase 1: --phase1_batch_size)": "batch_size bs train_batch_size per_device_train_batch_size",
    "--checkpoint_dir": "output_dir output out out_dir save_dir model_dir log_dir checkpoint checkpoint_path ckpt_dir",
    "--cache_dir": "cache",
    "--model_type": "model arch architecture model_name",
    "--data_source": "dataset data dataset_name data_path data_dir train_file train_data corpus",
    "--data_column": "text_column column",
    "--data_split": "split",
    "--max_seq_length": "max_length max_len seq_len seq_length sequence_length block_size context_length n_ctx",
    "--num_samples": "samples n_samples max_samples max_train_samples sizes",
    "--num_tokens": "tokens max_tokens train_tokens token_budget",
    "--val_samples": "eval_samples max_eval_samples",
    "--precision bf16": "bf16 bfloat16 use_bfloat16 use_bf16",
    "--precision fp16": "fp16 float16 half amp use_amp",
    "--precision fp32": "fp32 float32",
    "--precision": "mixed_precision dtype",
    "--device cpu": "cpu no_cuda use_cpu",
    "--device cuda": "gpu cuda use_cuda",
    "--compile": "torch_compile use_compile",
    "--attention": "attn attn_implementation use_flash_attention flash_attention flash",
    "--save_every_n_batches": "phase1_save_every phase2_save_every save_every save_steps save_interval checkpoint_every",
    "--val_quick_every_n_batches": "eval_every eval_steps eval_interval",
    "--context_dim": "hidden_size hidden_dim d_model n_embd",
    "--embed_dim": "embedding_dim emb_dim embedding_size",
    "--num_layers": "layers n_layer n_layers num_hidden_layers",
    "--patience": "early_stopping early_stopping_patience",
    "--grad_clip": "max_grad_norm clip gradient_clip gradient_clip_val",
    "--warmup_ratio": "warmup warmup_steps",
    "--weight_decay": "wd",
    "--dist_reg_weight": "distribution_reg_weight reg_weight",
    "--context_adapter lora": "lora use_lora peft",
    "--adapter_rank": "lora_rank lora_r rank",
    "--trackers": "report_to logger wandb tensorboard use_wandb",
    "--max_minutes": "max_time time_limit max_hours",
    "--keep_last": "save_total_limit keep_checkpoints",
    "--seed": "random_seed",
    "nothing, as a run goes on by itself (--no-load_checkpoint: it begins anew)": "resume resume_from resume_from_checkpoint",
    "nothing, as a batch that does not fit is cut by itself": "gradient_accumulation_steps accumulation_steps",
    "nothing, as the loss is plain cross-entropy": "focal_gamma label_smoothing",
}
ELSEWHERE = {name: here for here, names in ELSEWHERE.items() for name in names.split()}
# Settings in which `~` and `$NAME` are expanded: paths, and what may be one.
PLACES = {"data_source", "tokenizer", "embeddings", "cache_dir", "checkpoint_dir", "backup_dir"}

# What these settings are in files of versions that did not have them.
EARLIER = dict(
    data_split="",
    data_column="",
    context_adapter="none",
    adapter_rank=0,
    attention="auto",
    save_min_seconds=30.0,
)


class Immutable(UserError, dataclasses.FrozenInstanceError):
    """A setting of a configuration was assigned or deleted."""


@dataclass(init=False, eq=True)
class Config:
    """Every setting of a run. Immutable; `dataclasses.replace` makes a changed copy.

    Values are taken from the keyword, else the preset, else the class attribute of the subclass in the root `config.py`.

    Raises:
        UserError: unknown name (with the nearest right one), wrong type, value out of bounds, or an impossible combination.
    """

    # Settings that somebody chose for this run, as {name: value}: by flag or keyword, and of a copy also what differs from the
    # file. No field, but dataclasses.replace hands it on.
    given: dataclasses.InitVar[dict] = None

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
    save_min_seconds: NonNegative
    save_every_minutes: NonNegative
    keep_last: CountOrZero
    backup_dir: str
    backup_every_minutes: NonNegative
    max_minutes: NonNegative
    artifacts: bool
    trackers: Literal["none", "tensorboard", "trackio", "wandb"]

    def __init__(self, **given):
        known = field_types()
        earlier = given.pop("given", None if len(given) < len(known) else {})
        for name in given:
            if name not in known:
                raise UserError(f"there is no setting '{name}'{_hint(name, known)}.")
        _refuse_unknown(type(self))
        _refuse_outside(type(self))
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
            object.__setattr__(
                self, "num_tokens", 0
            )  # said once: a copy with another num_samples has that many
        if earlier is not None:
            changed = self.differences().items() if type(self) is not Config else ()
            kept = {"num_samples"} if earlier.get("num_tokens") else set()
            given = {
                n: value for n, (_, value) in changed if n not in PRESETS[preset].keys() | kept
            } | earlier
        object.__setattr__(self, "given", given)
        if type(self) is not Config:  # what a saved run was made with stays as it was
            self._refuse_misfits()

    def _refuse_misfits(self):
        """Raise UserError for settings of which each is right and that cannot be meant together."""
        if self.model_type != "context" and self.phase == "1":
            raise UserError(
                f"phase 1 trains contexts and model_type '{self.model_type}' learns none: use --phase both."
            )
        if self.model_type in ("gru", "lstm", "transformer") and (self.freeze_context or self.whiten_context):
            raise UserError(
                f"model_type '{self.model_type}' has no context: leave out freeze_context and whiten_context."
            )
        if self.context_adapter != "none" and (self.model_type != "context" or self.freeze_context):
            raise UserError(
                "context_adapter fine-tunes F: leave it out with freeze_context or another model_type."
            )
        if self.whiten_context and self.model_type == "token":
            raise UserError("model_type 'token' has no context to whiten: leave out whiten_context.")
        if self.model_type in ("gru", "lstm", "window") and not self.token_layers:
            raise UserError(
                f"with token_layers 0 the head reads nothing of what model_type '{self.model_type}' remembers: give "
                "--token_layers 1 or more."
            )
        if self.phase == "1" and not self.phase1_max_iterations:
            raise UserError(
                "phase 1 with phase1_max_iterations 0 trains nothing: use --phase both, or more iterations."
            )

    def __setattr__(self, name, value=None):
        if name not in field_types():
            raise Immutable(f"there is no setting '{name}'{_hint(name, field_types())}.")
        kind = field_types()[name][0]
        flag = (
            f"--{name} {shlex.quote(str(value))}"
            if kind is not bool
            else f"--{name}"
            if value
            else f"--no-{name}"
        )
        raise Immutable(
            f"a configuration that is made does not change, so {name} stays {getattr(self, name)!r}: change its line in config.py, "
            f"give the flag {flag}, or make it with ResidualConfig({name}={value!r})."
        )

    def __delattr__(self, name):
        raise Immutable(
            f"a configuration keeps every setting that it was made with: '{name}' cannot be deleted."
        )

    def __init_subclass__(cls):
        _refuse_unknown(cls)

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


def _refuse_unknown(cls):
    """Raise UserError for an attribute of a class with values, as `num_sample = 3` in config.py makes, that is no setting."""
    for name in {} if cls is Config else vars(cls):
        if not name.startswith("__") and name not in field_types():
            raise UserError(f"config.py sets '{name}', which is no setting{_hint(name, field_types())}.")


def _refuse_outside(cls):
    """Raise UserError for a setting of config.py that stands outside of the class, where nothing would read it."""
    if cls.__module__ == "config":
        for name, value in vars(sys.modules["config"]).items():
            if isinstance(value, Config):
                raise UserError(
                    f"config.py makes a configuration, '{name}', that nothing reads: change the class's lines instead."
                )
            if name in field_types():
                raise UserError(
                    f"config.py sets '{name}' outside of the class {cls.__name__}, where it has no effect: indent it by four spaces "
                    f"and put it in the place of the class's own line for {name}."
                )


def field_types():
    """Field name -> (type or tuple of choices, Range or None)."""
    types = {}
    for name, hint in typing.get_type_hints(Config, include_extras=True).items():
        if isinstance(hint, dataclasses.InitVar):
            continue
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
            raise UserError(
                f"{name} must be one of {', '.join(kind)}, not {value!r}{_nearest(str(value), kind)}."
            )
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
    close = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        or [k for k in known if name and name in k][:1]
    )
    return f"; did you mean '{close[0]}'?" if close else ""


def _hint(name, known):
    """What to give in place of a setting or flag that there is not: by what it is called elsewhere, else by its spelling."""
    here = ELSEWHERE.get(name.lstrip("-").lower())
    return (
        f"; here it is {here if name.startswith('-') else here.replace('--', '')}"
        if here
        else _nearest(name, known)
    )


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
        options = dict(
            dest=name, default=argparse.SUPPRESS, help=f"{helps.get(name, '')} (default: {default})"
        )
        if kind is bool:
            settings.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
        elif isinstance(kind, tuple):
            settings.add_argument(f"--{name}", metavar="|".join(kind), **options)
        else:
            settings.add_argument(f"--{name}", type=_converter(name, kind), metavar=kind.__name__, **options)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UserError(
            f"unknown argument '{unknown[0]}'{_hint(unknown[0].split('=')[0], flags)}; see --help."
        )
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
        _refuse_values(args)
        return super().parse_known_args(args, namespace)


def flag(name, kind, bounds=None):
    """Type of a script's own flag for argparse: checked as a setting of that name would be, in the same words."""
    return lambda text: checked(name, _converter(name, kind)(text), kind, bounds)


def _underscored(word):
    """`--num-samples=3` -> `--num_samples=3`: dashes and underscores are the same in a flag, not in its value."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--"):
        return word
    name = flag[2:].replace("-", "_")
    if name.startswith("no_") and name[3:] in field_types():
        name = "no-" + name[3:]
    return "--" + name + equals + value


def _refuse_values(argv):
    """Raise UserError for `--compile False` or `--compile=1`: such a flag takes no value."""
    for word, after in itertools.pairwise([*argv, "--"]):
        flag, _, value = word.partition("=")
        value = value or ("" if after.startswith("-") else after)
        name = flag.removeprefix("--").removeprefix("no-")
        if value and flag.startswith("--") and field_types().get(name, [None])[0] is bool:
            raise UserError(
                f"{flag} takes no value such as '{value}': --{name} alone is True, --no-{name} is False."
            )


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
