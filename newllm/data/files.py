"""Dialogues out of data files (lines, JSON, tables, plain text), and the one rendering of a dialogue as text."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from dataclasses import dataclass
from itertools import chain

from newllm.errors import UserError
from newllm.saving.stop import poll

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
TABLES = (
    ".csv",
    ".tsv",
    ".json",
    ".arrow",
)  # in a folder only without any of the above, beside which they describe
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
BLOCK = 1 << 20
BATCH = 256  # rows of a table in memory at once


def render(row, where, column=""):
    """A row as text: "User: ...\\nAssistant: ...", messages without content left out; "" for an empty dialogue.

    Null is an empty text or an empty list. A number, an object, or a list where a text belongs is an error.

    Args:
        row: dict with `messages` or `conversations` ([{role, content}] or [{from, value}]), `data` (strings, user
            first), `text` (taken as it is), or a pair such as `prompt` and `response`; `input` belongs to `instruction`.
        where: the row's place, for error messages.
        column: instead of these names, the one that holds a text or a list as above, or two with a comma.

    Raises:
        UserError: none of these, or of another type, or text that is no valid Unicode.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is a {type(row).__name__}, not an object with messages, data or text; repair or remove it."
        )
    names = _names_of(row, where, column)
    values = [row[name] for name in names]
    value = values[0]
    try:
        if len(names) > 1:
            turns = zip(("User", "Assistant"), map(_text, values), strict=True)
            if not column and names == ("instruction", "output") and (more := _text(row.get("input"))):
                turns = [("User", f"{_text(value)}\n{more}".strip()), ("Assistant", _text(values[1]))]
        elif isinstance(value, list) and (column or names != ("text",)):
            turns = [_turn(number, turn) for number, turn in enumerate(value)]
        elif value is None or column or names == ("text",):
            turns = None
        else:
            raise TypeError
        text = _text(value) if turns is None else "\n".join(f"{role}: {said}" for role, said in turns if said)
    except (TypeError, KeyError, AttributeError):
        shape = "a list of texts or of objects with role and content or from and value"
        shape = "texts" if len(names) > 1 else "a text" if names == ("text",) else shape
        found = " and ".join(type(value).__name__ for value in values)
        raise UserError(
            f"{where} does not have {shape} in {' and '.join(names)} (found: {found}); repair or remove it."
        ) from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds a lone surrogate, which is no valid Unicode; repair or remove it."
        ) from None
    return text


def column_names(column):
    """The one or two names in the setting `data_column`, a tuple."""
    return tuple(name.strip() for name in column.split(","))


def _names_of(row, where, column):
    """The names in a row under which its dialogue is: the first that hold something, else the first that are there."""
    keys = ", ".join(map(str, row)) or "none"
    if column:
        names = column_names(column)
        if missing := [name for name in names if name not in row]:
            raise UserError(
                f"{where} has no column '{missing[0]}' for --data_column; its columns are: {keys}."
            )
        return names
    there = [names for names in COLUMNS if all(name in row for name in names)]
    if not there:
        raise UserError(
            f"{where} has neither messages, data, text, conversations nor a pair such as prompt and response, and "
            f"no --data_column says where its dialogue is; its keys are: {keys}."
        )
    return next((names for names in there if any(row[name] is not None for name in names)), there[0])


def _text(value):
    """A text without the blanks around it; null is an empty one, and nothing else is a text."""
    if value is not None and not isinstance(value, str):
        raise TypeError
    return (value or "").strip()


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


@dataclass
class Tally:
    """How many dialogues a reading has seen, and how many of them were empty and left out."""

    seen: int = 0
    empty: int = 0

    def keeps(self, text):
        """Count a text; whether it is a dialogue."""
        self.seen += 1
        self.empty += not text
        return bool(text)

    def remarks(self, name):
        """What to say about it: nothing, or a line, which warns if it is half of all."""
        if not self.empty:
            return []
        loud = "warning: " if 2 * self.empty >= self.seen else ""
        return [
            f"{loud}data: {self.empty:,} empty dialogues of {name} left out, of {self.seen:,}: no text in them, or null"
        ]


def digest(path):
    """SHA-256 (hex) of a data file's bytes.

    Raises:
        UserError: the file is empty or cannot be read.
    """
    result = hashlib.sha256()
    try:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; give a file with dialogues as --data_source.")
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                poll()
                result.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return result.hexdigest()


def read_file(path, column=""):
    """Texts of one data file, a list of str; "" for an empty dialogue.

    Args:
        column: as in `render`.

    Raises:
        UserError: content that is malformed, with the line or row it is in.
    """
    if path.name.endswith(".parquet"):
        return _read_parquet(path, column)
    if path.name.endswith(".arrow"):
        return _read_arrow(path, column)
    rows = None
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        text = "\n".join(line for _, line in _lines(path))
        if path.name.endswith(".txt"):
            return [text.strip() for text in re.split(r"\n\s*\n", text) if text.strip()]
        rows = _json_rows(text, path) if path.name.endswith(".json") else _csv_rows(text, path)
    if rows is None:
        return [render(_parse(line, where), where, column) for where, line in _lines(path) if line.strip()]
    return _rendered(rows, path, column)


def _rendered(rows, path, column):
    texts = []
    for number, row in enumerate(rows, 1):
        poll()
        texts.append(render(row, f"{path} row {number}", column))
    return texts


def _read_parquet(path, column):
    import pyarrow
    import pyarrow.parquet

    wanted = column_names(column) if column else {name for names in COLUMNS for name in (*names, "input")}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not column or set(wanted) <= set(names):
                names = [name for name in names if name in wanted] or names
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(BATCH, columns=names))
            return _rendered(rows, path, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file ({_reason(error)}); write it again.") from error


def _read_arrow(path, column):
    import datasets

    try:
        rows = datasets.load_dataset(
            "arrow", data_files=glob.escape(str(path)), split="train", streaming=True
        )
        return _rendered(rows, path, column)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable arrow file ({_reason(error)}); write it again.") from error


def _reason(error):
    return str(error).splitlines()[0].rstrip(".")


def _lines(path):
    """Pairs of (place, line) of a UTF-8 file, packed or not, with or without a byte order mark."""
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                poll()
                try:
                    text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
                except UnicodeDecodeError:
                    raise UserError(f"{path} line {number} is not UTF-8; convert the file.") from None
                yield f"{path} line {number}", text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); fetch it again.") from error


def _csv_rows(text, path):
    """Rows of strings. A reader that guesses types would make numbers of the texts "007" and nothing of "NA"."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.DictReader(
        io.StringIO(text), strict=True, delimiter="\t" if path.name.endswith(".tsv") else ","
    )
    try:
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise csv.Error("two columns of one name")
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"not {len(reader.fieldnames)} fields as in its head")
            yield row
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.reader.line_num} is no row ({error}); repair or remove it."
        ) from None


def _json_rows(text, path):
    """Rows of an array, or of the array `data` of an object; None for a file of JSON lines."""
    try:
        found = _parse(text, path)
    except UserError as error:
        if getattr(error.__cause__, "msg", "") == "Extra data":
            return None
        raise
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    return found if isinstance(found, list) else [found]


def _parse(text, where):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); repair or remove it.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply; repair or remove it.") from error


def _object(pairs):
    """A JSON object. Of two values under one key the parser would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
