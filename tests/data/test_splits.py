"""Datasets with splits on the hub: by name, subset and revision, one split held out, or a sentence."""

import datasets
import pytest
from checks import message_of
from datasets import load_dataset
from hub_fakes import COMMIT, ConnectError, HTTPError, ReadTimeout, Rows, dialogue, rows, texts

from newllm.data.dialogues import ULTRACHAT_IDENTITY, open_corpus
from newllm.data.samples import load_data
from newllm.data.splits import HELD_OUT_EVERY


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
    """The hub says which commit the revision is, and that very commit is streamed."""
    opened = publish(train=rows("train"), test=rows("test"))
    corpus = open_corpus(source)
    assert asked[0].endswith(f"/api/datasets/me/talk/revision/{revision}")
    assert opened == [("me/talk", subset, True, COMMIT)]
    assert list(corpus.train()) == texts("train", range(40)) and list(corpus.held_out()) == texts(
        "test", range(40)
    )


def test_the_note_is_a_source_that_gives_the_same_data_again(publish):
    publish(train=rows("train"))
    corpus = open_corpus("me/talk:en@v1.0")
    assert corpus.note == f"data: me/talk:en@{COMMIT}" and corpus.name == "me_talk_en"
    assert open_corpus(corpus.note.removeprefix("data: ")).identity == corpus.identity


def test_what_exists_here_is_no_hub_dataset(publish, write_jsonl, tmp_path, monkeypatch, asked):
    """A file or folder wins over a hub dataset of its name, and a missing file is not looked for on the hub."""
    publish(train=rows("train"))
    (tmp_path / "me" / "talk").mkdir(parents=True)
    write_jsonl([{"text": "mine"}], "me/talk/a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert list(open_corpus("me/talk").train()) == ["mine"]
    assert "neither one of" in message_of(open_corpus, "me/other.jsonl")
    assert asked == []


def test_rows_that_the_library_streams_are_read(publish, tmp_path):
    """From parquet files, in the types it gives."""
    turns = [{"conversations": [{"from": "human", "value": f"{number}"}]} for number in range(3)]
    datasets.Dataset.from_list(turns).to_parquet(str(tmp_path / "a.parquet"))
    files = {"train": str(tmp_path / "a.parquet"), "test": str(tmp_path / "a.parquet")}
    publish(**load_dataset("parquet", data_files=files, streaming=True))
    corpus = open_corpus("me/talk")
    assert list(corpus.train()) == list(corpus.held_out()) == ["User: 0", "User: 1", "User: 2"]


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
        (["train"], "train", "train", None),
    ],
)
def test_the_split_that_is_held_out(publish, names, split, train, held_out):
    """Of the same kind as the training split if there is one; a remark says which."""
    publish(**{name: rows(name) for name in names})
    corpus = open_corpus("me/talk", split)
    assert next(corpus.train()) == texts(train, [0])[0]
    assert next(corpus.held_out()) == texts(held_out or train, [0 if held_out else HELD_OUT_EVERY - 1])[0]
    rest = f"split {held_out}" if held_out else "every 20th row, as there is no split test or validation"
    assert corpus.remarks == [f"data: trains on split {train}, holds out {rest}"]


def test_a_single_split_is_divided_row_by_row(publish):
    """Every 20th row is held out, the others train, also when the stream breaks in between."""
    publish(train=rows("train", 100))
    corpus = open_corpus("me/talk")
    held_out = range(HELD_OUT_EVERY - 1, 100, HELD_OUT_EVERY)
    publish(
        train=Rows(
            rows("train", 100).rows, {17: [ReadTimeout("x")], 20: [HTTPError(503)], 79: [TimeoutError()]}
        )
    )
    broken = open_corpus("me/talk")
    for found in (corpus, broken):
        assert list(found.train()) == texts(
            "train", [number for number in range(100) if number not in held_out]
        )
        assert list(found.held_out()) == texts("train", held_out)


def test_what_shapes_the_data_is_its_identity(publish):
    """Subset, commit, split and column; the default split by its name is the same data."""
    publish(train=rows("train"), other=rows("other"))
    default, same, *others = (
        open_corpus(*choice).identity
        for choice in (
            ("me/talk",),
            ("me/talk", "train"),
            ("me/talk", "other"),
            ("me/talk", "", "messages"),
            ("me/talk:en",),
            ("me/talk@" + "1" * 40,),
        )
    )
    assert default == same and len({default, *others}) == 5


def test_ultrachat_by_its_name_on_the_hub_is_a_data_set_of_its_own(online, settings):
    """The cache file of "ultrachat" is not that of the same dataset asked for otherwise."""
    first = load_data(settings(data_source="ultrachat"))
    source = ULTRACHAT_IDENTITY.partition(":")[0]
    for hit in (False, True):
        named = load_data(settings(data_source=source, data_split="train_sft"))
        assert named.cache_hit == hit and named.fingerprint == first.fingerprint
    assert named.source == "HuggingFaceH4_ultrachat_200k"


def test_cached_hub_data_is_had_without_the_hub(publish, answers, asked, settings):
    """By its full commit nothing is asked; by another revision the hub tells the commit and nothing is opened."""
    opened = publish(train=rows("train"), test=rows("test"))
    first = load_data(settings(data_source="me/talk"))
    second = load_data(settings(data_source="me/talk"))
    assert second.cache_hit and len(opened) == 1 and second.notes[:-1] == first.notes
    asked.clear()
    answers[:] = [ConnectError("[Errno -2] Name or service not known")]
    third = load_data(settings(data_source=f"me/talk@{COMMIT}"))
    assert third.cache_hit and third.fingerprint == first.fingerprint and third.notes[:-1] == first.notes
    assert asked == []
    text = message_of(load_data, settings(data_source="me/talk"))
    assert "no internet connection" in text and text.endswith(
        "or me/talk@COMMIT as a run named it that cached its data."
    )


def test_a_prepared_hub_dataset_needs_no_network(tmp_path, asked):
    """As `datasets` keeps it: names in snake case, splits in several files; another commit or subset is not taken."""
    folder = tmp_path / "hub" / "me___my_talk" / "en" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    files = {"train-00000-of-00002": range(2), "train-00001-of-00002": range(2, 4), "test": range(2)}
    for name, numbers in files.items():
        table = datasets.Dataset.from_list([dialogue(f"{name.split('-')[0]} {number}") for number in numbers])
        with datasets.arrow_writer.ArrowWriter(path=str(folder / f"my_talk-{name}.arrow")) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    corpus = open_corpus(f"me/MyTalk:en@{COMMIT}")
    assert list(corpus.train()) == texts("train", range(4)) and list(corpus.held_out()) == texts(
        "test", range(2)
    )
    assert asked == []
    for other in (f"me/MyTalk@{COMMIT}", "me/MyTalk:en@" + "1" * 40):
        assert "cannot be had from the Hugging Face hub" in message_of(open_corpus, other)


def test_columns_of_hub_rows(publish):
    """A pair by name or by choice; a row without them is named with its columns."""
    publish(
        train=Rows([dict(question="why?", answer="so", essay=["one", "two"])] * 2), test=Rows([dict(a=1)])
    )
    assert next(open_corpus("me/talk").train()) == "User: why?\nAssistant: so"
    assert next(open_corpus("me/talk", "", "answer, question").train()) == "User: so\nAssistant: why?"
    assert next(open_corpus("me/talk", "", "essay").train()) == "User: one\nAssistant: two"
    assert next(open_corpus("me/talk", "", "answer").train()) == "so"
    text = message_of(next, open_corpus("me/talk", "", "story").train())
    assert text.startswith("me/talk train row 1 has no column 'story'")
    assert text.endswith("its columns are: question, answer, essay.")
    assert "me/talk test row 1 has neither messages" in message_of(next, open_corpus("me/talk").held_out())


def test_an_unknown_split_lists_those_there_are(publish):
    publish(train_sft=rows("a"), train_gen=rows("b"))
    expected = "has no split '{}' but train_sft, train_gen: name one as --data_split."
    assert message_of(open_corpus, "me/talk") == "me/talk " + expected.format("train")
    assert message_of(open_corpus, "me/talk", "test") == "me/talk " + expected.format("test")


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
        datasets, "load_dataset", lambda path, name, **kwargs: load_dataset(str(tmp_path), name)
    )
    text = message_of(open_corpus, f"me/talk{subset}")
    assert text == "me/talk has the subsets 'en', 'fr': name one of them as me/talk:SUBSET."


@pytest.mark.parametrize(
    "answer, reason",
    [
        (ConnectError("[Errno -2] Name or service not known"), "no internet connection"),
        (HTTPError(503), "HTTP 503"),
        (
            type("RepositoryNotFoundError", (HTTPError,), {})(401),
            "it has none of this name, or a private one",
        ),
        (type("RevisionNotFoundError", (HTTPError,), {})(404), "it has no such revision"),
    ],
)
def test_a_hub_that_does_not_give_it_is_one_sentence(answers, answer, reason):
    answers[:] = [answer]
    for source in ("me/talk", f"me/talk@{COMMIT}"):
        text = message_of(open_corpus, source)
        assert (
            f"'{source}' is no file or folder here and cannot be had from the Hugging Face hub ({reason}"
            in text
        )


def test_a_gated_dataset_says_how_to_enter(publish, monkeypatch):
    """The hub describes it to anyone and refuses the files, which `datasets` calls not found."""
    publish(train=rows("train"))

    def refused(*args, **kwargs):
        gate = type("RepositoryNotFoundError", (HTTPError,), {})
        raise FileNotFoundError("Dataset 'me/talk' is a gated dataset") from type(
            "GatedRepoError", (gate,), {}
        )(403)

    monkeypatch.setattr(datasets, "load_dataset", refused)
    assert "(it is gated: accept its terms on its page there and log in" in message_of(open_corpus, "me/talk")


def test_a_hub_stream_that_stays_broken_is_an_error(publish):
    publish(train=Rows(rows("train").rows, {17: [ReadTimeout("x")] * 9}))
    assert "reading me/talk train broke off after 17 dialogues (time-out)" in message_of(
        list, open_corpus("me/talk").train()
    )


# Choices that a source does not have


@pytest.mark.parametrize("source", ["auto", "ultrachat", "chitchat"])
def test_a_named_source_has_no_choice_of_split_or_column(source, asked, settings):
    """Said before a cache is looked into or the hub is asked."""
    for choice in (dict(data_split="train"), dict(data_column="text")):
        text = message_of(load_data, settings(data_source=source, **choice))
        assert text.startswith(f"data_source '{source}' has no choice of split or column") and asked == []


def test_files_have_no_splits_and_plain_text_no_columns(write_jsonl, tmp_path):
    path = write_jsonl([{"text": "a"}])
    assert f"{path} has no splits: leave out data_split." == message_of(open_corpus, str(path), "train")
    (tmp_path / "a.txt").write_text("a")
    assert "a.txt has no columns: leave out data_column." in message_of(
        open_corpus, str(tmp_path), "", "text"
    )


@pytest.mark.parametrize("column", ["a,b,c", ",b", "a,", " "])
def test_a_choice_of_columns_is_one_or_two_names(write_jsonl, column):
    assert "one name or two with a comma" in message_of(
        open_corpus, str(write_jsonl([{"a": "x"}])), "", column
    )
