"""Texts as token ids: marks, targets of both kinds of language model, and files."""

import golden_parts
import pytest
from mmict.processor import Processor
from tiny_mmict import processor


def ids(found, words):
    return [found.lm_tokenizer.convert_tokens_to_ids(word) for word in words.split()]


def opt(**how):
    """A tokenizer that marks the beginning of a text, as OPT's."""
    words = ["a", "red", "cat", "<nl>"]
    lm = golden_parts.tokenizer(words, {"<pad>": 1, "</s>": 2}, "</s>", None)
    return Processor(processor().hub_tokenizer, lm, causal=True, **how)


def test_the_hub_and_the_language_model_have_marks_of_their_own():
    found = processor()
    hub, lm = found.hub(["a red cat"])[0], found.lm(["a red cat"])[0]
    assert found.hub_tokenizer.convert_ids_to_tokens(hub) == ["[CLS]", "a", "red", "cat", "[SEP]"]
    assert found.lm_tokenizer.convert_ids_to_tokens(lm) == ["a", "red", "cat", "</s>"]
    assert found.hub([]) == found.lm([]) == []


def test_targets_of_an_encoder_decoder_end_the_sequence():
    found = processor()
    assert found.targets(["a red cat", ""]) == [ids(found, "a red cat </s>"), ids(found, "</s>")]


def test_targets_of_a_decoder_only_model_do_not_begin_again():
    found = opt()
    assert found.lm(["a cat"]) == [ids(found, "</s> a cat")]
    assert found.targets(["a cat"]) == [ids(found, "a cat </s>")]


def test_official_targets_begin_again_and_end_with_a_line():
    found = opt(official_targets=True)
    assert found.targets(["a cat"]) == [ids(found, "</s> a cat <nl>")]


def test_long_texts_are_cut_and_still_end():
    for found in (processor(), processor(causal=True), opt()):
        found.max_tokens = 5
        (target,) = found.targets(["a red cat " * 9])
        assert len(target) == len(found.hub(["a cat " * 9])[0]) == len(found.lm(["a cat " * 9])[0]) == 5
        assert target[-1] == found.lm_tokenizer.eos_token_id


def test_texts_come_back_without_marks():
    found = processor()
    assert found.text(ids(found, "<pad> a cat </s> <pad>")) == "a cat"


def test_padding_is_the_end_where_there_is_none():
    found = processor()
    assert found.pad == 0
    found.lm_tokenizer.pad_token = None
    assert found.pad == found.lm_tokenizer.eos_token_id


def test_files_give_the_same(tmp_path):
    found = opt(max_tokens=7, official_targets=True)
    found.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert (again.causal, again.max_tokens, again.official_targets) == (True, 7, True)
    texts = ["a red cat", "a dog"]
    for name in ("hub", "lm", "targets"):
        assert getattr(again, name)(texts) == getattr(found, name)(texts)


def test_an_answer_must_be_able_to_end():
    bad = processor()
    bad.lm_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Processor(bad.hub_tokenizer, bad.lm_tokenizer)
