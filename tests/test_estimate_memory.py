"""The memory estimate: its arithmetic against tensors that exist, and its peak against the peak of a run."""

import dataclasses
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from config import ResidualConfig
from newllm.config import parse_args
from newllm.errors import UserError
from newllm.fixed_point.solver import truncated
from newllm.models.baselines import BASELINES, build_model
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.training import memory_estimate
from newllm.training.memory_estimate import moments, predicted_peak
from newllm.training.step import make_optimizer
from scripts import estimate_memory

V = 300
SMALL = dict(
    tokenizer="bpe", vocab_size=V, num_samples=12, val_samples=6, max_seq_length=24, context_dim=20, embed_dim=16, num_layers=2,
    phase1_batch_size=4, phase2_batch_size=4, min_batches=3, precision="fp32", device="cpu",
)  # fmt: skip
TYPES = ("context", "window", "token", *BASELINES)


def settings(**changes):
    return ResidualConfig(**SMALL | changes)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def things(config, stage, name, precision="fp32", cuda=False):
    (found,) = (held for *moment, held in moments(config, V, precision, cuda) if moment == [stage, name])
    return found


def peak(config, vocab_size=V, precision="bf16", cuda=False):
    return max(sum(held.values()) for *_, held in moments(config, vocab_size, precision, cuda))


@pytest.mark.parametrize(
    "changes", [*(dict(model_type=kind) for kind in TYPES), dict(tie_weights=False), dict(token_layers=0)]
)
def test_weights_and_moments_are_those_of_the_network_and_adamw(changes):
    """Of every kind of network, fine-tuned or frozen: what its state dict holds, and the optimizer after a step, to the byte."""
    for freeze in {changes.get("model_type", "context") == "context", False}:
        config = settings(**changes | dict(freeze_context=freeze))
        model = build_model(config, V)
        parameters = model.head_parameters() + ([] if freeze else model.context_parameters())
        optimizer = make_optimizer([(parameters, 1.0)], 1e-3, 0.1)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = bytes_of(
            t for state in optimizer.state.values() for name, t in state.items() if name != "step"
        )
        found = things(config, "phase2", "step")
        assert found["weights"] == bytes_of(model.state_dict().values())
        assert found["optimizer"] == held + bytes_of(parameters)  # and gradients


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_contexts_and_features_by_hand(precision, width):
    """12 samples of 24 tokens of width 20, and for Phase 2 their streams of width 16 and 6 validation samples."""
    config = settings(freeze_context=True)
    assert things(config, "phase1", "step", precision)["contexts"] == 12 * 24 * 20 * width
    assert things(config, "phase2", "step", precision)["contexts"] == (12 + 6) * 24 * (20 + 16) * width
    beyond = dataclasses.replace(config, context_memory_mb=0)  # then they lie in files
    assert (
        not things(beyond, "phase1", "step")["contexts"] and not things(beyond, "phase2", "step")["contexts"]
    )


def test_a_snapshot_holds_what_a_checkpoint_does():
    """Best weights, and trained ones and two moments of what trains; none without checkpoints, none on a GPU."""
    trained = bytes_of(build_model(settings(), V).trained_state().values())
    assert things(settings(), "phase2", "step")["copies of weights"] == 4 * trained
    assert things(settings(save_checkpoint=False), "phase2", "step")["copies of weights"] == trained
    assert things(settings(), "phase2", "step", cuda=True)["copies of weights"] == trained


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_has_the_stages_of_its_kind(kind):
    """Only the context map has an untrained row and a Phase 1; only what has fixed contexts makes and keeps them."""
    found = moments(settings(model_type=kind), V, "fp32")
    assert {stage for stage, *_ in found} == (
        {"untrained", "phase1", "phase2"} if kind == "context" else {"phase2"}
    )
    frozen = [held for stage, name, held in found if stage == "phase2" and name == "contexts made"]
    assert bool(frozen) == (kind in ("window", "token"))


def saved_bytes(forward, model):
    """Bytes that autograd keeps for the backward pass of forward(), parameters aside; shared storages count once."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    kept = weakref.WeakSet()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        result = forward()
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in kept}
    del result
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["context", *BASELINES])
def test_activations_are_about_what_autograd_saves(kind, precision):
    """Of a step of Phase 2 of each kind of network; a graph of 3 sweeps for contexts: within 15 % of the bytes."""
    config = settings(model_type=kind, context_dim=128, embed_dim=128, max_seq_length=128)
    model, ids = build_model(config, V).train(), torch.randint(V, (4, 128))

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            read = (
                truncated(model.step, model.embed(ids), config.context_dim, config.gradient_sweeps)
                if kind == "context"
                else model.encode(ids)
            )
            return linear_cross_entropy(model.hidden(*read), *model.output_weights(), ids)

    output = V * (config.embed_dim + 1) * 4  # its gradient, which is the logits' part
    expected = things(config, "phase2", "step", precision)["activations"] / memory_estimate.HOLES
    assert expected == pytest.approx(saved_bytes(loss, model) - output, rel=0.15)


@pytest.mark.parametrize("kind", ["context", "window", "gru", "transformer"])
@pytest.mark.parametrize("name", [
    "num_samples", "val_samples", "max_seq_length", "context_dim", "embed_dim", "num_layers", "token_layers",
    "phase1_batch_size", "phase2_batch_size", "gradient_sweeps",
])  # fmt: skip
def test_more_of_anything_is_never_less_memory(name, kind):
    """The peak on a GPU, without the heap's holes, never falls when a size doubles."""
    config = settings(model_type=kind, num_samples=512, min_batches=1)
    peaks = [
        peak(dataclasses.replace(config, **{name: getattr(config, name) * 2**power}), cuda=True)
        for power in range(6)
    ]
    assert peaks == sorted(peaks)
    assert peak(config, vocab_size=50257) > peak(config)


def test_holes_are_a_share_of_small_blocks():
    """Large blocks have pages of their own; a GPU's figures count none."""
    config = settings(num_samples=512, min_batches=1)
    small, on_gpu = (things(config, "phase2", "step", cuda=cuda)["activations"] for cuda in (False, True))
    assert small == pytest.approx(memory_estimate.HOLES * on_gpu)
    large = dataclasses.replace(config, max_seq_length=2**20)
    assert (
        things(large, "phase2", "step")["activations"]
        == things(large, "phase2", "step", cuda=True)["activations"]
    )


@pytest.mark.parametrize("kind", ["context", "transformer"])
def test_the_estimate_of_a_middle_sized_run_meets_its_measured_peak(kind):
    """`--measure --json` in a process of its own: 128 wide, 2 layers, 64 samples; within 15 % of the run's."""
    sizes = dict(
        context_dim=128,
        embed_dim=128,
        num_layers=2,
        num_samples=64,
        val_samples=16,
        vocab_size=4096,
        min_batches=3,
    )
    flags = [
        f"--{name}={value}"
        for name, value in (sizes | dict(model_type=kind, tokenizer="bpe", device="cpu")).items()
    ]
    command = [sys.executable, "-m", "scripts.estimate_memory", "--measure", "--json", *flags]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["predicted_peak"] == pytest.approx(found["measured_peak"], rel=0.15)


def test_a_run_is_predicted_no_less_than_its_process_holds_already(monkeypatch):
    """Reading the data may have taken more than training will; a GPU's memory is apart from that."""
    monkeypatch.setattr(memory_estimate, "libraries_mb", lambda *_: 300.0)
    monkeypatch.setattr(memory_estimate, "peak_memory_mb", lambda: 9999.0)
    runtime = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    assert predicted_peak(settings(), V, runtime) == 9999
    runtime.device = torch.device("cuda")
    assert predicted_peak(settings(), V, runtime) == pytest.approx(
        300 + peak(settings(), precision="fp32", cuda=True) / 1e6
    )


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_printed(capsys, monkeypatch, kind):
    """A table for each stage, the largest sum as the peak, and whether this machine has so much memory, with the margin."""
    estimate_memory.main(settings(model_type=kind))
    text = capsys.readouterr().out
    assert (
        all((f"{stage}, MB" in text) == (kind == "context") for stage in ("untrained", "phase1"))
        and "phase2, MB" in text
    )
    assert "give or take 15 %" in text and "the run fits: margin" in text
    monkeypatch.setattr(estimate_memory, "memory_of", lambda device: 10**8)
    estimate_memory.main(settings(model_type=kind, compile=True))
    text = capsys.readouterr().out
    assert "a lower bound, without what the compiler" in text and "the run does not fit: margin -" in text


def test_settings_are_flags_and_errors_are_sentences():
    """The same flags as train.py; a precision that the device has not is refused as there."""
    config, _ = parse_args(ResidualConfig, ["--precision", "fp16", "--device", "cpu"])
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        estimate_memory.report(config)
