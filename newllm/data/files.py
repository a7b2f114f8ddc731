"""Dialogues out of data files (lines, JSON, tables, plain text), and the one rendering of a dialogue as text."""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib

from newllm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
TABLES = (".csv", ".tsv", ".json", ".arrow")  # in a folder only without any of the above, beside which they describe
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


def render(row, where, column=""):
    """A row as text: "User: ...\\nAssistant: ...", messages without content left out; "" for an empty dialogue.

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
    keys = ", ".join(map(str, row)) or "none"
    if column:
        names = column_names(column)
        if missing := [name for name in names if name not in row]:
            raise UserError(f"{where} has no column '{missing[0]}' for --data_column; its columns are: {keys}.")
    else:
        names = next((names for names in COLUMNS if names[-1] in row and row.get(names[0]) is not None), None)
        if names is None:
            raise UserError(
                f"{where} has neither messages, data, text, conversations nor a pair such as prompt and response, and "
                f"no --data_column says where its dialogue is; its keys are: {keys}."
            )
    values = ["" if row[name] is None else row[name] for name in names]
    value = values if len(names) > 1 else values[0]
    try:
        if not column and names == ("instruction", "output") and row.get("input"):
            value[0] += "\n" + row["input"]
        if isinstance(value, str) and (column or names == ("text",)):
            text = value.strip()
        elif isinstance(value, list) or not value:
            turns = [_turn(number, turn) for number, turn in enumerate(value or ())]
            text = "\n".join(f"{role}: {content}" for role, content in turns if content)
        else:
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        shape = "a list of texts or of objects with role and content or from and value"
        shape = "texts" if len(names) > 1 else "a text" if names == ("text",) else shape
        raise UserError(f"{where} does not have {shape} in {' and '.join(names)}; repair or remove it.") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds a lone surrogate, which is no valid Unicode; repair or remove it.") from None
    return text


def column_names(column):
    """The one or two names in the setting `data_column`, a tuple."""
    return tuple(name.strip() for name in column.split(","))


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
    return role, "" if content is None else content.strip()


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
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); fetch it again.") from error
    lines = _decoded_lines(content, path)
    text = "\n".join(line for _, line in lines)
    if path.name.endswith(".txt"):
        return [text.strip() for text in re.split(r"\n\s*\n", text) if text.strip()]
    rows = None
    if path.name.endswith((".csv", ".tsv")):
        rows = _csv_rows(text, path)
    elif path.name.endswith(".json"):
        rows = _json_rows(text, path)
    if rows is None:
        return [render(_parse(line, where), where, column) for where, line in lines if line.strip()]
    return [render(row, f"{path} row {number}", column) for number, row in enumerate(rows, 1)]


def _read_parquet(path, column):
    import pyarrow
    import pyarrow.parquet

    texts, wanted = [], column_names(column) if column else {name for names in COLUMNS for name in (*names, "input")}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not column or set(wanted) <= set(names):
                names = [name for name in names if name in wanted] or names
            for batch in file.iter_batches(columns=names):
                texts += [
                    render(row, f"{path} row {number}", column)
                    for number, row in enumerate(batch.to_pylist(), len(texts) + 1)
                ]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file ({_reason(error)}); write it again.") from error
    return texts


def _read_arrow(path, column):
    import datasets

    try:
        rows = datasets.load_dataset("arrow", data_files=glob.escape(str(path)), split="train", streaming=True)
        return [render(row, f"{path} row {number}", column) for number, row in enumerate(rows, 1)]
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable arrow file ({_reason(error)}); write it again.") from error


def _reason(error):
    return str(error).splitlines()[0].rstrip(".")


def _decoded_lines(content, path):
    """Pairs of (place, line) of UTF-8 bytes, with or without a byte order mark."""
    lines = []
    for number, line in enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), 1):
        try:
            lines.append((f"{path} line {number}", line.decode().rstrip("\r\n")))
        except UnicodeDecodeError:
            raise UserError(f"{path} line {number} is not UTF-8; convert the file.") from None
    return lines


def _csv_rows(text, path):
    """Rows of strings. A reader that guesses types would make numbers of the texts "007" and nothing of "NA"."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter="\t" if path.name.endswith(".tsv") else ",")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"not {len(reader.fieldnames)} fields as in its head")
            yield row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num} is no row ({error}); repair or remove it.") from None


def _json_rows(text, path):
    """Rows of an array, or of the array `data` of an object; None for a file of JSON lines."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise UserError(f"{path} is not valid JSON ({error}); repair it.") from None
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    return found if isinstance(found, list) else [found]


def _parse(line, where):
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); repair or remove it.") from None
