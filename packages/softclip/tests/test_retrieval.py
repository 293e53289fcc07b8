import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from softclip import retrieval
from softclip.retrieval import correct_ranks, mean_average_precision, retrieval_recall


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def ranking(query, items, correct):
    """Of each place, best first, whether the item there is correct; wrong ones ahead of correct ones that are as good."""
    scores = [round(cosine(query, item), 5) for item in items]
    return [correct[i] for i in sorted(range(len(items)), key=lambda i: (-scores[i], correct[i]))]


def literal_recall(queries, items, correct, k):
    return 100 * sum(any(ranking(q, items, c)[:k]) for q, c in zip(queries, correct, strict=True)) / len(queries)


def literal_map(queries, items, correct):
    total = 0.0
    for query, row in zip(queries, correct, strict=True):
        places = [place for place, hit in enumerate(ranking(query, items, row), 1) if hit]
        total += sum((j + 1) / place for j, place in enumerate(places)) / len(places)
    return 100 * total / len(queries)


def peers_recall(images, texts, owners, k):
    """clip_benchmark's definition: topk of the scores, and whether a correct one is among them."""
    scores = texts @ images.T
    correct = owners[:, None] == torch.arange(len(images))
    return {
        f"image_retrieval_recall@{k}": 100 * correct.gather(1, scores.topk(k).indices).any(1).double().mean().item(),
        f"text_retrieval_recall@{k}": 100 * correct.T.gather(1, scores.T.topk(k).indices).any(1).double().mean().item(),
    }


def random_pairs(images=40, texts=100, width=8, seed=0):
    """Texts near their images; each image has one at least."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(images, width, generator=generator))
    owners = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    owners = owners[torch.randperm(texts, generator=generator)]
    text = image[owners] + 0.5 * torch.randn(texts, width, generator=generator)
    return image, torch.nn.functional.normalize(text), owners


# Small whole numbers: many ties, zeros among the rows, and cosines that are equal or far apart.
rows = st.lists(st.lists(st.integers(-1, 2), min_size=3, max_size=3), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(rows, st.data())
def test_equals_the_literal_loop_with_all_its_ties(images, data):
    owners = list(range(len(images))) + data.draw(st.lists(st.integers(0, len(images) - 1), max_size=4))
    texts = [data.draw(st.lists(st.integers(-1, 2), min_size=3, max_size=3)) for _ in owners]
    of_text = [[owner == image for image in range(len(images))] for owner in owners]
    of_image = [list(column) for column in zip(*of_text, strict=True)]
    recalls = retrieval_recall(
        torch.tensor(images), torch.tensor(texts), ks=(1, 2, 3), text_to_image=torch.tensor(owners)
    )
    for k in (1, 2, 3):
        assert recalls[f"image_retrieval_recall@{k}"] == pytest.approx(literal_recall(texts, images, of_text, k))
        assert recalls[f"text_retrieval_recall@{k}"] == pytest.approx(literal_recall(images, texts, of_image, k))

    places = torch.arange(len(images))
    maps = mean_average_precision(torch.tensor(images), torch.tensor(texts), places, torch.tensor(owners))
    assert maps["image_retrieval_map"] == pytest.approx(literal_map(texts, images, of_text))
    assert maps["text_retrieval_map"] == pytest.approx(literal_map(images, texts, of_image))


@settings(max_examples=40, deadline=None)
@given(rows, st.data())
def test_many_to_many_equals_the_literal_loop(images, data):
    count = len(images)
    texts = [data.draw(st.lists(st.integers(-1, 2), min_size=3, max_size=3)) for _ in images]
    groups = data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    same = [[a == b for b in groups] for a in groups]
    maps = mean_average_precision(torch.tensor(images), torch.tensor(texts), torch.tensor(groups), torch.tensor(groups))
    expected = literal_map(texts, images, same), literal_map(images, texts, same)
    assert list(maps) == ["image_retrieval_map", "text_retrieval_map", "map"]
    assert list(maps.values()) == pytest.approx([*expected, sum(expected) / 2])


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_clip_benchmark_without_ties(seed):
    images, texts, owners = random_pairs(seed=seed)
    recalls = retrieval_recall(images, texts, text_to_image=owners)
    expected = {}
    for k in (1, 5, 10):
        expected |= peers_recall(images, texts, owners, k)
    assert recalls == pytest.approx(expected)
    assert list(recalls) == [f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)]
    assert 20 < recalls["text_retrieval_recall@1"] < recalls["text_retrieval_recall@10"]


def test_text_i_is_image_i_unless_said():
    images, texts, _ = random_pairs(texts=40)
    assert retrieval_recall(images, texts) == retrieval_recall(images, texts, text_to_image=torch.arange(40))


@pytest.mark.parametrize("width", [3, 64, 513])
def test_a_collapsed_model_scores_nothing(width):
    feature = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    for spread in (0.0, 1e-8):  # rounding gives no order either
        noise = spread * torch.randn(101, width, generator=torch.Generator().manual_seed(1))
        recalls = retrieval_recall(feature + noise, feature.expand(101, -1))
        assert set(recalls.values()) == {0}
    groups = torch.arange(101)
    assert mean_average_precision(noise * 0, noise, groups, groups)["map"] == pytest.approx(100 / 101)


def test_blocks_do_not_matter(monkeypatch):
    images, texts, owners = random_pairs()
    groups = torch.arange(40)
    expected = retrieval_recall(images, texts, text_to_image=owners)
    expected_map = mean_average_precision(images, texts, groups, owners)
    shapes = []

    def recording(*arguments):
        for cosines, correct in blocks(*arguments):
            shapes.append(tuple(cosines.shape))
            yield cosines, correct

    blocks = retrieval._blocks
    monkeypatch.setattr(retrieval, "_blocks", recording)
    for block in (1, 700):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        assert retrieval_recall(images, texts, text_to_image=owners) == pytest.approx(expected)
        assert mean_average_precision(images, texts, groups, owners) == pytest.approx(expected_map)
    assert max(rows * columns for rows, columns in shapes) <= 700


def test_half_precision_and_lengths_do_not_matter():
    images, texts, owners = random_pairs()
    rounded, rounded_texts = images.bfloat16(), texts.bfloat16()
    expected = retrieval_recall(rounded.float(), rounded_texts.float(), text_to_image=owners)
    assert retrieval_recall(rounded, rounded_texts, text_to_image=owners) == expected
    lengths = torch.linspace(0.1, 30, 40)[:, None]
    assert retrieval_recall(lengths * images, texts, text_to_image=owners) == pytest.approx(
        retrieval_recall(images, texts, text_to_image=owners)
    )


def test_autocast_outside_does_not_matter():
    images, texts, owners = random_pairs(400, 800)
    groups = torch.arange(400)
    expected = mean_average_precision(images, texts, groups, owners)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_average_precision(images, texts, groups, owners) == expected


def test_fewer_items_than_k():
    recalls = retrieval_recall(torch.ones(3, 2), torch.ones(3, 2), ks=[2, 3, 10])
    assert [recalls[f"image_retrieval_recall@{k}"] for k in (2, 3, 10)] == [0, 100, 100]


def test_best_of_several_correct_ones_counts():
    images, texts = torch.eye(3), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0.1]])
    owners = torch.tensor([0, 0, 2, 1])
    assert correct_ranks(images, texts, torch.arange(3), owners).tolist() == [0, 1, 0]
    recalls = retrieval_recall(images, texts, ks=[1], text_to_image=owners)
    assert recalls == pytest.approx({"image_retrieval_recall@1": 75, "text_retrieval_recall@1": 200 / 3})


FEATURES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES, FEATURES * torch.tensor([1, math.nan])), "text_features, row 0: a feature is NaN or infinite"),
        ((FEATURES * torch.tensor([[1], [1], [math.inf]]), FEATURES), "image_features, row 2: a feature is NaN"),
        ((FEATURES, torch.ones(3, 4)), "different widths: image_features 2, text_features 4"),
        ((FEATURES, torch.ones(3)), r"text_features: expected features of shape \(n, width\).*got \(3,\)"),
        ((torch.ones(0, 2), FEATURES), r"image_features: expected .* n above 0, got \(0, 2\)"),
        ((FEATURES, torch.ones(4, 2)), "3 images and 4 texts: say by text_to_image"),
    ],
)
def test_features_that_cannot_be_judged(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(*arguments)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ([0, 1], r"text_to_image must be 3 whole numbers, one a row; got \(2,\)"),
        ([0.0, 1.0, 2.0], "text_to_image must be 3 whole numbers"),
        ([0, 1, 3], "text_to_image, row 2: 3 is not in 0 to 2"),
        ([0, -1, 1], "text_to_image, row 1: -1 is not in 0 to 2"),
        ([0, 0, 2], r"image 1 has no text \(1 such\)"),
    ],
)
def test_texts_of_no_image(owners, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(FEATURES, FEATURES, text_to_image=torch.tensor(owners))


def test_other_wrong_input():
    with pytest.raises(ValueError, match="ks must be numbers of items of at least 1"):
        retrieval_recall(FEATURES, FEATURES, ks=[0, 5])
    groups = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"text 2 has no image \(1 such\)"):
        mean_average_precision(FEATURES, FEATURES, torch.tensor([0, 0, 0]), groups)
    with pytest.raises(ValueError, match=r"image 0 has no text \(2 such\)"):
        mean_average_precision(FEATURES, FEATURES, groups, torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="image_groups must be 3 whole numbers"):
        mean_average_precision(FEATURES, FEATURES, groups[:2], groups)
    with pytest.raises(ValueError, match="text_features, row 0: a feature is NaN"):
        mean_average_precision(FEATURES, FEATURES * math.nan, groups, groups)
