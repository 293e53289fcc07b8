import warnings

import numpy as np
import pytest
from iqa_distill import strength
from iqa_distill.distortions import TID2013_DISTORTIONS, distort
from iqa_distill.gmsd import psnr
from iqa_distill.strength import at_psnr
from skimage import data


@pytest.fixture(scope="module")
def photograph():
    return np.ascontiguousarray(data.coffee()[100:292, 200:392])


@pytest.mark.parametrize("name", TID2013_DISTORTIONS.values())
def test_reaches_the_psnr_in_few_steps(photograph, name, monkeypatch):
    calls = []
    monkeypatch.setattr(strength, "distort", lambda *args: calls.append(args) or distort(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for decibels in (33, 25):
            image, found = at_psnr(photograph, name, decibels, 4)
            assert psnr(image, photograph) == pytest.approx(decibels, abs=0.3 if name.startswith("jpeg") else 0.05)
            assert np.array_equal(image, distort(photograph, name, found, 4))
    assert len(calls) <= 20


def test_says_what_cannot_be_reached():
    nearly_flat = np.full((64, 64, 3), 100, np.uint8)
    nearly_flat[:32] += 2
    with pytest.warns(
        UserWarning, match=r"gaussian blur does not bring this image to 21 dB: the nearest is \d\d\.\d+ dB"
    ):
        image, _ = at_psnr(nearly_flat, "gaussian blur", 21)
    assert psnr(image, nearly_flat) < 60


def test_unknown_name_is_refused(photograph):
    with pytest.raises(ValueError, match="no distortion 'fog'"):
        at_psnr(photograph, "fog", 30)
