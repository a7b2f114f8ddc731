"""Pictures of one run, from its record: losses of both phases, and what its contexts are like."""

import math

from newllm.report.record import as_curve
from newllm.report.style import COUNTED, REFERENCE, TRAINED, TRAINING_DATA, UNTRAINED, figure, logarithmic


def loss_curve(record, path):
    """Loss by iteration of Phase 1 (left out of a run without one) and by epoch of Phase 2.

    Args:
        record: newllm.report.record.Record. path: of the PNG file; its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    with figure(path, 1, 1 + bool(record.phase1)) as (panels,):
        *first, second = panels
        for panel in first:
            for key, label, style in (
                ("cvfp", "fixed-point consistency", TRAINED),
                ("dist_reg", f"distribution ({record.config['dist_reg']})", TRAINING_DATA),
            ):
                panel.plot(*_by_step(record.phase1[key]), label=label, **style)
            panel.set(title="Phase 1", xlabel="iteration", ylabel="loss", yscale="log")
        for key, label, style in (
            ("train_loss", "training", TRAINING_DATA),
            ("val_loss", "validation", TRAINED),
        ):
            second.plot(*_by_step(record.phase2.get(key, [])), label=label, **style)
        if control := record.untrained.get("val_loss"):
            second.plot(*_by_step(control), label="validation, untrained contexts", **UNTRAINED)
        for name, label, style in (("bigram", "bigram counts", COUNTED), ("kn", "Kneser-Ney", REFERENCE)):
            if perplexity := record.summary.get(f"val_ppl_{name}"):
                second.axhline(math.log(perplexity), label=label, **style | {"marker": None})
        second.set(title="Phase 2", xlabel="epoch", ylabel="loss (nats per token)")
        for panel in panels:
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend()


def context_curves(record, path):
    """Rank and convergence by iteration of Phase 1, and the contexts at the end, all beside the untrained network.

    Args:
        record: newllm.report.record.Record of a run that has contexts. path: of the PNG file; its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    summary = record.summary
    with figure(path, 3, 2) as ((rank, converged), (cold, memory), (spectrum, use)):
        for panel, key, untrained, title in (
            (rank, "er", "er_train_untrained", "Effective rank"),
            (converged, "converged", "converged_ratio_untrained", "Converged tokens"),
        ):
            steps, shares = _by_step(record.phase1.get(key, []))
            panel.plot(steps, [100 * share for share in shares], label="Phase 1", **TRAINED)
            panel.axhline(100 * summary[untrained], label="untrained", **UNTRAINED | {"marker": None})
            panel.set(title=title, xlabel="iteration of Phase 1", ylim=(0, 102))
            panel.xaxis.get_major_locator().set_params(integer=True)
        rank.axhline(100 * summary["er_ceiling"], label="ceiling (Gaussian noise)", **REFERENCE)
        rank.set_ylabel("% of the width, training tokens")
        converged.set_ylabel("% of the training tokens")
        rank.legend()
        curves = [
            (UNTRAINED | {"label": "untrained"}, lambda key: as_curve(record.curves.get(f"{key}_untrained"))),
            (TRAINED | {"label": "trained"}, lambda key: as_curve(record.curves.get(key))),
        ]
        context_panels(curves, cold=cold, memory=memory, spectrum=spectrum, use=use)


def context_panels(curves, *, cold, memory, spectrum, use, past=None):
    """Draw curves of several networks' contexts, each key on its panel.

    Args:
        curves: list of (style with a label, function of a key to {x: y} or None).
        cold, memory, spectrum, use, past: panels.
    """

    def draw(panel, key, x=float):
        for style, curve_of in curves:
            if curve := curve_of(key):
                many = {"marker": None} if len(curve) > 20 else {}
                panel.plot([x(k) for k in curve], [*curve.values()], **style | many)

    draw(cold, "cold_start_curve")
    cold.set(
        title="Convergence from a cold start",
        xlabel="sweeps",
        ylabel="distance from the trajectory",
        yscale="log",
    )
    draw(memory, "memory_curve", x=lambda k: k or 0.5)
    memory.set(title="Memory", xlabel="tokens since a token was replaced (first point: none)", yscale="log",
               ylabel="change of the context")  # fmt: skip
    memory.axhline(1e-2, **REFERENCE)
    draw(spectrum, "spectrum")
    spectrum.set(title="Singular values", xlabel="rank", ylabel="share of their sum", yscale="log")
    if spectrum.lines:  # a LayerNorm takes one direction away: its value is rounding
        spectrum.set_ylim(bottom=1e-4 * max(max(line.get_ydata()) for line in spectrum.lines))
    draw(use, "bpb_by_context")
    use.set(title="What the model uses", xlabel="tokens that the context is made of", ylabel="bits per byte")
    if past:
        draw(past, "past_capacity_by_lag")
        past.set(title="Tokens that a linear probe reads", xlabel="tokens back", ylabel="held-out $R^2$")
    for panel in (memory, use):
        if any(len(line.get_xdata()) > 2 for line in panel.lines):  # more than the ends of a horizontal line
            logarithmic(panel, "x")
            panel.xaxis.set_major_formatter("{x:g}")
    if cold.lines:
        cold.legend()


def _by_step(values):
    """([1, 2, ...], values)."""
    return range(1, len(values) + 1), values
