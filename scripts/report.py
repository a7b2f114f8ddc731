"""What a folder of runs holds, how a run went, how fast, and how two runs differ.

    python3 -m scripts.report  # the latest run, so far or complete, and what lies in the folder
    python3 -m scripts.report RUN                # another one
    python3 -m scripts.report RUN OTHER          # two side by side
    python3 -m scripts.report --runs             # the runs whose checkpoints the folder holds
    python3 -m scripts.report --remove RUN_ID    # delete the checkpoints of one of them
    python3 -m scripts.report --draw_docs  # the drawings of the documents: idea.png and architecture.png

All but the list of checkpoints comes from the records that runs write; no model is loaded.
"""

import contextlib
from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.report.compare import table
from newllm.report.page import artifact_paths
from newllm.report.pictures import COUNTED, REFERENCE, TRAINED, TRAINING_DATA, UNTRAINED, figure
from newllm.report.record import complete, find_run, format_value, read_status, runs_in
from newllm.report.summary import speed_lines, summary_lines
from newllm.saving.files import Corrupt, verify_seal
from newllm.saving.runs import remove, run_rows

PATTERNS = {
    "model checkpoints": "models/*.pth",
    "training plots": "outputs/plots/*.png",
    "pages": "outputs/*.html",
    "training summaries": "logs/training_summary_*.txt",
}
BLUE, ORANGE, GREEN, PINK, GREY = (
    style["color"] for style in (TRAINED, UNTRAINED, COUNTED, TRAINING_DATA, REFERENCE)
)


def main(arguments=None):
    """Print what is asked for."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="id of a run, or of two; none: the latest")
    add("--checkpoint_dir", type=expanded, default=ResidualConfig().checkpoint_dir, help="folder of the runs")
    add("--runs", dest="list", action="store_true", help="list the runs whose checkpoints the folder holds")
    add("--remove", metavar="RUN_ID", help="delete the checkpoints of a run beside the one at the top")
    add("--draw_docs", nargs="?", const="docs", type=expanded, help="draw the pictures of the documents")
    options = parser.parse_args(arguments)
    folder = options.checkpoint_dir
    if options.draw_docs:
        draw_docs(Path(options.draw_docs))
    elif options.list or options.remove:
        list_runs(folder, options.remove)
    elif len(options.runs) < 2:
        run = find_run(folder, options.runs[0]) if options.runs else runs_in(folder)[-1]
        show(run)
    elif len(options.runs) == 2:
        one, other = (complete([find_run(folder, run)], folder)[0] for run in options.runs)
        print("\n".join(compare(one, other)))
    else:
        raise UserError("name one run, or two to compare.")


def list_runs(folder, removed):
    """The runs of a folder in a table, after one of them has been deleted."""
    if removed:
        freed = remove(folder, removed) / 1e6
        print(f"run {removed} is deleted, its record is kept: {freed:.1f} MB freed")
    rows = run_rows(folder)
    if not rows:
        raise UserError(f"no run lies in {folder}: start one, or give another folder by --checkpoint_dir.")
    columns = "run", "state", "val ppl", "MB", "last save", "settings that differ from the run at the top"
    print("\n".join(table(columns, rows)))


def show(record):
    """Print how a run went or how far it is, and what lies in its folder."""
    folder = record.folder.parent
    ended = [other for other in runs_in(folder) if other.summary]
    if record.summary:
        paths = artifact_paths(record.folder, record.kind, record.run)
        print("\n".join(summary_lines(record, paths)) + "\n")
    baseline = ended[-1] if ended and not record.summary else None
    print("\n".join(speed_lines(record, status_of(record), baseline)) + "\n")
    print("\n".join(listing(folder, ended)))


def status_of(record):
    """What the status file says of a run; {} where it says nothing, or of another one."""
    try:
        fields = read_status(record.folder.parent)
    except UserError:  # the record alone says something too
        return {}
    return fields if fields["run_id"] == record.run else {}


def listing(folder, records):
    """Artefacts below a folder: how many of each kind, whether models are whole, and all the room."""
    lines = [f"ARTEFACTS IN {folder}"]
    for kind, pattern in PATTERNS.items():
        paths = sorted([*folder.glob(f"*/{pattern}"), *folder.glob(pattern)])  # ladders have no data's folder
        lines.append(f"Found {len(paths)} {kind}")
        if kind == "model checkpoints":
            lines += [f"  {path} {path.stat().st_size / 1e6:.1f} MB {digest(path)}" for path in paths]
    lines.append(f"Complete runs: {', '.join(record.run for record in records) or 'none'}")
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # what a run has replaced meanwhile
            stat = path.stat()
            sizes[stat.st_dev, stat.st_ino] = stat.st_size  # a hard link takes no room
    return [*lines, f"Size of the folder: {sum(sizes.values()) / 1e6:.1f} MB"]


def digest(path):
    """What a file's checksum says: its beginning where it is right, else that the file is damaged."""
    try:
        return f"sha256 {verify_seal(path)[:12]}"
    except (Corrupt, OSError):
        return "DAMAGED: it does not match its checksum"


def compare(one, other):
    """Two complete runs: settings that differ, then every figure with the ratio of the second."""
    settings, figures = [], []
    for name in one.config | other.config:
        pair = one.config.get(name), other.config.get(name)
        if pair[0] != pair[1]:
            settings.append((name, *map(format_value, pair)))
    for name in one.summary | other.summary:
        pair = one.summary.get(name), other.summary.get(name)
        if name not in one.config and all(isinstance(value, int | float) for value in pair):
            ratio = f"{pair[1] / pair[0]:.3f}" if pair[0] else ""
            figures.append((name, *map(format_value, pair), ratio))
    names = (one.run, other.run)
    lines = table(("settings that differ", *names), settings) if settings else ["the settings are the same"]
    return [*lines, "", *table(("figure", *names, "ratio"), figures)]


def draw_docs(folder):
    """Draw the idea and the model, the pictures of the documents."""
    for draw in (idea, architecture):
        path = folder / f"{draw.__name__}.png"
        with figure(path, 1, 2) as (panels,):
            for panel in panels:
                panel.set(xlim=(0, 9.4), ylim=(0, 6.6), aspect="equal")
                panel.axis("off")
            draw(*panels)
        print(path)


def idea(loop, sweeps):
    """Left: the loop over tokens. Right: sweeps over all at once, and which contexts are right after each."""
    loop.set_title("Step by step: one token after the other")
    sweeps.set_title("By sweeps: all tokens at once, again and again")
    above, previous = [], None
    for t, word in enumerate(("User", ":", "how", "do", "I", "boil", "an", "egg")):
        context = box(loop, 1.2 + t, 4.0, f"$c_{t + 1}$", BLUE, filled=True)
        arrow(box(loop, 1.2 + t, 2.2, word, "none"), context)
        if previous:
            arrow(previous, context, BLUE)
        previous = context
        column = []
        for k in range(5):
            column.append(box(sweeps, 1.9 + t, 5.4 - k, "     ", BLUE if t <= k else ORANGE, filled=t <= k))
        for start, end in zip(above, column[1:], strict=False):
            arrow(start, end)
        above = column
        sweeps.text(1.9 + t, 0.75, word, ha="center", va="center")
    loop.text(4.7, 5.5, r"$c_t = F(c_{t-1}, e_t)$", ha="center", fontsize=11)
    loop.text(4.7, 0.9, "8 dependent steps; 100,000 tokens: 100,000", ha="center", color=GREY)
    for k in range(5):
        sweeps.text(0.1, 5.4 - k, f"sweep {k + 1}", va="center", color=GREY)
    legend = "full: exact, whatever F is; empty: close, the closer the more F forgets"
    sweeps.text(5.4, 0.1, legend, ha="center", color=GREY, fontsize=8)


def architecture(model, phases):
    """From an id to logits: which part each phase trains."""
    model.set_title("One step of the model")
    maps = "$c \\leftarrow \\mathrm{LN}(c + o_c)$\n$e \\leftarrow \\mathrm{LN}(e + o_e)$"
    layers = f"layers of\n$o = \\mathrm{{ReLU}}(W[c; e])$\n{maps}"
    step = "$u \\leftarrow \\mathrm{LN}(u +$\n$\\mathrm{MLP}[c_t; u])$"
    token = box(model, 1.5, 0.9, "token $t$", GREY)
    embedding = box(model, 1.5, 2.3, "embedding\n$e_t$", PINK)
    before = box(model, 1.5, 3.9, "$c_{t-1}$", BLUE)
    context_map = box(model, 4.6, 2.7, f"context map $F$\n{layers}", BLUE)
    after = box(model, 4.6, 5.0, "$c_t$", BLUE)
    head = box(model, 7.9, 3.2, f"head\n{step}", GREEN)
    logits = box(model, 7.9, 5.4, "next token\n$h E^T + b$", PINK)
    for start, end in (
        (token, embedding), (embedding, context_map), (before, context_map), (context_map, after),
        (context_map, head), (after, head), (head, logits),
    ):  # fmt: skip
        arrow(start, end)
    model.text(6.2, 3.1, "$u_t$")
    phases.set_title("What trains when")
    for y, name, data, loss, color, trained in (
        (5.3, "Phase 1", "no label: sweeps over stored contexts", "consistency + spread", BLUE, "$F$"),
        (3.3, "Phase 2, frozen", "contexts computed once", "next token", GREEN, "head, embedding"),
        (1.3, "Phase 2, fine-tuned", "gradient through the last sweeps", "next token", ORANGE, "everything"),
    ):
        box(phases, 1.9, y, name, color, filled=True)
        phases.text(4.0, y, f"{data}\nloss: {loss}\ntrains: {trained}", va="center", linespacing=1.6)


def box(panel, x, y, text, color, filled=False):
    """A text around (x, y) in a rounded box."""
    inside, ink = (color, "white") if filled else ("white", "black")
    look = dict(boxstyle="round,pad=0.45", edgecolor=color, facecolor=inside, linewidth=1.6)
    return panel.text(x, y, text, ha="center", va="center", color=ink, bbox=look)


def arrow(start, end, color=GREY):
    """From the edge of a box to that of another."""
    look = dict(arrowstyle="-|>", color=color, linewidth=1.2, shrinkA=0, shrinkB=0)
    look |= dict(patchA=start.get_bbox_patch(), patchB=end.get_bbox_patch())
    start.axes.annotate("", end.get_position(), start.get_position(), arrowprops=look)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
