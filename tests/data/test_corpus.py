"""Sources of dialogues: files, the embedded corpus, UltraChat, and a hub that fails in every known way."""

import gzip
import hashlib
import json
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
from hub_fakes import ConnectError, HTTPError, ReadTimeout, dialogue

from newllm.data import corpus, hub
from newllm.data.corpus import ULTRACHAT, ULTRACHAT_REVISION, open_corpus
from newllm.data.files import render
from newllm.errors import UserError


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def read(source):
    return list(open_corpus(str(source)).train())


# Rendering


def test_messages_become_lines_with_roles():
    """Role capitalized, content stripped, messages without content left out."""
    row = {
        "messages": [
            dict(role="user", content=" hi "),
            dict(role="assistant", content=""),
            dict(role="user", content="a\nb"),
        ]
    }
    assert render(row, "row 1") == "User: hi\nUser: a\nb"


def test_data_alternates_between_user_and_assistant():
    assert render({"id": 1, "data": ["one", "two", "three"]}, "row 1") == "User: one\nAssistant: two\nUser: three"


def test_text_is_taken_as_it_is():
    assert render({"text": "just this\n"}, "row 1") == "just this"


@pytest.mark.parametrize(
    "row, column, text",
    [
        (
            {"conversations": [{"from": "human", "value": " a "}, {"from": "gpt", "value": "b"}]},
            "",
            "User: a\nAssistant: b",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}, {"from": "Human", "value": "b"}]},
            "",
            "System: a\nUser: b",
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, "", "User: a"),
        ({"messages": [{"role": "assistant", "content": None}, {"role": "tool", "content": "a"}]}, "", "Tool: a"),
        ({"messages": [{"role": "human", "content": "a"}]}, "", "Human: a"),
        ({"prompt": "a", "response": "b", "n": 1}, "", "User: a\nAssistant: b"),
        ({"prompt": "a", "completion": "b", "response": None}, "", "User: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "", "User: a\nb\nAssistant: c"),
        ({"instruction": "a", "input": "", "output": "c"}, "", "User: a\nAssistant: c"),
        ({"question": "a", "answer": "b"}, "", "User: a\nAssistant: b"),
        ({"messages": None, "text": "a", "prompt": "b", "response": "c"}, "", "a"),
        ({"text": "a", "story": "b"}, "story", "b"),
        ({"text": "a", "story": ["b", "c"]}, "story", "User: b\nAssistant: c"),
        ({"talk": [{"from": "gpt", "value": "a"}]}, "talk", "Assistant: a"),
        ({"talk": [{"role": "user", "content": "a"}]}, "talk", "User: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction,output", "User: a\nAssistant: c"),
        ({"a": "x", "b": None}, "a, b", "User: x"),
        ({"a": None}, "a", ""),
    ],
)
def test_shapes_of_dialogues(row, column, text):
    """ShareGPT turns, pairs, and any of these in a chosen column; what was read before them is preferred as before."""
    assert render(row, "row 1", column) == text


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "is a list, not an object"),
        ({"prompt": "x", "n": 1}, "its keys are: prompt, n."),
        (
            {"messages": [{"speaker": "a", "value": "b"}]},
            "does not have a list of texts or of objects with role and content or from and value in messages",
        ),
        ({"messages": "hi"}, "does not have a list"),
        ({"messages": 3}, "does not have a list"),
        ({"data": ["a", 3]}, "does not have a list of texts"),
        ({"data": "hi"}, "does not have a list of texts"),
        ({"text": 3}, "does not have a text in text"),
        ({"prompt": "a", "response": 3}, "does not have texts in prompt and response"),
        ({"instruction": "a", "input": 3, "output": "b"}, "does not have texts in instruction and output"),
        ({"text": "\ud83d"}, "lone surrogate"),
    ],
)
def test_malformed_row_is_named(row, words):
    """The sentence says where and what."""
    text = message_of(render, row, "talk.jsonl line 7")
    assert text.startswith("talk.jsonl line 7 ") and words in text


# Files


def test_jsonl_streams_run_from_both_ends(write_jsonl):
    """One list: training from the front, held-out from the back, each call anew."""
    source = open_corpus(str(write_jsonl([{"text": f"t{n}"} for n in range(4)])))
    assert (source.name, source.size) == ("talk", 4)
    for _ in range(2):
        assert list(source.train()) == ["t0", "t1", "t2", "t3"]
        assert list(source.held_out()) == ["t3", "t2", "t1", "t0"]


def test_every_format_gives_the_same_dialogues(tmp_path, write_jsonl):
    """.jsonl, .jsonl.gz, .parquet and .txt, with a byte order mark and CRLF where they occur."""
    rows = [dialogue("one \xe9"), dialogue("two")]
    texts = [render(row, "") for row in rows]
    plain = write_jsonl(rows)
    packed = tmp_path / "talk.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n")))
    table = tmp_path / "talk.parquet"
    datasets.Dataset.from_list([row | {"other": 1} for row in rows]).to_parquet(str(table))
    blank = tmp_path / "talk.txt"
    blank.write_bytes("\n \n\n".join(texts).replace("\n", "\r\n").encode())
    for path in (plain, packed, table, blank):
        assert read(path) == texts
        assert open_corpus(str(path)).name == "talk"


ODD = [
    dict(prompt='a "q",\n\tand', response="NA"),
    dict(prompt="007", response=""),
    dict(prompt="caf\xe9", response="1.50"),
]


@pytest.mark.parametrize("name", ["talk.csv", "talk.tsv", "talk.json", "talk [1].arrow"])
def test_tables_give_what_was_written(tmp_path, name):
    """Quotes, line ends, and texts that look like numbers or like nothing, as `datasets` writes them."""
    path, rows = tmp_path / name, datasets.Dataset.from_list(ODD)
    if name.endswith(".arrow"):
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ODD))
    else:
        rows.to_csv(str(path), sep="\t" if name.endswith(".tsv") else ",")
    assert read(path) == [render(row, "") for row in ODD]
    assert list(open_corpus(str(path), "", "response").train()) == ["NA", "1.50"]
    assert "row 1 has no column 'x' for --data_column; its columns are: prompt, response." in message_of(
        open_corpus(str(path), "", "x").train
    )


def test_json_is_an_array_an_object_with_data_or_lines(tmp_path):
    rows = [dialogue("one"), dialogue("two")]
    for text in (json.dumps(rows, indent=1), json.dumps({"data": rows}), "\n".join(map(json.dumps, rows))):
        (tmp_path / "a.json").write_text(text)
        assert read(tmp_path / "a.json") == [render(row, "") for row in rows]


def test_columns_of_parquet(tmp_path):
    """Only the columns in need are read; of an unknown one all are listed."""
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"n": 1, "a": "x", "b": "y", "text": "z"}]).to_parquet(str(path))
    assert list(open_corpus(str(path), "", "a,b").train()) == ["User: x\nAssistant: y"] and read(path) == ["z"]
    assert "no column 'c' for --data_column; its columns are: n, a, b, text." in message_of(
        open_corpus(str(path), "", "a,c").train
    )


def test_tables_beside_other_files_describe_them(tmp_path, write_jsonl):
    """A folder keeps its content and identity when a .json or .csv is put beside its data; alone these are data."""
    path = write_jsonl([{"text": "talk"}])
    identity = open_corpus(str(tmp_path)).identity
    (tmp_path / "info.json").write_text(json.dumps([{"text": "no talk"}]))
    (tmp_path / "index.csv").write_text("text\nno talk\n")
    assert read(tmp_path) == ["talk"] and open_corpus(str(tmp_path)).identity == identity
    path.unlink()
    assert read(tmp_path) == ["no talk", "no talk"]


def test_folder_is_its_files_in_order_of_name(tmp_path, write_jsonl):
    write_jsonl([{"text": "second"}], "b.jsonl")
    write_jsonl([{"text": "first"}], "a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".c.jsonl").write_text("broken")
    assert read(tmp_path) == ["first", "second"]


def test_opening_does_not_parse(tmp_path):
    """A cached data set must not cost reading the corpus: malformed content shows only when it is read."""
    path = tmp_path / "talk.jsonl"
    path.write_text("no json\n")
    source = open_corpus(str(path))
    assert "is not valid JSON" in message_of(source.train)


def test_identity_is_the_content(tmp_path, write_jsonl):
    """Another name keeps it, another byte or column changes it."""
    first = open_corpus(str(write_jsonl([{"text": "a"}], "a.jsonl")))
    same = open_corpus(str(write_jsonl([{"text": "a"}], "b.jsonl")))
    other = open_corpus(str(write_jsonl([{"text": "b"}], "c.jsonl")))
    assert first.identity == same.identity != other.identity
    assert first.identity == f"sha256:{hashlib.sha256((tmp_path / 'a.jsonl').read_bytes()).hexdigest()}"
    assert open_corpus(str(tmp_path / "a.jsonl"), "", "text").identity != first.identity


def test_name_is_fit_for_a_file(write_jsonl):
    assert open_corpus(str(write_jsonl([{"text": "a"}], "my talk (1).jsonl"))).name == "my_talk_1"


def test_file_cannot_pass_for_ultrachat(write_jsonl):
    """The name stands in every result."""
    assert open_corpus(str(write_jsonl([{"text": "a"}], "ultrachat.jsonl"))).name == "ultrachat-file"


def test_empty_dialogues_are_dropped_and_counted(write_jsonl):
    source = open_corpus(str(write_jsonl([{"text": "a"}, {"text": " "}, {"data": []}])))
    assert source.size == 1 and source.remarks == ["data: 2 empty dialogues of talk left out"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"words": "x"}\n', "a.jsonl line 2 has neither messages"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not UTF-8"),
        ("a.jsonl", b"\n\n", "a holds no dialogues"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.parquet", b"no parquet", "a.parquet is no readable parquet file"),
        ("a.csv", b"text\n", "a holds no dialogues"),
        ("a.csv", b"text\nx\ny,z\n", "a.csv line 3 is no row (not 1 fields as in its head)"),
        ("a.csv", b'text\n"x\n', "a.csv line 2 is no row (unexpected end of data)"),
        ("a.csv", b"words\nx\n", "a.csv row 1 has neither messages"),
        ("a.json", b'[{"text": "x"},\n{"text": }]', "a.json is not valid JSON"),
        ("a.json", b'{"text": "x"}\n{"words": "x"}\n', "a.json line 2 has neither messages"),
        ("a.json", b'["x"]', "a.json row 1 is a str, not an object"),
        ("a.arrow", b"no arrow", "a.arrow is no readable arrow file"),
        ("a.doc", b"a,b", "a.doc is no data"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, content, words):
    """Which file, which line, what is wrong."""
    (tmp_path / name).write_bytes(content)
    assert words in message_of(read, tmp_path / name)


def test_parquet_without_dialogues_names_row_and_columns(tmp_path):
    datasets.Dataset.from_list([{"prompt": "x"}]).to_parquet(str(tmp_path / "a.parquet"))
    text = message_of(read, tmp_path / "a.parquet")
    assert "a.parquet row 1 has neither" in text and "prompt" in text


def test_folder_without_data_is_refused(tmp_path):
    assert "is no data" in message_of(open_corpus, str(tmp_path))


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


# Retries


def test_retry_backs_off_and_succeeds():
    """Two 429, then the value; the wait doubles."""
    errors, slept = [HTTPError(429), HTTPError(429)], []

    def function():
        if errors:
            raise errors.pop()
        return "value"

    assert hub.retry(function, sleep=slept.append) == "value" and slept == [1.0, 2.0]


@pytest.mark.parametrize(
    "error, tries",
    [
        (HTTPError(429), 4),
        (HTTPError(503), 4),
        (TimeoutError("read"), 4),
        (ReadTimeout("read"), 4),
        (ConnectionResetError("peer"), 4),
        (FileNotFoundError("429 Client Error: Too Many Requests for url"), 4),
        (HTTPError(404), 1),
        (FileNotFoundError("no such file"), 1),
        (ConnectError("[Errno -2] Name or service not known"), 1),
        (ConnectionError("Couldn't reach the hub"), 1),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), 1),
        (type("ConnectTimeout", (ReadTimeout,), {})("no route"), 1),
    ],
)
def test_only_transient_errors_are_tried_again(error, tries):
    """429 in whatever guise, 5xx, time-outs and broken connections; no route and offline mode are final."""
    calls = []

    def function():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        hub.retry(function, sleep=lambda seconds: None)
    assert len(calls) == tries


def test_the_cause_of_an_error_counts():
    """The hub libraries wrap what happened."""
    error = FileNotFoundError("the data set does not exist")
    error.__cause__ = HTTPError(429)
    assert hub.is_transient(error) and hub.describe(error) == "HTTP 429, too many requests"


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
        (ConnectError("[Errno -2] Name or service not known"), "no internet connection: name lookup failed", 0),
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
    online["train_sft"].breaks = {0: [ReadTimeout("x")], 17: [ReadTimeout("x"), HTTPError(503)], 18: [TimeoutError()]}
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
    assert "UltraChat train_sft row 4 has neither messages" in text and "its keys are: conversation, id." in text


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
        "import json, sys, newllm.data.dataset;"
        "print(json.dumps([name for name in ('datasets', 'transformers', 'tokenizers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
