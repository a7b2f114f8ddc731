"""A run exported to transformers is used by it alone, and as the docs say; what cannot be exported is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_dialogues

from config import ResidualConfig
from newllm.data.files import render
from newllm.errors import UserError
from newllm.generate import generate
from newllm.reporting.artifacts import artifact_paths
from newllm.reporting.record import find_records, read_record
from newllm.training.trained import load_model, open_saved
from scripts import export
from train import main as train

pytest.importorskip("transformers")
DOCS = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
EXAMPLE = re.search(r"^```\n(from transformers.*?)^```", DOCS, re.MULTILINE | re.DOTALL)[1]
PROMPTS = ["User: ban dor", "User: ban dor lum kive"]
ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "newllm":
            raise ImportError("newllm is blocked here")
sys.meta_path.insert(0, Block())
from transformers import pipeline
example, prompts, messages = json.loads(sys.argv[1])
exec(example)
inputs = tokenizer(prompts[0], return_tensors="pt")
options = dict(max_new_tokens=8, do_sample=False)
made = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=2, **options)
print(json.dumps({
    "example": [*first.sequences[0].tolist(), *more[0, 1:].tolist()],
    "ids": inputs["input_ids"][0].tolist(),
    "text": model.generate(**inputs, **options)[0].tolist(),
    "logits": model(**inputs).logits[0, -1].tolist(),
    "pipeline": [one["generated_text"] for [one] in made],
    "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
}))
"""


@pytest.mark.parametrize(
    "settings", [{}, dict(freeze_context=True), dict(tie_weights=False)], ids=["tuned", "frozen", "untied"]
)
def test_a_run_exported_is_used_by_transformers_alone(tiny_settings, tmp_path, settings, capsys):
    """In a process that cannot import newllm, as in the docs: the same ids, logits and texts; chats as in training."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True) | settings))
    record = read_record(find_records(tiny_settings["checkpoint_dir"])[-1])
    folder = tmp_path / "model"
    export.main(
        ["--format", "transformers", "--output", str(folder), "--checkpoint_dir", tiny_settings["checkpoint_dir"]]
    )
    card = (folder / "README.md").read_text()
    assert (
        f"| this model | {record.summary['val_ppl']:.1f} |" in card
        and "untrained contexts" in card
        and record.run in card
    )
    messages = [
        {"role": "user", "content": "ban dor"},
        {"role": "assistant", "content": "kin"},
        {"role": "user", "content": "lum"},
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", ALONE, json.dumps([EXAMPLE, PROMPTS, messages])]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = load_model(open_saved(artifact_paths(record.folder, record.kind, record.run)["model"])[1])
    model.eval()

    def continued(prompt, count):
        return [*prompt, *generate(model, prompt, count, seed=0, temperature=0)]

    texts = [continued(tokenizer.encode(prompt), 8) for prompt in PROMPTS]
    ids = tokenizer.encode(PROMPTS[0])
    assert found["ids"] == ids and found["text"] == texts[0]
    assert found["pipeline"] == [tokenizer.decode(text) for text in texts]
    assert found["example"] == continued(tokenizer.encode("User: hello"), 16)
    assert found["chat"] == render({"messages": messages}, "here") + "\nAssistant:"
    state = None
    for token in ids:
        logits, state = model.advance(torch.tensor([token]), state)
    assert found["logits"] == pytest.approx(logits[0].tolist(), abs=1e-5)


def test_what_cannot_be_exported_is_refused(tiny_settings, tmp_path):
    """A baseline is transformers' own business; a whitened control cannot read a new text; a file in the way."""
    for number, settings in enumerate((dict(model_type="gru"), dict(freeze_context=True, whiten_context=True))):
        folder = str(tmp_path / f"run_{number}")
        train(ResidualConfig(**tiny_settings | dict(artifacts=True, checkpoint_dir=folder) | settings))
        with pytest.raises(UserError, match="is not exported"):
            export.main(["--format", "transformers", "--output", str(tmp_path / "out"), "--checkpoint_dir", folder])
    write_dialogues(tmp_path / "file", 1)
    train(ResidualConfig(**tiny_settings | dict(artifacts=True)))
    flags = ["--format", "transformers", "--checkpoint_dir", tiny_settings["checkpoint_dir"], "--output"]
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export.main([*flags, str(tmp_path / "project")])
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    for _ in range(2):  # an earlier export may be replaced
        export.main([*flags, str(tmp_path / "again")])
    with pytest.raises(UserError, match="cannot be written"):
        export.main([*flags, str(tmp_path / "file")])
