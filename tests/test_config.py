"""The configuration: one line per setting, errors that name the setting, a fixed order of precedence."""

import dataclasses
import importlib
import math
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from config import ResidualConfig
from newllm.config import ELSEWHERE, PLACES, PRESETS, Config, check_value, comments_of, settings_of
from newllm.errors import UserError
from newllm.flags import parse_args

FIELDS = settings_of(Config)
BOOLEANS = [name for name, setting in FIELDS.items() if setting.kind is bool]


def parse(*argv):
    return parse_args(ResidualConfig, list(argv))[0]


def flags_for(name, value, spelling):
    """Command line that sets one field to the value."""
    if FIELDS[name].kind is bool:
        return [f"--{spelling}" if value else f"--no-{spelling}"]
    return [f"--{spelling}", str(value)]


def test_every_field_has_a_value_and_a_comment():
    """config.py has one line per field, and each says what it is."""
    comments = comments_of(ResidualConfig)
    for name in FIELDS:
        assert name in vars(ResidualConfig), name
        assert comments.get(name, "").strip(), name
    assert set(comments) == set(FIELDS)


def test_every_default_is_valid_and_of_its_declared_type():
    """The values of config.py are the values of a run without flags."""
    config = ResidualConfig()
    assert config.to_dict() == {name: getattr(ResidualConfig, name) for name in FIELDS}
    for name, setting in FIELDS.items():
        assert isinstance(setting.kind, tuple) or type(getattr(config, name)) is setting.kind, name
    assert config == parse()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag_that_parses_its_default_back(name):
    """Given on the command line, with underscores or dashes, a default changes nothing and keeps its type."""
    default = getattr(ResidualConfig, name)
    for spelling in dict.fromkeys([name, name.replace("_", "-")]):
        config = parse(*flags_for(name, default, spelling))
        assert config == ResidualConfig()
        assert type(getattr(config, name)) is type(default)


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_switch_on_and_off(name):
    """`--NAME` and `--no-NAME` set the field whatever its default, with underscores or dashes."""
    for spelling in dict.fromkeys([name, name.replace("_", "-")]):
        for value in (True, False):
            assert getattr(parse(*flags_for(name, value, spelling)), name) is value


def test_numbers_parse_in_the_usual_spellings():
    """Exponents and whole numbers for floats, digit groups for counts."""
    assert parse("--phase2_learning_rate", "1e-3").phase2_learning_rate == 0.001
    assert parse("--grad-clip=2").grad_clip == 2.0
    assert parse("--num_samples", "1_000").num_samples == 1000
    assert type(ResidualConfig(grad_clip=2).grad_clip) is float


def test_help_lists_every_flag_with_its_comment(capsys):
    """--help works, percent signs in comments included, and ends with status 0."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, comment in comments_of(ResidualConfig).items():
        assert f"--{name}" in text
        assert " ".join(comment.split()[:3]) in text
        assert (f"--{name}, --no-{name} " in text) == (name in BOOLEANS)


def test_extra_flags_of_a_command_are_returned_apart():
    """A command's own flags do not become settings."""
    config, namespace = parse_args(
        ResidualConfig,
        ["--steps", "3", "--seed", "7"],
        extra=lambda parser: parser.add_argument("--steps", type=int),
    )
    assert (namespace.steps, config.seed) == (3, 7)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--num-sample", "3"], ["--num_sample'", "--num_samples"]),
        (["stray"], ["stray"]),
        (["--dropout"], ["dropout"]),
        (["--dropout", "x"], ["dropout", "float", "x"]),
        (["--dropout", "0.96"], ["dropout", "0.95", "0.96"]),
        (["--dropout", "nan"], ["dropout", "nan"]),
        (["--grad_clip", "inf"], ["grad_clip", "inf"]),
        (["--grad_clip", "0"], ["grad_clip", "> 0"]),
        (["--num_samples", "2.0"], ["num_samples", "int", "2.0"]),
        (["--num_samples", "0"], ["num_samples", ">= 1"]),
        (["--device", "cudaa"], ["device", "cudaa", "did you mean 'cuda'"]),
        (["--preset", "sed"], ["preset", "did you mean 'seed'"]),
        (["--compile=true"], ["compile", "true"]),
        (["--num_tokens", "100"], ["num_tokens", "100", "max_seq_length", "128"]),
        (["--lr", "1e-3"], ["'--lr'", "--phase2_learning_rate", "--phase1_learning_rate"]),
        (["--epochs", "2"], ["--phase2_epochs", "--phase1_max_iterations"]),
        (["--output_dir", "x"], ["--checkpoint_dir"]),
        (["--resume", "auto"], ["by itself", "--no-load_checkpoint"]),
        (["--dataset", "x"], ["--data_source"]),
        (["--max_length", "9"], ["--max_seq_length"]),
        (["--bf16"], ["--precision bf16"]),
        (["--compile", "False"], ["'False'", "--no-compile"]),
        (["--freeze_context", "True"], ["'True'", "--freeze_context alone"]),
        (["--no-compile=1"], ["'1'", "--compile alone", "--no-compile"]),
    ],
)
def test_a_wrong_command_line_gives_one_sentence_that_names_the_culprit(argv, parts):
    """No exit, no traceback of argparse: a UserError with the name, the value, and the nearest right name."""
    with pytest.raises(UserError) as error:
        parse(*argv)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"num_sample": 3}, ["num_sample'", "did you mean 'num_samples'"]),
        ({"num_samples": "3"}, ["num_samples", "int", "'3'"]),
        ({"num_samples": True}, ["num_samples", "int", "True"]),
        ({"num_samples": 3.0}, ["num_samples", "int", "3.0"]),
        ({"compile": 1}, ["compile", "bool", "1"]),
        ({"dropout": False}, ["dropout", "float", "False"]),
        ({"dropout": 0.951}, ["dropout", ">= 0", "0.95"]),
        ({"vocab_size": 256}, ["vocab_size", "257", "256"]),
        ({"val_quick_frac": 0.0}, ["val_quick_frac", "> 0"]),
        ({"init_scale": math.nan}, ["init_scale", "nan"]),
        ({"dist_reg": "covarience"}, ["dist_reg", "did you mean 'covariance'"]),
        ({"lr": 0.1}, ["'lr'", "here it is phase2_learning_rate"]),
    ],
)
def test_a_wrong_keyword_gives_one_sentence_that_names_the_culprit(given, parts):
    """The same checks for keywords; a bool is no number and a string is no int."""
    with pytest.raises(UserError) as error:
        ResidualConfig(**given)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n, setting in FIELDS.items() if setting.bounds])
def test_bounds_are_closed_where_they_say_so_and_outside_is_refused(name):
    """The ends of every interval are allowed unless it says '>', and the next number beyond is not."""
    kind, bounds = FIELDS[name].kind, FIELDS[name].bounds
    step = 1 if kind is int else 1e-9
    low, high = kind(bounds.low), bounds.high
    if bounds.above:
        assert check_value(name, low + step) == low + step
        outside = [low]
    else:
        assert check_value(name, low) == low
        outside = [low - step]
    if high < math.inf:
        assert check_value(name, kind(high)) == high
        outside.append(kind(high) + step)
    for value in outside:
        with pytest.raises(UserError, match=name):
            check_value(name, value)


def test_keyword_beats_preset_beats_file():
    """Precedence, by keyword and by flag alike."""
    seed = PRESETS["seed"]
    assert seed["token_layers"] != ResidualConfig.token_layers
    assert ResidualConfig().token_layers == ResidualConfig.token_layers
    assert ResidualConfig(preset="seed").token_layers == seed["token_layers"]
    assert ResidualConfig(preset="seed", token_layers=3).token_layers == 3
    assert parse("--preset", "seed").token_layers == seed["token_layers"]
    assert parse("--token-layers", "3", "--preset", "seed").token_layers == 3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_only_valid_settings(name):
    """Every preset makes a configuration, and what it sets is in effect."""
    config = ResidualConfig(preset=name)
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_num_tokens_sets_num_samples():
    """num_samples = num_tokens // max_seq_length when num_tokens > 0; 0 leaves it alone."""
    assert ResidualConfig(num_tokens=100_000).num_samples == 781
    assert ResidualConfig(num_tokens=128).num_samples == 1
    assert ResidualConfig(num_tokens=1000, max_seq_length=100, num_samples=7).num_samples == 10
    assert ResidualConfig(num_tokens=0, num_samples=7).num_samples == 7


def test_differences_are_the_settings_that_left_the_file():
    """{name: (file's value, value in effect)}, presets and derived values included; a repeated default is none."""
    assert ResidualConfig(seed=ResidualConfig.seed).differences() == {}
    assert ResidualConfig(seed=7, dropout=0.3).differences() == {"seed": (42, 7), "dropout": (0.0, 0.3)}
    assert ResidualConfig(num_tokens=1280).differences() == {"num_samples": (50, 10)}
    assert ResidualConfig(preset="seed").differences()["token_layers"] == (1, 0)


def test_a_configuration_is_frozen():
    """No setting can be assigned or deleted; `replace` makes a changed, checked copy and leaves the old one."""
    config = ResidualConfig()
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.seed
    assert dataclasses.replace(config, seed=7).differences() == {"seed": (42, 7)}
    assert config.seed == 42
    with pytest.raises(UserError, match="seed"):
        dataclasses.replace(config, seed=-1)


def test_to_dict_round_trips():
    """A configuration stored as a dictionary comes back equal, derived values included."""
    config = ResidualConfig(preset="seed", num_tokens=1280, dropout=0.5)
    assert list(config.to_dict()) == list(FIELDS)
    assert ResidualConfig(**config.to_dict()) == config


def test_a_subclass_with_an_unknown_attribute_fails_at_class_creation():
    """A misspelt line in config.py is an error with the right name, not a silently ignored setting."""
    with pytest.raises(UserError, match=r"num_layer'.*did you mean 'num_layers'"):

        class Misspelt(Config):
            num_layer = 3


def test_a_subclass_without_a_line_for_a_field_says_which():
    """A setting without a value is named when a configuration is made."""
    values = {name: getattr(ResidualConfig, name) for name in FIELDS if name != "patience"}
    with pytest.raises(UserError, match="patience"):
        type("Incomplete", (Config,), values)()


def test_a_wrong_value_in_the_file_is_refused():
    """Values of config.py are checked like keywords."""

    class Wrong(ResidualConfig):
        dropout = 2.0

    with pytest.raises(UserError, match="dropout"):
        Wrong()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(model_type="gru", phase="1"), "learns none"),
        (dict(model_type="lstm", freeze_context=True), "has no context"),
        (dict(model_type="token", whiten_context=True), "no context to whiten"),
        (dict(model_type="gru", token_layers=0), "--token_layers 1"),
        (dict(model_type="window", preset="seed"), "--token_layers 1"),
        (dict(phase="1", phase1_max_iterations=0), "trains nothing"),
        (dict(context_adapter="lora", freeze_context=True), "leave it out with freeze_context"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, match):
    """A setting that would be passed over in silence is said."""
    with pytest.raises(UserError, match=match):
        ResidualConfig(**settings)


def test_what_an_earlier_version_trained_is_read_whatever_it_combined():
    """Settings in a saved file make the base class, which refuses no combination: they were trained."""
    assert Config(**ResidualConfig().to_dict() | dict(model_type="gru", token_layers=0)).token_layers == 0


def test_names_of_elsewhere_lead_to_settings():
    """What is offered in place of another name exists, and no setting is taken for a foreign name."""
    assert not set(ELSEWHERE) & set(FIELDS)
    for here in ELSEWHERE.values():
        named = [
            word.strip("(),:").removeprefix("--").removeprefix("no-") for word in here.split() if "--" in word
        ]
        assert set(named) <= set(FIELDS) and (named or here.startswith("nothing")), here


def test_an_assignment_names_the_three_ways():
    """The line in config.py, the flag, the keyword; an unknown name is answered with the known one."""
    config = ResidualConfig()
    for name, value, flag in (
        ("num_samples", 78, "--num_samples 78"),
        ("compile", True, "--compile"),
        ("save_checkpoint", False, "--no-save_checkpoint"),
        ("data_source", "my file", "--data_source 'my file'"),
    ):
        with pytest.raises(UserError) as error:
            setattr(config, name, value)
        for part in (f"the flag {flag},", "config.py", f"ResidualConfig({name}={value!r})"):
            assert part in str(error.value)
        assert getattr(config, name) == getattr(ResidualConfig, name)
    with pytest.raises(UserError, match=r"'lr'.*phase2_learning_rate"):
        config.lr = 1
    assert error.value._render_traceback_() == [f"error: {error.value}"]


def python(folder, *command):
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("pasted", "says"),
    [
        ("num_samples = 78", "'num_samples' outside of the class ResidualConfig"),
        ("checkpoint_dir = 'x'", "'checkpoint_dir' outside of the class"),
        ("config = ResidualConfig(num_samples=78)", "a configuration, 'config', that nothing reads"),
        ("config = ResidualConfig()\nconfig.num_samples = 78", "--num_samples 78"),
        ("ResidualConfig.num_sample = 78", "did you mean 'num_samples'"),
        ("class Mine(Config):\n    num_sample = 78", "did you mean 'num_samples'"),
    ],
)
def test_what_config_py_holds_outside_of_its_class_is_not_passed_over(tmp_path, pasted, says):
    """Whatever reads the file stops with one sentence."""
    (tmp_path / "config.py").write_text((ROOT / "config.py").read_text() + f"\n\n{pasted}\n")
    done = python(tmp_path, "-c", "from config import ResidualConfig; ResidualConfig()")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["train.py", "scripts/status.py", "scripts/export.py", "scripts/generate.py"]
)
def test_every_command_that_reads_config_py_looks_for_what_lies_outside(tmp_path, command):
    """Those that only take the folder from it too."""
    shutil.copy(ROOT / command, tmp_path / "command.py")
    (tmp_path / "config.py").write_text((ROOT / "config.py").read_text() + "\ncheckpoint_dir = 'x'\n")
    done = python(tmp_path, "command.py")
    assert done.returncode == 2 and "'checkpoint_dir' outside of the class" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_settings_given_are_those_of_flags_and_keywords():
    """A copy has those of its original and what differs from the file, but not what a preset or num_tokens brought."""
    assert parse("--num_samples", "50", "--no-compile").given == {"num_samples": 50, "compile": False}
    config = ResidualConfig(num_tokens=1280, seed=42, preset="seed")
    assert config.given == {"num_tokens": 1280, "seed": 42, "preset": "seed"}
    copy = dataclasses.replace(config, dropout=0.5)
    assert copy.given == config.given | {"dropout": 0.5} and "given" not in copy.to_dict()
    assert pickle.loads(pickle.dumps(copy)).given == copy.given
    assert ResidualConfig(**ResidualConfig(dropout=0.5).to_dict()).given == {"dropout": 0.5}


PATHS = ("data_source", "tokenizer", "embeddings", "cache_dir", "checkpoint_dir", "backup_dir")


@pytest.mark.parametrize("name", PATHS)
def test_home_and_variables_in_a_path_are_what_a_shell_makes_of_them(monkeypatch, tmp_path, name):
    """From a flag, a notebook and config.py; what stands for nothing is a sentence, unless it is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    for given in ("~/c", "$HOME/c", "${HOME}/c"):
        file = type("ResidualConfig", (ResidualConfig,), {name: given})
        assert getattr(ResidualConfig(**{name: given}), name) == str(tmp_path / "c")
        assert getattr(parse_args(ResidualConfig, [f"--{name}={given}"])[0], name) == str(tmp_path / "c")
        assert getattr(file(), name) == str(tmp_path / "c") and name not in file().differences()
    assert getattr(ResidualConfig(**{name: "$PLACE/c"}), name) == "here/c"
    for given in ("$NOWHERE/c", "${NOWHERE}", "~nobody-here/c"):
        with pytest.raises(UserError, match="stands for nothing here"):
            ResidualConfig(**{name: given})
    (tmp_path / "$NOWHERE").mkdir()
    assert getattr(ResidualConfig(**{name: "$NOWHERE"}), name) == "$NOWHERE"


def test_every_path_is_one_in_which_home_is_expanded():
    """Also a setting that is added later."""
    assert (
        set(PATHS)
        == PLACES
        >= {name for name in FIELDS if name.endswith(("_dir", "_path", "_file", "_folder"))}
    )


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("status", ["--checkpoint_dir", "~/c"]),
        ("report", ["--checkpoint_dir", "$HOME/c"]),
        ("export", ["--checkpoint_dir", "~/c"]),
        ("evaluate", ["~/c"]),
        ("generate", ["--model-path=~/c"]),
        ("link_drive", ["--drive", "~/c/d"]),
    ],
)
def test_paths_of_the_commands_are_expanded_too(monkeypatch, tmp_path, script, arguments):
    """The sentence about what is missing names the folder below home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"scripts.{script}")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "c"))):
        module.main(**vars(module.parse(arguments))) if script == "link_drive" else module.main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["status", "report", "export", "evaluate", "generate"])
def test_an_unknown_flag_of_a_command_is_one_sentence(script):
    """Written out, as in train.py: no beginning of a flag stands for it."""
    for flag in ("--nonsense", "--hel", "--checkpoint_di=x"):
        with pytest.raises(UserError, match="see --help") as caught:
            importlib.import_module(f"scripts.{script}").main([flag])
        assert "\n" not in str(caught.value)
