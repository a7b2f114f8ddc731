"""All pictures, in one look: of one run, of several, of sweeps against the loop.

Each function draws plain numbers to a PNG file, whose folder it makes; OSError where it cannot be written.
matplotlib loads with the first one.
"""

import contextlib
import itertools
import math

from newllm.report.compare import FINETUNED, growth
from newllm.report.record import as_curve

DPI = 150
PANEL = (5.0, 3.6)  # inches

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and dashes do so without any colour.
TRAINED = dict(color="#0072B2", marker="o")
TRAINING_DATA = dict(color="#CC79A7", marker="s")
UNTRAINED = dict(color="#D55E00", marker="^", linestyle="--")
COUNTED = dict(color="#009E73", marker="D", linestyle="-.")
REFERENCE = dict(color="#666666", linestyle=":", linewidth=1.5)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}
ARM_STYLES = {  # arms of a comparison whose contexts are drawn, in this order
    "untrained_frozen": UNTRAINED | {"label": "untrained"},
    "phase1_frozen": TRAINED | {"label": "Phase 1"},
    "phase1_shuffled": TRAINING_DATA | {"label": "Phase 1, shuffled tokens", "linestyle": ":"},
    "phase1_finetuned": dict(color="#000000", marker="s", label="Phase 1, fine-tuned"),
    "end_to_end": COUNTED | {"label": "end to end"},
    "window": dict(color="#E69F00", marker="v", linestyle=":", label="window"),
}


CURVES = (  # of contexts: key, logarithmic axes, title, what is on the axes
    ("cold_start_curve", "y", "Convergence from a cold start", "sweeps", "distance from the trajectory"),
    ("memory_curve", "xy", "Memory", "tokens since a token was replaced (first point: none)",
     "change of the context"),
    ("past_capacity_by_lag", "", "Tokens that a linear probe reads", "tokens back", "held-out $R^2$"),
    ("spectrum", "y", "Singular values", "rank", "share of their sum"),
    ("bpb_by_context", "x", "What the model uses", "tokens that the context is made of", "bits per byte"),
)  # fmt: skip


@contextlib.contextmanager
def figure(path, rows, columns):
    """Panels to draw on, [rows][columns]; at the end they are written to the path."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a screen and keep every figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
        yield drawing.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=DPI)


def logarithmic(panel, axes, form="{x:g}"):
    """Logarithmic axes, "x", "y" or "xy", with labels at 1, 2, 5, 10 and so on, written by `form`."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())


def _by_step(panel, values, **style):
    """A line over 1, 2, ... with whole numbers below it."""
    panel.plot(range(1, len(values) + 1), values, **style)
    panel.xaxis.get_major_locator().set_params(integer=True)


def _level(panel, value, style, label):
    panel.axhline(value, label=label, **style | {"marker": None})


def loss_curve(record, path):
    """Loss by iteration of Phase 1 (left out of a run without one) and by epoch of Phase 2."""
    with figure(path, 1, 2 if record.phase1 else 1) as (panels,):
        if record.phase1:
            first = panels[0]
            _by_step(first, record.phase1["cvfp"], label="fixed-point consistency", **TRAINED)
            distribution = f"distribution ({record.config['dist_reg']})"
            _by_step(first, record.phase1["dist_reg"], label=distribution, **TRAINING_DATA)
            first.set(title="Phase 1", xlabel="iteration", ylabel="loss", yscale="log")
            first.legend()
        second = panels[-1]
        _by_step(second, record.phase2["train_loss"], label="training", **TRAINING_DATA)
        _by_step(second, record.phase2["val_loss"], label="validation", **TRAINED)
        if control := record.untrained.get("val_loss"):
            _by_step(second, control, label="validation, untrained contexts", **UNTRAINED)
        for name, label, style in (("bigram", "bigram counts", COUNTED), ("kn", "Kneser-Ney", REFERENCE)):
            if perplexity := record.summary.get(f"val_ppl_{name}"):
                _level(second, math.log(perplexity), style, label)
        second.set(title="Phase 2", xlabel="epoch", ylabel="loss (nats per token)")
        second.legend()


def run_contexts(record, path):
    """What the contexts of a run are like at the end, beside untrained ones, and by iteration of Phase 1."""
    summary = record.summary
    with figure(path, 3, 2) as panels:
        last = _draw_contexts(
            panels,
            (UNTRAINED | {"label": "untrained"}, lambda key: as_curve(record.curves.get(f"{key}_untrained"))),
            (TRAINED | {"label": "trained"}, lambda key: as_curve(record.curves.get(key))),
        )
        for key, untrained, label, style in (
            ("er", "er_train_untrained", "effective rank / width", TRAINED),
            ("converged", "converged_ratio_untrained", "converged tokens", COUNTED),
        ):
            _by_step(last, [100 * share for share in record.phase1.get(key, [])], label=label, **style)
            _level(last, 100 * summary[untrained], style | {"linestyle": "--"}, None)
        _level(last, 100 * summary["er_ceiling"], REFERENCE, "effective rank of Gaussian noise")
        last.set(
            title="Phase 1 (dashed: untrained)",
            xlabel="iteration",
            ylabel="% (training tokens)",
            ylim=(0, 102),
        )
        last.legend()


def context_curves(comparison, tokens, path):
    """Contexts of a comparison's arms at a budget, means over seeds, and what dist_reg_weight trades."""
    with figure(path, 2, 3) as panels:
        curves = [
            (style, lambda key, arm=arm: comparison.curve(tokens, arm, key))
            for arm, style in ARM_STYLES.items()
        ]
        trade = _draw_contexts(panels, *curves)
        arms = comparison.weights(tokens)
        best = min((comparison.mean(tokens, arm, "val_ppl")[0] for _, arm in arms), default=1)
        for key, unit, label, style in (
            ("er_val", 1, "effective rank (share)", TRAINED),
            ("val_ppl", best, "perplexity / best", UNTRAINED),
            ("memory_horizon", 16, "memory horizon / 16 tokens", COUNTED),
        ):
            values = [comparison.mean(tokens, arm, key)[0] / unit for _, arm in arms]
            trade.plot([weight for weight, _ in arms], values, label=label, **style)
        trade.set(title="The trade-off", xlabel="dist_reg_weight")
        trade.legend()


def _draw_contexts(panels, *curves):
    """Draw what several networks' contexts are like on all panels but the last, which is returned.

    Args:
        curves: (style with a label, function of a key to {x: y} or None) of each network.
    """
    *drawn, last = panels.flat
    named = set()
    for panel, (key, logarithms, title, xlabel, ylabel) in zip(drawn, CURVES, strict=True):
        for style, curve_of in curves:
            if curve := curve_of(key):
                xs = [x or 0.5 for x in curve]  # zero has no place on a logarithmic axis
                look = style | ({"marker": None} if len(curve) > 20 else {})
                # The first panel has the legend of all; what is drawn in another alone is named there.
                look |= {"label": None} if style["label"] in named else {}
                named.add(style["label"])
                panel.plot(xs, [*curve.values()], **look)
        panel.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if panel.lines and "x" in logarithms:
            logarithmic(panel, "x")
        if "y" in logarithms:
            panel.set_yscale("log")
        if panel.get_legend_handles_labels()[1]:
            panel.legend()
    _, memory, _, spectrum, _ = drawn
    _level(memory, 1e-2, REFERENCE, None)
    if spectrum.lines:  # a LayerNorm takes one direction away: its value is rounding
        spectrum.set_ylim(bottom=1e-4 * max(max(line.get_ydata()) for line in spectrum.lines))
    return last


def comparison_points(comparison, tokens, path):
    """Bits per byte of a comparison's arms at a budget with their interval over seeds, and a run's time."""
    with figure(path, 1, 2) as ((bits, seconds),):
        for arm in reversed(comparison.arms(tokens)):
            mean, half = comparison.mean(tokens, arm, "val_bpb")
            colour = TRAINED["color"] if arm == FINETUNED else REFERENCE["color"]
            # Points, not bars: an axis that does not begin at zero would make lengths lie.
            bits.errorbar(mean, arm, xerr=half, capsize=2.5, color=colour, marker="o")
            seconds.plot([comparison.seconds(tokens, arm)], [arm], color=colour, marker="o")
        bits.set_title(f"{tokens:,} training tokens")
        bits.set_xlabel("validation bits per byte (mean, 95 % over seeds)")
        seconds.set(title="Time", xlabel="training time of the fastest seed (s)", yticklabels=[])
        seconds.set_xlim(left=0)


def scale_ladder(summaries, path):
    """Time, memory, rank and perplexity against training tokens, of two or more budgets, ascending."""
    from matplotlib.ticker import EngFormatter

    tokens = [summary["train_tokens"] for summary in summaries]

    def draw(panel, key, label, style, scale=1):
        values = [summary.get(key) for summary in summaries]
        if None not in values:  # a baseline has no contexts, a control no untrained ones
            panel.plot(tokens, [scale * value for value in values], label=label, **style)

    with figure(path, 2, 2) as ((time, memory), (rank, perplexity)):
        for panel, key, unit in ((time, "seconds", "s"), (memory, "peak_memory_mb", "MB")):
            intercept, slope, line = growth(summaries, key, unit)
            panel.plot(
                tokens, [intercept + slope * count / 1000 for count in tokens], label=line, **REFERENCE
            )
            draw(panel, key, None, TRAINED | {"linestyle": "none"})
        time.set(title="Time of a whole run", ylabel="wall time (s)")
        memory.set(title="Peak memory", ylabel="peak memory (MB)")
        draw(rank, "er_train", "training tokens", TRAINING_DATA, 100)
        draw(rank, "er_val", "validation tokens", TRAINED, 100)
        draw(rank, "er_val_untrained", "validation, untrained network", UNTRAINED, 100)
        draw(rank, "er_ceiling", "ceiling (Gaussian noise)", REFERENCE, 100)
        rank.set(title="Effective rank of the contexts", ylabel="effective rank (% of the width)")
        draw(perplexity, "val_ppl", "trained", TRAINED)
        draw(perplexity, "val_ppl_untrained_context", "untrained contexts", UNTRAINED)
        draw(perplexity, "val_ppl_bigram", "bigram counts", COUNTED)
        perplexity.set(title="Language model", ylabel="validation perplexity")
        for panel in (time, memory, rank, perplexity):
            panel.set(xlabel="training tokens", ylim=(0, None) if panel in (time, memory) else None)
            panel.yaxis.set_major_formatter("{x:,g}")
            # Time and memory stay linear: over a logarithmic axis a straight line would look like an explosion.
            if panel in (rank, perplexity):
                logarithmic(panel, "x")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
            panel.legend()
            panel.set_visible(bool(panel.lines))


def prefill_speed(rows, curves, path):
    """Error after each cold sweep, and how much sooner than the loop sweeps have a sequence, by its length.

    Args:
        rows: dicts of weights ("trained" or "untrained"), tokens, tolerance and speed_up, which is None where
            sweeps did not reach the tolerance.
        curves: {weights: errors after 1, 2, ... sweeps}.
    """
    from matplotlib.ticker import EngFormatter

    weights = {"trained": TRAINED, "untrained": UNTRAINED}
    lines = {}  # (weights, tolerance): (tokens, speed)
    for row in rows:
        if row["speed_up"]:
            lines.setdefault((row["weights"], row["tolerance"]), []).append((row["tokens"], row["speed_up"]))
    with figure(path, 1, 2) as ((error, speed),):
        for name, errors in curves.items():
            error.plot(range(1, len(errors) + 1), errors, label=name, **weights[name])
            if name not in {row["weights"] for row in rows if row["speed_up"]}:
                speed.plot([], [], label=f"{name}: does not converge", **weights[name])
        error.set(title="Cold start", xlabel="sweeps", yscale="log")
        error.set_ylabel("distance to the loop's contexts, relative")
        smallest = min(e for errors in curves.values() for e in errors if e > 0)
        error.set_ylim(min(0.01, smallest) / 2, 4)  # slow stays slow to the eye
        looks = itertools.cycle((TRAINED, TRAINING_DATA, COUNTED))
        for (name, tolerance), points in lines.items():
            label = f"{name}, to {tolerance:g}"
            speed.plot(*zip(*points, strict=True), label=label, **next(looks))
        _level(speed, 1, REFERENCE, "the loop")
        speed.set(title="Speed of sweeps", xlabel="tokens of one sequence")
        speed.set_ylabel("times as fast as the loop")
        speed.set_ylim(0, 1.6 * max([1, *(row["speed_up"] or 1 for row in rows)]))  # room for the legend
        logarithmic(speed, "x", EngFormatter(sep=""))
        lengths = [row["tokens"] for row in rows]
        speed.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
        speed.legend(loc="upper left", ncols=2)
        error.legend()
