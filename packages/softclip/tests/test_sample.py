import re
from collections import Counter
from pickle import dumps, loads

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from softclip.sample import CLASSES, COLOURS, SHAPES, render_scenes, scene_similarity


@pytest.fixture(scope="module")
def scenes():
    return render_scenes(300)


def test_scenes_are_the_same_again_and_a_beginning_of_more(scenes):
    again = loads(dumps(render_scenes(20)))
    assert all((np.asarray(again.open(i)) == np.asarray(scenes.open(i))).all() for i in range(20))
    assert (again.captions, again.tags, again.labels) == (scenes.captions[:20], scenes.tags[:20], scenes.labels[:20])
    assert again.groups == scenes.groups[:20]
    assert render_scenes(20, seed=1).captions != again.captions


def test_objects(scenes):
    assert {len(tags) for tags in scenes.tags} == {1, 2, 3, 4}
    assert {tag for tags in scenes.tags for tag in tags} == set(CLASSES)
    assert len(CLASSES) == len(COLOURS) * len(SHAPES) == 30


def test_a_box_holds_all_of_an_object_and_no_more(scenes):
    """Pixels of the object's colour reach the box's four sides."""
    for i in range(100):
        pixels = np.asarray(scenes.open(i)).astype(int)
        for tag, box in zip(scenes.tags[i], (scenes.boxes[i] * 64).round().int().tolist(), strict=True):
            near = np.abs(pixels - COLOURS[tag.split()[0]]).max(2) < 45
            x0, y0, x1, y1 = (max(0, box[0] - 1), max(0, box[1] - 1), box[2] + 1, box[3] + 1)
            rows, columns = np.nonzero(near[y0:y1, x0:x1])
            found = np.array([x0 + columns.min(), y0 + rows.min(), x0 + columns.max() + 1, y0 + rows.max() + 1])
            assert np.abs(found - box).max() <= 3, (i, tag, box, found)  # the tip of a star is thin


def test_the_label_is_the_largest_object(scenes):
    for tags, boxes, label in zip(scenes.tags, scenes.boxes, scenes.labels, strict=True):
        assert scenes.classes[label] == tags[0]
        assert (boxes[0, 3] - boxes[0, 1] > 1.5 * (boxes[1:, 3] - boxes[1:, 1])).all()
        assert (boxes >= -1e-6).all()
        assert (boxes <= 1 + 1e-6).all()


def test_captions_name_some_of_the_objects(scenes):
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3}
    named = []
    for caption, tags in zip(scenes.captions, scenes.tags, strict=True):
        found = re.findall(rf"(\w+) ((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))", caption)
        for number, kind in found:
            assert numbers[number] <= Counter(tags)[kind], (caption, tags)
        named.append(sum(numbers[number] for number, _ in found))
    assert set(named) == {1, 2, 3}
    assert any("two" in caption for caption in scenes.captions)
    assert max(Counter(scenes.captions).values()) > 1


def test_groups_are_scenes_of_the_same_objects(scenes):
    multisets = [tuple(sorted(tags)) for tags in scenes.tags]
    assert len(set(scenes.groups)) == len(set(multisets)) < len(multisets)
    assert len(set(zip(scenes.groups, multisets, strict=True))) == len(set(multisets))


def test_similarity_is_the_best_matching(scenes):
    some = scenes.select(range(0, 300, 6))
    kinds = [[tag.split() for tag in tags] for tags in some.tags]
    expected = np.zeros((len(some), len(some)))
    for i, ours in enumerate(kinds):
        for j, theirs in enumerate(kinds):
            alike = np.array([[((a == c) + (b == d)) / 2 for c, d in theirs] for a, b in ours])
            expected[i, j] = alike[linear_sum_assignment(alike, maximize=True)].sum() / max(alike.shape)
    np.testing.assert_allclose(scene_similarity(some), expected, atol=1e-12)


def test_similarity_is_one_within_groups_alone(scenes):
    groups = np.array(scenes.groups)
    assert ((scene_similarity(scenes) == 1) == (groups[:, None] == groups)).all()


@pytest.mark.parametrize("arguments", [{"count": -1}, {"count": 1, "size": 8}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="expected a count of at least 0 and a size of at least 16"):
        render_scenes(**arguments)
