"""Where dialogues come from: the hub, the embedded chitchat corpus, saved datasets or files; each a stream of texts."""

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from newllm.data import hub
from newllm.data.files import SUFFIXES, TABLES, Tally, column_names, digest, read_file, render
from newllm.data.splits import HELD_OUT_EVERY, WAY_OUT, choose_splits, open_hub, read_rows, read_saved
from newllm.errors import UserError

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
ULTRACHAT_IDENTITY = f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
ULTRACHAT_NOTE = f"data: UltraChat ({ULTRACHAT}, revision {ULTRACHAT_REVISION[:8]}, train_sft and test_sft)"
SOURCES = ("auto", "ultrachat", "chitchat")
ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([^:@]+))?(?:@([^:@]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """What is known of a corpus once it is read: its size, None for separate streams, and what to say about it."""

    size: int | None
    remarks: list[str]


@dataclass(frozen=True)
class Corpus:
    """A source of dialogues as texts. Making one reads no dialogue, so a cached data set costs no parsing."""

    name: str  # short, fit for a file name
    identity: str  # what fixes the content: revision, package version or digest
    note: str  # one line: what is used, and why
    train: Callable[[], Iterator[str]]
    held_out: Callable[[], Iterator[str]]
    listing: Callable[[], Listing] = lambda: Listing(None, [])

    @property
    def size(self):
        """Dialogues in the one list behind both streams; None when they are separate streams."""
        return self.listing().size

    @property
    def remarks(self):
        """What was chosen or left out on reading, one line each."""
        return self.listing().remarks


def open_corpus(source, split="", column=""):
    """The corpus behind the settings `data_source`, `data_split` and `data_column`.

    Args:
        source: "auto", "ultrachat", "chitchat", the path of a file or folder, or of a hub dataset
            "owner/name[:subset][@revision]". What exists as a path is one.
        split: of a hub or saved dataset, the one to train on; "": "train", or the only one.
        column: where a row has its dialogue, as in `newllm.data.files.render`; "": found by its name.

    Raises:
        UserError: no such source, file or split, nothing in it, or the hub cannot give it. Reading the streams raises
            it for malformed content and for a stream that breaks.
    """
    source = pin(source)
    known = known_labels(source, split, column)
    if source == "chitchat":
        return _chitchat("")
    if source in ("auto", "ultrachat"):
        try:
            return _ultrachat()
        except hub.Unreachable as reason:
            if source == "auto":
                return _chitchat(f", NOT UltraChat (the Hugging Face hub could not be reached: {reason})")
            raise UserError(
                f"UltraChat cannot be had from the Hugging Face hub ({reason}); {WAY_OUT}."
            ) from reason
    if known:
        return _hub(source, known, split, column)
    path = Path(source)
    if not source or not os.path.exists(path):
        close = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise UserError(
            f"data_source '{source}' is neither one of {', '.join(SOURCES)} nor an existing file or folder "
            f"nor a hub dataset, owner/name[:subset][@revision]{hint}"
        )
    inside = {file.name for file in path.iterdir()} if path.is_dir() else set()
    saved = "dataset_dict.json" in inside or {"dataset_info.json", "state.json"} <= inside
    return (_saved if saved else _files)(path, split, column)


def pin(source):
    """The source, with the full commit of its revision if it is a hub dataset, for which the hub is asked.

    Raises:
        UserError: the hub cannot tell.
    """
    found = _on_hub(source)
    if not found or COMMIT.fullmatch(found[3] or ""):
        return source
    try:
        commit = hub.probe(f"api/datasets/{found[1]}/revision/{quote(found[3] or 'main', safe='')}")["sha"]
    except hub.Unreachable as reason:
        raise _not_had(
            source, reason, f", or {found[1]}@COMMIT as a run named it that cached its data"
        ) from reason
    return f"{source.partition('@')[0]}@{commit}"


def known_labels(source, split="", column=""):
    """Name, identity and note of UltraChat or a pinned hub dataset, which a cache needs no hub for; None for others.

    Raises:
        UserError: a split or column where there is no choice, or more than two columns.
    """
    if source in SOURCES and (split or column):
        raise UserError(
            f"data_source '{source}' has no choice of split or column: leave out data_split and data_column."
        )
    if column and (len(column_names(column)) > 2 or "" in column_names(column)):
        raise UserError(
            f"data_column is one name or two with a comma, such as prompt,response, not '{column}'."
        )
    if source in ("auto", "ultrachat"):
        return "ultrachat", ULTRACHAT_IDENTITY, ULTRACHAT_NOTE
    if not _on_hub(source):
        return None
    identity = f"{source}:{split or 'train'}" + _of_column(column)
    return _fit_name(source.partition("@")[0]), identity, f"data: {source}"


def _of_column(column):
    """The end of an identity that a choice of columns makes another."""
    return f" column {column}" if column else ""


def _fit_name(text):
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")[:60] or "data"
    return (
        f"{name}-file" if name in SOURCES else name
    )  # it stands in every result: "ultrachat" is UltraChat itself


def _finite(name, identity, note, read):
    """Corpus of one list: training goes through it from the front, held-out from the back, whatever the budget."""

    @functools.cache
    def found():
        texts, remarks = read()
        tally = Tally()
        kept = list(filter(tally.keeps, texts))
        if not kept:
            why = f": all {tally.seen:,} are empty, without text or null" if texts else ""
            raise UserError(f"{name} holds no dialogues{why}; choose another --data_source.")
        return kept, Listing(len(kept), [*remarks, *tally.remarks(name)])

    return Corpus(
        name, identity, note, lambda: iter(found()[0]), lambda: reversed(found()[0]), lambda: found()[1]
    )


def _remarks(streams):
    """What two streams, each a partial with a tally, have left out so far."""
    return [line for stream in streams for line in stream.keywords["tally"].remarks(stream.args[1])]


# The hub


def _ultrachat():
    rows = open_hub(ULTRACHAT, None, ULTRACHAT_REVISION)
    streams = [
        functools.partial(read_rows, rows[split], f"UltraChat {split}", tally=Tally())
        for split in ("train_sft", "test_sft")
    ]
    labels = "ultrachat", ULTRACHAT_IDENTITY, ULTRACHAT_NOTE
    return Corpus(*labels, *streams, lambda: Listing(None, _remarks(streams)))


def _on_hub(source):
    """Match of owner/name, subset, revision; None for another source, such as what exists here or is named as a file."""
    if source.endswith(SUFFIXES + TABLES) or os.path.exists(source):
        return None
    return ON_HUB.fullmatch(source)


def _not_had(source, reason, more=""):
    return UserError(
        f"data_source '{source}' is no file or folder here and cannot be had from the Hugging Face hub ({reason}); "
        f"{WAY_OUT}{more}."
    )


def _hub(source, labels, split, column):
    """A pinned hub dataset. What is held out follows from its splits, so it is no part of the identity."""
    where = source.partition("@")[0]
    try:
        rows = open_hub(*_on_hub(source).groups())
    except hub.Unreachable as reason:
        raise _not_had(source, reason) from reason
    train, held_out = choose_splits(rows, split, where)
    streams = [
        functools.partial(read_rows, rows[name], f"{where} {name}", column, part, tally=Tally())
        for name, part in ([(train, None), (held_out, None)] if held_out else [(train, False), (train, True)])
    ]
    rest = (
        f"split {held_out}"
        if held_out
        else f"every {HELD_OUT_EVERY}th row, as there is no split test or validation"
    )
    choice = f"data: trains on split {train}, holds out {rest}"
    return Corpus(*labels, *streams, lambda: Listing(None, [choice, *_remarks(streams)]))


# The embedded corpus


def _chitchat(why):
    found = importlib.util.find_spec("chitchat_dataset")
    path = Path(found.origin).with_name("dataset.json") if found else None
    if path is None or not path.is_file():
        raise UserError(
            f"the embedded corpus is not installed{why}; "
            "`pip install chitchat-dataset==0.9.0`, or give a file as --data_source."
        )
    version = importlib.metadata.version("chitchat-dataset")
    note = f"data: chitchat-dataset {version}, human dialogues{why}"
    return _finite("chitchat", f"chitchat-dataset=={version}", note, lambda: _read_chitchat(path))


def _read_chitchat(path):
    """Each turn is a list of texts of one sender. What nobody answered is no dialogue."""
    texts, unanswered = [], 0
    for number, dialogue in enumerate(json.loads(path.read_bytes()).values(), 1):
        turns = [turn for turn in dialogue["messages"] if turn]
        senders = [turn[0]["sender"] for turn in turns]
        if len(set(senders)) < 2:
            unanswered += 1
            continue
        messages = [
            dict(
                role="user" if sender == senders[0] else "assistant",
                content=" ".join(part["text"] for part in turn),
            )
            for sender, turn in zip(senders, turns, strict=True)
        ]
        texts.append(render(dict(messages=messages), f"{path} dialogue {number}"))
    return texts, [
        f"data: {unanswered:,} openings of chitchat that nobody answered left out"
    ] if unanswered else []


# Files


def _saved(path, split, column):
    """What `save_to_disk` wrote. Held out is another split, else the end of the only one."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:
        raise UserError(
            f"{path} is no readable saved dataset ({hub.describe(error)}); save it again."
        ) from error
    rows = rows if isinstance(rows, dict) else {"train": rows}
    train, held_out = choose_splits(rows, split, path)
    names = [train, held_out] if held_out else [train]
    identity = _digest_of(
        [[digest(Path(file["filename"])) for file in rows[name].cache_files] for name in names]
    )
    streams = [
        functools.partial(read_saved, rows[name], f"{path} {name}", column, backwards, tally=Tally())
        for name, backwards in ((train, False), (held_out or train, not held_out))
    ]
    size = None if held_out else len(rows[train])
    note = f"data: {path} (split {' and '.join(names)}, sha256 {identity[:12]})"
    labels = _fit_name(path.resolve().name), f"sha256:{identity}{_of_column(column)}", note
    return Corpus(*labels, *streams, lambda: Listing(size, _remarks(streams)))


def _files(path, split, column):
    if split:
        raise UserError(f"{path} has no splits: leave out data_split.")
    folder = path.is_dir()
    files = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if folder else [path]
    found = files
    files = [f for f in found if f.name.endswith(SUFFIXES)] or [f for f in found if f.name.endswith(TABLES)]
    if not files:
        kinds = ", ".join(SUFFIXES + TABLES)
        raise UserError(
            f"{path} is no data: data_source takes {kinds} files, a folder of them or of save_to_disk."
        )
    if column and (plain := [file for file in files if file.name.endswith(".txt")]):
        raise UserError(f"{plain[0]} has no columns: leave out data_column.")
    identity = digest(path) if not folder else _digest_of([[file.name, digest(file)] for file in files])
    stem = path.resolve().name
    for suffix in () if folder else SUFFIXES + TABLES:
        stem = stem.removesuffix(suffix)
    note = f"data: {path} ({f'{len(files)} files, ' if folder else ''}sha256 {identity[:12]})"
    others = [file.name for file in found if file not in files]
    remarks = [f"data: of {path} not read: {', '.join(others)}"] if others else []
    return _finite(
        _fit_name(stem),
        f"sha256:{identity}{_of_column(column)}",
        note,
        lambda: ([text for file in files for text in read_file(file, column)], remarks),
    )


def _digest_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
