"""How fast this machine does each part: tokens per second, share of its own matrix rate, ratio to a per-token loop.

    python3 -m scripts.bench                  # the network of config.py; every setting is a flag
    python3 -m scripts.bench --json

Parts are timed one after the other in one process (newllm/training/timing.py). The matrix rates are those of the same process
at the shapes used (forward and both gradients), so a share says what is left to gain on this machine, whatever machine it
is. Only matrix products count as arithmetic. Switches are compared before that, each in a process of its own, whose peak
memory is then its own too; the last two are the baseline Transformer, end to end, with either backend of its attention.
A speed is the median of a few steps, with the slowest and the fastest.
"""

import dataclasses
import json
import statistics

from config import ResidualConfig
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.flags import parse_args
from newllm.models.cross_entropy import CHUNK_ELEMENTS
from newllm.report.compare import table
from newllm.saving.stop import Interrupt
from newllm.training.runtime import describe_device, open_runtime, peak_memory_mb
from newllm.training.timing import Bench

PART_COLUMNS = ("part", "tok/s", "GFLOP/s", "of matrix rate", "x per-token loop")
SWITCH_COLUMNS = ("one switch at a time", "Phase 1 tok/s", "Phase 2 tok/s", "loss", "peak MB")
LOSS_NOTE = (
    "loss: of the second epoch over the same random ids; rows of equal batches differ in it by rounding alone, or compute "
    "something else.\nIt does not show which switch is the first to a given validation loss: scripts.compare does."
)
VOCABULARIES = (4096, 50257)


def bench(config, say):
    """Time all parts; `say` takes a line of progress.

    Returns:
        List of rows: part, tok_per_s [median, lowest, highest], gflops, share (of its time, that its products take at the rates measured for their
        shapes, in the precision in effect), ratio (to the per-token loop; None where that has no counterpart).
    """
    main, result, rates = Bench(config, VOCABULARIES[0]), [], {}
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

    def add(part, speeds, *work, base=None):
        """A row; work: (FLOP a token, FLOP/s of products of that shape), one pair a shape."""
        tok_per_s = statistics.median(speeds)
        gflops, share = (
            tok_per_s * sum(n for n, _ in work) / 1e9,
            tok_per_s * sum(n / rate for n, rate in work),
        )
        ratio = base and tok_per_s / statistics.median(base)
        result.append(dict(part=part, tok_per_s=spread(speeds), gflops=gflops, share=share, ratio=ratio))
        say(f"{part}: {tok_per_s:,.0f} tok/s, {share:.0%} of the matrix rate")

    flops, single, rate = main.flops, rates["fp32", "map"], rates[used, "map"]
    loop, training_loop = main.per_token_loop(False), main.per_token_loop(True)
    add("per-token loop, forward", loop, (flops.map, single), base=loop)
    add("per-token loop, forward + backward", training_loop, (3 * flops.map, single), base=training_loop)
    add("Phase 1 sweep, forward", main.sweep_forward(), (flops.map, rate), base=loop)
    add("Phase 1, loss + backward + step", main.phase1(), (flops.phase1, rate), base=training_loop)
    for sequences in (1, config.num_samples):
        add(
            f"step by step, {sequences} sequences at once",
            main.sequential(sequences),
            (flops.map, rate),
            base=loop,
        )
    for vocab_size in VOCABULARIES:
        each, logits = Bench(config, vocab_size), 3 * 2 * config.embed_dim * vocab_size
        for name, freeze, total in (
            ("frozen", True, each.flops.frozen),
            ("fine-tuned", False, each.flops.fine_tuned),
        ):
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
    "all together": {"compile": True, "phase1_batch_size": 48, "phase2_batch_size": 48, "gradient_sweeps": 1},
}


ATTENTION = ("sdpa", "eager")  # names of transformers; training always takes the first
TRANSFORMER = dict(model_type="transformer", freeze_context=False, whiten_context=False)


def time_switch(config):
    """Phase 1 and fine-tuned Phase 2 of one configuration, its loss, and the peak memory of the process that trained both."""
    return _timed(Bench(config, VOCABULARIES[0]), lambda each: each.phase1())


def time_attention(config, backend):
    """The same of a Transformer, which has no Phase 1, with this attention backend."""
    each = Bench(config, VOCABULARIES[0])
    each.model.body.set_attn_implementation(backend)
    return _timed(each, lambda each: None)


def _timed(each, phase1):
    speeds = {"phase1_tok_per_s": spread(phase1(each)), "phase2_tok_per_s": spread(each.phase2(False))}
    return speeds | {"loss": each.loss, "peak_memory_mb": peak_memory_mb()}


def bench_switches(config, say):
    """Training with one setting changed at a time, as a list of rows: the switch, and what its process measured."""
    runs = {name: (time_switch, dataclasses.replace(config, **changes)) for name, changes in SWITCHES.items()}
    transformer = dataclasses.replace(config, **TRANSFORMER)
    runs |= {
        f"Transformer, attention {backend}": (time_attention, transformer, backend) for backend in ATTENTION
    }
    rows = []
    for name, run in runs.items():
        rows.append({"switch": name} | call_apart(*run))
        say(" | ".join(shown_switch(rows[-1])))
    return rows


def spread(speeds):
    """[median, lowest, highest] of a list; None of None."""
    return speeds and [statistics.median(speeds), min(speeds), max(speeds)]


def shown_speed(speed):
    return "{:,.0f} ({:,.0f} to {:,.0f})".format(*speed) if speed else ""


def shown_part(row):
    ratio = f"{row['ratio']:,.1f}" if row["ratio"] else ""
    return row["part"], shown_speed(row["tok_per_s"]), f"{row['gflops']:,.1f}", f"{row['share']:.1%}", ratio


def shown_switch(row):
    speeds = (shown_speed(row[phase]) for phase in ("phase1_tok_per_s", "phase2_tok_per_s"))
    return row["switch"], *speeds, f"{row['loss']:.4f}", f"{row['peak_memory_mb']:,.0f}"


def main(config, as_json=False, switches=True):
    """Time and print."""
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    device = describe_device(open_runtime(config))
    say(f"device: {device}; samples of {config.max_seq_length} tokens\n")
    with (
        Interrupt()
    ):  # before the parts: a process begins with the peak of the one that started it, still small here
        changed = bench_switches(config, say) if switches else []
    parts = bench(config, say)
    if as_json:
        print(json.dumps({"device": device, "config": config.to_dict(), "parts": parts, "switches": changed}))
        return
    print("\n" + "\n".join(table(PART_COLUMNS, map(shown_part, parts))))
    if changed:
        print("\n" + "\n".join([*table(SWITCH_COLUMNS, map(shown_switch, changed)), LOSS_NOTE]))


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
