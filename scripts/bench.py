"""How fast this machine does each part: tokens per second, share of its own matrix rate, ratio to a per-token loop.

    python3 -m scripts.bench                  # the network of config.py; every setting is a flag
    python3 -m scripts.bench --json

Parts are timed as training runs them, on random ids, one after the other in one process; each figure is a median. The
matrix rate is that of the same process at the shapes used (forward and both gradients), so a share says what is left to
gain on this machine, whatever machine it is. Only matrix products count as arithmetic.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch

from config import ResidualConfig
from newllm.config import parse_args
from newllm.errors import exit_on_user_error
from newllm.evaluate import trajectories
from newllm.fixed_point.solver import sweep
from newllm.models.flops import Flops
from newllm.models.language_model import LanguageModel
from newllm.reporting.criteria import table
from newllm.training.checkpoint import Checkpointer
from newllm.training.device import STORAGE_DTYPE, describe_device, open_runtime
from newllm.training.phase1 import train_phase1
from newllm.training.phase2 import train_phase2

COLUMNS = ("part", "tok/s", "GFLOP/s", "of matrix rate", "x per-token loop")
ROUNDS = 3  # timed repetitions of a part, after one that is not
LOOP_TOKENS = 32  # tokens of the per-token loop, which takes a while for each
VOCABULARIES = (4096, 50257)


def median_seconds(function, synchronize):
    """Median time of ROUNDS calls after one that is not timed."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def matrix_rate(rows, width, dtype, device, synchronize):
    """FLOP/s of a square layer's three products: forward, input gradient, weight gradient."""
    inputs, weight, gradient = (
        torch.randn(*shape, device=device).to(dtype) for shape in ((rows, width), (width, width), (rows, width))
    )
    seconds = median_seconds(lambda: (inputs @ weight.T, gradient @ weight, gradient.T @ inputs), synchronize)
    return 3 * 2 * rows * width**2 / seconds


class Bench:
    """A configuration's network, data and runtime, and how long each of its parts takes."""

    def __init__(self, config, vocab_size=VOCABULARIES[0]):
        self.config, self.runtime, self.flops = config, open_runtime(config), Flops(config, vocab_size)
        self.device = self.runtime.device
        generator = torch.Generator().manual_seed(0)
        shape = config.num_samples, config.max_seq_length + 1
        ids = torch.randint(vocab_size, shape, generator=generator).int()
        self.data = SimpleNamespace(train=ids, val=ids[:1], token_bytes=torch.ones(vocab_size), vocab_size=vocab_size)
        self.model = LanguageModel(config, vocab_size).to(self.device)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function):
        return median_seconds(function, self.synchronize)

    def per_token_loop(self, training):
        """Tokens per second one token at a time, each with its own call and, in training, its own backward pass."""
        ids = self.data.train.flatten()[:LOOP_TOKENS].long().to(self.device)
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
        ids = self.data.train[: self.config.phase1_batch_size, :-1].long().to(self.device)
        contexts = torch.randn(*ids.shape, self.config.context_dim, device=self.device).to(self.runtime.storage_dtype)

        @torch.no_grad()
        def once():
            with self.runtime.autocast():
                sweep(self.model.step, contexts, self.model.embed(ids))

        return ids.numel() / self.seconds(once)

    def sequential(self, sequences):
        """Tokens per second step by step, with so many sequences at once."""
        ids = self.data.train[:1].expand(sequences, -1)
        dtype = self.runtime.storage_dtype
        once = lambda: trajectories(self.model, ids, self.runtime.autocast, self.device, dtype)  # noqa: E731
        return sequences * self.config.max_seq_length / self.seconds(once)

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
        """Tokens per second of Phase 1 as train.py runs it."""
        return self._train(lambda *rest: train_phase1(self.model, self.data, *rest))

    def phase2(self, freeze_context):
        """Tokens per second of Phase 2 as train.py runs it."""
        return self._train(lambda *rest: train_phase2(self.model, self.data, *rest, "phase2", freeze_context))

    def _train(self, train):
        rounds = dict(min_batches=1, phase1_max_iterations=ROUNDS + 1, phase2_epochs=ROUNDS + 1, patience=ROUNDS + 1, save_checkpoint=False,
                      phase1_convergence_threshold=1e-9, val_quick_every_n_batches=0)  # fmt: skip
        log = Stopwatch(self.synchronize)
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(self.config, checkpoint_dir=folder, **rounds)
            with Checkpointer(config, "", "bench") as checkpointer:
                train(config, self.runtime, log, checkpointer)
        return self.config.train_tokens / statistics.median(log.rounds()[1:])


class Stopwatch:
    """Stands in for the run's record: notes when each iteration or epoch ended, and says nothing."""

    def __init__(self, synchronize):
        self.synchronize, self.ends = synchronize, [time.perf_counter()]

    def log(self, stage, **values):
        self.synchronize()
        self.ends.append(time.perf_counter())

    def rounds(self):
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def say(self, line=""):
        pass

    def status(self, progress, **position):
        pass

    def warn(self, line):
        print(line, flush=True)


def bench(config, say):
    """Time everything.

    Args:
        say: takes a line of progress.

    Returns:
        List of rows: part, tok_per_s, gflops, share (of the matrix rate in the precision in effect), ratio (to the
        per-token loop; None where that has no counterpart).
    """
    main = Bench(config)
    rows_at_once, width = config.phase1_batch_size * config.max_seq_length, config.context_dim + config.embed_dim
    rates = {}
    result = []
    for name in ("fp32", "bf16", "fp16"):
        if name in ("fp32", main.runtime.precision):
            rates[name] = matrix_rate(rows_at_once, width, STORAGE_DTYPE[name], main.device, main.synchronize)
            result.append(
                dict(part=f"matrix products {name}", tok_per_s=None, gflops=rates[name] / 1e9, share=1.0, ratio=None)
            )
            say(f"{result[-1]['part']}: {result[-1]['gflops']:,.0f} GFLOP/s")

    def add(part, tok_per_s, flops, precision=None, base=None):
        rate = rates.get(precision or main.runtime.precision) or rates["fp32"]
        achieved = tok_per_s * flops
        result.append(
            dict(
                part=part,
                tok_per_s=tok_per_s,
                gflops=achieved / 1e9,
                share=achieved / rate,
                ratio=base and tok_per_s / base,
            )
        )
        say(f"{part}: {tok_per_s:,.0f} tok/s, {achieved / rate:.0%} of the matrix rate")

    flops = main.flops
    loop, training_loop = main.per_token_loop(False), main.per_token_loop(True)
    add("per-token loop, forward", loop, flops.map, "fp32", loop)
    add("per-token loop, forward + backward", training_loop, 3 * flops.map, "fp32", training_loop)
    add("Phase 1 sweep, forward", main.sweep_forward(), flops.map, base=loop)
    add("Phase 1, loss + backward + step", main.phase1(), flops.phase1, base=training_loop)
    for sequences in (1, config.num_samples):
        add(f"step by step, {sequences} sequences at once", main.sequential(sequences), flops.map, base=loop)
    for vocab_size in VOCABULARIES:
        each = Bench(config, vocab_size)
        add(f"Phase 2 frozen, V = {vocab_size:,}", each.phase2(True), each.flops.frozen)
        add(f"Phase 2 fine-tuned, V = {vocab_size:,}", each.phase2(False), each.flops.fine_tuned)
        add(f"generation, V = {vocab_size:,}", each.generation(), each.flops.generation, "fp32")
    return result


SWITCHES = {  # name: settings that differ; "all" is made of the better of each pair
    "as configured": {},
    "precision fp32": {"precision": "fp32"},
    "compile": {"compile": True},
    "batches of 8": {"phase1_batch_size": 8, "phase2_batch_size": 8},
    "batches of 48": {"phase1_batch_size": 48, "phase2_batch_size": 48},
    "gradient through the whole sample": {"gradient_sweeps": 0},
    "gradient through 1 sweep": {"gradient_sweeps": 1},
}


def bench_switches(config, say):
    """Phase 1 and fine-tuned Phase 2 with one setting changed at a time.

    Returns:
        List of rows: switch, phase1_tok_per_s, phase2_tok_per_s.
    """
    rows = []
    for name, changes in SWITCHES.items():
        each = Bench(dataclasses.replace(config, **changes))
        rows.append(dict(switch=name, phase1_tok_per_s=each.phase1(), phase2_tok_per_s=each.phase2(False)))
        say(
            f"{name}: Phase 1 {rows[-1]['phase1_tok_per_s']:,.0f} tok/s, fine-tuned {rows[-1]['phase2_tok_per_s']:,.0f} tok/s"
        )
    return rows


def main(config, as_json=False, switches=True):
    """Time and print."""
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    device = describe_device(open_runtime(config))
    say(f"device: {device}; {config.num_samples} samples of {config.max_seq_length}\n")
    parts = bench(config, say)
    changed = bench_switches(config, say) if switches else []
    if as_json:
        print(json.dumps({"device": device, "config": config.to_dict(), "parts": parts, "switches": changed}))
        return
    shown = [
        (
            row["part"],
            f"{row['tok_per_s']:,.0f}" if row["tok_per_s"] else "",
            f"{row['gflops']:,.1f}",
            f"{row['share']:.1%}",
            f"{row['ratio']:,.1f}" if row["ratio"] else "",
        )
        for row in parts
    ]
    print("\n" + "\n".join(table(COLUMNS, shown)))
    if changed:
        rows = [
            (row["switch"], f"{row['phase1_tok_per_s']:,.0f}", f"{row['phase2_tok_per_s']:,.0f}") for row in changed
        ]
        print("\n" + "\n".join(table(("one switch at a time", "Phase 1 tok/s", "fine-tuned tok/s"), rows)))


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
