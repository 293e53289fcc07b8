"""Judging: a query's result is its own."""

import numpy as np
import pytest
import torch
from mmict.corpus import new_sampler, prepare
from mmict.dialogs import make_dialogs
from mmict.judge import judge
from tiny_mmict import model, samples, save_parts

GREEDY = {"num_beams": 1, "max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module", params=["t5", "llama"])
def setting(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    tiny = model(folder, request.param, dropout=0.1)
    return tiny, prepare(tiny, samples(10)), new_sampler(prepare(tiny, samples(10)), "visual")


@pytest.fixture(scope="module")
def judged(setting):
    tiny, pool, sampler = setting
    tiny.train()  # dropout is off all the same
    return judge(tiny, prepare(tiny, samples(7, seed=1)), pool, sampler, 2, **GREEDY)


def test_neither_batch_size_nor_order_matters(setting, judged):
    tiny, pool, sampler = setting
    order = [5, 0, 3, 6, 1, 2, 4]
    other = judge(tiny, prepare(tiny, samples(7, seed=1).select(order)), pool, sampler, 2, batch_size=3, **GREEDY)
    np.testing.assert_allclose(other.nll, judged.nll[order], atol=2e-5)
    assert other.tokens.tolist() == judged.tokens[order].tolist()
    for name in ("predictions", "rows", "demonstrations"):
        assert getattr(other, name) == [getattr(judged, name)[i] for i in order]


def test_is_what_the_model_says(setting, judged):
    tiny, pool, sampler = setting
    queries = prepare(tiny, samples(7, seed=1))
    assert judged.rows == queries.demonstrations(range(7), sampler, pool, 2)
    assert judged.demonstrations == [[pool.samples.texts[i] for i in of] for of in judged.rows]
    dialogs = make_dialogs(queries, [4], pool, [judged.rows[4]])
    with torch.no_grad():
        assert judged.nll[4] == pytest.approx(float(tiny(dialogs).nll), abs=2e-5)
    assert judged.predictions[4] == tiny.generate_dialogs(dialogs, num_beams=1, max_new_tokens=4)[0]
    assert judged.tokens.tolist() == [len(text.split()) + 1 for text in queries.samples.texts]


def test_without_demonstrations(setting, judged):
    tiny, pool, sampler = setting
    alone = judge(tiny, prepare(tiny, samples(7, seed=1)), pool, sampler, 0, **GREEDY)
    assert alone.rows == [[]] * 7
    assert not np.allclose(alone.nll, judged.nll, atol=1e-3)
