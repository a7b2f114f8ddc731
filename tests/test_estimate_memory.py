"""The memory estimate: its arithmetic against tensors that exist, and its peak against the peak of a run."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import write_dialogues

from config import ResidualConfig
from newllm.apart import call_apart
from newllm.models.baselines import BASELINES, build_model
from newllm.phases.phase2 import DRAWS, SAMPLES_AT_A_TIME, TAUGHT_EPOCHS
from newllm.saving.trained import retrieval_bytes
from newllm.training import memory_estimate
from newllm.training.memory_estimate import memory_table, predicted_peak
from newllm.training.runtime import Runtime, open_runtime
from newllm.training.step import make_optimizer
from scripts import doctor

V = 300
SMALL = dict(
    tokenizer="bpe", vocab_size=V, num_samples=12, val_samples=6, max_seq_length=24, context_dim=20,
    embed_dim=16, num_layers=2, phase1_batch_size=4, phase2_batch_size=4, min_batches=3, precision="fp32",
    device="cpu", untrained_control=False, retrieval="none",
)  # fmt: skip
TYPES = ("context", "window", "token", *BASELINES)
FORMS = [*(dict(model_type=kind) for kind in TYPES), dict(tie_weights=False), dict(token_layers=0)]


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """Measured once is enough."""
    monkeypatch.setattr(memory_estimate, "libraries_mb", lambda kind, runtime: 300.0)


def settings(**changes):
    return ResidualConfig(**SMALL | changes)


def table(config, vocab_size=V):
    return memory_table(config, vocab_size, open_runtime(config))


def megabytes(tensors):
    return sum(tensor.nbytes for tensor in tensors) / 1e6


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_and_moments_are_those_of_the_network_and_adamw(form):
    """Of every kind of network, fine-tuned or frozen: its state dict, the optimizer, what is saved."""
    for freeze in {form.get("model_type", "context") == "context", False}:
        config = settings(**form, freeze_context=freeze)
        model = build_model(config, V)
        parameters = model.head_parameters() + ([] if freeze else model.context_parameters())
        optimizer = make_optimizer([(parameters, 1.0)], 1e-3, 0.1)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        held = table(config)["phase2"]
        assert held["weights"] == pytest.approx(megabytes(model.state_dict().values()))
        assert held["gradients, moments"] == pytest.approx(megabytes(moments) + megabytes(parameters))
        assert held["best, in saving"] == pytest.approx(4 * megabytes(parameters))
        unsaved = dataclasses.replace(config, save_checkpoint=False)
        assert table(unsaved)["phase2"]["best, in saving"] == pytest.approx(megabytes(parameters))


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_contexts_and_features_by_hand(precision, width):
    """12 samples of 24 tokens of width 20; for Phase 2 streams of width 16 and 6 validation samples too."""
    config = settings(freeze_context=True, precision=precision)
    held = {stage: things["contexts"] * 1e6 for stage, things in table(config).items()}
    features = (12 + 6) * 24 * (20 + 16) * width
    assert held == pytest.approx({"phase1": 12 * 24 * 20 * width, "phase2": features})
    group = SimpleNamespace(size=2)  # each of two processes has half
    halves = memory_table(config, V, dataclasses.replace(open_runtime(config), group=group))
    assert [2e6 * halves[stage]["contexts"] for stage in held] == pytest.approx([*held.values()])
    deep = settings(num_layers=20, phase1_batch_size=12, min_batches=1)  # its step is what takes most
    halves = memory_table(deep, V, dataclasses.replace(open_runtime(deep), group=group))
    assert 2 * halves["phase1"]["activations"] == pytest.approx(table(deep)["phase1"]["activations"])
    in_files = dataclasses.replace(config, context_memory_mb=0)
    assert not any(things["contexts"] for things in table(in_files).values())


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_has_the_stages_of_its_kind_and_a_table_of_them(kind, capsys, monkeypatch):
    """Only the context map has an untrained row and a Phase 1. The largest sum is the peak."""
    config = settings(model_type=kind, untrained_control=True, retrieval="knn")
    doctor.print_memory(config, measuring=False)
    text = capsys.readouterr().out.replace("|", " ")
    stages = ["untrained", "phase1", "phase2"] if kind == "context" else ["phase2"]
    stages.append("retrieval")
    assert f"MB {' '.join(stages)}" in " ".join(text.split())
    sums = [float(number.replace(",", "")) for number in re.search("sum (.*)", text)[1].split()]
    peak = re.search(r"predicted peak \(give or take 15 %\): (\S+) MB", text)[1].replace(",", "")
    assert float(peak) == pytest.approx(max(sums), abs=1) and "the run fits: margin" in text
    monkeypatch.setattr(Runtime, "memory", 10**8)
    doctor.print_memory(dataclasses.replace(config, compile=True), measuring=False)
    text = capsys.readouterr().out
    assert "(a lower bound): " in text and "the run does not fit: margin -" in text


SIZES = "num_samples val_samples max_seq_length context_dim embed_dim num_layers token_layers " + (
    "phase1_batch_size phase2_batch_size gradient_sweeps"
)


@pytest.mark.parametrize("kind", ["context", "window", "gru", "transformer"])
def test_more_of_anything_is_never_less_memory(kind):
    """The peak never falls when a size doubles; a larger vocabulary takes more."""
    config = settings(model_type=kind, num_samples=512, min_batches=1)

    def peak(config, vocab_size=V):
        return max(sum(held.values()) for held in table(config, vocab_size).values())

    for name in SIZES.split():
        doubled = [{name: getattr(config, name) * 2**power} for power in range(6)]
        peaks = [peak(dataclasses.replace(config, **change)) for change in doubled]
        assert peaks == sorted(peaks), name
    assert peak(config, vocab_size=50257) > peak(config)


def test_what_is_looked_up_is_the_peak_of_long_texts_alone():
    """At 100,000 tokens training holds more; at four million, with the same network, the store does."""
    size = dict(
        context_dim=256, embed_dim=256, max_seq_length=128, val_samples=79, retrieval="ngram,cache,knn",
        label_smoothing=0.0,
    )  # fmt: skip
    sums = {}
    for samples in (781, 31_250):
        config = settings(**size | dict(num_samples=samples, phase1_batch_size=24, phase2_batch_size=32))
        held = table(config, 4096)
        sums[samples] = {stage: sum(things.values()) for stage, things in held.items()}
        assert held["retrieval"]["looked up"] >= retrieval_bytes(config, 4096, 128 * samples) / 1e6
        assert "retrieval" not in table(dataclasses.replace(config, retrieval="none"))
    assert max(sums[781], key=sums[781].get) != "retrieval"
    assert max(sums[31_250], key=sums[31_250].get) == "retrieval"


def test_teachers_and_their_draws_are_counted(tmp_path):
    """In Phase 2 alone: their files, 256 bytes a place instead of 200, their probabilities at 12 samples."""
    assert memory_estimate.TAUGHT == 4 * TAUGHT_EPOCHS * DRAWS  # int32
    assert memory_estimate.ASKED == SAMPLES_AT_A_TIME
    (tmp_path / "a.pth").write_bytes(bytes(3_000_000))
    alone = dict(label_smoothing=0.5, untrained_control=True)
    taught = table(settings(**alone, teachers=f"{tmp_path}/a.pth, {tmp_path}/gone.pth"), 50_000)
    without = table(settings(**alone), 50_000)
    assert taught.keys() == without.keys() and taught["untrained"] == without["untrained"]
    taught, without = taught["phase2"], without["phase2"]
    assert taught["weights"] - without["weights"] == pytest.approx(3.0)
    assert taught["activations"] - without["activations"] == pytest.approx(56 * 12 * 24 / 1e6)
    assert taught["logits"] == pytest.approx(12 * 12 * 24 * 50_000 / 1e6)
    assert taught["logits"] > without["logits"]
    assert table(settings(label_smoothing=0.0, teachers="a.pth")) == table(settings(label_smoothing=0.0))


def test_a_run_is_predicted_no_less_than_its_process_holds_already(monkeypatch):
    """Reading the data may have taken more than training will."""
    monkeypatch.setattr(memory_estimate, "peak_memory_mb", lambda: 9999.0)
    assert predicted_peak(settings(), V, open_runtime(settings())) == 9999


def _predicted_and_measured(config):
    """MB of a run in a process of its own, whose peak is then its own too."""
    table = memory_table(config, doctor.vocabulary(config), open_runtime(config))
    return max(sum(held.values()) for held in table.values()), doctor.measure(config)


@pytest.mark.parametrize("kind", ["context", "transformer"])
def test_the_estimate_of_a_middle_sized_run_meets_its_measured_peak(kind, tmp_path):
    """Of a network 256 wide, 2 layers, 48 samples: within 20 %."""
    data = str(write_dialogues(tmp_path / "dialogues.jsonl", 300))
    sizes = dict(context_dim=256, embed_dim=256, num_samples=48, val_samples=16, max_seq_length=128)
    places = dict(data_source=data, cache_dir=str(tmp_path))
    config = settings(**sizes, **places, model_type=kind, phase1_batch_size=24, phase2_batch_size=24)
    predicted, measured = call_apart(_predicted_and_measured, config)
    assert predicted == pytest.approx(measured, rel=0.2)
