"""Proof of exact resume: small runs are killed again and again and must end as if nothing had happened.

    KILLS=100 python3 -m pytest tests/saving/test_kills.py -n 0 -s

KILLS is the number of kills at random moments, contexts frozen and fine-tuned by turns; with 100 or more the kills at
operations on files come at every one of them, else at some. Every kill is SIGKILL. A killed run is started again by the same
settings and must go on from its last complete save, leave no temporary file, and end with the weights, metrics and histories
of a run that nobody touched, bit for bit.
"""

import copy
import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch
from kills import KILLED, LATEST, LONGEST, SAVED, assert_clean, assert_equal, difference, output_of, train_in

from newllm.saving.files import Corrupt, load_sealed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is forked")
KILLS = int(os.environ.get("KILLS", "12"))
STRIDE, CHANGE_STRIDE = (1, 1) if KILLS >= 100 else (150, 16)  # between operations at which a run is killed
SETTINGS = dict(
    tokenizer="bpe", vocab_size=300, val_samples=4, max_seq_length=16, context_dim=16, embed_dim=16, num_layers=1,
    dropout=0.3, phase1_min_converged_ratio=1.0, dist_reg_weight=1.0, context_noise=0.1, val_quick_every_n_batches=2,
    precision="fp32", device="cpu", save_every_n_batches=3, save_min_seconds=0.0, save_every_minutes=0.0, artifacts=False,
)  # fmt: skip
LONG = dict(num_samples=20, min_batches=20, phase1_max_iterations=4, phase2_epochs=3)
SHORT = dict(num_samples=4, min_batches=4, phase1_max_iterations=1, phase2_epochs=2)
RUNS = {
    "frozen": LONG | {"freeze_context": True},
    "fine-tuned": LONG,
    "short": SHORT,  # trains a head on frozen contexts too, in its untrained stage
    "other": SHORT | {"phase2_learning_rate": 0.01, "num_samples": 6},  # shares nothing with the short one
    "third": SHORT | {"context_lr_scale": 0.5},  # takes Phase 1 and the untrained row from the short one
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function: kind of a run -> (settings, folder of a run that nobody touched, seconds it took)."""
    scratch = tmp_path_factory.mktemp("alone")
    source = random.Random(0)
    words = ["a", "bad", "dot", "kin", "lust", "move", "born", "dawn", "kiln", "lorn", "best"]
    texts = [" ".join(source.choices(words, k=20)) for _ in range(60)]
    corpus = scratch / "dialogues.txt"
    corpus.write_text("\n\n".join(f"User: {text[:30]}\nAssistant: {text[30:]}" for text in texts))
    made = {}

    def run(kind):
        if kind not in made:
            settings, folder = SETTINGS | RUNS[kind] | {"data_source": str(corpus)}, scratch / kind
            folder.mkdir()
            started = time.monotonic()
            assert train_in(folder, settings) == 0, output_of(folder)
            made[kind] = settings, folder, time.monotonic() - started
        return made[kind]

    return run


def survive(folder, settings, expected, lives):
    """Kill a new run once for each of its lives, let it come to its end, and compare that with the run nobody touched.

    Args:
        lives: for each kill (seconds until it, operation at which the child kills itself or 0).

    Returns:
        How often it was killed. It may end before all its lives are used.
    """
    kills = 0
    for seconds, kill_at in lives:
        status = train_in(folder, settings, kill_at, seconds)
        if status != -signal.SIGKILL:
            break
        kills += 1
    else:
        status = restart(folder, settings)
    assert status == 0, output_of(folder)
    assert_equal(folder / "checkpoints", expected / "checkpoints")
    assert_clean(folder)
    shutil.rmtree(folder)
    return kills


def restart(folder, settings):
    """Start a killed run again: it must have lost no complete save, and go on from the last one. Returns its exit status."""
    before = output_of(folder)
    try:
        found = load_sealed(folder / "checkpoints" / LATEST)
    except FileNotFoundError:
        found = {"save_number": 0}
    number, saves = found["save_number"], before.count(SAVED)
    assert number >= saves, f"{saves} saves were complete, but the checkpoint is number {number}"
    status = train_in(folder, settings)
    went_on = not number or f"(save {number}, {found['saved_at']})" in output_of(folder)[len(before) :]
    assert went_on, f"it did not go on from its save {number} ({found['epoch']})"
    return status


def test_runs_killed_at_random_moments_end_equal(alone, tmp_path):
    """In all stages, several times each run."""
    source, left, runs, started = random.Random(0), KILLS, 0, time.monotonic()
    while left:
        settings, expected, seconds = alone(("frozen", "fine-tuned")[runs % 2])
        share = min(left, KILLS // 2)
        lives = [
            (seconds * source.random() ** 2, 0) for _ in range(share)
        ]  # squared: often soon after a restart
        (tmp_path / str(runs)).mkdir()
        kills = survive(tmp_path / str(runs), settings, expected, lives)
        left, runs = left - kills, runs + 1
    print(
        f"\n{KILLS} kills at random moments: {KILLS}/{KILLS} died by SIGKILL and resumed; {runs}/{runs} runs ended"
    )
    print(f"equal bit for bit; {time.monotonic() - started:.0f} s")


def test_a_run_killed_at_an_operation_on_its_files_ends_equal(alone, tmp_path):
    """A new run at the first operation, another at the second, or at some of them, until one comes to its end."""
    settings, expected, _ = alone("short")
    for number in itertools.count(1, STRIDE):
        (tmp_path / str(number)).mkdir()
        if not survive(tmp_path / str(number), settings, expected, [(LONGEST, number)]):
            break
    count = (number - 1) // STRIDE
    print(f"\n{count} operations: {count}/{count} died by SIGKILL, resumed and ended equal bit for bit")


@pytest.mark.parametrize("kind", ["third", "short"])
def test_a_change_of_runs_killed_at_an_operation_loses_neither(alone, tmp_path, kind):
    """From a folder with two complete runs to a third one, and back to the earlier: all end equal, in either order."""
    kinds = ["short", "other", kind]
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for earlier in kinds[:2]:
        assert train_in(prepared, alone(earlier)[0]) == 0
    for number in itertools.count(1, CHANGE_STRIDE):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        (folder / "output.txt").unlink()
        killed = train_in(folder, alone(kind)[0], number) == -signal.SIGKILL
        again = [kind, "other", "short"] if number % 2 else ["other", kind, "short"]
        top = load_sealed(folder / "checkpoints" / LATEST)["run_id"]  # whole at every instant
        for name in dict.fromkeys(again):
            settings, expected, _ = alone(name)
            assert train_in(folder, settings) == 0, output_of(folder)
            assert_equal(folder / "checkpoints", expected / "checkpoints")
        assert len(list((folder / "checkpoints" / "runs").iterdir())) == len(set(kinds)) - 1
        assert_clean(folder)
        shutil.rmtree(folder)
        if not killed:
            break
    count = (number - 1) // CHANGE_STRIDE
    print(
        f"\n{count} operations of a change of runs: {count}/{count} died by SIGKILL, and all runs ended equal; {top}"
    )


def test_a_run_that_comes_back_otherwise_is_found(alone, tmp_path, monkeypatch):
    """The proof can fail: a restart without the optimizer's state, one that begins afresh, a damaged or lost save."""
    settings, expected, _ = alone("short")

    def killed(name):
        (tmp_path / name).mkdir()
        return survive(tmp_path / name, settings, expected, [(LONGEST, 700)])

    with (
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match=r"model_latest\.pt\.\S+ differs"),
    ):
        patch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)
        killed("optimizer")
    settings = settings | {"load_checkpoint": False}
    with pytest.raises(AssertionError, match="it did not go on from its save"):
        killed("afresh")
    (tmp_path / "output.txt").write_text(2 * SAVED)
    with pytest.raises(AssertionError, match="2 saves were complete, but the checkpoint is number 0"):
        restart(tmp_path, settings)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LATEST).write_bytes(b"half")
    with pytest.raises(Corrupt, match="does not match its checksum"):
        restart(tmp_path, settings)
    with pytest.raises(AssertionError):
        (tmp_path / ".model_latest.pt.17.tmp").touch()
        assert_clean(tmp_path)
    assert KILLED in output_of(tmp_path / "optimizer")


def test_a_difference_is_found_and_named():
    """The comparison sees one bit of a weight, a figure of a history and a metric, and passes over times."""
    state = {"weights": {"a": torch.zeros(2)}, "history": {"cvfp": [1.0, float("nan")], "tok_per_s": [5.0]}}
    assert difference(state, copy.deepcopy(state), "file") is None
    other = copy.deepcopy(state)
    other["history"]["tok_per_s"] = [6.0]
    assert difference(state, other, "file") is None
    other["history"]["cvfp"][0] = 1.0 + 2**-52
    assert difference(state, other, "file") == "file.history.cvfp.0"
    other["weights"]["a"][1] = -0.0
    assert difference(state, other, "file") == "file.weights.a"
    assert difference(state, {"weights": {}}, "file") == "file"
