"""How fast each part of a network works: tokens per second, as training runs it, on random ids.

Each figure is a list: one speed a call, or a step of an epoch, so what happens once an epoch (monitoring, validation) is in
none.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

from newllm.evaluate import trajectories
from newllm.fixed_point.solver import sweep
from newllm.generate import generate
from newllm.models.baselines import build_model
from newllm.models.flops import Flops
from newllm.phases.phase1 import train_phase1
from newllm.phases.phase2 import train_phase2
from newllm.saving.checkpoint import Checkpointer
from newllm.training.runtime import STORAGE_DTYPE, open_runtime

ROUNDS = 3  # timed repetitions of a part (calls, or steps of an epoch), after one that is not
LOOP_TOKENS = 32  # tokens of the per-token loop, which takes a while for each


class Bench:
    """A configuration's network, random ids and runtime, and how long each of its parts takes.

    Each part is a list of tokens per second. A baseline has no Phase 1 and no steps: of its parts there is `phase2` alone.

    Attributes:
        loss: training loss of the last epoch that was timed; None after Phase 1 alone.
    """

    def __init__(self, config, vocab_size):
        self.config, self.runtime, self.flops = config, open_runtime(config), Flops(config, vocab_size)
        self.device, self.vocab_size = self.runtime.device, vocab_size
        shape = (
            (ROUNDS + 1) * max(config.phase1_batch_size, config.phase2_batch_size),
            config.max_seq_length + 1,
        )
        self.ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).int()
        self.model, self.loss = build_model(config, vocab_size).to(self.device), None

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rates(self, amount, function):
        """Amount a second of each of ROUNDS calls, after one that is not timed."""
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            function()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return [amount / each for each in seconds[1:]]

    def matrix_rate(self, rows, inputs, outputs, precision):
        """FLOP/s of the three products of a layer inputs -> outputs on so many rows: forward, input and weight gradient."""
        shapes, dtype = ((rows, inputs), (outputs, inputs), (rows, outputs)), STORAGE_DTYPE[precision]
        x, weight, gradient = (torch.randn(*shape, device=self.device).to(dtype) for shape in shapes)
        # Into memory that is there already: new pages for large results, cleared first, would count as arithmetic.
        x_gradient, weight_gradient, y = (torch.empty_like(operand) for operand in (x, weight, gradient))

        def products():
            torch.mm(x, weight.T, out=y)
            torch.mm(gradient, weight, out=x_gradient)
            torch.mm(gradient.T, x, out=weight_gradient)

        return statistics.median(self.rates(3 * 2 * rows * inputs * outputs, products))

    def per_token_loop(self, training):
        """Tokens per second one token at a time, each with its own call and, in training, its own backward pass."""
        ids = self.ids.flatten()[:LOOP_TOKENS].long().to(self.device)
        tokens = self.model.embed(ids).detach()
        old = torch.zeros(len(ids), self.config.context_dim, device=self.device)

        def loop():
            context = old[0]
            for token, before in zip(tokens, old, strict=True):
                with torch.set_grad_enabled(training):
                    context, _ = self.model.step(context.detach(), token)
                    if training:
                        (context - before).square().mean().backward()

        return self.rates(LOOP_TOKENS, loop)

    def sweep_forward(self):
        """Tokens per second of one sweep over a batch, without gradient."""
        ids = self.ids[: self.config.phase1_batch_size, :-1].long().to(self.device)
        contexts = torch.randn(*ids.shape, self.config.context_dim, device=self.device).to(
            self.runtime.storage_dtype
        )

        def once():
            with torch.no_grad(), self.runtime.autocast():
                sweep(self.model.step, contexts, self.model.embed(ids))

        return self.rates(ids.numel(), once)

    def sequential(self, sequences):
        """Tokens per second step by step, with so many sequences at once."""
        ids, how = (
            self.ids[:1].expand(sequences, -1),
            (self.runtime.autocast, self.device, self.runtime.storage_dtype),
        )
        return self.rates(sequences * self.config.max_seq_length, lambda: trajectories(self.model, ids, *how))

    def generation(self):
        """Tokens per second of greedy generation, one sequence."""
        # In fp32: for a single token, converting the weights costs more than using them.
        return self.rates(
            LOOP_TOKENS, lambda: list(generate(self.model, [0], LOOP_TOKENS, seed=0, temperature=0))
        )

    def phase1(self):
        """Tokens per second of Phase 1's steps as train.py runs them."""
        return self._train(train_phase1, self.config.phase1_batch_size)

    def phase2(self, freeze_context):
        """Tokens per second of Phase 2's steps as train.py runs them."""
        train = functools.partial(train_phase2, stage="phase2", freeze_context=freeze_context)
        return self._train(train, self.config.phase2_batch_size)

    def _train(self, train, batch_size):
        """Two epochs of full batches, of which the first is not timed."""
        ids, vocab_size = self.ids[: (ROUNDS + 1) * batch_size], self.vocab_size
        data = SimpleNamespace(
            train=ids, val=ids[:1], token_bytes=torch.ones(vocab_size), vocab_size=vocab_size
        )
        rounds = dict(num_samples=len(ids), min_batches=1, phase1_max_iterations=2, phase2_epochs=2, patience=2, save_checkpoint=False,
                      phase1_convergence_threshold=1e-9, val_quick_every_n_batches=0)  # fmt: skip
        watch = Stopwatch(self.synchronize)
        # What the phases print is no result, and would spoil the JSON.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = dataclasses.replace(self.config, checkpoint_dir=folder, **rounds)
            with Checkpointer(config, "", "bench", self.runtime.group) as checkpointer:
                train(self.model, data, config, self.runtime, watch, checkpointer)
        self.loss = watch.loss
        return watch.tok_per_s()


class Stopwatch:
    """Stands in for the run's record: notes when each batch ended and the last epoch's training loss, and says nothing."""

    def __init__(self, synchronize):
        self.synchronize, self.marks, self.loss = synchronize, [], None

    def status(self, progress, **position):
        self.synchronize()
        self.marks.append((position["epoch"], progress.done, time.perf_counter()))

    def tok_per_s(self):
        """Of each step from one batch's end to the next one's, both in the same epoch and that not the first."""
        return [
            (done - done_before) / (now - before)
            for (epoch_before, done_before, before), (epoch, done, now) in itertools.pairwise(self.marks)
            if epoch_before == epoch > 1
        ]

    def log(self, *_, train_loss=None, **__):
        self.loss = train_loss

    def say(self, line):
        pass

    def warn(self, line):
        print(line, flush=True)
