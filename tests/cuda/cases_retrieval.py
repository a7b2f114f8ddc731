"""What a model looks up on a CUDA device, tried on a pretended one, by test_pretended_cuda.py."""

import signal
from itertools import pairwise
from pathlib import Path

import pytest
import test_gpu as gpu
import torch
from cases import A100, T4, elsewhere, run, settings  # noqa: F401 (a fixture)
from pretended import OnDevice, pretended_cuda

from config import ResidualConfig
from newllm.generate import generate
from newllm.phases import retrieval as stage
from newllm.saving.files import load_sealed
from newllm.saving.stop import Stopped
from newllm.saving.trained import RETRIEVAL, open_model, open_retrieval
from train import main

FIGURES = "val_ppl_retrieval", "val_ppl_retrieval_counting", "val_ppl_retrieval_untrained"
ON = dict(retrieval="ngram,cache,knn", untrained_control=True)
CARDS = pytest.mark.parametrize("card", [T4, A100], ids=["T4", "A100"])


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    """Each iteration of a fit does the same to the device."""
    monkeypatch.setattr(stage, "STEPS", 4)


@pytest.fixture
def config(settings):  # noqa: F811
    return ResidualConfig(**settings | ON)


def kept(config):
    return load_sealed(Path(config.checkpoint_dir) / RETRIEVAL)


def latest(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


@CARDS
def test_a_whole_run_has_the_figures_of_a_cpu(config, card, capsys):
    """Within the rounding of the card's type; what is kept is of a CPU, in its own types."""
    found = run(card, config)
    assert "warning" not in capsys.readouterr().out
    expected = main(elsewhere(config, "cpu", device="cpu", precision="fp32"))
    for name in FIGURES:
        assert found[name] == pytest.approx(expected[name], rel=0.05), name
    state = kept(config)["state"]
    assert not any(tensor.is_cuda for tensor in state.values())
    assert (state["store.rounded"].dtype, state["gate.weight"].dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize(("place", "call"), [("build", 4), ("_maximize", 13)])  # behind the rows' own
def test_a_stage_that_was_stopped_ends_with_the_same_bits(config, monkeypatch, place, call):
    config = elsewhere(config, "stopped", untrained_control=False)
    expected = run(T4, elsewhere(config, "whole"))
    real, calls = getattr(stage, place), []

    def asked(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stage, place, asked)
        run(T4, config)
    assert latest(config)["stage"] == "retrieval"
    found = run(T4, config)
    assert [found[name] for name in FIGURES[:2]] == [expected[name] for name in FIGURES[:2]]
    one, other = kept(config)["state"], kept(elsewhere(config, "whole"))["state"]
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def opened(config):
    """(model, retrieval, a prompt's ids) of a complete run, on the CPU."""
    model, tokenizer, content = open_model(config.checkpoint_dir)
    retrieval = open_retrieval(config.checkpoint_dir, model, content, pytest.fail)
    return model, retrieval, tokenizer.encode("User: ban dor kive")


def test_text_is_that_of_a_cpu_with_few_launches_and_waits_a_token(config, capsys):
    """All buffers go with the module; a token costs what it does at any length."""
    main(elsewhere(config, "cpu", device="cpu", precision="fp32"))
    model, retrieval, prompt = opened(elsewhere(config, "cpu"))
    given = dict(count=24, seed=3, temperature=0.0)
    expected = list(generate(model, prompt, retrieval=retrieval, **given))
    with pretended_cuda(T4) as counts:
        model, retrieval = model.to("cuda"), retrieval.to("cuda")
        assert all(isinstance(tensor, OnDevice) for tensor in retrieval.state_dict().values())
        found, at = [], []
        for token in generate(model, prompt, retrieval=retrieval, **given):
            found.append(token)
            at.append((counts.launches, counts.waits))
    assert found == expected
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(at)]
    launches, waits = map(max, zip(*steps, strict=True))
    with capsys.disabled():
        print(f"a token with retrieval: {launches} launches and {waits} waits")
    assert launches <= 320 and waits <= 12


def test_building_and_fitting_take_few_launches_and_waits(config, monkeypatch, capsys):
    """Of building and gathering a few a part of the samples, of fitting some an evaluation of its loss."""
    ceilings = {"build": (800, 60), "gather": (900, 80), "_maximize": (500, 60)}
    taken, evaluated, poll = {}, [0], stage.poll

    def polled():
        evaluated[0] += 1
        poll()

    def counted(name):
        real = getattr(stage, name)

        def call(*arguments):
            before, evaluated[0] = (counts.launches, counts.waits), 0
            found = real(*arguments)
            times = evaluated[0] if name == "_maximize" else 1
            done = counts.launches - before[0], counts.waits - before[1]
            taken.setdefault(name, []).append([count / times for count in done])
            return found

        monkeypatch.setattr(stage, name, call)

    monkeypatch.setattr(stage, "poll", polled)
    for name in ceilings:
        counted(name)
    with pretended_cuda(T4) as counts:
        main(config)
    for name, ceiling in ceilings.items():
        launches, waits = map(max, zip(*taken[name], strict=True))
        with capsys.disabled():
            print(f"{name}: {launches:.0f} launches and {waits:.1f} waits")
        assert launches <= ceiling[0] and waits <= ceiling[1]


def test_the_test_for_a_gpu(settings):  # noqa: F811
    """It runs, and holds where no device's own rounding is meant."""
    with pretended_cuda(A100):
        gpu.test_what_is_looked_up_has_the_figures_of_a_cpu(settings)
