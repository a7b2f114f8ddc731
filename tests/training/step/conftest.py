"""A CPU to compute on, and a small model."""

import pytest

from config import ResidualConfig
from newllm.models.network import LanguageModel
from newllm.training.runtime import open_runtime


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)
