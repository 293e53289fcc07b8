"""The studies of every installed package, found by their entry points."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from papercore.lab.cli import flag, load
from papercore.lab.files import write_text
from papercore.lab.report import SUMMARY_COLUMNS, console, markdown_table, print_table, progress, summary_rows
from papercore.lab.study import ReproduceOptions, Study


def studies() -> dict[str, EntryPoint]:
    """The registered studies by name (entry-point group ``papercore.studies``)."""
    return {entry.name: entry for entry in sorted(entry_points(group="papercore.studies"), key=lambda e: e.name)}


def show() -> None:
    """Print name, version and summary of each."""
    rows = []
    for name, entry in studies().items():
        assert entry.dist is not None
        rows.append([name, entry.dist.version, entry.dist.metadata["Summary"]])
    print_table("installed studies", ["name", "version", "what"], rows)


@dataclass
class ReproduceAllOptions:
    """Which studies to run, and how much of them."""

    names: list[str] = flag("packages; all if none is named", [], positional=True)
    scale: str = flag("quick, small or full", "quick")
    seeds: int | None = flag("seeds for each arm; each scale's own if not given", None)
    output_dir: str = flag("folder of the results folders NAME-SCALE", "runs")


def reproduce(options: ReproduceAllOptions) -> None:
    """Run what is missing of the named studies under one bar; then print one table and write one report.

    A study that cannot run, for want of its data say, does not keep the others from it.

    Raises:
        ValueError: for an unknown study or scale; and at the end, if a study could not run.
    """
    known = studies()
    for name in options.names:
        if name not in known:
            raise ValueError(f"no installed study {name!r}: choose from {', '.join(known)}")
    proves = ", which shows that the studies run and proves nothing else" if options.scale == "quick" else ""
    folder, title = Path(options.output_dir), f"scale {options.scale}{proves}"
    chosen: dict[str, Study] = {name: load(known[name].value) for name in options.names or known}
    each = {name: ReproduceOptions(options.scale, options.seeds, f"{folder}/{name}-{options.scale}") for name in chosen}
    rows, sections, failures = [], [], []
    with progress(f"scale {options.scale}", sum(len(study.cells(each[name])) for name, study in chosen.items())) as bar:
        for name, study in chosen.items():
            try:
                comparison = study.run_missing(each[name], bar)
            except (ValueError, OSError) as error:
                failures.append(f"{name}: {error}")
                bar.write(failures[-1])
                continue
            rows += summary_rows(comparison)
            here = comparison.folder.name
            sections.append(
                f"## {name}\n\n{study.claim}\n\n![{name}]({here}/plot.png)\n\n[All arms]({here}/report.md)\n"
            )
    print_table(title, SUMMARY_COLUMNS, rows)
    report = folder / f"report-{options.scale}.md"
    parts = [f"# {title}", markdown_table(SUMMARY_COLUMNS, rows), *sections]
    write_text(report, "\n\n".join(parts))
    console.print(f"{report} (with plots)", soft_wrap=True)
    if failures:
        raise ValueError(f"not run: {'; '.join(failures)}")
