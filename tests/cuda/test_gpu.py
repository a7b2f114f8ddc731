"""What only a real GPU shows: `python3 -m pytest -m gpu` on a machine with one; elsewhere skipped.

Figures (tokens a second, share of the card's matrix rate, prefill against the loop) are printed with `-s`.
cases.py runs on a pretended device what needs no device's own rounding: these tests are known to run at all.
"""

import dataclasses
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import ResidualConfig
from newllm.config import DataSettings, MachineSettings, RetrievalSettings
from newllm.data.samples import load_data
from newllm.fixed_point.solver import prefill, sequential
from newllm.models.network import LanguageModel
from newllm.phases.retrieval import retrieval_of
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import load_sealed
from newllm.saving.stop import Interrupt, Stopped
from newllm.saving.trained import open_model
from newllm.training.runtime import open_runtime
from newllm.training.step_function import StepFunction
from scripts import prefill as prefill_command
from scripts.bench import Bench
from train import main

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    """Asked when a test runs, not when it is collected: a pretended device is there by then."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; where there is one: python3 -m pytest -m gpu")
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def settings(tiny_settings):
    """A small run as a user of a GPU starts it."""
    small = dict(num_layers=2, context_dim=64, embed_dim=64, num_samples=48, max_seq_length=32)
    return tiny_settings | dict(device="auto", precision="auto") | small


def weights(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]


def network(**sizes):
    """A step function on a random network in this device's precision, its runtime, inputs and lines."""
    config, notes = ResidualConfig(**dict(context_dim=96, embed_dim=64, num_layers=3) | sizes), []
    runtime = open_runtime(config)
    model = LanguageModel(config, 50).to(runtime.device)
    step = StepFunction(model.step, False, model.cast_step, notes.append)
    tokens = torch.randn(4, 40, config.embed_dim, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(runtime.device).to(runtime.storage_dtype)
    start = tokens.new_zeros(4, config.context_dim)
    return SimpleNamespace(runtime=runtime, model=model, step=step, tokens=tokens, start=start, notes=notes)


# Runs


@pytest.mark.parametrize("memory", [512, 0], ids=["memory", "files"])
@pytest.mark.parametrize("stage", ["untrained", "phase1", "phase2"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(settings, monkeypatch, stage, memory):
    """On one card, for the context model, inside each stage, with contexts in memory and in files."""
    config = ResidualConfig(**settings, context_memory_mb=memory, freeze_context=stage == "untrained")
    expected = main(config)
    cut = dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_cut")
    asked, real = [], Checkpointer.due

    def due(self, batch):
        asked.extend([batch] * (self.stage == stage))
        if len(asked) == 2:
            Interrupt.current.signal = signal.SIGTERM
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "due", due)
        with pytest.raises(Stopped):
            main(cut)
    assert main(cut)["val_loss"] == expected["val_loss"]
    one, other = weights(config), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_memory_that_runs_out_costs_no_effective_batch(settings, capsys):
    """With less memory than a batch takes: smaller parts, as many steps, the same loss within rounding."""
    large = dict(context_dim=512, embed_dim=512, phase2_batch_size=24, phase1_batch_size=24, min_batches=1)
    plain = dict(max_seq_length=64, untrained_control=False, dropout=0.0, token_dropout=0.0)
    config = ResidualConfig(**settings | large | plain)
    expected = main(config)
    share = 0.75 * expected["peak_memory_mb"] * 1e6 / torch.cuda.get_device_properties(0).total_memory
    capsys.readouterr()
    elsewhere = dict(checkpoint_dir=f"{config.checkpoint_dir}_small")
    found = main(dataclasses.replace(config, gpu_memory_fraction=share, **elsewhere))
    assert "out of memory at" in capsys.readouterr().out
    assert found["phase2_steps"] == expected["phase2_steps"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=0.02)


def test_what_is_looked_up_has_the_figures_of_a_cpu(settings):
    """Of one trained model, in fp32: perplexities to 1e-3."""
    config = ResidualConfig(**settings | dict(retrieval="ngram,cache,knn", device="cpu", precision="fp32"))
    main(config)
    model, _, _ = open_model(config.checkpoint_dir)
    data, asked = load_data(config.part(DataSettings)), config.part(RetrievalSettings)
    found = []
    for device in ("cpu", "cuda"):
        runtime = open_runtime(dataclasses.replace(config, device=device).part(MachineSettings))
        _, figures = retrieval_of(model.to(runtime.device), data, asked, runtime)
        found.append(figures["ppl"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


# The step


def test_the_precision_is_what_the_card_computes_in():
    """bf16 from compute capability 8 on, fp16 before; the map gives that type, and stays in it."""
    net = network()
    capable = torch.cuda.get_device_capability()[0] >= 8
    assert net.runtime.precision == ("bf16" if capable else "fp16")
    with net.runtime.autocast():
        contexts, streams = net.step(net.start, net.tokens[:, 0])
    assert contexts.dtype == streams.dtype == net.runtime.storage_dtype


def test_the_graph_gives_the_bits_of_the_loop():
    """For new inputs, after weights have changed in place, and again."""
    net = network()
    for shift in (0.0, 0.01, 0.02):
        with torch.no_grad(), net.runtime.autocast():
            for weight in net.model.context_map.parameters():
                weight.add_(shift)
            tokens, start = net.tokens + shift, net.start + shift
            for inputs in ((tokens, start), (tokens[:2, :5], start[:2])):
                expected = net.step._steps(*inputs)
                assert torch.equal(net.step.trajectory(*inputs).cpu(), expected.cpu())
    assert len(net.step.graphs.recorded) == 2 and not net.notes


def test_what_cannot_be_captured_is_done_step_by_step():
    """A step that asks for a value: one line, the loop's bits, and random numbers still work afterwards."""
    net = network()

    def asking(context, token, stream=True):
        assert context.float().abs().max().item() < 1e9
        return net.model.step(context, token, stream)

    step = StepFunction(asking, False, None, net.notes.append)
    with torch.no_grad(), net.runtime.autocast():
        for _ in range(2):
            found = step.trajectory(net.tokens, net.start)
        expected, _ = sequential(net.model.step, net.tokens, net.start.shape[-1], net.start)
    torch.testing.assert_close(found.float().cpu(), expected.float().cpu(), rtol=2e-2, atol=2e-2)
    assert len(net.notes) == 1 and "cannot be one CUDA graph" in net.notes[0]
    assert torch.nn.functional.dropout(torch.ones(1000, device=net.tokens.device)).mean().item() > 0.5
    with torch.no_grad(), net.runtime.autocast():
        net.step.trajectory(net.tokens, net.start)
    assert net.step.graphs.recorded and len(net.notes) == 1


def test_sweeps_reach_the_loops_contexts():
    """In fp32 within the tolerance, from a cold start."""
    net = network(init_scale=0.5)
    with torch.no_grad():
        expected, _ = sequential(net.model.step, net.tokens.float(), net.start.shape[-1])
        width = net.start.shape[-1]
        found, _, stats = prefill(net.model.step, net.tokens.float(), width, 1e-4, 64, piece=16)
    assert all(stats.converged)
    assert (found - expected).norm().item() < 1e-2 * expected.norm().item()


# Figures


def figures(config, lengths):
    """What a run takes: lines to print."""
    started = time.monotonic()
    summary = main(config)
    whole = time.monotonic() - started
    # At the shape that Phase 1 multiplies in, as scripts.bench does.
    bench = Bench(dataclasses.replace(config, num_samples=min(config.num_samples, 48)), 4096)
    width = config.context_dim + config.embed_dim
    rate = bench.matrix_rate(
        config.phase1_batch_size * config.max_seq_length, width, width, bench.runtime.precision
    )
    work = {"phase1": bench.flops.phase1, "phase2": bench.flops.fine_tuned}
    products = f"{rate / 1e12:.1f} TFLOP/s {bench.runtime.precision}"
    lines = [f"{config.train_tokens:,} tokens in {whole:.0f} s; products {products}"]
    for stage, flops in work.items():
        speed = summary[f"tok_per_s_{stage}"]
        lines.append(f"{stage}: {speed:,.0f} tok/s, {speed * flops / rate:.1%} of the matrix rate")
    options = dict(lengths=lengths, tolerance=[1e-2, 1e-3], trained=True)
    rows = prefill_command.report(config, SimpleNamespace(**options), lambda line: None)["rows"]
    lines += [" | ".join(prefill_command.shown(row)) for row in rows]
    return [
        *lines,
        f"peak memory {summary['peak_memory_mb']:,.0f} MB, validation loss {summary['val_loss']:.3f}",
    ]


@pytest.mark.slow
def test_a_hundred_thousand_tokens_whole(tmp_path, capsys):
    """The default network on the embedded corpus: times, prefill beside the loop, matrix rates."""
    folders = dict(checkpoint_dir=str(tmp_path / "checkpoints"), cache_dir=str(tmp_path / "cache"))
    sizes = dict(num_samples=781, untrained_control=False, artifacts=False)
    config = ResidualConfig(data_source="chitchat", tokenizer="bpe", **sizes, **folders)
    lines = figures(config, [1000, 10_000, 100_000])
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert "tok/s" in lines[1]
