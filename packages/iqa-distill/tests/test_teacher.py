import pytest
import timm
import torch
from iqa_distill.images import ScoreScale
from iqa_distill.teacher import NARTeacher
from tiny_sample import references


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return NARTeacher("tiny", crop_size=32, dim=16, depth=2, crops=3, kinds=4, scale=(50.0, 20.0, 0.0, 100.0)).eval()


@pytest.fixture(scope="module")
def pair():
    return torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_kept_features_of_pristine_crops_do_as_well(teacher, pair):
    lq, hq = pair
    whole, kept = teacher(lq, hq), teacher(lq, hq_features=teacher.features(hq))
    assert whole.score.shape == (2,)
    assert [layer.shape for layer in whole.layers] == [(2, 4, 16)] * 2
    assert whole.kinds.shape == (2, 4)
    assert torch.equal(whole.score, kept.score)
    for one, other in zip(whole.layers, kept.layers, strict=True):
        assert torch.equal(one, other)


def test_layers_see_pristine_minus_distorted_by_patches_in_order(teacher, pair):
    seen = []
    hook = teacher.layers[0].register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    teacher(*pair)
    hook.remove()
    own, pristine = teacher.features(pair[0]), teacher.features(pair[1])
    difference = seen[0] - teacher.positions
    torch.testing.assert_close(difference[:, 1], (pristine - own)[:, :, 0, 1])
    torch.testing.assert_close(difference[:, 2], (pristine - own)[:, :, 1, 0])


def test_the_score_also_sees_what_the_distorted_image_is_alone(teacher, pair):
    """Equal differences, other images: another score."""
    lq, hq = pair[0], 20 * pair[1]
    own, shift = teacher.features(lq), torch.randn(2, 16, 2, 2)
    first, second = teacher(lq, hq_features=own + shift), teacher(hq, hq_features=teacher.features(hq) + shift)
    torch.testing.assert_close(first.layers[-1], second.layers[-1], rtol=1e-4, atol=1e-4)
    assert (first.score - second.score).abs().min() > 1e-3


def test_a_trunk_from_scratch_learns(teacher, pair):
    teacher = NARTeacher("tiny", crop_size=32, dim=8, depth=1).train()
    before = teacher.trunk.layers[0][1].running_mean.clone()
    teacher(*pair).score.sum().backward()
    assert all(p.grad is not None for p in teacher.parameters())
    assert not torch.equal(teacher.trunk.layers[0][1].running_mean, before)


def test_a_frozen_trunk_stays_as_it_is():
    teacher = NARTeacher("resnet50", crop_size=32, dim=8, depth=1).train()
    assert teacher.training
    assert not any(module.training for module in teacher.trunk.modules())
    before = {name: value.clone() for name, value in teacher.trunk.state_dict().items()}
    teacher(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)).score.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.trunk.parameters())
    assert teacher.project.weight.grad.any()
    assert all(torch.equal(value, before[name]) for name, value in teacher.trunk.state_dict().items())


def test_the_descriptions_trunk_has_1920_channels():
    """CVRKD-IQA's maps: 29 x 29 for 256 pixels, as the stem has no padding."""
    with torch.device("meta"):
        teacher = NARTeacher("inception_resnet_v2", crop_size=256)
        maps = teacher.trunk(torch.zeros(1, 3, 256, 256))
        assert [tuple(m.shape[1:]) for m in maps] == [(320, 29, 29)] * 6
        assert teacher.project.weight.shape == (256, 1920, 1, 1)
        assert teacher.positions.shape == (1, 256, 256)
        whole = timm.create_model("inception_resnet_v2").state_dict()
    trunk = teacher.trunk.state_dict()  # so that timm's weights fit
    assert {name: value.shape for name, value in trunk.items()}.items() <= {
        n: v.shape for n, v in whole.items()
    }.items()


def test_compare_takes_images_of_any_size_and_gives_their_units(teacher):
    first, second = list(references().values())[:2]
    score = teacher.compare(first, second[:40])
    assert score == teacher.compare(first, second[:40])
    assert score != teacher.compare(second[:40], first)
    crops = [teacher.preprocessing.crops_of(torch.from_numpy(image).movedim(2, 0)) for image in (first, second[:40])]
    expected = teacher(*(teacher.preprocessing.normalize(c) for c in crops)).score.mean() * 20 + 50
    assert score == pytest.approx(float(expected), rel=1e-5)


def test_save_and_load(teacher, pair, tmp_path):
    teacher.save_pretrained(tmp_path)
    loaded = NARTeacher.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(*pair).score, teacher(*pair).score)
    assert loaded.preprocessing == teacher.preprocessing
    assert loaded.scale == ScoreScale(50.0, 20.0, 0.0, 100.0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"backbone": "vgg16"}, "backbone must be one of tiny, inception_resnet_v2, resnet50"),
        ({"crop_size": 100}, "multiple of 16"),
    ],
)
def test_errors(how, message):
    with pytest.raises(ValueError, match=message):
        NARTeacher(**how)


def test_errors_of_the_crops(teacher, pair):
    for given in ({}, {"hq": pair[1], "hq_features": torch.zeros(2, 16, 2, 2)}):
        with pytest.raises(ValueError, match="give either hq, pristine crops, or hq_features"):
            teacher(pair[0], **given)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 32, 32\)"):
        teacher(torch.zeros(1, 3, 48, 48), pair[1])
