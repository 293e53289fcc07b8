import numpy as np
import pytest
from mmict.sample import COLOURS, LAYOUTS, SHAPES, SIZES, render_shapes
from mmict.texts import clean_caption


@pytest.fixture(scope="module")
def shapes():
    return render_shapes(300)


@pytest.fixture(scope="module")
def asked():
    return render_shapes(300, questions=True)


def things(caption):
    """Words of each shape that a caption names."""
    return [words.split()[1:] for words in caption.replace(" left of ", " above ").split(" above ")]


def test_the_same_again_and_a_beginning_of_more(shapes):
    again = render_shapes(20)
    assert all(np.array_equal(again.open(i), shapes.open(i)) for i in range(20))
    assert (again.texts, again.ids) == (shapes.texts[:20], shapes.ids[:20])
    assert render_shapes(20, seed=1).texts != again.texts


def test_captions_say_where_which_shape_is(shapes):
    """The colour named first is the upper or the left one, and takes more pixels if it alone is large."""
    for i, caption in enumerate(shapes.texts):
        pixels = shapes.open(i).astype(int)
        near = [np.argwhere(np.abs(pixels - COLOURS[colour]).max(2) < 12) for _, colour, _ in things(caption)]
        assert all(len(each) > 15 for each in near), caption
        if len(near) == 2:
            axis = 0 if "above" in caption else 1
            assert near[0][:, axis].mean() < near[1][:, axis].mean(), caption
        for (extent, _, _), each in zip(things(caption), near, strict=True):
            assert (np.ptp(each[:, 0]) > 13) == (extent == "large"), caption


def test_all_words_are_used(shapes):
    assert {word for text in shapes.texts for thing in things(text) for word in thing} == {*COLOURS, *SHAPES, *SIZES}
    assert all(any(part in text for text in shapes.texts) for part in (" above ", " left of "))
    assert len(LAYOUTS) == 3
    assert shapes.texts == shapes.groups == [clean_caption(text) for text in shapes.texts]
    assert shapes.kind == "captions"


def test_answers_follow_from_the_picture(asked):
    """The group is the caption of the picture."""
    for question, answer, caption in zip(asked.questions, asked.texts, asked.groups, strict=True):
        words, seen = question.rstrip("?").split(), things(caption)
        if question.startswith("how many"):
            assert answer == ("one", "two")[len(seen) - 1]
        elif question.startswith("is there"):
            assert answer == ("yes" if words[3:] in [thing[1:] for thing in seen] else "no")
        else:
            assert [words[-1], answer] in ([thing[2], thing[1]] for thing in seen) or (
                [answer, words[-1]] in ([thing[2], thing[1]] for thing in seen)
            )
    assert asked.kind == "questions"
    assert {"yes", "no", "one", "two", *COLOURS, *SHAPES} == set(asked.texts)
    assert asked.references[0] == [asked.texts[0]]


def test_refuses():
    with pytest.raises(ValueError, match="a count of at least 0 and a size of at least 16, got 3 and 8"):
        render_shapes(3, size=8)
