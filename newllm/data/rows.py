"""Rows of data files of any kind, and the one rendering of a row as a text.

Text files are parsed here: pandas and `datasets` guess types, so that "007" becomes a number and "2020-01-01"
a time, drop one of two equal keys, fill up short rows, and name no line.
"""

import csv
import glob
import gzip
import json
import re
import zlib

from newllm.data import hub
from newllm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
TABLES = (".csv", ".tsv", ".json", ".arrow")  # in a folder only without the above, which they may describe
COLUMNS = (  # where a row may hold its dialogue, in order of preference
    *("messages", "data", "text", "conversations"),
    *("prompt,response", "prompt,completion", "instruction,output", "question,answer"),
)
SHAREGPT = {"human": "User", "gpt": "Assistant"}


def render(row, where, column=""):
    """A row as text: "User: ...\\nAssistant: ...", without empty messages; "" for an empty dialogue.

    Null is an empty text or an empty list. A number, an object, or a list where a text belongs is an error.

    Args:
        row: dict with one of COLUMNS: a text, a list of texts (user first), of {role, content} or of {from,
            value}, or a pair of texts; an `instruction` may have an `input`.
        column: the name or names to take instead. where: the row's place, for error messages.

    Raises:
        UserError: none of these, or of another type, or text that is no valid Unicode.
    """
    keys = list(row) if isinstance(row, dict) else []
    wanted = [[name.strip() for name in names.split(",")] for names in ([column] if column else COLUMNS)]
    there = [names for names in wanted if set(names) <= set(keys)]
    if not there:
        raise UserError(
            f"{where} has no {column or ' or '.join(COLUMNS)}: repair it, or name as data_column one or two "
            f"of its keys: {', '.join(map(str, keys)) or 'none'}."
        )
    # The first that hold something, else the first that are there: tables have every key in every row.
    names = next((names for names in there if any(row[name] is not None for name in names)), there[0])
    try:
        text = _dialogue(row, names, column)
        text.encode()
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        types = " and ".join(type(row[name]).__name__ for name in names)
        raise UserError(
            f"{where} has no dialogue in {' and '.join(names)} (found: {types}): a text of valid Unicode, a "
            "pair of texts, or a list of texts or of objects with role and content or from and value."
        ) from None
    return text


def _dialogue(row, names, column):
    """The text in these columns. What has other types raises errors of several kinds."""
    if len(names) > 1:
        turns = [_text(row[name]) for name in names]
        if names == ["instruction", "output"] and not column:
            turns[0] = f"{turns[0]}\n{_text(row.get('input'))}".strip()
    else:
        turns = row[names[0]]
    if not isinstance(turns, list):
        return _text(turns)
    if names == ["text"] and not column:
        raise TypeError
    said = [_turn(number, turn) for number, turn in enumerate(turns)]
    return "\n".join(f"{role}: {text}" for role, text in said if text)


def _turn(number, turn):
    """Role and content of a message, of a ShareGPT turn, or of the text with this number."""
    if isinstance(turn, str):
        return ("User", "Assistant")[number % 2], turn.strip()
    if turn.get("role") is not None:  # tables have every key in every row
        role, content = turn["role"].strip().capitalize(), turn.get("content")
    else:
        speaker, content = turn["from"].strip(), turn.get("value")
        role = SHAREGPT.get(speaker.lower(), speaker.capitalize())
    if not role:
        raise KeyError
    return role, _text(content)


def _text(value):
    """A text without the blanks around it; null is an empty one, and nothing else is a text."""
    if value is not None and not isinstance(value, str):
        raise TypeError
    return (value or "").strip()


# Files


def unreadable(place, kind, error):
    """UserError about a file, or a row of it, that is not of its kind."""
    return UserError(f"{place} cannot be read as {kind} ({hub.describe(error)}): repair it or leave it out.")


def read_rows(path):
    """Pairs of (place, row) of a data file of any kind.

    Raises:
        UserError: malformed content, with the line it is in where that is known.
    """
    kind = path.suffix[1:]
    if kind in ("jsonl", "gz"):
        return _json_lines(path)
    if kind in ("parquet", "arrow"):
        rows = _table_rows(path, kind)
    elif kind in ("csv", "tsv"):
        rows = _csv_rows(path, "\t" if kind == "tsv" else ",")
    else:
        whole = "\n".join(line for _, line in _lines(path))
        if kind == "txt":
            rows = [{"text": block} for block in re.split(r"\n\s*\n", whole) if block.strip()]
        elif whole.lstrip().startswith("["):
            rows = _parse(whole, path)
        else:
            return _json_lines(path)
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _json_lines(path):
    return ((place, _parse(line, place)) for place, line in _lines(path) if line.strip())


def _lines(path):
    """Pairs of (place, line) of a UTF-8 file, packed or not, with or without a byte order mark."""
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield f"{path} line {number}", text.rstrip("\r\n")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise unreadable(f"{path} line {number or 1}", "UTF-8 text", error) from error


def _table_rows(path, kind):
    import datasets

    file = glob.escape(str(path))
    try:
        stream = datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
        for table in stream.with_format("arrow").iter(batch_size=256):  # ten times as fast as row by row
            yield from table.to_pylist()
    except Exception as error:
        raise unreadable(path, kind, error) from error


def _csv_rows(path, delimiter):
    """Rows of strings."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((f"{line}\n" for _, line in _lines(path)), strict=True, delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values() or len(row) < len(reader.fieldnames):
                raise csv.Error(f"not {len(reader.fieldnames)} fields as in its head, or two of one name")
            yield row
    except csv.Error as error:
        raise unreadable(f"{path} line {reader.reader.line_num}", "a row", error) from None


def _parse(text, place):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise unreadable(place, "JSON", error) from error


def _object(pairs):
    """A JSON object. Of two values under one key the parser would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
