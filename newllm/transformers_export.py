"""A trained model as a folder that transformers loads offline: weights, tokenizer, code, model card."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import tokenizers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from newllm.errors import UserError
from newllm.report.summary import language_rows
from newllm.saving.trained import load_model
from newllm.transformers_model import NewLLMConfig, NewLLMForCausalLM

ROOT = Path(__file__).parent
MODEL = "modeling_newllm.py"
CODE = {  # file of the folder: the module it is copied from
    MODEL: "transformers_model.py",
    "network.py": "models/network.py",
    "solver.py": "fixed_point/solver.py",
    "versions.py": "versions.py",
}
NEEDED = ("torch", "transformers", "tokenizers")  # to load an exported folder
CLASSES = {
    "AutoConfig": "modeling_newllm.NewLLMConfig",
    "AutoModelForCausalLM": "modeling_newllm.NewLLMForCausalLM",
}
# Writes a dialogue as the data's `render` does, and raises where that does: encode() on lone surrogates.
CHAT_TEMPLATE = """\
{%- set dialogue = namespace(text='') -%}
{%- for message in messages -%}
{%- set number = 'message ' ~ loop.index -%}
{%- if message is string -%}
{%- set role = 'Assistant' if loop.index0 % 2 else 'User' -%}
{%- set content = message -%}
{%- elif message is not mapping -%}
{{- raise_exception(number ~ ' is neither a text nor an object with role and content') -}}
{%- elif message['role'] is defined and message['role'] is not none -%}
{%- set role, content = message['role'], message['content'] -%}
{%- else -%}
{%- set role, content = message['from'], message['value'] -%}
{%- endif -%}
{%- set textual = content is string or content is none or content is undefined -%}
{%- if role is not string or not role.strip() or not textual -%}
{{- raise_exception(number ~ ' does not have a text as role and a text, or null, as content') -}}
{%- endif -%}
{%- set speaker = message is mapping and message['role'] is not string -%}
{%- set role, content = role.strip().capitalize(), (content or '').strip() -%}
{%- set role = {'Human': 'User', 'Gpt': 'Assistant'}.get(role, role) if speaker else role -%}
{%- if content -%}
{%- set dialogue.text = dialogue.text ~ ('\\n' if dialogue.text else '') ~ role ~ ': ' ~ content -%}
{%- endif -%}
{%- endfor -%}
{%- if dialogue.text.encode() or true -%}
{{- dialogue.text -}}
{%- endif -%}
{%- if add_generation_prompt -%}
{{- '\\nAssistant:' if dialogue.text else 'Assistant:' -}}
{%- endif -%}
"""


def export_folder(found, record, folder):
    """Write all of it.

    Args:
        found: what newllm.saving.trained.save_model wrote. record: of its run, newllm.report.record.Record.
        folder: made if it is not there; an earlier export is replaced.

    Raises:
        UserError: the model is a baseline or reads no new text; the folder holds other files or fails.
    """
    model, tokenizer = to_transformers(found)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise UserError(f"{folder} holds other files, which would be replaced: choose a new folder.")
    with replacing(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_code(staged)
        (staged / "README.md").write_text(model_card(record), encoding="utf-8", errors="backslashreplace")


def refresh_folder(folder):
    """Give a folder that was exported before the code of today; nothing else changes.

    Raises:
        UserError: it is no exported folder, or cannot be written; nothing has changed.
    """
    if not is_export(Path(folder)):
        raise UserError(
            f"{folder} is no folder that scripts.export --format transformers wrote (its config.json is of "
            "no newllm model): give one that is."
        )
    with replacing(Path(folder)) as staged:
        write_code(staged)


def to_transformers(found):
    """The model and the tokenizer of a model file, as transformers has them."""
    settings = found["config"]
    kind, whitened = settings["model_type"], settings["whiten_context"]
    if kind not in ("context", "window", "token") or whitened:
        raise UserError(
            f"a model of type '{kind}'{' on whitened contexts' if whitened else ''} is a baseline here and "
            "is not exported: use transformers' own, or --format zip."
        )
    network, tokenizer = load_model(found)
    config = NewLLMConfig(
        network=kind, vocab_size=tokenizer.vocab_size, hidden_size=settings["context_dim"],
        embed_dim=settings["embed_dim"], num_hidden_layers=settings["num_layers"],
        token_layers=settings["token_layers"], keeps_embedding=network.context_embedding is not None,
        tie_word_embeddings=settings["tie_weights"], seed=settings["seed"],
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id, auto_map=CLASSES,
    )  # fmt: skip
    model = NewLLMForCausalLM(config)
    model.network.load_state_dict(network.state_dict())
    end = tokenizer.decode([tokenizer.eos_id])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json()), eos_token=end, pad_token=end,
        padding_side="left", clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
        split_special_tokens=True,  # spelled out in a text they are text, as in training
    )  # fmt: skip
    return model.eval(), fast


def is_export(folder):
    """Whether a folder holds the configuration of an exported model."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "newllm"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_code(folder):
    """The modules that the model needs, importing one another, and the versions they were tested with."""
    tested = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a folder, never installed
        requirements = importlib.metadata.requires("newllm")
        tested = [text for text in requirements if re.match(r"[\w-]+", text)[0] in NEEDED]
    for name, source in CODE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"^from newllm\.(?:\w+\.)*(\w+) import", r"from .\1 import", text, flags=re.M)
        text = re.sub(r"^TESTED = None.*", lambda _: f"TESTED = {tested!r}", text, flags=re.M)
        (folder / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(folder):
    """A temporary folder to write files to, which then take their places in it: all of them, or none.

    Raises:
        UserError: it cannot be written; what was there is there still.
    """
    folder = folder.resolve()
    place = folder if folder.is_dir() else folder.parent  # a folder may be a mounted disk of its own
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", suffix=".tmp", dir=place) as room:
            staged = Path(room, "new")
            staged.mkdir()
            yield staged
            if folder.exists():
                _take_places(staged, folder, Path(room))
            else:
                os.replace(staged, folder)
    except (OSError, UnicodeError, SafetensorError) as error:  # UnicodeError: of a name that is not UTF-8
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written ({reason}): choose another folder.") from error


def _take_places(staged, folder, room):
    """Move files into a folder; where one cannot be moved, all come back from copies in the room."""
    moved = []
    try:
        for path in sorted(staged.iterdir()):
            target = folder / path.name
            if target.exists():
                shutil.copy2(target, room)
            moved.append(target)
            os.replace(path, target)
    except BaseException:
        for target in moved:
            before = room / target.name
            if before.exists():
                os.replace(before, target)
            else:
                target.unlink(missing_ok=True)
        raise


def model_card(record):
    """The folder's README.md, from what the run has written down: data, figures beside others, limits."""
    config, summary, start = record.config, record.summary, record.start
    table = "\n".join(f"| {name} | {ppl:.1f} | {bpb:.3f} |" for name, ppl, bpb in language_rows(summary))
    versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    phases = f"next-token prediction, best of {summary['phase2_best_epoch']} epochs"
    memory = ""
    if summary.get("phase1_iterations"):
        before = f"Phase 1 of {summary['phase1_iterations']} sweeps"
        phases = f"{before}, then {phases}, contexts {summary['contexts']}"
        memory = f"\nAfter Phase 1 its contexts remembered about {summary['memory_horizon']} tokens.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [newllm]
---

# newllm {record.kind}, run {record.run}

A research model, trained from scratch on {summary["train_tokens"]:,} tokens of {summary["data_source"]}:
far too few to be useful for anything but studying it. It will make things up and say what its data say.

- Network: {config["num_layers"]} layers, context {config["context_dim"]}, embedding {config["embed_dim"]},
  {summary["parameters"]:,} parameters; {summary["vocab_size"]:,} ids of tokenizer {summary["tokenizer"]};
  trained on samples of {config["max_seq_length"]} tokens.
- Training: {phases}; seed {config["seed"]}.
- Made by {versions}, commit {start.get("git_commit")}, on {start["device"]}.

| held-out dialogues | perplexity | bits per byte |
|---|---|---|
{table}
{memory}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("User: hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""
