"""Datasets as `save_to_disk` leaves them: read by split or from both ends, known by their content."""

import datasets
import pytest
from checks import message_of
from hub_fakes import rows, texts

from newllm.data.dialogues import open_corpus
from newllm.data.samples import load_data


@pytest.fixture
def save(tmp_path):
    """Function that saves splits of dialogues (name: how many), without splits if named "alone", and gives the folder."""

    def to_disk(folder, **splits):
        made = {name: datasets.Dataset.from_list(rows(name, count).rows) for name, count in splits.items()}
        (made["alone"] if "alone" in made else datasets.DatasetDict(made)).save_to_disk(tmp_path / folder)
        return str(tmp_path / folder)

    return to_disk


def test_saved_splits_are_read_by_name(save):
    """The training split from the front, the held-out one as well."""
    folder = save("talk", train=5, test=3, other=2)
    corpus = open_corpus(folder)
    assert corpus.name == "talk" and corpus.size is None and "(split train and test, sha256 " in corpus.note
    assert list(corpus.train()) == texts("train", range(5)) and list(corpus.held_out()) == texts(
        "test", range(3)
    )
    assert list(open_corpus(folder, "other").train()) == texts("other", range(2))
    assert f"{folder} has no split 'dev' but train, test, other" in message_of(open_corpus, folder, "dev")


@pytest.mark.parametrize("name", ["alone", "train"])
def test_a_single_saved_split_is_read_from_both_ends(save, name):
    """A saved dataset without splits is one split."""
    corpus = open_corpus(save("talk", **{name: 4}))
    assert list(corpus.train()) == texts(name, range(4)) and corpus.size == 4
    assert list(corpus.held_out()) == texts(name, [3, 2, 1, 0])


def test_of_a_saved_dataset_only_what_is_needed_is_read(tmp_path):
    """It may be larger than memory: a row in the middle whose text is a number is never met."""
    good = [{"messages": [f"t{number}"], "text": None} for number in range(5)]
    datasets.Dataset.from_list([*good, {"messages": None, "text": 5}, *good]).save_to_disk(tmp_path / "talk")
    corpus = open_corpus(str(tmp_path / "talk"))
    train, held_out = corpus.train(), corpus.held_out()
    assert (
        [next(train) for _ in range(5)]
        == [next(held_out) for _ in range(5)][::-1]
        == [f"User: t{n}" for n in range(5)]
    )
    assert "train row 6 does not have a text in text" in message_of(next, train)
    assert "train row 6 does not have a text in text" in message_of(next, held_out)


def test_empty_rows_of_a_saved_dataset_are_counted_as_they_are_met(tmp_path):
    """Each reading counts its own; half of the rows or more is a warning."""
    rows = [{"text": text} for text in ("a", None, "b", "c", "d", "e")]
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])
    ).save_to_disk(tmp_path / "talk")
    corpus = open_corpus(str(tmp_path / "talk"))
    for _ in range(2):  # a held-out stream is read as often as a tokenizer is trained
        assert list(corpus.train()) == ["a", "b", "c", "d", "e"] and list(corpus.held_out()) == ["a"]
        few, half = corpus.remarks
        assert few.startswith("data: 1 empty dialogues of ") and "talk train left out, of 6" in few
        assert half.startswith("warning: data: 1 empty dialogues of ") and "talk test left out, of 2" in half


def test_the_identity_of_a_saved_dataset_is_its_content(save):
    """Of the splits in use: another folder or an unused split keeps it, other rows, roles or columns change it."""
    default = open_corpus(save("a", train=5, test=3)).identity
    assert open_corpus(save("b", train=5, test=3, more=2)).identity == default
    assert open_corpus(save("a", train=5, test=3), "train").identity == default
    others = [("c", dict(train=6, test=3)), ("d", dict(train=5, test=4)), ("e", dict(train=5))]
    changed = {open_corpus(save(folder, **splits)).identity for folder, splits in others}
    changed |= {open_corpus(save("a", train=5, test=3), "", "messages").identity}
    assert len(changed | {default}) == 5


def test_saved_data_from_end_to_end(save, settings):
    """Built once, then from the cache, with the same notes."""
    folder = save("talk", alone=40)
    first, second = (load_data(settings(data_source=folder)) for _ in range(2))
    assert second.cache_hit and first.fingerprint == second.fingerprint and second.notes[:-1] == first.notes
    assert first.train_dialogue.max() < 40 - 1 - first.val_dialogue.max()


def test_a_damaged_saved_dataset_is_one_sentence(save, tmp_path):
    folder = save("talk", alone=40)
    (file,) = (tmp_path / "talk").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert "talk is no readable saved dataset (" in message_of(open_corpus, folder)
