import numpy as np
import pytest
from iqa_distill import pool
from iqa_distill.gmsd import gmsd
from iqa_distill.pool import make_pool
from scipy.stats import spearmanr
from skimage import data


@pytest.fixture(scope="module")
def references():
    return [np.ascontiguousarray(image[60:172, 60:180]) for image in (data.coffee(), data.chelsea(), data.astronaut())]


@pytest.fixture(scope="module")
def made(references):
    return make_pool(references, 9, crop=64, workers=1)


def test_labels_are_standardised_minus_gmsd(references, made, monkeypatch):
    assert made.images.shape == (27, 64, 64, 3)
    assert made.references.tolist() == [row for row in range(3) for _ in range(9)]
    assert set(made.kinds) <= set(range(9))
    assert [made.labels.mean(), made.labels.std()] == pytest.approx([0, 1], abs=1e-9)
    levels = []
    real = pool.distort_level
    monkeypatch.setattr(pool, "distort_level", lambda *args: levels.append(args[2]) or real(*args))
    _, measured, _ = pool._of_one((references[0], 40, 64, ["gaussian blur"], [0, 0]))
    assert spearmanr(levels, measured)[0] > 0.9  # worse images measure higher, so their labels are lower
    assert min(levels) < 1.5
    assert max(levels) > 4.5


def test_label_is_that_of_the_crop_beside_its_own_pristine_crop(references):
    flat = [np.full((64, 64, 3), 90, np.uint8)]  # no larger than the crop: the pristine crop is the reference
    images, measured, _ = pool._of_one((flat[0], 3, 64, ["impulse noise"], [0, 0]))
    assert measured.tolist() == [gmsd(image, flat[0]) for image in images]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_makes_the_same(references, made, workers):
    again = make_pool(references, 9, crop=64, workers=workers)
    for one, other in zip(made, again, strict=True):
        assert np.array_equal(one, other)
    another = make_pool(references, 9, crop=64, workers=workers, seed=1)
    assert not np.array_equal(made.images, another.images)


def test_cache_is_read_and_refused_for_other_arguments(references, made, tmp_path, monkeypatch):
    file = tmp_path / "of" / "pool.npz"
    make_pool(references, 9, crop=64, workers=1, cache=file)
    assert [path.name for path in file.parent.iterdir()] == ["pool.npz"]
    monkeypatch.setattr(pool, "_draw", None)
    cached = make_pool(references, 9, crop=64, cache=file)
    assert all(np.array_equal(one, other) for one, other in zip(made, cached, strict=True))
    with pytest.raises(ValueError, match=r"made with crop 64, now 48: delete it"):
        make_pool(references, 9, crop=48, cache=file)
    with pytest.raises(ValueError, match=r"made with references .*: delete it"):
        make_pool(references[::-1], 9, crop=64, cache=file)
    file.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="no file of a synthetic pool"):
        make_pool(references, 9, crop=64, cache=file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["fog"]}, r"no distortions \['fog'\]: expected some of"),
        ({"kinds": []}, "expected some of"),
        ({"crop": 128}, r"reference 0 is \(112, 120\), smaller than the crop of 128"),
        ({"crop": 31}, "32 pixels a side"),
        ({"per_reference": 0}, "a crop of each"),
        ({"references": []}, "expected a reference"),
    ],
)
def test_refuses(references, change, message):
    with pytest.raises(ValueError, match=message):
        make_pool(**{"references": references, "per_reference": 2, "crop": 64, "workers": 1, **change})


def test_labels_that_are_all_equal_are_an_error():
    flat = [np.full((64, 64, 3), 90, np.uint8)]
    with pytest.raises(ValueError, match="all crops of the pool measure the same"):
        make_pool(flat, 4, crop=64, kinds=["gaussian blur"], workers=1)
