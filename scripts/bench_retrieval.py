"""What looking up costs: while generating, behind a long text, in evaluation, and among many places.

    python3 -m scripts.bench_retrieval                      # the network of config.py; settings are flags
    python3 -m scripts.bench_retrieval --parts long --json  # one of the parts

Ids are random, as frequent as words are (Zipf-Mandelbrot); weights and keys are random too, as times do not
depend on them. With and without retrieval take turns, and a ratio is the median over the turns. Seconds are
those of the process, which others on the machine do not lengthen, so take one thread (OMP_NUM_THREADS=1), or
--wall for several.
"""

import argparse
import contextlib
import itertools
import json
import time
from functools import partial
from statistics import median

import torch

from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import RetrievalSettings
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import evaluate_prediction, evaluate_retrieval
from newllm.flags import parse_args
from newllm.generate import State, generate, read
from newllm.models.baselines import build_model
from newllm.report.compare import figures_table
from newllm.retrieval.keys import Keys
from newllm.retrieval.lookup import Store, rounded
from newllm.retrieval.mixture import Retrieval
from newllm.saving.stop import Interrupt
from newllm.training.runtime import open_runtime, peak_memory_mb

VOCABULARY = 4096
PLACES = 100_000  # tokens of training text that are looked up
TURNS, TOKENS = 9, 30  # of generation: turns, and tokens in each
SHORT = 100  # tokens of a short text
SAMPLES = 64  # evaluated
LENGTHS = (5_000, 50_000, 500_000, 2_000_000)  # of the text so far
SIZES = (100_000, 1_000_000, 10_000_000)  # places
LOOKUPS = 50


def seconds_of(work, wall):
    """Seconds that a call takes: of the process, or of the wall."""
    now = time.perf_counter if wall else time.process_time
    start = now()
    work()
    return now() - start


def zipf(vocab_size):
    """Probabilities [V] of ids, the most frequent first: of 1 / (rank + 2.7)."""
    weights = 1 / (torch.arange(1, vocab_size + 1) + 2.7)
    return weights / weights.sum()


class Made:
    """A configuration's network, random samples [n, T+1], and a retrieval from PLACES of them."""

    def __init__(self, config, looks_up=True):
        self.config, self.runtime = config, open_runtime(config)
        length, draw = config.max_seq_length, torch.Generator().manual_seed(0)
        samples = -(-PLACES // length)
        ids = torch.multinomial(zipf(VOCABULARY), samples * (length + 1), True, generator=draw)
        self.ids = ids.view(samples, length + 1)
        self.model = build_model(config, VOCABULARY).to(self.runtime.device).eval()
        self.retrieval = self.filled(draw).to(self.runtime.device) if looks_up else None

    def filled(self, draw):
        settings = self.config.part(RetrievalSettings)
        if not settings.experts:
            raise UserError("retrieval 'none' costs nothing: leave it out.")
        widths = {"hidden": self.model.embed_dim, "contexts": self.model.context_dim}
        keys = Keys(settings.keys, VOCABULARY, widths)
        keys.fit({name: torch.randn(2 * width, width, generator=draw) for name, width in widths.items()})
        made = Retrieval(settings.experts, keys, VOCABULARY, window=settings.retrieval_window)
        made.ngram.fit(self.ids.numpy())

        def parts():
            for few in self.ids.split(32):
                places = {name: torch.randn(len(few), few.shape[1] - 1, n) for name, n in widths.items()}
                yield keys(few[:, :-1], **places).flatten(0, 1)

        made.store.fill(self.ids[:, :-1].flatten(), self.ids[:, 1:].flatten(), parts())
        torch.nn.init.normal_(made.gate.weight, generator=draw)
        return made

    def text(self, length):
        """Ids [length]: all samples end to end, as often as it takes."""
        ids = self.ids.flatten()
        return ids.repeat(-(-length // len(ids)))[:length].to(self.runtime.device)

    def seconds_a_token(self, retrieval, state, wall):
        """Of TOKENS drawn behind a text, whose State is given."""
        tokens = generate(self.model, [0], 2 + TOKENS, 0, retrieval=retrieval, before=state)
        list(itertools.islice(tokens, 2))
        drawn = []
        return seconds_of(lambda: drawn.extend(tokens), wall) / len(drawn)


def generation(config, wall, lengths=None):
    """Speed without and with retrieval in turns, and what is kept, behind texts of such lengths.

    Without any: a short text, and a window of text.
    """
    made = Made(config)
    alone = read(made.model, made.text(8))
    name = f"{config.num_layers} x {config.context_dim}, {torch.get_num_threads()} threads"
    for length in lengths or (SHORT, config.retrieval_window):
        past = long_past(made, length)
        ways = (None, alone), (made.retrieval, State(alone.recurrent, past))
        turns = [[made.seconds_a_token(*way, wall) for way in ways] for _ in range(TURNS)]
        without, with_it = (median(each) for each in zip(*turns, strict=True))
        yield dict(
            network=name, text_so_far=length, without_tok_s=1 / without, with_tok_s=1 / with_it,
            speed_kept=median(one / other for one, other in turns), ms_a_token=1e3 * with_it,
            state_mb=sum(part.untyped_storage().nbytes() for part in past) / 1e6,
        )  # fmt: skip


def long_past(made, length):
    """The text so far after so many tokens, read in pieces of the window."""
    retrieval, past = made.retrieval, made.retrieval.start(1, made.runtime.device)
    widths = {"hidden": made.model.embed_dim, "contexts": made.model.context_dim}
    for piece in made.text(length)[None].split(retrieval.window, 1):
        made_of = {name: torch.randn(*piece.shape, width).to(piece.device) for name, width in widths.items()}
        past = retrieval.remember(piece, past, **made_of)
    return past


def long(config, wall):
    """The same behind texts of LENGTHS."""
    return generation(config, wall, LENGTHS)


def evaluated(config, looks_up, wall):
    """Seconds of evaluating SAMPLES, the least of three, and the peak memory in MB of this process."""
    made = Made(config, looks_up)
    given = made.ids[:SAMPLES].int(), torch.ones(VOCABULARY), contextlib.nullcontext, made.runtime.device
    work = partial(evaluate_prediction, made.model, *given)
    if looks_up:
        work = partial(evaluate_retrieval, made.model, made.retrieval, *given)
    return min(seconds_of(work, wall) for _ in range(3)), peak_memory_mb()


def evaluation(config, wall):
    """Time and memory of evaluation, each way in a process of its own."""
    (alone, small), (both, large) = (call_apart(evaluated, config, way, wall) for way in (False, True))
    yield dict(
        samples=SAMPLES, without_s=alone, with_s=both, times=both / alone, without_mb=small, with_mb=large
    )


def places(config, wall):
    """A lookup of one token among SIZES places: mean over tokens as they come, and of the most frequent."""
    width, kept = Made(config).retrieval.keys.width, Retrieval([], Keys([], VOCABULARY, {}), VOCABULARY)
    draw, share = torch.Generator().manual_seed(0), zipf(VOCABULARY)
    some = torch.nn.functional.normalize(torch.randn(SIZES[0], width, generator=draw), dim=1)
    asked = torch.multinomial(share, LOOKUPS, True, generator=draw)
    for size in SIZES:
        store = Store(VOCABULARY, 0, width)
        counts = torch.multinomial(share, size, True, generator=draw).bincount(minlength=VOCABULARY)
        store.starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        store.rounded, store.following = rounded(some).repeat(size // SIZES[0], 1), torch.zeros(size).int()

        def look_up(tokens, store=store):
            for row, token in enumerate(tokens):
                store.nearest(token.view(1, 1), some[row].view(1, 1, -1), kept.neighbours)

        mean = 1e3 * seconds_of(partial(look_up, asked), wall) / LOOKUPS
        most = 1e3 * seconds_of(partial(look_up, torch.zeros(1, dtype=torch.int64)), wall)
        memory = (store.rounded.nbytes + store.following.nbytes) / 1e6
        yield dict(places=size, mean_ms=mean, most_frequent_ms=most, store_mb=memory)


PARTS = {"generation": generation, "long": long, "evaluation": evaluation, "places": places}


def chosen(text):
    """Parser of --parts."""
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    return names


def main(config, options):
    """Measure and print."""
    rows = {}
    with Interrupt(), torch.inference_mode():
        for name in options.parts:
            rows[name] = list(PARTS[name](config, options.wall))
            if not options.json:
                columns = [
                    (key, key, ",.2f" if isinstance(value, float) else "")
                    for key, value in rows[name][0].items()
                ]
                print(*figures_table(columns, rows[name]), "", sep="\n", flush=True)
    if options.json:
        print(json.dumps(rows))


def flags(parser):
    add = parser.add_argument
    add("--parts", type=chosen, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    add("--wall", action="store_true", help="time by the wall's clock, not the process's")
    add("--json", action="store_true", help="one JSON object instead of tables")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
