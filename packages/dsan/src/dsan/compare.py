"""Which arm of a study reads the same words right more often: McNemar's test, seed by seed; the verb ``compare``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import print_table

from dsan.metrics import mcnemar

Bits = NDArray[np.bool_]


def record(path: Path, run: str, right: dict[str, Bits], digits: Bits) -> None:
    """Append which words a run has read right, by each branch, and which words have a digit."""
    packed = {name: np.packbits(bits).tobytes().hex() for name, bits in {**right, "digit": digits}.items()}
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"run": run, "words": len(digits), **packed}) + "\n")


def read_records(path: Path) -> dict[str, dict[str, Bits]]:
    """What :func:`record` wrote, by run; of a run that is there twice the last.

    Raises:
        ValueError: for a file that is not such a record.
    """
    runs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            run, words = row.pop("run"), row.pop("words")
            runs[run] = {
                k: np.unpackbits(np.frombuffer(bytes.fromhex(v), np.uint8))[:words] > 0 for k, v in row.items()
            }
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a record of `dsan reproduce` ({error!r})") from None
    return runs


@dataclass
class CompareOptions:
    """Which study."""

    folder: str = flag("results folder of `dsan reproduce`, with results.jsonl and correct.jsonl", positional=True)
    baseline: str | None = flag("arm to compare with; the study's own if not given", None)


def compare(options: CompareOptions) -> list[dict[str, Any]]:
    """The verb ``compare``: each arm against the baseline on all words and on those with a digit, context branch, seed by seed.

    Returns:
        Rows with arm, seed, words, only_baseline, only_arm and p (two-sided, exact), also written to mcnemar.json.

    Raises:
        ValueError: for an unknown baseline, or a folder without two runs of a seed.
    """
    from dsan.study import study

    folder = Path(options.folder)
    baseline = options.baseline or study.baseline
    if baseline not in study.arms:
        raise ValueError(f"no arm {baseline!r}; the arms are {', '.join(study.arms)}")
    runs: dict[tuple[str, int], dict[str, Bits]] = {}
    for name, bits in read_records(folder / "correct.jsonl").items():
        for arm in study.arms:
            words = arm.replace(" ", "-").replace(",", "")
            if f"-{words}-" in name:
                runs[arm, int(name.split(f"-{words}-")[1].split("-")[0])] = bits
    rows: list[dict[str, Any]] = []
    for (arm, seed), bits in sorted(runs.items()):
        base = runs.get((baseline, seed))
        if arm == baseline or base is None:
            continue
        for which, chosen in (("all", slice(None)), ("with a digit", bits["digit"])):
            found = mcnemar(base["ctx"][chosen].tolist(), bits["ctx"][chosen].tolist())
            rows.append(
                {"arm": arm, "seed": seed, "words": which, "only_baseline": found.only_a, "only_arm": found.only_b}
            )
            rows[-1]["p"] = found.p
    if not rows:
        raise ValueError(f"{folder}: no seed has both {baseline!r} and another arm")
    write_json(folder / "mcnemar.json", rows)
    print_table(
        f"right in one arm alone, against {baseline}", ["arm", "seed", "words", "baseline alone", "arm alone", "p"],
        [[r["arm"], str(r["seed"]), r["words"], str(r["only_baseline"]), str(r["only_arm"]), f"{r['p']:.2g}"] for r in rows],
    )  # fmt: skip
    return rows
