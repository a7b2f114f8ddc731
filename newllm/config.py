"""Schema of the configuration: at each setting its type, its bounds, and which figures it shapes.

The values live in the root `config.py`, one a line; the comment on that line is the flag's help text.
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Setting:
    """What a setting may be and what it shapes; stands at the field, where a type annotation would.

    Args:
        shapes: "data", "model" or "budget": the whole run. "phase1", "phase2", "untrained" (contexts of the
            untrained network) or "control" (the head on them): the figures of these stages. "row": whether
            there is such a head. "": no figure, only where and how they are made.
        kind: a type, or a tuple of choices. bounds: of a number.
        path: `~` and `$NAME` in it are expanded.
        until_done: may change while the last stage that it shapes is not complete.
    """

    shapes: str
    kind: type | tuple
    bounds: Range | None = None
    path: bool = False
    until_done: bool = False


def whole(shapes, low, high=math.inf, until_done=False):
    return Setting(shapes, int, Range(low, high), until_done=until_done)


def real(shapes, low, high=math.inf, above=False):
    return Setting(shapes, float, Range(low, high, above))


def choice(shapes, *values):
    return Setting(shapes, values)


def switch(shapes):
    return Setting(shapes, bool)


def text(shapes):
    return Setting(shapes, str)


def path(shapes):
    return Setting(shapes, str, path=True)


PRESETS = {
    "none": {},
    # The published ancestor's network: GPT-2's vocabulary, logits of the token stream by an untied matrix.
    "seed": dict(
        tokenizer="gpt2", context_dim=768, embed_dim=768, num_layers=6, token_layers=0, tie_weights=False
    ),
}


class Immutable(UserError, dataclasses.FrozenInstanceError):
    """A setting of a configuration was assigned or deleted."""


class Settings:
    """Base of the groups below: what one part of the code works with, given by `config.part(Group)`."""

    def __setattr__(self, name, value=None):
        settings = settings_of(Config)
        if name not in settings:
            raise Immutable(f"there is no setting '{name}'{hint(name, settings)}.")
        flag = f"--{name} {shlex.quote(str(value))}"
        if settings[name].kind is bool:
            flag = f"--{name}" if value else f"--no-{name}"
        raise Immutable(
            f"a configuration that is made does not change, so {name} stays {getattr(self, name)!r}: change "
            f"its line in config.py, give the flag {flag}, or make it with ResidualConfig({name}={value!r})."
        )

    def __delattr__(self, name):
        raise Immutable(
            f"a configuration keeps every setting that it was made with: '{name}' cannot be deleted."
        )


group = dataclass(init=False)


@group
class SharedSettings(Settings):
    """What several rooms read."""

    preset: choice("model", *PRESETS)
    num_samples: whole("budget", 1)
    max_seq_length: whole("data", 2)
    embeddings: path("model")
    freeze_context: switch("phase2")
    min_batches: whole("control phase1 phase2", 1, until_done=True)
    grad_clip: real("control phase1 phase2", 0, above=True)
    context_memory_mb: whole("", 0)
    seed: whole("data", 0)
    save_checkpoint: switch("")
    checkpoint_dir: path("")


@group
class DataSettings(SharedSettings):
    """Where dialogues come from, how they become ids, which are held out."""

    data_source: path("data")
    data_split: text("data")
    data_column: text("data")
    tokenizer: path("data")
    vocab_size: whole("data", 257)
    num_tokens: whole("budget", 0)
    val_samples: whole("data", 1)
    tune_share: real("data", 0, 0.9)
    cache_dir: path("")


@group
class ModelSettings(SharedSettings):
    """The network."""

    model_type: choice("model", "context", "window", "token", "gru", "lstm", "transformer")
    context_dim: whole("model", 2)
    embed_dim: whole("model", 2)
    num_layers: whole("model", 1)
    token_layers: whole("model", 0)
    tie_weights: switch("model")
    init_scale: real("model", 0, above=True)
    dropout: real("control phase2", 0, 0.95)
    token_dropout: real("phase2", 0, 0.95)
    attention: choice("", "auto", "flash", "math")


@group
class Phase1Settings(SharedSettings):
    """The context map, by sweeps."""

    phase1_max_iterations: whole("phase1", 0)
    phase1_shuffle: switch("phase1")
    phase1_convergence_threshold: real("untrained phase1", 0, above=True)
    phase1_min_converged_ratio: real("untrained phase1", 0, 1, above=True)
    phase1_learning_rate: real("phase1", 0, above=True)
    phase1_batch_size: whole("phase1", 1, until_done=True)
    dist_reg: choice("phase1", "covariance", "logdet", "dispersion")
    dist_reg_weight: real("phase1", 0, 1)
    context_noise: real("phase1", 0)


@group
class Phase2Settings(SharedSettings):
    """The language model."""

    phase2_epochs: whole("control phase2", 1)
    phase2_learning_rate: real("control phase2", 0, above=True)
    phase2_batch_size: whole("control phase2", 1, until_done=True)
    untrained_control: switch("row")
    whiten_context: switch("control phase2")
    context_lr_scale: real("phase2", 0)
    context_adapter: choice("phase2", "none", "lora")
    adapter_rank: whole("phase2", 0)
    gradient_sweeps: whole("phase2", 0)
    warmup_ratio: real("control phase2", 0, 1)
    patience: whole("control phase2", 1)
    weight_decay: real("control phase2", 0)
    val_quick_frac: real("", 0, 1, above=True)
    val_quick_every_n_batches: whole("", 0)


@group
class MachineSettings(SharedSettings):
    """Where and in which type it computes."""

    device: choice("", "auto", "cpu", "cuda")
    precision: choice("", "auto", "fp32", "bf16", "fp16")
    compile: switch("")
    gpu_memory_fraction: real("", 0, 1, above=True)


@group
class SavingSettings(SharedSettings):
    """What is kept, when, and for how long the run may go on."""

    phase: choice("", "both", "1")
    load_checkpoint: switch("")
    save_every_n_batches: whole("", 1)
    save_min_seconds: real("", 0)
    save_every_minutes: real("", 0)
    keep_last: whole("", 0)
    backup_dir: path("")
    backup_every_minutes: real("", 0)
    max_minutes: real("", 0)
    artifacts: switch("")
    trackers: choice("", "none", "tensorboard", "trackio", "wandb")


# What these settings are in files of versions that did not have them.
EARLIER = dict(
    data_split="",
    data_column="",
    context_adapter="none",
    adapter_rank=0,
    attention="auto",
    save_min_seconds=30.0,
)


@dataclass(init=False)
class Config(SavingSettings, MachineSettings, Phase2Settings, Phase1Settings, ModelSettings, DataSettings):
    """Every setting of a run. Immutable; `dataclasses.replace` makes a changed copy.

    A value comes from the keyword, else the preset, else the attribute of the subclass in `config.py`.

    Raises:
        UserError: unknown name (with the nearest right one), wrong type or value, impossible combination.
    """

    # Settings that somebody chose for this run, as {name: value}: by flag or keyword, and of a copy also what
    # differs from the file. No field, but dataclasses.replace hands it on.
    given: dataclasses.InitVar[dict] = None

    def __init__(self, **given):
        known = settings_of(Config)
        earlier = given.pop("given", None if len(given) < len(known) else {})
        for name in given:
            if name not in known:
                raise UserError(f"there is no setting '{name}'{hint(name, known)}.")
        _refuse_unknown(type(self))
        _refuse_outside(type(self))
        preset = check_value("preset", given.get("preset", getattr(type(self), "preset", "none")))
        values = PRESETS[preset] | given
        for name in known:
            if name not in values and not hasattr(type(self), name):
                raise UserError(f"the setting '{name}' has no value in config.py; add a line for it.")
            value = values.get(name, getattr(type(self), name, None))
            vars(self)[name] = check_value(name, value)
        self._count_tokens()
        if earlier is not None:
            given = self._chosen(preset, earlier)
        vars(self)["given"] = given
        if type(self) is not Config:  # what a saved run was made with stays as it was
            self._refuse_misfits()

    def _count_tokens(self):
        """num_tokens becomes the number of samples: said once, so a copy with other samples has these."""
        if not self.num_tokens:
            return
        if self.num_tokens < self.max_seq_length:
            raise UserError(
                f"num_tokens ({self.num_tokens}) is less than one sample of max_seq_length "
                f"({self.max_seq_length}) tokens."
            )
        vars(self)["num_samples"] = self.num_tokens // self.max_seq_length
        vars(self)["num_tokens"] = 0

    def _chosen(self, preset, earlier):
        """What somebody chose for a copy: as its original, and what differs from file and preset."""
        derived = set(PRESETS[preset]) | ({"num_samples"} if earlier.get("num_tokens") else set())
        changed = {} if type(self) is Config else self.differences()
        return {name: value for name, (_, value) in changed.items() if name not in derived} | earlier

    def _refuse_misfits(self):
        """Raise UserError for settings of which each is right and that cannot be meant together."""
        kind, remembers = self.model_type, self.model_type in ("gru", "lstm", "window")
        misfits = {
            f"phase 1 trains contexts and model_type '{kind}' learns none: use --phase both.": (
                self.phase == "1" and kind != "context"
            ),
            "phase 1 with phase1_max_iterations 0 trains nothing: use --phase both, or more iterations.": (
                self.phase == "1" and not self.phase1_max_iterations
            ),
            f"model_type '{kind}' has no context: leave out freeze_context and whiten_context.": (
                kind in ("gru", "lstm", "transformer") and (self.freeze_context or self.whiten_context)
            ),
            "model_type 'token' has no context to whiten: leave out whiten_context.": (
                kind == "token" and self.whiten_context
            ),
            "context_adapter fine-tunes F: leave it out with freeze_context or another model_type.": (
                self.context_adapter != "none" and (kind != "context" or self.freeze_context)
            ),
            f"with token_layers 0 the head reads nothing of what model_type '{kind}' remembers: give "
            "--token_layers 1 or more.": remembers and not self.token_layers,
        }
        for sentence, applies in misfits.items():
            if applies:
                raise UserError(sentence)

    def __init_subclass__(cls):
        _refuse_unknown(cls)

    def part(self, kind):
        """The settings of one room: an instance of one of the groups above."""
        room = object.__new__(kind)
        vars(room).update({name: getattr(self, name) for name in settings_of(kind)})
        return room

    @property
    def train_tokens(self):
        """Token budget: predictions per pass over the training samples."""
        return self.num_samples * self.max_seq_length

    def to_dict(self):
        return dataclasses.asdict(self)

    def differences(self):
        """Settings that differ from the file's values, as {name: (file's value, value in effect)}."""
        changed = {}
        for name, value in self.to_dict().items():
            file = getattr(type(self), name, None)
            in_effect = expanded(file) if name in PLACES and file else file
            if value != in_effect:
                changed[name] = (file, value)
        return changed


def settings_of(kind):
    """{name: Setting} of a group, or of the whole configuration."""
    return {field.name: field.type for field in dataclasses.fields(kind)}


PLACES = {name for name, setting in settings_of(Config).items() if setting.path}


def _refuse_unknown(cls):
    """Raise UserError for an attribute of a class that is no setting, as of a misspelt line."""
    for name in {} if cls is Config else vars(cls):
        if not name.startswith("__") and name not in settings_of(Config):
            raise UserError(f"config.py sets '{name}', which is no setting{hint(name, settings_of(Config))}.")


def _refuse_outside(cls):
    """Raise UserError for a setting of config.py outside of the class, where nothing would read it."""
    if cls.__module__ != "config":
        return
    for name, value in vars(sys.modules["config"]).items():
        if isinstance(value, Config):
            raise UserError(
                f"config.py makes a configuration, '{name}', that nothing reads: change the class's lines."
            )
        if name in settings_of(Config):
            raise UserError(
                f"config.py sets '{name}' outside of the class {cls.__name__}, where it has no effect: "
                f"indent it by four spaces and put it in the place of the class's own line for {name}."
            )


def check_value(name, value):
    """The value in its declared type, paths expanded, or a UserError that names the field."""
    setting = settings_of(Config)[name]
    value = checked(name, value, setting.kind, setting.bounds)
    return expanded(value) if setting.path else value


def expanded(path):
    """A path (or a name) in which `~` and `$NAME` are what a shell makes of them.

    Raises:
        UserError: there is no such user or variable.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    unknown = re.match(r"~\w*|.*?(\$\w+|\$\{\w+\})", found)
    if unknown and not os.path.lexists(found):
        name = unknown[1] or unknown[0]
        raise UserError(f"'{path}': {name} stands for nothing here; write the path out.")
    return found


def checked(name, value, kind, bounds=None):
    """The value, if it is of a kind (a type or a tuple of choices) and within bounds (a Range or None)."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise UserError(
                f"{name} must be one of {', '.join(kind)}, not {value!r}{nearest(str(value), kind)}."
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


def comments_of(config_class):
    """Setting -> the comment on its line in config.py, which is the one home of its description."""
    lines = re.findall(r"^    (\w+) = .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE)
    return dict(lines)


def nearest(name, known):
    """What to add to a sentence about a name that is unknown: the one that was probably meant, or nothing."""
    close = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        or [k for k in known if name and name in k][:1]
    )
    return f"; did you mean '{close[0]}'?" if close else ""


def hint(name, known):
    """The same of a setting or flag: by what it is called elsewhere, else by its spelling."""
    here = ELSEWHERE.get(name.lstrip("-").lower())
    if not here:
        return nearest(name, known)
    return f"; here it is {here if name.startswith('-') else here.replace('--', '')}"


# How other trainers call settings, where the spelling does not tell: what to give here, their names.
ELSEWHERE = """
--phase2_learning_rate (Phase 1: --phase1_learning_rate): lr learning_rate base_lr max_lr lr_rate
--phase2_epochs (sweeps of Phase 1: --phase1_max_iterations): epochs num_epochs max_epochs num_train_epochs
--phase1_max_iterations: phase1_epochs iterations
--phase2_batch_size (Phase 1: --phase1_batch_size): batch_size bs train_batch_size per_device_train_batch_size
--checkpoint_dir: output_dir output out out_dir save_dir model_dir log_dir ckpt_dir
--model_type: model arch architecture
--data_source: dataset data dataset_name data_path data_dir train_file train_data corpus
--max_seq_length: block_size context_length n_ctx
--num_samples: samples max_samples max_train_samples sizes
--num_tokens: token_budget
--precision bf16: bf16 bfloat16 use_bfloat16 use_bf16
--precision fp16: fp16 float16 half amp use_amp
--precision fp32: fp32 float32
--precision: dtype
--device cpu: cpu no_cuda use_cpu
--device cuda: gpu cuda use_cuda
--attention: flash
--save_every_n_batches: phase1_save_every phase2_save_every save_every save_steps checkpoint_every
--val_quick_every_n_batches: eval_every eval_steps eval_interval
--context_dim: hidden_size hidden_dim d_model n_embd
--embed_dim: embedding_size
--patience: early_stopping early_stopping_patience
--grad_clip: max_grad_norm
--weight_decay: wd
--context_adapter lora: lora use_lora peft
--adapter_rank: lora_r rank
--trackers: report_to logger wandb tensorboard use_wandb
--max_minutes: time_limit
--keep_last: save_total_limit keep_checkpoints
nothing, as a run goes on by itself (--no-load_checkpoint: anew): resume resume_from resume_from_checkpoint
nothing, as a batch that does not fit is cut by itself: gradient_accumulation_steps accumulation_steps
nothing, as the loss is plain cross-entropy: focal_gamma label_smoothing
"""
ELSEWHERE = {
    name: here
    for here, names in re.findall("^(.+): (.+)$", ELSEWHERE, re.MULTILINE)
    for name in names.split()
}
