"""What the language model is asked, and what a demonstration tells it."""

from __future__ import annotations

import re

VIDEO_PROMPTS = (
    "A short video caption:",
    "A video that shows",
    "Write a short description for the video.",
    "Briefly describe the content of the video.",
    "Use a few words to illustrate what is happening in the video.",
    "Can you briefly explain what you see in the video?",
)
IMAGE_PROMPTS = tuple(text.replace("A video", "An image").replace("video", "image") for text in VIDEO_PROMPTS)
QUESTION = "Question: {} Short answer:"  # the authors' has no blank before Short


def clean_caption(text: str, max_words: int = 50) -> str:
    """A caption as the authors' code prepares it: lower case, a blank for each of ``. ! " ( ) * # : ; ~``, few words.

    Args:
        text: a caption. max_words: the words after these are cut off.

    Returns:
        Words with one blank between; nothing if there were only such marks.

    >>> clean_caption('A "Red" kite:  high up (in the sky)!')
    'a red kite high up in the sky'
    """
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:max_words])


def split_question(text: str) -> tuple[str, str]:
    """Question and answer of a text "question | answer", parted at the first bar.

    Raises:
        ValueError: for no bar, no question, or no answer.

    >>> split_question("left or right? | left|up")
    ('left or right?', 'left|up')
    """
    question, bar, answer = (part.strip() for part in text.partition("|"))
    if not (question and bar and answer):
        missing = "bar" if not bar else "answer" if question else "question"
        raise ValueError(f"expected 'question | answer', but there is no {missing} in {text!r:.80}")
    return question, answer


def prompt(question: str, video: bool, choice: int = 0) -> str:
    """What the language model reads after the query: the question, or, if that is empty, a request for a caption.

    Args:
        question: may be "". video: whether the query has several frames.
        choice: which of the requests, 0 or more; they are counted round.

    >>> prompt("what is it?", video=False), prompt("", video=True, choice=7)
    ('Question: what is it? Short answer:', 'A video that shows')
    """
    prompts = VIDEO_PROMPTS if video else IMAGE_PROMPTS
    return QUESTION.format(question) if question else prompts[choice % len(prompts)]


def demonstration_text(text: str, question: str = "") -> str:
    """What the M-Hub reads beside a demonstration's pictures: the caption alone, or question and answer.

    >>> demonstration_text("a kite"), demonstration_text("red", "what colour?")
    ('a kite', 'Question: what colour? Short answer: red')
    """
    return f"{QUESTION.format(question)} {text}" if question else text
