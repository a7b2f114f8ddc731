"""Proof of exact resume: small runs are killed again and again and must end as if nothing had happened.

    python3 -m scripts.verify_resume --kills 100 --operations all

`--kills` kills runs at random moments, each several times, contexts frozen and fine-tuned by turns. `--operations` takes
a short run and kills it at the first operation on its files, then a fresh one at the second, and so on to the last. Every
kill is SIGKILL. A killed run is started again by the same settings, and must go on from its last complete save, leave no
temporary file, and end with the weights, metrics and histories of a run that nobody touched, bit for bit. The exit
status is 0 when all did; else what differs is named and the folder kept.
"""

import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.saving.files import Corrupt, load_sealed
from scripts.killed_child import KILLED, LATEST, LONGEST, SAVED, end, start

SETTINGS = dict(
    tokenizer="bpe", vocab_size=300, val_samples=4, max_seq_length=16, context_dim=16, embed_dim=16, num_layers=1,
    dropout=0.3, phase1_min_converged_ratio=1.0, dist_reg_weight=1.0, context_noise=0.1, val_quick_every_n_batches=2,
    precision="fp32", device="cpu", save_every_n_batches=3, save_min_seconds=0.0, save_every_minutes=0.0, artifacts=False,
)  # fmt: skip
LONG = dict(num_samples=30, min_batches=30, phase1_max_iterations=4, phase2_epochs=4)
SHORT = dict(num_samples=4, min_batches=4, phase1_max_iterations=1, phase2_epochs=2)
RUNS = {
    "frozen": LONG | {"freeze_context": True},
    "fine-tuned": LONG | {"freeze_context": False},
    "short": SHORT
    | {"freeze_context": False},  # trains a head on frozen contexts too, in its untrained stage
}
FILES = LATEST, "model_best.pt", "model_untrained_best.pt"
PROVEN = "model_state_dict", "results", "phase1_history", "phase2_history"
TIMED = "seconds", "seconds_phase1", "tok_per_s", "tok_per_s_phase1"  # of a session, not of the run


class Broken(Exception):
    """A run that did not come back as it must; the message says in what."""


def survive(folder, settings, alone, lives):
    """Kill a new run once for each of its lives, let it come to its end, and compare that with the run nobody touched.

    Args:
        folder: where to; made here, and deleted when all is well.
        alone: folder of the run nobody touched.
        lives: for each kill (seconds until it, operation at which the child kills itself or 0).

    Returns:
        (how often it was killed, what was wrong or None). It may end before all its lives are used.
    """
    kills, output = 0, folder / "output.txt"
    folder.mkdir()
    output.touch()  # a child may die before it opens it
    try:
        for seconds, kill_at in lives:
            status = end(start(folder, settings, kill_at), seconds)
            if status != -signal.SIGKILL:
                break
            if kill_at and KILLED not in output.read_text(encoding="utf-8"):
                raise Broken(f"it hangs: not at its end after {seconds} s")
            kills += 1
        else:
            status = restart(folder, settings)
        if status:
            raise Broken(
                f"it ended with status {status} ({output.read_text(encoding='utf-8').splitlines()[-1]})"
            )
        compare(folder, alone)
    except Broken as error:
        notes = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith(KILLED)]
        problem = "; ".join([str(error), *notes, f"kept as {folder}"])
        print(f"\n{problem}", flush=True)
        return kills, problem
    shutil.rmtree(folder)
    print(".", end="", flush=True)
    return kills, None


def restart(folder, settings):
    """Start a killed run again and let it come to its end.

    Returns:
        Its exit status.

    Raises:
        Broken: it had lost a complete save, or did not go on from the last one.
    """
    before = (folder / "output.txt").read_text(encoding="utf-8")
    found = read(folder / "checkpoints" / LATEST)
    number, saves = found["save_number"] if found else 0, before.count(SAVED)
    if number < saves:
        raise Broken(f"{saves} saves were complete, but the checkpoint is number {number}")
    status = end(start(folder, settings))
    output = (folder / "output.txt").read_text(encoding="utf-8")[len(before) :]
    if found and f"(save {number}, {found['saved_at']})" not in output:
        raise Broken(f"it did not go on from its save {number} ({found['epoch']})")
    return status


def compare(folder, alone):
    """Raises Broken when the run in a folder ended otherwise than the one in `alone`, or left temporary or damaged files."""
    for name in FILES:
        states = [read(path / "checkpoints" / name) for path in (folder, alone)]
        if not all(states):
            raise Broken(f"there is no {name}")
        if found := difference(*({key: state[key] for key in PROVEN} for state in states), name):
            raise Broken(f"{found} differs")
    if left := sorted(path.name for pattern in (".*.tmp", "*.corrupt*") for path in folder.rglob(pattern)):
        raise Broken(f"it ended equal, but files stay behind: {', '.join(left)}")


def read(path):
    """Content of a checkpoint file, None when there is none. Raises Broken when it is damaged."""
    try:
        return load_sealed(path)
    except FileNotFoundError:
        return None
    except Corrupt as error:
        raise Broken(str(error)) from error


def difference(one, other, name):
    """Name of the first thing in which two nested values differ in any bit, such as `name.results.phase1.er`, or None."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = ((key, one[key], other[key]) for key in one if key not in TIMED)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = zip(itertools.count(), one, other, strict=False)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
            _bytes(one), _bytes(other)
        )
        return None if alike else name
    else:
        return None if repr(one) == repr(other) else name  # NaN equals NaN, and 0.0 is not -0.0
    return next(filter(None, (difference(a, b, f"{name}.{key}") for key, a, b in pairs)), None)


def _bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def random_chain(scratch, settings, seconds, options, chain):
    """Kill runs at random moments, one run after another, until this chain's share of all kills is used.

    Args:
        scratch: folder of all runs; settings, seconds: of each kind of run, and how long it takes when nobody kills it.
        options: the command line; chain: which one of its `jobs` chains this is.

    Returns:
        List of what `survive` says.
    """
    source, verdicts = random.Random(f"{options.seed} {chain}"), []
    left = len(range(chain, options.kills, options.jobs))
    while left:
        kind = ("frozen", "fine-tuned")[(chain + len(verdicts)) % 2]
        lives = [
            (seconds[kind] * source.random() ** 2, 0) for _ in range(left)
        ]  # squared: often soon after a restart
        kills, problem = survive(
            scratch / f"random_{chain}_{len(verdicts)}", settings[kind], scratch / kind, lives
        )
        verdicts.append((kills, problem))
        left = 0 if problem and not kills else left - kills
    return verdicts


def operation_chain(scratch, settings, seconds, options, chain):
    """Kill a new run at each operation in this chain's share, until one comes to its end. As `random_chain`."""
    verdicts = []
    for number in itertools.count(1 + chain * options.operations, options.jobs * options.operations):
        folder = scratch / f"operation_{number}"
        verdicts.append(survive(folder, settings["short"], scratch / "short", [(LONGEST, number)]))
        if not verdicts[-1][0]:
            return verdicts


def every(text):
    """Step from one operation to the next: a number, or `all`."""
    return 1 if text == "all" else int(text)


def parse(arguments):
    """The command line.

    Raises:
        UserError: a number below its bound, or a system without fork.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills at random moments (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument(
        "--operations",
        type=every,
        default=0,
        help="`all`: kill at each one; K: at each K-th (default: 0, none)",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: as many as cores)"
    )
    options = parser.parse_args(arguments)
    if options.kills < 0 or options.operations < 0 or options.jobs < 1:
        raise UserError(
            "--kills and --operations must be 0 or more and --jobs 1 or more: give other numbers."
        )
    if not hasattr(os, "fork"):
        raise UserError(
            "this system has no fork, by which each run gets a process of its own: use Linux or macOS."
        )
    return options


def prepare(scratch, kinds):
    """Write the corpus, and let a run of each kind come to its end untouched.

    Returns:
        (settings, seconds it took), each by kind.

    Raises:
        UserError: a run failed by itself.
    """
    source, words = (
        random.Random(0),
        ["a", "bad", "dot", "kin", "lust", "move", "born", "dawn", "kiln", "lorn", "best"],
    )
    texts = [" ".join(source.choices(words, k=20)) for _ in range(60)]
    corpus = scratch / "dialogues.txt"
    corpus.write_text(
        "\n\n".join(f"User: {text[:30]}\nAssistant: {text[30:]}" for text in texts), encoding="utf-8"
    )
    settings = {kind: SETTINGS | RUNS[kind] | {"data_source": str(corpus)} for kind in kinds}
    seconds = {}
    for kind in kinds:
        (scratch / kind).mkdir()
        started = time.monotonic()
        if status := end(start(scratch / kind, settings[kind])):
            output = scratch / kind / "output.txt"
            raise UserError(
                f"a run that nobody killed failed with status {status}: see its output, {output}."
            )
        seconds[kind] = time.monotonic() - started
    return settings, seconds


def main(arguments=None):
    """Kill, continue, compare. Returns whether all runs ended as those nobody touched."""
    options = parse(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    scratch = Path(tempfile.mkdtemp(prefix="verify_resume_")).resolve()
    proofs = [
        proof for proof, wanted in zip(PROOFS, (options.kills, options.operations), strict=True) if wanted
    ]
    settings, seconds = prepare(scratch, [kind for _, kinds, _ in proofs for kind in kinds])
    problems = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for chain, _, sentence in proofs:
            started = time.monotonic()
            work = functools.partial(chain, scratch, settings, seconds, options)
            verdicts = [verdict for part in pool.map(work, range(options.jobs)) for verdict in part]
            figures = dict(
                kills=sum(kills for kills, _ in verdicts),
                good=sum(kills for kills, problem in verdicts if not problem),
                runs=len(verdicts),
                equal=sum(not problem for _, problem in verdicts),
                seconds=time.monotonic() - started,
            )
            print(f"\n{sentence.format(**figures)}", flush=True)
            problems += [problem for _, problem in verdicts if problem]
    if problems:
        print(f"DIFFERENT: {problems[0]}")
    else:
        shutil.rmtree(scratch)
    return not problems


PROOFS = (  # chain, kinds of run, what is said of it
    (
        random_chain,
        ("frozen", "fine-tuned"),
        "{kills} kills at random moments: {good}/{kills} died by SIGKILL and resumed; "
        "{equal}/{runs} runs ended equal bit for bit; {seconds:.0f} s",
    ),
    (
        operation_chain,
        ("short",),
        "{kills} operations: {good}/{kills} died by SIGKILL, resumed and ended equal bit for bit; {seconds:.0f} s",
    ),
)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(0 if main() else 1)
