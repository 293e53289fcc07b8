import numpy as np
import pytest
from iqa_distill import distortions
from iqa_distill.distortions import (
    DISTORTIONS,
    KADID_DISTORTIONS,
    TID2013_DISTORTIONS,
    distort,
    distort_kadid,
    distort_level,
    to_bytes,
)
from iqa_distill.gmsd import psnr
from skimage import data


@pytest.fixture(scope="module")
def photograph():
    return np.ascontiguousarray(data.coffee()[100:292, 200:456])


@pytest.fixture(scope="module")
def grey():
    return np.full((200, 200, 3), 128, np.uint8)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_levels_get_worse_and_are_the_same_for_the_same_seed(photograph, name):
    before = photograph.copy()
    images = [distort_level(photograph, name, level, 1) for level in range(1, 6)]
    assert all(image.shape == photograph.shape and image.dtype == np.uint8 for image in images)
    qualities = [psnr(image, photograph) for image in images]
    assert qualities[0] < 45
    assert qualities[0] > qualities[2] > qualities[4]
    assert np.array_equal(distort_level(photograph, name, 5, 1), images[4])
    assert np.array_equal(photograph, before)


@pytest.mark.parametrize("name", ["gaussian noise", "impulse noise", "motion blur", "jitter", "color blocks"])
def test_another_seed_is_another_image(photograph, name):
    assert not np.array_equal(distort_level(photograph, name, 3, 1), distort_level(photograph, name, 3, 2))


def test_values_between_two_bytes_are_rounded_not_cut_off(photograph):
    assert to_bytes(np.array([-3.0, 1.4, 1.6, 254.7, 300.0])).tolist() == [0, 1, 2, 255, 255]
    assert np.array_equal(distort(photograph, "gaussian noise", 0.01), photograph)  # cut off, half would lose a level
    assert np.array_equal(distort(photograph, "low contrast", 1e-6), photograph)


@pytest.mark.parametrize("name", ["gaussian noise", "correlated noise", "high-frequency noise"])
def test_additive_noise_has_the_strength_asked_for_in_each_channel(grey, name):
    noise = distort(grey, name, 20.0, 3).astype(float) - 128
    assert noise.std(axis=(0, 1)) == pytest.approx([20] * 3, rel=0.03)
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.03
    neighbours = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
    assert (
        np.sign(round(neighbours, 1)) == {"gaussian noise": 0, "correlated noise": 1, "high-frequency noise": -1}[name]
    )


def test_noise_of_a_seed_is_one_field_at_any_strength(grey):
    weak, strong = (distort(grey, "gaussian noise", strength, 5).astype(float) - 128 for strength in (10, 20))
    assert np.abs(strong - 2 * weak).max() <= 1.5
    few, many = (distort(grey, "impulse noise", share, 5) != 128 for share in (0.02, 0.1))
    assert many[few].all()
    assert many.mean() == pytest.approx(0.1, abs=0.01)


def test_multiplicative_noise_grows_with_the_value():
    halves = np.repeat(np.array([40, 120], np.uint8), 100)[:, None, None] * np.ones((1, 200, 3), np.uint8)
    noise = distort(halves, "multiplicative noise", 0.1).astype(float) - halves
    assert [noise[:100].std(), noise[100:].std()] == pytest.approx([4, 12], rel=0.05)


def test_ycbcr_noise_moves_luma_and_colour_alike(grey):
    noise = (distort(grey, "ycbcr noise", 10.0).astype(float) - 128) @ distortions.TO_YCBCR
    assert noise.std(axis=(0, 1)) == pytest.approx([10] * 3, rel=0.03)


@pytest.mark.parametrize("name", ["gaussian blur", "lens blur", "motion blur"])
def test_blur_keeps_the_mean_and_spreads_a_point(name):
    point = np.zeros((64, 64, 3), np.uint8)
    point[30:34, 30:34] = 255
    blurred = distort(point, name, 6.0).astype(float)
    assert blurred.sum() == pytest.approx(point.sum(dtype=float), rel=0.02)
    assert blurred.max() < 200
    ys, xs = np.nonzero(blurred[..., 0])
    assert [ys.mean(), xs.mean()] == pytest.approx([31.5, 31.5], abs=0.5)


def test_quantization_leaves_multiples_of_the_step(photograph):
    assert set(np.unique(distort(photograph, "quantization", 50.0))) <= {0, 50, 100, 150, 200, 250}
    colors = distort(photograph, "color quantization", 16.0).reshape(-1, 3)
    assert len(np.unique(colors, axis=0)) <= 16


def test_colour_distortions_leave_brightness_alone(photograph):
    value = photograph.max(axis=2)
    assert np.array_equal(distort(photograph, "desaturation", 0.5).max(axis=2), value)
    assert np.ptp(distort(photograph, "desaturation", 1.0), axis=2).max() == 0
    luma = [image @ distortions.TO_YCBCR[:, 0] for image in (photograph, distort(photograph, "color diffusion", 3.0))]
    assert np.abs(luma[1] - luma[0]).mean() < 1
    shifted = distort(photograph, "color shift", 5.0)
    assert np.array_equal(shifted[..., ::2], photograph[..., ::2])  # green alone


def test_tables_name_what_the_data_sets_number():
    assert sorted(KADID_DISTORTIONS) == list(range(1, 26))
    assert len(set(KADID_DISTORTIONS.values())) == 25
    assert {*KADID_DISTORTIONS.values(), *TID2013_DISTORTIONS.values()} == set(DISTORTIONS)
    for function, strengths in DISTORTIONS.values():
        assert callable(function)
        assert list(strengths) == sorted(set(strengths))


def test_a_level_between_two_lies_between_them(photograph, monkeypatch):
    monkeypatch.setitem(DISTORTIONS, "mean shift", (lambda image, strength, rng: strength, (10, 20, 40, 60, 80)))
    assert distort_level(photograph, "mean shift", 2.5) == 30
    assert distort_kadid(photograph, 18, 1) == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: distort(image, "fog", 1.0), "no distortion 'fog': expected one of gaussian noise"),
        (lambda image: distort(image, "jpeg", 0.0), "jpeg: expected a finite strength above 0, got 0"),
        (lambda image: distort(image, "jpeg", float("nan")), "finite strength above 0, got nan"),
        (lambda image: distort(image / 255, "jpeg", 1.0), "expected a uint8 image .* got float64"),
        (lambda image: distort(image[:31], "jpeg", 1.0), r"32 pixels a side or more, got uint8 \(31, 256, 3\)"),
        (lambda image: distort(image[..., 0], "jpeg", 1.0), r"got uint8 \(192, 256\)"),
        (lambda image: distort_level(image, "jpeg", 0.9), "expected a level from 1 to 5, got 0.9"),
        (lambda image: distort_kadid(image, 26, 1), "from 1 to 25, got 26"),
    ],
)
def test_refuses(photograph, call, message):
    with pytest.raises(ValueError, match=message):
        call(photograph)
