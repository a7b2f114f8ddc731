"""How fast the contexts of one long sequence come by parallel sweeps, beside the loop, and how exact.

    python3 -m scripts.prefill --num_samples 781    # untrained, and trained where checkpoint_dir has the run
    python3 -m scripts.prefill --trained --lengths 1000,10000 --tolerance 1e-2
    python3 -m scripts.prefill --json

The sequence is the run's data, training and validation ids end to end. The loop takes one step a token, in
fp32: for one token, converting the weights costs more than using them. Sweeps begin cold and go on until no
token's context would change by more than a tolerance: in the precision in effect as far as its rounding lets
them, from there on in fp32. Passes count the evaluations of an average token, sweeps those that depend on
each other. Both ways make contexts alone, from embeddings that are there already. Errors are distances to the
loop's contexts, relative to their norm: over all tokens, and of the worst one.
"""

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path

import torch

from config import ResidualConfig
from newllm.config import Range, expanded
from newllm.data.samples import load_data
from newllm.errors import UserError, exit_on_user_error
from newllm.fixed_point.diagnostics import cold_start
from newllm.fixed_point.solver import prefill
from newllm.flags import flag, parse_args
from newllm.memory import is_out_of_memory
from newllm.models.baselines import build_model
from newllm.models.pretrained import load_embedding
from newllm.progress import Progress
from newllm.report.compare import table
from newllm.report.pictures import prefill_speed
from newllm.report.record import new_run_id
from newllm.saving.trained import load_trained
from newllm.training.runtime import StepFunction, describe_device, open_runtime, peak_memory_mb, reason_of

LOOP_PIECE = 256  # tokens of the loop between two looks at the clock
CURVE_TOKENS, CURVE_SWEEPS = 2048, 32  # of the curve of errors, in fp32
COLUMNS = ("weights", "tokens", "tolerance", "passes", "sweeps", "error", "worst token", "loop s", "sweeps s")
COLUMNS += ("loop tok/s", "sweeps tok/s", "speed-up")


class Stream:
    """One long sequence and a network: its contexts by the loop and by sweeps, and what each takes.

    Args:
        ids: int64 [T] on the device. options: max_sweeps and piece.
    """

    def __init__(self, model, ids, runtime, options):
        self.width, self.runtime, self.options = model.context_dim, runtime, options
        self.step = StepFunction(model.step, runtime.compile)
        self.embeddings = model.embed(ids)[None]

    def clock(self):
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loop(self, lengths, label):
        """The reference: contexts [1, T, C], and the seconds after which it had each of the lengths."""
        length = self.embeddings.shape[1]
        contexts, seconds = self.embeddings.new_zeros(1, length, self.width), {}
        state = contexts[:, 0]
        # Not timed: first calls allocate and compile.
        self.step.trajectory(self.embeddings[:, :LOOP_PIECE], state)
        bounds = sorted({*range(0, length, LOOP_PIECE), *lengths, length})
        with Progress(label, length) as progress:
            started = self.clock()
            for first, last in itertools.pairwise(bounds):
                contexts[:, first:last] = self.step.trajectory(self.embeddings[:, first:last], state)
                state = contexts[:, last - 1]
                seconds[last] = self.clock() - started
                progress.update(last - first)
        return contexts, seconds

    def stages(self, tolerance):
        """[(precision, type, autocast, tolerance), ...] of sweeps, as low as the tolerance lets them be."""
        exact = "fp32", torch.float32, contextlib.nullcontext, tolerance
        dtype = self.runtime.storage_dtype
        if dtype == torch.float32:
            return [exact]
        rounding = torch.finfo(dtype).eps
        rough = self.runtime.precision, dtype, self.runtime.autocast, max(tolerance, rounding)
        return [rough, exact] if tolerance < rounding else [rough]

    def swept(self, length, tolerance):
        """Contexts [1, length, C] by sweeps, work by precision, whether they converged, seconds."""
        contexts, work = None, {}
        started = self.clock()
        for precision, dtype, autocast, enough in self.stages(tolerance):
            tokens = self.embeddings[:, :length].to(dtype)
            with autocast():
                contexts, _, stats = prefill(
                    self.step.contexts, tokens, self.width, enough, self.options.max_sweeps,
                    self.options.piece, guess_BTC=contexts,
                )  # fmt: skip
            work[precision] = {"passes": stats.passes, "sweeps": max(stats.sweeps)}
            if not all(stats.converged):
                break
        return contexts.float(), work, all(stats.converged), self.clock() - started


@torch.no_grad()
def measure(stream, options, weights, say):
    """Errors and speeds of one network, a row for each length and tolerance, and its curve of cold sweeps.

    A tolerance that sweeps do not reach is the last of its length: a tighter one would make the same sweeps.
    """
    reference, loop_seconds = stream.loop(options.lengths, f"loop, {weights}")
    stream.swept(min(options.lengths[0], options.piece), options.tolerance[0])  # not timed
    rows = []
    for length, tolerance in itertools.product(options.lengths, options.tolerance):
        if rows and rows[-1]["tokens"] == length and not rows[-1]["converged"]:
            continue
        contexts, work, converged, seconds = stream.swept(length, tolerance)
        truth, loop = reference[:, :length], loop_seconds[length]
        difference = contexts - truth
        rows.append({
            "weights": weights, "tokens": length, "tolerance": tolerance,
            "work": work, "converged": converged,
            "error": (difference.norm() / truth.norm()).item(),
            "worst_token_error": (difference.norm(dim=-1) / truth.norm(dim=-1)).max().item(),
            "loop_seconds": loop, "sweeps_seconds": seconds,
            "loop_tok_per_s": length / loop, "sweeps_tok_per_s": length / seconds,
            "speed_up": loop / seconds if converged else None,  # else what the loop gives was not reached
        })  # fmt: skip
        say(" | ".join(shown(rows[-1])))
    first = stream.embeddings[:, :CURVE_TOKENS], reference[:, :CURVE_TOKENS]
    errors, _ = cold_start(stream.step.contexts, *first, min(CURVE_SWEEPS, options.max_sweeps))
    return rows, errors


def surviving(stream, weights, say, measured):
    """What `measured` returns, begun anew when the compiler fails: at the second time as written."""
    while True:
        try:
            return measured()
        except Exception as error:
            if not stream.step.compiled or is_out_of_memory(error):
                raise
            reason = reason_of(error)
        say(stream.step.survive(f"the contexts of the {weights} network", reason))


def shown(row):
    """A row of the table."""
    passes = " + ".join(f"{done['passes']:.1f} {precision}" for precision, done in row["work"].items())
    sweeps = " + ".join(str(done["sweeps"]) for done in row["work"].values())
    return (
        row["weights"], f"{row['tokens']:,}", f"{row['tolerance']:g}", passes,
        sweeps if row["converged"] else f"not in {sweeps}",
        f"{row['error']:.1e}", f"{row['worst_token_error']:.1e}",
        f"{row['loop_seconds']:.2f}", f"{row['sweeps_seconds']:.2f}",
        f"{row['loop_tok_per_s']:,.0f}", f"{row['sweeps_tok_per_s']:,.0f}",
        f"{row['speed_up']:.1f}x" if row["converged"] else "-",
    )  # fmt: skip


def one_sequence(data, length):
    """int64 [length] of all samples end to end, and a line about them; repeated where that is longer."""
    ids = torch.cat([data.train.flatten(), data.val.flatten()])
    line = f"sequence: {len(ids):,} ids of {data.source}, training and validation samples end to end"
    if length > len(ids):
        line += f", repeated {length / len(ids):.1f} times for {length:,}"
    return ids.repeat(-(-length // len(ids)))[:length].long(), line


def report(config, options, say):
    """All that the command says, as a dict of plain values.

    Raises:
        UserError: bad data or checkpoint, no contexts in the model, or no trained weights where asked for.
    """
    if config.model_type not in ("context", "window"):
        raise UserError(f"model_type '{config.model_type}' has no context to sweep: use context or window.")
    runtime, data = open_runtime(config), load_data(config)
    pretrained = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
    ids, line = one_sequence(data, options.lengths[-1])
    model = build_model(config, data.vocab_size, pretrained).to(runtime.device).eval()
    made = {"device": describe_device(runtime), "sequence": line, "trained": None, "rows": [], "curves": {}}
    say(f"device: {made['device']}\n" + "\n".join([*data.notes, line]))

    def add(weights):
        stream = Stream(model, ids.to(runtime.device), runtime, options)
        rows, curve = surviving(stream, weights, say, lambda: measure(stream, options, weights, say))
        made["rows"] += rows
        made["curves"][weights] = curve

    if not options.trained:
        add("untrained")
    try:
        made["trained"], reason = load_trained(config, model, data.fingerprint), "run train.py first."
    except UserError as error:  # what was measured untrained is worth as much beside another run
        reason = str(error)
    if made["trained"]:
        say(f"trained: {made['trained']}")
        add("trained")
    elif options.trained:
        raise UserError(f"{config.checkpoint_dir} holds no trained weights of these settings: {reason}")
    else:
        say(f"trained: no weights of these settings in {config.checkpoint_dir}: {reason}")
    return made | {"peak_memory_mb": peak_memory_mb(), "config": config.to_dict()}


def main(config, options):
    """Measure, print and draw."""
    out = sys.stderr if options.json else sys.stdout  # with --json nothing but the object goes to stdout
    with contextlib.redirect_stdout(out):
        made = report(config, options, (lambda line: None) if options.json else print)
    usual = Path(config.checkpoint_dir) / "outputs" / "plots" / f"prefill_{new_run_id()}.png"
    path = Path(options.plot or usual)
    try:
        prefill_speed(made["rows"], made["curves"], path)
        line = f"plot: {path}"
    except OSError as error:  # a folder that refuses costs the picture, not the figures
        line = f"warning: {path} cannot be written ({error.strerror or error})"
    if options.json:
        print(json.dumps(made))
    else:
        print("\n" + "\n".join(table(COLUMNS, map(shown, made["rows"]))))
        print(f"\npeak memory: {made['peak_memory_mb']:,.0f} MB")
    print(line, file=out)


def numbers(kind, low, high, descending=False):
    """Parser of `a,b,c`: different numbers within bounds, in order."""

    def parse(text):
        try:
            values = sorted({kind(word.replace("_", "")) for word in text.split(",")}, reverse=descending)
        except ValueError:
            values = []
        if not values or not low <= min(values) <= max(values) <= high:
            raise UserError(f"numbers from {low:g} to {high:g} with commas between are wanted, not '{text}'.")
        return values

    return parse


def flags(parser):
    """The command's own flags."""
    add, most = parser.add_argument, 10**9
    lengths, tolerances = numbers(int, 1, most), numbers(float, 1e-6, 1, descending=True)
    small = "relative changes of a sweep that are small enough, comma-separated"
    add("--lengths", type=lengths, default="1000,10000,100000", help="tokens, comma-separated")
    add("--tolerance", type=tolerances, default="1e-2,1e-3,1e-4", help=small)
    whole = Range(1, most)
    add("--max_sweeps", type=flag("max_sweeps", int, whole), default=64, help="of a piece, at most")
    add("--piece", type=flag("piece", int, whole), default=4096, help="tokens swept at once")
    add("--trained", action="store_true", help="trained weights alone; without them an error")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--plot", type=expanded, help="PNG file (default: in outputs/plots of checkpoint_dir)")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
