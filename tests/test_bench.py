"""The bench times steps, not what lies between epochs; a share is one of the products' own rates."""

import dataclasses
import itertools
import json

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from config import ResidualConfig
from newllm.report.compare import figures_table
from newllm.training.plan import Flops
from scripts import bench
from scripts.bench import Bench


@pytest.fixture
def config(tiny_settings):
    return ResidualConfig(**tiny_settings)


def test_a_step_is_what_lies_between_two_batches_of_the_second_epoch(config, monkeypatch):
    """At a second a batch that is the speed."""
    now = itertools.count()
    monkeypatch.setattr(Bench, "now", lambda self: float(next(now)))
    for phase in (1, 2):
        speeds = Bench(config, 300).training(phase)
        assert speeds == [config.phase1_batch_size * config.max_seq_length] * bench.ROUNDS


def test_the_matrix_rate_counts_three_products(config, monkeypatch):
    """2 * 3 * 5 * 7 operations each, in 2 seconds."""
    timed, calls = Bench(config, 300), []
    monkeypatch.setattr(timed, "rates", lambda amount, function: calls.append(function()) or [amount / 2])
    assert timed.matrix_rate(3, 5, 7, "bf16") == 3 * 2 * 3 * 5 * 7 / 2 and len(calls) == 1


def test_shares_are_of_the_rates_at_the_shapes_used(config, monkeypatch):
    """The head's products at the rate of its shape, all others at the map's; over the time taken."""
    map_rate, head_rate, speeds = 1e9, 4e9, [1300.0, 900.0, 1000.0]
    monkeypatch.setattr(bench, "VOCABULARIES", (300,))
    monkeypatch.setattr(Bench, "matrix_rate", lambda _, rows, x, y, kind: head_rate if y == 300 else map_rate)
    for part in ("per_token_loop", "sweep_forward", "sequential", "training", "generation"):
        monkeypatch.setattr(Bench, part, lambda *_: speeds)
    rows = {row["part"]: row for row in bench.bench_parts(config)}
    flops, logits = Flops(config, 300), 6 * config.embed_dim * 300
    row = rows["Phase 2 frozen, V = 300"]
    assert row["tok_per_s"] == speeds
    expected = 1000 * ((flops.frozen - logits) / map_rate + logits / head_rate)
    assert row["share"] == pytest.approx(expected) and row["gflops"] == pytest.approx(flops.frozen / 1e6)
    training = rows["Phase 1, loss + backward + step"]
    assert training["share"] == pytest.approx(1000 * flops.phase1 / map_rate) and training["ratio"] == 1
    assert rows["products fp32, 96 x 16 x 300"]["gflops"] == 4
    assert rows["products fp32, 96 x 32 x 32"]["gflops"] == 1


def test_all_parts_and_switches_as_json_and_as_tables(config, monkeypatch, capsys):
    """Nothing that the phases print is on stdout; a switch has its speeds, loss and memory."""
    monkeypatch.setattr(bench, "VOCABULARIES", (300, 500))
    monkeypatch.setattr(bench, "SWITCHES", {"batches of 2": {"phase1_batch_size": 2, "phase2_batch_size": 2}})
    monkeypatch.setattr(bench, "ATTENTION", ("eager",))
    monkeypatch.setattr(bench, "call_apart", lambda function, *arguments: function(*arguments))
    bench.main(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == config.to_dict()
    assert all(row["gflops"] > 0 and row["share"] > 0 for row in found["parts"])
    names = itertools.product(("Phase 2 frozen", "generation"), (300, 500))
    assert {f"{part}, V = {size}" for part, size in names} < {row["part"] for row in found["parts"]}
    switch, attention = found["switches"]
    assert (switch["switch"], attention["switch"]) == ("batches of 2", "Transformer, attention eager")
    for row in found["switches"]:
        assert min(row["phase2_tok_per_s"]) > 0 and row["loss"] > 0
        assert 50 < row["peak_memory_mb"] < 5000
    assert switch["phase1_tok_per_s"] and not attention["phase1_tok_per_s"]
    rows = [dict(part="loop", tok_per_s=[1000, 900, 1300], gflops=2.0, share=0.5, ratio=None)]
    assert (
        "loop | 1,000 (900 to 1,300) |     2.0 |          50.0% |"
        in figures_table(bench.PART_COLUMNS, rows)[2]
    )


@pytest.mark.parametrize("backend", bench.ATTENTION)
def test_attention_is_that_of_the_row(config, monkeypatch, backend):
    """Training calls the backend's own function and not the other's; frozen contexts are no hindrance."""
    called = []
    eager, sdpa = modeling_gpt2.eager_attention_forward, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(name, function):
        return lambda *given, **more: called.append(name) or function(*given, **more)

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", watched("eager", eager))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched("sdpa", sdpa))
    frozen = dataclasses.replace(config, freeze_context=True)
    bench.time_switch(dataclasses.replace(frozen, **bench.TRANSFORMER), backend)
    assert set(called) == {backend}
