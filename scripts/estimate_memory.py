"""How much memory a run will take: what it holds in each stage, the predicted peak, and whether this machine has it.

    python3 -m scripts.estimate_memory                      # the run of config.py; every setting is a flag
    python3 -m scripts.estimate_memory --measure            # trains it on random ids too, two rounds a stage, and compares
    python3 -m scripts.estimate_memory --json

The process without the network is measured here and now; the rest is arithmetic (newllm/training/memory_estimate.py).
Reading the data is not in it.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from types import SimpleNamespace

import torch

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.flags import parse_args
from newllm.report.compare import table
from newllm.saving.stop import Interrupt
from newllm.training.memory_estimate import left_out, libraries_mb, moments, vocabulary
from newllm.training.runtime import describe_device, memory_of, open_runtime

# From the second iteration and epoch on, saves and best weights lie beside training.
ROUNDS = dict(
    phase1_max_iterations=2,
    phase2_epochs=2,
    load_checkpoint=False,
    backup_dir="",
    max_minutes=0.0,
    artifacts=False,
)
MB = 1e6


def measure(config):
    """Peak MB of this process after a run of this configuration on random ids."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        config = dataclasses.replace(config, checkpoint_dir=folder, **ROUNDS)
        return train.main(config, sources=(random_data, zero_embedding))["peak_memory_mb"]


def random_data(config, progress=None):
    """Stands in for the data of a run: its sizes, random ids."""
    vocab_size, shape = (
        vocabulary(config),
        (config.num_samples + config.val_samples, config.max_seq_length + 1),
    )
    ids = torch.randint(
        vocab_size, shape, generator=torch.Generator().manual_seed(config.seed), dtype=torch.int32
    )
    return SimpleNamespace(
        train=ids[: config.num_samples], val=ids[config.num_samples :], vocab_size=vocab_size, source="random", notes=[],
        token_bytes=torch.ones(vocab_size, dtype=torch.int32), fingerprint="", tokenizer=SimpleNamespace(name=config.tokenizer),
    )  # fmt: skip


def zero_embedding(source, *shape):
    return None if source == "random" else torch.zeros(*shape)


def report(config, measuring=False):
    """Everything that the command says, as a dict of plain values in MB."""
    runtime, vocab_size = open_runtime(config), vocabulary(config)
    cuda = runtime.device.type == "cuda"
    libraries, rows = libraries_mb(config, runtime), []
    for stage, moment, things in moments(config, vocab_size, runtime.precision, cuda):
        things = {"process and libraries": libraries} | {name: size / MB for name, size in things.items()}
        rows.append({"stage": stage, "moment": moment, "sum": sum(things.values()), "things": things})
    largest, memory = max(rows, key=lambda row: row["sum"]), memory_of(runtime.device) / MB
    peak = largest["sum"]
    if cuda:
        memory *= config.gpu_memory_fraction
    result = {
        "device": describe_device(runtime),
        "moments": rows,
        "predicted_peak": peak,
        "at": f"{largest['stage']}, {largest['moment']}; most of it {max(largest['things'], key=largest['things'].get)}",
        "left_out": left_out(config, cuda),
        "memory": memory,
        "margin": memory - peak,
    }
    if measuring:
        measured = call_apart(measure, config)
        result |= {"measured_peak": measured, "relative_error": peak / measured - 1}
    return result


def stage_tables(found):
    """A table for each stage: things down, moments across, in MB."""
    for stage in dict.fromkeys(row["stage"] for row in found):
        columns = [row for row in found if row["stage"] == stage]
        names = dict.fromkeys(name for row in columns for name in row["things"])
        rows = [(name, *(f"{row['things'].get(name, 0):,.1f}" for row in columns)) for name in names]
        rows.append(("sum", *(f"{row['sum']:,.1f}" for row in columns)))
        yield "\n".join(table((f"{stage}, MB", *(row["moment"] for row in columns)), rows))


def main(config, as_json=False, measuring=False):
    """Estimate, measure if asked to, and print."""
    with Interrupt():
        result = report(config, measuring)
    if as_json:
        print(json.dumps(result))
        return
    print(f"device: {result['device']}; vocabulary {vocabulary(config):,}\n")
    print("\n\n".join(stage_tables(result["moments"])))
    bound = f"a lower bound, without {result['left_out']}" if result["left_out"] else "give or take 15 %"
    print(f"\npredicted peak: {result['predicted_peak']:,.0f} MB ({result['at']}), {bound}")
    if measuring:
        off = f"{result['relative_error']:+.1%} off"
        print(f"measured peak: {result['measured_peak']:,.0f} MB, so the estimate is {off}")
    verdict = "fits" if result["margin"] >= 0 else "does not fit"
    margin = f"margin {result['margin']:,.0f} MB"
    print(f"memory of this machine: {result['memory']:,.0f} MB, so the run {verdict}: {margin}")


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(
            ResidualConfig,
            description=__doc__.splitlines()[0],
            extra=lambda parser: (
                parser.add_argument("--json", action="store_true", help="one JSON object instead of tables"),
                parser.add_argument(
                    "--measure", action="store_true", help="also run it, on random ids, and compare"
                ),
            ),
        )
        main(config, arguments.json, arguments.measure)
