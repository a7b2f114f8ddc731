"""A CPU to compute on, a small model, and one step after the other on a given loss."""

from types import SimpleNamespace

import pytest

from config import ResidualConfig
from newllm.models.network import LanguageModel
from newllm.training.loop import State
from newllm.training.runtime import open_runtime
from newllm.training.step import OptimizerStep


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)


@pytest.fixture
def taker(runtime):
    """Function of an optimizer: steps on a loss that is given as a function; returns the gradient's norm."""

    def make(optimizer, max_norm=1.0, runtime=runtime):
        eager = SimpleNamespace(compiled=False, forget=lambda: None)
        take, state = OptimizerStep(runtime, optimizer, eager, max_norm, pytest.fail), State()

        def step_on(loss_of, where="here"):
            def gradients(parts):
                loss = loss_of()
                runtime.accelerator.backward(loss)
                return (loss.item(),)

            take(gradients, 4, state, 0, where)
            return state.grad_norm

        return step_on

    return make
