"""Sources of dialogues: the hub, the embedded corpus, saved datasets, files; and a hub that fails."""

import hashlib
import json

import datasets
import huggingface_hub
import pytest
from datasets import load_dataset
from fakes import (
    COMMIT,
    NO_NETWORK,
    TIMEOUT,
    Rows,
    both,
    dialogue,
    http_error,
    httpx,
    message_of,
    rows,
    texts,
)

from newllm.data import dialogues, hub
from newllm.data.dialogues import HELD_OUT_EVERY, ULTRACHAT, ULTRACHAT_REVISION, open_corpus

GATED, MISSING = huggingface_hub.errors.GatedRepoError, huggingface_hub.errors.RepositoryNotFoundError
NO_REVISION = huggingface_hub.errors.RevisionNotFoundError


@pytest.mark.parametrize(
    "choice, words",
    [
        *(((name,), "nor an existing file") for name in ("", "ultrachatt", "/a", "x" * 5000, "me/a.jsonl")),
        *(((source, "train"), "no choice of data_split") for source in ("auto", "ultrachat", "chitchat")),
        (("auto", "", "text"), "has no choice of data_split or data_column: leave them out."),
        (("TALK", "train"), "TALK has no splits: leave out data_split."),
        (("TALK", "", "a,b,c"), "data_column is one name or two"),
        *((("TALK", "", column), f"TALK line 1 has no {column}") for column in (",b", "a,", " ")),
    ],
)  # fmt: skip
def test_a_choice_that_there_is_not_is_refused(choice, words, talk, asked):
    """Before the hub is asked: neither for a missing file nor for what a named source does not have."""
    text = message_of(lambda: next(open_corpus(*(part.replace("TALK", talk) for part in choice)).train()))
    assert words.replace("TALK", talk) in text and asked == []


# The embedded corpus


def test_chitchat_turns_are_joined_and_alternate(small_chitchat):
    """First sender is the user; a turn's texts are one message; what nobody answered is left out, counted."""
    source = open_corpus("chitchat")
    assert source.identity == "chitchat-dataset==0.9.0" and source.size() == 30
    assert next(source.train()) == "User: hello number 0\nAssistant: hi"
    assert source.remarks()[0].startswith("data: 1 openings of chitchat that nobody answered left out")


def test_real_chitchat_has_the_format_read_here():
    source = open_corpus("chitchat")
    assert source.size() == 4018
    assert next(source.train()).startswith("User: Hello How are you doing today?\nAssistant: whats up MD")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(dialogues.importlib.util, "find_spec", lambda name: None)
    assert "pip install chitchat-dataset==0.9.0" in message_of(open_corpus, "chitchat")


# The hub


@pytest.mark.parametrize("source", ["ultrachat", "auto"])
def test_ultrachat_streams_its_official_splits(publish, source):
    """Training and held-out are the official splits at the pinned revision, of no known size."""
    opened = publish(train_sft=rows("train"), train_gen=rows("other"), test_sft=rows("test"))
    corpus = open_corpus(source)
    assert corpus.name == "ultrachat" and corpus.size() is None
    assert corpus.identity == f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
    assert opened == [(ULTRACHAT, None, True, ULTRACHAT_REVISION)]
    assert both(corpus) == (texts("train", range(40)), texts("test", range(40)))


@pytest.mark.parametrize(
    "source, revision, subset",
    [
        ("me/talk", "main", None),
        ("me/talk:en", "main", "en"),
        ("me/talk@v1.0", "v1.0", None),
        ("me/talk:en@refs/pr/3", "refs%2Fpr%2F3", "en"),
        (f"me/talk:en@{COMMIT}", COMMIT, "en"),
    ],
)
def test_a_hub_dataset_is_named_with_subset_and_revision(publish, asked, source, revision, subset):
    """The hub tells the commit of the revision, which is streamed; the note names it for the next time."""
    opened = publish(train=rows("train"), test=rows("test"))
    corpus = open_corpus(source)
    assert asked[0].endswith(f"/api/datasets/me/talk/revision/{revision}")
    assert opened == [("me/talk", subset, True, COMMIT)]
    assert both(corpus) == (texts("train", range(40)), texts("test", range(40)))
    assert corpus.note == f"data: {source.partition('@')[0]}@{COMMIT}"
    assert corpus.name == ("me_talk_en" if subset else "me_talk")
    assert open_corpus(corpus.note.removeprefix("data: ")).identity == corpus.identity


def test_what_exists_here_is_no_hub_dataset(write_jsonl, tmp_path, monkeypatch, asked):
    (tmp_path / "me" / "talk").mkdir(parents=True)
    write_jsonl([{"text": "mine"}], "me/talk/a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert list(open_corpus("me/talk").train()) == ["mine"] and asked == []


@pytest.mark.parametrize(
    "names, split, train, held_out",
    [
        (["train", "test", "validation"], "", "train", "test"),
        (["train", "validation"], "", "train", "validation"),
        (["train_sft", "train_gen", "test_sft", "test_gen"], "train_gen", "train_gen", "test_gen"),
        (["train_en", "validation_en", "test"], "train_en", "train_en", "test"),
        (["code", "math", "validation"], "math", "math", "validation"),
        (["train", "test"], "test", "test", None),
        (["train_sft"], "", "train_sft", None),
    ],
)
def test_the_split_that_is_held_out(publish, names, split, train, held_out):
    """Of the same kind as the training split if there is one, else every 20th row; a remark says which."""
    publish(**{name: rows(name) for name in names})
    corpus, some = open_corpus("me/talk", split), range(HELD_OUT_EVERY - 1, 40, HELD_OUT_EVERY)
    rest = range(40) if held_out else [number for number in range(40) if number not in some]
    assert both(corpus) == (texts(train, rest), texts(held_out or train, range(40) if held_out else some))
    other = f"split {held_out}" if held_out else "every 20th row, as there is no split test or validation"
    assert corpus.remarks() == [f"data: trains on split {train}, holds out {other}"]


def test_what_shapes_the_data_is_its_identity(publish):
    """Subset, commit, split and column; the default split by its name is the same data."""
    publish(train=rows("train"), other=rows("other"))
    choices = [
        ("me/talk",),
        ("me/talk", "other"),
        ("me/talk", "", "messages"),
        ("me/talk:en",),
        (f"me/talk@{'1' * 40}",),
    ]
    assert len({open_corpus(*choice).identity for choice in choices}) == 5
    assert open_corpus("me/talk", "train").identity == open_corpus("me/talk").identity


def test_a_row_of_the_hub_without_the_columns_is_named(publish):
    publish(train=Rows([dict(question="why?", essay=["one"])]), test=Rows([dict(a=1)]))
    assert next(open_corpus("me/talk", "", "essay").train()) == "User: one"
    text = message_of(next, open_corpus("me/talk", "", "story").train())
    assert text.startswith("me/talk train row 1 has no story") and text.endswith("its keys: question, essay.")
    assert "me/talk test row 1 has no messages" in message_of(next, open_corpus("me/talk").held_out())


def test_an_unknown_split_lists_those_there_are(publish):
    publish(train_sft=rows("a"), train_gen=rows("b"))
    for split in ("train", "test"):
        expected = f"me/talk has no split '{split}' but train_sft, train_gen: name one as --data_split."
        assert message_of(open_corpus, "me/talk", split if split == "test" else "") == expected


@pytest.mark.parametrize("subset", ["", ":de"])
def test_a_missing_subset_lists_those_there_are(tmp_path, monkeypatch, answers, subset):
    """In the words of the library itself, met with a repository of two subsets on the disk."""
    for name in ("en", "fr"):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list([dialogue("x")]).to_parquet(str(tmp_path / name / "train.parquet"))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("en", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    answers[:] = [None]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, **options: load_dataset(str(tmp_path), name)
    )
    text = message_of(open_corpus, f"me/talk{subset}")
    assert text == "me/talk has the subsets 'en', 'fr': name one as me/talk:SUBSET."


def test_a_prepared_hub_dataset_needs_no_network(tmp_path, asked):
    """Under the names that the library gives it, in several files; another commit or subset is not taken."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    files = {}
    for split, count in (("train", 4000), ("test", 3)):
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_list(rows(split, count)).to_parquet(files[split], batch_size=1000)
    builder = Parquet(dataset_name="my_talk", hash=COMMIT, data_files=files)
    builder.repo_id = "me/MyTalk"  # afterwards, because the files of this stand-in are local
    folder = tmp_path / "hub" / "me___my_talk" / "default" / "0.0.0" / COMMIT
    builder.download_and_prepare(output_dir=str(folder), max_shard_size="100KB")
    assert len(list(folder.glob("my_talk-train-*-of-*.arrow"))) > 1
    corpus = open_corpus(f"me/MyTalk@{COMMIT}")
    assert list(corpus.train()) == texts("train", range(4000)) and list(corpus.held_out()) == texts(
        "test", range(3)
    )
    assert asked == []
    for other in (f"me/MyTalk:en@{COMMIT}", "me/MyTalk@" + "1" * 40):
        assert "cannot be had from the Hugging Face hub" in message_of(open_corpus, other)


# A hub that fails


@pytest.mark.parametrize(
    "answer, reason, naps",
    [
        (NO_NETWORK, "no internet connection", 0),
        (httpx.ConnectTimeout("no route"), "no internet connection: time-out", 0),
        (http_error(429), "HTTP 429", 3),
        (http_error(503), "HTTP 503", 3),
        (http_error(404), "HTTP 404", 0),
        (TIMEOUT, "time-out", 3),
        (http_error(401, MISSING), "it has none of this name, or a private one", 0),
        (http_error(404, NO_REVISION), "it has no such revision", 0),
        (http_error(403, GATED), "it is gated: accept its terms on its page there and log in", 0),
    ],
)
def test_unreachable_hub(small_chitchat, answers, slept, answer, reason, naps):
    """For "auto" the embedded corpus, said so; a dataset by name stops with the reason and the way out."""
    answers[:] = [answer]
    source = open_corpus("auto")
    assert source.name == "chitchat" and slept == [1.0, 2.0, 4.0][:naps]
    why = f"NOT UltraChat (the Hugging Face hub could not be reached: {reason}"
    assert source.note.startswith(f"data: chitchat-dataset 0.9.0, human dialogues, {why}")
    for source in ("ultrachat", "me/talk", f"me/talk@{COMMIT}"):
        text = message_of(open_corpus, source)
        assert text.startswith(f"data_source '{source}' is no file or folder here and cannot be had from the")
        assert f"({reason}" in text and "--data_source chitchat" in text


def test_offline_mode_asks_nothing(small_chitchat, asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE" in open_corpus("auto").note and asked == []


def test_an_accident_of_the_probe_or_of_opening_is_survived(publish, answers, slept, monkeypatch):
    """Two each, as the libraries raise them: plain, or wrapped into what is no sign of it."""
    publish(train_sft=rows("train"), test_sft=rows("test"))
    answers[:] = [http_error(429), httpx.RemoteProtocolError("closed"), None]
    errors, load = [TIMEOUT, http_error(429)], datasets.load_dataset

    def flaky(*args, **options):
        if errors:
            raise FileNotFoundError("it does not exist") from errors.pop()
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", flaky)
    assert open_corpus("auto").name == "ultrachat" and slept == [1.0, 2.0] * 2


@pytest.mark.parametrize("error", [FileNotFoundError("no file"), ConnectionError("Couldn't reach the hub")])
def test_other_errors_are_final(error, slept):
    with pytest.raises(type(error)):
        hub.retry(lambda: (_ for _ in ()).throw(error))
    assert slept == [] and hub.describe(error) == str(error)


@pytest.mark.parametrize("kind, reason", [(GATED, "it is gated: accept its terms"), (None, "HTTP 503")])
def test_failed_opening_is_no_silent_replacement(publish, small_chitchat, monkeypatch, kind, reason):
    """The hub describes a gated dataset to anyone and refuses the files, which `datasets` calls not found."""

    def fail(*args, **options):
        raise FileNotFoundError("not found") from (http_error(403, kind) if kind else http_error(503))

    publish()
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert f"reached: {reason}" in open_corpus("auto").note
    assert f"({reason}" in message_of(open_corpus, "me/talk")


def test_a_stream_that_breaks_is_opened_again_behind_the_last_row(publish):
    """Nothing twice, nothing left out, whatever row it breaks at."""
    breaks = [
        *rows("train", 17),
        TIMEOUT,
        *rows("train")[17:20],
        http_error(503),
        TIMEOUT,
        *rows("train")[20:],
    ]
    publish(train=Rows(breaks), test=rows("test"))
    assert list(open_corpus("me/talk").train()) == texts("train", range(40))


@pytest.mark.parametrize(
    "errors, reason", [([TIMEOUT] * 9, "time-out"), ([ConnectionError("no answer")], "no answer")]
)
def test_a_stream_that_stays_broken_is_an_error(publish, errors, reason):
    """Never a shorter data set."""
    publish(train=Rows([*rows("train", 17), *errors, *rows("train")]), test=rows("test"))
    text = message_of(list, open_corpus("me/talk").train())
    assert f"reading me/talk train broke off after 17 dialogues ({reason}" in text and "run again" in text


# Saved datasets


@pytest.fixture
def save(tmp_path):
    """Function that saves splits (name: how many dialogues), or one named "alone", and gives the folder."""

    def to_disk(folder, **splits):
        made = {name: datasets.Dataset.from_list(rows(name, count)) for name, count in splits.items()}
        (made["alone"] if "alone" in made else datasets.DatasetDict(made)).save_to_disk(tmp_path / folder)
        return str(tmp_path / folder)

    return to_disk


def test_saved_splits_are_read_by_name_or_the_only_one_from_both_ends(save):
    """A saved dataset without splits is one split; each reading begins anew."""
    folder = save("talk", train=5, test=3, other=2)
    corpus = open_corpus(folder)
    assert corpus.name == "talk" and corpus.size() is None and "(split train and test, sha256 " in corpus.note
    assert both(corpus) == (texts("train", range(5)), texts("test", range(3)))
    assert list(open_corpus(folder, "other").train()) == texts("other", range(2))
    assert f"{folder} has no split 'dev' but train, test, other" in message_of(open_corpus, folder, "dev")
    for name in ("alone", "train"):
        corpus = open_corpus(save(f"only {name}", **{name: 4}))
        expected = texts(name, range(4))
        assert both(corpus) == both(corpus) == (expected, expected[::-1]) and corpus.size() == 4


def test_of_a_saved_dataset_only_what_is_needed_is_read(tmp_path):
    """It may be larger than memory: a row in the middle whose text is a number is never met."""
    good = [{"messages": [f"t{number}"], "text": None} for number in range(5)]
    datasets.Dataset.from_list([*good, {"messages": None, "text": 5}, *good]).save_to_disk(tmp_path / "talk")
    corpus = open_corpus(str(tmp_path / "talk"))
    expected = [f"User: t{number}" for number in range(5)]
    for stream, order in ((corpus.train(), expected), (corpus.held_out(), expected[::-1])):
        assert [next(stream) for _ in range(5)] == order
        assert "train row 6 has no dialogue in text" in message_of(next, stream)


def test_empty_rows_are_counted_as_they_are_met(tmp_path):
    """Each reading counts its own; half of the rows or more is a warning."""
    rows = [{"text": text} for text in ("a", None, "b", "c", "d", "e")]
    whole, half = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:2])
    datasets.DatasetDict(train=whole, test=half).save_to_disk(tmp_path / "talk")
    corpus = open_corpus(str(tmp_path / "talk"))
    for _ in range(2):  # a held-out stream is read as often as a tokenizer is trained
        assert list(corpus.train()) == ["a", "b", "c", "d", "e"] and list(corpus.held_out()) == ["a"]
        first, second = corpus.remarks()
        assert first.startswith("data: 1 empty training dialogues of ") and "talk left out, of 6" in first
        assert second.startswith("warning: data: 1 empty held-out dialogues of ") and "of 2" in second


def test_the_identity_of_a_saved_dataset_is_its_content(save):
    """Another folder or an unused split keeps it; other rows in use, roles or columns change it."""
    default = open_corpus(save("a", train=5, test=3)).identity
    assert open_corpus(save("b", train=5, test=3, more=2)).identity == default
    assert open_corpus(save("a", train=5, test=3), "train").identity == default
    others = [("c", dict(train=6, test=3)), ("d", dict(train=5, test=4)), ("e", dict(train=5))]
    changed = {open_corpus(save(folder, **splits)).identity for folder, splits in others}
    changed |= {open_corpus(save("a", train=5, test=3), "", "messages").identity}
    assert len(changed | {default}) == 5


def test_a_damaged_saved_dataset_is_one_sentence(save, tmp_path):
    folder = save("talk", alone=40)
    (file,) = (tmp_path / "talk").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert "talk is no readable saved dataset (" in message_of(open_corpus, folder)


# Files


def test_files_are_one_list_that_runs_from_both_ends(write_jsonl):
    """Training from the front, held-out from the back, each call anew."""
    source = open_corpus(str(write_jsonl([{"text": text} for text in "abcd"])))
    assert both(source) == both(source) == (list("abcd"), list("dcba")) and source.size() == 4


def test_folder_is_its_files_in_order_of_name(tmp_path, write_jsonl):
    """Tables beside other files describe them and are named as not read; alone these are data."""
    paths = [write_jsonl([{"text": "second"}], "b.jsonl"), write_jsonl([{"text": "first"}], "a.jsonl")]
    (tmp_path / ".c.jsonl").write_text("broken")
    identity = open_corpus(str(tmp_path)).identity
    (tmp_path / "info.json").write_text(json.dumps([{"text": "no talk"}]))
    (tmp_path / "index.csv").write_text("text\nno talk\n")
    source = open_corpus(str(tmp_path))
    assert list(source.train()) == ["first", "second"] and source.identity == identity
    assert source.remarks() == [f"data: of {tmp_path} not read: index.csv, info.json"]
    for path in paths:
        path.unlink()
    assert list(open_corpus(str(tmp_path)).train()) == ["no talk", "no talk"]
    (tmp_path / "empty").mkdir()
    assert "is no data" in message_of(open_corpus, str(tmp_path / "empty"))


def test_a_file_is_known_by_its_content(tmp_path, write_jsonl):
    """Not by its name, and before it is parsed; another byte or column is other data."""
    paths = []
    for name, content in ("ax", "bx", "cy"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(content)
    first, same, other = (open_corpus(str(path)) for path in paths)
    assert first.identity == same.identity == f"sha256:{hashlib.sha256(b'x').hexdigest()}" != other.identity
    assert open_corpus(str(paths[0]), "", "text").identity != first.identity
    assert "is not valid JSON" in message_of(first.size)
    for file, name in (("my talk (1).jsonl", "my_talk_1"), ("ultrachat.jsonl", "ultrachat-file")):
        assert open_corpus(str(write_jsonl([], file))).name == name  # fit for a file, and for no other source


def test_empty_dialogues_are_dropped_and_counted(write_jsonl):
    """Of which there are many, it is a warning."""
    good = [{"text": letter} for letter in "abcd"]
    source = open_corpus(str(write_jsonl([{"text": " "}, *good, {"data": []}, {"text": None}])))
    said = "data: 3 empty dialogues of talk left out, of 7"
    assert source.size() == 4 and source.remarks() == [said]
    source = open_corpus(str(write_jsonl([{"text": "a"}, {"messages": None}])))
    assert source.size() == 1 and source.remarks()[0].startswith("warning: data: 1 empty dialogues of talk")
