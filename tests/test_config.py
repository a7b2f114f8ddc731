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
from helpers import ROOT, as_flags

from config import ResidualConfig
from newllm.config import ELSEWHERE, PRESETS, SETTINGS, Config, check_value, comments_of
from newllm.errors import UserError
from newllm.flags import numbers, parse_args

PATHS = {name for name, setting in SETTINGS.items() if setting.path}


def parse(*argv):
    return parse_args(ResidualConfig, list(argv))[0]


def test_every_setting_has_a_value_and_a_comment_and_is_valid():
    """config.py has one line per setting; its values are those of a run without flags."""
    comments, config = comments_of(ResidualConfig), ResidualConfig()
    assert set(comments) == set(SETTINGS) and all(comments.values())
    assert config.to_dict() == {name: vars(ResidualConfig)[name] for name in SETTINGS}
    assert config == parse()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_flag(name):
    """With underscores or dashes; a default keeps its type, a switch is turned on and off."""
    default, kind = getattr(ResidualConfig, name), SETTINGS[name].kind
    for value in (True, False) if kind is bool else (default,):
        flags = as_flags({name: value})
        for spelling in (flags, ["--" + flags[0][2:].replace("_", "-"), *flags[1:]]):
            config = parse(*spelling)
            assert getattr(config, name) == value and type(getattr(config, name)) is type(default)


def test_numbers_parse_in_the_usual_spellings():
    """Exponents and whole numbers for floats, digit groups for counts."""
    config = parse("--phase2_learning_rate", "1e-3", "--grad-clip=2", "--num_samples", "1_000")
    assert (config.phase2_learning_rate, config.grad_clip, config.num_samples) == (0.001, 2.0, 1000)


def test_help_lists_every_flag_with_its_comment(capsys):
    """--help works, percent signs in comments included, and ends with status 0."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, comment in comments_of(ResidualConfig).items():
        assert f"--{name}" in text and " ".join(comment.split()[:3]) in text
        assert (f"--{name}, --no-{name} " in text) == (SETTINGS[name].kind is bool)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--num-sample", "3"], ["--num_sample'", "--num_samples"]),
        (["stray"], ["stray"]),
        (["--dropout", "x"], ["dropout", "float", "x"]),
        (["--dropout", "0.96"], ["dropout", "0.95", "0.96"]),
        (["--grad_clip", "inf"], ["grad_clip", "inf"]),
        (["--num_samples", "2.0"], ["num_samples", "int", "2.0"]),
        (["--device", "cudaa"], ["device", "cudaa", "did you mean 'cuda'"]),
        (["--compile=true"], ["compile", "true"]),
        (["--freeze_context", "True"], ["'True'", "--NAME or --no-NAME alone"]),
        (["--num_tokens", "100"], ["num_tokens", "max_seq_length"]),
        (["--lr", "1e-3"], ["'--lr'", "--phase2_learning_rate", "--phase1_learning_rate"]),
        (["--epochs", "2"], ["--phase2_epochs", "--phase1_max_iterations"]),
        (["--output_dir", "x"], ["--checkpoint_dir"]),
        (["--resume", "auto"], ["by itself", "--no-load_checkpoint"]),
    ],
)
def test_a_wrong_command_line_gives_one_sentence_that_names_the_culprit(argv, parts):
    """No traceback of argparse: a UserError with the name, the value, and the nearest right name."""
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(num_sample=3), "num_sample'.*did you mean 'num_samples'"),
        (dict(lr=0.1), "'lr'.*here it is --phase2_learning_rate"),
        (dict(num_samples=True), "num_samples.*int.*True"),
        (dict(compile=1), "compile.*bool.*1"),
        (dict(dropout=False), "dropout.*float.*False"),
        (dict(init_scale=math.nan), "init_scale.*nan"),
        (dict(init_scale=10**400), "init_scale.*of type float"),
        (dict(dist_reg="covarience"), "dist_reg.*did you mean 'covariance'"),
        (dict(model_type="gru", phase="1"), "trains nothing"),
        (dict(model_type="lstm", freeze_context=True), "freeze_context has no contexts"),
        (dict(model_type="token", whiten_context=True), "whiten_context needs contexts"),
        (dict(model_type="gru", token_layers=0), "--token_layers 1"),
        (dict(context_adapter="lora", freeze_context=True), "contexts that train"),
        (dict(retrieval="ngram,cach"), "retrieval.*one of ngram, cache, knn, none, not 'cach'.*mean 'cache'"),
        (dict(retrieval=""), "retrieval must be one of ngram, .*not ''"),
        (dict(retrieval="ngram,"), "retrieval must be one of ngram, .*not ''"),
        (dict(retrieval="none,ngram"), "retrieval 'none' stands alone"),
        (dict(retrieval="ngram,knn,ngram"), "retrieval names 'ngram' twice"),
        (dict(retrieval=True), "retrieval.*str.*True"),
        (dict(retrieval_keys=""), "retrieval_keys must be one of hidden, .*not ''"),
        (dict(retrieval_keys="hiden"), "retrieval_keys.*did you mean 'hidden'"),
        (dict(retrieval_keys="none"), "retrieval_keys must be one of"),
        (dict(retrieval_keys="contexts", model_type="token"), "'token'.*has no contexts, use hidden or tok"),
        (dict(retrieval_keys="tokens,contexts", model_type="transformer"), "has no contexts"),
        (dict(retrieval_window=3), "retrieval_window must be >= 4 and <= 100000, not 3"),
        (dict(retrieval_window=10**6), "retrieval_window.*not 1000000"),
    ],
    ids=str,
)
def test_wrong_keywords_and_contradictions_are_one_sentence(given, sentence):
    """A bool is no number, a string no int; nothing that was asked for is passed over in silence."""
    with pytest.raises(UserError, match=f"^[^\n]*{sentence}[^\n]*$"):
        ResidualConfig(**given)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.bounds])
def test_bounds_are_closed_where_they_say_so_and_outside_is_refused(name):
    """The ends of every interval are allowed unless it says '>', and the next number beyond is not."""
    kind, bounds = SETTINGS[name].kind, SETTINGS[name].bounds
    step = 1 if kind is int else 1e-9
    inside, outside = [bounds.low + step * bounds.above], [bounds.low - step * (not bounds.above)]
    if bounds.high < math.inf:
        inside.append(bounds.high)
        outside.append(bounds.high + step)
    assert [check_value(name, kind(value)) for value in inside] == inside
    for value in outside:
        with pytest.raises(UserError, match=name):
            check_value(name, kind(value))


def test_several_of_some_choices_are_the_same_in_any_order():
    """So that they are the same run; spaces are no matter either."""
    config = ResidualConfig(retrieval="knn, ngram", retrieval_keys="tokens,contexts,hidden", model_type="gru")
    assert (config.retrieval, config.retrieval_keys) == ("ngram,knn", "hidden,contexts,tokens")
    assert config.looks_up == ["ngram", "knn"] and ResidualConfig(retrieval="none").looks_up == []
    assert not ResidualConfig(whiten_context=True, freeze_context=True).looks_up


def test_keyword_beats_preset_beats_file():
    """Precedence, by keyword and by flag alike."""
    for name, preset in PRESETS.items():
        config = ResidualConfig(preset=name)
        assert {key: getattr(config, key) for key in preset} == preset
    assert ResidualConfig().token_layers == ResidualConfig.token_layers != PRESETS["seed"]["token_layers"]
    assert ResidualConfig(preset="seed", token_layers=3).token_layers == 3
    assert parse("--token-layers", "3", "--preset", "seed").token_layers == 3


def test_num_tokens_sets_num_samples():
    """num_samples = num_tokens // max_seq_length when num_tokens > 0; a copy may have others."""
    assert ResidualConfig(num_tokens=100_000).num_samples == 781
    assert ResidualConfig(num_tokens=1000, max_seq_length=100, num_samples=7).num_samples == 10
    assert dataclasses.replace(ResidualConfig(num_tokens=1280), num_samples=7).num_samples == 7


def test_what_left_the_file_is_known():
    """`differences` has presets and derived values too, `given` what was said; a repeated default is none."""
    assert ResidualConfig(seed=ResidualConfig.seed).differences() == {}
    config = ResidualConfig(preset="seed", num_tokens=1280, dropout=0.3, seed=42)
    assert config.differences()["token_layers"] == (1, 0) and config.differences()["num_samples"] == (50, 10)
    assert config.given == {"preset": "seed", "num_tokens": 1280, "dropout": 0.3}
    assert dataclasses.replace(ResidualConfig(), dropout=0.5).given == {"dropout": 0.5}


def test_a_configuration_is_frozen_and_stored_whole():
    """An assignment names the line in config.py, the flag, the keyword; copies and stored ones are equal."""
    config = ResidualConfig(preset="seed", num_tokens=1280)
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
    with pytest.raises(UserError, match=r"'lr'.*phase2_learning_rate"):
        config.lr = 1
    assert error.value._render_traceback_() == [f"error: {error.value}"]
    assert list(config.to_dict()) == list(SETTINGS)
    assert ResidualConfig(**config.to_dict()) == config == pickle.loads(pickle.dumps(config))
    with pytest.raises(UserError, match="seed"):
        dataclasses.replace(config, seed=-1)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (dict(num_layer=3), "num_layer'.*did you mean 'num_layers'"),
        (dict(dropout=2.0), "dropout must be"),
        (dict(patience=None), "patience must be of type int"),
    ],
    ids=str,
)
def test_wrong_lines_of_the_file_are_refused(lines, sentence):
    """A misspelt one, one with a wrong value."""
    with pytest.raises(UserError, match=sentence):
        type("Wrong", (ResidualConfig,), lines)()


def test_what_an_earlier_version_trained_is_read_whatever_it_combined():
    """Settings in a saved file make the base class, which refuses no combination: they were trained."""
    assert Config(**ResidualConfig().to_dict() | dict(model_type="gru", token_layers=0)).token_layers == 0


def test_names_of_elsewhere_lead_to_settings():
    """What is offered in place of another name exists, and no setting is taken for a foreign name."""
    for here, names in ELSEWHERE.items():
        assert not set(names.split()) & set(SETTINGS)
        named = set(re.findall(r"--(?:no-)?([a-z]\w+)(?!-)\b", here))
        assert named <= set(SETTINGS) and (named or here.startswith("nothing"))


@pytest.mark.parametrize(
    ("pasted", "command", "says"),
    [
        ("num_samples = 78", ["train.py"], "'num_samples' outside of the class ResidualConfig"),
        ("config = ResidualConfig(num_samples=78)", ["scripts/status.py"], "'config' outside of the class"),
        ("config = ResidualConfig()\nconfig.num_samples = 78", ["scripts/export.py"], "--num_samples 78"),
        ("ResidualConfig.num_sample = 78", ["-c", "import config; config.ResidualConfig()"], "'num_samples'"),
    ],
)
def test_what_config_py_holds_outside_of_its_class_is_not_passed_over(tmp_path, pasted, command, says):
    """Whatever reads the file stops with one sentence."""
    if command[0] != "-c":
        command = [shutil.copy(ROOT / command[0], tmp_path / "command.py")]
    (tmp_path / "config.py").write_text((ROOT / "config.py").read_text() + f"\n\n{pasted}\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 2 and re.fullmatch(f"error: [^\n]*{says}[^\n]*\n", done.stderr), done.stderr


def test_every_folder_and_file_is_a_path():
    """Also a setting that is added later."""
    folders = {name for name in SETTINGS if name.endswith(("_dir", "_path", "_file", "_folder"))}
    assert folders | {"data_source", "tokenizer", "embeddings"} == PATHS


@pytest.mark.parametrize("name", sorted(PATHS))
def test_home_and_variables_in_a_path_are_what_a_shell_makes_of_them(monkeypatch, tmp_path, name):
    """From a flag, a notebook and config.py; what stands for nothing is a sentence, unless it is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    for given in ("~/c", "$HOME/c", "${HOME}/c"):
        file = type("ResidualConfig", (ResidualConfig,), {name: given})
        for config in (ResidualConfig(**{name: given}), parse(f"--{name}={given}"), file()):
            assert getattr(config, name) == str(tmp_path / "c")
        assert name not in file().differences()
    assert getattr(ResidualConfig(**{name: "$PLACE/c"}), name) == "here/c"
    for given in ("$NOWHERE/c", "${NOWHERE}", "~nobody-here/c"):
        with pytest.raises(UserError, match="no such user or variable"):
            ResidualConfig(**{name: given})
    (tmp_path / "$NOWHERE").mkdir()
    assert getattr(ResidualConfig(**{name: "$NOWHERE"}), name) == "$NOWHERE"


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("status", ["--checkpoint_dir", "~/c"]),
        ("report", ["--checkpoint_dir", "$HOME/c"]),
        ("export", ["--checkpoint_dir", "~/c"]),
        ("evaluate", ["~/c"]),
        ("generate", ["--model-path=~/c"]),
    ],
)
def test_commands_expand_paths_and_refuse_unknown_flags(monkeypatch, tmp_path, script, arguments):
    """What is missing is named below home; no beginning of a flag stands for it, as in train.py."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"scripts.{script}").main
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "c"))):
        main(arguments)
    for flag in ("--nonsense", "--hel", "--checkpoint_di=x"):
        with pytest.raises(UserError, match=r"^[^\n]*see --help"):
            main([flag])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "0", "195,-3", "195;1953", "1.5", "many", "195,"])
def test_numbers_that_are_none_are_refused_in_one_sentence(text):
    """Positive and whole; the sentence shows what was given and what would do. Others come in order."""
    assert numbers("ladder")("1953,195, 3_906") == [195, 1953, 3906]
    with pytest.raises(UserError, match=f"--ladder takes .* like 195,1953,3906, not '{text}'"):
        numbers("ladder")(text)
