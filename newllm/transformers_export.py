"""A trained model as a folder that transformers loads offline: weights, tokenizer, code, model card.

What it looks up beside its own prediction lies among the weights.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import tempfile
from pathlib import Path

import tokenizers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from newllm.errors import UserError
from newllm.report.summary import language_rows
from newllm.retrieval.mixture import FORMAT
from newllm.saving.trained import load_model
from newllm.transformers_model import NewLLMConfig, NewLLMForCausalLM

MODEL = "modeling_newllm"
CODE = {  # file of the folder: the module it is copied from
    f"{MODEL}.py": "transformers_model.py",
    "network.py": "models/network.py",
    "solver.py": "fixed_point/solver.py",
    "keys.py": "retrieval/keys.py",
    "lookup.py": "retrieval/lookup.py",
    "mixture.py": "retrieval/mixture.py",
    "ngram.py": "retrieval/ngram.py",
    "versions.py": "versions.py",
}
NEEDED = ("torch", "transformers", "tokenizers", "numpy")  # to load an exported folder
# Writes a dialogue as the data's `render` does, and raises where that does: encode() on lone surrogates.
CHAT_TEMPLATE = """\
{%- set dialogue = namespace(text='') -%}
{%- for message in messages -%}
{%- set role, content = message['role'], message['content'] -%}
{%- set textual = content is string or content is none or content is undefined -%}
{%- if role is not string or not role.strip() or not textual -%}
{{- raise_exception('message ' ~ loop.index ~ ' needs a text as role, and a text or null as content') -}}
{%- endif -%}
{%- if content and content.strip() -%}
{%- set turn = role.strip().capitalize() ~ ': ' ~ content.strip() -%}
{%- set dialogue.text = dialogue.text ~ ('\\n' if dialogue.text else '') ~ turn -%}
{%- endif -%}
{%- endfor -%}
{%- set _ = dialogue.text.encode() -%}
{{- dialogue.text -}}
{%- if add_generation_prompt -%}
{{- '\\nAssistant:' if dialogue.text else 'Assistant:' -}}
{%- endif -%}
"""


def export_folder(saved, record, folder):
    """Write all of it.

    Args:
        saved: what newllm.saving.trained.save_model wrote; without "retrieval" the network alone is exported.
        record: of its run, newllm.report.record.Record.
        folder: made if it is not there; an earlier export is replaced.

    Raises:
        UserError: the model is a baseline or reads no new text; the folder holds other files or fails.
    """
    model, tokenizer = to_transformers(saved)
    folder = Path(folder)
    if any(folder.glob("[!.]*")) and not is_export(folder):
        raise UserError(f"{folder} holds other files, which would be replaced: choose a new folder.")
    with written_together(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_code(new)
        card = model_card(record, model.retrieval)
        (new / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def refresh_folder(folder):
    """Give a folder that was exported before the code of today; nothing else changes.

    Raises:
        UserError: it is no exported folder, looks up what that code cannot read, or cannot be written;
            nothing has changed.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise UserError(f"{folder} is no folder that scripts.export --format transformers wrote: give one.")
    retrieval = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("retrieval")
    require_format(retrieval, folder)
    with written_together(folder) as new:
        write_code(new)


def require_format(description, whose):
    """Raises UserError where the code of today would look up otherwise than a description says."""
    if isinstance(description, dict) and description.get("format") != FORMAT:
        raise UserError(
            f"what {whose} looks up has format {description.get('format')}, today's code reads {FORMAT}: "
            "run train.py, which makes it anew, and export that, or export with --retrieval none."
        )


def is_export(folder):
    """Whether a folder holds the configuration of an exported model."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "newllm"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def to_transformers(saved):
    """The model and the tokenizer of a model file, as transformers has them."""
    settings = saved["config"]
    kind = settings["model_type"]
    if kind not in ("context", "window", "token") or settings["whiten_context"]:
        raise UserError(
            f"this model of type '{kind}' is a baseline or a control on whitened contexts, which is not "
            "exported: use transformers' own, or --format zip."
        )
    network, tokenizer = load_model(saved)
    retrieval = saved.get("retrieval")
    require_format(retrieval and retrieval["description"], "this model")
    config = NewLLMConfig(
        network=kind, vocab_size=tokenizer.vocab_size, hidden_size=settings["context_dim"],
        embed_dim=settings["embed_dim"], num_hidden_layers=settings["num_layers"],
        token_layers=settings["token_layers"], keeps_embedding=network.context_embedding is not None,
        tie_word_embeddings=settings["tie_weights"], seed=settings["seed"],
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
        retrieval=retrieval and retrieval["description"],
        auto_map={"AutoConfig": f"{MODEL}.NewLLMConfig",
                  "AutoModelForCausalLM": f"{MODEL}.NewLLMForCausalLM"},
    )  # fmt: skip
    model = NewLLMForCausalLM(config)
    model.network.load_state_dict(network.state_dict())
    if retrieval:
        model.retrieval.load_state_dict(retrieval["state"])
    end = tokenizer.decode([tokenizer.eos_id])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json()), eos_token=end, pad_token=end,
        padding_side="left", clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
        split_special_tokens=True,  # spelled out in a text they are text, as in training
    )  # fmt: skip
    return model.eval(), fast


def write_code(folder):
    """The modules that the model needs, importing one another, and the versions they were tested with."""
    tested = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a folder, never installed
        requirements = importlib.metadata.requires("newllm")
        tested = [text for text in requirements if re.match(r"[\w-]+", text)[0] in NEEDED]
    for name, source in CODE.items():
        text = (Path(__file__).parent / source).read_text(encoding="utf-8")
        text = re.sub(r"^from newllm\.([\w.]+) import", beside, text, flags=re.M)
        text = re.sub(r"^TESTED = None.*", f"TESTED = {tested!r}", text, flags=re.M)
        if name == f"{MODEL}.py":  # transformers 5.0 finds only the files that this one names itself
            others = (Path(other).stem for other in CODE if other != name)
            text += "".join(f"from .{other} import __doc__ as _\n" for other in others)
        (folder / name).write_text(text, encoding="utf-8")


def beside(match):
    """An import from a package or a module of the project, as from one folder that holds all of them."""
    path = Path(__file__).parent.joinpath(*match[1].split("."))
    return "from . import" if path.is_dir() else f"from .{path.name} import"


@contextlib.contextmanager
def written_together(folder):
    """A temporary folder in a folder, which is made; its files take their places when all are written.

    Raises:
        UserError: they cannot be written; what was there is there still.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", dir=folder) as new:
            yield Path(new)
            for name in os.listdir(new):
                os.replace(Path(new, name), folder / name)
    except (OSError, UnicodeError, SafetensorError) as error:  # UnicodeError: of a name that is not UTF-8
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written ({reason}): choose another folder.") from error


LOOKED_UP = {
    "ngram": "what followed the last tokens, up to four, in its training text (Kneser-Ney counts)",
    "cache": "what followed places like this one in the text so far, up to {window:,} tokens back",
    "knn": "what followed the {neighbours} places of its training text that are most like this one",
}
HELD = {
    "ngram": "the ids of each run of up to five tokens in it",
    "knn": "the ids of the two tokens at each place of it",
}
RETRIEVAL_CARD = """
## What it looks up

The probabilities are a mixture, weighed anew at each token, of the network's own and of

{looked_up}.

`from_pretrained(..., retrieval="none")` gives the network alone.
"""
HELD_CARD = """
**Whoever has this folder can read much of the training text.** In `model.safetensors` are
{held}.
Publish it only if you may publish that text. An export with `--retrieval none` does not have them; what a
network has learned by heart it holds, as any does.
"""


def retrieval_card(retrieval):
    """What a model looks up, and what of its training text the folder therefore holds; "" of None."""
    if retrieval is None:
        return ""
    sizes = dict(window=retrieval.window, neighbours=retrieval.neighbours)
    lines = [f"- {LOOKED_UP[name].format(**sizes)}" for name in retrieval.experts]
    held = " and\n".join(HELD[name] for name in retrieval.experts if name in HELD)
    card = RETRIEVAL_CARD.format(looked_up=",\n".join(lines))
    return card + HELD_CARD.format(held=held) if held else card


def model_card(record, retrieval):
    """The folder's README.md, from what the run has written down: data, figures beside others, limits.

    Args:
        record: newllm.report.record.Record. retrieval: the model's, or None.
    """
    config, summary = record.config, record.summary
    rows = language_rows(summary, looks_up=retrieval is not None)
    table = "\n".join(f"| {name} | {ppl:.1f} | {bpb:.3f} |" for name, ppl, bpb in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [newllm]
---

# newllm {record.kind}, run {record.run}

A research model, trained from scratch on {summary["train_tokens"]:,} tokens of {summary["data_source"]}:
far too few to be useful for anything but studying it. It will make things up and say what its data say.

- Network: {config["num_layers"]} layers, context {config["context_dim"]}, embedding {config["embed_dim"]},
  {summary["parameters"]:,} parameters; {summary["vocab_size"]:,} ids of tokenizer {summary["tokenizer"]}.
- Training: samples of {config["max_seq_length"]} tokens, contexts {summary["contexts"]}, best epoch
  {summary["phase2_best_epoch"]}, seed {config["seed"]}, commit {record.start.get("git_commit")}.

| held-out dialogues | perplexity | bits per byte |
|---|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("User: hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
{retrieval_card(retrieval)}"""
