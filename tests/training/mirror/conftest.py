"""A source of three files, a target with faults, and a mirror between them whose clock moves when told."""

import pytest
from mirror_fakes import Clock, Target

from newllm.saving import guard as lock_module
from newllm.saving.backup import Mirror


@pytest.fixture(autouse=True)
def no_second_look_later(monkeypatch):
    """A network folder may show the lock late; these never do."""
    monkeypatch.setattr(lock_module, "READ_PAUSE", 0)


@pytest.fixture
def folders(tmp_path):
    """(source, target): the source holds three files."""
    source, target = tmp_path / "local", tmp_path / "drive"
    for folder in (source, target, source / "logs"):
        folder.mkdir()
    for name in ("model_latest.pt", "manifest.json", "logs/a.csv"):
        (source / name).write_bytes(name.encode() * 1000)
    return source, target


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def mirror(folders, clock):
    made = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
    yield made
    made.close(flush=False, time_limit=5)


@pytest.fixture
def target(folders, monkeypatch):
    return Target(folders[1], monkeypatch)
