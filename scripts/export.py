"""One run as one file to keep or to share: settings and record, pictures, page, tables, best weights.

python3 -m scripts.export                  # the latest complete run with a model, as a .zip here
python3 -m scripts.export RUN --output my.zip
python3 -m scripts.export --format transformers --output model
python3 -m scripts.export --format transformers --output model --retrieval none  # the network alone
python3 -m scripts.export --refresh model  # an exported transformers folder: the code of today
"""

import zipfile
from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.report.page import artifact_paths
from newllm.report.record import complete, find_run, runs_in
from newllm.saving.files import replacing
from newllm.saving.trained import open_saved


def paths_of(record):
    return artifact_paths(record.folder, record.kind, record.run)


def latest_with_model(folder):
    """The latest complete run that left a model; the latest of all where none did."""
    records = complete(runs_in(folder), folder)
    having = [record for record in records if paths_of(record)["model"].exists()]
    if having and having[-1] is not records[-1]:
        print(f"run {records[-1].run} left no model: the latest that did is {having[-1].run}")
    return (having or records)[-1]


def write_zip(target, folder, paths):
    """Put files into an archive under their names from a folder on; it takes its name when it is whole."""
    try:
        with replacing(target) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, path.relative_to(folder.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): choose another --output.") from error
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    for entry in archive.infolist():
        print(f"  {entry.filename} {entry.file_size / 1e6:.2f} MB")


def main(arguments=None):
    """Write the file and say what is in it."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", nargs="?", help="id of a run; none: the latest")
    usual = ResidualConfig().checkpoint_dir
    add("--checkpoint_dir", type=expanded, default=usual, help="folder of the runs")
    add("--format", choices=("zip", "transformers"), default="zip", help="what to write")
    add("--retrieval", choices=("none",), help="leave out of a transformers folder what the model looks up")
    add("--output", type=expanded, help="the file, or the folder, to write")
    add("--refresh", type=expanded, metavar="FOLDER", help="only rewrite the code in an exported folder")
    options = parser.parse_args(arguments)
    if options.refresh is not None:
        from newllm.transformers_export import refresh_folder  # here: transformers is slow to import

        refresh_folder(options.refresh)
        print(f"{options.refresh}: its code is that of this project now; all else is as it was")
        return
    if options.retrieval and options.format == "zip":
        raise UserError("--retrieval is for --format transformers: an archive holds the model file as it is.")
    if options.run:
        [record] = complete([find_run(options.checkpoint_dir, options.run)], options.checkpoint_dir)
    else:
        record = latest_with_model(options.checkpoint_dir)
    paths = paths_of(record)
    target = Path(options.output or f"newllm_{record.kind}_{record.run}")
    none = f"run {record.run} left no model (as after --phase 1, --no-artifacts or --no-save_checkpoint)"
    missing = not paths["model"].exists()
    if options.format == "zip":
        if missing:
            print(f"{none}: the file holds its record alone")
        target = target if options.output else target.with_name(f"{target.name}.zip")
        files = [path for path in (record.path, *paths.values()) if path.exists()]
        write_zip(target, record.folder, files)
        return
    if missing:
        raise UserError(f"{none}: name another run, or train one to its end.")
    from newllm.transformers_export import export_folder

    saved = open_saved(paths["model"])[1]
    export_folder(saved | {"retrieval": None} if options.retrieval == "none" else saved, record, target)
    print(f"{target}: AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
