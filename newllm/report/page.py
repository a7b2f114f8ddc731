"""One self-contained page a run: its figures beside the untrained ones, its pictures, its settings. Needs no network."""

import base64
import html

from newllm.report.runlog import format_value
from newllm.report.summary import language_rows
from newllm.saving.files import write_text

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.note { opacity: .7; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
img { width: 100%; min-width: 34rem; height: auto; background: white; border-radius: 4px; }
"""
CONTEXTS = (  # what it is, key, unit
    ("effective rank, training tokens", "er_train", "%"),
    ("effective rank, validation tokens", "er_val", "%"),
    ("tokens converged after 10 cold sweeps", "converged_ratio", "%"),
    ("cold-start error after 10 sweeps", "cold_start_error_10", ""),
    ("change of the error a sweep", "contraction", "x"),
    ("memory horizon, tokens", "memory_horizon", ""),
    ("past capacity", "past_capacity", ""),
)
EPOCHS = ("train_loss", "val_loss", "val_ppl", "val_bpb", "val_acc")
ITERATIONS = ("cvfp", "dist_reg", "converged", "er", "grad_norm", "update_norm", "optimizer_steps")


def write_page(record, pictures, path):
    """Write the page of a run.

    Args:
        record: newllm.report.record.Record. pictures: paths of PNG files, which become part of the page.

    Raises:
        OSError: a picture cannot be read, or the page not written.
    """
    summary, parts = record.summary, []
    if "val_ppl" in summary:
        rows = [(name, f"{ppl:.1f}", f"{bpb:.3f}") for name, ppl, bpb in language_rows(summary)]
        parts.append(("Language model", _table(("held-out dialogues", "perplexity", "bits per byte"), rows)))
    if "er_ceiling" in summary:
        columns = {"untrained": "_untrained", "Phase 1": "", "fine-tuned": "_finetuned"}
        columns = {title: end for title, end in columns.items() if f"er_val{end}" in summary}
        rows = [
            (name, *(_figure(summary[f"{key}{end}"], unit) for end in columns.values()))
            for name, key, unit in CONTEXTS
        ]
        note = f"Ceiling of effective rank: {summary['er_ceiling']:.1%} at {summary['rank_tokens']:,} tokens."
        table = _table(("contexts", *columns), rows)
        parts.append(("Contexts", f"{table}<p class=note>{note}</p>"))
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">'
        parts.append((None, f"<div class=wide>{image}</div>"))
    for title, columns, names, counter in (
        ("Phase 1, by iteration", record.phase1, ITERATIONS, "iteration"),
        ("Phase 2, by epoch", record.phase2, EPOCHS, "epoch"),
    ):
        if columns:
            rows = zip(*(columns[name] for name in names), strict=True)
            numbered = [(number, *map(_figure, row)) for number, row in enumerate(rows, 1)]
            parts.append((title, _folded(f"{len(numbered)} rows", _table((counter, *names), numbered))))
    facts = {"device": record.start["device"], "commit": record.start.get("git_commit"), **summary}
    for title, values in (("All figures", facts), ("Settings", record.config)):
        rows = [(name, format_value(value)) for name, value in values.items()]
        parts.append((title, _folded(f"{len(rows)} rows", _table(("name", "value"), rows, text=True))))
    if record.warnings:
        parts.append(("Warnings", "".join(f"<p>{html.escape(line)}</p>" for line in record.warnings)))
    title = f"newllm {record.kind} {record.run}"
    about = (
        f"{summary['train_tokens']:,} training tokens of {summary['data_source']}, tokenizer {summary['tokenizer']}, "
        f"{summary['parameters']:,} parameters, {summary['seconds']:.0f} s on {record.start['device']}"
    )
    body = "".join((f"<h2>{html.escape(head)}</h2>" if head else "") + content for head, content in parts)
    write_text(
        path,
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p class=note>{html.escape(about)}</p>{body}</html>\n",
    )


def _figure(value, unit=""):
    if value is None:
        return ""
    if unit == "%":
        return f"{value:.1%}"
    return f"{unit}{value:.4g}" if isinstance(value, float) else f"{unit}{value:,}"


def _table(header, rows, text=False):
    kind = " class=text" if text else ""
    cells = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.escape(str(c))}</td>' for c in row)}</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in header)}</tr>{cells}</table></div>"


def _folded(label, content):
    return f"<details><summary>{html.escape(label)}</summary>{content}</details>"
