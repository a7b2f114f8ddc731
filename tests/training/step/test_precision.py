"""Half precision trains as fp32 does: the loss of every step stays beside that of the same run in fp32."""

import dataclasses

import torch

from config import ResidualConfig
from newllm.training.step import OptimizerStep
from train import main

STEPS = 200
# Twice what was seen. Of the largest too: where Phase 1 ends, rounding no longer shrinks with the loss.
TOLERANCE, TOLERANCE_OF_LARGEST = 0.05, 0.02
SETTINGS = dict(
    phase1_max_iterations=40, phase1_min_converged_ratio=1.0, phase1_convergence_threshold=1e-9,
    phase2_epochs=40, patience=40, min_batches=5, num_samples=15, context_dim=32, embed_dim=32, num_layers=2, dropout=0.0,
    untrained_control=False, save_checkpoint=False,
)  # fmt: skip


def test_the_loss_curve_of_bf16_is_that_of_fp32(tiny_settings, monkeypatch):
    """At each of 200 steps of either phase; and the curves fall, so that there is something to follow."""
    config, taken, take = ResidualConfig(**tiny_settings | SETTINGS), [], OptimizerStep.__call__

    def noted(self, *arguments):
        found = take(self, *arguments)
        taken.append(float(found[0]))
        return found

    monkeypatch.setattr(OptimizerStep, "__call__", noted)
    for precision in ("fp32", "bf16"):
        main(
            dataclasses.replace(config, precision=precision, checkpoint_dir=config.checkpoint_dir + precision)
        )
    fp32, bf16 = torch.tensor(taken).view(2, 2, STEPS)
    largest = fp32.amax(1, keepdim=True)
    assert ((bf16 - fp32).abs() <= TOLERANCE * fp32 + TOLERANCE_OF_LARGEST * largest).all()
    assert not torch.equal(bf16, fp32)
    assert (fp32[:, -1] < 0.6 * largest[:, 0]).all()
