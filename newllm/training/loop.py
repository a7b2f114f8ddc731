"""The one epoch loop: it owns batches, progress, history, saving and stopping; a phase says what is learned.

A phase (newllm.phases) is asked for
    stage, title, counter: its name in checkpoints and in messages, and the name of a pass over its samples;
    model, train: the network, and the ids of the samples [N, T+1];
    settings, epochs, batch_size, learning_rate, weight_decay, warmup_ratio (None: the rate is constant);
    num_validation: samples that `validate` takes; 0: it has nothing to validate; else also
    quick_share, quick_every: of the samples, for checks within an epoch, and batches between these;
    contexts: StoredContexts that are part of its state, or None;
    function, cast: what StepFunction takes;
    begin(): make what training needs, now that the weights are those to go on from;
    parameter_groups(): list of (parameters, learning-rate scale);
    gradients(step, batch, parts): adds up the gradients of a Batch, cut into parts; (loss, what was made);
    after_step(batch, loss, made): what the batch adds to the means of the epoch, {name: amount};
    validate(samples): metrics, `loss` among them; end_epoch(means, metrics, figures): the epoch's row;
    line(epoch, row, figures): what a person reads after each epoch; trajectories(samples): their contexts;
    enough(state, history): whether to stop early; results(state): what is known at the end.
"""

import functools
import time
from dataclasses import asdict, dataclass, field, fields

import torch

from newllm.clock import timed
from newllm.data import order
from newllm.memory import trim
from newllm.progress import Progress
from newllm.saving.stop import Stopped
from newllm.seeding import derived_seed
from newllm.training.runtime import memory_mb
from newllm.training.step import (
    Batch,
    OptimizerStep,
    make_optimizer,
    optimizer_state,
    prepare_optimizer,
    set_learning_rate,
    warmup_cosine,
)
from newllm.training.step_function import StepFunction


@dataclass
class State:
    """Where the training of a stage is: what a checkpoint carries beside weights, moments and contexts."""

    epoch: int = 0  # complete passes over the samples
    samples: int = 0  # done of the pass in hand
    steps: int = 0
    skipped: int = 0  # of them, those that the fp16 scaler left out
    tokens: int = 0
    seconds: float = 0.0  # at the last save
    parts: int = 1  # into which a batch is cut, so that it fits into memory
    grad_norm: float = 0.0  # of the last step, before clipping
    sums: dict = field(default_factory=dict)  # the means of the pass in hand, as far as it is
    sample_order: str = ""  # digest of all samples so far
    first_loss: float | None = None
    best: dict | None = None  # metrics of the lowest validation loss, and its epoch
    quick_subset: str = ""  # digest of the samples of quick checks
    seconds_validation: float | None = None  # of the last whole one
    history: dict = field(default_factory=dict)  # {name: values of all epochs}

    def position(self, epochs, count, batches):
        """The place within a stage of so many epochs, samples an epoch and batches an epoch."""
        batch = int(order.batches_done(count, batches, self.samples))
        place = {"epoch": self.epoch, "epochs": epochs, "batch": batch, "batches": batches}
        return place | {"sample": self.samples, "samples": count}


class EpochLoop:
    """The training of one phase, continued from the saver's state if it holds one of this stage.

    Args:
        phase: see above. settings: newllm.config.SharedSettings.
        log, saver: RunLog and Checkpointer of the run; both or none.
        watch: function of (epoch, tokens so far), called after each step.

    Attributes:
        state: State. history: {name: values of all epochs}.
    """

    def __init__(self, phase, settings, runtime, log=None, saver=None, watch=None):
        self.phase = phase
        self.settings = settings
        self.runtime = runtime
        self.log = log
        self.saver = saver
        self.watch = watch
        self.warn = log.warn if log else print
        self.count = len(phase.train)
        self.batches = order.batch_count(self.count, phase.batch_size, settings.min_batches)
        self.best = None  # {"metrics", "weights"} of the lowest validation loss

    def run(self):
        """Train in place; a model that is validated ends with the weights of its lowest loss.

        Returns what the phase knows at its end, a dict.

        Raises:
            UserError: a loss or gradient that is not finite, or no memory for a single sample.
            Stopped: as asked for, with all saved.
        """
        self._begin()
        phase = self.phase
        total = phase.epochs * phase.train[:, 1:].numel()
        with Progress(phase.stage, total, self.state.tokens) as self.progress:
            while not self._finished():
                due = self._pass()
                self._end_epoch(due)
        if self.best:
            phase.model.load_state_dict(phase.model.frozen_state() | self.best["weights"])
        phase.model.eval()
        return phase.results(self.state)

    def _begin(self):
        """Weights, state, optimizer and contexts: saved ones where there are any, else fresh ones."""
        phase, runtime = self.phase, self.runtime
        saved = self.saver.restore(phase.stage, phase.model) if self.saver else None
        known = {each.name: saved[each.name] for each in fields(State)} if saved else {}
        self.state = State(**known)
        self.earlier_seconds = self.state.seconds
        phase.begin()
        optimizer = make_optimizer(phase.parameter_groups(), phase.learning_rate, phase.weight_decay)
        self.optimizer = prepare_optimizer(runtime, optimizer, saved)
        self.step = StepFunction(phase.function, runtime.compile, phase.cast, self.warn)
        self.take_step = OptimizerStep(runtime, self.optimizer, self.step, self.settings.grad_clip, self.warn)
        if saved and phase.contexts:
            phase.contexts.restore(saved["contexts"], phase.trajectories, self.warn)
        self.history = getattr(self.saver, f"{phase.stage}_history", self.state.history)
        if phase.num_validation:
            self.quick = order.quick_subset(phase.num_validation, phase.quick_share, self.settings.seed)
            self.state.quick_subset = order.order_digest("", self.quick)[:12]
        if self.state.best:
            # A run killed between the two files has a newer best than its state, which is as true.
            self.best = self.saver.load_best(phase.stage)
            self.state.best = self.best["metrics"]
        phase.model.train()

    def _finished(self):
        if self.state.samples:
            return False
        return self.state.epoch >= self.phase.epochs or self.phase.enough(self.state, self.history)

    def _pass(self):
        """What is left of the pass in hand; returns whether a save was due after its last batch."""
        phase, state, due = self.phase, self.state, False
        samples = order.epoch_order(self.count, self.settings.seed, phase.stage, state.epoch)
        quick_every = phase.quick_every if phase.num_validation else 0
        while state.samples < self.count:
            before = state.samples
            self._step(order.next_batch(samples, self.batches, before))
            if self.log:
                here = self.saver.arrived(phase.stage, self._position(), state.steps)
                best_loss = state.best["loss"] if state.best else None
                self.log.status(self.progress, **here, best_val_loss=best_loss)
            if self.watch:
                self.watch(state.epoch, state.tokens)
            if order.quick_check_due(self.count, self.batches, quick_every, before, state.samples):
                self._quick_check()
            due = self.saver is not None and self.saver.due(state.steps)
            if due and state.samples < self.count:
                self._save()
        return due

    def _step(self, samples):
        """One batch: its rows, its optimizer step, and what that leaves."""
        phase, state = self.phase, self.state
        own = self.runtime.group.owned(samples)
        with timed("fetching rows"):
            ids = phase.train[samples[own]].to(self.runtime.device, non_blocking=True).long()
        ends_epoch = state.samples + len(samples) == self.count
        batch = Batch(samples, own, ids, state.epoch, ends_epoch)
        if phase.warmup_ratio is not None:
            # In batches of the size in effect: the schedule ends with the run, whatever sizes were before.
            at = state.epoch * self.batches + order.batches_done(self.count, self.batches, state.samples)
            factor = warmup_cosine(at, self.batches * phase.epochs, phase.warmup_ratio)
            set_learning_rate(self.optimizer, factor)
        gradients = functools.partial(phase.gradients, self.step, batch)
        seed = derived_seed(self.settings.seed, phase.stage, state.steps)
        number = self._position()["batch"] + 1
        where = f"{phase.counter} {state.epoch + 1}, batch {number} of {phase.title}"
        loss, made = self.take_step(gradients, len(own), state, seed, where)
        if not state.steps:
            state.first_loss = loss
        for name, amount in phase.after_step(batch, loss, made).items():
            state.sums[name] = state.sums.get(name, 0.0) + amount
        tokens = len(samples) * (phase.train.shape[1] - 1)
        state.sample_order = order.order_digest(state.sample_order, samples)
        state.samples += len(samples)
        state.steps += 1
        state.tokens += tokens
        self.progress.update(tokens)

    def _end_epoch(self, due):
        """Validate, write the epoch's row, keep the best weights, save."""
        phase, state = self.phase, self.state
        metrics, figures = {}, {}
        if phase.num_validation:
            trim()  # so that it takes the room of a step's activations, not more beside it
            metrics, state.seconds_validation = self._validate(torch.arange(phase.num_validation))
            figures["seconds_validation"] = state.seconds_validation
        figures |= {
            "grad_norm": state.grad_norm,
            "optimizer_steps": state.steps - state.skipped,
            "tok_per_s": state.tokens / (self.earlier_seconds + self.progress.seconds),
        }
        row = phase.end_epoch(state.sums, metrics, figures)
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        state.epoch += 1
        state.samples = 0
        state.sums = {}
        if self.log:
            self.log.log(phase.stage, **{phase.counter: state.epoch}, **(row | figures), **memory_mb())
            self.log.say(phase.line(state.epoch, row, figures))
        if metrics and (not state.best or metrics["loss"] < state.best["loss"]):
            state.best = metrics | {"epoch": state.epoch}
            weights = phase.model.trained_state().items()
            weights = {name: tensor.detach().clone() for name, tensor in weights}
            self.best = {"metrics": state.best, "weights": weights}
        in_files = phase.contexts is not None and phase.contexts.in_files
        needed = due or in_files or self._finished()
        self._save(names=["model_epoch.pt"], optional=not needed)
        if in_files and self.saver:
            self.saver.wait()  # the next iteration overwrites what the states before this one need

    @timed("validation")
    def _validate(self, samples):
        """(metrics, seconds) of validation samples."""
        started = time.monotonic()
        try:
            return self.phase.validate(samples), time.monotonic() - started
        except Stopped:
            self._save()
            raise
        finally:
            self.phase.model.train()

    def _quick_check(self):
        """The fixed subset alone, within an epoch: an early sign, of no consequence for the training."""
        phase, state, full = self.phase, self.state, self.state.seconds_validation
        metrics, seconds = self._validate(self.quick)
        if not self.log:
            return
        size, subset = len(self.quick), state.quick_subset
        about = dict(steps=state.steps, samples=size, subset=subset, seconds=seconds, seconds_full=full)
        self.log.log(f"{phase.stage}_quick", **about, **metrics)
        whole = "the full one ends the epoch" if full is None else f"the last full one {full:.1f}s"
        self.log.say(
            f"{phase.stage} | batch {self._position()['batch']}/{self.batches} | quick validation ({size}/"
            f"{phase.num_validation} samples, subset {subset}, {seconds:.1f}s; {whole}): "
            f"loss {metrics['loss']:.4f}"
        )

    def _save(self, names=(), optional=False):
        phase, state = self.phase, self.state
        state.seconds = self.earlier_seconds + self.progress.seconds
        if not self.saver:
            return
        whole = asdict(state) | {phase.counter: state.epoch} | optimizer_state(self.runtime, self.optimizer)
        begun = state.epoch + 1 if state.samples else state.epoch
        label, before = f"{phase.stage}_{phase.counter}_{begun}", None
        if phase.contexts:
            whole["contexts"], before = phase.contexts.state(), phase.contexts.sync
        here = self._position()
        self.saver.save(label, phase.model, whole, self.best, names, optional, before, here)

    def _position(self):
        return self.state.position(self.phase.epochs, self.count, self.batches)
