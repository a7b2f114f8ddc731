"""What a model file or a checkpoint is and how well it predicts held-out dialogues, bits per byte included.

    python3 -m scripts.evaluate checkpoints/DATA/models/TYPE_RUN.pth     # its run's held-out dialogues
    python3 -m scripts.evaluate checkpoints/model_best.pt --data_source other.jsonl --samples 100
    python3 -m scripts.evaluate checkpoints/model_latest.pt --inspect    # what it holds; no data needed

Trains nothing and changes nothing; compare models with other tokenizers by bits per byte.
"""

import contextlib
import json

import torch

from config import ResidualConfig
from newllm.config import EARLIER, Range, expanded
from newllm.data.dialogues import open_corpus
from newllm.data.samples import pack
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import evaluate_prediction
from newllm.flags import Parser, flag
from newllm.report.record import format_value
from newllm.saving.stop import Interrupt
from newllm.saving.trained import open_model, open_saved


def evaluate(path, data_source="", samples=0):
    """Figures of a model file or a checkpoint, as a dict of plain values.

    Args:
        data_source: as in config.py; "": that of its run. samples: how many; 0: as many as its run did.

    Raises:
        UserError: the file is neither, the data cannot be had, or holds fewer samples.
    """
    model, tokenizer, saved = open_model(path)
    config = EARLIER | saved["config"]
    own = [config["data_source"], config["data_split"], config["data_column"]]
    corpus, count = open_corpus(*([data_source] if data_source else own)), samples or config["val_samples"]
    ids, _ = pack(corpus.held_out(), tokenizer, count, config["max_seq_length"])
    if len(ids) < count:
        raise UserError(f"{corpus.name} gives {len(ids)} samples, not {count}: ask for fewer by --samples.")
    cpu, parameters = torch.device("cpu"), list(model.parameters())
    metrics = evaluate_prediction(model, ids, tokenizer.token_bytes(), contextlib.nullcontext, cpu)
    figures = {
        "model_type": config["model_type"],
        "run_id": saved["run_id"],
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "data_source": corpus.name,
        "val_tokens": ids[:, 1:].numel(),
        **{f"val_{name}": value for name, value in metrics.items()},
    }
    then = metrics_in(saved)
    return figures | ({"val_loss_of_the_run": then["loss"]} if "loss" in then else {})


def inspect(path):
    """What a model file or a checkpoint holds, as a dict of plain values; nothing else is read.

    Raises:
        UserError: it cannot be read.
    """
    _, saved = open_saved(path)
    state, metrics, usual = saved.get("stage_state") or {}, metrics_in(saved), ResidualConfig().to_dict()
    place = state | (saved.get("position") or {})
    weights, everything = tensors(saved["model_state_dict"]), tensors(saved)
    histories = [name for name in ("phase1_history", "phase2_history") if saved.get(name)]
    lengths = [f"{name} of {len(next(iter(saved[name].values())))}" for name in histories]
    differing = [f"{name} = {value!r}" for name, value in saved["config"].items() if usual.get(name) != value]
    listed = {
        "kind": "model file" if "tokenizer" in saved else "checkpoint",
        "run_id": saved["run_id"],
        "saved_at": saved.get("saved_at"),
        "phase": saved.get("stage", "complete"),
        "label": saved.get("epoch"),
        "goes_on": saved.get("restart"),
        **{name: place.get(name) for name in ("iteration", "epoch", "batch", "steps", "tokens")},
        "step": saved.get("step"),
        "seconds": saved.get("seconds"),
        **{f"val_{name}": metrics.get(name) for name in ("loss", "ppl", "bpb", "acc", "epoch")},
        "model_tensors": len(weights),
        "model_mb": sum(tensor.nbytes for tensor in weights) / 1e6,
        "all_tensors": len(everything),
        "all_mb": sum(tensor.nbytes for tensor in everything) / 1e6,
        "optimizer": "yes" if "optimizer" in state else "no",
        "histories": ", ".join(lengths),
        "results_of": ", ".join(saved.get("results", {})),
        "data_fingerprint": saved.get("data_fingerprint"),
        "versions": ", ".join(f"{name} {version}" for name, version in saved.get("versions", {}).items()),
        "git_commit": saved.get("git_commit"),
        "differs_from_config.py": ", ".join(differing),
    }
    return {name: value for name, value in listed.items() if value not in (None, "")}


def metrics_in(saved):
    """Validation figures that a file carries: of its own weights, else of the best epoch; {} without any."""
    state = saved.get("stage_state") or {}
    return saved.get("metrics") or saved.get("best") or state.get("best") or {}


def tensors(value):
    """All tensors within a nested structure."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def main(arguments=None):
    """Print the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model_path", type=expanded, help="a model file, a checkpoint, or a folder of checkpoints")
    add("--inspect", action="store_true", help="only list what the file holds")
    add("--data_source", type=expanded, default="", help="other data than the run's, as in config.py")
    whole = flag("samples", int, Range(0))
    add("--samples", type=whole, default=0, help="samples to predict; 0: as many as the run did")
    add("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    with Interrupt():
        if options.inspect:
            figures = inspect(options.model_path)
        else:
            figures = evaluate(options.model_path, options.data_source, options.samples)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name}: {format_value(value)}" for name, value in figures.items()))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
