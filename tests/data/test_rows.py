"""Rows of every shape in files of every format become texts; a malformed one is named by file and row."""

import gzip
import json

import datasets
import pytest
from fakes import dialogue, message_of

from newllm.data.dialogues import open_corpus
from newllm.data.rows import render


def read(source, column=""):
    return list(open_corpus(str(source), "", column).train())


def said(role, text):
    return {"role": role, "content": text}


def turn(speaker, text):
    return {"from": speaker, "value": text}


@pytest.mark.parametrize(
    "row, column, text",
    [
        ({"messages": [said("user", " hi "), said("x", ""), said("user", "a\n")]}, "", "User: hi\nUser: a"),
        ({"id": 1, "data": ["one", "two", "three"]}, "", "User: one\nAssistant: two\nUser: three"),
        ({"text": "just this\n"}, "", "just this"),
        ({"conversations": [turn("human", " a "), turn("gpt", "b")]}, "", "User: a\nAssistant: b"),
        ({"conversations": [turn("system", "a"), turn("Human", "b")]}, "", "System: a\nUser: b"),
        ({"messages": [{"role": "user"}, said("assistant", None), said("tool", "a")]}, "", "Tool: a"),
        ({"messages": [said(None, None) | turn("gpt", "a")]}, "", "Assistant: a"),
        ({"prompt": "a", "response": "b", "n": 1}, "", "User: a\nAssistant: b"),
        ({"prompt": "a", "completion": "b", "response": None}, "", "User: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "", "User: a\nb\nAssistant: c"),
        ({"instruction": None, "input": " b ", "output": "c"}, "", "User: b\nAssistant: c"),
        ({"messages": None, "text": "a", "prompt": "b", "response": "c"}, "", "a"),
        ({"text": "a", "story": ["b", "c"]}, "story", "User: b\nAssistant: c"),
        ({"talk": [turn("gpt", "a")]}, "talk", "Assistant: a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction,output", "User: a\nAssistant: c"),
        ({"a": "x", "b": None}, "a, b", "User: x"),
        *((row, "", "") for row in ({"text": None}, {"text": ""}, {"messages": None}, {"messages": []})),
        ({"prompt": None, "response": None}, "", ""),
    ],
)
def test_shapes_of_dialogues(row, column, text):
    """Messages, texts in turn, ShareGPT turns, pairs, and any of these in a chosen column; null is empty."""
    assert render(row, "row 1", column) == text


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "one or two of its keys: none."),
        ({"prompt": "x", "n": 1}, "one or two of its keys: prompt, n."),
        ({"messages": [{"speaker": "a", "value": "b"}]}, "objects with role and content or from and value"),
        ({"text": "\ud83d"}, "in text (found: str): a text of valid Unicode"),
        *(
            ({"text": value}, "in text (found: ")
            for value in (0, False, 1.5, {}, {"a": 1}, [], ["a"], [["a"]])
        ),
        *(({"messages": value}, "in messages (found") for value in (0, 3, False, {}, {"a": 1})),
        *(({"data": value}, "in data (found: list)") for value in (["a", 3], [None], [["a"]], [{}], [True])),
        *(
            ({"messages": [said("user", value)]}, "in messages (found: list)")
            for value in (0, False, ["a"], {}, [{"type": "text", "text": "a"}])
        ),
        ({"messages": [said(" ", "a")]}, "in messages (found: list)"),
        *(({"prompt": value, "response": "b"}, "in prompt and response") for value in ({}, ["a"], 0)),
        *(({"instruction": "", "input": value, "output": ""}, "in instruction") for value in (0, [], {})),
    ],
)
def test_malformed_row_is_named(row, words):
    """The sentence says where and what."""
    text = message_of(render, row, "talk.jsonl line 7")
    assert text.startswith("talk.jsonl line 7 has no ") and words in text


def test_text_files_give_the_same_dialogues(tmp_path, write_jsonl):
    """.jsonl, .jsonl.gz, .json as an array or as lines, and .txt; with a byte order mark and CRLF."""
    rows = [dialogue("one \xe9"), dialogue("two")]
    texts = [render(row, "") for row in rows]
    files = [write_jsonl(rows)]
    lines = files[0].read_bytes()
    packed = gzip.compress(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"), mtime=0)
    blocks = "\n \n\n".join(texts).replace("\n", "\r\n").encode()
    contents = {"talk.jsonl.gz": packed, "talk.txt": blocks, "talk.json": json.dumps(rows, indent=1).encode()}
    for name, content in (contents | {"more/talk.json": lines}).items():
        files.append(tmp_path / name)
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_bytes(content)
    for path in files:
        assert read(path) == texts and open_corpus(str(path)).name == "talk"


ODD = [
    dict(prompt='a "q",\n\tand', response="NA"),
    dict(prompt="007", response=""),
    dict(prompt="caf\xe9 2020-01-01 10:00:00", response="1.50"),
    dict(prompt="x" * 300_000, response="y"),
]


@pytest.mark.parametrize("name", ["talk.csv", "talk.tsv", "talk.json", "talk [1].arrow", "talk.parquet"])
def test_tables_give_what_was_written(tmp_path, name):
    """Quotes, line ends, long fields, and texts that look like numbers, times or nothing."""
    path, rows = tmp_path / name, datasets.Dataset.from_list(ODD)
    if path.suffix == ".arrow":
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ODD))
    elif path.suffix == ".parquet":
        rows.to_parquet(str(path))
    else:
        rows.to_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",")
    assert read(path) == [render(row, "") for row in ODD] and read(path, "response") == ["NA", "1.50", "y"]
    text = message_of(read, path, "response,x")
    assert f"{path} row 1 has no response,x" in text and "its keys: prompt, response." in text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": null}\n' * 3, "a holds no dialogues"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 cannot be read as JSON ("),
        ("a.jsonl", b'{"text": "x"}\n\n{"words": "x"}\n', "a.jsonl line 3 has no messages"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl line 2 cannot be read as UTF-8 text"),
        ("a.txt", "caf\xe9".encode("cp1252"), "a.txt line 1 cannot be read as UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz line 1 cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz line"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read as parquet ("),
        ("a.arrow", b"no arrow", "a.arrow cannot be read as arrow ("),
        ("a.csv", b"text\nx\ny,z\n", "a.csv line 3 cannot be read as a row (not 1 fields as in its head"),
        ("a.csv", b"text,n\nx\n", "a.csv line 2 cannot be read as a row (not 2 fields as in its head"),
        (
            "a.csv",
            b"text,text\nx,y\n",
            "a.csv line 2 cannot be read as a row (not 2 fields as in its head, or",
        ),
        ("a.csv", b'text\n"x\n', "a.csv line 2 cannot be read as a row (unexpected end of data)"),
        ("a.json", b'[{"text": "x"},\n{"text": }]', "a.json cannot be read as JSON"),
        ("a.json", b'["x"]', "a.json row 1 has no messages"),
        ("a.jsonl", b'{"text": ' + b'{"a":' * 100_000, "a.jsonl line 1 cannot be read as JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl line 1 cannot be read as JSON"),
        ("a.jsonl", b'{"text": NaN}', "a.jsonl line 1 has no dialogue in text (found: float)"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', "cannot be read as JSON (an object has a key twice)"),
        ("a.doc", b"a,b", "a.doc is no data"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, content, words):
    """Which file, which line, what is wrong."""
    (tmp_path / name).write_bytes(content)
    assert words in message_of(read, tmp_path / name)
