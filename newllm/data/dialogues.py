"""Where dialogues come from: the hub, the embedded corpus, saved datasets or files."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from newllm.data import hub
from newllm.data.rows import SUFFIXES, TABLES, read_rows, render
from newllm.errors import UserError
from newllm.saving.stop import poll

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
ULTRACHAT_IDENTITY = f"{ULTRACHAT}@{ULTRACHAT_REVISION}:train_sft+test_sft"
ULTRACHAT_NOTE = f"data: UltraChat ({ULTRACHAT}, revision {ULTRACHAT_REVISION[:8]}, train_sft and test_sft)"
SOURCES = ("auto", "ultrachat", "chitchat")
ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([^:@]+))?(?:@([^:@]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
HELD_OUT_EVERY = 20  # rows of a stream that has no split to hold out


class Texts:
    """Rendered dialogues, anew at each call; empty ones are left out and counted.

    Args:
        rows: function that gives an iterator of (place, row). what: how to call what is left out.
        column: as in `render`.
    """

    def __init__(self, rows, what, column=""):
        self.rows = rows
        self.what = what
        self.column = column
        self.seen = 0
        self.empty = 0

    def __call__(self):
        self.seen = self.empty = 0
        for place, row in self.rows():
            poll()
            text = render(row, place, self.column)
            self.seen += 1
            self.empty += not text
            if text:
                yield text

    def remarks(self):
        """What to say about the last reading: nothing, or a line, which warns if half of it was empty."""
        loud = "warning: " if 2 * self.empty >= self.seen else ""
        return [f"{loud}data: {self.empty:,} {self.what} left out, of {self.seen:,}"] if self.empty else []


@dataclass(frozen=True)
class Corpus:
    """A source of dialogues as texts. Making one reads no dialogue, so a cached data set costs no parsing."""

    name: str  # short, fit for a file name
    identity: str  # what fixes the content: revision, package version or digest
    note: str  # one line: what is used, and why
    train: Callable  # () -> iterator of str
    held_out: Callable  # () -> iterator of str
    remarks: Callable  # () -> list of str: what was chosen or left out on reading
    size: Callable = lambda: None  # () -> dialogues in the one list behind both streams, None if they are two
    reach: Callable = lambda: None  # asks the hub, if it is from there; raises hub.Unreachable


def open_corpus(source, split="", column=""):
    """The corpus of `find_corpus`, `available`."""
    return available(find_corpus(source, split, column), source)


def available(corpus, source):
    """The corpus, once the hub has given it, else for "auto" the embedded one; else raises UserError."""
    try:
        corpus.reach()
        return corpus
    except hub.Unreachable as reason:
        if source == "auto":
            return _chitchat(f", NOT UltraChat (the Hugging Face hub could not be reached: {reason})")
        raise _not_had(source, reason) from reason


def find_corpus(source, split="", column=""):
    """The corpus behind the settings `data_source`, `data_split` and `data_column`; "auto" is UltraChat here.

    Args:
        source: "auto", "ultrachat", "chitchat", the path of a file or folder, or of a hub dataset
            "owner/name[:subset][@revision]", whose commit the hub is asked for. What exists as a path is one.
        split: of a hub or saved dataset, the one to train on; "": "train", or the only one.
        column: where a row has its dialogue, as in `render`; "": found by its name.

    Raises:
        UserError: no such source, file or split; on reading, malformed content or a stream that breaks.
    """
    if source in SOURCES and (split or column):
        raise UserError(f"data_source '{source}' has no choice of data_split or data_column: leave them out.")
    if column.count(",") > 1:
        raise UserError(f"data_column is one name or two, as in prompt,response, not '{column}'.")
    if source == "chitchat":
        return _chitchat()
    if source in ("auto", "ultrachat"):
        dataset = (ULTRACHAT, None, ULTRACHAT_REVISION)
        return _hub("ultrachat", ULTRACHAT_IDENTITY, ULTRACHAT_NOTE, dataset, "train_sft", "")
    if source and os.path.exists(source):
        path = Path(source)
        inside = set(os.listdir(path)) if path.is_dir() else set()
        saved = "dataset_dict.json" in inside or {"dataset_info.json", "state.json"} <= inside
        return _saved(path, split, column) if saved else _files(path, split, column)
    named = ON_HUB.fullmatch(source)
    if named and not source.endswith(SUFFIXES + TABLES):
        return _named_on_hub(source, *named.groups(), split, column)
    raise UserError(
        f"data_source '{source}' is neither one of {', '.join(SOURCES)} nor an existing file or folder "
        "nor a hub dataset, owner/name[:subset][@revision]: take one of these."
    )


def _not_had(source, reason):
    return UserError(
        f"data_source '{source}' is no file or folder here and cannot be had from the Hugging Face hub "
        f"({reason}); take --data_source chitchat, a file, or NAME@COMMIT as a run that cached it named it."
    )


def _fit_name(text):
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")[:60] or "data"
    # It stands in every result, where "ultrachat" is UltraChat itself.
    return f"{name}-file" if name in SOURCES else name


def _with_column(identity, column):
    return f"{identity} column {column}" if column else identity


def _one_list(name, identity, note, texts, remarks=()):
    """Corpus of one list: training takes it from the front, held-out from the back, whatever the budget."""

    @functools.cache
    def kept():
        found = list(texts())
        if not found:
            raise UserError(f"{name} holds no dialogues, but {texts.empty:,} empty ones: take other data.")
        return found

    return Corpus(
        name,
        identity,
        note,
        train=lambda: iter(kept()),
        held_out=lambda: reversed(kept()),
        remarks=lambda: [*remarks, *texts.remarks()],
        size=lambda: len(kept()),
    )


def _two_streams(name, identity, note, rows, where, column, choice, **more):
    """Corpus of two streams; rows: function of "held out?" to an iterator of (place, row)."""
    train = Texts(lambda: rows(False), f"empty training dialogues of {where}", column)
    held_out = Texts(lambda: rows(True), f"empty held-out dialogues of {where}", column)

    def remarks():
        return [*choice(), *train.remarks(), *held_out.remarks()]

    return Corpus(name, identity, note, train, held_out, remarks, **more)


# The embedded corpus


def _chitchat(why=""):
    found = importlib.util.find_spec("chitchat_dataset")
    path = Path(found.origin).with_name("dataset.json") if found else None
    if path is None or not path.is_file():
        raise UserError(
            f"the embedded corpus is not installed{why}: `pip install chitchat-dataset==0.9.0`, "
            "or give a file as --data_source."
        )
    version = importlib.metadata.version("chitchat-dataset")
    texts = Texts(lambda: _chitchat_rows(path), "openings of chitchat that nobody answered")
    note = f"data: chitchat-dataset {version}, human dialogues{why}"
    return _one_list("chitchat", f"chitchat-dataset=={version}", note, texts)


def _chitchat_rows(path):
    """Each turn is a list of texts of one sender. What nobody answered is no dialogue."""
    for number, dialogue in enumerate(json.loads(path.read_bytes()).values(), 1):
        turns = [turn for turn in dialogue["messages"] if turn]
        senders = [turn[0]["sender"] for turn in turns]
        messages = []
        for sender, turn in zip(senders, turns, strict=True):
            role = "user" if sender == senders[0] else "assistant"
            messages.append({"role": role, "content": " ".join(part["text"] for part in turn)})
        yield f"{path} dialogue {number}", {"messages": messages if len(set(senders)) > 1 else None}


# Datasets with splits


def _named_on_hub(source, dataset, subset, revision, split, column):
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = hub.probe(f"api/datasets/{dataset}/revision/{quote(commit, safe='')}")["sha"]
        except hub.Unreachable as reason:
            raise _not_had(source, reason) from reason
    named = f"{dataset}:{subset}" if subset else dataset
    identity = _with_column(f"{named}@{commit}:{split or 'train'}", column)
    note = f"data: {named}@{commit}"
    return _hub(_fit_name(named), identity, note, (dataset, subset, commit), split, column)


def _hub(name, identity, note, dataset, split, column):
    """A hub dataset (name, subset or None, commit); what is held out follows from these and `split`."""
    where = dataset[0]

    @functools.cache
    def opened():
        splits = _open_hub(*dataset)
        return splits, *_choose_splits(splits, split, where)

    def rows(held_out):
        splits, train, other = opened()
        chosen = other if other and held_out else train
        for number, row in enumerate(_unbroken(splits[chosen], f"{where} {chosen}"), 1):
            if other or (number % HELD_OUT_EVERY == 0) == held_out:
                yield f"{where} {chosen} row {number}", row

    def choice():
        _, train, other = opened()
        every = f"every {HELD_OUT_EVERY}th row, as there is no split test or validation"
        return [f"data: trains on split {train}, holds out {f'split {other}' if other else every}"]

    return _two_streams(name, identity, note, rows, where, column, choice, reach=opened)


def _open_hub(name, subset, commit):
    """Splits by name: from the datasets cache, else streamed, as few samples must not download it all.

    Raises:
        UserError: there is no such subset.
        hub.Unreachable: the hub cannot give the dataset.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = name.partition("/")
    short = camelcase_to_snakecase(short)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{short}" / (subset or "default")
    prepared = {}
    for file in sorted(folder.glob(f"*/{commit}/{short}-*.arrow")):
        split = re.sub(r"-\d+-of-\d+$", "", file.stem.removeprefix(f"{short}-"))
        prepared.setdefault(split, []).append(datasets.Dataset.from_file(str(file)))
    if prepared:
        return {split: datasets.concatenate_datasets(parts) for split, parts in prepared.items()}
    hub.probe(f"api/datasets/{name}/revision/{commit}")
    try:
        return hub.retry(lambda: datasets.load_dataset(name, subset, streaming=True, revision=commit))
    except Exception as error:
        if found := re.search(r"(?:available configs|Available): \[(.+?)\]", str(error)):
            raise UserError(f"{name} has the subsets {found[1]}: name one as {name}:SUBSET.") from error
        raise hub.Unreachable(hub.describe(error)) from error


def _unbroken(rows, where):
    """The rows of a stream to its end: after a break it is opened again behind the last; else an error."""
    done, reader = 0, iter(rows)

    def next_row():
        nonlocal reader
        try:
            return next(reader, None)
        except Exception:
            reader = iter(rows.skip(done))
            raise

    try:
        while (row := hub.retry(next_row)) is not None:
            yield row
            done += 1
    except Exception as error:
        raise UserError(
            f"reading {where} broke off after {done:,} dialogues ({hub.describe(error)}); run again, or take "
            "--data_source chitchat or a file."
        ) from error


def _choose_splits(splits, split, where):
    """Splits to train on and to hold out: "test_x", "test", "validation_x" ... beside "train_x", or None."""
    train = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if train not in splits:
        raise UserError(f"{where} has no split '{train}' but {', '.join(splits)}: name one as --data_split.")
    names = [name for kind in ("test", "validation") for name in (train.replace("train", kind, 1), kind)]
    return train, next((name for name in names if name in splits and name != train), None)


def _saved(path, split, column):
    """What `save_to_disk` wrote. Held out is another split, else the end of the only one."""
    import datasets

    try:
        splits = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:
        why = hub.describe(error)
        raise UserError(f"{path} is no readable saved dataset ({why}); save it again.") from error
    splits = splits if isinstance(splits, dict) else {"train": splits}
    train, other = _choose_splits(splits, split, path)
    used = [train, other] if other else [train]
    files = [[file["filename"] for file in splits[name].cache_files] for name in used]
    identity = _digest_of([[_digest(file) for file in of_split] for of_split in files])
    count = len(splits[train])
    backwards = range(count)[::-1]

    def rows(held_out):
        chosen = other if other and held_out else train
        for number in backwards if held_out and not other else range(len(splits[chosen])):
            yield f"{path} {chosen} row {number + 1}", splits[chosen][number]

    name = _fit_name(path.resolve().name)
    note = f"data: {path} (split {' and '.join(used)}, sha256 {identity[:12]})"
    identity = _with_column(f"sha256:{identity}", column)
    size = None if other else count
    return _two_streams(name, identity, note, rows, path, column, choice=list, size=lambda: size)


# Files


def _files(path, split, column):
    if split:
        raise UserError(f"{path} has no splits: leave out data_split.")
    folder = path.is_dir()
    found = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if folder else [path]
    files = [file for file in found if file.name.endswith(SUFFIXES)]
    files = files or [file for file in found if file.name.endswith(TABLES)]
    if not files:
        kinds = ", ".join(SUFFIXES + TABLES)
        raise UserError(f"{path} is no data: give one of {kinds}, or a folder of them or of save_to_disk.")
    digests = [[file.name, _digest(file)] for file in files]
    identity = _digest_of(digests) if folder else digests[0][1]
    stem = path.resolve().name
    for suffix in () if folder else SUFFIXES + TABLES:
        stem = stem.removesuffix(suffix)
    name = _fit_name(stem)
    note = f"data: {path} ({f'{len(files)} files, ' if folder else ''}sha256 {identity[:12]})"
    unread = [file.name for file in found if file not in files]
    remarks = [f"data: of {path} not read: {', '.join(unread)}"] if unread else []

    def rows():
        for file in files:
            yield from read_rows(file, column)

    texts = Texts(rows, f"empty dialogues of {name}", column)
    return _one_list(name, _with_column(f"sha256:{identity}", column), note, texts, remarks)


def _digest(path):
    """SHA-256 (hex) of a file's bytes."""
    result = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                poll()
                result.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return result.hexdigest()


def _digest_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
