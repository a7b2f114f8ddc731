"""The cache of packed data: read only if it is the same data, and rebuilt after every accident."""

import os
import random
import subprocess
import sys

import pytest
import torch
from checks import message_of, needs_gpt2
from helpers import write_evil
from hub_fakes import ReadTimeout, dialogue

from newllm.data import dialogues as corpus
from newllm.data import samples as dataset
from newllm.data import vocabulary
from newllm.data.samples import load_data
from newllm.saving.files import load_sealed, save_sealed


@pytest.fixture
def builds(monkeypatch):
    """One entry for each time data was built rather than read from the cache."""
    calls, build = [], dataset._build
    monkeypatch.setattr(dataset, "_build", lambda *args: calls.append(1) or build(*args))
    return calls


@pytest.fixture
def cached(settings, talk):
    """(the data, path of its cache file, the file's bytes)."""
    data = load_data(settings(data_source=talk))
    path = dataset.usable_folder(settings().cache_dir, "cache_dir") / cache_files(settings)[0]
    return data, path, path.read_bytes()


def cache_files(settings):
    return sorted(name for name in os.listdir(settings().cache_dir))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def fill_with_foreign(path):
    save_sealed({"weights": torch.ones(3)}, path)


def fill_with_other_ids(path):
    payload = load_sealed(path)
    payload["train"] = payload["train"] + 1
    save_sealed(payload, path)


def flipped(whole, source):
    """The bytes with one random bit turned."""
    content = bytearray(whole)
    content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
    return bytes(content)


def truncated(whole):
    return [whole[:length] for length in (0, 1, 3, 4, 22, len(whole) // 2, len(whole) - 1)]


def test_second_time_comes_from_the_cache(settings, talk, builds):
    """Same tensors, tokenizer and identity; the corpus is not parsed; the notes say so."""
    first, second = (load_data(settings(data_source=talk)) for _ in range(2))
    assert len(builds) == 1 and second.cache_hit and first.fingerprint == second.fingerprint
    for name in ("train", "val", "train_dialogue", "val_dialogue", "token_bytes"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    (name,) = cache_files(settings)
    assert name.startswith("talk_5samples_8len-") and second.notes[-1].startswith("cache hit: ")
    assert second.notes[:-1] == first.notes


@pytest.mark.parametrize(
    "change", [dict(num_samples=6), dict(max_seq_length=9), dict(val_samples=4), dict(vocab_size=290)]
)
def test_other_recipe_is_a_miss(settings, talk, builds, change):
    load_data(settings(data_source=talk))
    assert not load_data(settings(data_source=talk, **change)).cache_hit
    assert len(cache_files(settings)) == 2


@needs_gpt2
def test_other_tokenizer_is_a_miss(settings, talk):
    load_data(settings(data_source=talk))
    other = load_data(settings(data_source=talk, tokenizer="gpt2"))
    assert not other.cache_hit and other.vocab_size == 50257


def test_changed_file_is_a_miss(settings, write_jsonl, talk):
    """Same name, other content."""
    first = load_data(settings(data_source=talk))
    write_jsonl([dialogue(f"this was dialogue number {n}") for n in range(40)])
    second = load_data(settings(data_source=talk))
    assert not second.cache_hit and first.fingerprint != second.fingerprint


def test_other_library_version_is_a_miss_for_bpe(settings, talk, monkeypatch):
    """Another release may train another vocabulary."""
    load_data(settings(data_source=talk))
    monkeypatch.setattr(dataset.importlib.metadata, "version", lambda name: "0.0")
    assert not load_data(settings(data_source=talk)).cache_hit


@pytest.mark.parametrize("harm", [flip, truncate, fill_with_foreign, fill_with_other_ids])
def test_damaged_or_foreign_file_is_rebuilt(settings, talk, harm):
    """One line says so, the data is right, and the next time is a hit."""
    first = load_data(settings(data_source=talk))
    path = dataset.usable_folder(settings().cache_dir, "cache_dir") / cache_files(settings)[0]
    harm(path)
    second = load_data(settings(data_source=talk))
    assert second.fingerprint == first.fingerprint and not second.cache_hit
    assert [note for note in second.notes if "has been rebuilt" in note and str(path) in note]
    assert load_data(settings(data_source=talk)).cache_hit


def test_no_bit_flip_and_no_truncation_of_a_cache_file_is_read(cached):
    """200 random bits and 7 lengths, where the cache is read: nothing comes back, and there is a reason to tell."""
    _, path, whole = cached
    source = random.Random(0)
    for content in [flipped(whole, source) for _ in range(200)] + truncated(whole):
        path.write_bytes(content)
        unusable = {}
        assert dataset._read_cache(path, unusable) is None and unusable[path]
    path.write_bytes(whole)
    assert dataset._read_cache(path, unusable := {}) and not unusable


def test_a_damaged_cache_file_gives_the_same_data_with_a_note(settings, talk, cached):
    """The same accidents from end to end: rebuilt to identical ids, said so, and the file is as it was."""
    first, path, whole = cached
    source = random.Random(1)
    for content in [flipped(whole, source) for _ in range(8)] + truncated(whole):
        path.write_bytes(content)
        again = load_data(settings(data_source=talk))
        assert not again.cache_hit and [n for n in again.notes if "has been rebuilt" in n and str(path) in n]
        assert again.fingerprint == first.fingerprint
        for name in ("train", "val", "train_dialogue", "val_dialogue", "token_bytes"):
            assert torch.equal(getattr(again, name), getattr(first, name))
        hit = load_data(settings(data_source=talk))
        assert hit.cache_hit and hit.fingerprint == first.fingerprint


def test_an_evil_pickle_in_a_cache_file_is_never_executed(settings, talk, cached, tmp_path):
    """With a correct seal as without one: rebuilt, and the trap has not sprung."""
    first, path, _ = cached
    for sealed in (True, False):
        write_evil(path, tmp_path / "harm", sealed)
        again = load_data(settings(data_source=talk))
        assert again.fingerprint == first.fingerprint and not again.cache_hit
        assert [note for note in again.notes if "has been rebuilt" in note]
    assert not (tmp_path / "harm").exists()


def test_broken_stream_leaves_no_data(settings, online):
    """Neither a shorter data set nor a cache file."""
    online["train_sft"].breaks = {2: [ReadTimeout("x")] * 9}
    assert "broke off after 2 dialogues" in message_of(load_data, settings())
    assert cache_files(settings) == []


def test_unwritable_cache_is_said(settings, talk, monkeypatch):
    """A full disk costs time on the next run, not this one."""

    def full(value, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "save_sealed", full)
    assert "could not be written" in load_data(settings(data_source=talk)).notes[-1]


def test_cache_folder_that_is_a_file_is_refused(settings, talk):
    assert "is a file, not a folder" in message_of(load_data, settings(data_source=talk, cache_dir=talk))


def test_two_builders_give_one_valid_file(settings, talk, tmp_path):
    """Two processes at once, with different hash seeds: one file, the same data for both and for a third."""
    code = (
        "import sys; from types import SimpleNamespace; from newllm.data.samples import load_data;"
        f"print(load_data(SimpleNamespace(**{vars(settings(data_source=talk))!r})).fingerprint)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    prints = {process.communicate()[0].strip() for process in running}
    data = load_data(settings(data_source=talk))
    assert prints == {data.fingerprint} and data.cache_hit and len(cache_files(settings)) == 1


@pytest.mark.parametrize("source", ["auto", "ultrachat"])
def test_cached_ultrachat_needs_no_network(settings, online, answers, source):
    """The pinned revision is its identity, so the hub is not asked."""
    first = load_data(settings())
    answers[:] = [AssertionError("asked")]
    second = load_data(settings(data_source=source))
    assert second.cache_hit and second.source == "ultrachat" and second.fingerprint == first.fingerprint
    assert second.notes[0] == corpus.ULTRACHAT_NOTE


def test_damaged_ultrachat_cache_offline_is_said(settings, online, answers, small_chitchat):
    """ "auto" then takes the embedded corpus, and does not keep quiet about the file."""
    load_data(settings())
    path = dataset.usable_folder(settings().cache_dir, "cache_dir") / cache_files(settings)[0]
    flip(path)
    answers[:] = [ReadTimeout("x")]
    data = load_data(settings())
    assert data.source == "chitchat" and "NOT UltraChat" in data.notes[0]
    assert f"cache: {path} is damaged or foreign" in data.notes[-1] and data.notes[-1].endswith(
        "was not used"
    )


def test_auto_tokenizer_without_gpt2(settings, talk, monkeypatch):
    """Trains one and says why; again from the cache."""
    monkeypatch.setattr(vocabulary, "_read_package", lambda: None)
    for hit in (False, True):
        data = load_data(settings(data_source=talk, tokenizer="auto"))
        assert data.tokenizer.name == "bpe" and data.cache_hit == hit
        assert "(gpt2 is not available: no internet connection" in data.notes[1]


@needs_gpt2
def test_cached_gpt2_data_needs_no_vocabulary_files(settings, talk, monkeypatch):
    """The cache file carries the tokenizer."""
    first = load_data(settings(data_source=talk, tokenizer="gpt2"))
    monkeypatch.setattr(vocabulary, "_read_package", lambda: None)
    for choice in ("gpt2", "auto"):
        again = load_data(settings(data_source=talk, tokenizer=choice))
        assert again.cache_hit and again.fingerprint == first.fingerprint
