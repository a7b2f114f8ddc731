"""What a model file or a checkpoint is and how well it predicts held-out dialogues: loss, perplexity, accuracy, bits per byte.

    python3 -m scripts.evaluate checkpoints/DATA/models/context_20260101_120000.pth         # on its run's held-out dialogues
    python3 -m scripts.evaluate checkpoints/model_best.pt --data_source other.jsonl --samples 100   # on the last of other data
    python3 -m scripts.evaluate checkpoints/model_latest.pt --inspect                       # only what it holds; no data needed

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
        data_source: as in config.py; "": that of its run. samples: how many to predict; 0: as many as its run did.

    Raises:
        UserError: the file is neither, the data cannot be had, or holds fewer samples.
    """
    model, tokenizer, found = open_model(path)
    config = EARLIER | found["config"]
    own = config["data_source"], config["data_split"], config["data_column"]
    corpus, count = open_corpus(*([data_source] if data_source else own)), samples or config["val_samples"]
    ids, _, _ = pack(enumerate(corpus.held_out()), tokenizer, count, config["max_seq_length"])
    if len(ids) < count:
        raise UserError(f"{corpus.name} gives {len(ids)} samples, not {count}: ask for fewer by --samples.")
    metrics = evaluate_prediction(
        model, ids, tokenizer.token_bytes(), contextlib.nullcontext, torch.device("cpu")
    )
    return {
        "model_type": config["model_type"],
        "run_id": found["run_id"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "data_source": corpus.name,
        "val_tokens": ids[:, 1:].numel(),
        **{f"val_{name}": value for name, value in metrics.items()},
        **{f"val_{name}_of_the_run": value for name, value in metrics_in(found).items() if name == "loss"},
    }


def inspect(path):
    """What a model file or a checkpoint holds, as a dict of plain values; nothing else is read.

    Raises:
        UserError: it cannot be read.
    """
    _, found = open_saved(path)
    state, weights = found.get("stage_state") or {}, list(tensors(found["model_state_dict"]))
    place = state | (found.get("position") or {})
    everything = list(tensors(found))
    usual = ResidualConfig().to_dict()
    listed = {
        "kind": "model file" if "tokenizer" in found else "checkpoint",
        "run_id": found["run_id"],
        "saved_at": found.get("saved_at"),
        "phase": found.get("stage", "complete"),
        "label": found.get("epoch"),
        "goes_on": found.get("restart"),
        **{name: place.get(name) for name in ("iteration", "epoch", "batch", "steps", "tokens")},
        "step": found.get("step"),
        "seconds": found.get("seconds"),
        **{f"val_{name}": metrics_in(found).get(name) for name in ("loss", "ppl", "bpb", "acc", "epoch")},
        "model_tensors": len(weights),
        "model_mb": sum(map(size_mb, weights)),
        "all_tensors": len(everything),
        "all_mb": sum(map(size_mb, everything)),
        "optimizer": "yes" if "optimizer" in state else "no",
        "histories": ", ".join(
            f"{name} of {len(next(iter(found[name].values())))}"
            for name in ("phase1_history", "phase2_history")
            if found.get(name)
        ),
        "results_of": ", ".join(found.get("results", {})),
        "data_fingerprint": found.get("data_fingerprint"),
        "versions": ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items()),
        "git_commit": found.get("git_commit"),
        "differs_from_config.py": ", ".join(
            f"{name} = {value!r}" for name, value in found["config"].items() if usual.get(name) != value
        ),
    }
    return {name: value for name, value in listed.items() if value not in (None, "")}


def metrics_in(found):
    """Validation figures that a file carries: of its own weights, else of the best epoch so far; {} where there are none."""
    state = found.get("stage_state") or {}
    return found.get("metrics") or found.get("best") or state.get("best") or {}


def tensors(value):
    """All tensors within a nested structure."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def size_mb(tensor):
    return tensor.numel() * tensor.element_size() / 1e6


def main(arguments=None):
    """Print the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model_path", type=expanded, help="a model file, a checkpoint, or a folder of checkpoints"
    )
    parser.add_argument("--inspect", action="store_true", help="only list what the file holds")
    parser.add_argument(
        "--data_source", type=expanded, default="", help="other data than the run's, as in config.py"
    )
    parser.add_argument(
        "--samples",
        type=flag("samples", int, Range(0)),
        default=0,
        help="samples to predict; 0: as many as the run did",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
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
