"""Dialogues out of data files: .jsonl, .jsonl.gz, .parquet and .txt, and the one rendering of a dialogue as text."""

import gzip
import hashlib
import io
import json
import re
import zlib

from newllm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
COLUMNS = ("messages", "data", "text")  # where a row may hold its dialogue, in order of preference
BLOCK = 1 << 20


def render(row, where):
    """A row as text: "User: ...\\nAssistant: ...", messages without content left out; "" for an empty dialogue.

    Args:
        row: dict with `messages` ([{role, content}]), `data` (strings, user first) or `text` (taken as it is).
        where: the row's place, for error messages.

    Raises:
        UserError: none of these, or of another type, or text that is no valid Unicode.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is a {type(row).__name__}, not an object with messages, data or text; repair or remove it."
        )
    kind = next((name for name in COLUMNS if row.get(name) is not None), None)
    if kind is None:
        raise UserError(
            f"{where} has neither messages (a list of role and content), data (a list of texts) nor text; "
            f"its keys are: {', '.join(map(str, row)) or 'none'}."
        )
    try:
        if kind == "messages":
            turns = [(message["role"].strip().capitalize(), message["content"].strip()) for message in row["messages"]]
        elif kind == "data":
            turns = [(("User", "Assistant")[i % 2], text.strip()) for i, text in enumerate(row["data"])]
    except (TypeError, KeyError, AttributeError):
        shape = "a list of objects with a role and a content" if kind == "messages" else "a list of texts"
        raise UserError(f"{where} has {kind} that are not {shape}; repair or remove it.") from None
    if kind != "text":
        text = "\n".join(f"{role}: {content}" for role, content in turns if content)
    elif isinstance(row["text"], str):
        text = row["text"].strip()
    else:
        raise UserError(f"{where} has a text that is a {type(row['text']).__name__}; repair or remove it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds a lone surrogate, which is no valid Unicode; repair or remove it.") from None
    return text


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


def read_file(path):
    """Texts of one data file, a list of str; "" for an empty dialogue.

    Raises:
        UserError: content that is malformed, with the line or row it is in.
    """
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); fetch it again.") from error
    lines = _decoded_lines(content, path)
    if path.name.endswith(".txt"):
        texts = re.split(r"\n\s*\n", "\n".join(line for _, line in lines))
        return [text.strip() for text in texts if text.strip()]
    return [_parse(line, where) for where, line in lines if line.strip()]


def _read_parquet(path):
    import pyarrow
    import pyarrow.parquet

    texts = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(columns=[name for name in names if name in COLUMNS] or names):
                texts += [
                    render(row, f"{path} row {number}") for number, row in enumerate(batch.to_pylist(), len(texts) + 1)
                ]
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is no readable parquet file ({reason}); write it again.") from error
    return texts


def _decoded_lines(content, path):
    """Pairs of (place, line) of UTF-8 bytes, with or without a byte order mark."""
    lines = []
    for number, line in enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), 1):
        try:
            lines.append((f"{path} line {number}", line.decode().rstrip("\r\n")))
        except UnicodeDecodeError:
            raise UserError(f"{path} line {number} is not UTF-8; convert the file.") from None
    return lines


def _parse(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); repair or remove it.") from None
    return render(row, where)
