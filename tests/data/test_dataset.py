"""Samples from both ends of a corpus: disjoint splits, nothing read in vain, a sentence if dialogues are too few."""

from dataclasses import FrozenInstanceError
from itertools import islice

import pytest
import torch
from checks import message_of, needs_gpt2
from hub_fakes import dialogue

from newllm.data import dialogues as corpus
from newllm.data import tokens as tokenizer
from newllm.data.samples import load_data
from newllm.errors import UserError


def test_shapes_and_types(settings, talk):
    data = load_data(settings(data_source=talk))
    assert data.train.shape == (5, 9) and data.val.shape == (3, 9)
    assert data.train.dtype == data.val.dtype == data.token_bytes.dtype == torch.int32
    assert data.train_dialogue.dtype == data.val_dialogue.dtype == torch.int64
    assert data.token_bytes.shape == (data.vocab_size,) and data.source == "talk" and not data.cache_hit


def test_data_is_frozen(settings, talk):
    with pytest.raises(FrozenInstanceError):
        load_data(settings(data_source=talk)).train = None


def test_samples_are_the_dialogues_from_both_ends(settings, talk):
    """Training from the front, held-out from the back."""
    data = load_data(settings(data_source=talk, max_seq_length=4))
    texts = list(corpus.open_corpus(talk).train())
    for samples, indices, stream in (
        (data.train, data.train_dialogue, texts),
        (data.val, data.val_dialogue, texts[::-1]),
    ):
        for sample, index in zip(samples.tolist(), indices.tolist(), strict=True):
            assert data.tokenizer.encode(stream[index])[:5] == sample


@pytest.mark.parametrize("length", [8, 60])
def test_splits_are_disjoint(settings, talk, length):
    """Also when a sample takes several dialogues."""
    data = load_data(settings(data_source=talk, max_seq_length=length))
    assert data.train_dialogue.max() < 40 - 1 - data.val_dialogue.max()


@needs_gpt2
def test_held_out_samples_are_the_same_for_every_budget(settings, talk):
    small, large = (load_data(settings(data_source=talk, tokenizer="gpt2", num_samples=n)) for n in (2, 20))
    assert torch.equal(small.val, large.val) and torch.equal(small.train, large.train[:2])


def test_training_text_that_is_also_held_out_is_skipped(settings, write_jsonl):
    """By content: copies of held-out dialogues at the front are left out, counted, and unseen by the tokenizer."""
    rows = [dialogue(f"this is dialogue number {n}") for n in range(12)]
    path = str(write_jsonl([rows[11], rows[0], rows[10], *rows[1:]]))
    data = load_data(settings(data_source=path, max_seq_length=4))
    assert data.train_dialogue.tolist() == [1, 3, 4, 5, 6]
    assert "data: 2 training dialogues with the text of a held-out one left out" in data.notes
    texts = list(corpus.open_corpus(path).train())
    lesson = [texts[index] for index in (1, 3, 4)]  # of the first 5, those that are not held out
    assert data.tokenizer.fingerprint == tokenizer.train_bpe(lesson, 300).fingerprint


def test_bpe_sees_only_training_dialogues(settings, talk):
    """The first num_samples of the training stream, nothing else."""
    data = load_data(settings(data_source=talk))
    lesson = list(islice(corpus.open_corpus(talk).train(), 5))
    assert data.tokenizer.fingerprint == tokenizer.train_bpe(lesson, 300).fingerprint


def test_too_few_dialogues_at_sight(settings, talk):
    assert message_of(
        load_data, settings(data_source=talk, num_samples=781, val_samples=160, max_seq_length=128)
    ) == (
        "781 training + 160 validation samples of 128 tokens need at least 941 dialogues; talk has 40: "
        "lower num_samples or val_samples."
    )


def test_too_few_dialogues_after_packing(settings, talk):
    """Splits that would meet: short dialogues fill few samples."""
    text = message_of(
        load_data, settings(data_source=talk, num_samples=20, val_samples=10, max_seq_length=500)
    )
    assert "need about " in text and "talk has 40: lower num_samples or val_samples." in text
    assert int(text.split("need about ")[1].split()[0].replace(",", "")) > 40


def test_too_short_stream(settings, online):
    text = message_of(load_data, settings(num_samples=41))
    assert text == (
        "41 training + 3 validation samples of 8 tokens are more than ultrachat gives (40 + 3): "
        "lower num_samples or val_samples."
    )


def test_stream_reads_only_what_is_needed(settings, online):
    """A break behind the last dialogue in use is never met."""
    online["train_sft"].breaks = {5: [AssertionError("read too far")]}
    online["test_sft"].breaks = {3: [AssertionError("read too far")]}
    data = load_data(settings())
    assert data.source == "ultrachat" and data.train_dialogue.tolist() == [0, 1, 2, 3, 4]


def test_embedded_corpus_from_end_to_end(settings, small_chitchat):
    """Offline "auto": every line of the notes, first what and why."""
    data = load_data(settings())
    assert data.notes[0].startswith("data: chitchat-dataset 0.9.0, human dialogues, NOT UltraChat (")
    assert data.notes[1] == f"tokenizer: bpe, {data.vocab_size} ids, trained on the training dialogues"
    assert data.notes[2:] == ["data: 1 openings of chitchat that nobody answered left out"]


def test_a_share_of_the_training_samples_takes_the_place_of_the_held_out_ones(settings):
    """For choosing settings: no held-out sample is seen, the rest trains, and the identity of the data is another."""
    whole, tuning = load_data(settings(num_samples=6)), load_data(settings(num_samples=6, tune_share=0.3))
    assert torch.equal(torch.cat([tuning.train, tuning.val]), whole.train) and len(tuning.val) == 2
    assert torch.equal(tuning.val_dialogue, whole.train_dialogue[-2:])
    assert tuning.fingerprint != whole.fingerprint and "last 2 training samples" in tuning.notes[-1]
    with pytest.raises(UserError, match="leaves none of the 1 training samples"):
        load_data(settings(num_samples=1, tune_share=0.9))
