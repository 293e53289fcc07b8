"""What guides targets: regions and tags, by values worked out by hand, shuffled together, or refused in one line."""

import math

import pytest
import softclip.guidance
import torch
from softclip.guidance import GuideOptions, centred, collect_guides, tf_idf
from softclip.roi import RoiTags
from softclip.sample import render_scenes


@pytest.fixture(scope="module")
def scenes():
    return render_scenes(12)


class TestCollected:
    def test_are_the_regions_and_tags_of_each_image(self, scenes):
        guides = collect_guides(scenes, GuideOptions("thumbnails"))
        assert guides.roi.shape == (12, 4, 196)
        assert guides.tags == scenes.tags
        assert guides.roi_mask.sum(1).tolist() == [len(tags) for tags in scenes.tags]

    def test_tags_of_a_detector_come_before_the_datas_own(self, scenes, monkeypatch):
        def detector(image, index):
            return RoiTags(torch.ones(1, 2), [f"thing {index}"])

        monkeypatch.setattr(softclip.guidance, "provider_for", lambda spec, pairs: detector)
        assert collect_guides(scenes, GuideOptions("detector:x")).tags[3] == ["thing 3"]

    def test_frozen_ones_are_one_vector_an_image_and_tags_with_weights(self, scenes):
        plain, frozen = (collect_guides(scenes, GuideOptions("thumbnails", g)) for g in ("trained", "frozen"))
        assert torch.equal(frozen.roi, centred(plain.roi, plain.roi_mask))
        assert torch.equal(frozen.tags, tf_idf(scenes.tags))
        assert frozen.roi.shape == (12, 1, 4 * 196)
        assert frozen.roi_mask.tolist() == [[True]] * 12

    @pytest.mark.parametrize("guides", ["trained", "frozen"])
    def test_shuffled_ones_are_still_of_one_image(self, scenes, guides):
        plain, shuffled = (collect_guides(scenes, GuideOptions("thumbnails", guides, s), seed=3) for s in (False, True))
        order = [int(torch.isclose(plain.roi, roi, atol=1e-5).flatten(1).all(1).nonzero()) for roi in shuffled.roi]
        assert sorted(order) == list(range(12))
        assert order != list(range(12))
        assert torch.equal(shuffled.roi_mask, plain.roi_mask[order])
        tags = plain.tags if guides == "frozen" else [plain.tags[i] for i in order]
        assert torch.equal(shuffled.tags, tags[order]) if guides == "frozen" else shuffled.tags == tags
        other = collect_guides(scenes, GuideOptions("thumbnails", guides, True), seed=4)
        assert not torch.equal(other.roi, shuffled.roi)


def test_centred_by_hand():
    """Of the first place, means are over both images; the second image has no second region."""
    roi = torch.tensor([[[1.0, 2.0], [10.0, 20.0]], [[3.0, 6.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert centred(roi, mask).tolist() == [[[-1, -2, 0, 0]], [[1, 2, 0, 0]]]


def test_centred_where_no_image_has_a_region():
    assert not centred(torch.ones(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool)).any()


def test_tf_idf_by_hand():
    """Columns are moon, sky, sun; a tag in two of three images weighs 1 + ln(4/3), one in a single image 1 + ln 2."""
    often, once = 1 + math.log(4 / 3), 1 + math.log(2)
    expected = torch.tensor([[0, often, 2 * often], [0, 0, often], [once, often, 0]])
    torch.testing.assert_close(tf_idf([["sun", "sky", "sun"], ["sun"], ["moon", "sky"]]), expected)
    assert tf_idf([["a"], []])[1].tolist() == [0]


class TestRefused:
    @pytest.mark.parametrize(
        ("roi", "message"),
        [
            (None, "say what they are by --roi, or take --arm soft_self or clip"),
            ("none", "--roi none has none: take --arm soft_self or clip"),
            ("x", "roi 'x': expected none, thumbnails"),
        ],
    )
    def test_regions_that_are_not_there(self, roi, message, scenes):
        with pytest.raises(ValueError, match=message):
            collect_guides(scenes, GuideOptions(roi))

    def test_tags_that_are_not_there(self):
        scenes = render_scenes(3)
        scenes.tags = None
        with pytest.raises(
            ValueError, match="the data have none: name them by --tags_field, or take --roi detector:NAME"
        ):
            collect_guides(scenes, GuideOptions("thumbnails"))

    def test_more_tags_than_memory(self, monkeypatch):
        monkeypatch.setattr(softclip.guidance, "MOST_FROZEN", 15)
        with pytest.raises(ValueError, match="2 distinct tags of 2 images do not fit in memory: take --guides trained"):
            tf_idf([["a"], ["b"]])

    def test_guides_of_another_kind(self):
        with pytest.raises(ValueError, match="guides must be trained or frozen, got 'x'"):
            GuideOptions(guides="x")
