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
from functools import partial

from newllm.errors import UserError


@dataclass(frozen=True)
class Range:
    """Closed interval of finite numbers; `above` makes the lower end open."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value):
        inside = self.low < value if self.above else self.low <= value
        return math.isfinite(value) and inside and value <= self.high

    def __str__(self):
        lower = f"{'>' if self.above else '>='} {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and <= {self.high:g}"


@dataclass(frozen=True)
class Setting:
    """What a setting may be and what it shapes; stands at the field, where a type annotation would.

    Args:
        shapes: "data", "model" or "budget": the whole run. "phase1", "phase2", "untrained" (contexts of the
            untrained network), "control" (the head on them) or "retrieval": the figures of these stages.
            "row": whether there is such a head. "": no figure, only where and how they are made.
        kind: a type, or a tuple of choices. bounds: of a number.
        several: of which a text, "a,b", has some, each once; their order does not matter.
        path: `~` and `$NAME` in it are expanded.
        until_done: may change while the last stage that it shapes is not complete.
    """

    shapes: str
    kind: type | tuple
    bounds: Range | None = None
    several: tuple = ()
    path: bool = False
    until_done: bool = False


def whole(shapes, low, high=math.inf, until_done=False):
    return Setting(shapes, int, Range(low, high), until_done=until_done)


def real(shapes, low, high=math.inf, above=False):
    return Setting(shapes, float, Range(low, high, above))


def choice(shapes, *values):
    return Setting(shapes, values)


def several(shapes, *values):
    return Setting(shapes, str, several=values)


switch = partial(Setting, kind=bool)
text = partial(Setting, kind=str)
path = partial(Setting, kind=str, path=True)
group = dataclass(init=False)

PRESETS = {
    "none": {},
    # GPT-2's vocabulary, logits of the token stream by an untied matrix.
    "seed": dict(
        tokenizer="gpt2", context_dim=768, embed_dim=768, num_layers=6, token_layers=0, tie_weights=False
    ),
}


@group
class SharedSettings:
    """What several rooms read, and the base of the groups below: `config.part(Group)` makes one."""

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

    def __setattr__(self, name, value):
        if name not in SETTINGS:
            raise unknown(name)
        flag = f"--{name} {shlex.quote(str(value))}"
        if SETTINGS[name].kind is bool:
            flag = f"--{name}" if value else f"--no-{name}"
        raise UserError(
            f"a configuration that is made does not change, so {name} stays {getattr(self, name)!r}: change "
            f"its line in config.py, give the flag {flag}, or make it with ResidualConfig({name}={value!r})."
        )


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
    fit_share: real("data", 0, 0.9)
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
    label_smoothing: real("control phase2", 0, 0.95)
    teachers: text("phase2")
    val_quick_frac: real("", 0, 1, above=True)
    val_quick_every_n_batches: whole("", 0)


@group
class RetrievalSettings(SharedSettings):
    """What is looked up."""

    retrieval: several("retrieval", "ngram", "cache", "knn", "none")
    retrieval_keys: several("retrieval", "hidden", "contexts", "tokens")
    retrieval_window: whole("retrieval", 4, 100_000)  # an n-gram looks back 4; each token compares with all

    @property
    def experts(self):
        """What is looked up, as a list."""
        return [name for name in self.retrieval.split(",") if name != "none"]

    @property
    def keys(self):
        """What places are compared by, as a list."""
        return self.retrieval_keys.split(",")


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
    data_split="", data_column="", fit_share=0.0, context_adapter="none", adapter_rank=0, attention="auto",
    save_min_seconds=30.0, label_smoothing=0.0, teachers="",
    retrieval="none", retrieval_keys="hidden,tokens", retrieval_window=4096,
)  # fmt: skip


@group
class Config(
    SavingSettings, MachineSettings, RetrievalSettings, Phase2Settings, Phase1Settings, ModelSettings,
    DataSettings,
):  # fmt: skip
    """Every setting of a run. Immutable; `dataclasses.replace` makes a changed copy.

    A value comes from the keyword, else the preset, else the attribute of the subclass in `config.py`.

    Attributes:
        given: {name: value} of the flags or keywords that say something else than the file.

    Raises:
        UserError: unknown name (with the nearest right one), wrong type or value, impossible combination.
    """

    def __init__(self, **given):
        cls = type(self)
        for name in given:
            if name not in SETTINGS:
                raise unknown(name)
        _refuse_unread(cls)
        values = {name: getattr(cls, name, None) for name in SETTINGS} | given
        preset = check_value("preset", values["preset"])
        for name, value in (values | PRESETS[preset] | given).items():
            vars(self)[name] = check_value(name, value)
        changed = {name: getattr(self, name) for name in given if given[name] != getattr(cls, name, None)}
        vars(self)["given"] = changed
        if cls is not Config:  # what a saved run was made with stays as it was
            self._refuse_misfits()
        if self.num_tokens:  # said once, so that a copy with other samples has these
            vars(self).update(num_samples=self.num_tokens // self.max_seq_length, num_tokens=0)

    def _refuse_misfits(self):
        """Raise UserError for settings of which each is right and that cannot be meant together."""
        kind, frozen = self.model_type, self.freeze_context
        learns, adapted = kind == "context", self.context_adapter != "none"
        trains = learns and self.phase1_max_iterations
        unread = kind in ("gru", "lstm", "window") and not self.token_layers
        contextless = "contexts" in self.keys and kind in ("token", "transformer")
        misfits = {
            "phase '1' trains nothing, use --phase both": self.phase == "1" and not trains,
            "freeze_context has no contexts": frozen and kind in ("gru", "lstm", "transformer"),
            "whiten_context needs contexts": self.whiten_context and kind not in ("context", "window"),
            "context_adapter needs contexts that train": adapted and (frozen or not learns),
            "retrieval 'none' stands alone": "none" in self.retrieval and self.retrieval != "none",
            "retrieval_keys 'contexts' has no contexts, use hidden or tokens": contextless,
            "the head reads nothing of it, use --token_layers 1": unread,
            "num_tokens is less than max_seq_length": 0 < self.num_tokens < self.max_seq_length,
        }
        for sentence, applies in misfits.items():
            if applies:
                raise UserError(f"settings contradict each other, with model_type '{kind}': {sentence}.")

    def part(self, kind):
        """The settings of one room: an instance of one of the groups above."""
        room = object.__new__(kind)
        vars(room).update({name: getattr(self, name) for name in settings_of(kind)})
        return room

    @property
    def looks_up(self):
        """What the model looks up, as a list: whitened contexts, a control, are those of no other text."""
        return [] if self.whiten_context else self.experts

    @property
    def train_tokens(self):
        """Token budget: predictions per pass over the training samples."""
        return self.num_samples * self.max_seq_length

    def to_dict(self):
        return dataclasses.asdict(self)

    def differences(self):
        """Settings that differ from the file's values, as {name: (file's value, value in effect)}."""
        file = {name: getattr(type(self), name) for name in SETTINGS}
        now = self.to_dict()
        return {name: (file[name], now[name]) for name in now if check_value(name, file[name]) != now[name]}


def settings_of(kind):
    """{name: Setting} of a group, or of the whole configuration."""
    return {field.name: field.type for field in dataclasses.fields(kind)}


SETTINGS = settings_of(Config)


def _refuse_unread(cls):
    """Raise UserError for what config.py says and nothing would read: a misspelt line, or one outside."""
    for name in {} if cls is Config else vars(cls):
        if not name.startswith("__") and name not in SETTINGS:
            raise unknown(name)
    for name, value in vars(sys.modules["config"]).items() if cls.__module__ == "config" else ():
        if name in SETTINGS or isinstance(value, Config):
            raise UserError(
                f"config.py sets '{name}' outside of the class {cls.__name__}, where it has no effect: "
                "change the line of the setting in the class."
            )


def check_value(name, value):
    """The value in its declared type, paths expanded, or a UserError that names the field."""
    setting = SETTINGS[name]
    value = checked(name, value, setting.kind, setting.bounds)
    if setting.several:
        value = _ordered(name, value, setting.several)
    return expanded(value) if setting.path else value


def _ordered(name, value, choices):
    """A text "a,b" of some choices in their own order, so that the same ones are the same value."""
    parts = [checked(name, part.strip(), choices) for part in value.split(",")]
    for part in parts:
        if parts.count(part) > 1:
            raise UserError(f"{name} names {part!r} twice, in {value!r}: say each once.")
    return ",".join(sorted(parts, key=choices.index))


def checked(name, value, kind, bounds=None):
    """The value, if it is of a kind (a type or a tuple of choices) and within bounds (a Range or None)."""
    if isinstance(kind, tuple):
        if value not in kind:
            meant = nearest(str(value), kind)
            raise UserError(f"{name} must be one of {', '.join(kind)}, not {value!r}{meant}.")
        return value
    if kind is float and type(value) is int and abs(value) < 2**53:  # beyond, another number would come out
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} must be of type {kind.__name__}, not {value!r}.")
    if bounds is not None and value not in bounds:
        raise UserError(f"{name} must be {bounds}, not {value}.")
    return value


def expanded(path):
    """A path (or a name) in which `~` and `$NAME` are what a shell makes of them.

    Raises:
        UserError: there is no such user or variable.
    """
    result = os.path.expandvars(os.path.expanduser(path))
    if re.match(r"~|.*\$\w|.*\$\{", result) and not os.path.lexists(result):
        raise UserError(f"'{path}': there is no such user or variable as in '{result}'; write the path out.")
    return result


def comments_of(config_class):
    """Setting -> the comment on its line in config.py, which is the one home of its description."""
    return dict(re.findall(r"^    (\w+) = .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE))


def unknown(name):
    """The error for a setting that does not exist."""
    return UserError(f"there is no setting '{name}'{hint(name, SETTINGS)}.")


def nearest(name, known):
    """What to add to a sentence about a name that is unknown: the one that was probably meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def hint(name, known):
    """The same of a setting or flag: by what it is called elsewhere, else by its spelling."""
    for here, names in ELSEWHERE.items():
        if name.lstrip("-").lower() in names.split():
            return f"; here it is {here}"
    return nearest(name, known)


# How other trainers call settings, where the spelling alone would lead astray.
ELSEWHERE = {
    "--phase2_learning_rate (Phase 1: --phase1_learning_rate)": "lr learning_rate max_lr",
    "--phase2_epochs (sweeps of Phase 1: --phase1_max_iterations)": "epochs num_epochs num_train_epochs",
    "--phase2_batch_size (Phase 1: --phase1_batch_size)": "batch_size per_device_train_batch_size",
    "--checkpoint_dir": "output_dir output out_dir save_dir model_dir",
    "--data_source": "dataset data dataset_name data_path train_file",
    "--max_seq_length": "block_size context_length max_length",
    "--context_dim": "hidden_size d_model n_embd",
    "--precision bf16 or fp16": "bf16 fp16 amp use_bfloat16",
    "--device cuda or --device cpu": "gpu cuda cpu no_cuda",
    "--grad_clip": "max_grad_norm",
    "--keep_last": "save_total_limit",
    "--max_minutes": "time_limit",
    "nothing, as a run goes on by itself (--no-load_checkpoint: anew)": "resume resume_from_checkpoint",
    "nothing, as a switch is --NAME or --no-NAME alone": "true false 1 0",
}
