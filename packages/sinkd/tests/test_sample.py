import re
import sys
import sysconfig
from collections import Counter

import pytest
import torch
from sinkd import sample as module
from sinkd.sample import TOPICS, sample, train_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def parts():
    return sample(0)


@pytest.fixture(scope="module")
def tokenizer(parts):
    return train_tokenizer(parts[0].first)


def test_has_a_few_thousand_texts_in_eight_classes_of_like_size(parts):
    train, test = parts
    assert 1500 <= len(train) + len(test) <= 3000
    assert len(test) == round(0.2 * (len(train) + len(test)))
    sizes = Counter([*train.labels, *test.labels])
    assert sorted(sizes) == list(range(8)) == list(range(len(train.task.labels)))
    assert min(sizes.values()) > 150
    assert max(sizes.values()) <= 350


def test_no_text_occurs_twice_or_names_its_module(parts):
    train, test = parts
    texts = train.first + test.first
    assert len(set(texts)) == len(texts)
    for text, label in zip(texts, train.labels + test.labels, strict=True):
        modules = TOPICS[train.task.labels[label]].replace("_", "").split()
        assert not re.search("|".join(modules), text, re.IGNORECASE)
        assert len(text.split()) >= 5


def test_seed_decides_the_split_and_nothing_else(parts):
    again, other = sample(0), sample(1)
    assert again == parts
    assert set(other[1].ids) != set(parts[1].ids)
    everything = [dict(zip(a.ids + b.ids, a.first + b.first, strict=True)) for a, b in (parts, other)]
    assert everything[0] == everything[1]


def test_a_bag_of_words_learns_it_but_not_all_of_it(parts):
    """Room for a teacher above, and for a student below."""
    train, test = parts
    words = {w: i for i, w in enumerate(sorted({w for t in train.first for w in re.findall(r"\w+", t.lower())}))}

    def bags(examples):
        x = torch.zeros(len(examples), len(words))
        for row, text in zip(x, examples.first, strict=True):
            row[[words[w] for w in re.findall(r"\w+", text.lower()) if w in words]] = 1
        return x / x.sum(1, keepdim=True).clamp(min=1).sqrt(), torch.tensor(examples.labels)

    torch.manual_seed(0)
    (x, y), (x_test, y_test) = bags(train), bags(test)
    model = torch.nn.Linear(len(words), 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert 0.60 < (model(x_test).argmax(1) == y_test).float().mean() < 0.85


def test_nothing_is_imported(monkeypatch):
    modules = ["wsgiref.handlers", "imaplib", "poplib", "xmlrpc.server"]
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module._corpus.cache_clear()
    sample(0)
    assert not set(modules) & set(sys.modules)


def test_a_library_without_sources_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    module._corpus.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="no sources of asyncio"):
            sample(0)
    finally:
        module._corpus.cache_clear()


class TestTokenizer:
    def test_lower_cases_and_frames(self, tokenizer):
        assert tokenizer("The FILE").input_ids == tokenizer("the file").input_ids
        one, two = tokenizer("the file").input_ids, tokenizer("the file", "a name").input_ids
        assert (one[0], one[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert two[: len(one)] == one
        assert two.count(tokenizer.sep_token_id) == 2

    def test_padding_and_end_of_text_serve_every_kind_of_model(self, tokenizer):
        assert tokenizer.pad_token_id == 0
        assert tokenizer.eos_token_id == tokenizer.sep_token_id != tokenizer.pad_token_id
        assert tokenizer.bos_token_id == tokenizer.cls_token_id
        batch = tokenizer(["the", "the name of the file"], padding=True, return_tensors="pt")
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.attention_mask[0].sum() < batch.attention_mask[1].sum()

    def test_an_answer_with_a_blank_before_it_is_the_same_answer(self, tokenizer):
        a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in (" testing", "testing"))
        assert a == b

    def test_training_is_deterministic_and_of_the_size_asked_for(self, parts, tokenizer):
        assert len(tokenizer) == 2000
        assert train_tokenizer(parts[0].first).get_vocab() == tokenizer.get_vocab()
        assert len(train_tokenizer(parts[0].first, vocab_size=300)) == 300

    def test_known_texts_need_no_unknown_token_and_survive_decoding(self, parts, tokenizer):
        for text in parts[0].first[:50]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")

    def test_reloads_as_auto_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again("A name, unseen: Zyx!").input_ids == tokenizer("A name, unseen: Zyx!").input_ids
        assert (again.pad_token_id, again.eos_token_id, again.mask_token) == (0, tokenizer.eos_token_id, "[MASK]")
