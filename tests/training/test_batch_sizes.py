"""Any batch size may follow any other: each sample once an epoch, means of it, the schedule to its end."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from helpers import stop_after

import train
from config import ResidualConfig
from newllm.data.order import epoch_order
from newllm.phases.phase1 import Phase1
from newllm.phases.phase2 import Phase2
from newllm.saving.files import load_sealed
from newllm.training import loop
from newllm.training.step import warmup_cosine

SAMPLES, EPOCHS = 13, 3


@pytest.fixture
def config(tiny_settings):
    own = dict(
        num_samples=SAMPLES, phase1_max_iterations=EPOCHS, phase2_epochs=EPOCHS, patience=EPOCHS,
        phase1_convergence_threshold=1e-9, untrained_control=False, min_batches=1,
        val_quick_every_n_batches=2,
    )  # fmt: skip
    return ResidualConfig(**tiny_settings | own)


@pytest.fixture
def seen(monkeypatch):
    """Of each phase's batches the samples and one value that is averaged over them; the rates of Phase 2."""
    found = {"phase1": [], "phase2": [], "rates": []}

    def note(phase, value_of):
        real = phase.after_step

        def noted(self, batch, loss, made):
            found[self.stage].append((batch.samples, value_of(loss, made)))
            return real(self, batch, loss, made)

        monkeypatch.setattr(phase, "after_step", noted)

    def rate(*arguments):
        found["rates"].append(warmup_cosine(*arguments))
        return found["rates"][-1]

    note(Phase1, lambda loss, made: made[0]["cvfp"].item())
    note(Phase2, lambda loss, made: loss)
    monkeypatch.setattr(loop, "warmup_cosine", rate)
    return found


def state_of(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


def check_passes(seen, state):
    """Each sample once an epoch, in the epoch's order, and every mean one over exactly that pass."""
    for stage, name in (("phase1", "cvfp"), ("phase2", "train_loss")):
        order = torch.cat([epoch_order(SAMPLES, 42, stage, epoch) for epoch in range(EPOCHS)])
        assert torch.equal(torch.cat([samples for samples, _ in seen[stage]]), order), stage
        done, sums = 0, [0.0] * EPOCHS
        for samples, value in seen[stage]:
            sums[done // SAMPLES] += value * len(samples) / SAMPLES
            done += len(samples)
        assert state[f"{stage}_history"][name] == pytest.approx(sums, rel=1e-5)


def journey(config, places, source):
    """Stop every few batches, and go on with other sizes, contexts now here and now there."""
    latest = Path(config.checkpoint_dir) / "model_latest.pt"
    while True:
        sizes = dict(phase1_batch_size=source.randint(1, 8), min_batches=source.randint(1, 9))
        if latest.exists() and state_of(config)["results"].get("phase1"):
            del sizes["phase1_batch_size"]  # Phase 1 is over, and its own settings with it
        sizes["phase2_batch_size"] = source.randint(1, 8)
        config = dataclasses.replace(config, **sizes, context_memory_mb=next(places))
        try:
            stop_after(config, source.randint(1, 9))
        except pytest.fail.Exception:  # it came to its end before
            return
        state = state_of(config)
        assert state["position"] is None or state["position"]["sample"] == state["stage_state"]["samples"]


def test_each_sample_comes_once_an_epoch_whatever_the_batches(config, seen):
    """Random sizes at random stops in both phases; where contexts lie changes no bit of the end."""
    ends = []
    for name, places in (("memory", [512]), ("files", [0]), ("both", [0, 512])):
        for found in seen.values():
            found.clear()
        here = dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}")
        journey(here, itertools.cycle(places), random.Random(0))
        ends.append(state_of(here))
        check_passes(seen, ends[-1])
    first = ends[0]
    for other in ends[1:]:
        weights = other["model_state_dict"]
        assert all(torch.equal(weights[name], tensor) for name, tensor in first["model_state_dict"].items())
        assert other["phase2_history"]["train_loss"] == first["phase2_history"]["train_loss"]


@pytest.mark.parametrize("memory", [0, 512])
def test_fewer_batches_than_are_done(config, seen, memory, capsys):
    """Stopped behind batch 8 of 10, continued with 2: what is left is one batch. The place is said."""
    config = dataclasses.replace(config, min_batches=10, context_memory_mb=memory)
    stop_after(config, 8)
    config = dataclasses.replace(config, min_batches=2)
    stop_after(config, 1 + 2 * 4 + 2)  # 13 samples in batches of 4: three of them
    state = state_of(config)
    assert [len(samples) for samples, _ in seen["phase1"][:9]] == [2, 2, 2, 1, 1, 1, 1, 1, 2]
    assert state["stage"] == "phase2"
    train.main(dataclasses.replace(config, min_batches=1, phase2_batch_size=13))
    check_passes(seen, state_of(config))
    place = "in Phase 2, epoch 2, batch 2 of 3 (sample 5 of 13), step 19"
    assert f"continuing run {state['run_id']} {place} (save " in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(1, 13), (4, 5)])
def test_the_learning_rate_follows_the_share_of_the_run(config, seen, sizes):
    """It neither ends early nor late: what changes with the batch size is how often it is set."""
    first, then = sizes
    config = dataclasses.replace(config, phase1_max_iterations=0, phase2_batch_size=first)
    batches = max(SAMPLES // first, 1)
    stop_after(config, batches + batches // 2 + 1)  # within the second of three epochs, or at its end
    changed = sum(len(samples) for samples, _ in seen["phase2"])
    train.main(dataclasses.replace(config, phase2_batch_size=then))
    rates, done = seen["rates"], 0
    for (samples, _), rate in zip(seen["phase2"], rates, strict=True):
        total = EPOCHS * max(1, SAMPLES // (first if done < changed else then))
        share = done / (SAMPLES * EPOCHS)
        assert rate == pytest.approx(warmup_cosine(share * total, total, config.warmup_ratio), abs=0.1)
        done += len(samples)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] > 0
