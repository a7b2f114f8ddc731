"""test.py as a user runs it: its criteria, its exit status, and one row a budget."""

from pathlib import Path

from helpers import run

import test as scale_check
import train
from config import ResidualConfig
from newllm.reporting.criteria import check


def test_the_scale_check_exits_by_its_criteria(tiny_settings):
    """`python3 test.py` prints the table with the untrained column, and its status says whether all passed."""
    done = run("test.py", tiny_settings)
    assert "criterion" in done.stdout and "untrained" in done.stdout, done.stderr
    assert done.returncode == (0 if done.stdout.rstrip().endswith("PASS") else 1)
    assert ("FAIL" in done.stdout) == (done.returncode == 1)
    assert not (Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt").exists()


def test_an_untrained_network_fails_the_criteria(tiny_settings):
    """The figures of the untrained network, put in the trained ones' place, fail every gate that asks for training."""
    summary = train.main(ResidualConfig(**tiny_settings))
    untrained = summary | {
        "phase1_steps": 0,
        "phase1_param_change": 0.0,
        "val_ppl": summary["val_ppl_untrained_context"],
    }
    untrained |= {key: summary[f"{key}_untrained"] for key in summary if f"{key}_untrained" in summary}
    failed = {criterion.name for criterion in check(untrained) if not criterion.passed}
    assert {
        "Phase 1 optimizer steps", "Phase 1 relative parameter change", "effective rank above untrained",
        "cold-start error after 10 sweeps", "val perplexity below untrained contexts",
    } <= failed  # fmt: skip


def test_the_ladder_checks_every_budget_from_scratch(tiny_settings, monkeypatch, capsys):
    """One row a budget; no budget sees another's weights."""
    monkeypatch.setattr(scale_check, "LADDER", (6, 12))
    scale_check.main(ResidualConfig(**tiny_settings), ladder=True)
    out = capsys.readouterr().out
    assert "144 " in out and "288 " in out and out.count("== ") == 2
