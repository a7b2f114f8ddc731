"""All pictures, in one look: of one run, of several, of sweeps against the loop.

Each function draws plain numbers to a PNG file, whose folder it makes; OSError where it cannot be written.
matplotlib loads with the first one.
"""

import contextlib
import itertools
import math

from newllm.report.compare import COUNTING, crossing
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
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E5E5E5",
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}  # fmt: skip
ARM_STYLES = {  # arms of a comparison whose contexts are drawn, in this order
    "untrained_frozen": ("untrained", UNTRAINED),
    "phase1_frozen": ("Phase 1", TRAINED),
    "phase1_shuffled": ("Phase 1, shuffled tokens", TRAINING_DATA | {"linestyle": ":"}),
    "phase1_finetuned": ("Phase 1, fine-tuned", dict(color="#000000", marker="s")),
    "end_to_end": ("end to end", COUNTED),
    "window": ("window", dict(color="#E69F00", marker="v", linestyle=":")),
}
ARM_LINES = {  # arms of a comparison whose perplexity is drawn against the tokens
    COUNTING: ("counting", COUNTED),
    "gru": ("GRU", TRAINING_DATA),
    "transformer": ("Transformer", dict(color="#E69F00", marker="v")),
    "phase1_frozen": ("Phase 1, frozen", UNTRAINED),
    "phase1_finetuned": ("Phase 1, fine-tuned", dict(color="#000000", marker="s")),
    "end_to_end": ("end to end", TRAINED),
}
MIXTURES = {  # of a run, in turn, with one more expert each
    "network": ("the network alone", REFERENCE | {"marker": "v"}),
    "ngram": ("+ counts of the training text (ngram)", UNTRAINED),
    "cache": ("+ places in the dialogue so far (cache)", TRAINING_DATA),
    "knn": ("+ places in the training text (knn)", TRAINED),
    "counting": ("all of these without the network", COUNTED),
}
CURVES = (  # of contexts: key, logarithmic axes, title, what is on the axes
    ("cold_start_curve", "y", "Convergence from a cold start", "sweeps", "distance from reading one by one"),
    ("memory_curve", "xy", "Memory", "tokens after one that was replaced (0.5: itself)",
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


def draw(panel, title, xlabel, ylabel, lines, log="", form="{x:g}"):
    """Lines on a panel, its words, and a legend of those with a label.

    Args:
        lines: (xs, ys, label or None, style) of each; xs of None: 1, 2, ...; one number as ys: a level. Of
            none the panel says so.
        log: logarithmic axes, "x", "y" or "xy". form: of the numbers below a logarithmic x, 1, 2, 5, 10 ...
    """
    for xs, ys, label, style in lines:
        if isinstance(ys, int | float):
            panel.axhline(ys, label=label, **style | {"marker": None})
            continue
        crowded = len(ys) > 20 and style.get("linestyle") != "none"  # points alone stay points
        look = style | {"marker": None} if crowded else style
        panel.plot(xs or range(1, len(ys) + 1), ys, label=label, **look)
        if xs is None:
            panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if not lines:
        panel.text(0.5, 0.5, "not measured", ha="center", color=REFERENCE["color"], transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])
        return
    if "y" in log and math.isfinite(panel.dataLim.minposy):  # infinite where nothing is above zero
        panel.set_yscale("log")
    if "x" in log and panel.lines:
        panel.set_xscale("log")
        number(panel.xaxis, form)
    if panel.get_legend_handles_labels()[1]:
        panel.legend()


def number(axis, form="{x:g}", steps=(1, 2, 5)):
    """Numbers at such steps of every power of ten, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(form)
    axis.set_minor_formatter(NullFormatter())


def loss_curve(record, path):
    """Loss by iteration of Phase 1 (left out of a run without one) and by epoch of Phase 2."""
    phase1, phase2 = record.phase1, record.phase2
    with figure(path, 1, 2 if phase1 else 1) as (panels,):
        if phase1:
            lines = [
                (None, phase1["cvfp"], "fixed-point consistency", TRAINED),
                (None, phase1["dist_reg"], f"distribution ({record.config['dist_reg']})", TRAINING_DATA),
            ]
            draw(panels[0], "Phase 1", "iteration", "loss", lines, "y")
        counted = (math.log(record.summary[f"val_ppl_{name}"]) for name in ("bigram", "kn"))
        lines = [
            (None, phase2["train_loss"], "training", TRAINING_DATA),
            (None, phase2["val_loss"], "validation", TRAINED),
            (None, record.untrained.get("val_loss"), "validation, untrained contexts", UNTRAINED),
            (None, next(counted), "bigram counts", COUNTED),
            (None, next(counted), "Kneser-Ney", REFERENCE),
        ]
        known = [line for line in lines if line[1]]  # a baseline has no untrained contexts
        draw(panels[-1], "Phase 2", "epoch", "loss (nats per token)", known)


def run_contexts(record, path):
    """What the contexts of a run are like at the end, beside untrained ones, and by iteration of Phase 1."""

    def network(style, label, curves, *ends):
        """Named with the exponent, which says how the curve of cold sweeps goes on; the last measured."""
        exponents = [record.summary.get(f"lyapunov_exponent{end}") for end in ends]
        known = [exponent for exponent in exponents if exponent is not None]
        name = f"{label}, Lyapunov exponent {known[-1]:+.2f}" if known else label
        return style, name, lambda key: as_curve(record.curves.get(key + curves))

    with figure(path, 3, 2) as panels:
        untrained = network(UNTRAINED, "untrained", "_untrained", "_untrained")
        last = _draw_contexts(panels, untrained, network(TRAINED, "trained", "", "", "_finetuned"))
        lines = [(None, 100 * record.summary["er_ceiling"], "effective rank of Gaussian noise", REFERENCE)]
        for key, before, label, style in (
            ("er", "er_train_untrained", "effective rank / width", TRAINED),
            ("converged", "converged_ratio_untrained", "converged tokens", COUNTED),
        ):
            lines.append((None, [100 * share for share in record.phase1.get(key, [])], label, style))
            lines.append((None, 100 * record.summary[before], None, style | {"linestyle": "--"}))
        draw(last, "Phase 1 (dashed: untrained)", "iteration", "% (training tokens)", lines)
        last.set(ylim=(0, 150), yticks=range(0, 101, 20))  # room for the legend
        last.legend(loc="upper left")


def by_position(record, path):
    """Perplexity by the position in a held-out sample, of a run's mixtures with one more expert each."""
    found = {name: as_curve(curve) for name, curve in record.curves["retrieval_by_position"].items()}
    perplexities, shares = [], []
    for name, (label, style) in MIXTURES.items():
        if curve := found.get(name):
            alone = found["network"]
            perplexities.append(([*curve], [math.exp(nats) for nats in curve.values()], label, style))
            against = [100 * math.exp(nats - alone[end]) for end, nats in curve.items()]
            shares.append(([*curve], against, None, style))
    with figure(path, 1, 2) as ((along, against),):
        xlabel = "tokens since the dialogue began (means over stretches)"
        draw(along, "Perplexity along a dialogue", xlabel, "held-out perplexity", perplexities, "xy")
        draw(against, "Against the network alone", xlabel, "% of the network's perplexity", shares, "x")
        against.set_ylim(0, 140)  # first tokens, which a network knows by heart, may lie far above


def context_curves(comparison, tokens, path):
    """Contexts of a comparison's arms at a budget, means over seeds."""
    curves = [
        (style, label, lambda key, arm=arm: comparison.curve(tokens, arm, key))
        for arm, (label, style) in ARM_STYLES.items()
    ]
    with figure(path, 2, 3) as panels:
        _draw_contexts(panels, *curves).set_axis_off()


def _draw_contexts(panels, *networks):
    """Draw what the contexts of several are like on all panels but the last, which is returned.

    Args:
        networks: (style, label, function of a key to {x: y} or None) of each.
    """
    *drawn, last = panels.flat
    named = set()
    for panel, (key, log, title, xlabel, ylabel) in zip(drawn, CURVES, strict=True):
        lines = []
        for style, label, curve_of in networks:
            if curve := curve_of(key):
                xs = [x or 0.5 for x in curve]  # zero has no place on a logarithmic axis
                # The first panel has the legend of all; what is drawn in another alone is named there.
                lines.append((xs, [*curve.values()], None if label in named else label, style))
                named.add(label)
        draw(panel, title, xlabel, ylabel, lines, log)
    _, memory, _, spectrum, _ = drawn
    if memory.lines:
        memory.axhline(1e-2, label="forgotten below", **REFERENCE)
        memory.legend(loc="lower left")
    if spectrum.lines:  # a LayerNorm takes one direction away: its value is rounding
        spectrum.set_ylim(bottom=1e-4 * max(max(line.get_ydata()) for line in spectrum.lines))
    return last


def perplexities(comparison, path):
    """Held-out perplexity of a comparison's arms against training tokens, alone and with retrieval."""
    with figure(path, 1, 2) as ((alone, with_all),):
        with_all.sharey(alone)
        for panel, title, key in (
            (alone, "Alone", "val_ppl"),
            (with_all, "With what is looked up", "val_ppl_retrieval"),
        ):
            lines = []
            for arm, (label, style) in ARM_LINES.items():
                known = [tokens for tokens in comparison.budgets if comparison.has(tokens, arm, key)]
                means = [comparison.mean(tokens, arm, key)[0] for tokens in known]
                lines.append((known, means, label if known else None, style))
            draw(panel, title, "training tokens", "held-out perplexity", lines, "xy", "{x:,.0f}")
            number(panel.yaxis, "{x:,.0f}", (1, 1.5, 2, 3, 5, 7))


def scale_ladder(summaries, path):
    """Perplexities, and the cost of a token, against training tokens, of two or more budgets, ascending."""
    from matplotlib.ticker import EngFormatter

    tokens = [summary["train_tokens"] for summary in summaries]
    short = EngFormatter(sep="")  # 10k, 1M

    def lines_of(*figures):
        """Of figures that every budget has: a baseline has no Phase 1."""
        found = []
        for value_of, label, style in figures:
            with contextlib.suppress(KeyError, ZeroDivisionError):
                found.append((tokens, [value_of(summary) for summary in summaries], label, style))
        return found

    with figure(path, 1, 3) as ((perplexity, cost, memory),):
        lines = lines_of(
            (lambda s: s["val_ppl"], "the network alone", TRAINING_DATA),
            (lambda s: s["val_ppl_kn"], "counting (Kneser-Ney)", UNTRAINED),
            (lambda s: s["val_ppl_retrieval_counting"], "counting with retrieval", COUNTED),
            (lambda s: s["val_ppl_retrieval"], "the network with retrieval", TRAINED),
        )
        crossed = crossing(summaries)
        if crossed and crossed > tokens[0] * 1.001:
            perplexity.axvline(crossed, label=f"crossing near {short(float(f'{crossed:.2g}'))}", **REFERENCE)
        draw(perplexity, "What it predicts", "training tokens", "held-out perplexity", lines, "xy", short)
        lines = lines_of(
            (lambda s: 1e3 * s["seconds"] / s["train_tokens"], "a whole run", TRAINED),
            (lambda s: 1e3 * s["seconds_retrieval"] / s["train_tokens"], "of it, retrieval", TRAINING_DATA),
            (lambda s: 1e3 / s["tok_per_s_phase1"], "a pass of Phase 1", UNTRAINED),
            (lambda s: 1e3 / s["tok_per_s_phase2"], "a pass of Phase 2", COUNTED),
        )
        draw(cost, "What it costs", "training tokens", "milliseconds a token", lines, "xy", short)
        for panel in (perplexity, cost):
            number(panel.yaxis)
        cost.set_ylim(top=5 * cost.get_ylim()[1])  # room for the legend
        peaks = [summary["peak_memory_mb"] for summary in summaries]
        draw(memory, "Peak memory", "training tokens", "MB", [(tokens, peaks, None, TRAINED)], "x", short)
        memory.set_ylim(0, 1.1 * max(peaks))


def predictability(rows, path):
    """Cold sweeps until the error is below 1 % against the Lyapunov exponent of all networks, a point each.

    The line is what the exponent alone says: an error that shrinks by its exponential a sweep, from 1.

    Args:
        rows: summaries of runs, or rows of a comparison; of each, the untrained contexts, those of Phase 1 if
            it trained, and those after training them further, as far as measured.

    Returns:
        How many points there are; without any, nothing is drawn.
    """
    points = {}  # label: [(exponent, sweeps or None)]
    for row in rows:
        labels = {"_untrained": "untrained", "_finetuned": "end to end"}
        if row.get("phase1_steps"):
            labels |= {"": "Phase 1", "_finetuned": "Phase 1, fine-tuned"}
        for end, label in labels.items():
            if row.get(f"lyapunov_exponent{end}") is not None:
                found = row[f"lyapunov_exponent{end}"], row[f"sweeps_to_1_percent{end}"]
                points.setdefault(label, []).append(found)
    if not points:
        return 0
    lines, most = [], 100  # where those stand that did not come so near
    for label, each in points.items():
        xs, ys = zip(*((exponent, sweeps or most) for exponent, sweeps in each), strict=True)
        lines.append((xs, ys, label, dict(ARM_STYLES.values())[label] | {"linestyle": "none"}))
    slowest = math.log(0.01) / most
    fastest = min(slowest, *(exponent for each in points.values() for exponent, _ in each))
    exponents = [fastest + (slowest - fastest) * i / 100 for i in range(101)]
    expected = [max(1, math.log(0.01) / exponent) for exponent in exponents]
    lines.append((exponents, expected, "as the exponent has it", REFERENCE))
    with figure(path, 1, 1) as ((panel,),):
        xlabel, ylabel = "Lyapunov exponent, nats a token", f"cold sweeps to 1 % error ({most}: not reached)"
        draw(panel, "When parallel reading works", xlabel, ylabel, lines, "y")
        panel.axvline(0, **REFERENCE | {"linewidth": 1})
        panel.set_ylim(1, 1.3 * most)
        number(panel.yaxis)
    return sum(map(len, points.values()))


def prefill_speed(rows, curves, exponents, path):
    """Error after each cold sweep, and how much sooner than the loop sweeps have a sequence, by its length.

    Args:
        rows: dicts of weights ("trained" or "untrained"), tokens, tolerance, by_sweeps and speed_up.
        curves: {weights: errors after 1, 2, ... sweeps}. exponents: {weights: Lyapunov exponent}.
    """
    from matplotlib.ticker import EngFormatter

    weights = {"trained": TRAINED, "untrained": UNTRAINED}
    reached = {}  # (weights, tolerance): (tokens, times as fast) of each length
    for row in rows:
        if row["by_sweeps"]:
            points = reached.setdefault((row["weights"], row["tolerance"]), [])
            points.append((row["tokens"], row["speed_up"]))
    with figure(path, 1, 2) as ((error, speed),):
        lines = [
            (None, errors, f"{name}, exponent {exponents[name]:+.2f}", weights[name])
            for name, errors in curves.items()
        ]
        draw(error, "Cold start", "sweeps", "distance to the loop's contexts, relative", lines, "y")
        smallest = min(e for errors in curves.values() for e in errors if e > 0)
        error.set_ylim(min(0.01, smallest) / 2, 4)  # slow stays slow to the eye
        looks = itertools.cycle((TRAINED, TRAINING_DATA, COUNTED))
        lines = []
        for (name, tolerance), points in reached.items():
            lines.append((*zip(*points, strict=True), f"{name}, to {tolerance:g}", next(looks)))
        for name in curves.keys() - {name for name, _ in reached}:
            lines.append(([], [], f"{name}: by the loop", weights[name]))
        lines.append((None, 1, "the loop", REFERENCE))
        ylabel = "times as fast as the loop"
        draw(speed, "Speed of sweeps", "tokens of one sequence", ylabel, lines, "x", EngFormatter(sep=""))
        lengths = [row["tokens"] for row in rows]
        speed.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
        speed.set_ylim(0, 1.6 * max(row["speed_up"] for row in rows))  # room for the legend
        speed.legend(loc="upper left", ncols=2)
