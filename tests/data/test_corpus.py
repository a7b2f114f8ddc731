"""Sources of dialogues by name: UltraChat, the embedded corpus, and which of them when the hub fails."""

import json
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
from checks import message_of
from hub_fakes import ConnectError, HTTPError, ReadTimeout, dialogue

from newllm.data import dialogues as corpus
from newllm.data.dialogues import ULTRACHAT, ULTRACHAT_REVISION, open_corpus


def test_unknown_source_names_the_nearest():
    text = message_of(open_corpus, "ultrachatt")
    assert "'ultrachatt' is neither one of auto, ultrachat, chitchat nor an existing file" in text
    assert text.endswith("did you mean 'ultrachat'?")


@pytest.mark.parametrize("source", ["", "/no/such/file.jsonl", "x" * 5000])
def test_missing_path_is_refused(source):
    assert "nor an existing file or folder" in message_of(open_corpus, source)


# The embedded corpus


def test_chitchat_turns_are_joined_and_alternate(small_chitchat):
    """First sender is the user; the texts of a turn are one message; what nobody answered is left out and counted."""
    source = open_corpus("chitchat")
    assert source.identity == "chitchat-dataset==0.9.0" and source.size == 30
    assert next(source.train()) == "User: hello number 0\nAssistant: hi"
    assert source.remarks == ["data: 1 openings of chitchat that nobody answered left out"]


def test_real_chitchat_has_the_format_read_here():
    source = open_corpus("chitchat")
    assert source.size == 4018
    assert next(source.train()).startswith("User: Hello How are you doing today?\nAssistant: whats up MD")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    assert "pip install chitchat-dataset==0.9.0" in message_of(open_corpus, "chitchat")


# UltraChat


def test_ultrachat_streams_its_official_splits(online):
    """Training and held-out are the official splits at the pinned revision, of no known size."""
    source = open_corpus("ultrachat")
    assert source.size is None and source.identity.startswith(f"{ULTRACHAT}@{ULTRACHAT_REVISION}")
    assert next(source.train()) == "User: train 0\nAssistant: yes, train 0"
    assert len(list(source.held_out())) == 20


def test_auto_prefers_ultrachat(online):
    assert open_corpus("auto").name == "ultrachat"


@pytest.mark.parametrize(
    "answer, reason, naps",
    [
        (
            ConnectError("[Errno -2] Name or service not known"),
            "no internet connection: name lookup failed",
            0,
        ),
        (HTTPError(429), "HTTP 429, too many requests", 3),
        (HTTPError(503), "HTTP 503", 3),
        (HTTPError(404), "HTTP 404", 0),
        (ReadTimeout("slow"), "time-out", 3),
    ],
)
def test_unreachable_hub(small_chitchat, answers, slept, answer, reason, naps):
    """ "auto" takes the embedded corpus and says so; "ultrachat" stops with the reason and the way out."""
    answers[:] = [answer]
    source = open_corpus("auto")
    assert source.name == "chitchat" and len(slept) == naps
    assert source.note == (
        "data: chitchat-dataset 0.9.0, human dialogues, "
        f"NOT UltraChat (the Hugging Face hub could not be reached: {reason})"
    )
    text = message_of(open_corpus, "ultrachat")
    assert reason in text and "--data_source chitchat" in text


def test_offline_mode_asks_nothing(small_chitchat, answers, monkeypatch):
    answers[:] = [AssertionError("asked")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE)" in open_corpus("auto").note


def test_probe_survives_two_429(online, answers, slept):
    answers[:] = [HTTPError(429), HTTPError(429), None]
    assert open_corpus("auto").name == "ultrachat" and slept == [1.0, 2.0]


def test_opening_survives_two_429(online, slept, monkeypatch):
    """429 from `datasets`, in the guise of a missing file."""
    errors, load = [FileNotFoundError("429 Client Error")] * 2, datasets.load_dataset

    def flaky(*args, **kwargs):
        if errors:
            raise errors.pop()
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", flaky)
    assert open_corpus("ultrachat").name == "ultrachat" and slept == [1.0, 2.0]


def test_failed_opening_falls_back(small_chitchat, online, monkeypatch):
    def fail(*args, **kwargs):
        raise HTTPError(503)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "reached: HTTP 503)" in open_corpus("auto").note


def test_broken_stream_is_mended(online):
    """A break in the middle neither loses nor repeats a dialogue."""
    whole = list(open_corpus("ultrachat").train())
    online["train_sft"].breaks = {
        0: [ReadTimeout("x")],
        17: [ReadTimeout("x"), HTTPError(503)],
        18: [TimeoutError()],
    }
    assert list(open_corpus("ultrachat").train()) == whole and len(whole) == 40


@pytest.mark.parametrize("error", [ReadTimeout("x"), ConnectionError("Server Disconnected")])
def test_stream_that_stays_broken_is_an_error(online, error):
    """Never a shorter data set."""
    online["train_sft"].breaks = {17: [error] * 9}
    text = message_of(list, open_corpus("ultrachat").train())
    assert "train_sft broke off after 17 dialogues" in text and "--data_source chitchat" in text


def test_changed_schema_is_named(online):
    online["train_sft"].rows[3] = {"conversation": [], "id": 1}
    text = message_of(list, open_corpus("ultrachat").train())
    assert (
        "UltraChat train_sft row 4 has neither messages" in text and "its keys are: conversation, id." in text
    )


def test_prepared_ultrachat_needs_no_network(tmp_path, small_chitchat):
    """What load_dataset prepared at the pinned revision is read from the datasets cache, other revisions are not."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    files = {}
    for split in ("train_sft", "test_sft"):
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_list([dialogue(f"{split} {n}") for n in range(3)]).to_parquet(files[split])
    for revision, name in (("0" * 40, "chitchat"), (ULTRACHAT_REVISION, "ultrachat")):
        builder = Parquet(dataset_name=ULTRACHAT.split("/")[1], hash=revision, data_files=files)
        builder.repo_id = ULTRACHAT  # afterwards, because the files of this stand-in are local
        folder = tmp_path / "hub" / "HuggingFaceH4___ultrachat_200k" / "default" / "0.0.0" / revision
        builder.download_and_prepare(output_dir=str(folder))
        assert open_corpus("auto").name == name
    assert list(open_corpus("ultrachat").held_out())[2] == "User: test_sft 2\nAssistant: yes, test_sft 2"


def test_importing_the_data_layer_is_light():
    """Heavy libraries are imported where they are used: a file source never needs `datasets`."""
    code = (
        "import json, sys, newllm.data.samples;"
        "print(json.dumps([name for name in ('datasets', 'transformers', 'tokenizers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
