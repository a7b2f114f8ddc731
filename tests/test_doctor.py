"""The doctor's verdicts: a machine that is ready, and each thing that can be wrong, with what to do."""

import importlib.metadata
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from config import ResidualConfig
from newllm.data import hub
from newllm.data.samples import shared_runs
from scripts import doctor


@pytest.fixture
def examine(tiny_settings, capsys, monkeypatch):
    """Function of settings to {check: (verdict, text)}; the hub is away, and newllm needs torch alone."""

    def unreachable(path):
        raise hub.Unreachable("no internet connection")

    monkeypatch.setattr(hub, "probe", unreachable)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", "ruff<0; extra == 'dev'"])

    def examined(**settings):
        ready = doctor.main(ResidualConfig(**tiny_settings | settings))
        *lines, last = capsys.readouterr().out.splitlines()
        found = {line[5:].partition(": ")[0]: (line[:5].strip(), line.partition(": ")[2]) for line in lines}
        assert len(found) == len(doctor.CHECKS)
        assert ready == (last == "ready to train") == all(verdict != "FAIL" for verdict, _ in found.values())
        return found

    return examined


def test_a_machine_that_is_ready(examine, monkeypatch):
    """No GPU and no hub are notes; everything else is in order, and says what is in effect."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    found = examine()
    assert {verdict for name, (verdict, _) in found.items() if name not in ("device", "hub")} == {"OK"}
    assert found["hub"] == ("NOTE", found["hub"][1]) and "no internet connection" in found["hub"][1]
    assert found["device"][0] == ("OK" if torch.cuda.is_available() else "NOTE")
    assert f"torch {torch.__version__}" in found["packages"][1] and "ruff" not in found["packages"][1]
    assert "precision fp32" in found["in effect"][1] and "every 2 batches" in found["in effect"][1]
    assert "allocator PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512" in found["in effect"][1]
    assert examine(model_type="gru")["memory"][0] == "OK"


@pytest.mark.parametrize(
    ("check", "settings", "verdict", "says"),
    [
        ("data", dict(data_source="nothing.txt"), "FAIL", "neither one of"),
        ("memory", dict(context_dim=30_000), "FAIL", "predicted peak"),
        ("tokenizer", dict(embeddings="wordllama", tokenizer="bpe"), "FAIL", "--tokenizer auto"),
        ("in effect", dict(save_checkpoint=False), "OK", "no checkpoints"),
        ("in effect", dict(phase1_batch_size=12), "OK", "4 samples in Phase 1"),
        ("folders", dict(checkpoint_dir="file"), "FAIL", "is a file"),
        ("folders", dict(cache_dir="away"), "FAIL", "mount Drive first"),
        ("folders", dict(cache_dir="linked"), "OK", "is a link to"),
        ("folders", dict(cache_dir="twice"), "NOTE", "delete it"),
    ],
    ids=str,
)
def test_what_settings_lead_to(examine, tmp_path, check, settings, verdict, says):
    """The check that they concern says so: batches in effect, what cannot be used, links."""
    (tmp_path / "file").write_text("")
    (tmp_path / "away").symlink_to(tmp_path / "drive" / "cache")
    (tmp_path / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "twice").symlink_to(tmp_path / "there")  # as `ln -sf` for the second time
    (tmp_path / "there").mkdir()
    if check == "folders":
        settings = {name: str(tmp_path / value) for name, value in settings.items()}
    found = examine(**settings)[check]
    assert found[0] == verdict and says in found[1]


def test_wording_that_samples_share_is_counted_and_named(examine, monkeypatch):
    """By runs of eight words, in any training sample; a few words in common are no run."""
    words = [f"w{number}" for number in range(200)]
    texts = [words[:40], words[100:140]]  # to train on
    texts += [[*words[:24], *words[150:160]], words[160:190], [*words[20:29], *words[190:199]]]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(texts[ids[0]]))
    numbers = torch.arange(5)[:, None]
    data = SimpleNamespace(train=numbers[:2], val=numbers[2:], tokenizer=tokenizer)
    assert shared_runs(data) == [17 / 27, 0.0, 2 / 11]
    monkeypatch.setattr(doctor, "load_data", lambda settings: data)
    said = "training samples have 27.0% of the 8-word runs of a validation sample; of 2 of 3 they have more "
    assert examine()["overlap"] == ("OK", said + "than 10%: those numbered 0, 2")


def test_one_cause_is_one_failure(examine, monkeypatch):
    """A GPU that is asked for and not there fails once; checks that need it say whom they wait for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong in (dict(device="cuda"), dict(precision="fp16")):
        found = examine(**wrong)
        assert [name for name, (verdict, _) in found.items() if verdict == "FAIL"] == ["device"]
        for name in ("in effect", "memory", "disk"):
            assert found[name] == ("NOTE", "not checked, because of device")


def test_a_disk_that_is_full(examine, monkeypatch):
    """The room that is missing, and what to do."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    verdict, text = examine()["disk"]
    assert verdict == "FAIL" and "make room" in text


@pytest.mark.parametrize(
    ("needs", "verdict", "says"),
    [
        (["no-such-package"], "FAIL", "no-such-package is not installed: run `pip install"),
        (["torch>=99", "numpy<1", "pytest<1; extra == 'dev'"], "FAIL", "newllm wants torch>=99; numpy is"),
        (None, "NOTE", "newllm is not installed"),
    ],
    ids=str,
)
def test_packages_that_are_missing_or_of_other_versions(examine, monkeypatch, needs, verdict, says):
    """All at once, with the command that brings them; newllm itself is a note."""

    def requires(name):
        if needs is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return needs

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = examine()["packages"]
    assert found[0] == verdict and says in found[1]


def test_a_gpu_is_described(monkeypatch):
    """A T4: bf16 is not native to it, whatever torch emulates."""
    properties = SimpleNamespace(name="Tesla T4", total_memory=15_843_721_216, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    said = doctor.check_device(ResidualConfig())
    assert "Device: Tesla T4, Memory: 15.84 GB, capability 7.5, native bf16: False" in said


def test_drive_on_colab(monkeypatch, tmp_path):
    """Not mounted, mounted and not used, linked, mirrored."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "COLAB_DRIVE", tmp_path / "drive")
    with pytest.raises(doctor.Note, match="not mounted"):
        doctor.check_drive(ResidualConfig())
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "drive")
    with pytest.raises(doctor.Note, match="lost with the machine"):
        doctor.check_drive(ResidualConfig())
    (tmp_path / "linked").symlink_to(tmp_path / "drive" / "checkpoints")
    for used in (
        dict(backup_dir=str(tmp_path / "drive" / "x")),
        dict(checkpoint_dir=str(tmp_path / "linked")),
    ):
        assert doctor.check_drive(ResidualConfig(**used)).startswith("mounted")
