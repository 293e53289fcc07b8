"""A made-up fleet, so that the first command needs no file."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eclstm.cmapss import SENSORS, SETTINGS
from eclstm.data import RunToFailure


def simulate(units: int, seed: int, conditions: int = 3, cut: bool = False) -> RunToFailure:
    """A made-up fleet in C-MAPSS's shape: 3 settings, 21 sensors, several operating conditions, wear until failure.

    Not physics and not the paper's data. A unit lives 100 to 300 cycles; its wear grows exponentially from a random start;
    a sensor reads a level of the condition it flies in, plus wear at a gain of its own, plus noise; four never change.

    Args:
        units: number of engines. seed: of everything random. conditions: operating conditions, 1 to 6.
        cut: end each history at a random cycle before failure, as test sets do.
    """
    machine = np.random.default_rng(0)  # the design is the same for every fleet
    levels = machine.normal(0, 1, (6, len(SENSORS)))
    gain = machine.choice([-1.0, 1.0], len(SENSORS)) * machine.uniform(0.3, 1.2, len(SENSORS))
    noise = machine.uniform(0.15, 0.5, len(SENSORS))
    constant = machine.permutation(len(SENSORS))[:4]
    operating_points = np.array(
        [[0, 0.0, 100], [10, 0.25, 100], [20, 0.7, 100], [25, 0.62, 60], [35, 0.84, 100], [42, 0.84, 100]]
    )

    rng = np.random.default_rng([seed, 1])
    frames = []
    for unit in range(1, units + 1):
        life = int(rng.integers(100, 301))
        cycles = np.arange(1, life + 1)
        pace = rng.uniform(3, 6)
        wear = rng.uniform(0, 0.15) + np.expm1(pace * cycles / life) / np.expm1(pace)
        flown = rng.integers(0, conditions, life)
        sensors = levels[flown] * 3 + wear[:, None] * gain * 2 + rng.normal(0, 1, (life, len(SENSORS))) * noise
        sensors[:, constant] = levels[0, constant]
        settings = operating_points[flown] + rng.normal(0, [0.002, 0.0003, 0], (life, 3))
        stop = int(rng.integers(30, life - 4)) if cut else life
        frame = pd.DataFrame(np.c_[settings, sensors], columns=[*SETTINGS, *SENSORS])
        frames.append(frame.assign(unit=unit, cycle=cycles, rul=life - cycles)[:stop])
    return RunToFailure(pd.concat(frames), features=[*SETTINGS, *SENSORS], rul="rul", name="simulated fleet")
