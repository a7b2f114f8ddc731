"""What a run makes of files that do harm, are links, belong to something else, and of clocks that lie."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import as_flags, stop_after, write_evil
from left_behind import SHORT, content, same_weights

from config import ResidualConfig
from newllm.errors import UserError
from newllm.saving.files import load_sealed, save_sealed
from train import main

ROOT = Path(__file__).parents[2]


def refused(config, match):
    """One sentence, and every state is as it was."""
    before = content(config) if Path(config.checkpoint_dir).is_dir() else None
    with pytest.raises(UserError, match=match) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert before is None or content(config) == before


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "bare"])
def test_evil_pickles_in_place_of_every_state_are_never_executed(after_phase_1, tmp_path, sealed):
    """With the right checksum or without: refused and kept, nothing done."""
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        write_evil(path, tmp_path / "harm", sealed)
    refused(after_phase_1, r"no checkpoint in .* can be read")
    assert not (tmp_path / "harm").exists()


def test_an_evil_pickle_in_the_latest_and_in_the_cache_is_set_aside(after_phase_1, tmp_path, capsys):
    """The run goes on from the state before, and builds its data again, which is the same."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    (cached,) = Path(after_phase_1.cache_dir).glob("*.pt")
    for path in (latest, cached):
        write_evil(path, tmp_path / "harm")
    evil = latest.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    out = capsys.readouterr().out
    assert "kept as model_latest.pt.corrupt" in out and "was damaged or foreign" in out
    assert latest.with_name("model_latest.pt.corrupt").read_bytes() == evil
    assert not (tmp_path / "harm").exists()


def test_best_weights_that_cannot_be_trusted_stop_the_run_with_a_sentence(tiny_settings, tmp_path):
    """A run cut off in Phase 2 needs its model_best.pt: an evil one is not executed, none is replaced."""
    config = ResidualConfig(**tiny_settings)
    stop_after(config, 9 + 9 + 7)
    best = Path(config.checkpoint_dir) / "model_best.pt"
    data = bytearray(best.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    for harm in ("evil", "damaged", "missing"):
        best.unlink()
        if harm == "evil":
            write_evil(best, tmp_path / "harm")
        elif harm == "damaged":
            best.write_bytes(data)
        refused(config, r"best weights.*model_best\.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["cache_dir", "checkpoint_dir"])
def test_a_link_that_leads_to_no_folder_is_refused(tiny_settings, tmp_path, name):
    """To nothing, or a folder below it: a sentence that names it, and nothing is made."""
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "dangling", tmp_path / "dangling" / "below"):
        refused(ResidualConfig(**tiny_settings | {name: str(path)}), "dangling")
    assert (tmp_path / "dangling").is_symlink() and not (tmp_path / "gone").exists()


def test_a_dangling_link_inside_the_checkpoint_folder_is_refused(tiny_settings):
    """Where the record of the run should go."""
    Path(tiny_settings["checkpoint_dir"]).mkdir()
    (Path(tiny_settings["checkpoint_dir"]) / "dialogues").symlink_to("gone")
    refused(ResidualConfig(**tiny_settings), "dialogues")


def test_folders_below_a_linked_folder_are_used_through_the_link(tiny_settings, tmp_path):
    """`drive/checkpoints` where `drive` is a link: the files lie where it leads, and it stays a link."""
    (tmp_path / "mounted").mkdir()
    (tmp_path / "drive").symlink_to(tmp_path / "mounted")
    folders = {name: str(tmp_path / "drive" / name) for name in ("cache_dir", "checkpoint_dir")}
    main(ResidualConfig(**tiny_settings | folders, phase="1"))
    assert (tmp_path / "drive").is_symlink()
    assert (tmp_path / "mounted/checkpoint_dir/model_latest.pt").exists()
    assert list((tmp_path / "mounted/cache_dir").glob("*.pt"))


def test_a_checkpoint_that_is_a_link_is_continued_and_its_target_unharmed(after_phase_1, tmp_path):
    """What is written takes the link's place, not the file elsewhere; a link to nothing is refused."""
    latest, target = Path(after_phase_1.checkpoint_dir) / "model_latest.pt", tmp_path / "target.pt"
    latest.rename(target)
    latest.symlink_to(target)
    before = target.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert target.read_bytes() == before and load_sealed(latest)["epoch"] == "phase2_complete"
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
    latest.symlink_to("gone.pt")
    with pytest.raises(UserError, match=r"model_latest\.pt"):
        main(after_phase_1)
    assert latest.is_symlink()


def test_a_checkpoint_with_tensors_of_another_shape_is_refused(after_phase_1):
    """The settings agree and the weights do not, as of another version: the sentence names the tensor."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    state = load_sealed(latest)
    name, tensor = next((n, t) for n, t in state["model_state_dict"].items() if t.dim() == 2)
    state["model_state_dict"][name] = torch.cat([tensor, tensor])
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
    save_sealed(state, latest)
    refused(after_phase_1, name)


def test_a_refused_checkpoint_is_one_line_and_exit_status_2(tiny_settings, after_phase_1):
    """As a command: one of another version is named with both numbers, and the files are as they were."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    save_sealed(load_sealed(latest) | {"format": 99}, latest)
    before = content(after_phase_1)
    command = [sys.executable, "train.py", *as_flags(tiny_settings | SHORT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 2
        and line.startswith("error: ")
        and "has format 99, this version continues" in line
    )
    assert content(after_phase_1) == before


def copied(config):
    """The same run in a folder of its own."""
    other = dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_copied")
    shutil.copytree(config.checkpoint_dir, other.checkpoint_dir)
    return other


def test_files_with_shuffled_times_are_read_in_the_order_they_were_saved(after_phase_1):
    """As after a copy: with the latest damaged, the newest by its stored number is continued exactly."""
    whole = copied(after_phase_1)
    main(whole)
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    latest.unlink()
    latest.write_bytes(b"damaged")
    numbers = {}
    for path in set(latest.parent.glob("model_*.pt")) - {latest}:
        numbers[path] = load_sealed(path).get("save_number", 0)
    assert len(set(numbers.values())) > 2
    for age, path in enumerate(sorted(numbers, key=numbers.get)):  # the older the state, the younger the file
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (10**9 - 1000 * age,) * 2)
    main(after_phase_1)
    assert same_weights(after_phase_1, whole)


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_clock_that_was_set_changes_no_result(after_phase_1, monkeypatch, hours):
    """Two days back or forth between the sessions: the run goes on, and its seconds stay sensible."""
    elsewhere = copied(after_phase_1)
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 3600 * hours)
        summary = main(after_phase_1)
    assert 0 < summary["seconds"] < 600
    assert main(elsewhere)["val_loss"] == summary["val_loss"]
