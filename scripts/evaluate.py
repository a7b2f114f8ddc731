"""What a model file or a checkpoint is and how well it predicts held-out dialogues, bits per byte included.

    python3 -m scripts.evaluate checkpoints/DATA/models/TYPE_RUN.pth     # its run's held-out dialogues
    python3 -m scripts.evaluate checkpoints/model_best.pt --data_source other.jsonl --samples 100
    python3 -m scripts.evaluate a/models/A.pth b/models/B.pth            # an ensemble: predictions averaged
    python3 -m scripts.evaluate checkpoints/model_latest.pt --inspect    # what it holds; no data needed

Trains nothing and changes nothing; compare models with other tokenizers by bits per byte. `val_ppl` and its
like are of the network alone, `val_ppl_retrieval` and its like of what the model is used with: each sample is
read from its first token on, and what was read so far is looked up.
"""

import contextlib
import json
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves

from config import ResidualConfig
from newllm.config import EARLIER, Range, expanded
from newllm.data.dialogues import open_corpus
from newllm.data.packing import pack
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import (
    evaluate_prediction,
    evaluate_retrieval,
    loss_figures,
    sample_digest,
    text_bytes,
)
from newllm.flags import Parser, flag
from newllm.phases.retrieval import SAMPLES_AT_A_TIME, Averaged, gather, measure
from newllm.report.record import format_value
from newllm.retrieval.mixture import Retrieval
from newllm.saving.stop import Interrupt
from newllm.saving.trained import open_model, open_retrieval, open_saved

SAME = "data_source", "data_split", "data_column", "max_seq_length", "val_samples", "tune_share", "fit_share"
EXACT = contextlib.nullcontext, torch.device("cpu")


def evaluate(path, *others, data_source="", samples=0, retrieval="model"):
    """Figures of a model file or a checkpoint, as a dict of plain values.

    Args:
        others: more of them, trained on the same data: figures are those of the mean of all predictions, and
            what the first looks up is fitted to it anew, each half of the samples by the other.
        data_source: as in config.py; "": that of its run. samples: how many; 0: as many as its run did.
        retrieval: "model": with what it looks up, if it does; "none": the network alone.

    Raises:
        UserError: a file is neither, the data cannot be had, or holds fewer samples.
    """
    model, tokenizer, saved = open_model(path)
    models = [model, *(opened_beside(tokenizer, saved, other) for other in others)]
    config = EARLIER | saved["config"]
    own = config["data_source"], config["data_split"], config["data_column"]
    corpus = open_corpus(data_source) if data_source else open_corpus(*own)
    count = samples or config["val_samples"]
    ids, *_ = pack(corpus.held_out(), tokenizer, count, config["max_seq_length"])
    if len(ids) < count:
        raise UserError(f"{corpus.name} gives {len(ids)} samples, not {count}: ask for fewer by --samples.")
    parameters = [parameter for model in models for parameter in model.parameters()]
    given = ids, tokenizer.token_bytes()
    looked_up = open_retrieval(path, model, saved) if retrieval == "model" else None
    if others:
        metrics, about = ensemble_figures(models, looked_up, *given)
    elif looked_up is None:
        metrics, about = evaluate_prediction(model, *given, *EXACT), "none"
    else:
        metrics, about = evaluate_retrieval(model, looked_up, *given, *EXACT), described(looked_up, ids)
    figures = dict(
        model_type=config["model_type"], run_id=saved["run_id"], models=len(models),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size,
        data_source=corpus.name, val_tokens=ids[:, 1:].numel(), retrieval=about,
    )  # fmt: skip
    return figures | {f"val_{name}": value for name, value in metrics.items()}


def opened_beside(tokenizer, saved, path):
    """The model of another path, of a run on the same text as the one that was saved."""
    model, others, other = open_model(path)
    if other["data_fingerprint"] == saved["data_fingerprint"]:  # wherever its file lay
        return model
    settings = EARLIER | saved["config"], EARLIER | other["config"]
    differing = [name for name in SAME if settings[0][name] != settings[1][name]]
    if others.fingerprint != tokenizer.fingerprint:
        differing.append("tokenizer")
    if differing:
        raise UserError(
            f"{path} differs from the first model in {', '.join(differing)}: predictions of runs on the same "
            "text, in the same ids, can be averaged."
        )
    return model


def ensemble_figures(models, retrieval, ids, token_bytes):
    """(Figures of the mean of the predictions of several models on samples, what is looked up)."""
    reading = Averaged(models, ids, SimpleNamespace(autocast=EXACT[0], device=EXACT[1]))
    nats, right = 0.0, 0
    for first in range(0, len(ids), SAMPLES_AT_A_TIME):
        part = slice(first, first + SAMPLES_AT_A_TIME)
        logits, targets = reading.logits(reading(part)["hidden"]), ids[part, 1:].long()
        nats -= logits.gather(-1, targets[..., None]).double().sum().item()
        right += (logits.argmax(-1) == targets).sum().item()
    count = ids[:, 1:].numel()
    figures = loss_figures(nats, count, text_bytes(ids, token_bytes)) | {"acc": right / count}
    if retrieval is None:
        return figures, "none"
    fresh = Retrieval.described(**retrieval.description())  # its gate has been fitted on these samples
    fresh.keys, fresh.ngram, fresh.store = retrieval.keys, retrieval.ngram, retrieval.store
    gathered = gather(fresh, ids, reading)
    found = measure(fresh, gathered, SimpleNamespace(val=ids, token_bytes=token_bytes))
    looked_up = {f"{name}_retrieval": found[name] for name in ("loss", "ppl", "bpb")}
    return figures | looked_up, f"{', '.join(fresh.experts)} of the first; each half by the gate of the other"


def described(retrieval, ids):
    """What a retrieval looks up, and what its figures on samples are worth."""
    parts = ", ".join(retrieval.experts)
    if retrieval.held_out is None:
        return f"{parts}; it does not say what its gate was fitted on: take the figures as in-sample"
    known = sum(sample_digest(sample) in retrieval.held_out for sample in ids)
    if not known:
        return f"{parts}; its gate was fitted on none of the {len(ids)} samples"
    return f"{parts}; {known} of {len(ids)} samples are its run's own: each by a gate fitted on others"


def inspect(path):
    """What a model file or a checkpoint holds, as a dict of plain values; UserError if it cannot be read."""
    _, saved = open_saved(path)
    usual, state = ResidualConfig().to_dict(), saved.get("stage_state") or {}
    metrics = saved.get("metrics") or saved.get("best") or state.get("best") or {}  # of the best epoch
    weights = list(saved["model_state_dict"].values())
    everything = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor)]
    differing = [f"{name} = {value!r}" for name, value in saved["config"].items() if usual.get(name) != value]
    return {
        "kind": "model file" if "tokenizer" in saved else "checkpoint",
        "phase": saved.get("stage", "complete"),
        "label": saved.get("epoch", "best"),
        **plain(saved),
        **plain(state),
        **plain(saved.get("position") or {}),
        **{f"val_{name}": value for name, value in plain(metrics).items()},
        "model_tensors": len(weights),
        "model_mb": sum(tensor.nbytes for tensor in weights) / 1e6,
        "all_tensors": len(everything),
        "all_mb": sum(tensor.nbytes for tensor in everything) / 1e6,
        "optimizer": "yes" if "optimizer" in state else "no",
        "versions": ", ".join(f"{name} {version}" for name, version in saved.get("versions", {}).items()),
        "differs_from_config.py": ", ".join(differing),
    }


def plain(values):
    """Those values of a dict that fit on a line."""
    return {name: value for name, value in values.items() if isinstance(value, str | int | float)}


def main(arguments=None):
    """Print the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    what = "a model file, a checkpoint, or a folder of checkpoints; several: the mean of their predictions"
    add("model_path", type=expanded, nargs="+", help=what)
    add("--inspect", action="store_true", help="only list what the file holds")
    add("--data_source", type=expanded, default="", help="other data than the run's, as in config.py")
    whole = flag("samples", int, Range(0))
    add("--samples", type=whole, default=0, help="samples to predict; 0: as many as the run did")
    what = "none: the network alone, without what it looks up"
    add("--retrieval", choices=("model", "none"), default="model", help=what)
    add("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    with Interrupt():
        if options.inspect:
            figures = inspect(options.model_path[0])
        else:
            asked = {name: vars(options)[name] for name in ("data_source", "samples", "retrieval")}
            figures = evaluate(*options.model_path, **asked)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name}: {format_value(value)}" for name, value in figures.items()))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
