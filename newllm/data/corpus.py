"""Where dialogues come from: UltraChat on the hub, the embedded chitchat corpus, or files; each a stream of texts."""

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

from newllm.data import hub
from newllm.data.files import SUFFIXES, digest, read_file, render
from newllm.data.hub import retry
from newllm.errors import UserError

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
ULTRACHAT_IDENTITY = f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
ULTRACHAT_NOTE = f"data: UltraChat ({ULTRACHAT}, revision {ULTRACHAT_REVISION[:8]}, train_sft and test_sft)"
WAY_OUT = "take --data_source chitchat or a file"
SOURCES = ("auto", "ultrachat", "chitchat")


@dataclass(frozen=True)
class Listing:
    """The dialogues of a finite source, and what was left out on reading them (for notes)."""

    texts: list[str]
    remarks: list[str]


@dataclass(frozen=True)
class Corpus:
    """A source of dialogues as texts. Making one reads no dialogue, so a cached data set costs no parsing."""

    name: str  # short, fit for a file name
    identity: str  # what fixes the content: revision, package version or digest
    note: str  # one line: what is used, and why
    train: Callable[[], Iterator[str]]
    held_out: Callable[[], Iterator[str]]
    listing: Callable[[], Listing] | None = None  # of a finite source, read once on the first call

    @property
    def size(self):
        """Dialogues in the one list behind both streams; None when they are separate streams."""
        return len(self.listing().texts) if self.listing else None

    @property
    def remarks(self):
        """What was left out on reading, one line each."""
        return self.listing().remarks if self.listing else []


def open_corpus(source):
    """The corpus behind the setting `data_source`.

    Args:
        source: "auto", "ultrachat", "chitchat", or the path of a file or folder.

    Raises:
        UserError: no such source or file, nothing in it, or the hub cannot give it. Reading the streams raises it for
            malformed content and for a stream that breaks.
    """
    if source == "chitchat":
        return _chitchat("")
    if source == "ultrachat":
        try:
            return _ultrachat()
        except hub.Unreachable as reason:
            raise UserError(f"UltraChat cannot be had from the Hugging Face hub ({reason}); {WAY_OUT}.") from reason
    if source == "auto":
        try:
            return _ultrachat()
        except hub.Unreachable as reason:
            return _chitchat(f", NOT UltraChat (the Hugging Face hub could not be reached: {reason})")
    return _files(source)


def _finite(name, identity, note, read):
    """Corpus of one list: training goes through it from the front, held-out from the back, whatever the budget."""

    @functools.cache
    def listing():
        texts, remarks = read()
        kept = [text for text in texts if text]
        if len(kept) < len(texts):
            remarks = [*remarks, f"data: {len(texts) - len(kept):,} empty dialogues of {name} left out"]
        if not kept:
            raise UserError(f"{name} holds no dialogues; choose another --data_source.")
        return Listing(kept, remarks)

    return Corpus(name, identity, note, lambda: iter(listing().texts), lambda: reversed(listing().texts), listing)


# UltraChat


def _ultrachat():
    """UltraChat from the datasets cache, else streamed from the hub: few samples must not download 1.4 GB."""
    splits = _prepared_ultrachat()
    if not splits:
        hub.probe(f"api/datasets/{ULTRACHAT}/revision/{ULTRACHAT_REVISION}")
        import datasets

        def stream(split):
            return datasets.load_dataset(ULTRACHAT, split=split, streaming=True, revision=ULTRACHAT_REVISION)

        try:
            splits = {split: retry(lambda split=split: stream(split)) for split in ("train_sft", "test_sft")}
        except Exception as error:
            raise hub.Unreachable(hub.describe(error)) from error
    train, held_out = (functools.partial(_read_stream, splits[split], split) for split in ("train_sft", "test_sft"))
    return Corpus("ultrachat", ULTRACHAT_IDENTITY, ULTRACHAT_NOTE, train, held_out)


def _prepared_ultrachat():
    """Both splits, memory-mapped, if `datasets` has prepared this very revision before; else {}."""
    import datasets

    owner, name = ULTRACHAT.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{name}"
    splits = {}
    for split in ("train_sft", "test_sft"):
        files = sorted(root.glob(f"*/*/{ULTRACHAT_REVISION}/{name}-{split}*.arrow"))
        if not files:
            return {}
        splits[split] = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return splits


def _read_stream(rows, split):
    """Texts of a split in order. A break is mended by opening again behind the last row, or it is an error."""
    reader, done = iter(rows), 0

    def next_row():
        nonlocal reader
        try:
            return next(reader, None)
        except Exception:
            reader = iter(rows.skip(done))
            raise

    while True:
        try:
            row = retry(next_row)
        except Exception as error:
            raise UserError(
                f"reading UltraChat {split} broke off after {done:,} dialogues ({hub.describe(error)}); "
                f"run again, or {WAY_OUT}."
            ) from error
        if row is None:
            return
        done += 1
        if not isinstance(row.get("messages"), list):
            raise UserError(
                f"UltraChat {split} row {done} has no list 'messages' but the columns {', '.join(row) or '(none)'}: "
                f"not the schema this project reads; {WAY_OUT}."
            )
        if text := render(row, f"UltraChat {split} row {done}"):
            yield text


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
            dict(role="user" if sender == senders[0] else "assistant", content=" ".join(part["text"] for part in turn))
            for sender, turn in zip(senders, turns, strict=True)
        ]
        texts.append(render(dict(messages=messages), f"{path} dialogue {number}"))
    return texts, [f"data: {unanswered:,} openings of chitchat that nobody answered left out"] if unanswered else []


# Files


def _files(source):
    path = Path(source).expanduser()
    if not source or not os.path.exists(path):
        close = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise UserError(
            f"data_source '{source}' is neither one of {', '.join(SOURCES)} nor an existing file or folder{hint}"
        )
    folder = path.is_dir()
    files = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if folder else [path]
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{path} is no data: data_source takes {', '.join(SUFFIXES)} files or a folder of them.")
    identity = digest(path) if not folder else _digest_of_folder(files)
    stem = path.resolve().name
    for suffix in () if folder else SUFFIXES:
        stem = stem.removesuffix(suffix)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._")[:60] or "data"
    if name in SOURCES:  # the name stands in every result, where "ultrachat" must mean UltraChat itself
        name += "-file"
    note = f"data: {path} ({f'{len(files)} files, ' if folder else ''}sha256 {identity[:12]})"
    return _finite(name, f"sha256:{identity}", note, lambda: ([text for file in files for text in read_file(file)], []))


def _digest_of_folder(files):
    return hashlib.sha256(json.dumps([[file.name, digest(file)] for file in files]).encode()).hexdigest()
