"""The command that proves exact resume."""

import pytest

from scripts import verify_resume


@pytest.mark.slow
def test_a_run_killed_twice_ends_equal(capsys):
    """Two kills, and the same bits at the end."""
    assert verify_resume.main(["--kills", "2"])
    assert "2 kills by SIGKILL, then to the end: equal bit for bit" in capsys.readouterr().out


def test_a_difference_is_found_and_named():
    """The comparison can fail: one weight, one figure of a history, one metric."""
    import copy

    import torch

    state = {
        "model_state_dict": {"a": torch.zeros(2)}, "phase1_history": {"cvfp": [1.0], "tok_per_s": [5.0]},
        "phase2_history": {}, "results": {"phase1": {"x": 1}},
    }  # fmt: skip
    assert verify_resume.difference(state, copy.deepcopy(state)) is None
    other = copy.deepcopy(state)
    other["phase1_history"]["tok_per_s"] = [6.0]
    assert verify_resume.difference(state, other) is None
    other["phase1_history"]["cvfp"] = [1.5]
    assert verify_resume.difference(state, other) == "phase1_history"
    other = copy.deepcopy(state)
    other["model_state_dict"]["a"][0] = 1e-30
    assert verify_resume.difference(state, other) == "weights a"
