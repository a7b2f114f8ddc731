"""Datasets with named splits, on the hub or saved by `datasets`: opening them, which split is held out, their texts."""

import re
from pathlib import Path

from newllm.data import hub
from newllm.data.files import Tally, render
from newllm.data.hub import retry
from newllm.errors import UserError
from newllm.saving.stop import poll

HELD_OUT_EVERY = 20  # rows of a stream that has no split to hold out
WAY_OUT = "take --data_source chitchat or a file"


def open_hub(name, subset, commit):
    """The splits of a hub dataset: from the datasets cache, else streamed, as few samples must not download it all.

    Args:
        name: "owner/name". subset: one of its configurations, or None. commit: full revision, 40 hex digits.

    Returns:
        dict of a split's name to its rows, an iterable with `skip`. No row is read.

    Raises:
        UserError: there is no such subset.
        hub.Unreachable: the hub cannot give the dataset.
    """
    if splits := _prepared(name, subset, commit):
        return splits
    hub.probe(f"api/datasets/{name}/revision/{commit}")
    import datasets

    try:
        return retry(lambda: datasets.load_dataset(name, subset, streaming=True, revision=commit))
    except Exception as error:
        if found := re.search(r"(?:available configs|Available): \[(.+?)\]", str(error)):
            raise UserError(
                f"{name} has the subsets {found[1]}: name one of them as {name}:SUBSET."
            ) from error
        raise hub.Unreachable(hub.describe(error)) from error


def _prepared(name, subset, commit):
    """Every split, memory-mapped, if `datasets` has prepared this very subset and commit before; else {}."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = name.partition("/")
    short = camelcase_to_snakecase(short)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{short}" / (subset or "default")
    splits = {}
    for file in sorted(folder.glob(f"*/{commit}/{short}-*.arrow")):
        split = re.sub(r"-\d+-of-\d+$", "", file.stem.removeprefix(f"{short}-"))
        splits.setdefault(split, []).append(datasets.Dataset.from_file(str(file)))
    return {split: datasets.concatenate_datasets(parts) for split, parts in splits.items()}


def choose_splits(splits, split, where):
    """Which split trains and which is held out.

    Args:
        splits: names. split: the one wanted, or "": "train", or the only one. where: the dataset, for the message.

    Returns:
        (name, name or None): held out beside "train_x" is "test_x", "test", "validation_x" or "validation".

    Raises:
        UserError: no such split.
    """
    train = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if train not in splits:
        raise UserError(f"{where} has no split '{train}' but {', '.join(splits)}: name one as --data_split.")
    names = [name for kind in ("test", "validation") for name in (train.replace("train", kind, 1), kind)]
    return train, next((name for name in names if name in splits and name != train), None)


def read_rows(rows, where, column="", held_out=None, tally=None):
    """Texts of a split in order. A break is mended by opening again behind the last row, or it is an error.

    Args:
        rows: iterable of dicts with `skip`. where: what they are, for messages. column: as in `render`.
        held_out: True for every HELD_OUT_EVERY-th row alone, False for the others, None for all.
        tally: files.Tally of the rows read; it begins anew.

    Raises:
        UserError: the stream broke off, or a row holds no dialogue.
    """
    reader, done, tally = iter(rows), 0, tally or Tally()
    tally.seen = tally.empty = 0

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
                f"reading {where} broke off after {done:,} dialogues ({hub.describe(error)}); run again, or {WAY_OUT}."
            ) from error
        if row is None:
            return
        done += 1
        poll()
        if held_out in (None, done % HELD_OUT_EVERY == 0):
            text = render(row, f"{where} row {done}", column)
            if tally.keeps(text):
                yield text


def read_saved(rows, where, column="", backwards=False, tally=None):
    """Texts of a memory-mapped split, from either end.

    Args:
        rows: datasets.Dataset. where, column, tally: as in `read_rows`.

    Raises:
        UserError: a row holds no dialogue.
    """
    numbers, tally = range(len(rows)), tally or Tally()
    tally.seen = tally.empty = 0
    for number in reversed(numbers) if backwards else numbers:
        poll()
        text = render(rows[number], f"{where} row {number + 1}", column)
        if tally.keeps(text):
            yield text
