"""A page of figures of finished runs, with the numbers behind each figure.

    rcml-report --workdir runs/rcml
    rcml-report --workdir runs/rcml --workdir runs/clip --workdir runs/beta
    rcml-report --workdir runs/m3col --workdir runs/ablations --out report_m3col

--workdir takes the work directory of a run, the directory of a sweep, or that of an alignment
study, as often as it is given; runs that are given together are shown side by side. The page is
<out>/index.html, the numbers are under <out>/data. A new report replaces the files of an older one
in <out> and leaves all others alone. A figure that cannot be drawn is named on the page with the
reason. Nothing is trained, and the work directories are not changed.
"""

import contextlib
import glob
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from rcml_jax.cli.commands import guard
from rcml_jax.cli.embed import Parser
from rcml_jax.errors import UserError
from rcml_jax.files import abandoned, exclusive
from rcml_jax.log import log_line
from rcml_jax.parsing import argument_text, user_path
from rcml_jax.remote import named, path_or_address, pulled
from rcml_jax.report import common, page
from rcml_jax.report.page import Folder, Paragraph, Section, write_page, written_files
from rcml_jax.report.runs import Sources, groups, read_sources

#: In a folder that is being written: who does it.
_LOCK = ".lock"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for."""
    return guard(_report, argv)


def _report(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-report", description=__doc__)
    parser.add_argument("--workdir", action="append", default=[], type=path_or_address)
    parser.add_argument("--out", default="report", type=user_path, help="folder of the page")
    parser.add_argument("--seed", default=0, type=int, help="what is drawn is drawn by it")
    parser.add_argument(
        "--relation", default="", type=argument_text, help="sentence of the t-SNE, or a part"
    )
    parser.add_argument("--data-dir", default="", type=argument_text, help="for config.data.dir")
    parser.add_argument("--data-path", default="", type=argument_text, help="for config.data.path")
    args = parser.parse_args(argv[1:])
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must not be negative")
    page.require()
    sources = read_sources([pulled(given) for given in args.workdir])
    start = time.perf_counter()
    made = write_report(
        sources,
        args.out,
        command=shlex.join(["rcml-report", *argv[1:]]),
        seed=args.seed,
        relation=args.relation,
        data_dir=args.data_dir,
        data_path=args.data_path,
    )
    print(f"wrote {made} in {time.perf_counter() - start:.0f} s")
    return 0


def write_report(
    sources: Sources,
    out: pathlib.Path,
    *,
    command: str = "",
    seed: int = 0,
    relation: str = "",
    data_dir: str = "",
    data_path: str = "",
) -> pathlib.Path:
    """Collect, draw and write the page `<out>/index.html`; an older report there is replaced.

    Other files in the folder of an older report stay. Raises UserError for an `out` that holds no
    report but something else, or cannot be written.
    """
    out = pathlib.Path(out)
    older = _older_report(out)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    try:
        _remove_abandoned(out)
        part.mkdir(parents=True)
        with exclusive(part / _LOCK, f"is writing {part}"):
            folder = Folder(part, log_line)
            options: dict[str, Any] = {
                "seed": seed,
                "relation": relation,
                "data_dir": data_dir,
                "data_path": data_path,
            }
            sections = _sections(folder, sources, **options)
            page, title = part / "index.html", _title(sources)
            found = [p.relative_to(part) for p in sorted(part.rglob("*")) if p.is_file()]
            files = [p.as_posix() for p in found if not p.name.startswith(_LOCK)]
            files.append(page.name)
            write_page(page, title, _intro(sources, command), sections, files)
            _replace(out, older, part, files)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out / "index.html"


def _remove_abandoned(out: pathlib.Path) -> None:
    """Remove the folders in which killed processes were writing this report, and no others."""
    for part in out.parent.glob(f"{glob.escape(out.name)}.part*"):
        if part.is_dir() and not part.is_symlink() and abandoned(part / _LOCK):
            shutil.rmtree(part, ignore_errors=True)


def _older_report(out: pathlib.Path) -> list[str]:
    """Names of the files of the report in a folder; nothing where the folder is empty or missing.

    Raises UserError where the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    page = out / "index.html"
    files = written_files(page) if page.is_file() else None
    if files is None:
        raise UserError(f"{out} holds something else than a report; give another --out")
    if not files:
        raise UserError(
            f"the report in {out} has no list of its files, as those of older versions; remove it "
            "or give another --out"
        )
    return files


def _replace(
    out: pathlib.Path, older: Sequence[str], part: pathlib.Path, files: Sequence[str]
) -> None:
    """Move a report to its folder and remove what is left of the older one, and nothing else.

    Raises UserError, with nothing changed, where a file of others is in the way.
    """
    taken = [name for name in files if (out / name).exists() and name not in older]
    if taken:
        raise UserError(
            f"{out / taken[0]} is no file of the older report and would be replaced; move it or "
            "give another --out"
        )
    for name in files:  # the page, which has the list, is the last of them
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / name, out / name)
    for name in set(older) - set(files):
        (out / name).unlink(missing_ok=True)
    for folder in {(out / name).parent for name in older} - {out}:
        with contextlib.suppress(OSError):  # not empty, or gone
            folder.rmdir()


def _sections(
    folder: Folder, sources: Sources, *, seed: int, relation: str, data_dir: str, data_path: str
) -> list[Section]:
    # Imported here: what is wrong with the arguments is said before the models' classes are loaded.
    from rcml_jax.report import alignment, classification, relational
    from rcml_jax.report.runs import Models

    models, sections = Models(data_dir, data_path), []
    if sources.runs:
        sections.append(common.results(folder, sources.runs))
    for runs, sweeps in groups(sources, "relational").values():
        runs = runs or [run for sweep in sweeps for run in sweep.firsts]
        sections.append(relational.section(folder, runs, models, seed=seed, relation=relation))
    for runs, sweeps in groups(sources, "classification").values():
        sections.append(classification.section(folder, runs, sweeps, models, seed=seed))
    sections += [common.sweep(folder, sweep) for sweep in sources.sweeps]
    sections += [alignment.study(folder, x.label, x.path, x.result) for x in sources.studies]
    if sources.runs:
        sections.append(common.training(folder, sources.runs))
    return sections


def _title(sources: Sources) -> str:
    shown: tuple[Any, ...] = (*sources.runs, *sources.sweeps, *sources.studies)
    names = [x.label for x in shown]
    return f"Report: {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"


def _intro(sources: Sources, command: str) -> list[Paragraph]:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    shown: tuple[Any, ...] = (*sources.runs, *sources.sweeps, *sources.studies)
    where = [named(str(x.path)) for x in shown]
    intro = [Paragraph(f"Made {made} from", tuple(where))]
    return intro + [Paragraph("", (command,))] * bool(command)


if __name__ == "__main__":
    sys.exit(main())
