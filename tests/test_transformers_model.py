"""The exported model behaves as transformers' own do: cache, padding, beams, sampling, labels, folders, remote code."""

import json
import os
import subprocess
import sys

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

transformers = pytest.importorskip("transformers")
V, B, T = 50, 3, 9


@pytest.fixture(params=["context", "window"])
def model(request):
    from newllm.transformers_model import NewLLMConfig, NewLLMForCausalLM

    settings = dict(vocab_size=V, hidden_size=32, embed_dim=24, num_hidden_layers=2, eos_token_id=None)
    return NewLLMForCausalLM(NewLLMConfig(network=request.param, **settings)).eval()


@pytest.fixture
def ids():
    return torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(0))


def test_greedy_is_the_same_with_and_without_cache_and_by_our_own_generation(model, ids):
    """Three roads, one text."""
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert cached.equal(model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))
    for row in range(B):
        own = list(generate(model.network, ids[row].tolist(), 12, seed=0, temperature=0))
        assert cached[row, T:].tolist() == own


def test_padding_on_the_left_and_company_change_nothing(model, ids):
    """A text alone, in a batch, and behind padding of any content: the same logits and the same continuation."""
    lengths = (T, T - 4, T - 1)
    padded = torch.stack(
        [torch.cat([torch.full((T - n,), 7), row[T - n :]]) for n, row in zip(lengths, ids, strict=True)]
    )
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths]).long()
    logits = model(padded, attention_mask=mask).logits
    texts = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, T - n :]
        torch.testing.assert_close(logits[row, T - n :], model(alone).logits[0], rtol=1e-5, atol=1e-6)
        assert texts[row, T:].equal(model.generate(alone, max_new_tokens=6, do_sample=False)[0, n:])


def test_a_cache_continues_a_text(model, ids):
    """In one piece, in two, one by one; the state has one size."""
    whole, cache, pieces = model(ids).logits, None, []
    for start, end in ((0, 4), (4, 5), (5, T)):
        output = model(ids[:, start:end], cache_params=cache)
        cache = output.cache_params
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    assert cache.layers[0].recurrent_states[0].shape == (B, 32)
    assert model(ids, use_cache=False).cache_params is None


def test_beams_and_sampling(model, ids):
    """Beams find nothing less likely than greedy; draws depend on the seed; several sequences a prompt."""

    def likelihood(texts):
        logits = model(texts).logits[:, T - 1 : -1].log_softmax(-1)
        return logits.gather(-1, texts[:, T:, None]).sum((1, 2))

    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    beams = model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=V, length_penalty=0.0)
    assert (likelihood(beams) >= likelihood(greedy) - 1e-4).all()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, max_new_tokens=8, do_sample=True, num_return_sequences=2))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and drawn[0].shape == (2 * B, T + 8)


def test_labels_and_the_positions_to_keep(model, ids):
    """The loss is that of the next token, ignored labels apart; logits of the last positions only."""
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.network.embedding.weight.grad.abs().sum() > 0
    labels = ids.clone()
    labels[:, :-1] = -100
    last = torch.nn.functional.cross_entropy(output.logits[:, -2], ids[:, -1])
    torch.testing.assert_close(model(ids, labels=labels).loss, last)
    assert model(ids, logits_to_keep=2).logits.equal(output.logits[:, -2:])


def test_a_prompt_by_sweeps_is_the_prompt_by_steps(model, ids):
    """Within the tolerance, from a state too, and behind padding."""
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        for options in ({}, dict(attention_mask=mask), dict(cache_params=True)):
            logits = {}
            for how in ("steps", "sweeps"):
                model.config.prefill = how
                given = dict(options)
                if "cache_params" in given:
                    given["cache_params"] = model(ids[:, :4]).cache_params
                logits[how] = model(ids, **given).logits
            torch.testing.assert_close(logits["sweeps"], logits["steps"], rtol=1e-3, atol=1e-3)


def test_a_folder_round_trips_to_the_bit(model, tmp_path):
    """safetensors, loaded by the Auto classes; every tensor is the same."""
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "newllm":
            raise ImportError("newllm is blocked here")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("User: ban dor", return_tensors="pt")
made = pipeline("text-generation", model=model, tokenizer=tokenizer)("User: ban dor", max_new_tokens=8, do_sample=False)
print(json.dumps({
    "ids": inputs["input_ids"][0].tolist(),
    "text": model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist(),
    "logits": model(**inputs).logits[0, -1].tolist(),
    "pipeline": made[0]["generated_text"],
    "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
}))
"""


@pytest.mark.parametrize(
    "settings", [{}, dict(freeze_context=True), dict(tie_weights=False)], ids=["tuned", "frozen", "untied"]
)
def test_a_run_exported_is_used_by_transformers_alone(tiny_settings, tmp_path, settings, capsys):
    """In a process that cannot import newllm: the same ids, logits and greedy text; chats as the training data write them."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True) | settings))
    record = read_record(find_records(tiny_settings["checkpoint_dir"])[-1])
    folder = tmp_path / "exported"
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
    command = [sys.executable, "-c", ALONE, str(folder), json.dumps(messages)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = load_model(open_saved(artifact_paths(record.folder, record.kind, record.run)["model"])[1])
    ids = tokenizer.encode("User: ban dor")
    text = list(generate(model.eval(), ids, 8, seed=0, temperature=0))
    assert found["ids"] == ids and found["text"] == ids + text
    assert found["pipeline"] == tokenizer.decode(ids + text)
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
