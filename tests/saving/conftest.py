"""A run between its phases, to which accidents happen."""

import shutil

import pytest
from left_behind import SHORT
from looking_up import Runs

from config import ResidualConfig
from newllm.phases import retrieval
from train import main

FOLDERS = ("cache_dir", "checkpoint_dir")


@pytest.fixture(scope="module", autouse=True)
def short_fits():
    """How well what is looked up is fitted is no matter of saving, also in processes that are forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "STEPS", 6)
        yield


@pytest.fixture(scope="session")
def trained(corpus_file, tmp_path_factory):
    """Function that gives the folder of a run of these settings after Phase 1, trained once."""
    made = {}

    def folder(settings):
        if not made:
            made["at"] = tmp_path_factory.mktemp("after_phase_1")
            own = {name: str(made["at"] / name) for name in FOLDERS}
            main(ResidualConfig(**settings | SHORT | own, phase="1"))
        return made["at"]

    return folder


@pytest.fixture
def after_phase_1(tiny_settings, trained):
    """Configuration of a run that has ended after Phase 1 and has few saves before it."""
    config = ResidualConfig(**tiny_settings | SHORT)
    for name in FOLDERS:
        shutil.copytree(trained(tiny_settings) / name, getattr(config, name))
    return config


@pytest.fixture(scope="session")
def looking_up(corpus_file, tmp_path_factory):
    """Runs that look things up."""
    return Runs(tmp_path_factory.mktemp("looking_up"), corpus_file)
