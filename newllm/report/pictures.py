"""All pictures, in one look: of one run, of several, of sweeps against the loop.

Each function draws plain numbers to a PNG file, whose folder it makes; OSError where it cannot be written.
matplotlib loads with the first one.
"""

import contextlib
import itertools
import math

from newllm.report.compare import scale_fits
from newllm.report.record import as_curve

DPI = 150
PANEL = (5.0, 3.6)  # inches

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and dashes do so without any colour.
TRAINED = dict(color="#0072B2", marker="o")
TRAINING_DATA = dict(color="#CC79A7", marker="s")
UNTRAINED = dict(color="#D55E00", marker="^", linestyle="--")
COUNTED = dict(color="#009E73", marker="D", linestyle="-.")
REFERENCE = dict(color="#666666", linestyle=":", linewidth=1.5)
NO_MARKER = {"marker": None}
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


def logarithmic(panel, axes):
    """Logarithmic axes, "x", "y" or "xy", with labels at 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())


def _by_step(panel, values, **style):
    """A line over 1, 2, ... with whole numbers below it."""
    panel.plot(range(1, len(values) + 1), values, **style)
    panel.xaxis.get_major_locator().set_params(integer=True)


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
                second.axhline(math.log(perplexity), label=label, **style | NO_MARKER)
        second.set(title="Phase 2", xlabel="epoch", ylabel="loss (nats per token)")
        second.legend()


def run_contexts(record, path):
    """Rank and convergence by iteration of Phase 1, and the contexts at the end, beside untrained ones."""
    summary = record.summary
    with figure(path, 3, 2) as ((rank, converged), (cold, memory), (spectrum, use)):
        for panel, key, untrained, title in (
            (rank, "er", "er_train_untrained", "Effective rank"),
            (converged, "converged", "converged_ratio_untrained", "Converged tokens"),
        ):
            _by_step(panel, [100 * share for share in record.phase1.get(key, [])], label="Phase 1", **TRAINED)
            panel.axhline(100 * summary[untrained], label="untrained", **UNTRAINED | NO_MARKER)
            panel.set(title=title, xlabel="iteration of Phase 1", ylim=(0, 102))
        rank.axhline(100 * summary["er_ceiling"], label="ceiling (Gaussian noise)", **REFERENCE)
        rank.set_ylabel("% of the width, training tokens")
        converged.set_ylabel("% of the training tokens")
        rank.legend()
        curves = [
            (UNTRAINED | {"label": "untrained"}, lambda key: as_curve(record.curves.get(f"{key}_untrained"))),
            (TRAINED | {"label": "trained"}, lambda key: as_curve(record.curves.get(key))),
        ]
        _draw_contexts(curves, cold, memory, spectrum, use)


def context_curves(comparison, tokens, path):
    """Contexts of a comparison's arms at a budget, means over seeds, and what dist_reg_weight trades."""
    with figure(path, 2, 3) as ((cold, memory, past), (spectrum, use, trade)):
        curves = [
            (style, lambda key, arm=arm: comparison.curve(tokens, arm, key))
            for arm, style in ARM_STYLES.items()
        ]
        _draw_contexts(curves, cold, memory, spectrum, use)
        _draw_curves(past, curves, "past_capacity_by_lag")
        past.set(title="Tokens that a linear probe reads", xlabel="tokens back", ylabel="held-out $R^2$")
        # The first panel has the legend of the others; what is drawn here alone is named here.
        named = set(cold.get_legend_handles_labels()[1])
        if alone := [line for line in use.get_lines() if line.get_label() not in named]:
            use.legend(handles=alone)
        arms = sorted(comparison.by_setting(tokens, "dist_reg_weight", "phase1_"))
        weights = [weight for weight, _ in arms]
        ranks, perplexities, horizons = (
            [comparison.mean(tokens, arm, key)[0] for _, arm in arms]
            for key in ("er_val", "val_ppl", "memory_horizon")
        )
        best = min(perplexities, default=1)
        trade.plot(weights, ranks, **TRAINED, label="effective rank (share)")
        trade.plot(weights, [ppl / best for ppl in perplexities], **UNTRAINED, label="perplexity / best")
        trade.plot(weights, [h / 16 for h in horizons], **COUNTED, label="memory horizon / 16 tokens")
        trade.set(title="The trade-off", xlabel="dist_reg_weight")
        if weights:
            trade.legend()


def _draw_curves(panel, curves, key, first=None):
    """One line a network: curves is a list of (style with a label, function of a key to {x: y} or None)."""
    for style, curve_of in curves:
        if curve := curve_of(key):
            xs = [x or first or x for x in curve]
            panel.plot(xs, [*curve.values()], **style | (NO_MARKER if len(curve) > 20 else {}))


def _draw_contexts(curves, cold, memory, spectrum, use):
    """Draw what several networks' contexts are like on a panel each."""
    _draw_curves(cold, curves, "cold_start_curve")
    cold.set(title="Convergence from a cold start", xlabel="sweeps", yscale="log")
    cold.set_ylabel("distance from the trajectory")
    _draw_curves(memory, curves, "memory_curve", first=0.5)  # zero has no place on a logarithmic axis
    memory.set(title="Memory", xlabel="tokens since a token was replaced (first point: none)", yscale="log")
    memory.set_ylabel("change of the context")
    memory.axhline(1e-2, **REFERENCE)
    _draw_curves(spectrum, curves, "spectrum")
    spectrum.set(title="Singular values", xlabel="rank", ylabel="share of their sum", yscale="log")
    if spectrum.lines:  # a LayerNorm takes one direction away: its value is rounding
        spectrum.set_ylim(bottom=1e-4 * max(max(line.get_ydata()) for line in spectrum.lines))
    _draw_curves(use, curves, "bpb_by_context")
    use.set(title="What the model uses", xlabel="tokens that the context is made of", ylabel="bits per byte")
    for panel in (memory, use):
        if any(len(line.get_xdata()) > 2 for line in panel.lines):  # more than the ends of a horizontal line
            logarithmic(panel, "x")
            panel.xaxis.set_major_formatter("{x:g}")
    if cold.lines:
        cold.legend()


def comparison_points(comparison, tokens, path):
    """Bits per byte of a comparison's arms at a budget with their interval over seeds, and a run's time."""
    with figure(path, 1, 2) as ((bits, seconds),):
        for arm in reversed(comparison.arms(tokens)):
            mean, half = comparison.mean(tokens, arm, "val_bpb")
            colour = TRAINED["color"] if arm == comparison.reference else REFERENCE["color"]
            point = dict(color=colour, marker="o")
            # Points, not bars: an axis that does not begin at zero would make lengths lie.
            bits.errorbar(mean, arm, xerr=half, capsize=2.5, **point)
            seconds.plot([comparison.seconds(tokens, arm)], [arm], **point)
        bits.set_title(f"{tokens:,} training tokens")
        bits.set_xlabel("validation bits per byte (mean, 95 % over seeds)")
        seconds.set(title="Time", xlabel="training time of the fastest seed (s)", yticklabels=[])
        seconds.set_xlim(left=0)


def scale_ladder(summaries, path):
    """Time, memory, rank and perplexity against training tokens, of two or more budgets, ascending."""
    from matplotlib.ticker import EngFormatter

    tokens = [summary["train_tokens"] for summary in summaries]
    growth = tokens[-1] / tokens[0]

    def draw(panel, key, label=None, scale=1, **style):
        values = [summary.get(key) for summary in summaries]
        if None not in values:  # a baseline has no contexts, a control no untrained ones
            panel.plot(tokens, [scale * value for value in values], label=label, **style)

    with figure(path, 2, 2) as ((time, memory), (rank, perplexity)):
        time_fit, memory_fit = scale_fits(summaries)
        line = [tokens[0] * growth ** (step / 100) for step in range(101)]
        for panel, fit, key, unit in (
            (time, time_fit, "seconds", "s"),
            (memory, memory_fit, "peak_memory_mb", "MB"),
        ):
            label = f"{fit.text(unit)}\n$R^2$ = {fit.r_squared:.4f}"
            panel.plot(line, [fit(x / 1000) for x in line], label=label, **REFERENCE)
            draw(panel, key, **TRAINED | {"linestyle": "none"})
        time.set(title="Time of a whole run", ylabel="wall time (s)")
        memory.set(title="Peak memory", ylabel="peak memory (MB)")
        draw(rank, "er_train", "training tokens", 100, **TRAINING_DATA)
        draw(rank, "er_val", "validation tokens", 100, **TRAINED)
        draw(rank, "er_val_untrained", "validation, untrained network", 100, **UNTRAINED)
        draw(rank, "er_ceiling", "ceiling (Gaussian noise)", 100, **REFERENCE)
        rank.set(title="Effective rank of the contexts", ylabel="effective rank (% of the width)")
        draw(perplexity, "val_ppl", "trained", **TRAINED)
        draw(perplexity, "val_ppl_untrained_context", "untrained contexts", **UNTRAINED)
        if perplexity.lines:
            draw(perplexity, "val_ppl_bigram", "bigram counts", **COUNTED)
        perplexity.set(title="Language model", ylabel="validation perplexity")
        for panel in (time, memory, rank, perplexity):
            if not panel.lines:
                panel.set_axis_off()
                continue
            # Memory stays linear: over a logarithmic axis a straight line would look like an explosion.
            if growth > 10 and panel is not memory:
                logarithmic(panel, "xy" if panel is time else "x")
            panel.set_xlabel("training tokens")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.legend()
        memory.set_ylim(bottom=0)


def prefill_speed(rows, curves, path):
    """Error after each cold sweep, and how much sooner than the loop sweeps have a sequence, by its length.

    Args:
        rows: dicts of weights ("trained" or "untrained"), tokens, tolerance and speed_up, which is None where
            sweeps did not reach the tolerance.
        curves: {weights: errors after 1, 2, ... sweeps}.
    """
    from matplotlib.ticker import EngFormatter

    weights = {"trained": TRAINED, "untrained": UNTRAINED}
    lengths = [row["tokens"] for row in rows]
    reached = [row for row in rows if row["speed_up"]]
    tolerances = sorted({row["tolerance"] for row in rows}, reverse=True)
    colours = dict(zip(tolerances, itertools.cycle((TRAINED, TRAINING_DATA, COUNTED)), strict=False))
    with figure(path, 1, 2) as ((error, speed),):
        for name, errors in curves.items():
            error.plot(range(1, len(errors) + 1), errors, label=name, **weights[name])
        error.set(title="Cold start", xlabel="sweeps", yscale="log")
        error.set_ylabel("distance to the loop's contexts, relative")
        smallest = min(e for errors in curves.values() for e in errors if e > 0)
        error.set_ylim(min(0.01, smallest) / 2, 4)  # slow stays slow to the eye
        for name, tolerance in itertools.product(weights, tolerances):
            points = [row for row in reached if (row["weights"], row["tolerance"]) == (name, tolerance)]
            if points:
                style = colours[tolerance] | ({"linestyle": "--"} if name == "untrained" else {})
                ratios = [row["speed_up"] for row in points]
                label = f"{name}, to {tolerance:g}"
                speed.plot([row["tokens"] for row in points], ratios, label=label, **style)
        for name in curves:
            if name not in {row["weights"] for row in reached}:
                speed.plot([], [], label=f"{name}: does not converge", **weights[name])
        speed.axhline(1, label="the loop", **REFERENCE)
        speed.set(
            title="Speed of sweeps", xlabel="tokens of one sequence", ylabel="times as fast as the loop"
        )
        speed.set_ylim(0, 1.6 * max([1, *(row["speed_up"] for row in reached)]))  # room for the legend
        logarithmic(speed, "x")
        speed.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
        speed.xaxis.set_major_formatter(EngFormatter(sep=""))
        speed.legend(loc="upper left", ncols=2)
        error.legend()
