"""Sources of dialogues: the hub, the embedded corpus, saved datasets, files; and a hub that fails."""

import hashlib
import json

import datasets
import huggingface_hub
import pytest
from fakes import COMMIT, NO_NETWORK, TIMEOUT, both, broken, http_error, httpx, message_of, rows, texts

from newllm.data.dialogues import HELD_OUT_EVERY, ULTRACHAT, ULTRACHAT_REVISION, open_corpus

ERRORS = huggingface_hub.errors


@pytest.mark.parametrize(
    "choice, words",
    [
        *(((name,), "nor an existing file") for name in ("", "ultrachatt", "/a", "x" * 5000, "me/a.jsonl")),
        *(((source, "train"), "has no data_split or") for source in ("auto", "ultrachat", "chitchat")),
        (("auto", "", "text"), "has no data_split or data_column: leave them out."),
        (("TALK", "train"), "TALK has no splits: leave out data_split."),
        *((("TALK", "", column), f"TALK line 1 has no {column}") for column in (",b", "a,", " ")),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choice, words, talk, net):
    """Before the hub is asked: neither for a missing file nor for what a named source does not have."""
    text = message_of(lambda: next(open_corpus(*(part.replace("TALK", talk) for part in choice)).train()))
    assert words.replace("TALK", talk) in text and net.asked == []


def test_the_embedded_corpus_joins_turns(small_chitchat):
    """First sender is the user; a turn's texts are one message; what nobody answered is no dialogue."""
    source = open_corpus("chitchat")
    assert source.identity == "chitchat-dataset==0.9.0" and len(list(source.train())) == 30
    assert next(source.train()) == "User: hello number 0\nAssistant: hi"


def test_the_real_embedded_corpus_has_the_format_read_here():
    train = list(open_corpus("chitchat").train())
    assert len(train) == 4018 and train[0].startswith(
        "User: Hello How are you doing today?\nAssistant: whats"
    )


# The hub


@pytest.mark.parametrize("source", ["ultrachat", "auto"])
def test_ultrachat_streams_its_official_splits(publish, source):
    """Training and held-out are the official splits at the pinned revision."""
    opened = publish(train_sft=rows("train"), train_gen=rows("other"), test_sft=rows("test"))
    corpus = open_corpus(source)
    assert corpus.name == "ultrachat"
    assert corpus.identity == f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
    assert opened == [(ULTRACHAT, None, True, ULTRACHAT_REVISION)]
    assert both(corpus) == (texts("train", range(40)), texts("test", range(40)))


@pytest.mark.parametrize(
    "source, revision, subset",
    [
        ("me/talk", "main", None),
        ("me/talk@v1.0", "v1.0", None),
        ("me/talk:en@refs/pr/3", "refs%2Fpr%2F3", "en"),
        (f"me/talk:en@{COMMIT}", COMMIT, "en"),
    ],
)
def test_a_hub_dataset_is_named_with_subset_and_revision(publish, source, revision, subset, net):
    """The hub tells the commit of the revision, which is streamed; the note names it for the next time."""
    opened = publish(train=rows("train"), test=rows("test"))
    corpus = open_corpus(source)
    assert net.asked[0].endswith(f"/api/datasets/me/talk/revision/{revision}")
    assert opened == [("me/talk", subset, True, COMMIT)]
    assert both(corpus) == (texts("train", range(40)), texts("test", range(40)))
    assert corpus.note == f"data: {source.partition('@')[0]}@{COMMIT}"
    assert corpus.name == ("me_talk_en" if subset else "me_talk")
    assert open_corpus(corpus.note.removeprefix("data: ")).identity == corpus.identity


def test_what_exists_here_is_no_hub_dataset(write_jsonl, tmp_path, monkeypatch, net):
    (tmp_path / "me" / "talk").mkdir(parents=True)
    write_jsonl([{"text": "mine"}], "me/talk/a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert list(open_corpus("me/talk").train()) == ["mine"] and net.asked == []


@pytest.mark.parametrize(
    "names, split, train, held_out",
    [
        ("train test validation", "", "train", "test"),
        ("train validation", "", "train", "validation"),
        ("train_sft train_gen test_sft test_gen", "train_gen", "train_gen", "test_gen"),
        ("train_en validation_en test", "train_en", "train_en", "test"),
        ("code math validation", "math", "math", "validation"),
        ("train test", "test", "test", None),
        ("train_sft", "", "train_sft", None),
    ],
)
def test_the_split_that_is_held_out(publish, names, split, train, held_out):
    """Of the same kind as the training split if there is one, else every 20th row; a remark says which."""
    publish(**{name: rows(name) for name in names.split()})
    corpus, some = open_corpus("me/talk", split), range(HELD_OUT_EVERY - 1, 40, HELD_OUT_EVERY)
    rest = range(40) if held_out else [number for number in range(40) if number not in some]
    assert both(corpus) == (texts(train, rest), texts(held_out or train, range(40) if held_out else some))
    other = f"split {held_out}" if held_out else "every 20th row, as there is no split test or validation"
    assert corpus.remarks() == [f"data: trains on split {train}, holds out {other}"]


def test_what_shapes_the_data_is_its_identity(publish):
    """Subset, commit, split and column; the default split by its name is the same data."""
    publish(train=rows("train"), other=rows("other"))
    choices = [("me/talk",), ("me/talk", "other"), ("me/talk", "", "messages"), ("me/talk:en",)]
    choices += [(f"me/talk@{'1' * 40}",)]
    assert len({open_corpus(*choice).identity for choice in choices}) == 5
    assert open_corpus("me/talk", "train").identity == open_corpus("me/talk").identity


def test_a_row_or_split_that_the_hub_has_not_is_named(publish):
    publish(train=[dict(question="why?", essay=["one"])], test=[dict(a=1)])
    assert next(open_corpus("me/talk", "", "essay").train()) == "User: one"
    text = message_of(next, open_corpus("me/talk", "", "story").train())
    assert text.startswith("me/talk train row 1 has no story") and text.endswith("its keys: question, essay.")
    assert "me/talk test row 1 has no messages" in message_of(next, open_corpus("me/talk").held_out())
    expected = "me/talk has no split 'dev' but train, test: name one as --data_split."
    assert message_of(open_corpus, "me/talk", "dev") == expected


def test_a_missing_subset_lists_those_there_are(tmp_path, monkeypatch, net):
    """In the words of the library itself, met with a repository of two subsets on the disk."""
    for name in ("en", "fr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"text": "x"}')
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("en", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    net.answers = [None]
    load = datasets.load.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **options: load(str(tmp_path), name))
    for source in ("me/talk", "me/talk:de"):
        expected = "me/talk has subsets 'en', 'fr': name one as me/talk:SUBSET."
        assert message_of(open_corpus, source) == expected


@pytest.mark.parametrize(
    "answer, reason, naps",
    [
        (NO_NETWORK, "no internet connection", 0),
        (httpx.ConnectTimeout("no route"), "no internet connection", 0),
        (http_error(429), "HTTP 429", 3),
        (http_error(503), "HTTP 503", 3),
        (http_error(404), "HTTP 404", 0),
        (TIMEOUT, "time-out", 3),
        (http_error(401, ERRORS.RepositoryNotFoundError), "it has none of this name, or a private one", 0),
        (http_error(404, ERRORS.RevisionNotFoundError), "it has no such revision", 0),
        (http_error(403, ERRORS.GatedRepoError), "it is gated: accept its terms on its page", 0),
    ],
)
def test_unreachable_hub(small_chitchat, answer, reason, naps, net):
    """For "auto" the embedded corpus, said so; a dataset by name stops with the reason and the way out."""
    net.answers = [answer]
    source = open_corpus("auto")
    assert source.name == "chitchat" and net.slept == [1.0, 2.0, 4.0][:naps]
    why = f"NOT UltraChat (the Hugging Face hub could not be reached: {reason}"
    assert source.note.startswith(f"data: chitchat-dataset 0.9.0, human dialogues, {why}")
    for source in ("ultrachat", "me/talk", f"me/talk@{COMMIT}"):
        text = message_of(open_corpus, source)
        assert text.startswith(f"data_source '{source}' is no file or folder here and cannot be had from the")
        assert f"({reason}" in text and "--data_source chitchat" in text


def test_an_accident_of_the_probe_is_survived(publish, net):
    """Two in a row, of different kinds."""
    publish(train_sft=rows("train"), test_sft=rows("test"))
    net.answers = [http_error(429), httpx.RemoteProtocolError("closed"), None]
    assert open_corpus("auto").name == "ultrachat" and net.slept == [1.0, 2.0]


def test_failed_opening_is_no_silent_replacement(publish, small_chitchat, monkeypatch, net):
    """The hub describes a gated dataset to anyone and refuses the files, which `datasets` calls not found."""

    def fail(*args, **options):
        raise FileNotFoundError("not found") from http_error(403, ERRORS.GatedRepoError)

    publish()
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "reached: it is gated: accept its terms" in open_corpus("auto").note
    assert "(it is gated" in message_of(open_corpus, "me/talk")
    net.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE" in open_corpus("auto").note and net.asked == []


def test_a_stream_that_breaks_is_an_error(publish):
    """Never a shorter data set. `datasets` has tried for minutes by then."""
    publish(train=broken(rows("train", 17), TIMEOUT), test=rows("test"))
    text = message_of(list, open_corpus("me/talk").train())
    assert "reading me/talk train broke off after 17 dialogues (time-out" in text and "run again" in text


# Saved datasets


@pytest.fixture
def save(tmp_path):
    """Function that saves splits (name: how many dialogues), or one named "alone", and gives the folder."""

    def to_disk(folder, **splits):
        made = {name: datasets.Dataset.from_list(rows(name, count)) for name, count in splits.items()}
        (made["alone"] if "alone" in made else datasets.DatasetDict(made)).save_to_disk(tmp_path / folder)
        return str(tmp_path / folder)

    return to_disk


def test_saved_splits_are_read_by_name_or_the_only_one_from_both_ends(save, tmp_path):
    """A saved dataset without splits is one split; each reading begins anew; a damaged one is a sentence."""
    folder = save("talk", train=5, test=3, other=2)
    corpus = open_corpus(folder)
    assert corpus.name == "talk" and "(split train and test, sha256 " in corpus.note
    assert both(corpus) == (texts("train", range(5)), texts("test", range(3)))
    assert list(open_corpus(folder, "other").train()) == texts("other", range(2))
    assert f"{folder} has no split 'dev' but train, test, other" in message_of(open_corpus, folder, "dev")
    for name in ("alone", "train"):
        corpus = open_corpus(save(f"only {name}", **{name: 4}))
        assert both(corpus) == both(corpus) == (texts(name, range(4)), texts(name, range(4))[::-1])
    (file,) = (tmp_path / "only alone").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert " cannot be read as a saved dataset (" in message_of(open_corpus, str(tmp_path / "only alone"))


def test_of_a_saved_dataset_only_what_is_needed_is_read(tmp_path):
    """It may be larger than memory: a row in the middle whose text is a number is never met."""
    good = [{"messages": [f"t{number}"], "text": None} for number in range(5)]
    datasets.Dataset.from_list([*good, {"messages": None, "text": 5}, *good]).save_to_disk(tmp_path / "talk")
    corpus = open_corpus(str(tmp_path / "talk"))
    expected = [f"User: t{number}" for number in range(5)]
    for stream, order in ((corpus.train(), expected), (corpus.held_out(), expected[::-1])):
        assert [next(stream) for _ in range(5)] == order
        assert "train row 6 has no dialogue in text" in message_of(next, stream)


def test_the_identity_of_a_saved_dataset_is_its_content(save):
    """Another folder or an unused split keeps it; other rows in use, roles or columns change it."""
    default = open_corpus(save("a", train=5, test=3)).identity
    assert open_corpus(save("b", train=5, test=3, more=2)).identity == default
    others = [("c", dict(train=6, test=3)), ("d", dict(train=5, test=4)), ("e", dict(train=5))]
    changed = {open_corpus(save(folder, **splits)).identity for folder, splits in others}
    changed |= {open_corpus(save("f", train=5, test=3), "", "messages").identity}
    assert len(changed | {default}) == 5


# Files


def test_folder_is_its_files_in_order_of_name_as_one_list(tmp_path, write_jsonl):
    """It is read from both ends. Tables beside other files describe them and are named as not read."""
    paths = [write_jsonl([{"text": "second"}], "b.jsonl"), write_jsonl([{"text": "first"}], "a.jsonl")]
    (tmp_path / ".c.jsonl").write_text("broken")
    identity = open_corpus(str(tmp_path)).identity
    (tmp_path / "info.json").write_text(json.dumps([{"text": "no talk"}]))
    (tmp_path / "index.csv").write_text("text\nno talk\n")
    source = open_corpus(str(tmp_path))
    assert both(source) == both(source) == (["first", "second"], ["second", "first"])
    assert source.identity == identity
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
    for file, name in (("my talk (1).jsonl", "my_talk_1"), ("ultrachat.jsonl", "ultrachat-file")):
        assert open_corpus(str(write_jsonl([], file))).name == name  # fit for a file, and for no other source


def test_empty_dialogues_are_dropped_and_counted(write_jsonl, publish):
    """Of which there are many, it is a warning. A stream counts what was met, anew at each reading."""
    good = [{"text": letter} for letter in "abcd"]
    source = open_corpus(str(write_jsonl([{"text": " "}, *good, {"data": []}, {"text": None}])))
    assert len(list(source.train())) == 4
    assert source.remarks() == ["data: 3 empty dialogues left out, of 7 of talk"]
    source = open_corpus(str(write_jsonl([{"text": "a"}, {"messages": None}])))
    assert list(source.held_out()) == ["a"] and source.remarks()[0].startswith(
        "warning: data: 1 empty dialog"
    )
    publish(train=[*good, {"text": None}], test=[{"text": None}, *good])
    source = open_corpus("me/talk")
    for _ in range(2):  # a held-out stream is read as often as a tokenizer is trained
        assert both(source) == (list("abcd"), list("abcd"))
        assert source.remarks()[1:] == ["data: 2 empty dialogues left out, of 10 of me_talk"]
