"""One step after the other on a given loss, and a session that stops after so many batches."""

import signal
from types import SimpleNamespace

from newllm.saving.checkpoint import Checkpointer
from newllm.saving.stop import Interrupt
from newllm.training.step import OptimizerStep


def fresh_state():
    return {"parts": 1, "skipped": 0, "grad_norm": 0.0}


def taker(runtime, optimizer, max_norm=1.0, step=None, notes=None):
    """One step after the other on a loss that is given as a function."""
    eager = SimpleNamespace(compiled=False, forget=lambda: None)
    take = OptimizerStep(runtime, optimizer, step or eager, max_norm, ([] if notes is None else notes).append)
    state = fresh_state()

    def step_on(loss_of, where="here"):
        def gradients(parts):
            loss = loss_of()
            runtime.accelerator.backward(loss)
            return (loss.item(),)

        take(gradients, 4, state, 0, where)
        return state["grad_norm"]

    return step_on


def stop_after(monkeypatch, batches):
    """Let the next session stop, with a checkpoint, after so many batches."""
    asked = []

    def due(self, batch):
        asked.append(batch)
        if len(asked) == batches:
            Interrupt.current.signal = signal.SIGTERM
        return real(self, batch)

    real = Checkpointer.due
    monkeypatch.setattr(Checkpointer, "due", due)
