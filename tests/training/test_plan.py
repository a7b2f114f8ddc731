"""What a run will do is what it then does: parameters and batches, in banner, doctor and record."""

import pytest
import torch

import train
from config import ResidualConfig
from newllm.report.record import find_records, read_record
from newllm.report.summary import banner, cadence
from newllm.training import loop
from scripts import doctor

SETTINGS = {
    "fine-tuned": {},
    "untied": dict(tie_weights=False),
    "untied, frozen": dict(tie_weights=False, freeze_context=True),
    "no Phase 1, no control": dict(phase1_max_iterations=0, untrained_control=False),
    "Phase 1 alone": dict(phase="1"),
    "small batches, frozen": dict(
        min_batches=5, phase1_batch_size=24, phase2_batch_size=7, freeze_context=True
    ),
    "adapter": dict(context_adapter="lora", adapter_rank=2),
    "gru": dict(model_type="gru"),
    "transformer": dict(model_type="transformer"),
    "window": dict(model_type="window"),
    "tuning": dict(tune_share=0.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_what_trains(tiny_settings, monkeypatch, capsys, name):
    """Against what the optimizers got and how many steps they took; banner and doctor say the same."""
    if name == "adapter":
        pytest.importorskip("peft")
    trained, real = [], loop.make_optimizer

    def make(parts, *arguments):
        counted = [sum(p.numel() for ps, _ in parts for p in ps), 0]

        def count(*_):
            counted[1] += 1

        trained.append(counted)
        optimizer = real(parts, *arguments)
        optimizer.register_step_post_hook(count)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make)
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=2, phase1_max_iterations=2) | SETTINGS[name])
    train.main(config)
    out = capsys.readouterr().out
    (path,) = find_records(config.checkpoint_dir)
    plan = read_record(path).start["plan"]
    if not config.phase1_max_iterations:
        trained = [counted for counted in trained if counted[1]]  # Phase 1 opens and has nothing to do
    assert [[stage["trainable"], stage["passes"] * stage["batches"]] for stage in plan.values()] == trained
    for stage, title in (("phase1", "Phase 1"), ("phase2", "Phase 2")):
        said = f"{plan[stage]['trainable']:,} in {title}" if stage in plan else ""
        assert said in out and (stage in plan or f" in {title} (" not in out)
    assert ("attention: none" in out) == (config.model_type != "transformer")
    if name.startswith("small batches"):
        asked = "5 a pass; 24 asked for, min_batches makes them smaller"
        assert (
            f"batches: 3 samples in Phase 1 ({asked}), 3 samples in Phase 2 (5 a pass; 7 asked for, " in out
        )
        (batches,) = (line for line in out.splitlines() if line.startswith("batches: "))
        said = doctor.check_in_effect(config)
        assert batches.partition("; checkpoint")[0] in said


def test_the_banner_says_the_cadence_and_needs_no_phase_1(tiny_settings):
    """Batches and minutes; nothing where nothing is saved. A plan of one phase names that phase alone."""
    for changes, said in (
        ({}, "checkpoint every 2 batches, or 10 minutes"),
        (dict(save_min_seconds=30.0), "checkpoint every 2 batches, 30 s apart at least, or 10 minutes"),
        (dict(save_every_minutes=0.0), "checkpoint every 2 batches"),
        (dict(save_checkpoint=False), "no checkpoints"),
    ):
        assert cadence(ResidualConfig(**tiny_settings | changes)) == said

    class Model(torch.nn.Linear):
        def context_parameters(self):
            return []

    class Data:
        notes, val, vocab_size = ["data: here"], range(6), 300

    plan = {"phase2": {"batches": 3, "samples": 4, "asked": 4, "trainable": 1234}}
    lines = banner(ResidualConfig(**tiny_settings), "CPU", Data, Model(2, 2), plan, ["attention: none"])
    assert "trainable parameters: 1,234 in Phase 2" in lines
    assert any(line.startswith("batches: 4 samples in Phase 2 (3 a pass); ") for line in lines)
