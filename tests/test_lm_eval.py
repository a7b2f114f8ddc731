"""lm-evaluation-harness gives an exported folder our own figures, by the task and command of the docs."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_dialogues

from config import ResidualConfig
from newllm.data.dialogues import open_corpus
from newllm.evaluate import encode
from newllm.saving.trained import filled_retrieval, load_model, open_saved
from scripts import export
from train import main as train

lm_eval = pytest.importorskip("lm_eval")
DOCS = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
ROLLING = re.search(r"^```\n(task: dialogues.*?)^```", DOCS, re.MULTILINE | re.DOTALL)[1]
COMMAND = re.search(r"^lm_eval (run .*?)^```", DOCS, re.MULTILINE | re.DOTALL)[1].replace("\\\n", "")
CHOICE = """
task: replies
dataset_path: json
dataset_kwargs: {data_files: {test: replies.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def own(tiny_settings, tmp_path, monkeypatch):
    """(model, retrieval, tokenizer) of a run exported to `model`, in a folder with the tasks."""
    monkeypatch.chdir(tmp_path)
    # The harness would ask the hub for the model's revision.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = dict(artifacts=True, phase2_epochs=20, phase2_learning_rate=0.01, retrieval="ngram,cache,knn")
    train(ResidualConfig(**tiny_settings | settings))
    export.main(["--format", "transformers", "--output", "model", "--checkpoint_dir", "checkpoints"])
    Path("tasks").mkdir()
    Path("tasks/dialogues.yaml").write_text(ROLLING)
    Path("tasks/replies.yaml").write_text(CHOICE)
    [path] = Path("checkpoints").glob("*/models/*.pth")
    saved = open_saved(path)[1]
    model, tokenizer = load_model(saved)
    return model.eval(), filled_retrieval(saved["retrieval"], path), tokenizer


def held_out():
    """Dialogues and, of each, a choice among three replies, also written as files."""
    texts = list(open_corpus(str(write_dialogues("other.jsonl", 16, seed=1))).train())
    contexts, replies = zip(*(text.split("\nAssistant: ") for text in texts), strict=True)
    choices = [
        dict(context=f"{context}\nAssistant:", choices=replies[i - i % 3 :][:3], right=i % 3)
        for i, context in enumerate(contexts[:12])
    ]
    Path("held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return texts, choices


@torch.no_grad()
def chances(model, retrieval, ids):
    """Log probabilities [T] of ids 1 to T; without a retrieval those of the network."""
    given, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    read = encode(model, given)
    if retrieval is None:
        return model.logits(*read).log_softmax(-1).gather(-1, targets[..., None])[0, :, 0]
    return retrieval.read(model, given, *read, retrieval.start(1), targets)[0][0].log()


def bits_per_byte(model, retrieval, tokenizer, texts):
    """Of each text after an end of text."""
    samples = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in texts]
    nats = -sum(chances(model, retrieval, ids).double().sum().item() for ids in samples)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def likelihood(model, retrieval, tokenizer, context, choice):
    """Log-likelihood of a choice after its context."""
    ids, start = tokenizer.encode(f"{context} {choice}"), len(tokenizer.encode(context))
    return chances(model, retrieval, ids)[start - 1 :].sum().item()


@pytest.mark.slow
def test_the_harness_gives_our_own_figures(own):
    """Bits per byte, likelihoods and choices; alone and padded in batches, by steps and by sweeps.

    Those of the network alone too, as the command line asks for it: `retrieval=none` is None there. The
    command of the docs, in a process of its own with the code of the folder, gives the same.
    """
    texts, rows = held_out()
    expected = bits_per_byte(*own, texts)
    scores = [[likelihood(*own, row["context"], choice) for choice in row["choices"]] for row in rows]
    chosen = [row.index(max(row)) for row in scores]
    right = sum(choice == row["right"] for choice, row in zip(chosen, rows, strict=True))
    assert 0 < right < len(rows)
    tasks = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager(include_path="tasks", include_defaults=False)
    for batch_size, prefill in ((1, "steps"), (4, "steps"), (4, "sweeps")):
        given = dict(pretrained="model", trust_remote_code=True, max_length=100_000, prefill=prefill)
        found = lm_eval.simple_evaluate(
            model="hf", model_args=given, tasks=["dialogues", "replies"], task_manager=manager, device="cpu",
            batch_size=batch_size, bootstrap_iters=0,
        )  # fmt: skip
        assert found["results"]["dialogues"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
        assert found["results"]["replies"]["acc,none"] == pytest.approx(right / len(rows))
        for sample in found["samples"]["replies"]:
            found_scores = [score for score, _ in sample["filtered_resps"]]
            assert found_scores == pytest.approx(scores[sample["doc_id"]], rel=1e-4)
    given = dict(pretrained="model", trust_remote_code=True, max_length=100_000, retrieval=None)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=given,
        tasks=["dialogues"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )
    model, _, tokenizer = own
    network = bits_per_byte(model, None, tokenizer, texts)
    assert abs(network / expected - 1) > 0.01
    assert found["results"]["dialogues"]["bits_per_byte,none"] == pytest.approx(network, rel=1e-4)
    caches = {name: str(Path(name).absolute()) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    environment = os.environ | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", *shlex.split(COMMAND), "--output_path=out", "--device=cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = Path("out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["dialogues"]
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
