"""What a model file is and how well it predicts held-out dialogues: parameters, loss, perplexity, accuracy, bits per byte.

    python3 -m scripts.evaluate checkpoints/DATA/models/context_20260101_120000.pth         # on its run's held-out dialogues
    python3 -m scripts.evaluate MODEL.pth --data_source other.jsonl --samples 100           # on the last ones of other data

Trains nothing and changes nothing; compare models with other tokenizers by bits per byte.
"""

import contextlib
import json

import torch

from newllm.config import EARLIER, Parser, Range, expanded, flag
from newllm.data.corpus import open_corpus
from newllm.data.dataset import pack
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import evaluate_prediction
from newllm.interrupt import Interrupt
from newllm.reporting.runlog import format_value
from newllm.training.trained import load_model, open_saved


def evaluate(path, data_source="", samples=0):
    """Figures of a model file, as a dict of plain values.

    Args:
        data_source: as in config.py; "": that of its run. samples: how many to predict; 0: as many as its run did.

    Raises:
        UserError: the file is no model, the data cannot be had, or holds fewer samples.
    """
    found = open_saved(path)[1]
    if "tokenizer" not in found:
        raise UserError(f"{path} is a checkpoint: give a model file, as scripts.report lists them.")
    config = EARLIER | found["config"]
    if config["whiten_context"]:
        raise UserError(f"{path} is a control on whitened contexts: it cannot read a new text.")
    model, tokenizer = load_model(found)
    own = config["data_source"], config["data_split"], config["data_column"]
    corpus, count = open_corpus(*([data_source] if data_source else own)), samples or config["val_samples"]
    ids, _, _ = pack(enumerate(corpus.held_out()), tokenizer, count, config["max_seq_length"])
    if len(ids) < count:
        raise UserError(f"{corpus.name} gives {len(ids)} samples, not {count}: ask for fewer by --samples.")
    metrics = evaluate_prediction(model, ids, tokenizer.token_bytes(), contextlib.nullcontext, torch.device("cpu"))
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
        "val_loss_of_the_run": found["metrics"]["loss"],
    }


def main(arguments=None):
    """Print the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model_path", type=expanded, help="a model file")
    parser.add_argument("--data_source", type=expanded, default="", help="other data than the run's, as in config.py")
    parser.add_argument(
        "--samples",
        type=flag("samples", int, Range(0)),
        default=0,
        help="samples to predict; 0: as many as the run did",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    with Interrupt():
        figures = evaluate(options.model_path, options.data_source, options.samples)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name}: {format_value(value)}" for name, value in figures.items()))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
