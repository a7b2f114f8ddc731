"""Dialogues to samples: disjoint splits, the cache file."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from itertools import chain, islice

import torch

from newllm.data.dialogues import available, find_corpus
from newllm.data.packing import later_pieces, pack, text_digest
from newllm.data.tokens import GPT2_FILES, Tokenizer, choose_tokenizer, tokenizer_choice, train_bpe
from newllm.errors import UserError
from newllm.progress import silent
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder

ENOUGH_TO_FIT = 320  # samples: a gate has few weights, and what is found for each place is held in memory
FORMAT_VERSION = 1  # raise it when rendering, packing or the file's fields change: other files are not read


@dataclass(frozen=True, eq=False)
class TokenData:
    """Training and validation samples from disjoint dialogues; each sample is L predictions, so L+1 ids."""

    train: torch.Tensor  # int32 [num_samples, L+1]
    val: torch.Tensor  # int32 [val_samples, L+1]
    tokenizer: Tokenizer
    token_bytes: torch.Tensor  # int32 [V]: UTF-8 bytes of each id
    source: str  # name of the corpus
    notes: list[str]  # lines to print: what is used and why
    fingerprint: str  # SHA-256 over ids and tokenizer: the identity of the data, for checkpoints
    held_back: torch.Tensor | None = None  # int32 [n, L+1]: of the training samples, to fit retrieval on
    origins: torch.Tensor | None = None  # int64 [num_samples]: equal where samples share dialogues, if any do

    @property
    def vocab_size(self):
        return self.tokenizer.vocab_size


def load_data(settings, progress=silent):
    """TokenData for newllm.config.DataSettings.

    With `tune_share` the last training samples take the place of those held out, and with `fit_share` the
    last of the others are for fitting retrieval alone.

    Args:
        progress: as newllm.progress.Progress.

    Raises:
        UserError: the source, tokenizer or cache folder cannot be had, or there are too few dialogues.
    """
    data = _load_samples(settings, progress)
    if settings.tune_share:
        note = "tuning: validates on the last {:,} training samples and trains on the others"
        data = _cut(data, "tune_share", settings.tune_share, "val", note, "")
    if settings.fit_share:
        note = "retrieval is fitted on the last {:,} training samples, and all else trains on the others"
        data = _cut(data, "fit_share", settings.fit_share, "held_back", note, "fit")
    return data


def cut_size(setting, share, samples):
    """How many of so many training samples `tune_share` or `fit_share` takes; whole dialogues may be more."""
    count = max(1, round(share * samples))
    return min(count, ENOUGH_TO_FIT) if setting == "fit_share" else count


def _cut(data, setting, share, name, note, mark):
    """Data whose last training samples, all those of the last dialogues, are the field `name` instead."""
    origins = torch.arange(len(data.train)) if data.origins is None else data.origins
    count = cut_size(setting, share, len(data.train))
    cut = origins >= origins.sort().values[-count]
    if cut.all():
        raise UserError(f"{setting} leaves none of {len(data.train)} training samples: use more num_samples.")
    count = cut.sum().item()
    fingerprint = hashlib.sha256(f"{data.fingerprint} {mark}{count}".encode()).hexdigest()
    kept = dict(train=data.train[~cut], origins=origins[~cut]) | {name: data.train[cut]}
    notes = [*data.notes, note.format(count)]
    return dataclasses.replace(data, **kept, notes=notes, fingerprint=fingerprint)


def shared_runs(data, words=8):
    """Share of the runs of so many words of each validation sample that training samples have too, a list.

    Dialogues are disjoint as wholes; this says how much of their wording they share all the same.
    """

    def runs(sample):
        text = data.tokenizer.decode(sample.tolist()).split()
        return [tuple(text[start : start + words]) for start in range(len(text) - words + 1)]

    known = {run for sample in data.train for run in runs(sample)}
    shares = []
    for sample in data.val:
        own = runs(sample)
        shares.append(sum(run in known for run in own) / max(1, len(own)))
    return shares


def _load_samples(settings, progress):
    """Training and held-out samples: from the cache, if possible without the hub, else built and cached."""
    folder = usable_folder(settings.cache_dir, "cache_dir")
    chosen = functools.cache(lambda: choose_tokenizer(tokenizer_choice(settings)))
    notes = []
    for corpus, kind in _preferences(settings, chosen):
        path = _cache_path(folder, corpus, kind, settings)
        if payload := _read_cache(path, notes):
            notes.insert(0, f"cache hit: {path}")
            break
    if payload is None:
        payload = _build(corpus, chosen()[0], settings, progress) | {"recipe": path.name}
        try:
            save_sealed(payload, path)
        except OSError as error:
            notes.append(f"cache: {path} could not be written ({error}); the next run builds the data again")
    if path.exists():
        for stray in folder.glob(f".{path.name}.*.tmp"):  # of builders that were killed, or lost the race
            with contextlib.suppress(OSError):
                stray.unlink()
    tokenizer = Tokenizer(payload["tokenizer_name"], payload["tokenizer_json"])
    note = f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids"
    if tokenizer.name == "bpe":
        reason = chosen()[1]
        note += ", trained on the training dialogues" + (f" ({reason})" if reason else "")
    return TokenData(
        **{name: payload[name] for name in ("train", "val", "source", "fingerprint")},
        origins=payload.get("origins"),
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        notes=[corpus.note, note, *payload["remarks"], *notes],
    )


# Building


def _build(corpus, tokenizer, settings, progress):
    """Both splits and the tokenizer (trained here if None) as the content of a cache file."""
    wanted, length = settings.num_samples, settings.max_seq_length
    stream = corpus.train()
    head, held, trained = [], set(), tokenizer is None
    # A bpe tokenizer sees the first num_samples training dialogues: each sample starts with a dialogue of its
    # own, so these lie within the training budget whatever the tokenizer. Held-out texts among them are taken
    # out, and as the held-out dialogues in use depend on the tokenizer, until the two are disjoint.
    if trained:
        head = list(islice(stream, wanted))
    while True:
        lesson = [text for text in head if text_digest(text) not in held]
        if trained:
            tokenizer = train_bpe(lesson, settings.vocab_size, progress)
        val, taken, _ = pack(corpus.held_out(), tokenizer, settings.val_samples, length)
        if set(taken).isdisjoint(map(text_digest, lesson)):
            break
        held.update(taken)
    with progress("data", wanted * length) as bar:
        unread = chain(head, stream)
        train, origins, remarks = _training(corpus, unread, set(taken), tokenizer, wanted, length, bar.update)
    if len(train) < wanted or len(val) < settings.val_samples:
        raise UserError(
            f"{wanted:,} training + {settings.val_samples:,} validation samples of {length} tokens are more "
            f"than {corpus.name} gives ({len(train):,} + {len(val):,}): lower num_samples or val_samples."
        )
    payload = dict(
        source=corpus.name, remarks=corpus.remarks() + remarks, train=train, val=val,
        tokenizer_name=tokenizer.name, tokenizer_json=tokenizer.to_json(),
        fingerprint=_fingerprint(train, val, tokenizer.to_json()),
    )  # fmt: skip
    return payload if origins is None else payload | {"origins": origins}


def _training(corpus, texts, held, tokenizer, wanted, length, advance):
    """(Training samples, their origins as in TokenData, remarks).

    Each sample is the beginning of a dialogue of its own as long as there are dialogues, then a later piece.

    Args:
        texts: iterator of the corpus's, of which those held out, whose digests are `held`, are left out.
        advance: as in `pack`.
    """
    copies, remarks = [], []
    train, taken, starts = pack(_apart(texts, held, copies), tokenizer, wanted, length, advance)
    assert held.isdisjoint(taken)
    origins, missing = None, wanted - len(train)
    if missing:
        numbers, pieces = [], list(train)
        for number, ids in later_pieces(lambda: _apart(corpus.train(), held, []), tokenizer, length):
            numbers.append(number)
            pieces.append(ids)
            advance(length)
            if len(numbers) == missing:
                break
        if numbers:
            remarks.append(
                f"data: {len(numbers):,} of {wanted:,} training samples are later pieces of dialogues, as "
                f"{corpus.name} gives only {len(train):,} that begin with one"
            )
            begun_in = torch.searchsorted(torch.tensor(starts), torch.tensor(numbers), right=True) - 1
            origins = torch.cat([torch.arange(len(train)), begun_in])
            train = torch.stack(pieces)
        if corpus.one_list:  # read to its end, where those held out lie themselves
            copies = copies[len(set(copies)) :]
    if copies:
        remarks.append(f"data: {len(copies):,} training dialogues with the text of a held-out one left out")
    return train, origins, remarks


def _apart(texts, held, copies):
    """Texts whose digests are not held out; those of the others go into `copies`."""
    for text in texts:
        digest = text_digest(text)
        if digest in held:
            copies.append(digest)
        else:
            yield text


def _fingerprint(train, val, tokenizer_json):
    digest = hashlib.sha256(tokenizer_json.encode())
    for ids in (train, val):
        digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    return digest.hexdigest()


# Cache


def _preferences(settings, chosen):
    """Pairs of corpus and tokenizer ("gpt2", "bpe" or a fingerprint), best first; the last can be had.

    What may ask the hub is done behind the pairs that need it not: opening the corpus, and `chosen`, a
    function that gives the tokenizer as `choose_tokenizer`.
    """
    choice = tokenizer_choice(settings)
    corpus, reached = find_corpus(settings.data_source, settings.data_split, settings.data_column), None
    while corpus is not reached:
        if choice == "auto":
            yield corpus, "gpt2"
        if choice in ("gpt2", "bpe"):
            yield corpus, choice
        elif chosen()[0] is None:
            yield corpus, "bpe"
        elif choice != "auto":
            yield corpus, chosen()[0].fingerprint
        corpus, reached = available(corpus, settings.data_source), corpus


def _cache_path(folder, corpus, kind, settings):
    """Where the data of a recipe lies; the name carries the recipe's digest."""
    trained_here = [settings.vocab_size, importlib.metadata.version("tokenizers")]
    recipe = {
        "format": FORMAT_VERSION,
        "corpus": corpus.identity,
        "tokenizer": {"gpt2": GPT2_FILES, "bpe": trained_here}.get(kind, kind),
        "samples": [settings.num_samples, settings.val_samples, settings.max_seq_length],
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{corpus.name}_{settings.num_samples}samples_{settings.max_seq_length}len-{key}.pt"


def _read_cache(path, notes):
    """Content of a cache file, or None; if it is there and not usable, `notes` get the reason."""
    try:
        payload = load_sealed(path)
        if not isinstance(payload, dict) or payload.get("recipe") != path.name:
            raise Corrupt("made for another recipe")
        return payload
    except FileNotFoundError:
        return None
    except OSError as error:
        why = str(error).removeprefix(f"{path} ")
        notes.append(f"cache: {path} was damaged or foreign ({why}) and is replaced when it is built")
        return None
