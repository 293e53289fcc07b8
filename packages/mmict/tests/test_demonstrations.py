import time

import numpy as np
import pytest
import torch
from mmict.demonstrations import DemonstrationSampler
from torch.nn.functional import cosine_similarity

N, GROUPS = 60, 12


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    groups = [f"g{i}" for i in np.random.RandomState(0).randint(GROUPS, size=N)]
    return {"ids": [f"s{i}" for i in range(N)], "groups": groups}, torch.randn(N, 8), torch.randn(N, 5)


def sampler(pool, kind, **options):
    return DemonstrationSampler(**pool[0], sampler=kind, visual=pool[1], text=pool[2], **options)


def literal(pool, kind, id, group, visual, text, k):
    """One query, one comparison at a time; without ties."""
    cosines = {"visual": cosine_similarity(visual[None], pool[1]), "text": cosine_similarity(text[None], pool[2])}
    cosines["mixed"] = (cosines["visual"] + cosines["text"]) / 2
    chosen, seen = [], {group}
    for row in cosines[kind].argsort(descending=True).tolist():
        if pool[0]["ids"][row] != id and pool[0]["groups"][row] not in seen and len(chosen) < k:
            chosen.insert(0, row)  # the most similar stands last
            seen.add(pool[0]["groups"][row])
    return chosen


@pytest.mark.parametrize("kind", ["visual", "text", "mixed"])
@pytest.mark.parametrize("k", [1, 5])
def test_nearest_equals_the_literal_way(pool, kind, k, monkeypatch):
    monkeypatch.setattr("mmict.demonstrations.BLOCK", 7 * N)  # several blocks, the last not full
    ids, groups = [*pool[0]["ids"], "new"], [*pool[0]["groups"], "unseen"]
    visual, text = torch.randn(N + 1, 8), torch.randn(N + 1, 5)
    rows = sampler(pool, kind, k=k).draw(ids, groups, visual=visual, text=text)
    expected = [literal(pool, kind, *query, k) for query in zip(ids, groups, visual, text, strict=True)]
    assert rows.tolist() == expected


@pytest.mark.parametrize("kind", ["random", "visual", "text", "mixed"])
def test_never_the_query_nor_its_group_nor_a_group_twice(pool, kind):
    groups = pool[0]["groups"]
    rows = sampler(pool, kind, k=8).draw(**pool[0], visual=pool[1], text=pool[2])
    for own, drawn in zip(groups, rows.tolist(), strict=True):
        assert len({own, *(groups[row] for row in drawn)}) == 9
    moved = sampler(pool, kind, k=8).draw(pool[0]["ids"], ["other"] * N, visual=pool[1], text=pool[2])
    assert not (moved == torch.arange(N)[:, None]).any()  # the id alone is enough


def test_random_depends_on_seed_epoch_and_id_alone(pool):
    """For any batch and order; groups only matter by what they exclude."""
    ids, groups = pool[0].values()
    whole = sampler(pool, "random", seed=3).draw(ids, groups, epoch=2)
    order = np.random.RandomState(1).permutation(N)[:17]
    part = sampler(pool, "random", seed=3).draw([ids[i] for i in order], [groups[i] for i in order], epoch=2)
    assert torch.equal(part, whole[order])
    assert whole[:3].tolist() == [[14, 42], [6, 39], [21, 0]]  # on any machine
    assert not torch.equal(sampler(pool, "random", seed=3).draw(ids, groups, epoch=3), whole)
    assert not torch.equal(sampler(pool, "random", seed=4).draw(ids, groups, epoch=2), whole)


def test_random_is_uniform_over_samples(pool):
    counts = torch.zeros(N)
    queries = [f"q{i}" for i in range(6000)]
    for row in sampler(pool, "random", k=1).draw(queries, ["g0"] * 6000).ravel().tolist():
        counts[row] += 1
    eligible = torch.tensor([group != "g0" for group in pool[0]["groups"]])
    expected = 6000 / int(eligible.sum())
    assert not counts[~eligible].any()
    assert ((counts[eligible] - expected).abs() < 5 * expected**0.5).all()


def test_random_finds_the_rare(pool):
    """99.9 % of the pool are of the query's group."""
    groups = ["big"] * 4000 + ["a", "b", "c"]
    drawn = DemonstrationSampler([str(i) for i in range(4003)], groups, k=3).draw(["7"], ["big"])
    assert sorted(drawn[0].tolist()) == [4000, 4001, 4002]


def test_neighbours_do_not_depend_on_the_epoch(pool):
    draws = [sampler(pool, "visual").draw(**pool[0], visual=pool[1], epoch=epoch) for epoch in (0, 5)]
    assert torch.equal(*draws)


def test_equally_similar_ones_differ_by_query_but_not_by_batch():
    """One question about 200 pictures: not always the same demonstrations."""
    ids, groups, same = [str(i) for i in range(200)], [str(i) for i in range(200)], torch.ones(200, 4)
    nearest = DemonstrationSampler(ids, groups, sampler="text", text=same)
    rows = nearest.draw(ids, groups, text=same)
    assert len(rows.unique()) > 50
    assert torch.equal(nearest.draw(ids[90:95], groups[90:95], text=same[:5]), rows[90:95])


@pytest.mark.parametrize("kind", ["random", "visual"])
def test_k(pool, kind):
    given = sampler(pool, kind, k=3)
    assert given.draw(["q"], ["x"], visual=pool[1][:1]).shape == (1, 3)
    assert given.draw(["q"], ["x"], visual=pool[1][:1], k=5).shape == (1, 5)
    assert given.draw(["q"], ["x"], visual=pool[1][:1], k=0).shape == (1, 0)
    assert given.draw([], [], visual=pool[1][:0]).shape == (0, 3)
    for refused in (lambda: sampler(pool, kind, k=9), lambda: given.draw(["q"], ["x"], visual=pool[1][:1], k=-1)):
        with pytest.raises(ValueError, match="must be 0 to 8; got"):
            refused()


@pytest.mark.parametrize("kind", ["random", "visual"])
def test_too_small_a_pool(kind):
    same = torch.ones(7, 2)
    small = DemonstrationSampler(list("abcdefg"), list("xx12333"), k=8, sampler=kind, visual=same)
    with pytest.raises(ValueError, match="k=8 demonstrations asked, only 5 eligible samples after excluding group 'x'"):
        small.draw(["a"], ["x"], visual=same[:1])
    with pytest.raises(
        ValueError, match=r"k=4 .* only 3 different groups among 5 eligible samples after excluding group 'x'"
    ):
        small.draw(["a"], ["x"], visual=same[:1], k=4)
    assert small.draw(["a"], ["x"], visual=same[:1], k=3).shape == (1, 3)
    empty = DemonstrationSampler([], [], sampler=kind, visual=same[:0])
    with pytest.raises(ValueError, match="only 0 eligible samples"):
        empty.draw(["a"], ["x"], visual=same[:1])


def test_refuses(pool):
    with pytest.raises(ValueError, match="sampler must be one of random, visual, text, mixed, got 'near'"):
        sampler(pool, "near")
    with pytest.raises(ValueError, match="sampler 'mixed' needs text embeddings"):
        DemonstrationSampler(**pool[0], sampler="mixed", visual=pool[1])
    with pytest.raises(ValueError, match="sampler 'visual' needs visual embeddings"):
        sampler(pool, "visual").draw(["q"], ["x"])
    with pytest.raises(ValueError, match=r"visual embeddings must be \(1, width\), got \(2, 8\)"):
        sampler(pool, "visual").draw(["q"], ["x"], visual=pool[1][:2])
    with pytest.raises(ValueError, match="2 ids and 1 groups"):
        DemonstrationSampler(["a", "b"], ["x"])


def test_thousands_take_no_time():
    n = 3000
    ids, groups, rows = [str(i) for i in range(n)], [str(i // 3) for i in range(n)], torch.randn(n, 64)
    start = time.perf_counter()
    DemonstrationSampler(ids, groups, k=4, sampler="visual", visual=rows).draw(ids, groups, visual=rows)
    assert time.perf_counter() - start < 10
