"""Generation: the logits of reading the whole text at once, greedy without chance, draws by the seed."""

import contextlib
import fcntl
import io
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
from newllm.errors import UserError
from newllm.evaluate import encode
from newllm.generate import generate
from newllm.models.baselines import build_model
from newllm.saving.stop import Stopped, poll
from newllm.saving.trained import open_saved
from scripts import generate as script
from train import main as train

V, T = 40, 12


@pytest.fixture(params=["context", "window", "token", "gru", "lstm", "transformer"])
def model(request):
    sizes = dict(context_dim=24, embed_dim=16, num_layers=2, max_seq_length=T)
    return build_model(ResidualConfig(model_type=request.param, **sizes), V).eval()


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_text(model):
    """Logits after each token, as evaluation has them, for two texts at once."""
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    expected, state = model.logits(*encode(model, ids)), None
    for t in range(T):
        *place, state = model.advance(ids[:, t], state)
        logits = model.logits(*place)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)


def test_greedy_is_the_likeliest_token_each_time(model):
    """Whatever the seed; longer than a sample, and the end of a text ends it."""
    text = list(generate(model, [1, 2], 3 * T, seed=0, temperature=0))
    assert text == list(generate(model, [1, 2], 3 * T, seed=1, temperature=0)) and len(text) == 3 * T
    state = None
    for token in (1, 2):
        *place, state = model.advance(torch.tensor([token]), state)
        logits = model.logits(*place)
    assert text[0] == logits.argmax().item()
    assert list(generate(model, [1, 2], 3 * T, seed=0, temperature=0, eos_id=text[0])) == []


def test_the_seed_decides_the_draws_and_the_filters_narrow_them(model):
    """Same seed, same text; top_k = 1 and a tiny nucleus are greedy; all tokens are drawn without filters."""
    one, two, other = (list(generate(model, [1], 60, seed=seed)) for seed in (0, 0, 1))
    assert one == two != other and len(set(one)) > V // 3
    greedy = list(generate(model, [1], 20, seed=0, temperature=0))
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        assert list(generate(model, [1], 20, seed=5, **narrow)) == greedy


def test_the_command_writes_with_what_was_trained(tiny_settings, tmp_path, capsys, monkeypatch):
    """From a folder, a checkpoint, a file, greedy the same; a conversation; a sentence where nothing is."""
    trained = Path(tiny_settings["checkpoint_dir"])
    train(
        ResidualConfig(**tiny_settings | dict(artifacts=True, untrained_control=False, freeze_context=True))
    )
    capsys.readouterr()
    [file] = trained.glob("*/models/*.pth")
    script.main(["--prompt=hello", f"--model_path={trained / 'model_phase1.pt'}"])
    assert "model_phase1.pt has not begun Phase 2, so it predicts by how frequent" in capsys.readouterr().err
    texts = []
    for path in (trained, trained / "model_best.pt", file):
        if path is file:
            monkeypatch.setattr("newllm.saving.trained.load_data", None)  # it needs nothing else
        script.main(["--prompt=User: hello", "--temperature=0", "--max_tokens=12", f"--model_path={path}"])
        texts.append(capsys.readouterr().out)
    assert (
        texts[0].startswith("User: hello") and len(texts[0]) > len("User: hello\n") and len(set(texts)) == 1
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    script.main(["--chat", "--max_tokens", "5", "--model_path", str(file)])
    assert "User:" not in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint"):
        script.main(["--model_path", str(tmp_path / "empty")])
    folder, saved = open_saved(trained)
    monkeypatch.setattr(
        "newllm.saving.trained.open_saved", lambda path: (folder, saved | {"stage": "untrained"})
    )
    with pytest.raises(UserError, match="has trained nothing yet"):
        script.main(["--model_path", str(trained)])


@pytest.mark.parametrize(
    "flag, values, words",
    [
        ("temperature", ("nan",), "temperature must be >= 0, not "),
        ("temperature", ("-1e-9",), "temperature must be >= 0, not "),
        ("top_k", ("-1",), "top_k must be >= 0, not -1"),
        ("top_p", ("0", "2"), "top_p must be > 0 and <= 1, not "),
        ("max-tokens", ("0",), "max_tokens must be >= 1, not "),
        ("max_tokens", ("1.5", "many"), "max_tokens must be of type int, not '"),
        ("seed", ("-1", "9" * 20), "seed must be >= 0 and <= "),
        ("prompt", ("\udcff",), "--prompt is not UTF-8 text: '"),
        ("temprature", ("1",), "unrecognized arguments: --temprature=1; see --help"),
    ],
)
def test_a_bad_flag_is_one_sentence(flag, values, words):
    """In the words that train.py has for its settings, before anything is loaded."""
    for value in values:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            script.main([f"--{flag}={value}"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        (["so", "\ufffd"], "so\ufffd"),
        (["a\n", "Use", "r"], "a\nUser"),
        (["hi\n", "User", ": x", "more"], "hi"),
        (["hi\n\nUser:"], "hi\n"),
    ],
)
def test_an_answer_ends_before_the_next_turn_and_loses_nothing(capsys, pieces, answer):
    """What began like the end of an answer and was none is printed at the end."""
    assert script.write(pieces, script.TURN) == answer == capsys.readouterr().out[:-1]


def test_ctrl_c_ends_an_answer_and_sigterm_the_conversation(capsys):
    """What was said so far belongs to the conversation; the next answer is heard."""
    heard = []

    def speaking(number):
        def continuation(history):
            heard.append(history)
            yield "a"
            signal.raise_signal(number)
            while True:
                poll()
                yield "b"

        return continuation

    script.chat(speaking(signal.SIGINT), ["one", "two"])
    assert capsys.readouterr().out == "a\na\n" and heard[1].startswith("User: one\nAssistant:a\nUser: two")
    with pytest.raises(Stopped, match="SIGTERM"):
        script.chat(speaking(signal.SIGTERM), ["one", "two"])
    with pytest.raises(Stopped, match="SIGINT"):  # not a conversation
        script.write(speaking(signal.SIGINT)("hi"))


def of_a_terminal():
    """In a new process: the terminal is its own, and keys are heard even where the tests hear none."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_at_the_prompt_leaves_at_once():
    """The first one, where --chat waits for a line in a terminal; without another line."""
    code = (
        "from newllm.errors import exit_on_user_error\nfrom scripts import generate\n"
        "generate.open_model = lambda *options: print('ready', flush=True) or (None, None, None)\n"
        "with exit_on_user_error():\n    generate.main(['--chat', '--retrieval=none'])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=theirs,
        stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=of_a_terminal,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"ready" not in said:
        said += os.read(ours, 1000)
    time.sleep(0.3)
    os.write(ours, b"\x03")
    started = time.monotonic()
    status = process.wait(timeout=60)
    with contextlib.suppress(OSError):  # nothing was said, and the other end is closed
        said += os.read(ours, 1000)
    os.close(ours)
    assert status == 130 and b"Traceback" not in said and time.monotonic() - started < 10, said
