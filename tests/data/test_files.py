"""Dialogues out of files of every format, and one sentence about a file that holds none."""

import gzip
import hashlib
import json

import datasets
import pytest
from checks import message_of
from hub_fakes import dialogue

from newllm.data.dialogues import open_corpus
from newllm.data.files import render


def read(source):
    return list(open_corpus(str(source)).train())


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
    packed.write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"), mtime=0)
    )
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
    assert list(open_corpus(str(path), "", "a,b").train()) == ["User: x\nAssistant: y"] and read(path) == [
        "z"
    ]
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
    """Of which there are many, it is a warning; of all, an error that says so."""
    good = [{"text": letter} for letter in "abcd"]
    source = open_corpus(str(write_jsonl([{"text": " "}, *good, {"data": []}, {"text": None}])))
    said = "data: 3 empty dialogues of talk left out, of 7: no text in them, or null"
    assert source.size == 4 and source.remarks == [said]
    source = open_corpus(str(write_jsonl([{"text": "a"}, {"messages": None}])))
    assert source.remarks == [
        "warning: data: 1 empty dialogues of talk left out, of 2: no text in them, or null"
    ]
    source = open_corpus(str(write_jsonl([{"text": None}] * 3)))
    assert "talk holds no dialogues: all 3 are empty" in message_of(lambda: source.size)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, write_jsonl):
    write_jsonl([{"text": "a"}])
    (tmp_path / "notes.csv").write_text("text\nb\n")
    assert open_corpus(str(tmp_path)).remarks == [f"data: of {tmp_path} not read: notes.csv"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"words": "x"}\n', "a.jsonl line 2 has neither messages"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not UTF-8"),
        ("a.jsonl", b"\n\n", "a holds no dialogues"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz cannot be unpacked"),
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
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": ["x", "y"]}\n',
            "a.jsonl line 2 does not have a text in text (found: list)",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"[" * 100_000 + b"]" * 100_000,
            "a.jsonl line 2 is nested too deeply",
        ),
        ("a.jsonl", b'{"text": ' + b'{"a":' * 100_000, "a.jsonl line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": NaN}', "a.jsonl line 1 does not have a text in text (found: float)"),
        (
            "a.jsonl",
            b'{"text": "x", "text": "y"}',
            "a.jsonl line 1 is not valid JSON (an object has a key twice)",
        ),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "a.json is nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a.json is not valid JSON"),
        ("a.csv", b"text,text\nx,y\n", "a.csv line 1 is no row (two columns of one name)"),
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
