"""The drawings of the documents: the idea, and what a model is made of.

python3 -m scripts.draw_docs        # writes docs/idea.png and docs/architecture.png
"""

from pathlib import Path

from newllm.config import expanded
from newllm.errors import exit_on_user_error
from newllm.flags import Parser
from newllm.report.style import COUNTED, REFERENCE, TRAINED, TRAINING_DATA, UNTRAINED, figure

BLUE, ORANGE, GREEN, PINK, GREY = (
    s["color"] for s in (TRAINED, UNTRAINED, COUNTED, TRAINING_DATA, REFERENCE)
)
TOKENS = ("User", ":", "how", "do", "I", "boil", "an", "egg")
SWEEPS = 5


def box(panel, x, y, text, color, width=1.0, height=0.5, filled=False):
    """A rounded box around (x, y) with a text."""
    from matplotlib.patches import FancyBboxPatch

    panel.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12",
            edgecolor=color, facecolor=color if filled else "white", linewidth=1.6,
        )
    )  # fmt: skip
    panel.text(x, y, text, ha="center", va="center", color="white" if filled else "black", fontsize=9)


def arrow(panel, start, end, color=GREY, **style):
    panel.annotate(
        "",
        end,
        start,
        arrowprops=dict(arrowstyle="-|>", color=color, linewidth=1.3, shrinkA=0, shrinkB=0) | style,
    )


def bare(panel, title, width, height):
    """A panel to draw on, without axes."""
    panel.set(title=title, xlim=(0, width), ylim=(0, height), aspect="equal")
    panel.axis("off")


def idea(path):
    """Left: the loop over tokens. Right: sweeps over all of them at once, and which contexts are right after each."""
    with figure(path, 1, 2) as ((loop, sweeps),):
        bare(loop, "Step by step: one token after the other", 9.4, 6.6)
        for t, word in enumerate(TOKENS):
            x = 1.2 + t
            box(loop, x, 4.0, f"$c_{t + 1}$", BLUE, 0.7, 0.7, filled=True)
            loop.text(x, 2.2, word, ha="center", va="center", fontsize=9)
            arrow(loop, (x, 2.5), (x, 3.6))
            if t:
                arrow(loop, (x - 0.65, 4.0), (x - 0.36, 4.0), BLUE)
        loop.text(4.7, 5.5, r"$c_t = F(c_{t-1}, e_t)$", ha="center", fontsize=11)
        loop.text(
            4.7, 0.9, f"{len(TOKENS)} dependent steps; 100,000 tokens: 100,000", ha="center", color=GREY
        )
        bare(sweeps, "By sweeps: all tokens at once, again and again", 9.4, 6.6)
        for k in range(SWEEPS):
            y = 5.4 - k
            sweeps.text(0.1, y, f"sweep {k + 1}", va="center", fontsize=8, color=GREY)
            for t in range(len(TOKENS)):
                x = 1.9 + t
                exact = t <= k
                box(sweeps, x, y, "", BLUE if exact else ORANGE, 0.6, 0.5, filled=exact)
                if k < SWEEPS - 1 and t + 1 < len(TOKENS):
                    arrow(sweeps, (x + 0.2, y - 0.27), (x + 0.8, y - 0.72), GREY, linewidth=0.9)
        for t, word in enumerate(TOKENS):
            sweeps.text(1.9 + t, 0.75, word, ha="center", va="center", fontsize=9)
        sweeps.text(
            5.4,
            0.1,
            "full: exact, whatever F is; empty: close, the closer the more F forgets",
            ha="center",
            color=GREY,
            fontsize=8,
        )


def architecture(path):
    """From an id to logits: which part each phase trains."""
    with figure(path, 1, 2) as ((model, phases),):
        bare(model, "One step of the model", 9.4, 6.6)
        box(model, 1.5, 0.9, "token $t$", GREY, 1.6)
        box(model, 1.5, 2.2, "embedding\n$e_t$", PINK, 1.6, 0.9)
        box(model, 4.6, 2.7, "context map $F$\nlayers of\n$o = \\mathrm{ReLU}(W[c; e])$\n$c \\leftarrow \\mathrm{LN}(c + o_c)$\n"
            "$e \\leftarrow \\mathrm{LN}(e + o_e)$", BLUE, 2.9, 2.4)  # fmt: skip
        box(model, 1.5, 3.9, "$c_{t-1}$", BLUE, 1.0)
        box(model, 4.6, 5.0, "$c_t$", BLUE, 1.0)
        box(
            model,
            7.9,
            3.2,
            "head\n$u \\leftarrow \\mathrm{LN}(u +$\n$\\mathrm{MLP}[c_t; u])$",
            GREEN,
            2.1,
            1.5,
        )
        box(model, 7.9, 5.4, "next token\n$h E^T + b$", PINK, 2.1, 0.9)
        for start, end in (
            ((1.5, 1.15), (1.5, 1.75)), ((2.3, 2.2), (3.15, 2.2)), ((2.0, 3.9), (3.15, 3.2)), ((4.6, 3.9), (4.6, 4.75)),
            ((6.05, 2.6), (6.85, 2.9)), ((5.1, 5.0), (6.85, 3.7)), ((7.9, 3.95), (7.9, 4.95)),
        ):  # fmt: skip
            arrow(model, start, end)
        model.text(6.3, 2.35, "$u_t$", fontsize=9)
        bare(phases, "What trains when", 9.4, 6.6)
        rows = (
            (
                "Phase 1",
                "no label: sweeps over stored contexts",
                "fixed-point consistency + spread",
                BLUE,
                "$F$",
            ),
            ("Phase 2, frozen", "contexts computed once", "next token", GREEN, "head, embedding"),
            ("Phase 2, fine-tuned", "gradient through the last sweeps", "next token", ORANGE, "everything"),
        )
        for number, (name, data, loss, color, trained) in enumerate(rows):
            y = 5.3 - 2.0 * number
            box(phases, 1.9, y, name, color, 3.2, 0.8, filled=True)
            phases.text(3.8, y + 0.42, data, va="center")
            phases.text(3.8, y, f"loss: {loss}", va="center")
            phases.text(3.8, y - 0.42, f"trains: {trained}", va="center", color=color)


def main(arguments=None):
    """Draw both."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=expanded, default="docs", help="where to write them")
    folder = Path(parser.parse_args(arguments).folder)
    for draw in (idea, architecture):
        draw(folder / f"{draw.__name__}.png")
        print(folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
