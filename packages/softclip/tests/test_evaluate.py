import json
from types import SimpleNamespace

import pytest
import softclip.evaluate
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from papercore.lab.cli import App
from softclip.batch import ImageRoiBatch, TextTagBatch
from softclip.checkpoints import new_clip, save_clip
from softclip.data import DataOptions
from softclip.evaluate import EvalOptions, encode_pairs, evaluate, evaluate_checkpoint
from softclip.retrieval import mean_average_precision, retrieval_recall
from softclip.zero_shot import TEMPLATES, zero_shot_accuracy, zero_shot_classifier

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
RECALLS = [f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)]
TOKENIZER = SimpleTokenizer(context_length=8)


class Toy:
    """Images of noise with captions; ``floating`` ones are prepared already."""

    def __init__(self, count=11, floating=False, names=None, groups=None, labels=None, classes=()):
        self.images = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
        if floating:
            self.images = (self.images / 255 - CLIP_MEAN) / CLIP_STD
        self.texts = TOKENIZER([f"picture {i}" for i in range(count)])
        self.pairs = SimpleNamespace(names=names or range(count), groups=groups, labels=labels, classes=classes)

    def __len__(self):
        return len(self.images)

    def __getitems__(self, rows):
        return ImageRoiBatch(self.images[rows]), TextTagBatch(self.texts[rows])


@pytest.fixture(scope="module")
def clip():
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return CLIP(12, vision, text)


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Numbers that do not hang on what this CPU is fast at."""
    monkeypatch.setattr(softclip.evaluate, "autocast_dtype", lambda device: torch.float32)


class TestEncode:
    def test_features_are_those_of_the_model_at_length_one(self, clip):
        toy = Toy(floating=True)
        images, texts = encode_pairs(clip, toy, 4)
        with torch.no_grad():
            assert torch.allclose(images, clip.encode_image(toy.images, normalize=True), atol=1e-5)
            assert torch.allclose(texts, clip.encode_text(toy.texts, normalize=True), atol=1e-5)
        assert not images.requires_grad

    def test_bytes_are_normalised_as_the_model_says(self, clip, monkeypatch):
        expected, texts = encode_pairs(clip, Toy(floating=True))
        found, same = encode_pairs(clip, Toy())
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(texts, same)
        other = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 1.5)}
        monkeypatch.setattr(clip.visual, "preprocess_cfg", other, raising=False)
        toy = Toy()
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in other.values())
        found, _ = encode_pairs(clip, toy)
        toy.images = (toy.images / 255 - mean) / std
        assert torch.allclose(found, encode_pairs(clip, toy)[0], atol=1e-5)
        assert not torch.allclose(found, expected, atol=1e-2)

    def test_half_precision_where_it_is_fast(self, clip, monkeypatch):
        expected, _ = encode_pairs(clip, Toy())
        monkeypatch.setattr(softclip.evaluate, "autocast_dtype", lambda device: torch.bfloat16)
        found, _ = encode_pairs(clip, Toy())
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 0.05

    def test_encodes_in_eval_mode_and_leaves_each_module_as_it_was(self, clip):
        clip.train()
        clip.visual.eval()
        before = [module.training for module in clip.modules()]
        modes = []
        hook = clip.transformer.register_forward_hook(lambda module, *_: modes.append(module.training))
        encode_pairs(clip, Toy())
        hook.remove()
        assert modes == [False]
        assert [module.training for module in clip.modules()] == before

    def test_wrong_input(self, clip):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            encode_pairs(clip, Toy(), 0)
        with pytest.raises(ValueError, match="no pairs to encode"):
            encode_pairs(clip, Toy(0))
        toy = Toy(floating=True)
        toy.images[3] = torch.nan
        with pytest.raises(ValueError, match="image_features, row 3: a feature is NaN"):
            encode_pairs(clip, toy)


class TestEvaluate:
    def test_all_that_the_pairs_allow(self, clip):
        groups, labels, classes = [i // 2 for i in range(11)], [i % 3 for i in range(11)], ("cat", "dog", "ice")
        images, texts = encode_pairs(clip, Toy())
        expected = retrieval_recall(images, texts)
        assert evaluate(clip, TOKENIZER, Toy()) == expected
        assert list(expected) == RECALLS

        maps = mean_average_precision(images, texts, torch.tensor(groups), torch.tensor(groups))
        assert evaluate(clip, TOKENIZER, Toy(groups=groups)) == expected | maps

        classifier = zero_shot_classifier(clip.encode_text, TOKENIZER, classes, ["a {}"])
        accuracy = zero_shot_accuracy(images, torch.tensor(labels), classifier)
        found = evaluate(clip, TOKENIZER, Toy(labels=labels, classes=classes), templates=["a {}"])
        assert found == pytest.approx(expected | accuracy)

    def test_an_image_of_several_texts_counts_once(self, clip):
        names = list("aabcaddefgb")
        labels, groups = [ord(name) % 3 for name in names], [ord(name) // 2 for name in names]
        toy = Toy(names=names, labels=labels, groups=groups, classes=("cat", "dog", "ice"))
        toy.images = toy.images[[names.index(name) for name in names]]
        images, texts = encode_pairs(clip, toy)
        images = images[[names.index(name) for name in "abcdefg"]]
        expected = retrieval_recall(images, texts, text_to_image=torch.tensor(["abcdefg".index(n) for n in names]))
        own = torch.tensor([ord(name) for name in "abcdefg"])
        expected |= mean_average_precision(images, texts, own // 2, torch.tensor(groups))
        expected |= zero_shot_accuracy(
            images, own % 3, zero_shot_classifier(clip.encode_text, TOKENIZER, ["cat", "dog", "ice"])
        )
        assert evaluate(clip, TOKENIZER, toy) == pytest.approx(expected)

    def test_captions_of_equal_words_find_nothing_at_first(self, clip):
        toy = Toy()
        toy.texts[:] = toy.texts[0]
        metrics = evaluate(clip, TOKENIZER, toy)
        assert [metrics[name] for name in RECALLS] == [metrics[name] for name in RECALLS[:3]] + [0, 0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_clip(folder, *new_clip("tiny-vit", seed=0))
    return folder


@pytest.fixture
def _few_scenes(monkeypatch):
    monkeypatch.setattr("softclip.data.SAMPLE_TRAIN", 2)
    monkeypatch.setattr("softclip.data.SAMPLE_TEST", 30)


@pytest.mark.usefixtures("_few_scenes")
class TestVerb:
    def test_the_sample(self, folder, capsys):
        metrics = evaluate_checkpoint(DataOptions(), EvalOptions(str(folder)))
        record = json.loads((folder / "eval-sample" / "metrics.json").read_text())
        assert record["metrics"] == metrics
        assert (record["model"], record["data"], record["test"]) == (str(folder), "sample", 30)
        assert record["templates"] == list(TEMPLATES)
        assert {*RECALLS, "map", "zero_shot_top1", "zero_shot_macro"} <= metrics.keys()
        assert all(0 <= value <= 100 for value in metrics.values())
        printed = capsys.readouterr().out
        assert "sample: 30 test pairs" in " ".join(printed.split())
        assert "text_retrieval_recall@1 " in printed

    def test_a_file_of_weights_and_one_of_templates(self, folder, tmp_path):
        data = DataOptions()
        (tmp_path / "templates.txt").write_text("a drawing of {}\n")
        weights = folder / "open_clip_model.safetensors"
        spec, templates = f"tiny-vit:{weights}", str(tmp_path / "templates.txt")
        metrics = evaluate_checkpoint(data, EvalOptions(spec, templates, batch_size=7))
        record = json.loads((folder / "eval-sample" / "metrics.json").read_text())
        assert (record["model"], record["templates"]) == (spec, ["a drawing of {}"])
        again = evaluate_checkpoint(data, EvalOptions(str(folder), output_dir=str(tmp_path / "out")))
        assert {name: metrics[name] for name in RECALLS} == {name: again[name] for name in RECALLS}
        assert (tmp_path / "out" / "metrics.json").is_file()

    @pytest.mark.parametrize("mode", ["shortest", "squash"])
    def test_images_are_prepared_as_the_model_asks(self, mode, tmp_path, monkeypatch):
        clip, config = new_clip("tiny-vit", seed=0)
        clip.visual.preprocess_cfg["resize_mode"] = mode
        save_clip(tmp_path, clip, config)
        asked = []

        def dataset(pairs, tokenizer, image_size, *, preprocess):
            asked.append((image_size, preprocess))
            return Toy()

        monkeypatch.setattr(softclip.evaluate, "PairDataset", dataset)
        monkeypatch.setattr(softclip.evaluate, "evaluate", lambda *a, **k: {})
        evaluate_checkpoint(DataOptions(), EvalOptions(str(tmp_path)))
        ((size, preprocess),) = asked
        assert size == 32
        if mode == "shortest":
            assert preprocess is None
        else:
            from PIL import Image

            wide = Image.new("RGB", (64, 32))
            wide.paste((255, 255, 255), (0, 0, 16, 32))  # a crop of the centre would lose it
            assert preprocess(wide)[:, :, 0].min() > 1
            assert preprocess(wide).shape == (3, 32, 32)

    def test_without_test_pairs(self, folder, monkeypatch):
        monkeypatch.setattr(softclip.evaluate, "load_pairs", lambda options: SimpleNamespace(test=None))
        with pytest.raises(ValueError, match=r"no test pairs to judge on: give --test, or .*--validation 0.1"):
            evaluate_checkpoint(DataOptions(), EvalOptions(str(folder)))

    def test_wrong_input_is_one_line(self, folder, capsys):
        app = App("softclip", help="")
        app.command("eval", "softclip.evaluate:evaluate_checkpoint", help="")
        assert app(["eval", "--model", str(folder), "--templates", str(folder / "none.txt")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_options_are_documented():
    assert all(field.metadata["help"] for field in EvalOptions.__dataclass_fields__.values())
