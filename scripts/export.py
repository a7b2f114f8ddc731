"""One run as one file to keep or to share: settings and record, pictures, page, tables, best weights.

python3 -m scripts.export                  # the latest complete run with a model, as a .zip here
python3 -m scripts.export RUN --output my.zip
python3 -m scripts.export --refresh FOLDER # an exported transformers folder: the code of today
"""

import os
import zipfile
from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.report.page import artifact_paths
from newllm.report.record import complete, find_run, runs_in
from newllm.saving.trained import open_saved


def latest_with_model(folder):
    """The latest complete run that left a model; the latest of all where none did."""
    records = complete(runs_in(folder), folder)
    having = [record for record in records if paths_of(record)["model"].exists()]
    if having and having[-1] is not records[-1]:
        print(f"run {records[-1].run} left no model: the latest that did is {having[-1].run}")
    return (having or records)[-1]


def paths_of(record):
    return artifact_paths(record.folder, record.kind, record.run)


def refresh(options):
    """Rewrite the code of a folder exported before.

    Raises:
        UserError: it is no such folder, or it is given beside something to export.
    """
    if options.run or options.output:
        raise UserError("--refresh rewrites one folder in place: give neither a run nor --output beside it.")
    from newllm.transformers_export import refresh_folder

    refresh_folder(options.refresh)
    print(f"{options.refresh}: its code is that of this project now; weights and tokenizer are as they were")


def write_zip(target, folder, paths):
    """Put files into an archive under their names below a folder; it takes its name when it is whole.

    Raises:
        UserError: it cannot be written, or a file cannot be read.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, Path(folder.name) / path.relative_to(folder))
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target} cannot be written ({reason}): choose another --output.") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    for entry in archive.infolist():
        print(f"  {entry.filename} {entry.file_size / 1e6:.2f} MB")


def main(arguments=None):
    """Write the file and say what is in it."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", nargs="?", help="id of a run; none: the latest")
    folder = ResidualConfig().checkpoint_dir
    add("--checkpoint_dir", type=expanded, default=folder, help="folder of the runs")
    add("--format", choices=("zip", "transformers"), default="zip", help="what to write")
    add("--output", type=expanded, help="the file, or the folder, to write")
    code = "rewrite the code in a folder of --format transformers"
    add("--refresh", type=expanded, metavar="FOLDER", help=code)
    options = parser.parse_args(arguments)
    if options.refresh is not None:
        refresh(options)
        return
    folder = options.checkpoint_dir
    if options.run:
        [record] = complete([find_run(folder, options.run)], folder)
    else:
        record = latest_with_model(folder)
    paths = paths_of(record)
    if not paths["model"].exists():
        none = f"run {record.run} left no model (as after --phase 1, --no-artifacts or --no-save_checkpoint)"
        if options.format == "transformers":
            raise UserError(f"{none}: name another run, or train one to its end.")
        print(f"{none}: the file holds its record alone")
    name = f"newllm_{record.kind}_{record.run}"
    if options.format == "zip":
        files = [path for path in (record.path, *paths.values()) if path.exists()]
        write_zip(Path(options.output or f"{name}.zip"), record.folder, files)
        return
    # Here alone: transformers is slow to import.
    from newllm.transformers_export import export_folder

    target = Path(options.output or name)
    export_folder(open_saved(paths["model"])[1], record, target)
    print(f"{target}: AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
