"""What a run makes of files that do harm, are links, belong to something else, and of clocks that lie."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import stop_after, write_evil
from left_behind import content, same_weights

from config import ResidualConfig
from newllm.errors import UserError
from newllm.saving.files import load_sealed, save_sealed
from train import main


def refused(config, match):
    """One sentence, and every state is as it was."""
    before = content(config) if Path(config.checkpoint_dir).is_dir() else None
    with pytest.raises(UserError, match=match) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert before is None or content(config) == before


def latest_of(config):
    return Path(config.checkpoint_dir) / "model_latest.pt"


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "bare"])
def test_evil_pickles_in_place_of_every_state_are_never_executed(after_phase_1, tmp_path, sealed):
    """With the right checksum or without: refused and kept, nothing done."""
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        write_evil(path, tmp_path / "harm", sealed)
    refused(after_phase_1, r"no checkpoint in .* can be read")
    assert not (tmp_path / "harm").exists()


def test_an_evil_pickle_in_the_latest_and_in_the_cache_is_set_aside(after_phase_1, tmp_path, capsys):
    """The run goes on from the state before, and builds its data again, which is the same."""
    latest = latest_of(after_phase_1)
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
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    stop_after(config, 9 + 7)
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


def test_a_link_that_leads_to_no_folder_is_refused(tiny_settings, tmp_path):
    """To nothing, or a folder below it, or where the record should go: it is named, and nothing is made."""
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in ("cache_dir", "checkpoint_dir"):
        for path in (tmp_path / "dangling", tmp_path / "dangling" / "below"):
            refused(ResidualConfig(**tiny_settings | {name: str(path)}), "dangling")
    assert (tmp_path / "dangling").is_symlink() and not (tmp_path / "gone").exists()
    Path(tiny_settings["checkpoint_dir"]).mkdir(exist_ok=True)
    (Path(tiny_settings["checkpoint_dir"]) / "dialogues").symlink_to("gone")
    refused(ResidualConfig(**tiny_settings), "dialogues")


def test_a_checkpoint_that_is_a_link_is_continued_and_its_target_unharmed(after_phase_1, tmp_path):
    """What is written takes the link's place, not the file elsewhere."""
    latest, target = latest_of(after_phase_1), tmp_path / "target.pt"
    latest.rename(target)
    latest.symlink_to(target)
    before = target.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert target.read_bytes() == before and load_sealed(latest)["epoch"] == "phase2_complete"


def test_a_checkpoint_of_another_version_is_refused(after_phase_1):
    """The sentence names both formats, or the tensor of another shape."""
    latest = latest_of(after_phase_1)
    state = load_sealed(latest)
    save_sealed(state | {"format": 99}, latest)
    refused(after_phase_1, "has format 99, this version continues")
    name, tensor = next((n, t) for n, t in state["model_state_dict"].items() if t.dim() == 2)
    state["model_state_dict"][name] = torch.cat([tensor, tensor])
    save_sealed(state, latest)
    refused(after_phase_1, name)


def test_clocks_that_lie_change_no_result(after_phase_1, tmp_path, monkeypatch):
    """The latest damaged, times of files shuffled as after a copy, days back or forth: the same end."""
    latest, folders = latest_of(after_phase_1), []
    for hours in (0, -48, 48):
        folders.append(tmp_path / f"{hours}")
        shutil.copytree(latest.parent, folders[-1])
    main(after_phase_1)
    numbers = {}
    for path in folders[0].glob("model_*.pt"):
        numbers[path] = load_sealed(path).get("save_number", 0)
    (folders[0] / "model_latest.pt").write_bytes(b"damaged")
    for age, path in enumerate(sorted(numbers, key=numbers.get)):  # the older the state, the younger the file
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (10**9 - 1000 * age,) * 2)
    real = time.time
    for folder, hours in zip(folders, (0, -48, 48), strict=True):
        config = ResidualConfig(**{**after_phase_1.to_dict(), "checkpoint_dir": str(folder)})
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
            assert 0 < main(config)["seconds"] < 600
        assert same_weights(config, after_phase_1)
