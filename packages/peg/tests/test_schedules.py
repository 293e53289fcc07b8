"""The search for a schedule: its trials, and that validation figures choose."""

import dataclasses
import json
from collections import Counter

import pytest
from papercore.lab.study import Comparison, ReproduceOptions
from peg import schedules as module
from peg.schedules import CONTROL, FAMILIES, INVERSE, TRIALS, TRIALS_EACH, best, schedules


def test_every_family_has_the_same_number_of_trials_and_temperatures():
    counts = Counter(name.rsplit(" ", 1)[0] for name in TRIALS)
    assert counts == dict.fromkeys(FAMILIES, TRIALS_EACH)
    control = sorted(TRIALS[f"{CONTROL} {i}"]["temperature"] for i in range(TRIALS_EACH))
    for family, options in FAMILIES.items():
        trials = [TRIALS[f"{family} {i}"] for i in range(TRIALS_EACH)]
        assert sorted(trial["temperature"] for trial in trials) == control
        for name, value in options.items():
            drawn = {trial[name] for trial in trials}
            if isinstance(value, tuple):
                assert len(drawn) == TRIALS_EACH
                assert min(value) < min(drawn) < max(drawn) < max(value)
            else:
                assert drawn == {value}
    assert 1 / INVERSE[1] < control[0] < control[-1] < 1 / INVERSE[0]


def test_the_best_on_validation_queries_is_chosen():
    def score(name, seed):
        number = int(name[-1])
        return 0.1 * number - 0.3 * (seed == 1 and number == 5)

    rows = [
        {"arm": name, "task": "t", "seed": seed, "metrics": {"dev nDCG@10": score(name, seed)}}
        for name in TRIALS
        for seed in (0, 1)
    ]
    chosen = best(Comparison(module.search, "small", ["t"], rows), "t")
    assert chosen == {family: f"{family} 4" for family in FAMILIES}  # 5 is better with one seed alone


def test_arms_cannot_be_chosen(tmp_path):
    with pytest.raises(ValueError, match="leave out --arms"):
        schedules(ReproduceOptions(scale="quick", arms=["ramp 0"], output_dir=str(tmp_path)))


def test_end_to_end(tmp_path, monkeypatch):
    """Search, choice, test and picture, with a run that needs no training."""
    seen = []

    def run(options, seed, folder):
        seen.append(seed)
        score = 1 - abs(options["temperature"] - 0.05) + 0.1 * (options.get("difficulty") == "margin") + 0.001 * seed
        return {"dev nDCG@10": score, "nDCG@10": score, "MRR@10": score, "Recall@10": score}

    monkeypatch.setattr(module, "compare", run)
    monkeypatch.setattr(module, "search", dataclasses.replace(module.search))
    tested = schedules(ReproduceOptions(scale="quick", output_dir=str(tmp_path), seeds=2))
    assert tested.study.method == "ramp, margin"
    assert tested.study.baseline == CONTROL
    assert tested.verdict("sample") == "ran"
    assert (tmp_path / "schedules.png").stat().st_size > 1000
    chosen = {json.loads(line)["options"]["temperature"] for line in (tmp_path / "test/results.jsonl").open()}
    assert chosen == {0.05046}
    assert set(seen) == {1000, 2000, 2001}  # the test's seeds are not those of the search
