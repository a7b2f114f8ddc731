"""Generation: the same logits as reading the whole text at once, greedy without chance, draws that the seed decides."""

import argparse
import contextlib
import fcntl
import io
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from config import ResidualConfig
from newllm.data.tokens import train_bpe
from newllm.errors import UserError
from newllm.evaluate import encode
from newllm.generate import generate
from newllm.models.baselines import build_model
from newllm.saving import trained
from newllm.saving.stop import Stopped, poll
from scripts import generate as script
from train import main as train

V, T = 40, 12


@pytest.fixture(params=["context", "window", "token", "gru", "lstm", "transformer"])
def model(request):
    config = ResidualConfig(
        model_type=request.param, context_dim=24, embed_dim=16, num_layers=2, max_seq_length=T
    )
    return build_model(config, V).eval()


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_text(model):
    """Logits after each token, as evaluation has them, for two texts at once."""
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    expected, state = model.logits(*encode(model, ids)), None
    for t in range(T):
        logits, state = model.advance(ids[:, t], state)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)


def test_greedy_is_the_likeliest_token_each_time(model):
    """Whatever the seed; longer than a sample, and the end of a text ends it."""
    found = list(generate(model, [1, 2], 3 * T, seed=0, temperature=0))
    assert found == list(generate(model, [1, 2], 3 * T, seed=1, temperature=0)) and len(found) == 3 * T
    state = None
    for token in (1, 2):
        logits, state = model.advance(torch.tensor([token]), state)
    assert found[0] == logits.argmax().item()
    assert list(generate(model, [1, 2], 3 * T, seed=0, temperature=0, eos_id=found[0])) == []


def test_the_seed_decides_the_draws_and_the_filters_narrow_them(model):
    """Same seed, same text; top_k = 1 and a tiny nucleus are greedy; all tokens are drawn without filters."""
    one, two, other = (list(generate(model, [1], 60, seed=seed)) for seed in (0, 0, 1))
    assert one == two != other and len(set(one)) > V // 3
    greedy = list(generate(model, [1], 20, seed=0, temperature=0))
    assert list(generate(model, [1], 20, seed=5, top_k=1)) == greedy
    assert list(generate(model, [1], 20, seed=5, top_p=1e-6)) == greedy
    assert list(generate(model, [1], 20, seed=5, temperature=1e-4)) == greedy


@pytest.mark.parametrize(
    "settings", [{}, {"freeze_context": True}, {"model_type": "gru"}], ids=["tuned", "frozen", "gru"]
)
def test_the_command_writes_with_what_was_trained(tiny_settings, tmp_path, capsys, monkeypatch, settings):
    """From a folder, a checkpoint and a model file, greedy the same; a conversation; a sentence where there is nothing."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True), **settings))
    folder = tiny_settings["checkpoint_dir"]
    capsys.readouterr()
    flags = ["--prompt", "User: hello", "--temperature", "0", "--max_tokens", "12", "--model_path"]
    script.main([*flags, folder])
    text = capsys.readouterr().out
    assert text.startswith("User: hello") and len(text) > len("User: hello\n")
    script.main([*flags, f"{folder}/model_best.pt"])
    assert capsys.readouterr().out == text
    (alone,) = Path(folder).glob("*/models/*.pth")
    alone = alone.rename(tmp_path / "alone.pth")
    with monkeypatch.context() as nothing_else:
        nothing_else.setattr("newllm.saving.trained.load_data", None)
        script.main([*flags, str(alone)])
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    script.main(["--chat", "--max_tokens", "5", "--model_path", folder])
    assert "User:" not in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no whole checkpoint"):
        script.main(["--model_path", str(empty)])
    real = trained.open_saved
    monkeypatch.setattr(
        trained, "open_saved", lambda path: (real(path)[0], real(path)[1] | {"stage": "untrained"})
    )
    with pytest.raises(UserError, match="has trained nothing yet"):
        script.main(["--model_path", folder])


@pytest.mark.parametrize(
    "flag, values, words",
    [
        ("temperature", ("nan", "inf", "-inf"), "temperature must be a finite number, not "),
        ("temperature", ("-1", "-1e-9"), "temperature must be >= 0, not "),
        ("temperature", ("hot", ""), "temperature must be of type float, not '"),
        ("top_k", ("-1",), "top_k must be >= 0, not -1"),
        ("top_p", ("0", "2", "-1"), "top_p must be > 0 and <= 1, not "),
        ("top_p", ("nan",), "top_p must be a finite number, not nan"),
        ("max_tokens", ("0", "-1"), "max_tokens must be >= 1, not "),
        ("max-tokens", ("1.5", "many"), "max_tokens must be of type int, not '"),
        ("seed", ("-1", "9" * 20), "seed must be >= 0 and <= "),
        ("seed", ("9" * 5000,), "seed must be of type int, not '9"),
        ("prompt", ("\udcff", "\ud83d"), "--prompt is not UTF-8 text: '"),
        ("temprature", ("1",), "unrecognized arguments: --temprature=1; see --help"),
    ],
)
def test_a_bad_flag_is_one_sentence(flag, values, words):
    """In the words that train.py has for its settings, before anything is loaded."""
    for value in values:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            script.main([f"--{flag}={value}"])
        assert "\n" not in str(caught.value)


class Talker:
    """A writer whose model says the same id for ever, or what it is given."""

    def __init__(self, ids=None):
        self.tokenizer = train_bpe(["hello there"] * 9, 300)
        self.options = argparse.Namespace(temperature=0, top_k=0, top_p=1, max_tokens=10**9, seed=0)
        self.model, self.ids = None, ids or itertools.repeat(self.tokenizer.encode("a")[0])

    write, pieces = script.Writer.write, script.Writer.pieces


@pytest.mark.parametrize("text", ["so \U0001f642", "Us", "a\nUser", "\nUser"])
def test_what_was_held_back_is_printed_at_the_end(monkeypatch, capsys, text):
    """Half a character as U+FFFD; what began like the end of an answer and was none."""
    talker = Talker()
    ids = talker.tokenizer.encode(text)
    for cut in (ids, ids[:-1]):
        monkeypatch.setattr(script, "generate", lambda *args, ids=cut, **options: iter(ids))
        assert (
            talker.write("hi", stop="\nUser:") == talker.tokenizer.decode(cut) == capsys.readouterr().out[:-1]
        )


def test_ctrl_c_ends_an_answer_and_sigterm_the_conversation(monkeypatch, capsys):
    """What was said so far belongs to the conversation; the next answer is heard."""

    def speak(number):
        def generate(*args, **options):
            yield talker.tokenizer.encode("a")[0]
            signal.raise_signal(number)
            while True:
                poll()
                yield talker.tokenizer.encode("b")[0]

        return generate

    talker = Talker()
    monkeypatch.setattr(script, "generate", speak(signal.SIGINT))
    script.chat(talker, ["one", "two"])
    assert capsys.readouterr().out.replace("b", "") == "a\na\n"
    monkeypatch.setattr(script, "generate", speak(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM"):
        script.chat(talker, ["one", "two"])
    monkeypatch.setattr(script, "generate", speak(signal.SIGINT))
    with pytest.raises(Stopped, match="SIGINT"):  # not a conversation
        talker.write("hi")


def of_a_terminal():
    """In a new process: the terminal is its own, and keys are heard even if the tests run in a background that hears none."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_the_prompt(keys):
    """Types keys where --chat waits for a line, in a terminal; (seconds until it has ended, status, what it said)."""
    code = (
        "from newllm.errors import exit_on_user_error\nfrom scripts import generate\n"
        "generate.Writer = lambda options: print('ready', flush=True)\n"
        "with exit_on_user_error():\n    generate.main(['--chat'])"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=of_a_terminal,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"ready" not in said:
        said += os.read(ours, 1000)
    time.sleep(0.3)
    os.write(ours, keys)
    started = time.monotonic()
    status = process.wait(timeout=60)
    with contextlib.suppress(OSError):  # nothing was said, and the other end is closed
        said += os.read(ours, 1000)
    os.close(ours)
    return time.monotonic() - started, status, said


def test_ctrl_c_and_ctrl_d_at_the_prompt_leave_at_once():
    """The first one; without a traceback or another line typed."""
    for keys, expected in ((b"\x03", 130), (b"\x04", 0)):
        seconds, status, said = at_the_prompt(keys)
        assert (status, b"Traceback" in said) == (expected, False) and seconds < 10, said
