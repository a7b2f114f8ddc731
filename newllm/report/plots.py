"""Pictures of several runs: a ladder of budgets, the arms of a comparison, sweeps against the loop."""

import itertools

from newllm.report.compare import scale_fits
from newllm.report.run_plots import context_panels
from newllm.report.style import (
    COUNTED,
    REFERENCE,
    TRAINED,
    TRAINING_DATA,
    UNTRAINED,
    figure,
    logarithmic,
)


def scale_ladder(summaries, path):
    """Time, memory, effective rank and perplexity against training tokens.

    Args:
        summaries: what train.main returns, of two or more budgets, ascending.
        path: of the PNG file; its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.ticker import EngFormatter

    tokens = [s["train_tokens"] for s in summaries]
    first, growth = tokens[0], tokens[-1] / tokens[0]
    with figure(path, 2, 2) as ((time, memory), (rank, perplexity)):

        def draw(panel, key, label=None, scale=1, **style):
            if all(
                s.get(key) is not None for s in summaries
            ):  # a baseline has no contexts, a control no untrained ones
                panel.plot(tokens, [scale * s[key] for s in summaries], label=label, **style)

        fits = zip(
            (time, memory), scale_fits(summaries), ("seconds", "peak_memory_mb"), ("s", "MB"), strict=True
        )
        for panel, fit, key, unit in fits:
            line = [first * growth ** (step / 100) for step in range(101)]
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

        if growth > 10:
            # Memory stays linear: over a logarithmic axis of tokens a straight line would look like an explosion.
            logarithmic(time, "xy")
            for panel in (rank, perplexity):
                if panel.lines:
                    logarithmic(panel, "x")
        memory.set_ylim(bottom=0)
        for panel in (time, memory, rank, perplexity):
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set_xlabel("training tokens")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.legend()


def comparison_points(comparison, tokens, path):
    """Bits per byte of every arm at a budget with their interval over seeds, and what a run of it takes.

    Args:
        comparison: newllm.report.compare.Comparison. tokens: one of its budgets.
        path: of the PNG file; its folder is made.
    """
    arms = comparison.arms(tokens)[::-1]
    with figure(path, 1, 2) as ((bits, seconds),):
        for arm in arms:
            mean, half = comparison.mean(tokens, arm, "val_bpb")
            style = TRAINED if arm == comparison.reference else REFERENCE | {"marker": "o"}
            point = dict(color=style["color"], marker=style["marker"])
            # Points, not bars: an axis that does not begin at zero would make lengths lie.
            bits.errorbar(mean, arm, xerr=half, capsize=2.5, **point)
            seconds.plot([comparison.seconds(tokens, arm)], [arm], **point)
        bits.set(
            title=f"{tokens:,} training tokens", xlabel="validation bits per byte (mean, 95 % over seeds)"
        )
        seconds.set(title="Time", xlabel="training time of the fastest seed (s)")
        seconds.set_xlim(left=0)
        seconds.set_yticklabels([])


ARM_STYLES = {  # arms whose contexts are drawn, in this order
    "untrained_frozen": UNTRAINED | {"label": "untrained"},
    "phase1_frozen": TRAINED | {"label": "Phase 1"},
    "phase1_shuffled": TRAINING_DATA | {"label": "Phase 1, shuffled tokens", "linestyle": ":"},
    "phase1_finetuned": dict(color="#000000", marker="s", label="Phase 1, fine-tuned"),
    "end_to_end": COUNTED | {"label": "end to end"},
    "window": dict(color="#E69F00", marker="v", linestyle=":", label="window"),
}


def context_curves(comparison, tokens, path):
    """What the contexts of several arms are like, as means over seeds: convergence, memory, rank, use, and what w trades.

    Args:
        comparison: newllm.report.compare.Comparison. tokens: one of its budgets.
        path: of the PNG file; its folder is made.
    """
    with figure(path, 2, 3) as ((cold, memory, past), (spectrum, use, trade)):
        curves = [
            (style, lambda key, arm=arm: comparison.curve(tokens, arm, key))
            for arm, style in ARM_STYLES.items()
        ]
        context_panels(curves, cold=cold, memory=memory, past=past, spectrum=spectrum, use=use)
        # The first panel has the legend of the others; what is drawn here alone is named here.
        named = set(cold.get_legend_handles_labels()[1])
        if alone := [line for line in use.get_lines() if line.get_label() not in named]:
            use.legend(handles=alone)
        weights = sorted(comparison.by_setting(tokens, "dist_reg_weight", "phase1_"))
        for key, style, label in (
            ("er_val", TRAINED, "effective rank (share)"),
            ("val_ppl", UNTRAINED, "perplexity / best"),
        ):
            points = [comparison.mean(tokens, arm, key)[0] for _, arm in weights]
            scale = min(points, default=1) if key == "val_ppl" else 1
            trade.plot([w for w, _ in weights], [p / scale for p in points], **style, label=label)
        horizons = [comparison.mean(tokens, arm, "memory_horizon")[0] / 16 for _, arm in weights]
        trade.plot([w for w, _ in weights], horizons, **COUNTED, label="memory horizon / 16 tokens")
        trade.set(title="The trade-off", xlabel="dist_reg_weight")
        if weights:
            trade.legend()


def prefill_speed(rows, curves, path):
    """Error after each cold sweep, and how much sooner than the loop sweeps have a sequence, by its length.

    Args:
        rows: dicts of weights ("trained" or "untrained"), tokens, tolerance and speed_up, which is None where sweeps did not
            reach the tolerance; by length, each with the loosest tolerance first.
        curves: {weights: errors after 1, 2, ... sweeps}.
        path: of the PNG file; its folder is made.
    """
    from matplotlib.ticker import EngFormatter

    weights = {"trained": TRAINED, "untrained": UNTRAINED}
    with figure(path, 1, 2) as ((error, speed),):
        for name, errors in curves.items():
            error.plot(range(1, len(errors) + 1), errors, label=name, **weights[name])
        error.set(
            title="Cold start",
            xlabel="sweeps",
            ylabel="distance to the loop's contexts, relative",
            yscale="log",
        )
        error.set_ylim(
            min(0.01, *(e for errors in curves.values() for e in errors if e > 0)) / 2, 4
        )  # slow stays slow to the eye

        tolerances = sorted({row["tolerance"] for row in rows}, reverse=True)
        styles = dict(zip(tolerances, itertools.cycle((TRAINED, TRAINING_DATA, COUNTED)), strict=False))
        for name, tolerance in itertools.product(weights, tolerances):
            points = [
                r for r in rows if (r["weights"], r["tolerance"]) == (name, tolerance) and r["speed_up"]
            ]
            if points:
                style = styles[tolerance] | ({"linestyle": "--"} if name == "untrained" else {})
                pairs = [r["tokens"] for r in points], [r["speed_up"] for r in points]
                speed.plot(*pairs, label=f"{name}, to {tolerance:g}", **style)
        for name in curves:
            if not any(r["speed_up"] for r in rows if r["weights"] == name):
                speed.plot([], [], label=f"{name}: does not converge", **weights[name])
        speed.axhline(1, label="the loop", **REFERENCE)
        speed.set(
            title="Speed of sweeps", xlabel="tokens of one sequence", ylabel="times as fast as the loop"
        )
        speed.set_ylim(0, 1.6 * max([1, *(r["speed_up"] or 0 for r in rows)]))  # room for the legend
        logarithmic(speed, "x")
        speed.set_xlim(min(r["tokens"] for r in rows) / 1.2, max(r["tokens"] for r in rows) * 1.2)
        speed.xaxis.set_major_formatter(EngFormatter(sep=""))
        speed.legend(loc="upper left", ncols=2)
        error.legend()
