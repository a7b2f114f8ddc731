"""The memory estimate: its arithmetic against tensors that exist, and its peak against the peak of a run."""

import dataclasses
import json
import weakref

import pytest
import torch

from config import ResidualConfig
from newllm.config import parse_args
from newllm.errors import UserError
from newllm.fixed_point.solver import sweep, truncated
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.language_model import LanguageModel
from newllm.training import memory_estimate
from newllm.training.device import StepFunction
from newllm.training.memory_estimate import Moment, Sizes, moments, predict, predicted_peak
from newllm.training.optim import make_optimizer
from scripts import estimate_memory

V = 300
SMALL = dict(
    tokenizer="bpe", vocab_size=V, num_samples=12, val_samples=6, max_seq_length=24, context_dim=20, embed_dim=16, num_layers=2,
    phase1_batch_size=4, phase2_batch_size=4, min_batches=3, precision="fp32", device="cpu",
)  # fmt: skip
NETWORKS = {
    "tied": {},
    "untied": dict(tie_weights=False),
    "pretrained": dict(embeddings="elsewhere"),
    "pretrained, untied": dict(embeddings="elsewhere", tie_weights=False),
    "no token layer": dict(token_layers=0),
    "two token layers": dict(token_layers=2),
}


def settings(**changes):
    return ResidualConfig(**SMALL | changes)


def network(config):
    pretrained = None if config.embeddings == "random" else torch.zeros(V, config.embed_dim)
    return LanguageModel(config, V, pretrained)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moment(config, stage, name, precision="fp32", cuda=False):
    (found,) = (m for m in moments(config, V, precision, cuda) if (m.stage, m.name) == (stage, name))
    return found


def peak(config, vocab_size=V, precision="bf16"):
    return 1e6 * predicted_peak(config, vocab_size, precision, libraries_mb=0)


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_weights_are_those_of_the_network(changes):
    """Context map, head and frozen tensors of every kind of network, to the byte."""
    model = network(settings(**changes))
    context, head, frozen = Sizes(settings(**changes), V, "fp32").parameters()
    assert sum(context) == bytes_of(model.context_parameters())
    assert sum(head) == bytes_of(model.head_parameters())
    assert sum(frozen) == bytes_of(model.frozen_state().values())
    assert sum(context + head + frozen) == bytes_of(model.state_dict().values())


@pytest.mark.parametrize("freeze", [True, False])
def test_moments_are_those_of_adamw(freeze):
    """After a step the optimizer holds what stands in its row."""
    config = settings(freeze_context=freeze)
    model = network(config)
    parameters = model.head_parameters() + ([] if freeze else model.context_parameters())
    optimizer = make_optimizer([(parameters, 1.0)], 1e-3, 0.1)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = bytes_of(t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    things = moment(config, "phase2", "save").things
    assert sum(things["optimizer"]) == held
    assert sum(things["gradients"]) == bytes_of(parameters)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_contexts_and_features_by_hand(precision, width):
    """12 samples of 24 tokens of width 20, and for Phase 2 their streams of width 16 and 6 validation samples."""
    things = moment(settings(freeze_context=True), "phase1", "step", precision).things
    assert sum(things["contexts"]) == 12 * 24 * 20 * width
    things = moment(settings(freeze_context=True), "phase2", "step", precision).things
    assert sum(things["contexts"]) == (12 + 6) * 24 * (20 + 16) * width


def test_a_snapshot_holds_what_a_checkpoint_does():
    """Trained weights, two moments of what trains, and Phase 1's contexts; nothing without checkpoints, nothing on a GPU."""
    model = network(settings())
    context, trained = bytes_of(model.context_parameters()), bytes_of(model.trained_state().values())
    found = moment(settings(), "phase1", "step").things["snapshot being saved"]
    assert sum(found) == trained + 2 * context + 12 * 24 * 20 * 4
    assert sum(moment(settings(), "phase2", "step").things["snapshot being saved"]) == 3 * trained
    for config, cuda in ((settings(save_checkpoint=False), False), (settings(), True)):
        assert not moment(config, "phase1", "step", cuda=cuda).things["snapshot being saved"]


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
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_are_what_autograd_saves(precision, dropout):
    """A sweep of Phase 1, the sweeps of fine-tuning, and the head on frozen and on moving contexts, to the byte."""
    config = settings(dropout=dropout, token_layers=2)
    model, sizes, n = network(config).train(), Sizes(config, V, precision), 4 * 24
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    ids = torch.randint(V, (4, 24))
    contexts = torch.randn(4, 24, config.context_dim).to(half)
    streams = torch.randn(4, 24, config.embed_dim).to(half)
    moving = contexts.clone().requires_grad_(), streams.clone().requires_grad_()

    def found(forward):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return saved_bytes(forward, model)

    def loss(contexts, streams):
        return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids)

    embedded, output = sizes.embedding(n, fixed=True)[0] + 8 * n, V * (config.embed_dim + 1) * 4
    step = StepFunction(model.step, compiled=False)
    assert found(lambda: sweep(step.contexts, contexts, model.embed(ids, fixed=True))[0]) == embedded + sum(
        sizes.sweeps(n, stream=False)
    )
    three = found(lambda: truncated(step, model.embed(ids), config.context_dim, 3, step.contexts))
    assert three == embedded + 8 * n + sum(sizes.sweeps(n, 3))
    assert found(lambda: loss(*moving)) == sum(sizes.head(n, frozen=False)) + output
    # The graph needs no copy of the first layer's first weight; autocast holds it meanwhile.
    first_cast = sum(sizes.casts([sizes.W**2]))
    assert found(lambda: loss(contexts, streams)) == sum(sizes.head(n, frozen=True)) - first_cast + output


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", [
    "num_samples", "val_samples", "max_seq_length", "context_dim", "embed_dim", "num_layers", "token_layers",
    "phase1_batch_size", "phase2_batch_size", "gradient_sweeps",
])  # fmt: skip
def test_more_of_anything_is_never_less_memory(name, freeze):
    """The peak never falls when a size doubles, from tiny to large, and grows in the end where the size counts."""
    config = settings(freeze_context=freeze, num_samples=512, min_batches=1)
    peaks = [peak(dataclasses.replace(config, **{name: getattr(config, name) * 2**power})) for power in range(8)]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0] or (name == "gradient_sweeps" and freeze)
    assert peak(config, vocab_size=50257) > peak(config)


def test_holes_between_blocks_are_a_share_of_the_small_ones():
    """Large blocks have pages of their own and leave none; a GPU's figures count none."""
    small, large = memory_estimate.HEAP_LIMIT // 2, memory_estimate.HEAP_LIMIT
    found = [Moment("a", "one", {"x": [small, small], "y": [large]})]
    ((_, things),) = predict(found, 7)
    assert sum(things.values()) == 7 + round(2 * small * (1 + memory_estimate.FRAGMENTATION)) + large
    ((_, things),) = predict(found, 7, cuda=True)
    assert sum(things.values()) == 7 + 2 * small + large


def test_contexts_beyond_the_limit_are_in_files():
    """12 samples of 24 tokens: what takes more than `context_memory_mb` stands in no row, a snapshot of it neither."""
    things = moment(settings(context_memory_mb=0), "phase1", "step").things
    assert not things["contexts"]
    contexts = 12 * 24 * 20 * 4
    assert (
        sum(things["snapshot being saved"])
        == sum(moment(settings(), "phase1", "step").things["snapshot being saved"]) - contexts
    )


def test_the_estimate_of_a_middle_sized_run_meets_its_measured_peak(capsys):
    """`--measure --json`: 256 wide, 2 layers, 64 samples; within 15 % of the run's."""
    sizes = dict(
        context_dim=256,
        embed_dim=256,
        num_layers=2,
        num_samples=64,
        val_samples=16,
        vocab_size=4096,
        max_seq_length=128,
    )
    config = settings(**sizes | dict(phase1_batch_size=24, phase2_batch_size=32, precision="auto"))
    estimate_memory.main(config, as_json=True, measuring=True)
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_peak"] == pytest.approx(found["measured_peak"], rel=0.15)


def test_what_is_printed(capsys, monkeypatch):
    """A table for each stage, the largest sum as the peak, whether this machine has so much memory, and the margin."""
    monkeypatch.setattr(estimate_memory, "call_apart", lambda *_: 10**8)
    estimate_memory.main(settings())
    text = capsys.readouterr().out
    assert all(f"{stage}, MB" in text for stage in ("untrained", "phase1", "phase2"))
    assert "the run fits: margin" in text
    monkeypatch.setattr(estimate_memory, "memory_of", lambda device: 10**8)
    estimate_memory.main(settings())
    assert "the run does not fit: margin -" in capsys.readouterr().out


def test_settings_are_flags_and_errors_are_sentences():
    """The same flags as train.py; a precision that the device has not is refused as there."""
    config, _ = parse_args(ResidualConfig, ["--precision", "fp16", "--device", "cpu"])
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        estimate_memory.report(config)
