"""How fast this machine does each part: tokens per second, share of its own matrix rate, ratio to a per-token loop.

    python3 -m scripts.bench                  # the network of config.py; every setting is a flag
    python3 -m scripts.bench --json

Parts are timed as training runs them, on random ids, one after the other in one process; each figure is a median over
calls, or over the steps of an epoch, so what happens once an epoch (monitoring, validation) is in none. The matrix rates are
those of the same process at the shapes used (forward and both gradients), so a share says what is left to gain on this
machine, whatever machine it is. Only matrix products count as arithmetic. Switches are compared before that, each in a
process of its own, whose peak memory is then its own too.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import parse_args
from newllm.errors import exit_on_user_error
from newllm.evaluate import trajectories
from newllm.fixed_point.solver import sweep
from newllm.interrupt import Interrupt
from newllm.models.cross_entropy import CHUNK_ELEMENTS
from newllm.models.flops import Flops
from newllm.models.language_model import LanguageModel
from newllm.reporting.criteria import table
from newllm.training.checkpoint import Checkpointer
from newllm.training.device import STORAGE_DTYPE, describe_device, open_runtime, peak_memory_mb
from newllm.training.phase1 import train_phase1
from newllm.training.phase2 import train_phase2

PART_COLUMNS = ("part", "tok/s", "GFLOP/s", "of matrix rate", "x per-token loop")
SWITCH_COLUMNS = ("one switch at a time", "Phase 1 tok/s", "fine-tuned tok/s", "peak MB")
ROUNDS = 3  # timed repetitions of a part (calls, or steps of an epoch), after one that is not
LOOP_TOKENS = 32  # tokens of the per-token loop, which takes a while for each
VOCABULARIES = (4096, 50257)


class Bench:
    """A configuration's network, random ids and runtime, and how long each of its parts takes."""

    def __init__(self, config, vocab_size=VOCABULARIES[0]):
        self.config, self.runtime, self.flops = config, open_runtime(config), Flops(config, vocab_size)
        self.device, self.vocab_size = self.runtime.device, vocab_size
        shape = (ROUNDS + 1) * max(config.phase1_batch_size, config.phase2_batch_size), config.max_seq_length + 1
        self.ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).int()
        self.model = LanguageModel(config, vocab_size).to(self.device)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function):
        """Median time of ROUNDS calls after one that is not timed."""
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            function()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])

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

        return 3 * 2 * rows * inputs * outputs / self.seconds(products)

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

        return LOOP_TOKENS / self.seconds(loop)

    def sweep_forward(self):
        """Tokens per second of one sweep over a batch, without gradient."""
        ids = self.ids[: self.config.phase1_batch_size, :-1].long().to(self.device)
        contexts = torch.randn(*ids.shape, self.config.context_dim, device=self.device).to(self.runtime.storage_dtype)

        def once():
            with torch.no_grad(), self.runtime.autocast():
                sweep(self.model.step, contexts, self.model.embed(ids))

        return ids.numel() / self.seconds(once)

    def sequential(self, sequences):
        """Tokens per second step by step, with so many sequences at once."""
        ids, how = self.ids[:1].expand(sequences, -1), (self.runtime.autocast, self.device, self.runtime.storage_dtype)
        seconds = self.seconds(lambda: trajectories(self.model, ids, *how))
        return sequences * self.config.max_seq_length / seconds

    def generation(self):
        """Tokens per second of greedy generation, one sequence."""

        @torch.no_grad()
        def once():
            context = torch.zeros(1, self.config.context_dim, device=self.device)
            token = torch.zeros(1, dtype=torch.long, device=self.device)
            # In fp32: for a single token, converting the weights costs more than using them.
            for _ in range(LOOP_TOKENS):
                context, stream = self.model.step(context, self.model.embed(token))
                token = self.model.logits(context, stream).argmax(-1)

        return LOOP_TOKENS / self.seconds(once)

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
        data = SimpleNamespace(train=ids, val=ids[:1], token_bytes=torch.ones(vocab_size), vocab_size=vocab_size)
        rounds = dict(num_samples=len(ids), min_batches=1, phase1_max_iterations=2, phase2_epochs=2, patience=2, save_checkpoint=False,
                      phase1_convergence_threshold=1e-9, val_quick_every_n_batches=0)  # fmt: skip
        watch = Stopwatch(self.synchronize)
        # What the phases print is no result, and would spoil the JSON.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = dataclasses.replace(self.config, checkpoint_dir=folder, **rounds)
            with Checkpointer(config, "", "bench", self.runtime.group) as checkpointer:
                train(self.model, data, config, self.runtime, watch, checkpointer)
        return watch.tok_per_s()


class Stopwatch:
    """Stands in for the run's record: notes when each batch ended, and says nothing."""

    def __init__(self, synchronize):
        self.synchronize, self.marks = synchronize, []

    def status(self, progress, **position):
        self.synchronize()
        self.marks.append((position["epoch"], progress.done, time.perf_counter()))

    def tok_per_s(self):
        """Median over the steps from one batch's end to the next one's, both in the same epoch and that not the first."""
        return statistics.median(
            (done - done_before) / (now - before)
            for (epoch_before, done_before, before), (epoch, done, now) in itertools.pairwise(self.marks)
            if epoch_before == epoch > 1
        )

    def log(self, *_, **__):
        pass

    say = log

    def warn(self, line):
        print(line, flush=True)


def bench(config, say):
    """Time all parts; `say` takes a line of progress.

    Returns:
        List of rows: part, tok_per_s, gflops, share (of its time, that its products take at the rates measured for their
        shapes, in the precision in effect), ratio (to the per-token loop; None where that has no counterpart).
    """
    main, result, rates = Bench(config), [], {}
    used, width = main.runtime.precision, config.context_dim + config.embed_dim
    shapes = {"map": (config.phase1_batch_size * config.max_seq_length, width, width)}
    for vocab_size in VOCABULARIES:
        rows = min(config.phase2_batch_size * config.max_seq_length, CHUNK_ELEMENTS // vocab_size)
        shapes[vocab_size] = rows, config.embed_dim, vocab_size
    for precision in dict.fromkeys(("fp32", used)):
        for name, (rows, inputs, outputs) in shapes.items():
            rate = rates[precision, name] = main.matrix_rate(rows, inputs, outputs, precision)
            part = f"products {precision}, {rows} x {inputs} x {outputs}"
            result.append(dict(part=part, tok_per_s=None, gflops=rate / 1e9, share=1.0, ratio=None))
            say(f"{part}: {rate / 1e9:,.0f} GFLOP/s")

    def add(part, tok_per_s, *work, base=None):
        """A row; work: (FLOP a token, FLOP/s of products of that shape), one pair a shape."""
        gflops, share = tok_per_s * sum(n for n, _ in work) / 1e9, tok_per_s * sum(n / rate for n, rate in work)
        result.append(dict(part=part, tok_per_s=tok_per_s, gflops=gflops, share=share, ratio=base and tok_per_s / base))
        say(f"{part}: {tok_per_s:,.0f} tok/s, {share:.0%} of the matrix rate")

    flops, single, rate = main.flops, rates["fp32", "map"], rates[used, "map"]
    loop, training_loop = main.per_token_loop(False), main.per_token_loop(True)
    add("per-token loop, forward", loop, (flops.map, single), base=loop)
    add("per-token loop, forward + backward", training_loop, (3 * flops.map, single), base=training_loop)
    add("Phase 1 sweep, forward", main.sweep_forward(), (flops.map, rate), base=loop)
    add("Phase 1, loss + backward + step", main.phase1(), (flops.phase1, rate), base=training_loop)
    for sequences in (1, config.num_samples):
        add(f"step by step, {sequences} sequences at once", main.sequential(sequences), (flops.map, rate), base=loop)
    for vocab_size in VOCABULARIES:
        each, logits = Bench(config, vocab_size), 3 * 2 * config.embed_dim * vocab_size
        for name, freeze, total in (("frozen", True, each.flops.frozen), ("fine-tuned", False, each.flops.fine_tuned)):
            work = (total - logits, rate), (logits, rates[used, vocab_size])
            add(f"Phase 2 {name}, V = {vocab_size:,}", each.phase2(freeze), *work)
        add(f"generation, V = {vocab_size:,}", each.generation(), (each.flops.generation, single))
    return result


SWITCHES = {  # name: settings that differ
    "as configured": {},
    "precision fp32": {"precision": "fp32"},
    "compile": {"compile": True},
    "batches of 8": {"phase1_batch_size": 8, "phase2_batch_size": 8},
    "batches of 48": {"phase1_batch_size": 48, "phase2_batch_size": 48},
    "gradient through the whole sample": {"gradient_sweeps": 0},
    "gradient through 1 sweep": {"gradient_sweeps": 1},
}


def time_switch(config):
    """Phase 1 and fine-tuned Phase 2 of one configuration, and the peak memory of the process that trained both."""
    each = Bench(config)
    return dict(phase1_tok_per_s=each.phase1(), phase2_tok_per_s=each.phase2(False), peak_memory_mb=peak_memory_mb())


def bench_switches(config, say):
    """Training with one setting changed at a time, as a list of rows: the switch, and what time_switch returns."""
    rows = []
    for name, changes in SWITCHES.items():
        rows.append({"switch": name} | call_apart(time_switch, dataclasses.replace(config, **changes)))
        say(" | ".join(shown_switch(rows[-1])))
    return rows


def shown_part(row):
    speed, ratio = (f"{row[key]:,.{digits}f}" if row[key] else "" for key, digits in (("tok_per_s", 0), ("ratio", 1)))
    return row["part"], speed, f"{row['gflops']:,.1f}", f"{row['share']:.1%}", ratio


def shown_switch(row):
    return row["switch"], *(f"{value:,.0f}" for name, value in row.items() if name != "switch")


def main(config, as_json=False, switches=True):
    """Time and print."""
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    device = describe_device(open_runtime(config))
    say(f"device: {device}; samples of {config.max_seq_length} tokens\n")
    with Interrupt():  # before the parts: a process begins with the peak of the one that started it, still small here
        changed = bench_switches(config, say) if switches else []
    parts = bench(config, say)
    if as_json:
        print(json.dumps({"device": device, "config": config.to_dict(), "parts": parts, "switches": changed}))
        return
    print("\n" + "\n".join(table(PART_COLUMNS, map(shown_part, parts))))
    if changed:
        print("\n" + "\n".join(table(SWITCH_COLUMNS, map(shown_switch, changed))))


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(
            ResidualConfig,
            description=__doc__.splitlines()[0],
            extra=lambda parser: (
                parser.add_argument("--json", action="store_true", help="one JSON object instead of tables"),
                parser.add_argument("--no_switches", action="store_true", help="leave out the second table"),
            ),
        )
        main(config, arguments.json, not arguments.no_switches)
