"""How fast this machine does each part: tokens per second, share of its matrix rate, ratio to a plain loop.

    python3 -m scripts.bench                  # the network of config.py; every setting is a flag
    python3 -m scripts.bench --json

Parts are timed on random ids; a speed is the median of a few steps, with the slowest and the fastest. Matrix
rates are those of the same process at the shapes used (forward and both gradients), so a share says what is
left to gain on this machine; only matrix products count as arithmetic. Switches are compared each in a
process of its own; the last two are the baseline Transformer, with either backend of its attention.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from statistics import median
from types import SimpleNamespace

import torch

from config import ResidualConfig
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.evaluate import trajectories
from newllm.fixed_point.solver import sweep
from newllm.flags import parse_args
from newllm.generate import generate
from newllm.models.baselines import build_model
from newllm.models.cross_entropy import CHUNK_ELEMENTS
from newllm.phases.phase1 import Phase1
from newllm.phases.phase2 import Phase2
from newllm.report.compare import figures_table
from newllm.saving.stop import Interrupt
from newllm.training.loop import EpochLoop
from newllm.training.plan import Flops
from newllm.training.runtime import STORAGE_DTYPE, describe_device, open_runtime, peak_memory_mb

ROUNDS = 3  # timed repetitions of a part (calls, or steps of an epoch), after one that is not
LOOP_TOKENS = 32  # tokens of the per-token loop, which takes a while for each
VOCABULARIES = (4096, 50257)
TWO_EPOCHS = dict(
    min_batches=1, phase1_max_iterations=2, phase2_epochs=2, patience=2, save_checkpoint=False,
    phase1_convergence_threshold=1e-9, val_quick_every_n_batches=0,
)  # fmt: skip
LARGE, NEAR = dict(phase1_batch_size=48, phase2_batch_size=48), {"gradient_sweeps": 1}
SWITCHES = {  # name: settings that differ
    "as configured": {},
    "precision fp32": {"precision": "fp32"},
    "compile": {"compile": True},
    "batches of 8": dict(phase1_batch_size=8, phase2_batch_size=8),
    "batches of 48": LARGE,
    "gradient through the whole sample": {"gradient_sweeps": 0},
    "gradient through 1 sweep": NEAR,
    "all together": {"compile": True} | LARGE | NEAR,
}
ATTENTION = ("sdpa", "eager")  # names of transformers; training always takes the first
TRANSFORMER = dict(model_type="transformer", freeze_context=False, whiten_context=False)


def speed(values):
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


PART_COLUMNS = (  # title, key, form
    ("part", "part", ""),
    ("tok/s", "tok_per_s", speed),
    ("GFLOP/s", "gflops", ",.1f"),
    ("of matrix rate", "share", ".1%"),
    ("x per-token loop", "ratio", ",.1f"),
)
SWITCH_COLUMNS = (
    ("one switch at a time", "switch", ""),
    ("Phase 1 tok/s", "phase1_tok_per_s", speed),
    ("Phase 2 tok/s", "phase2_tok_per_s", speed),
    ("loss", "loss", ".4f"),
    ("peak MB", "peak_memory_mb", ",.0f"),
)


class Bench:
    """A configuration's network and random ids, and the tokens a second of its parts, a list of each."""

    def __init__(self, config, vocab_size):
        self.config, self.runtime, self.flops = config, open_runtime(config), Flops(config, vocab_size)
        self.device, self.loss = self.runtime.device, None  # loss: of the last epoch of Phase 2 timed here
        samples = (ROUNDS + 1) * max(config.phase1_batch_size, config.phase2_batch_size)
        shape = samples, config.max_seq_length + 1
        self.ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).int()
        self.model = build_model(config, vocab_size).to(self.device)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rates(self, amount, function):
        """Amount a second of each of ROUNDS calls, after one that is not timed."""
        ends = [self.now()]
        for _ in range(ROUNDS + 1):
            function()
            ends.append(self.now())
        return [amount / (end - start) for start, end in itertools.pairwise(ends[1:])]

    def matrix_rate(self, rows, inputs, outputs, precision):
        """FLOP/s of the three products of a layer inputs -> outputs on so many rows."""
        shapes, dtype = ((rows, inputs), (outputs, inputs), (rows, outputs)), STORAGE_DTYPE[precision]
        x, weight, gradient = (torch.randn(*shape, device=self.device).to(dtype) for shape in shapes)
        # Into memory that is there: new pages for large results, cleared first, would count as arithmetic.
        x_gradient, weight_gradient, y = (torch.empty_like(operand) for operand in (x, weight, gradient))

        def products():
            torch.mm(x, weight.T, out=y)
            torch.mm(gradient, weight, out=x_gradient)
            torch.mm(gradient.T, x, out=weight_gradient)

        return median(self.rates(3 * 2 * rows * inputs * outputs, products))

    def per_token_loop(self, training):
        """One token at a time, each with its own call and, in training, its own backward pass."""
        tokens = self.model.embed(self.ids.flatten()[:LOOP_TOKENS].long().to(self.device)).detach()

        def loop():
            context = tokens.new_zeros(self.config.context_dim)
            with torch.set_grad_enabled(training):
                for token in tokens:
                    context, _ = self.model.step(context.detach(), token)
                    if training:
                        context.square().mean().backward()

        return self.rates(LOOP_TOKENS, loop)

    def sweep_forward(self):
        """One sweep over a batch, without gradient."""
        ids = self.ids[: self.config.phase1_batch_size, :-1].long().to(self.device)
        shape = *ids.shape, self.config.context_dim
        contexts = torch.randn(shape, device=self.device).to(self.runtime.storage_dtype)

        def once():
            with torch.no_grad(), self.runtime.autocast():
                sweep(self.model.step, contexts, self.model.embed(ids))

        return self.rates(ids.numel(), once)

    def sequential(self, sequences):
        """Step by step, with so many sequences at once."""
        ids = self.ids[:1].expand(sequences, -1)
        exact = self.runtime.autocast, self.device, self.runtime.storage_dtype
        return self.rates(ids[:, 1:].numel(), lambda: trajectories(self.model, ids, *exact))

    def generation(self):
        """Greedy, one sequence, in fp32: for one token, converting the weights costs more than using them."""
        return self.rates(LOOP_TOKENS, lambda: list(generate(self.model, [0], LOOP_TOKENS, 0, temperature=0)))

    def training(self, phase, freeze_context=False):
        """Steps of Phase 1 or 2 as train.py runs them: from one batch's end to the next one's.

        Two epochs of full batches are trained, and those of the second are timed.
        """
        ids = self.ids[: (ROUNDS + 1) * getattr(self.config, f"phase{phase}_batch_size")]
        config = dataclasses.replace(self.config, num_samples=len(ids), **TWO_EPOCHS)
        samples = SimpleNamespace(train=ids, val=ids[:1], token_bytes=torch.ones(self.model.vocab_size))
        folder, ends = tempfile.gettempdir(), []
        if phase == 1:
            made = Phase1(self.model, ids, config, self.runtime, folder)
        else:
            made = Phase2(self.model, samples, config, self.runtime, folder, "phase2", freeze_context)

        def watch(epoch, tokens):
            if epoch == 1:
                ends.append((tokens, self.now()))

        loop = EpochLoop(made, config, self.runtime, watch=watch)
        with contextlib.redirect_stdout(sys.stderr):  # progress is no result, and would spoil the JSON
            loop.run()
        self.loss = loop.history.get("train_loss", [None])[-1]
        return [(last - first) / (end - start) for (first, start), (last, end) in itertools.pairwise(ends)]


def bench_parts(config):
    """Rows of all parts: part, tok_per_s (list), gflops, share, ratio (to the per-token loop).

    share: of its time, what its products take at the rates measured for their shapes and precision.
    """
    main, rates = Bench(config, VOCABULARIES[0]), {}
    used, flops = main.runtime.precision, main.flops
    width, batch = config.context_dim + config.embed_dim, config.phase2_batch_size * config.max_seq_length
    shapes = {"map": (config.phase1_batch_size * config.max_seq_length, width, width)}
    for vocab_size in VOCABULARIES:
        shapes[vocab_size] = min(batch, CHUNK_ELEMENTS // vocab_size), config.embed_dim, vocab_size
    rows = []
    for precision in dict.fromkeys(("fp32", used)):
        for name, shape in shapes.items():
            rate = rates[precision, name] = main.matrix_rate(*shape, precision)
            part = f"products {precision}, {shape[0]} x {shape[1]} x {shape[2]}"
            rows.append(dict(part=part, tok_per_s=None, gflops=rate / 1e9, share=1.0, ratio=None))

    def add(part, speeds, *work, base=None):
        """A row; work: (FLOP a token, FLOP/s of products of that shape), one pair a shape."""
        middle = median(speeds)
        gflops = middle * sum(flops for flops, _ in work) / 1e9
        share = middle * sum(flops / rate for flops, rate in work)
        ratio = middle / median(base) if base else None
        rows.append(dict(part=part, tok_per_s=speeds, gflops=gflops, share=share, ratio=ratio))

    single, rate = rates["fp32", "map"], rates[used, "map"]
    loop, training_loop = main.per_token_loop(False), main.per_token_loop(True)
    add("per-token loop, forward", loop, (flops.map, single), base=loop)
    add("per-token loop, forward + backward", training_loop, (3 * flops.map, single), base=training_loop)
    add("Phase 1 sweep, forward", main.sweep_forward(), (flops.map, rate), base=loop)
    add("Phase 1, loss + backward + step", main.training(1), (flops.phase1, rate), base=training_loop)
    for sequences in (1, config.num_samples):
        part = f"step by step, {sequences} sequences at once"
        add(part, main.sequential(sequences), (flops.map, rate), base=loop)
    for vocab_size in VOCABULARIES:
        other, logits = Bench(config, vocab_size), 3 * 2 * config.embed_dim * vocab_size
        head = logits, rates[used, vocab_size]
        frozen, fine_tuned = other.flops.frozen - logits, other.flops.fine_tuned - logits
        add(f"Phase 2 frozen, V = {vocab_size:,}", other.training(2, True), (frozen, rate), head)
        add(f"Phase 2 fine-tuned, V = {vocab_size:,}", other.training(2), (fine_tuned, rate), head)
        add(f"generation, V = {vocab_size:,}", other.generation(), (other.flops.generation, single))
    return rows


def time_switch(config, attention=None):
    """Both phases of one configuration, its loss, and the peak memory of the process that trained them.

    attention: backend of a Transformer, which has no Phase 1.
    """
    timed = Bench(config, VOCABULARIES[0])
    if attention:
        timed.model.body.set_attn_implementation(attention)
    return {
        "phase1_tok_per_s": None if attention else timed.training(1),
        "phase2_tok_per_s": timed.training(2),
        "loss": timed.loss,
        "peak_memory_mb": peak_memory_mb(),
    }


def bench_switches(config):
    """Training with one setting changed at a time: rows of the switch, and what its process measured."""
    runs = {name: (time_switch, dataclasses.replace(config, **changes)) for name, changes in SWITCHES.items()}
    for backend in ATTENTION:
        transformer = dataclasses.replace(config, **TRANSFORMER)
        runs[f"Transformer, attention {backend}"] = time_switch, transformer, backend
    return [{"switch": name} | call_apart(*run) for name, run in runs.items()]


def main(config, as_json=False, switches=True):
    """Time and print."""
    device, changed = describe_device(open_runtime(config)), []
    if switches:
        # Before the parts: a process begins with the peak of the one that started it, still small here.
        with Interrupt():
            changed = bench_switches(config)
    parts = bench_parts(config)
    if as_json:
        print(json.dumps({"device": device, "config": config.to_dict(), "parts": parts, "switches": changed}))
        return
    print(f"device: {device}; samples of {config.max_seq_length} tokens\n")
    print(*figures_table(PART_COLUMNS, parts), sep="\n")
    if changed:
        print("", *figures_table(SWITCH_COLUMNS, changed), "", sep="\n")
        print("loss: of the second epoch over the same random ids; rows of equal batches differ by rounding.")


def flags(parser):
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--no_switches", action="store_true", help="leave out the second table")


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags)
        main(config, arguments.json, not arguments.no_switches)
