import numpy as np
import pytest
from iqa_distill import sample


@pytest.fixture(scope="module")
def rated():
    return sample.sample_ratings()


def test_is_always_the_same(rated, monkeypatch):
    monkeypatch.setattr(sample, "LEVELS", (5,))
    again = sample.sample_ratings()
    assert len(again) == 50
    assert np.array_equal(again.scores, rated.scores[4::5])
    assert all(np.array_equal(again.open(i), rated.open(5 * i + 4)) for i in range(50))


def test_scores_fall_with_the_level(rated):
    scores = rated.scores.reshape(10, 5, 5)
    assert (np.diff(scores.mean(axis=0)) < 0).all()
    assert 0 < scores.min() < 40
    assert 95 < scores.max() < 100


def test_each_image_names_its_kind_and_its_pristine_photograph(rated):
    pristine = sample.sample_references()
    assert [len(pristine), len(rated), len(set(rated.names))] == [10, 250, 250]
    assert {rated.open(i).shape for i in range(250)} == {image.shape for image in pristine.values()} == {(256, 320, 3)}
    for i in (0, 99, 249):
        assert rated.names[i].startswith(f"{rated.references[i]} {rated.distortions[i]} ")
        difference = np.abs(rated.open(i).astype(float) - pristine[rated.references[i]])
        others = [np.abs(rated.open(i).astype(float) - image).mean() for image in pristine.values()]
        assert difference.mean() == min(others)
