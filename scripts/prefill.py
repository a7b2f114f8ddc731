"""How fast a long text is read, by parallel sweeps or the loop, whichever is faster, and how exactly.

    python3 -m scripts.prefill --num_samples 781    # untrained, and trained where checkpoint_dir has the run
    python3 -m scripts.prefill --trained --lengths 1000,10000 --tolerance 1e-2

The sequence is the run's data, training and validation ids end to end. The loop takes one step a token, in
fp32: for one token, converting the weights costs more than using them. Sweeps begin cold and go on until no
token's context would change by more than a tolerance. Passes count the evaluations of an average token,
sweeps those that depend on each other. Both ways make contexts alone, from embeddings that are there already.
Which of them reads a text is chosen by the network's Lyapunov exponent and a trial on its beginning, whose
time counts; `by loop` with passes says that the trial was lost.
Errors are distances to the loop's contexts, relative to their norm: over all tokens, and of the worst one; of
the prediction after the text, the largest difference of a probability. A trained model predicts with what it
looks up: its state after a text is the context and the keys of the last `retrieval_window` tokens.
"""

import contextlib
import itertools
import time
from pathlib import Path

import torch

from config import ResidualConfig
from newllm.config import expanded
from newllm.data.samples import load_data
from newllm.errors import UserError, exit_on_user_error
from newllm.fixed_point.diagnostics import cold_start, lyapunov_exponent
from newllm.fixed_point.solver import prefill, read_text
from newllm.flags import numbers, parse_args
from newllm.generate import after, predict
from newllm.memory import is_out_of_memory
from newllm.models.baselines import build_model
from newllm.models.pretrained import load_embedding
from newllm.progress import Progress
from newllm.report.compare import table
from newllm.report.pictures import prefill_speed
from newllm.report.record import new_run_id
from newllm.saving.checkpoint import only_reading
from newllm.saving.trained import open_retrieval
from newllm.training.runtime import describe_device, open_runtime, peak_memory_mb
from newllm.training.step_function import StepFunction, reason_of

PIECE, MAX_SWEEPS = 4096, 256  # tokens swept at once; sweeps expected, beyond which none is tried
LOOP_PIECE = 256  # tokens of the loop between two looks at the clock
CURVE_TOKENS, CURVE_SWEEPS = 2048, 32  # of the curve of errors, in fp32
EXPONENT_TOKENS, EXPONENT_LENGTH = 2048, 128  # behind the exponent, in stretches of so many
COLUMNS = (
    "weights", "tokens", "tolerance", "by", "passes", "sweeps", "error", "worst token", "prediction",
    "loop s", "seconds", "loop tok/s", "tok/s", "speed-up",
)  # fmt: skip


class Stream:
    """One long sequence, int64 [T] on the device, and a network: its contexts by the loop and by sweeps.

    Args:
        retrieval: what the network looks up, or None.
    """

    def __init__(self, model, ids, runtime, retrieval=None):
        self.model, self.ids, self.retrieval = model, ids, retrieval
        self.width, self.runtime = model.context_dim, runtime
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
        self.step.trajectory(self.embeddings[:, :LOOP_PIECE], state)  # not timed: it allocates and compiles
        bounds = sorted({*range(0, length, LOOP_PIECE), *lengths, length})
        with Progress(label, length) as progress:
            started = self.clock()
            for first, last in itertools.pairwise(bounds):
                contexts[:, first:last] = self.step.trajectory(self.embeddings[:, first:last], state)
                state = contexts[:, last - 1]
                seconds[last] = self.clock() - started
                progress.update(last - first)
        return contexts, seconds

    def exponent(self, contexts):
        """The network's Lyapunov exponent along the loop's contexts [1, T, C], nats a token."""
        count = min(EXPONENT_TOKENS, contexts.shape[1])
        length = min(EXPONENT_LENGTH, count)
        rows = [
            each[0, : count // length * length].unflatten(0, (-1, length))
            for each in (self.embeddings, contexts)
        ]
        return lyapunov_exponent(self.model.step, *rows)

    def read(self, length, tolerance, exponent, loop_seconds):
        """Read so many tokens the way that is faster.

        Args:
            exponent: of the network. loop_seconds: that the loop takes for a token.

        Returns:
            (contexts [1, length, C], Choice, work of sweeps by precision, seconds).
        """
        contexts, work = self.embeddings.new_zeros(1, length, self.width), {}

        def start(first):
            return contexts[:, first - 1] if first else self.embeddings.new_zeros(1, self.width)

        def loop(first, last):
            for low in range(first, last, LOOP_PIECE):
                high = min(low + LOOP_PIECE, last)
                contexts[:, low:high] = self.step.trajectory(self.embeddings[:, low:high], start(low))

        def sweeps(first, last, give_up):
            made, converged = self.swept(first, last, tolerance, start(first), give_up, work)
            contexts[:, first:last] = made
            return converged

        limits = tolerance, MAX_SWEEPS, loop_seconds
        started = self.clock()
        choice = read_text(length, loop, sweeps, exponent, *limits, self.clock, PIECE)
        seconds = self.clock() - started
        for done in work.values():
            done["passes"] /= length
        return contexts, choice, work, seconds

    def swept(self, first, last, tolerance, start_BC, give_up, work):
        """Contexts [1, last - first, C] by sweeps and whether they converged; their work is added, in tokens.

        A tolerance below the rounding of the precision in effect is finished in fp32.
        """
        runtime, contexts = self.runtime, None
        rounding = torch.finfo(runtime.storage_dtype).eps
        stages = [(runtime.precision, runtime.storage_dtype, runtime.autocast, max(tolerance, rounding))]
        if tolerance < rounding:
            stages.append(("fp32", torch.float32, contextlib.nullcontext, tolerance))
        before = 0, 0  # sweeps and evaluations of the first stage: they belong to what the piece costs

        def give_up_here(sweeps, evaluations, change):
            return give_up(before[0] + sweeps, before[1] + evaluations, change)

        for precision, dtype, autocast, enough in stages:
            tokens = self.embeddings[:, first:last].to(dtype)
            with autocast():
                contexts, _, stats = prefill(
                    self.step.contexts, tokens, self.width, enough, last - first, last - first,
                    start_BC, contexts, give_up_here,
                )  # fmt: skip
            sweeps, evaluations = stats.sweeps[0], stats.passes * (last - first)
            done = work.setdefault(precision, {"passes": 0, "sweeps": 0})
            done["passes"] += evaluations
            done["sweeps"] = max(done["sweeps"], sweeps)
            if not all(stats.converged):
                return contexts.float(), False
            before = sweeps, evaluations
        return contexts.float(), True

    def state(self, contexts):
        """What generation goes on from behind a text with contexts [1, T, C]."""
        return after(self.model, self.ids[: contexts.shape[1]], contexts[0], self.retrieval)

    def prediction(self, contexts):
        """Probabilities [V] of what follows a text with contexts [1, T, C]."""
        length = contexts.shape[1]
        state = self.state(contexts[:, : length - 1])
        logits, _ = predict(self.model, self.ids[length - 1 : length], self.retrieval, state)
        return logits[0].softmax(-1)


@torch.no_grad()
def measure(stream, weights, lengths, tolerances, say):
    """Errors and speeds of one network, a row for each length and tolerance, and its curve of cold sweeps.

    A tolerance at which the loop is faster is the last of its length: to a tighter one sweeps are slower.
    """
    reference, loop_seconds = stream.loop(lengths, f"loop, {weights}")
    exponent = stream.exponent(reference)
    a_token = {length: seconds / length for length, seconds in loop_seconds.items()}
    warm = min(lengths[0], PIECE)
    start = reference.new_zeros(1, stream.width)
    stream.swept(0, warm, tolerances[0], start, lambda count, *progress: count > 2, {})  # not timed
    rows = []
    for length, tolerance in itertools.product(lengths, tolerances):
        if rows and rows[-1]["tokens"] == length and not rows[-1]["by_sweeps"]:
            continue
        contexts, choice, work, seconds = stream.read(length, tolerance, exponent, a_token[length])
        by = "sweeps" if choice.by_sweeps else "the loop"
        say(f"{weights}, {length:,} tokens to {tolerance:g}: by {by} ({choice.why})")
        truth, loop = reference[:, :length], loop_seconds[length]
        difference = contexts - truth
        rows.append({
            "weights": weights, "tokens": length, "tolerance": tolerance,
            "work": work, "by_sweeps": choice.by_sweeps, "why": choice.why,
            "error": (difference.norm() / truth.norm()).item(),
            "worst_token_error": (difference.norm(dim=-1) / truth.norm(dim=-1)).max().item(),
            "prediction_error": (stream.prediction(contexts) - stream.prediction(truth)).abs().max().item(),
            "loop_seconds": loop, "seconds": seconds, "speed_up": loop / seconds,
        })  # fmt: skip
    first = stream.embeddings[:, :CURVE_TOKENS], reference[:, :CURVE_TOKENS]
    errors, _ = cold_start(stream.step.contexts, *first, CURVE_SWEEPS)
    return rows, errors, exponent


def shown(row):
    """A row of the table."""
    work, tokens, loop, seconds = row["work"], row["tokens"], row["loop_seconds"], row["seconds"]
    return (
        row["weights"], f"{tokens:,}", f"{row['tolerance']:g}", "sweeps" if row["by_sweeps"] else "loop",
        " + ".join(f"{done['passes']:.1f} {precision}" for precision, done in work.items()) or "-",
        " + ".join(str(done["sweeps"]) for done in work.values()) or "-",
        *(f"{row[name]:.1e}" for name in ("error", "worst_token_error", "prediction_error")),
        f"{loop:.2f}", f"{seconds:.2f}", f"{tokens / loop:,.0f}", f"{tokens / seconds:,.0f}",
        f"{row['speed_up']:.2f}x",
    )  # fmt: skip


def one_sequence(data, length):
    """int64 [length] of all samples end to end, and a line about them; repeated where that is longer."""
    ids = torch.cat([data.train.flatten(), data.val.flatten()])
    line = f"sequence: {len(ids):,} ids of {data.source}, training and validation samples end to end"
    if length > len(ids):
        line += f", repeated {length / len(ids):.1f} times for {length:,}"
    return ids.repeat(-(-length // len(ids)))[:length].long(), line


def report(config, options, say):
    """Measure the untrained network and the trained one, as far as asked for and there.

    Returns:
        {"rows": of both, "curves": {weights: errors after 1, 2, ... sweeps}, "exponents": {weights: nats}}.

    Raises:
        UserError: bad data or checkpoint, no contexts in the model, or no trained weights where asked for.
    """
    if config.model_type not in ("context", "window"):
        raise UserError(f"model_type '{config.model_type}' has no context to sweep: use context or window.")
    runtime, data = open_runtime(config), load_data(config)
    pretrained = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
    ids, line = one_sequence(data, options.lengths[-1])
    model = build_model(config, data.vocab_size, pretrained).to(runtime.device).eval()
    say("\n".join([f"device: {describe_device(runtime)}", *data.notes, line]))
    rows, curves, exponents = [], {}, {}

    def add(weights, retrieval=None):
        stream = Stream(model, ids.to(runtime.device), runtime, retrieval)
        asked = weights, options.lengths, options.tolerance, say
        try:
            measured = measure(stream, *asked)
        except Exception as error:
            if not stream.step.compiled or isinstance(error, UserError) or is_out_of_memory(error):
                raise
            say(stream.step.survive(f"the {weights} network", reason_of(error)))
            measured = measure(stream, *asked)
        more, curves[weights], exponents[weights] = measured
        rows.extend(more)

    if not options.trained:
        add("untrained")
    trained, notes = False, []
    try:
        with only_reading(config, data.fingerprint, runtime.group) as run:
            trained, notes = run.is_done("untrained"), run.notes
            if trained:
                run.restore(run.stage, model)
    except UserError as error:  # what was measured untrained is worth as much beside damaged files
        notes = [str(error)]
    line = "; ".join(notes) or "run train.py first."
    if not trained:
        line = f"{config.checkpoint_dir} holds no trained weights of these settings: {line}"
    if options.trained and not trained:
        raise UserError(line)
    say(f"trained: {line}")
    if trained:
        found = open_retrieval(config.checkpoint_dir, model, {"config": config.to_dict()}, say)
        if found:
            megabytes = found.window * (4 * found.keys.width + 8) / 1e6
            parts = f"{', '.join(found.experts)}; the state behind a text of any length"
            say(f"retrieval: {parts} has its last {found.window:,} tokens, {megabytes:.1f} MB at most")
            found.to(runtime.device)
        add("trained", found)
    return {"rows": rows, "curves": curves, "exponents": exponents}


def main(config, options):
    """Measure, print and draw."""
    made = report(config, options, print)
    print("\n" + "\n".join(table(COLUMNS, map(shown, made["rows"]))))
    print(f"\npeak memory: {peak_memory_mb():,.0f} MB")
    usual = Path(config.checkpoint_dir) / "outputs" / "plots" / f"prefill_{new_run_id()}.png"
    path = Path(options.plot or usual)
    try:
        prefill_speed(made["rows"], made["curves"], made["exponents"], path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another --plot.") from error
    print(f"plot: {path}")


def flags(parser):
    """The command's own flags."""
    add, small = parser.add_argument, "relative changes of a sweep that are small enough, comma-separated"
    add("--lengths", type=numbers("lengths"), default="1000,10000,100000", help="tokens, comma-separated")
    tolerances = numbers("tolerance", float, 1e-6, descending=True)
    add("--tolerance", type=tolerances, default="1e-2,1e-3,1e-4", help=small)
    add("--trained", action="store_true", help="trained weights alone; without them an error")
    add("--plot", type=expanded, help="PNG file (default: in outputs/plots of checkpoint_dir)")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
