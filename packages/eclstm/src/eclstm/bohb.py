"""Bayesian optimisation and Hyperband (BOHB; Falkner et al., ICML 2018), synchronous, on Optuna's sampler and storage.

Every evaluation (a configuration trained to a budget) is one finished trial in the study, with ``bracket``, ``configuration``
and ``budget`` among its user attributes. What to do next follows from these and the seed alone, so any number of workers that
share the storage and the folder compute the same plan, a killed one is continued by the next, and the same seed
gives the same trials.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

# Evaluations at one budget that a model is built on. BOHB asks for one more than there are parameters; a small search over some
# twenty conditional ones would then stay random to its end.
ENOUGH = 8

Space = Callable[[Trial], dict[str, Any]]
Objective = Callable[[dict[str, Any], int, Path], float]


class Rung(NamedTuple):
    """``configurations`` that are trained to ``budget``."""

    configurations: int
    budget: int


def brackets(min_budget: int, max_budget: int, eta: int = 3) -> list[list[Rung]]:
    """Hyperband's brackets, the most exploratory first; of each rung the best 1/eta go on to the next.

    >>> brackets(3, 27)
    [[Rung(configurations=9, budget=3), Rung(configurations=3, budget=9), Rung(configurations=1, budget=27)], \
[Rung(configurations=3, budget=9), Rung(configurations=1, budget=27)], [Rung(configurations=3, budget=27)]]

    Raises:
        ValueError: unless 1 <= min_budget <= max_budget and eta >= 2.
    """
    if not 1 <= min_budget <= max_budget or eta < 2:
        raise ValueError(f"need 1 <= min_budget <= max_budget and eta >= 2, got {min_budget}, {max_budget}, {eta}")
    rungs = 1
    while min_budget * eta**rungs <= max_budget:
        rungs += 1
    return [
        [Rung(rungs // (s + 1) * eta**s // eta**i, max_budget // eta ** (s - i)) for i in range(s + 1)]
        for s in reversed(range(rungs))
    ]


class Evaluation(NamedTuple):
    """One thing to do: train a configuration of a bracket, by its number there, to a budget."""

    bracket: int
    configuration: int
    budget: int


def hyperband(
    study: optuna.Study,
    objective: Objective,
    space: Space,
    folder: Path,
    *,
    min_budget: int,
    max_budget: int,
    eta: int = 3,
    sweeps: int = 1,
    seed: int = 0,
    random_share: float = 1 / 3,
    on_result: Callable[[Evaluation, FrozenTrial], None] = lambda evaluation, trial: None,
) -> FrozenTrial:
    """Run all brackets ``sweeps`` times, together with any other worker on the same storage and folder.

    A bracket's configurations are sampled when the brackets before it are finished: ``random_share`` of them at random, the
    others by multivariate TPE on the evaluations at the largest budget that has enough of them, as in BOHB.

    Args:
        study: minimises; its storage may be any Optuna storage, its sampler is not used.
        objective: (options, budget, folder of the configuration) -> value to minimise. It is called with growing budgets and
            goes on from what it left in the folder.
        space: suggests the options from a trial; raises ValueError for a combination that cannot work, which is drawn anew.
        folder: for the configurations' folders and locks; workers must share it.
        min_budget, max_budget, eta: see :func:`brackets`. seed: of everything sampled.
        on_result: called after each evaluation of this worker.

    Returns:
        the best trial at ``max_budget``.

    Raises:
        ValueError: as :func:`brackets`.

    Example:
        >>> import tempfile
        >>> def space(trial):
        ...     return {"x": trial.suggest_float("x", -1, 1)}
        >>> def objective(options, budget, folder):  # in earnest: train to the budget, from what is in the folder
        ...     return options["x"] ** 2 + 1 / budget
        >>> study = optuna.create_study()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     best = hyperband(study, objective, space, Path(folder), min_budget=1, max_budget=9)
        >>> best.user_attrs["budget"], len(study.trials)
        (9, 20)
    """
    plan = brackets(min_budget, max_budget, eta) * sweeps
    configurations: dict[int, list[FrozenTrial]] = {}
    while True:
        missing = list(_ready(study, plan))
        if not missing:
            break
        for evaluation in missing:
            work = folder / f"bracket-{evaluation.bracket}-{evaluation.configuration}"
            work.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(work / "lock", timeout=0):
                    if evaluation in _done(study):
                        break
                    b = evaluation.bracket
                    if b not in configurations:
                        configurations[b] = _sample(study, space, b, plan[b][0].configurations, seed, random_share)
                    drawn = configurations[b][evaluation.configuration]
                    value = objective(dict(drawn.user_attrs["options"]), evaluation.budget, work)
                    attributes = {**evaluation._asdict(), "options": drawn.user_attrs["options"]}
                    trial = create_trial(
                        params=drawn.params,
                        distributions=drawn.distributions,
                        value=value if np.isfinite(value) else float("inf"),
                        user_attrs=attributes,
                    )
                    study.add_trial(trial)
                    on_result(evaluation, trial)
                    break
            except Timeout:  # another worker is at it
                continue
        else:
            time.sleep(1.0)
    return min(
        (t for t in _done(study).values() if t.user_attrs["budget"] == max_budget), key=lambda t: (t.value, t.number)
    )


def _done(study: optuna.Study) -> dict[Evaluation, FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {Evaluation(*(t.user_attrs[name] for name in Evaluation._fields)): t for t in trials}


def _ready(study: optuna.Study, plan: list[list[Rung]]) -> Iterator[Evaluation]:
    """What is missing of the first unfinished rung; nothing else can be known before it is finished."""
    done = _done(study)
    for b, rungs in enumerate(plan):
        indices: Sequence[int] = range(rungs[0].configurations)
        for i, rung in enumerate(rungs):
            wanted = [Evaluation(b, index, rung.budget) for index in indices]
            missing = [evaluation for evaluation in wanted if evaluation not in done]
            if missing:
                yield from missing
                return
            if i + 1 < len(rungs):
                ranked = sorted(wanted, key=lambda e: (done[e].value, e.configuration))
                indices = sorted(e.configuration for e in ranked[: rungs[i + 1].configurations])


def _tpe(seed: int) -> TPESampler:
    """Optuna's TPE with BOHB's idea of what is good: the best 15 %, but at least half of ``ENOUGH``.

    By default Optuna learns the good region from the best tenth: one or two points here, while their equals count as bad
    and push away from them. For the same reason without the liar, who would count a bracket's other configurations as bad.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # `gamma` has no successor yet; `multivariate` and `group` are called experimental
        return TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            n_startup_trials=1,
            constant_liar=False,
            gamma=lambda n: max(ENOUGH // 2, math.ceil(0.15 * n)),
        )


def _sample(
    study: optuna.Study, space: Space, bracket: int, n: int, seed: int, random_share: float
) -> list[FrozenTrial]:
    """The configurations of a bracket: a pure function of the seed and of what earlier brackets found."""
    earlier = {e: t for e, t in sorted(_done(study).items()) if e.bracket < bracket}
    model = optuna.create_study()
    for budget in sorted({e.budget for e in earlier}, reverse=True):
        known = [t for e, t in earlier.items() if e.budget == budget]
        if len(known) >= ENOUGH:
            model.add_trials(known)
            break
    modelled = len(model.trials) > 0
    configurations: list[FrozenTrial] = []
    attempt = 0
    while len(configurations) < n:
        stream = np.random.default_rng([seed, bracket, attempt])
        attempt += 1
        draw = int(stream.integers(2**31))
        sampler: BaseSampler = RandomSampler(seed=draw)
        if modelled and stream.random() >= random_share:
            sampler = _tpe(draw)
        model.sampler = sampler
        trial = model.ask()
        try:
            options: Mapping[str, Any] = space(trial)
        except ValueError:
            model.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr("options", dict(options))
        configurations.append(model.trials[trial.number])
    return configurations
