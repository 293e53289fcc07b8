import math
import re

import pytest
import torch
from softclip import zero_shot
from softclip.zero_shot import TEMPLATES, read_templates, zero_shot_accuracy, zero_shot_classifier


class Words:
    """A text encoder: an embedding of random length for each text it has seen, always the same."""

    def __init__(self, width=6):
        self.table = torch.randn(1000, width, generator=torch.Generator().manual_seed(0))
        self.table *= torch.rand(1000, 1, generator=torch.Generator().manual_seed(1)) * 10
        self.texts, self.batches = [], []

    def tokenizer(self, texts):
        self.batches.append(len(texts))
        self.texts += [text for text in texts if text not in self.texts]
        return torch.tensor([[self.texts.index(text)] for text in texts])

    def encode(self, tokens):
        return self.table[tokens[:, 0]]

    def of(self, text):
        return self.table[self.texts.index(text)].tolist()


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def classify(classes, templates=TEMPLATES, words=None):
    words = words or Words()
    return zero_shot_classifier(words.encode, words.tokenizer, classes, templates)


class TestClassifier:
    @pytest.mark.parametrize("templates", [("{}",), ("a {} or {}", "{}s"), TEMPLATES])
    def test_equals_the_literal_loop(self, templates):
        words, classes = Words(), ["cat", "dog", "{brace}"]
        classifier = classify(classes, templates, words)
        assert words.texts == [template.replace("{}", name) for name in classes for template in templates]
        for row, name in zip(classifier, classes, strict=True):
            units = [unit(words.of(template.replace("{}", name))) for template in templates]
            mean = [sum(values) / len(units) for values in zip(*units, strict=True)]
            assert row.tolist() == pytest.approx(unit(mean), abs=1e-6)

    def test_batches_do_not_matter(self, monkeypatch):
        words, classes = Words(), [str(i) for i in range(20)]
        whole = classify(classes, words=words)
        monkeypatch.setattr(zero_shot, "BATCH", 7)
        words.batches.clear()
        assert torch.equal(classify(classes, words=words), whole)
        assert words.batches == [7] * 8 + [4]

    def test_needs_no_gradient(self):
        words = Words()
        words.table.requires_grad_()
        assert not classify(["cat"], words=words).requires_grad

    def test_half_precision_gives_unit_rows(self):
        words = Words()
        words.table = words.table.bfloat16()
        classifier = classify(["cat", "dog"], words=words)
        assert classifier.dtype == torch.float32
        assert torch.allclose(classifier.norm(dim=1), torch.ones(2))

    @pytest.mark.parametrize(
        ("classes", "templates", "message"),
        [
            (["cat"], ["a picture"], "templates: the template 'a picture' has no {} where"),
            (["cat"], [], "templates: no templates; give texts such as 'a picture of {}'"),
            ([], TEMPLATES, "no classes: give at least one name"),
            (["cat", " "], TEMPLATES, "class 1 has an empty name"),
            (["cat", "dog", "cat"], TEMPLATES, "2 classes are named 'cat': join them"),
        ],
    )
    def test_wrong_input(self, classes, templates, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            classify(classes, templates)

    def test_embeddings_that_are_nan(self):
        with pytest.raises(ValueError, match="text_features, row 0: a feature is NaN"):
            zero_shot_classifier(lambda tokens: tokens * torch.nan, Words().tokenizer, ["cat"])


class TestTemplatesFile:
    def test_one_a_line(self, tmp_path):
        path = tmp_path / "templates.txt"
        path.write_text("{}\n\n  a café's {} \n", encoding="utf-8")
        assert read_templates(path) == ("{}", "a café's {}")
        assert torch.equal(classify(["cat"], path), classify(["cat"], ["{}", "a café's {}"]))
        assert torch.equal(classify(["cat"], str(path)), classify(["cat"], path))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{}\na picture\n", r"templates\.txt: the template 'a picture' has no {}"),
            (b"\n", r"templates\.txt: no templates"),
            (b"\xff\xfe", r"templates\.txt: not a text file in UTF-8"),
        ],
    )
    def test_wrong_files(self, content, message, tmp_path):
        path = tmp_path / "templates.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_templates(path)
        with pytest.raises(FileNotFoundError):
            read_templates(tmp_path / "none.txt")


class TestAccuracy:
    def test_equals_the_literal_loop(self):
        generator = torch.Generator().manual_seed(0)
        images, classifier = torch.randn(50, 5, generator=generator), torch.randn(7, 5, generator=generator)
        labels = torch.randint(6, (50,), generator=generator)  # the last class has no image
        cosines = torch.nn.functional.cosine_similarity(images[:, None], classifier, dim=2)
        order = cosines.argsort(1, descending=True)
        accuracy = zero_shot_accuracy(images, labels, classifier, topk=(1, 3))
        hits = (order[:, 0] == labels).tolist()
        own = [[hit for hit, label in zip(hits, labels.tolist(), strict=True) if label == c] for c in range(6)]
        assert accuracy == pytest.approx(
            {
                "zero_shot_top1": 100 * sum(hits) / 50,
                "zero_shot_top3": 100 * (order[:, :3] == labels[:, None]).any(1).double().mean().item(),
                "zero_shot_macro": 100 * sum(sum(c) / len(c) for c in own) / 6,
            }
        )

    def test_rare_classes_count_as_much(self):
        images = torch.eye(2)[[0, 0, 0, 0]]
        assert zero_shot_accuracy(images, torch.tensor([0, 0, 0, 1]), torch.eye(2), topk=[1]) == {
            "zero_shot_top1": 75,
            "zero_shot_macro": 50,
        }

    def test_a_collapsed_model_scores_nothing(self):
        accuracy = zero_shot_accuracy(torch.ones(9, 33), torch.arange(9), torch.ones(9, 33))
        assert accuracy == {"zero_shot_top1": 0, "zero_shot_top5": 0, "zero_shot_macro": 0}

    def test_as_many_classes_as_k(self):
        assert zero_shot_accuracy(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(5, 3))["zero_shot_top5"] == 100

    @pytest.mark.parametrize(
        ("labels", "topk", "message"),
        [
            ([0, 3], [1], "labels, row 1: 3 is not in 0 to 2"),
            ([-1, 0], [1], "labels, row 0: -1 is not in 0 to 2"),
            ([0], [1], r"labels must be 2 whole numbers, one a row; got \(1,\)"),
            ([0, 1], [0], "topk must be numbers of classes of at least 1"),
            ([0, 1], [], "topk must be"),
        ],
    )
    def test_wrong_input(self, labels, topk, message):
        with pytest.raises(ValueError, match=message):
            zero_shot_accuracy(torch.ones(2, 3), torch.tensor(labels), torch.eye(3), topk=topk)

    def test_features_that_are_nan(self):
        with pytest.raises(ValueError, match="image_features, row 0: a feature is NaN"):
            zero_shot_accuracy(torch.ones(1, 3) * torch.nan, torch.tensor([0]), torch.eye(3))
        with pytest.raises(ValueError, match="different widths: image_features 2, classifier 3"):
            zero_shot_accuracy(torch.ones(1, 2), torch.tensor([0]), torch.eye(3))
