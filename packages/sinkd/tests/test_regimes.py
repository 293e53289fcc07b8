import pytest
from papercore.lab.study import Comparison, ReproduceOptions
from sinkd.cli import app
from sinkd.regimes import COMMON, PARTNERS, TERMS, TRIALS, best, gains_of, regimes, search


def tried(score):
    """A finished search in which an arm has this score."""
    rows = [{"arm": arm, "task": "t", "seed": 0, "metrics": {"score": score(arm)}} for arm in TRIALS]
    return Comparison(search, "small", ["t"], rows)


def test_both_losses_get_equally_many_trials_in_pairs():
    assert len(TRIALS) == 2 * len(COMMON)
    assert sorted(PARTNERS) == list(range(len(COMMON)))
    for i, term in zip(PARTNERS, TERMS, strict=True):
        assert TRIALS[f"SinKD {i}"] == {**TRIALS[f"KL {i}"], **term}


def test_the_best_of_each_loss_is_chosen():
    chosen = best(tried(lambda arm: {"KL 3": 0.9, "SinKD 5": 0.8}.get(arm, 0.1)), "t")
    assert chosen == {"KL": TRIALS["KL 3"], "SinKD": TRIALS["SinKD 5"]}


def test_a_gain_is_over_the_same_trial_without_the_term():
    gains = gains_of(tried(lambda arm: int(arm.split()[1]) + (0.5 if arm.startswith("SinKD") else 0)), "t")
    assert gains == {(term["beta"], term["eps"]): 0.5 for term in TERMS}


def test_the_verb_searches_tests_and_draws(tmp_path, monkeypatch):
    """Two trials of each loss stand for twelve."""
    few = {arm: TRIALS[arm] for i in PARTNERS[:2] for arm in (f"KL {i}", f"SinKD {i}")}
    monkeypatch.setattr("sinkd.regimes.PARTNERS", PARTNERS[:2])
    monkeypatch.setattr("sinkd.regimes.TERMS", TERMS[:2])
    monkeypatch.setattr("sinkd.regimes.TRIALS", few)
    monkeypatch.setattr(search, "arms", few)
    command = ["regimes", "--seeds", "1", "--output_dir", str(tmp_path)]
    for _ in range(2):
        assert app(command) == 0
        assert len((tmp_path / "search" / "results.jsonl").read_text().splitlines()) == 4
        assert len((tmp_path / "test" / "results.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / "regimes.png").stat().st_size > 10_000
        assert len(list(tmp_path.rglob("teachers/*"))) == 1  # both parts share it


def test_no_choice_of_arms():
    with pytest.raises(ValueError, match="leave out --arms"):
        regimes(ReproduceOptions(arms=["KL 0"]))
