import pytest
from mmict.texts import (
    IMAGE_PROMPTS,
    QUESTION,
    VIDEO_PROMPTS,
    clean_caption,
    demonstration_text,
    prompt,
    split_question,
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Woman  firefighter: dark\tskin tone.", "woman firefighter dark skin tone"),
        ('a."b"(c)*d#e:f;g~h!i', "a b c d e f g h i"),
        ("Is it? it's 50% up-left, yes", "is it? it's 50% up-left, yes"),  # these marks stay
        (" .!: ", ""),
        ("w " * 60, "w " * 49 + "w"),
    ],
)
def test_clean_caption(text, clean):
    assert clean_caption(text) == clean


def test_max_words_are_counted_after_cleaning():
    assert clean_caption("A: b . c", max_words=2) == "a b"


def test_split_question_at_the_first_bar():
    assert split_question(" what? |a|b ") == ("what?", "a|b")


@pytest.mark.parametrize(("text", "missing"), [("what?|  ", "answer"), ("|red", "question"), ("what? red", "bar")])
def test_split_question_refuses(text, missing):
    with pytest.raises(ValueError, match=rf"there is no {missing} in "):
        split_question(text)


def test_prompts():
    assert len(set(IMAGE_PROMPTS)) == len(set(VIDEO_PROMPTS)) == 6
    assert IMAGE_PROMPTS[:2] == ("A short image caption:", "An image that shows")
    assert not any("video" in text for text in IMAGE_PROMPTS)
    assert [prompt("", video=True, choice=i) for i in range(7)] == [*VIDEO_PROMPTS, VIDEO_PROMPTS[0]]
    assert prompt("", video=False) == IMAGE_PROMPTS[0]
    assert prompt("is {x} there?", video=True, choice=3) == "Question: is {x} there? Short answer:"


def test_a_demonstration_has_the_answer_but_no_request():
    assert demonstration_text("a red kite", "") == "a red kite"
    assert demonstration_text("red", "what colour?") == QUESTION.format("what colour?") + " red"
