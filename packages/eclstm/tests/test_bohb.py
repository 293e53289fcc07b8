import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from eclstm.bohb import Rung, brackets, hyperband

optuna.logging.set_verbosity(optuna.logging.WARNING)
BUDGETS = {"min_budget": 1, "max_budget": 9, "eta": 3}


def space(trial):
    x = trial.suggest_float("x", -2, 2)
    if x < -1:
        raise ValueError("cannot work")
    return {"x": x, "kind": trial.suggest_categorical("kind", ["a", "b"])}


def loss(options, budget, folder):
    """Goes on from what an earlier rung left, as checkpoints do."""
    trained = int((folder / "trained").read_text()) if (folder / "trained").exists() else 0
    assert trained < budget, "a rung ran twice"
    (folder / "trained").write_text(str(budget))
    return (options["x"] - 0.5) ** 2 + (options["kind"] == "b") + 1 / budget


def search(folder, objective=loss, storage=None, **options):
    study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True)
    best = hyperband(study, objective, space, folder, **{**BUDGETS, "seed": 3, **options})
    return study, best


def evaluations(study):
    names = ("bracket", "configuration", "budget")
    return sorted((*(t.user_attrs[n] for n in names), t.params["x"], t.value) for t in study.trials)


def test_brackets_of_the_bohb_paper():
    assert [len(rungs) for rungs in brackets(1, 27)] == [4, 3, 2, 1]
    assert [rungs[0] for rungs in brackets(1, 27)] == [Rung(27, 1), Rung(9, 3), Rung(6, 9), Rung(4, 27)]
    assert brackets(1, 27)[0] == [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(1, 27)]


@pytest.mark.parametrize("budgets", [(0, 9, 3), (9, 3, 3), (1, 9, 1)])
def test_impossible_budgets_are_refused(budgets):
    with pytest.raises(ValueError, match="min_budget"):
        brackets(*budgets)


def test_every_rung_trains_the_best_third_of_the_one_before(tmp_path):
    study, best = search(tmp_path)
    assert len(study.trials) == sum(rung.configurations for rungs in brackets(1, 9) for rung in rungs)
    first = sorted((t for t in study.trials if t.user_attrs["bracket"] == 0), key=lambda t: t.value)
    names = {b: [t.user_attrs["configuration"] for t in first if t.user_attrs["budget"] == b] for b in (1, 3, 9)}
    assert set(names[3]) == set(names[1][:3])
    assert names[9] == names[3][:1]
    assert best.value == min(t.value for t in study.trials if t.user_attrs["budget"] == 9)


def test_invalid_configurations_are_never_run(tmp_path):
    study, _ = search(tmp_path, sweeps=2)
    assert all(t.params["x"] >= -1 for t in study.trials)


def test_the_model_samples_closer_to_the_optimum_than_chance(tmp_path):
    def distance(random_share, seed):
        study, _ = search(tmp_path / f"{random_share}-{seed}", sweeps=4, random_share=random_share, seed=seed)
        later = [t for t in study.trials if t.user_attrs["bracket"] >= 6 and t.user_attrs["budget"] == 1]
        return sum(abs(t.params["x"] - 0.5) for t in later) / len(later)

    seeds = range(3, 9)
    assert sum(distance(0.0, seed) for seed in seeds) < 0.85 * sum(distance(1.0, seed) for seed in seeds)


def test_the_same_seed_gives_the_same_trials_and_another_does_not(tmp_path):
    one, two, other = (search(tmp_path / n, sweeps=2, seed=s)[0] for n, s in (("1", 3), ("2", 3), ("3", 4)))
    assert evaluations(one) == evaluations(two) != evaluations(other)


def test_a_search_cut_off_anywhere_ends_as_if_it_had_not_been(tmp_path):
    whole, _ = search(tmp_path / "whole")
    left = [0]

    def dies(options, budget, folder):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return loss(options, budget, folder)

    storage = f"sqlite:///{tmp_path / 'cut.db'}"
    for allowance in (1, 4, 2, 5):
        left[0] = allowance
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "cut", dies, storage)
    resumed, _ = search(tmp_path / "cut", storage=storage)
    assert evaluations(resumed) == evaluations(whole)


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_bohb import loss, search

def slow(options, budget, folder):
    time.sleep(0.05)
    return loss(options, budget, folder)

search(Path(sys.argv[2]), slow, sys.argv[3])
"""


def test_two_workers_on_one_storage_share_the_work_and_change_nothing(tmp_path):
    alone, _ = search(tmp_path / "alone")
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(study_name="s", storage=storage)
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "shared"), storage]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert evaluations(optuna.load_study(study_name="s", storage=storage)) == evaluations(alone)


def test_a_value_that_is_not_a_number_counts_as_worst(tmp_path):
    study, best = search(
        tmp_path, lambda options, budget, folder: float("nan") if options["x"] > 0 else 1 + options["x"] ** 2
    )
    assert best.params["x"] <= 0
    assert any(t.value == float("inf") for t in study.trials)
