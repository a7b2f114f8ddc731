"""The bench times steps, not what happens between epochs, and a share is a share of the products' own rates."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from config import ResidualConfig
from newllm.models.flops import Flops
from newllm.phases import phase1
from newllm.training import timing
from newllm.training.timing import Bench, Stopwatch
from scripts import bench

MONITORING = 0.5  # seconds


@pytest.fixture
def config(tiny_settings):
    return ResidualConfig(**tiny_settings)


def test_a_step_is_what_lies_between_two_batches_of_an_epoch(monkeypatch):
    """Batches of 3 and 2 samples at 10 samples a second, epochs 100 s apart, the first of them slower: 10 a second."""
    clock, progress = SimpleNamespace(now=0.0), SimpleNamespace(done=0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    watch = Stopwatch(lambda: None)
    for epoch, seconds in ((1, 7.0), (2, 0.1)):
        clock.now += 100
        for batch, samples in enumerate((3, 2), start=1):
            clock.now += samples * seconds
            progress.done += samples
            watch.status(progress, epoch=epoch, batch=batch)
    assert watch.tok_per_s() == pytest.approx([10])


def test_monitoring_at_the_end_of_an_iteration_is_no_training(config, monkeypatch):
    """Effective rank that takes half a second changes no figure: steps of this network take milliseconds."""
    rank = phase1.effective_rank
    monkeypatch.setattr(phase1, "effective_rank", lambda contexts: time.sleep(MONITORING) or rank(contexts))
    assert min(Bench(config, 300).phase1()) > config.phase1_batch_size * config.max_seq_length / (
        MONITORING / 5
    )


def test_the_matrix_rate_counts_three_products(config, monkeypatch):
    """2 * 3 * 5 * 7 operations each, in 2 seconds."""
    each = Bench(config, 300)
    calls = []
    monkeypatch.setattr(each, "rates", lambda amount, function: calls.append(function()) or [amount / 2])
    assert each.matrix_rate(3, 5, 7, "bf16") == 3 * 2 * 3 * 5 * 7 / 2 and len(calls) == 1


def test_shares_are_of_the_rates_at_the_shapes_used(config, monkeypatch):
    """The head's products at the rate of its own shape, all others at the map's: the time at those rates over the time taken."""
    map_rate, head_rate, speed = 1e9, 4e9, 1000.0
    slower, faster = 900.0, 1300.0
    monkeypatch.setattr(bench, "VOCABULARIES", (300,))
    monkeypatch.setattr(
        Bench, "matrix_rate", lambda _, rows, x, y, precision: head_rate if y == 300 else map_rate
    )
    for part in ("per_token_loop", "sweep_forward", "phase1", "sequential", "phase2", "generation"):
        monkeypatch.setattr(Bench, part, lambda *_: [faster, slower, speed])
    rows = {row["part"]: row for row in bench.bench(config, lambda line: None)}
    flops, logits = Flops(config, 300), 6 * config.embed_dim * 300
    expected = speed * ((flops.frozen - logits) / map_rate + logits / head_rate)
    row = rows["Phase 2 frozen, V = 300"]
    assert row["tok_per_s"] == [speed, slower, faster]
    assert bench.shown_part(row)[1] == "1,000 (900 to 1,300)"
    assert row["share"] == pytest.approx(expected) and row["gflops"] == pytest.approx(
        speed * flops.frozen / 1e9
    )
    assert rows["Phase 1, loss + backward + step"]["share"] == pytest.approx(speed * flops.phase1 / map_rate)
    assert (
        rows["products fp32, 96 x 16 x 300"]["gflops"] == 4
        and rows["products fp32, 96 x 32 x 32"]["gflops"] == 1
    )


def test_json_is_one_object_with_every_part_and_switch(config, monkeypatch, capsys):
    """Nothing that the phases print is on stdout; every figure is positive; a switch has its speeds, loss and memory."""
    monkeypatch.setattr(bench, "VOCABULARIES", (300, 500))
    monkeypatch.setattr(bench, "SWITCHES", {"batches of 2": {"phase1_batch_size": 2, "phase2_batch_size": 2}})
    bench.main(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == config.to_dict()
    assert all(row["gflops"] > 0 and row["share"] > 0 for row in found["parts"])
    names = [
        f"{part}, V = {size}"
        for size, part in itertools.product((300, 500), ("Phase 2 frozen", "generation"))
    ]
    assert set(names) < {row["part"] for row in found["parts"]}
    switch, *attention = found["switches"]
    assert switch["switch"] == "batches of 2"
    for median, low, high in (
        switch["phase1_tok_per_s"],
        *(row["phase2_tok_per_s"] for row in found["switches"]),
    ):
        assert 0 < low <= median <= high
    assert [row["switch"] for row in attention] == [
        "Transformer, attention sdpa",
        "Transformer, attention eager",
    ]
    assert all(row["phase1_tok_per_s"] is None for row in attention)
    assert all(row["loss"] > 0 and 50 < row["peak_memory_mb"] < 5000 for row in found["switches"])


@pytest.mark.parametrize("backend", bench.ATTENTION)
def test_attention_is_that_of_the_row(config, monkeypatch, backend):
    """While training runs, the backend's own function is called and the other's is not; frozen contexts are no hindrance."""
    called = []
    watched = {
        name: lambda *given, name=name, how=how, **more: called.append(name) or how(*given, **more)
        for name, how in backends()
    }
    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", watched["eager"])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched["sdpa"])
    frozen = dataclasses.replace(config, freeze_context=True)
    row = bench.time_attention(dataclasses.replace(frozen, **bench.TRANSFORMER), backend)
    assert set(called) == {backend} and min(row["phase2_tok_per_s"]) > 0


def backends():
    return ("eager", modeling_gpt2.eager_attention_forward), ("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])


def test_switches_are_timed_alone_and_all_together(config, monkeypatch):
    """The last of training's rows sets what several others set each alone; equal batches give equal losses but for rounding."""
    together = bench.SWITCHES["all together"]
    alone = [changes for name, changes in bench.SWITCHES.items() if name != "all together"]
    assert sum(changes.items() <= together.items() for changes in alone if changes) >= 3
    losses = [
        bench.time_switch(dataclasses.replace(config, precision=precision))["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
