"""What a folder of runs holds, how a run went, how fast, and how two runs differ.

    python3 -m scripts.report  # the latest run, so far or complete, and what lies in the folder
    python3 -m scripts.report RUN  # another one: its id, its metrics_*.jsonl, or a folder of runs
    python3 -m scripts.report RUN OTHER          # two side by side, also of two folders
    python3 -m scripts.report --remake           # tables, pictures and page once more, from the record
    python3 -m scripts.report --runs             # the runs whose checkpoints the folder holds
    python3 -m scripts.report --remove RUN_ID    # delete the checkpoints of one of them
    python3 -m scripts.report --draw_docs  # the drawings of the documents: idea.png and architecture.png

All but the list of checkpoints comes from the records that runs write; no model is loaded.
"""

from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.report.compare import table
from newllm.report.page import artifact_paths, write_artifacts
from newllm.report.pictures import COUNTED, REFERENCE, TRAINED, TRAINING_DATA, UNTRAINED, figure
from newllm.report.record import complete, find_run, format_value, read_status, runs_in
from newllm.report.summary import so_far_lines, speed_lines, summary_lines
from newllm.saving.files import Corrupt, verify_seal
from newllm.saving.runs import remove, run_rows

PATTERNS = {
    "model checkpoints": "models/*.pth",
    "training plots": "outputs/plots/*.png",
    "pages": "outputs/*.html",
    "training summaries": "logs/training_summary_*.txt",
}


def main(arguments=None):
    """Print what is asked for."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="id of a run, or of two; none: the latest")
    add("--checkpoint_dir", type=expanded, default=ResidualConfig().checkpoint_dir, help="folder of the runs")
    add("--remake", action="store_true", help="make the artefacts of the run again")
    add("--runs", dest="list", action="store_true", help="list the runs whose checkpoints the folder holds")
    add("--remove", metavar="RUN_ID", help="delete the checkpoints of a run beside the one at the top")
    add("--draw_docs", nargs="?", const="docs", type=expanded, help="draw the pictures of the documents")
    options = parser.parse_args(arguments)
    if options.draw_docs:
        return draw_docs(Path(options.draw_docs))
    if options.list or options.remove:
        return list_runs(options.checkpoint_dir, options.remove)
    if len(options.runs) > 2:
        raise UserError("name one run, or two to compare.")
    folder = options.checkpoint_dir
    chosen = [find_run(folder, run) for run in options.runs] or runs_in(folder)[-1:]
    if len(chosen) == 2:
        one, other = (complete([record], record.path)[0] for record in chosen)
        print("\n".join(compare(one, other)))
    elif options.remake:
        remake(chosen[0])
    else:
        show(chosen[0], latest=not options.runs)


def list_runs(folder, removed):
    """The runs of a folder in a table, after one of them has been deleted."""
    if removed:
        freed = remove(folder, removed) / 1e6
        print(f"run {removed} is deleted, its record is kept: {freed:.1f} MB freed")
    columns = "run", "state", "val ppl", "MB", "last save", "settings that differ from the run at the top"
    print("\n".join(table(columns, run_rows(folder))))


def show(record, latest):
    """Print how a run went or how far it is, and what lies in its folder.

    Args:
        latest: it was not asked for by name: if it is not complete, the latest complete one is shown too.
    """
    folder = record.folder.parent
    ended = [other for other in runs_in(folder) if other.summary]
    if not record.summary:
        print("\n".join(so_far_lines(record, status_of(record), ended[-1] if ended else None)) + "\n")
    shown = record if record.summary else ended[-1] if latest and ended else None
    if shown:
        paths = artifact_paths(shown.folder, shown.kind, shown.run)
        print("\n".join([*summary_lines(shown, paths), "", *speed_lines(shown)]) + "\n")
    print("\n".join(listing(folder, ended)) + "\n")


def status_of(record):
    """What the status file says of a run; {} where it says nothing, or of another one."""
    try:
        fields = read_status(record.folder.parent)
    except UserError:  # the record alone says something too
        return {}
    return fields if fields.get("run_id") == record.run else {}


def remake(record):
    """Write a run's artefacts again.

    Raises:
        UserError: one cannot be written.
    """
    try:
        written = write_artifacts(record)
    except OSError as error:
        refused = f"{error.filename} cannot be written ({error.strerror or error})"
        raise UserError(f"{refused}: make room and run it again.") from error
    print("\n".join(f"{name}: {path}" for name, path in written.items()))


def listing(folder, records):
    """Artefacts below a folder: how many of each kind, whether models are whole, and all the room."""
    lines = [f"ARTEFACTS IN {folder}"]
    for kind, pattern in PATTERNS.items():
        paths = sorted([*folder.glob(f"*/{pattern}"), *folder.glob(pattern)])  # ladders have no data's folder
        lines.append(f"Found {len(paths)} {kind}")
        if kind == "model checkpoints":
            lines += [f"  {path} {path.stat().st_size / 1e6:.1f} MB {digest(path)}" for path in paths]
    lines.append(f"Complete runs: {', '.join(record.run for record in records) or 'none'}")
    stats = [path.stat() for path in folder.rglob("*")]
    sizes = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}  # a hard link takes no room
    return [*lines, f"Size of the folder: {sum(sizes.values()) / 1e6:.1f} MB"]


def digest(path):
    """What a file's checksum says: its beginning where it is right, else that the file is damaged."""
    try:
        return f"sha256 {verify_seal(path)[:12]}"
    except (Corrupt, OSError):
        return "DAMAGED: it does not match its checksum"


def compare(one, other):
    """Two runs beside each other: settings that differ, then every figure with the ratio of the second."""
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
    names = (one.run, other.run) if one.run != other.run else (str(one.path), str(other.path))
    lines = table(("settings that differ", *names), settings) if settings else ["the settings are the same"]
    return [*lines, "", *table(("figure", *names, "ratio"), figures)]


BLUE, ORANGE, GREEN, PINK, GREY = (
    style["color"] for style in (TRAINED, UNTRAINED, COUNTED, TRAINING_DATA, REFERENCE)
)


def draw_docs(folder):
    """Draw the idea and the model, the pictures of the documents."""
    for draw in (idea, architecture):
        path = folder / f"{draw.__name__}.png"
        with figure(path, 1, 2) as (panels,):
            draw(*panels)
        print(path)


def idea(loop, sweeps):
    """Left: the loop over tokens. Right: sweeps over all at once, and which contexts are right after each."""
    words = ("User", ":", "how", "do", "I", "boil", "an", "egg")
    bare(loop, "Step by step: one token after the other")
    for t, word in enumerate(words):
        x = 1.2 + t
        box(loop, x, 4.0, f"$c_{t + 1}$", BLUE, 0.7, 0.7, filled=True)
        loop.text(x, 2.2, word, ha="center", va="center")
        arrow(loop, (x, 2.5), (x, 3.6))
        if t:
            arrow(loop, (x - 0.65, 4.0), (x - 0.36, 4.0), BLUE)
    loop.text(4.7, 5.5, r"$c_t = F(c_{t-1}, e_t)$", ha="center", fontsize=11)
    count = f"{len(words)} dependent steps; 100,000 tokens: 100,000"
    loop.text(4.7, 0.9, count, ha="center", color=GREY)
    bare(sweeps, "By sweeps: all tokens at once, again and again")
    for k in range(5):
        y = 5.4 - k
        sweeps.text(0.1, y, f"sweep {k + 1}", va="center", fontsize=8, color=GREY)
        for t in range(len(words)):
            x = 1.9 + t
            exact = t <= k
            box(sweeps, x, y, "", BLUE if exact else ORANGE, 0.6, 0.5, filled=exact)
            if k < 4 and t < len(words) - 1:
                arrow(sweeps, (x + 0.2, y - 0.27), (x + 0.8, y - 0.72), linewidth=0.9)
    for t, word in enumerate(words):
        sweeps.text(1.9 + t, 0.75, word, ha="center", va="center")
    legend = "full: exact, whatever F is; empty: close, the closer the more F forgets"
    sweeps.text(5.4, 0.1, legend, ha="center", color=GREY, fontsize=8)


def architecture(model, phases):
    """From an id to logits: which part each phase trains."""
    bare(model, "One step of the model")
    maps = "$c \\leftarrow \\mathrm{LN}(c + o_c)$\n$e \\leftarrow \\mathrm{LN}(e + o_e)$"
    for x, y, text, color, width, height in (
        (1.5, 0.9, "token $t$", GREY, 1.6, 0.5),
        (1.5, 2.2, "embedding\n$e_t$", PINK, 1.6, 0.9),
        (4.6, 2.7, f"context map $F$\nlayers of\n$o = \\mathrm{{ReLU}}(W[c; e])$\n{maps}", BLUE, 2.9, 2.4),
        (1.5, 3.9, "$c_{t-1}$", BLUE, 1.0, 0.5),
        (4.6, 5.0, "$c_t$", BLUE, 1.0, 0.5),
        (7.9, 3.2, "head\n$u \\leftarrow \\mathrm{LN}(u +$\n$\\mathrm{MLP}[c_t; u])$", GREEN, 2.1, 1.5),
        (7.9, 5.4, "next token\n$h E^T + b$", PINK, 2.1, 0.9),
    ):
        box(model, x, y, text, color, width, height)
    for start, end in (
        ((1.5, 1.15), (1.5, 1.75)),
        ((2.3, 2.2), (3.15, 2.2)),
        ((2.0, 3.9), (3.15, 3.2)),
        ((4.6, 3.9), (4.6, 4.75)),
        ((6.05, 2.6), (6.85, 2.9)),
        ((5.1, 5.0), (6.85, 3.7)),
        ((7.9, 3.95), (7.9, 4.95)),
    ):
        arrow(model, start, end)
    model.text(6.3, 2.35, "$u_t$")
    bare(phases, "What trains when")
    stored = "no label: sweeps over stored contexts"
    for y, name, data, loss, color, trained in (
        (5.3, "Phase 1", stored, "fixed-point consistency + spread", BLUE, "$F$"),
        (3.3, "Phase 2, frozen", "contexts computed once", "next token", GREEN, "head, embedding"),
        (1.3, "Phase 2, fine-tuned", "gradient through the last sweeps", "next token", ORANGE, "everything"),
    ):
        box(phases, 1.9, y, name, color, 3.2, 0.8, filled=True)
        phases.text(3.8, y + 0.42, data, va="center")
        phases.text(3.8, y, f"loss: {loss}", va="center")
        phases.text(3.8, y - 0.42, f"trains: {trained}", va="center", color=color)


def bare(panel, title):
    """A panel to draw on, without axes."""
    panel.set(title=title, xlim=(0, 9.4), ylim=(0, 6.6), aspect="equal")
    panel.axis("off")


def box(panel, x, y, text, color, width, height, filled=False):
    """A rounded box around (x, y) with a text."""
    from matplotlib.patches import FancyBboxPatch

    corner, face = (x - width / 2, y - height / 2), color if filled else "white"
    look = dict(boxstyle="round,pad=0,rounding_size=0.12", edgecolor=color, facecolor=face, linewidth=1.6)
    panel.add_patch(FancyBboxPatch(corner, width, height, **look))
    panel.text(x, y, text, ha="center", va="center", color="white" if filled else "black")


def arrow(panel, start, end, color=GREY, linewidth=1.3):
    look = dict(arrowstyle="-|>", color=color, linewidth=linewidth, shrinkA=0, shrinkB=0)
    panel.annotate("", end, start, arrowprops=look)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
