"""A run between its phases, to which accidents happen."""

import dataclasses

import pytest

from config import ResidualConfig
from train import main


@pytest.fixture
def after_phase_1(tiny_settings):
    """Configuration of a run that has ended after Phase 1 and has few saves before it."""
    config = ResidualConfig(**tiny_settings | {"phase2_epochs": 1, "save_every_n_batches": 10**6}, phase="1")
    main(config)
    return dataclasses.replace(config, phase="both")
