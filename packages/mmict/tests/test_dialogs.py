"""Batches of dialogs: order, padding, each image once."""

import pytest
import torch
from mmict.corpus import Corpus
from mmict.dialogs import make_demonstrations, make_dialogs, pad
from mmict.texts import IMAGE_PROMPTS, VIDEO_PROMPTS
from tiny_mmict import processor, samples


def corpus(seed=0, **how):
    """Features of image i are all i + 100 * seed."""
    found = samples(seed=seed, **how)
    return Corpus(found, processor(), lambda rows: (rows + 100.0 * seed)[:, None, None].expand(-1, 2, 4))


@pytest.fixture(scope="module")
def train():
    return corpus()


def words(ids, mask, tokenizer):
    return [tokenizer.decode(row[seen], skip_special_tokens=True).lower() for row, seen in zip(ids, mask, strict=True)]


def test_pairs_stand_in_order_and_a_dialog_ends_with_its_query(train):
    dialogs = make_dialogs(train, [0, 7, 1], train, [[4, 3], [], [6]], choices=[0, 3, 8])
    assert dialogs.query.tolist() == [False, False, True, True, False, True]
    texts, tokenizers = train.samples.texts, (train.processor.hub_tokenizer, train.processor.lm_tokenizer)
    asked = [IMAGE_PROMPTS[i % len(IMAGE_PROMPTS)].lower() for i in (0, 3, 8)]
    expected = [texts[4], texts[3], asked[0], asked[1], texts[6], asked[2]]
    for ids, mask, tokenizer in zip(
        (dialogs.hub_ids, dialogs.lm_ids), (dialogs.hub_mask, dialogs.lm_mask), tokenizers, strict=True
    ):
        found = [text.replace(" ", "") for text in words(ids, mask, tokenizer)]
        assert found == [text.replace(" ", "") for text in expected]
    assert dialogs.labels[0][dialogs.labels[0] != -100].tolist() == train.targets[0]
    assert (dialogs.labels != -100).sum(1).tolist() == [len(train.targets[i]) for i in (0, 7, 1)]


def test_a_query_does_not_show_its_text(train):
    dialogs = make_dialogs(train, [7], train, [[]])
    text = train.samples.texts[7]
    assert text not in words(dialogs.hub_ids, dialogs.hub_mask, train.processor.hub_tokenizer)[0]
    assert text not in words(dialogs.lm_ids, dialogs.lm_mask, train.processor.lm_tokenizer)[0]


def test_each_distinct_image_is_there_once(train):
    dialogs = make_dialogs(train, [2, 0], train, [[5, 0], [5]])  # 2 and 5 are videos of 3 frames
    assert len(dialogs.vision) == 7
    frames = train.samples.frames
    for pair, row in enumerate([5, 0, 2, 5, 0]):
        own = dialogs.frames[pair]
        assert dialogs.vision[own[own >= 0], 0, 0].tolist() == list(frames[row])


def test_demonstrations_may_be_of_other_samples(train):
    test = corpus(seed=1)
    dialogs = make_dialogs(test, [0], train, [[1]])
    assert dialogs.vision[dialogs.frames[:, 0], 0, 0].tolist() == [1, 100]


def test_questions_are_the_prompt_and_part_of_a_demonstration():
    asked = corpus(questions=True)
    dialogs = make_dialogs(asked, [2], asked, [[4]])
    shown, query = words(dialogs.hub_ids, dialogs.hub_mask, asked.processor.hub_tokenizer)
    assert asked.samples.questions[4] in shown
    assert shown.endswith(asked.samples.texts[4])
    assert asked.samples.questions[2] in query
    assert "short answer" in query


def test_videos_are_asked_for_as_videos(train):
    dialogs = make_dialogs(train, [2], train, [[]], choices=[1])
    assert words(dialogs.hub_ids, dialogs.hub_mask, train.processor.hub_tokenizer) == [VIDEO_PROMPTS[1].lower()]


def test_demonstrations_alone_have_no_query(train):
    dialogs = make_demonstrations(train)
    assert len(dialogs.query) == len(train)
    assert not dialogs.query.any()
    assert dialogs.labels is None
    assert dialogs.to("cpu").labels is None


def test_to_moves_everything(train):
    moved = make_dialogs(train, [0], train, [[4]]).to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values())


def test_pad():
    padded, mask = pad([[1, 2, 3], [], [4]], -1)
    assert padded.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert mask.sum(1).tolist() == [3, 0, 1]
    assert padded.dtype == torch.int64
