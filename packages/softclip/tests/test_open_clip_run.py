import csv
import io
import json
import logging
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from softclip.checkpoints import TINY, tokenizer_of
from softclip.export import ExportOptions, export
from softclip.open_clip_run import RunOptions, main, open_clip_program, parse, read_data, replaced
from torchvision.transforms import ToTensor

program = pytest.importorskip("open_clip_train.main")
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of open_clip's own loader
COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown", "gold"]


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "softclip-test-vit.json"
    path.write_text(json.dumps(TINY["tiny-vit"]))
    open_clip.add_model_config(path)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS[path.stem]


@pytest.fixture(autouse=True)
def loggers():
    """open_clip gives all of them a level, and the root more handlers."""
    root = logging.getLogger()
    all_of_them = [root, *map(logging.getLogger, list(root.manager.loggerDict))]
    levels, handlers = [logger.level for logger in all_of_them], list(root.handlers)
    yield
    for logger, level in zip(all_of_them, levels, strict=True):
        logger.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Nine pairs as a shard, with tags and 0 to 2 regions, and as a table."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "train-0000.tar", "w") as shard, open(folder / "train.csv", "w", newline="") as table:
        rows = csv.writer(table, delimiter="\t")
        rows.writerow(["filepath", "title", "words"])
        for i, colour in enumerate(COLOURS):
            image, array = io.BytesIO(), io.BytesIO()
            pixels = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
            pixels.save(image, "PNG")
            pixels.save(folder / f"{i}.png")
            np.save(array, rng.standard_normal((i % 3, 6), dtype=np.float32))
            caption, tags = f"a {colour} square", [colour, "square"] if i else []
            rows.writerow([folder / f"{i}.png", caption, ";".join(tags)])
            files = {"png": image.getvalue(), "txt": caption.encode(), "roi.npy": array.getvalue()}
            files["json"] = json.dumps({"tags": tags, "kind": i // 2}).encode()
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def run(tmp_path, pairs):
    """Train in one epoch, which is one step of eight pairs; return the path of the checkpoint."""

    def run(*flags, name="run", by=main, data="train.csv"):
        options = {"--train-data": pairs / data, "--logs": tmp_path, "--name": name, "--model": "softclip-test-vit"}
        options |= {"--device": "cpu", "--precision": "fp32", "--workers": 0, "--batch-size": 8, "--epochs": 1}
        options |= {
            "--warmup": 0,
            "--lr": 1e-3,
            "--eps": 1e-3,
        }  # a small eps blows up what rounding leaves of a zero gradient
        words = [str(word) for option in options.items() for word in option] + list(flags)
        assert not by(words)
        return tmp_path / name / "checkpoints" / "epoch_1.pt"

    return run


def state(path):
    return torch.load(path, weights_only=True)["state_dict"]


def difference(first, second):
    first, second = state(first), state(second)
    assert first.keys() == second.keys()
    return {name: (first[name] - second[name]).abs().max().item() for name in first}


REGIONS = ("--roi", "field", "--roi-field", "roi.npy", "--tags-field", "json:tags")


def test_without_softening_it_is_open_clips_own_run(run):
    ours, theirs = run("--beta", "0", "--lam", "0"), run(name="theirs", by=program.main)
    assert max(difference(ours, theirs).values()) < 1e-6
    soft = run("--beta", "0.5", "--target-scale", "2", name="soft")
    assert max(difference(soft, theirs).values()) > 1e-5


def test_open_clip_loads_the_checkpoint(run):
    path = run("--roi", "thumbnails", "--roi-tag-weight", "0", "--tags-field", "words")
    loaded = open_clip.create_model("softclip-test-vit", pretrained=str(path)).state_dict()  # strictly
    assert loaded.keys() == state(path).keys()


def test_the_roi_encoder_trains_and_export_leaves_it_out(run, tmp_path):
    path = run(*REGIONS, data="train-0000.tar")
    saved = state(path)
    assert saved["roi_encoder.projection"].shape == (6, 64)
    (tmp_path / "vit.json").write_text(json.dumps(TINY["tiny-vit"]))
    export(ExportOptions(str(path), str(tmp_path / "out"), str(tmp_path / "vit.json")))
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert again.keys() == saved.keys() - {"roi_encoder.projection"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())


def test_two_half_batches_give_the_step_of_the_whole(run):
    whole = run(*REGIONS, data="train-0000.tar")
    halves = run(*REGIONS, "--batch-size", "4", "--accum-freq", "2", data="train-0000.tar", name="halves")
    distances = difference(whole, halves)
    distances.pop("logit_scale")  # whose gradient open_clip adds up once for each half
    assert max(distances.values()) < 1e-6
    start = run(*REGIONS, "--lr", "0", data="train-0000.tar", name="start")
    assert difference(whole, start)["roi_encoder.projection"] > 1e-5


def test_pairs_of_a_group_are_positives_of_each_other(run):
    alone, together = (
        run(*flags, data="train-0000.tar", name=str(len(flags))) for flags in ([], ["--group-field", "json:kind"])
    )
    assert max(difference(alone, together).values()) > 1e-5


def test_imagenet_is_read_by_open_clip(pairs, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes((pairs / "0.png").read_bytes())
    args = program.parse_args(["--train-data", str(pairs / "train.csv"), "--imagenet-val", str(tmp_path)])
    args.distributed, args.workers, args.batch_size = False, 0, 4
    with replaced(program, RunOptions(), read_data(RunOptions(), args)):
        data = program.get_data(args, (ToTensor(), ToTensor()), tokenizer=tokenizer_of(TINY["tiny-vit"]))
    assert {name: len(info.dataloader) for name, info in data.items()} == {"train": 2, "imagenet-val": 1}
    images, texts = next(iter(data["train"].dataloader))
    assert (images.shape, texts.shape) == ((4, 3, 40, 40), (4, 16))
    assert (images.roi, texts.tags, texts.group_ids) == (None, None, None)


def test_a_run_goes_on_and_is_evaluated(run, pairs, tmp_path):
    first = run(*REGIONS, data="train-0000.tar")
    validation = ["--val-data", str(pairs / "train-0000.tar"), "--train-num-samples", "9"]
    run(*REGIONS, *validation, "--resume", str(first), "--epochs", "2", data="train-0000.tar", name="on")
    metrics = json.loads((tmp_path / "on" / "checkpoints" / "results.jsonl").read_text())
    assert metrics["epoch"] == 2
    assert metrics["num_samples"] == 9
    assert 0 < metrics["image_to_text_R@10"] <= 1


def test_our_flags_do_not_swallow_open_clips():
    words = ["--beta1", "0.9", "--beta", "0.1", "--lr", "1e-3", "--tags-field", "json:tags", "--chunk-size", "64"]
    options, rest = parse(words)
    assert rest == ["--beta1", "0.9", "--lr", "1e-3"]
    assert options == RunOptions(beta=0.1, tags_field="json:tags", chunk_size=64)


def test_open_clip_has_what_is_relied_upon():
    """If this fails, open_clip has changed: see what open_clip_run.py replaces and reads."""
    assert open_clip_program() is program


def test_originals_come_back():
    before = program.create_loss, program.get_data, program.create_model_and_transforms

    def names():
        return program.create_loss, program.get_data, program.create_model_and_transforms

    with replaced(program, RunOptions(), None):
        assert not set(names()) & set(before)
    assert names() == before
    with pytest.raises(KeyError), replaced(program, RunOptions(), None):
        raise KeyError
    assert names() == before


def test_another_open_clip_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.delattr(program, "create_loss")
    monkeypatch.setattr(program, "get_data", lambda args, epoch: {})
    assert main([]) == 2
    line = capsys.readouterr().err
    assert "open_clip 3" in line
    assert (
        "lacks what softclip-train replaces or reads: get_data(preprocess_fns), get_data(tokenizer), the call of"
        in line
    )
    assert "pip install 'open_clip_torch[training]>=3.3,<4'" in line
    monkeypatch.setattr(open_clip, "__version__", "4.0.1")
    assert main([]) == 2
    assert "works inside open_clip 3, and this is 4.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--siglip"], "--siglip does not go with softclip-train: another loss; leave it out"),
        (["--dataset-resampled"], "--dataset-resampled does not go with softclip-train: every pair is seen once"),
        (["--model", "coca_ViT-B-32"], "--model coca_ViT-B-32 has a captioning loss"),
        (["--tags-field", "json:tags"], "--tags-field and --roi-field go with --roi"),
        (["--roi-tag-weight", "1"], "--roi-tag-weight needs --roi, and tags"),
        (["--batch-size", "16"], "9 training pairs are fewer than a step's 16 x 1 x 1"),
        (["--train-data", "absent.tar"], "absent.tar"),
    ],
)
def test_wrong_input_is_told_in_a_line(flags, message, pairs, tmp_path, capsys):
    words = ["--train-data", str(pairs / "train.csv"), "--logs", str(tmp_path), "--model", "softclip-test-vit"]
    assert main([*words, "--precision", "fp32", "--workers", "0", "--device", "cpu", "--batch-size", "4", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
