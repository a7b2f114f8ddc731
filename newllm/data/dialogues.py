"""Where dialogues come from: the hub, the embedded corpus, saved datasets or files."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from newllm.data import hub
from newllm.data.rows import SUFFIXES, TABLES, read_rows, render, unreadable
from newllm.errors import UserError
from newllm.saving.stop import interruptible, poll

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
ULTRACHAT_IDENTITY = f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
ULTRACHAT_NOTE = f"data: UltraChat ({ULTRACHAT}, revision {ULTRACHAT_REVISION[:8]}, train_sft and test_sft)"
SOURCES = ("auto", "ultrachat", "chitchat")
ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([^:@]+))?(?:@([^:@]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
HELD_OUT_EVERY = 20  # rows of a stream that has no split to hold out


@dataclass(eq=False)
class Corpus:
    """A source of dialogues as texts. Making one reads no dialogue, so a cached data set costs no parsing."""

    name: str  # short, fit for a file name
    identity: str  # what fixes the content: revision, package version or digest
    note: str  # one line: what is used, and why
    rows: Callable  # ("held out?") -> iterator of (place, row)
    one_list: bool = False  # whether rows(False) are all rows, and the held-out ones their other end
    opened: Callable = list  # () -> lines on what is read; asks the hub, if it is there: hub.Unreachable
    column: str = ""  # as in `render`
    counts: dict = field(default_factory=dict)  # "held out?" -> (rows, empty rows) of the last reading

    def train(self):
        """Texts to train on, an iterator of str, anew at each call."""
        return iter(self._whole) if self.one_list else self._texts(held_out=False)

    def held_out(self):
        """Texts to hold out, an iterator of str, anew at each call; of one list, from its end."""
        return reversed(self._whole) if self.one_list else self._texts(held_out=True)

    def remarks(self):
        """Lines on what was read and left out so far; it is a warning if half of the rows were empty."""
        lines = self.opened()
        seen, empty = map(sum, zip((0, 0), *self.counts.values(), strict=True))
        if empty:
            loud = "warning: " if 2 * empty >= seen else ""
            lines.append(f"{loud}data: {empty:,} empty dialogues left out, of {seen:,} of {self.name}")
        return lines

    def _texts(self, held_out):
        empty = 0
        for number, (place, row) in enumerate(self.rows(held_out), 1):
            poll()
            text = render(row, place, self.column)
            empty += not text
            self.counts[held_out] = number, empty
            if text:
                yield text

    @functools.cached_property
    def _whole(self):
        texts = list(self._texts(held_out=False))
        if not texts:
            raise UserError(f"{self.name} holds no dialogues: take other data.")
        return texts


def open_corpus(source, split="", column=""):
    """The corpus of `find_corpus`, `available`."""
    return available(find_corpus(source, split, column), source)


def available(corpus, source):
    """The corpus, once the hub has given it, else for "auto" the embedded one; else raises UserError."""
    try:
        corpus.opened()
        return corpus
    except hub.Unreachable as reason:
        if source == "auto":
            return _chitchat(f", NOT UltraChat (the Hugging Face hub could not be reached: {reason})")
        raise _not_had(source, reason) from reason


def find_corpus(source, split="", column=""):
    """The corpus behind the settings `data_source`, `data_split` and `data_column`; "auto" is UltraChat here.

    Of a hub dataset, "owner/name[:subset][@revision]", the hub is asked for the commit. What exists as a path
    is a path.

    Raises:
        UserError: no such source, file or split; on reading, malformed content or a stream that breaks.
    """
    if source in SOURCES:
        if split or column:
            raise UserError(f"data_source '{source}' has no data_split or data_column: leave them out.")
        if source == "chitchat":
            return _chitchat()
        dataset = ULTRACHAT, None, ULTRACHAT_REVISION
        return _on_hub("ultrachat", ULTRACHAT_IDENTITY, ULTRACHAT_NOTE, dataset, "train_sft")
    named = ON_HUB.fullmatch(source)
    if source and os.path.exists(source):
        corpus = _here(Path(source), split)
    elif named and not source.endswith(SUFFIXES + TABLES):
        corpus = _named_on_hub(source, *named.groups(), split)
    else:
        raise UserError(
            f"data_source '{source}' is neither one of {', '.join(SOURCES)} nor an existing file or folder "
            "nor a hub dataset, owner/name[:subset][@revision]: take one of these."
        )
    corpus.name = re.sub(r"[^A-Za-z0-9._-]+", "_", corpus.name).strip("._")[:60] or "data"
    if corpus.name in SOURCES:  # the name stands in every result, where "ultrachat" is UltraChat itself
        corpus.name += "-file"
    if column:
        corpus.column = column
        corpus.identity += f" column {column}"
    return corpus


def _not_had(source, reason):
    return UserError(
        f"data_source '{source}' is no file or folder here and cannot be had from the Hugging Face hub "
        f"({reason}); take --data_source chitchat, a file, or NAME@COMMIT as a run that cached it named it."
    )


# The embedded corpus


def _chitchat(why=""):
    path = Path(importlib.util.find_spec("chitchat_dataset").origin).with_name("dataset.json")
    version = importlib.metadata.version("chitchat-dataset")
    identity, note = f"chitchat-dataset=={version}", f"data: chitchat-dataset {version}, human dialogues{why}"
    return Corpus("chitchat", identity, note, lambda _: _chitchat_rows(path), one_list=True)


def _chitchat_rows(path):
    """Each turn is a list of texts of one sender. An opening that nobody answered is no dialogue."""
    for number, dialogue in enumerate(json.loads(path.read_bytes()).values(), 1):
        turns = [turn for turn in dialogue["messages"] if turn]
        senders = [turn[0]["sender"] for turn in turns]
        messages = []
        for sender, turn in zip(senders, turns, strict=True):
            role = "user" if sender == senders[0] else "assistant"
            messages.append({"role": role, "content": " ".join(part["text"] for part in turn)})
        if len(set(senders)) > 1:
            yield f"{path} dialogue {number}", {"messages": messages}


# The hub


def _named_on_hub(source, name, subset, revision, split):
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = hub.probe(f"api/datasets/{name}/revision/{quote(commit, safe='')}")["sha"]
        except hub.Unreachable as reason:
            raise _not_had(source, reason) from reason
    named = f"{name}:{subset}@{commit}" if subset else f"{name}@{commit}"
    identity = f"{named}:{split or 'train'}"
    return _on_hub(named.partition("@")[0], identity, f"data: {named}", (name, subset, commit), split)


def _on_hub(name, identity, note, dataset, split):
    """Corpus of a hub dataset (name, subset or None, commit): streamed, as few samples need not all of it."""
    where, subset, commit = dataset

    @functools.cache
    def streams():
        import datasets

        hub.probe(f"api/datasets/{where}/revision/{commit}")
        try:
            by_name = datasets.load_dataset(where, subset, streaming=True, revision=commit)
        except Exception as error:  # of many kinds
            if subsets := re.search(r"(?:available configs|Available): \[(.+?)\]", str(error)):
                raise UserError(f"{where} has subsets {subsets[1]}: name one as {where}:SUBSET.") from error
            raise hub.Unreachable(hub.describe(error)) from error
        return by_name, *_choose_splits(by_name, split, where)

    def opened():
        _, train, other = streams()
        every = f"every {HELD_OUT_EVERY}th row, as there is no split test or validation"
        return [f"data: trains on split {train}, holds out {f'split {other}' if other else every}"]

    def rows(held_out):
        by_name, train, other = streams()
        chosen = other if other and held_out else train
        number = 0
        try:
            for number, row in enumerate(by_name[chosen], 1):
                if other or (number % HELD_OUT_EVERY == 0) == held_out:
                    yield f"{where} {chosen} row {number}", row
        except Exception as error:  # `datasets` has tried again by itself
            raise UserError(
                f"reading {where} {chosen} broke off after {number:,} dialogues ({hub.describe(error)}): run "
                "again, or take --data_source chitchat or a file."
            ) from error

    return Corpus(name, identity, note, rows, opened=opened)


def _choose_splits(splits, split, where):
    """Splits to train on and to hold out: "test_x", "test", "validation_x" ... beside "train_x", or None."""
    train = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if train not in splits:
        raise UserError(f"{where} has no split '{train}' but {', '.join(splits)}: name one as --data_split.")
    names = [name for kind in ("test", "validation") for name in (train.replace("train", kind, 1), kind)]
    return train, next((name for name in names if name in splits and name != train), None)


# Files and folders


def _here(path, split):
    inside = os.listdir(path) if path.is_dir() else []
    if "dataset_dict.json" in inside or {"dataset_info.json", "state.json"} <= set(inside):
        return _saved(path, split)
    if split:
        raise UserError(f"{path} has no splits: leave out data_split.")
    present = sorted(path / name for name in inside if not name.startswith(".")) or [path]
    files = [file for file in present if file.name.endswith(SUFFIXES)]
    files = files or [file for file in present if file.name.endswith(TABLES)]
    if not files:
        kinds = ", ".join(SUFFIXES + TABLES)
        raise UserError(f"{path} is no data: give one of {kinds}, or a folder of them or of save_to_disk.")
    digests = [[file.name, _digest(file)] for file in files]
    digest, count, name = _digest_of(digests), f"{len(files)} files, ", path.resolve().name
    if not path.is_dir():
        digest, count, name = digests[0][1], "", re.sub(r"(\.jsonl\.gz|\.\w+)$", "", name)
    unread = [file.name for file in present if file not in files]
    return Corpus(
        name,
        f"sha256:{digest}",
        f"data: {path} ({count}sha256 {digest[:12]})",
        lambda _: itertools.chain.from_iterable(map(read_rows, files)),
        one_list=True,
        opened=lambda: [f"data: of {path} not read: {', '.join(unread)}"] if unread else [],
    )


def _saved(path, split):
    """What `save_to_disk` wrote, read as needed. Held out is another split, else the end of the only one."""
    import datasets

    try:
        splits = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:
        raise unreadable(path, "a saved dataset", error) from error
    splits = splits if isinstance(splits, dict) else {"train": splits}
    train, other = _choose_splits(splits, split, path)
    used = [train, other] if other else [train]
    files = [[file["filename"] for file in splits[name].cache_files] for name in used]
    digest = _digest_of([[_digest(file) for file in of_split] for of_split in files])

    def rows(held_out):
        chosen = other if other and held_out else train
        numbers = range(len(splits[chosen]))
        for number in reversed(numbers) if held_out and not other else numbers:
            yield f"{path} {chosen} row {number + 1}", splits[chosen][number]

    note = f"data: {path} (split {' and '.join(used)}, sha256 {digest[:12]})"
    return Corpus(path.resolve().name, f"sha256:{digest}", note, rows)


def _digest(path):
    """SHA-256 (hex) of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return interruptible(hashlib.file_digest, file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, "data", error) from error


def _digest_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
