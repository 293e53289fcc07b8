"""Samples made ready: features, neighbours, and which demonstrations a query gets."""

import pytest
import torch
from mmict.corpus import augmented, new_sampler, prepare
from tiny_mmict import model, samples, save_parts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return model(folder)


@pytest.fixture(scope="module")
def train(tiny):
    return prepare(tiny, samples())


def test_pictures_are_features_by_row(tiny, train):
    seen = tiny.vision(tiny.vision.pixels([train.samples.open(3)]))
    torch.testing.assert_close(train.pictures(torch.tensor([3])), seen, atol=1e-2, rtol=1e-2)


def test_a_video_is_compared_by_the_mean_of_its_frames(train):
    frames = train.samples.frames[2]
    pooled = torch.nn.functional.normalize(train.pictures(torch.tensor(frames)).mean(1), dim=1)
    torch.testing.assert_close(train.visual[2], pooled.mean(0))
    assert train.text is None


def test_features_are_kept_in_a_file(tiny, tmp_path, monkeypatch):
    prepare(tiny, samples(), tmp_path / "features.npy")
    monkeypatch.setattr(tiny.vision, "forward", None)
    again = prepare(tiny, samples(), tmp_path / "features.npy")
    assert len(again.visual) == 12


def test_crops_are_pixels_drawn_by_torch(tiny, train):
    crops = augmented(train, tiny.vision)
    rows = torch.tensor([0, 3])
    torch.manual_seed(0)
    first, second = crops.pictures(rows), crops.pictures(rows)
    assert first.shape == (2, 3, 16, 16)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, crops.pictures(rows))
    assert crops.visual is train.visual
    assert train.pictures(rows).shape == (2, 5, 16)  # as before


@pytest.mark.parametrize("sampler", ["random", "visual"])
def test_demonstrations_are_what_the_sampler_draws(tiny, train, sampler):
    test = prepare(tiny, samples(6, seed=1))
    draw = new_sampler(train, sampler, k=3, seed=5)
    ids, groups = test.samples.ids, test.samples.groups
    expected = draw.draw(ids, groups, visual=test.visual, epoch=2).tolist()
    assert test.demonstrations(range(6), draw, train, 3, epoch=2) == expected
    assert test.demonstrations([4, 1], draw, train, 3, epoch=2) == [expected[4], expected[1]]
    assert test.demonstrations([4, 1], draw, train, 0) == [[], []]
    assert test.demonstrations([], draw, train, 2) == []


def test_never_of_the_own_group(train):
    draw, groups = new_sampler(train, k=5), train.samples.groups
    shown = train.demonstrations(range(12), draw, train, 5)
    assert all(groups[row] not in {groups[i] for i in of} for row, of in enumerate(shown))


def test_a_sample_may_name_its_demonstrations(train):
    found = samples(4, seed=1)
    found.demos = [("0 3", "0 0", "0 7"), (), ("0 1",), ()]
    test = prepare_texts(found, train)
    draw = new_sampler(train, k=2)
    shown = test.demonstrations([2, 0, 1], draw, train, 2)
    assert shown[:2] == [[1], [0, 7]]  # the last ones, next to the query
    assert shown[2] == draw.draw(["1 1"], ["1 group 0"]).tolist()[0]
    assert test.demonstrations([0], draw, train, 0) == [[]]


def prepare_texts(found, like):
    return type(like)(found, like.processor, lambda rows: rows)


@pytest.mark.parametrize("sampler", ["text", "mixed"])
def test_captions_have_no_text_neighbours(tiny, train, sampler):
    with pytest.raises(ValueError, match=f"sampler '{sampler}' compares questions, but these samples have none"):
        new_sampler(train, sampler)
    asked = prepare(tiny, samples(questions=True))
    assert asked.text.shape == (12, 16)
    shown = asked.demonstrations([0, 5], new_sampler(asked, sampler, k=2), asked, 2)
    assert [len(of) for of in shown] == [2, 2]


def test_the_same_question_is_the_nearest(tiny):
    found = samples(questions=True)
    found.questions[9] = found.questions[4]
    asked = prepare(tiny, found)
    assert asked.demonstrations([4], new_sampler(asked, "text", k=3), asked, 3)[0][-1] == 9


def test_prompts(train):
    assert train.prompt(0, 0) == train.prompt(3, 6)  # six requests, counted round
    assert train.prompt(0, 0) != train.prompt(0, 1)
    assert train.prompt(2, 0) != train.prompt(0, 0)  # of a video
