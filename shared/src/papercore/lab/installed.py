"""The studies of every installed package, found by their entry points."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from papercore.lab.cli import flag, load
from papercore.lab.report import SUMMARY_COLUMNS, print_table, summary_rows
from papercore.lab.study import ReproduceOptions


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
    """Run the named studies in turn and print one line for each task."""
    known = studies()
    for name in options.names:
        if name not in known:
            raise ValueError(f"no installed study {name!r}: choose from {', '.join(known)}")
    rows = []
    for name in options.names or known:
        folder = f"{options.output_dir}/{name}-{options.scale}"
        comparison = load(known[name].value).reproduce(ReproduceOptions(options.scale, options.seeds, folder))
        rows += summary_rows(comparison)
    print_table(f"scale {options.scale}", SUMMARY_COLUMNS, rows)
