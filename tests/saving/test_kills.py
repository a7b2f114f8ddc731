"""Proof of exact resume: small runs are killed again and again and must end as if nothing had happened.

    KILLS=100 python3 -m pytest tests/saving/test_kills.py -n 0 -s

KILLS is the number of kills at random moments; with 100 or more the kills at operations on files come at
every one of them, else at some. Every kill is SIGKILL. A killed run is started again by the same settings and
must go on from its last complete save, leave no temporary file, and end with the weights, metrics and
histories of a run that nobody touched, bit for bit.
"""

import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers import write_dialogues
from kills import KILLED, LATEST, LONGEST, LOOKED_UP, SAVED, assert_equal, output_of, train_in

from newllm.saving.files import load_sealed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is forked")
KILLS = int(os.environ.get("KILLS", "12"))
# Between operations at which a run is killed.
STRIDE, CHANGE_STRIDE, FILE_STRIDE = (1, 1, 1) if KILLS >= 100 else (190, 150, 9)
SETTINGS = dict(
    tokenizer="bpe", vocab_size=300, val_samples=4, max_seq_length=16, context_dim=16, embed_dim=16,
    num_layers=1, dropout=0.3, phase1_min_converged_ratio=1.0, dist_reg_weight=1.0, context_noise=0.1,
    val_quick_every_n_batches=2, precision="fp32", device="cpu", save_every_n_batches=3, save_min_seconds=0.0,
    save_every_minutes=0.0, artifacts=False,
)  # fmt: skip
LONG = dict(num_samples=12, min_batches=12, phase1_max_iterations=3, phase2_epochs=3)
SHORT = dict(num_samples=4, min_batches=4, phase1_max_iterations=1, phase2_epochs=2)
RUNS = {
    "frozen": LONG | {"freeze_context": True, "retrieval": "none"},
    "fine-tuned": LONG,  # looks up, as the others do
    "short": SHORT,  # trains a head on frozen contexts too, in its untrained stage
    "other": SHORT | {"phase2_learning_rate": 0.01, "num_samples": 6},  # shares nothing with the short one
    "third": SHORT | {"context_lr_scale": 0.5},  # takes Phase 1 and the untrained row from the short one
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function: kind of a run -> (settings, folder of a run that nobody touched, seconds it took)."""
    scratch = tmp_path_factory.mktemp("alone")
    corpus = write_dialogues(scratch / "dialogues.jsonl", 60)
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


def assert_clean(folder):
    """No temporary and no damaged file stays behind."""
    assert not [path.name for pattern in (".*.tmp", "*.corrupt*") for path in folder.rglob(pattern)]


def survive(folder, settings, expected, lives):
    """Kill a new run once for each of its lives, let it end, and compare that with the run nobody touched.

    Args:
        lives: for each kill (seconds until it, operation at which the child kills itself or 0).

    Returns:
        How often it was killed. It may end before all its lives are used.
    """
    folder.mkdir()
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
    """Start a killed run again: it has lost no complete save, and goes on from the last; its exit status."""
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
    """In all stages, several times each run, contexts frozen and fine-tuned by turns."""
    source, left, runs = random.Random(0), KILLS, 0
    while left:
        settings, expected, seconds = alone(("frozen", "fine-tuned")[runs % 2])
        lives = [(seconds * source.random() ** 2, 0) for _ in range(min(left, KILLS // 2))]  # often early
        left -= survive(tmp_path / str(runs), settings, expected, lives)
        runs += 1
    print(f"\n{KILLS} kills at random moments: all resumed; {runs}/{runs} runs ended equal bit for bit")


def test_a_run_killed_at_an_operation_on_its_files_ends_equal(alone, tmp_path):
    """A new run at the first operation, another at a later one, until one comes to its end."""
    settings, expected, _ = alone("short")
    for number in itertools.count(1, STRIDE):
        if not survive(tmp_path / str(number), settings, expected, [(LONGEST, number)]):
            break
    count = (number - 1) // STRIDE
    print(f"\n{count} operations: {count}/{count} died by SIGKILL, resumed and ended equal bit for bit")


def test_a_run_killed_while_it_writes_what_it_looks_up_ends_equal(alone, tmp_path):
    """At the operations on that one file: it is whole or not there, and training is not done again."""
    settings, expected, _ = alone("short")
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    assert train_in(prepared, settings, 1, on=LOOKED_UP) == -signal.SIGKILL
    assert load_sealed(prepared / "checkpoints" / LATEST)["stage"] == "retrieval"
    for number in itertools.count(1, FILE_STRIDE):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        killed = train_in(folder, settings, number, on=LOOKED_UP) == -signal.SIGKILL
        if (folder / "checkpoints" / LOOKED_UP).exists():
            load_sealed(folder / "checkpoints" / LOOKED_UP)
        assert restart(folder, settings) == 0, output_of(folder)
        assert "| epoch" not in output_of(folder).split("continuing run")[-1]
        assert_equal(folder / "checkpoints", expected / "checkpoints")
        assert_clean(folder)
        shutil.rmtree(folder)
        if not killed:
            break
    count = (number - 1) // FILE_STRIDE
    print(f"\n{count} operations on what is looked up: {count}/{count} died by SIGKILL and ended equal")


@pytest.mark.parametrize("kind", ["third", "short"])
def test_a_change_of_runs_killed_at_an_operation_loses_neither(alone, tmp_path, kind):
    """From a folder with two complete runs to a third one, or back to the earlier: all end equal."""
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for earlier in ("short", "other"):
        assert train_in(prepared, alone(earlier)[0]) == 0
    for number in itertools.count(1, CHANGE_STRIDE):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        killed = train_in(folder, alone(kind)[0], number) == -signal.SIGKILL
        load_sealed(folder / "checkpoints" / LATEST)  # whole at every instant
        again = dict.fromkeys([kind, "other", "short"] if number % 2 else ["other", kind, "short"])
        for name in again:
            settings, expected, _ = alone(name)
            assert train_in(folder, settings) == 0, output_of(folder)
            assert_equal(folder / "checkpoints", expected / "checkpoints")
        assert len(list((folder / "checkpoints" / "runs").iterdir())) == len(again) - 1
        assert_clean(folder)
        shutil.rmtree(folder)
        if not killed:
            break
    count = (number - 1) // CHANGE_STRIDE
    print(f"\n{count} operations of a change of runs: {count}/{count} died by SIGKILL, all runs ended equal")


def test_a_run_that_comes_back_otherwise_is_found(alone, tmp_path):
    """The proof can fail: a restart without the optimizer's state, and one that begins afresh."""
    settings, expected, _ = alone("short")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match=r"latest\.pt\.\S+ diff"):
        patch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)
        survive(tmp_path / "optimizer", settings, expected, [(LONGEST, 500)])
    with pytest.raises(AssertionError, match="it did not go on from its save"):
        survive(tmp_path / "afresh", settings | {"load_checkpoint": False}, expected, [(LONGEST, 500)])
    assert KILLED in output_of(tmp_path / "optimizer")
