"""How much memory a run will take: what it holds in each stage, the predicted peak, and whether this machine has it.

    python3 -m scripts.estimate_memory                      # the run of config.py; every setting is a flag
    python3 -m scripts.estimate_memory --measure            # trains it on random ids too, two rounds a stage, and compares
    python3 -m scripts.estimate_memory --json

The process without the network is measured: libraries load much of themselves on first use, so the run of a miniature
network, in a process of its own, tells what they take. All the rest is arithmetic (newllm/training/memory_estimate.py).
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import parse_args
from newllm.errors import exit_on_user_error
from newllm.interrupt import Interrupt
from newllm.reporting.criteria import table
from newllm.training.device import describe_device, memory_of, open_runtime
from newllm.training.memory_estimate import moments, predict, vocabulary

# From the second iteration and epoch on, saves and best weights lie beside training.
ROUNDS = dict(
    phase1_max_iterations=2, phase2_epochs=2, load_checkpoint=False, backup_dir="", max_minutes=0.0, artifacts=False
)
MINIATURE = dict(num_samples=2, val_samples=2, max_seq_length=2, vocab_size=257, tokenizer="bpe", embeddings="random", context_dim=2,
                 embed_dim=2, num_layers=1, token_layers=1, preset="none")  # fmt: skip
MB = 1e6


def measure(config):
    """Peak of a run of this configuration on random ids, in bytes. Only for a fresh process: it replaces the run's data."""
    train.load_data = random_data
    train.load_embedding = lambda source, *shape: None if source == "random" else torch.zeros(*shape)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        summary = train.main(dataclasses.replace(config, checkpoint_dir=folder, **ROUNDS))
    if not torch.cuda.is_initialized() and os.path.exists("/proc/self/status"):
        # What the kernel tells through getrusage begins, in a new process, with the size of the one that started it.
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
    return int(summary["peak_memory_mb"] * MB)


def random_data(config, progress=None):
    """Stands in for the data of a run: its sizes, random ids."""
    vocab_size, shape = vocabulary(config), (config.num_samples + config.val_samples, config.max_seq_length + 1)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(config.seed), dtype=torch.int32)
    return SimpleNamespace(
        train=ids[: config.num_samples], val=ids[config.num_samples :], vocab_size=vocab_size, source="random", notes=[],
        token_bytes=torch.ones(vocab_size, dtype=torch.int32), fingerprint="", tokenizer=SimpleNamespace(name=config.tokenizer),
    )  # fmt: skip


def report(config, measuring=False):
    """Everything that the command says, as a dict of plain values in bytes."""
    runtime = open_runtime(config)
    cuda = runtime.device.type == "cuda"
    base = call_apart(measure, dataclasses.replace(config, **MINIATURE))
    rows = predict(moments(config, vocabulary(config), runtime.precision, cuda), base, cuda)
    moment, things = max(rows, key=lambda row: sum(row[1].values()))
    peak, memory = sum(things.values()), memory_of(runtime.device)
    result = {
        "device": describe_device(runtime),
        "moments": [{"stage": m.stage, "moment": m.name, "bytes": sum(row.values()), "things": row} for m, row in rows],
        "predicted_peak": peak,
        "at": f"{moment.stage}, {moment.name}; most of it {max(things, key=things.get)}",
        "memory": memory,
        "margin": memory - peak,
    }
    if measuring:
        measured = call_apart(measure, config)
        result |= {"measured_peak": measured, "relative_error": peak / measured - 1}
    return result


def stage_tables(found):
    """A table for each stage: things down, moments across, in MB."""
    for stage in dict.fromkeys(moment["stage"] for moment in found):
        columns = [moment for moment in found if moment["stage"] == stage]
        names = dict.fromkeys(name for moment in columns for name in moment["things"])
        rows = [(name, *(f"{moment['things'].get(name, 0) / MB:,.1f}" for moment in columns)) for name in names]
        rows.append(("sum", *(f"{moment['bytes'] / MB:,.1f}" for moment in columns)))
        yield "\n".join(table((f"{stage}, MB", *(moment["moment"] for moment in columns)), rows))


def main(config, as_json=False, measuring=False):
    """Estimate, measure if asked to, and print."""
    with Interrupt():
        result = report(config, measuring)
    if as_json:
        print(json.dumps(result))
        return
    print(f"device: {result['device']}; vocabulary {vocabulary(config):,}\n")
    print("\n\n".join(stage_tables(result["moments"])))
    print(f"\npredicted peak: {result['predicted_peak'] / MB:,.0f} MB ({result['at']})")
    if measuring:
        print(
            f"measured peak: {result['measured_peak'] / MB:,.0f} MB, so the estimate is {result['relative_error']:+.1%} off"
        )
    verdict = "fits" if result["margin"] >= 0 else "does not fit"
    print(
        f"memory of this machine: {result['memory'] / MB:,.0f} MB, so the run {verdict}: margin {result['margin'] / MB:,.0f} MB"
    )


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(
            ResidualConfig,
            description=__doc__.splitlines()[0],
            extra=lambda parser: (
                parser.add_argument("--json", action="store_true", help="one JSON object instead of tables"),
                parser.add_argument("--measure", action="store_true", help="also run it, on random ids, and compare"),
            ),
        )
        main(config, arguments.json, arguments.measure)
