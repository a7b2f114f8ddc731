"""Any batch size may follow any other, at any moment: each sample once an epoch, sums over one pass, the schedule to its end."""

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
from newllm.phases import phase1, phase2
from newllm.saving.files import load_sealed
from newllm.training.optim import warmup_cosine

SAMPLES, PHASE1_EPOCHS, PHASE2_EPOCHS = 13, 3, 3


@pytest.fixture
def config(tiny_settings):
    own = dict(
        num_samples=SAMPLES, phase1_max_iterations=PHASE1_EPOCHS, phase2_epochs=PHASE2_EPOCHS, patience=PHASE2_EPOCHS,
        phase1_convergence_threshold=1e-9, untrained_control=False, min_batches=1, val_quick_every_n_batches=2,
    )  # fmt: skip
    return ResidualConfig(**tiny_settings | own)


@pytest.fixture
def seen(monkeypatch):
    """What the phases do, batch by batch: their samples, parts of Phase 1's means, losses and rates of Phase 2."""
    found = {"phase1": [], "phase2": [], "parts": [], "losses": [], "rates": []}

    def note(module, name, function):
        real = getattr(module, name)

        def noted(*arguments):
            result = real(*arguments)
            function(arguments, result)
            return result

        monkeypatch.setattr(module, name, noted)

    for module, stage in ((phase1, "phase1"), (phase2, "phase2")):
        note(module, "next_batch", lambda _, samples, stage=stage: found[stage].append(samples))
    note(
        phase1,
        "_accumulate",
        lambda arguments, _: found["parts"].append((arguments[1]["cvfp"].item(), arguments[2])),
    )
    note(phase2, "warmup_cosine", lambda _, factor: found["rates"].append(factor))
    step = phase2.OptimizerStep.__call__

    def taken(self, *arguments):
        done = step(self, *arguments)
        found["losses"] += [float(done[0])] * arguments[-1].endswith("of phase2")
        return done

    monkeypatch.setattr(phase2.OptimizerStep, "__call__", taken)
    return found


def state_of(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


def check_passes(seen, state):
    """Each sample once an epoch, in the epoch's order, and every mean one over exactly that pass."""
    for stage, epochs in (("phase1", PHASE1_EPOCHS), ("phase2", PHASE2_EPOCHS)):
        order = torch.cat([epoch_order(SAMPLES, 42, stage, epoch) for epoch in range(epochs)])
        assert torch.equal(torch.cat(seen[stage]), order), stage
    sizes = [len(batch) for batch in seen["phase1"]]
    assert [share for _, share in seen["parts"]] == [size / SAMPLES for size in sizes]
    means = {
        "phase1_history": ("cvfp", sizes, [value for value, _ in seen["parts"]]),
        "phase2_history": ("train_loss", [len(batch) for batch in seen["phase2"]], seen["losses"]),
    }
    for history, (name, sizes, values) in means.items():
        assert len(values) == len(sizes)
        done, sums = 0, [0.0] * 3
        for size, value in zip(sizes, values, strict=True):
            sums[done // SAMPLES] += value * size / SAMPLES
            done += size
        assert state[history][name] == pytest.approx(sums, rel=1e-5)


def journey(config, places, source):
    """Stop again and again, each time after a few batches, and go on with other batches, contexts now here and now there."""
    while True:
        sizes = dict(phase1_batch_size=source.randint(1, 8), min_batches=source.randint(1, 9))
        if state_exists(config) and state_of(config)["results"].get("phase1"):
            del sizes["phase1_batch_size"]  # Phase 1 is over, and its own settings with it
        sizes["phase2_batch_size"] = source.randint(1, 8)
        config = dataclasses.replace(config, **sizes, context_memory_mb=next(places))
        try:
            stop_after(config, source.randint(1, 9))
        except pytest.fail.Exception:  # it came to its end before
            return
        state = state_of(config)
        assert state["position"] is None or state["position"]["sample"] == state["stage_state"]["samples"]


def state_exists(config):
    return (Path(config.checkpoint_dir) / "model_latest.pt").exists()


@pytest.mark.parametrize("seed", range(3))
def test_each_sample_comes_once_an_epoch_whatever_the_batches(config, seen, seed):
    """Random sizes at random stops in both phases; where contexts lie changes no bit of the end."""
    ends = []
    for name, places in (("memory", [512]), ("files", [0]), ("both", [0, 512])):
        for found in seen.values():
            found.clear()
        here = dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}")
        journey(here, itertools.cycle(places), random.Random(seed))
        ends.append(state_of(here))
        check_passes(seen, ends[-1])
    for other in ends[1:]:
        assert all(
            torch.equal(other["model_state_dict"][name], tensor)
            for name, tensor in ends[0]["model_state_dict"].items()
        )
        assert other["phase2_history"]["train_loss"] == ends[0]["phase2_history"]["train_loss"]


@pytest.mark.parametrize("memory", [0, 512])
def test_fewer_batches_than_are_done(config, seen, memory):
    """Stopped behind batch 8 of 10 and continued with 2: what is left is one batch, in both phases."""
    config = dataclasses.replace(config, min_batches=10, context_memory_mb=memory)
    stop_after(config, 8)
    config = dataclasses.replace(config, min_batches=2)
    stop_after(config, 1 + 2 * 4 + 2)  # 13 samples in batches of 4: three of them
    check = state_of(config)
    assert [len(batch) for batch in seen["phase1"][:9]] == [2, 2, 2, 1, 1, 1, 1, 1, 2]
    assert check["stage"] == "phase2"
    train.main(dataclasses.replace(config, min_batches=1, phase2_batch_size=13))
    check_passes(seen, state_of(config))


@pytest.mark.parametrize("sizes", [(1, 13), (13, 1), (4, 5)])
def test_the_learning_rate_follows_the_share_of_the_run(config, seen, sizes):
    """It neither ends early nor late: what changes with the batch size is how often it is set."""
    first, then = sizes
    config = dataclasses.replace(config, phase1_max_iterations=0, phase2_batch_size=first)
    batches = max(SAMPLES // first, 1)
    stop_after(config, batches + batches // 2 + 1)  # within the second of three epochs, or at its end
    changed = sum(map(len, seen["phase2"]))
    train.main(dataclasses.replace(config, phase2_batch_size=then))
    rates, done = seen["rates"], 0
    for samples, rate in zip(seen["phase2"], rates, strict=True):
        total = PHASE2_EPOCHS * max(1, SAMPLES // (first if done < changed else then))
        share = done / (SAMPLES * PHASE2_EPOCHS)
        assert rate == pytest.approx(warmup_cosine(share * total, total, config.warmup_ratio), abs=0.1)
        done += len(samples)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] > 0


def test_the_stopped_run_says_where_it_goes_on(config, capsys):
    """Phase, epoch, batch, sample and step, in the batches that are in effect."""
    config = dataclasses.replace(config, phase1_batch_size=4, phase2_batch_size=3)
    stop_after(config, 3 * 3 + 4 + 2)
    run_id = state_of(config)["run_id"]
    capsys.readouterr()
    train.main(config)
    assert (
        f"continuing run {run_id} in Phase 2, epoch 2, batch 3 of 4 (sample 7 of 13), step 15 (save "
        in capsys.readouterr().out
    )
