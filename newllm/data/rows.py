"""Rows of data files of any kind, and the one rendering of a row as a text.

Most files are read here: the readers of `datasets` make times of texts that look like times and null of keys
that a row lacks, read columns of parquet that nobody needs, and their messages name no file.
"""

import codecs
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
    ("messages",),
    ("data",),
    ("text",),
    ("conversations",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
SHAREGPT = {"human": "User", "gpt": "Assistant"}
BATCH = 256  # rows of a table in memory at once


def render(row, where, column=""):
    """A row as text: "User: ...\\nAssistant: ...", without empty messages; "" for an empty dialogue.

    Null is an empty text or an empty list. A number, an object, or a list where a text belongs is an error.

    Args:
        row: dict with `messages` or `conversations` ([{role, content}] or [{from, value}]), `data` (strings,
            user first), `text` (taken as it is), or a pair such as `prompt` and `response`; an `instruction`
            may have an `input`.
        where: the row's place, for error messages.
        column: instead of these names, the one that holds a text or a list as above, or two with a comma.

    Raises:
        UserError: none of these, or of another type, or text that is no valid Unicode.
    """
    wanted = [_names_in(column)] if column else COLUMNS
    keys = list(row) if isinstance(row, dict) else []
    there = [names for names in wanted if all(name in keys for name in names)]
    if not there:
        missing = column or "messages, data, text, conversations or pair such as prompt and response"
        raise UserError(
            f"{where} has no {missing}: repair it, or name as data_column one or two of its keys: "
            f"{', '.join(map(str, keys)) or 'none'}."
        )
    # The first that hold something, else the first that are there: tables have every key in every row.
    names = next((names for names in there if any(row[name] is not None for name in names)), there[0])
    try:
        text = _dialogue(row, names, bool(column))
        text.encode()
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        types = " and ".join(type(row[name]).__name__ for name in names)
        raise UserError(
            f"{where} has no dialogue in {' and '.join(names)} (found: {types}): a text of valid Unicode, a "
            "pair of texts, or a list of texts or of objects with role and content or from and value."
        ) from None
    return text


def _names_in(column):
    return tuple(name.strip() for name in column.split(","))


def _dialogue(row, names, chosen):
    """The text in these columns; a chosen one may hold a text or a list. Other types raise several errors."""
    values = [row[name] for name in names]
    if len(names) > 1:
        question, answer = map(_text, values)
        if names == ("instruction", "output") and not chosen:
            question = f"{question}\n{_text(row.get('input'))}".strip()
        turns = [("User", question), ("Assistant", answer)]
    elif isinstance(values[0], list) and (chosen or names != ("text",)):
        turns = [_turn(number, turn) for number, turn in enumerate(values[0])]
    elif values[0] is None or chosen or names == ("text",):
        return _text(values[0])
    else:
        raise TypeError
    return "\n".join(f"{role}: {said}" for role, said in turns if said)


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


def read_rows(path, column=""):
    """Pairs of (place, row) of a data file of any kind, with at least the columns that `render` needs.

    Raises:
        UserError: malformed content, with the line it is in where that is known.
    """
    if path.suffix in (".parquet", ".arrow"):
        rows = _table_rows(path, column)
    elif path.suffix in (".csv", ".tsv"):
        rows = _csv_rows(path)
    elif path.suffix == ".txt":
        blocks = re.split(r"\n\s*\n", "\n".join(line for _, line in _lines(path)))
        rows = [{"text": block} for block in blocks if block.strip()]
    elif path.suffix == ".json" and (array := _json_array(path)) is not None:
        rows = array
    else:
        for place, line in _lines(path):
            if line.strip():
                yield place, _parse(line, place)
        return
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _lines(path):
    """Pairs of (place, line) of a UTF-8 file, packed or not, with or without a byte order mark."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in file:
                number += 1
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
                yield f"{path} line {number}", text.rstrip("\r\n")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text in line {number} ({error}); convert it or fetch it again."
        ) from error


def _table_rows(path, column):
    kind = path.suffix[1:]
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, _names_in(column) if column else ())
        else:
            import datasets

            file = glob.escape(str(path))
            yield from datasets.load_dataset("arrow", data_files=file, split="train", streaming=True)
    except Exception as error:
        why = hub.describe(error)
        raise UserError(f"{path} is no readable {kind} file ({why}); write it again.") from error


def _parquet_rows(path, chosen):
    """Rows with the columns in need, or with all, to be listed, if these are not there."""
    import pyarrow.parquet

    wanted = chosen or {name for names in COLUMNS for name in (*names, "input")}
    with pyarrow.parquet.ParquetFile(path) as file:
        there = [name for name in file.schema_arrow.names if name in wanted]
        needed = there if there and set(chosen) <= set(there) else None
        for batch in file.iter_batches(BATCH, columns=needed):
            yield from batch.to_pylist()


def _csv_rows(path):
    """Rows of strings. A reader that guesses types makes numbers of the texts "007" and nothing of "NA"."""
    csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    lines = (f"{line}\n" for _, line in _lines(path))
    reader = csv.DictReader(lines, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        names = reader.fieldnames or []
        for row in reader:
            if None in row or None in row.values() or len(set(names)) < len(names):
                raise csv.Error(f"not {len(names)} fields as in its head, or two of one name")
            yield row
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"{path} line {line} is no row ({error}); repair or remove it.") from None


def _json_array(path):
    """Rows of an array, or of the array `data` of an object; None for a file of JSON lines."""
    try:
        found = _parse("\n".join(line for _, line in _lines(path)), path)
    except UserError as error:
        if getattr(error.__cause__, "msg", "") == "Extra data":
            return None
        raise
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        return found["data"]
    return found if isinstance(found, list) else [found]


def _parse(text, where):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); repair or remove it.") from error


def _object(pairs):
    """A JSON object. Of two values under one key the parser would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
