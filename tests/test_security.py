"""What a file from a stranger may not do: run code, write outside its folder, or take all memory. It is refused in one line."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from papercore.lab.cli import load
from papercore.lab.images import open_image
from PIL import Image
from transformers import Trainer

BOMB = "Image size (3600000000 pixels) exceeds limit"
DEEP = "[" * 100_000
LONG = f'{{"a": {"9" * 5000}}}'
BERT = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
    "vocab_size": 30,
}  # fmt: skip
OUTSIDE = ("../outside", "/outside", "a/../../outside")


class Payload:
    """Makes the folder ``owned`` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test in a folder of its own, in which, and beside which, nothing is made that should not be."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    yield
    assert not Path("owned").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def refused(capsys):
    """Run a command, which must end with one line that has these words."""

    def run(name, arguments, *words):
        capsys.readouterr()
        assert importlib.import_module(f"{name.replace('-', '_')}.cli").app(arguments.split()) == 2
        line = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2].strip()
        assert line.startswith(f"{name}: ")
        assert len(line) < 600
        for word in words:
            assert word in line

    return run


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def poison(name):
    """A file whose kind its name says, with a payload in it."""
    path = write(name, pickle.dumps(Payload()))
    objects = np.array([Payload(), Payload()], dtype=object)
    if path.suffix == ".npz":
        np.savez(path, images=objects, about=objects)
    elif path.suffix == ".npy":
        np.save(path, objects)
    elif path.suffix in (".pt", ".pth", ".bin"):
        torch.save({"state_dict": Payload()}, path)
    return path


def png(width=40, height=40, declared=None):
    """Encoded; with ``declared`` a header that says so much, and hardly any pixels."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    content = file.getvalue()
    if declared is None:
        return content
    header = b"IHDR" + struct.pack(">II", *declared) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def shard(name, members):
    with tarfile.open(name, "w") as tar:
        for member, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def zipped(name, members):
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def database(name, images):
    with lmdb.open(name, map_size=2**20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"%d" % len(images))
        for number, image in enumerate(images, 1):
            transaction.put(b"image-%09d" % number, image)
            transaction.put(b"label-%09d" % number, b"ab")


def model_folder(config, weights="pytorch_model.bin"):
    write("x/config.json", json.dumps(config))
    poison(f"x/{weights}")
    poison("x/pytorch_model.bin")


def rated(images):
    for i, image in enumerate(images):
        write(f"{i}.png", image)
    write("x.csv", "image,mos\n" + "".join(f"{i}.png,{i}\n" for i in range(len(images))))


def samples(content):
    return {f"{key}.{suffix}": part for key in "ab" for suffix, part in content.items()}


def test_the_payload_works():
    pickle.Unpickler(io.BytesIO(pickle.dumps(Payload()))).load()
    Path("owned").rmdir()


# Pickles


def cached_pixels():
    rated([png(), png(), png()])
    poison("x.npy")
    write("x.npy.json", json.dumps({"names": ["0.png", "1.png", "2.png"], "skipped": [], "shapes": [[40, 40]] * 3}))


UNSAFE = "may run code"
DISCO = "train --arm moco --student cnn:8 --data"
SOFTCLIP = "train --clip tiny-vit --test x.tar --data x.tar"
PICKLES = [
    ("disco", f"{DISCO} x.npz", lambda: poison("x.npz"), "x.npz: not an .npz file of plain arrays"),
    ("disco", f"{DISCO} torchvision:LSUN:x", lambda: poison("_cache_x"), UNSAFE),
    ("disco", "train --student cnn:8 --teacher x.pth", lambda: poison("x.pth"), UNSAFE),
    ("disco", "eval --model x", lambda: model_folder({"backbone": "cnn:8", "dim": 8}, "model.safetensors"), "x: not an"),
    ("softclip", "eval --model tiny-vit:x.pt", lambda: poison("x.pt"), UNSAFE),
    (
        "softclip",
        f"{SOFTCLIP} --arm soft --tags_field tags.txt --roi_field roi.npy --roi field",
        lambda: shard("x.tar", samples({"png": png(), "txt": "a", "tags.txt": "b", "roi.npy": poison("y.npy").read_bytes()})),
        "roi.npy: not an array",
    ),
    ("iqa-distill", "train --weights x.pth", lambda: poison("x.pth"), UNSAFE),
    ("iqa-distill", "train --arm base --data x.csv --pixel_cache x.npy", cached_pixels, "x.npy: damaged"),
    ("iqa-distill", "eval --model x", lambda: model_folder({}, "model.safetensors"), "not a model"),
    ("dsan", "train --data x --test x --validation 0", lambda: database("x", [pickle.dumps(Payload())] * 2), "not an image"),
    ("dsan", "eval --model x", lambda: model_folder({}, "model.safetensors"), "not a model"),
    ("eclstm", "train --data x.csv", lambda: poison("x.csv"), "not a readable CSV"),
    ("eclstm", "train --data x.parquet", lambda: poison("x.parquet"), "x.parquet"),
    ("eclstm", "eval --model x", lambda: model_folder({"features": ["a"]}, "model.safetensors"), "not a checkpoint"),
    ("sinkd", "train --data x.jsonl", lambda: poison("x.jsonl"), "not UTF-8"),
    ("sinkd", "eval --model x", lambda: model_folder(BERT), UNSAFE),
    ("sinkd", "train --data hub:x", lambda: shard("x/0.tar", {"a.pth": poison("x/0.pth").read_bytes()}), UNSAFE),
    ("peg", "train --model static:8 --data x.jsonl", lambda: poison("x.jsonl"), "not UTF-8"),
    ("peg", "eval --model x", lambda: model_folder(BERT), UNSAFE),
    ("mmict", "train --data x.jsonl", lambda: poison("x.jsonl"), "not text in UTF-8"),
    ("mmict", "train --vision x --lm x", lambda: model_folder(BERT), UNSAFE),
    ("mmict", "eval --model x", lambda: model_folder({}), "no checkpoint"),
]  # fmt: skip


def label(value):
    return value if isinstance(value, str) and len(value) < 80 else ""


@pytest.mark.parametrize(("name", "command", "make", "words"), PICKLES, ids=label)
def test_pickles_are_refused(name, command, make, words, refused, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache"))
    make()
    refused(name, command, words)


def a_cache_of_logits():
    write("x/meta.json", json.dumps({"classes": 2, "topk": None, "dtype": "float16", "rows": 2, "fingerprint": ""}))
    return poison("x/rows.npy").parent


@pytest.mark.parametrize(
    ("read", "make"),
    [
        (lambda path: load("sinkd.teacher_cache:TeacherCache.open")(path), a_cache_of_logits),
        (
            lambda path: load("dsan.synthetic:render_words")(1, load("dsan:SyntheticWords")(), cache=path),
            lambda: poison("x.npz"),
        ),
        (
            lambda path: load("iqa_distill.pool:make_pool")([np.zeros((32, 32, 3), np.uint8)], 1, crop=32, cache=path),
            lambda: poison("x.npz"),
        ),
    ],
    ids=["sinkd", "dsan", "iqa-distill"],
)
def test_caches_hold_no_pickles(read, make):
    with pytest.raises(ValueError, match=r"x.*: .*delete it|x: damaged"):
        read(make())


@pytest.mark.parametrize("name", ["sinkd eval --model x", "peg eval --model x", "mmict train --vision x --lm x"])
def test_code_beside_a_model_is_not_imported(name, refused):
    write("x/evil.py", "import os; os.mkdir('owned')\nclass Evil: pass")
    write("x/config.json", json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    write("x/modules.json", json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]))
    refused(*name.split(" ", 1), "trust_remote_code")


# Runs that go on


TRAIN = "train --max_steps 2 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --output_dir run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stopped after its first step."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    assert load("eclstm.cli:app")([*TRAIN.split()[:-1], str(folder)]) == 0
    shutil.rmtree(folder / "checkpoint-2")
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_stops_the_run(name, run, refused):
    shutil.copytree(run, "run")
    assert Path(f"run/checkpoint-1/{name}").exists()
    poison(f"run/checkpoint-1/{name}")
    refused("eclstm", TRAIN, UNSAFE)


def test_what_a_checkpoint_does_not_need_is_not_read(run):
    shutil.copytree(run, "run")
    for name in ("training_args.bin", "pytorch_model.bin"):
        poison(f"run/checkpoint-1/{name}")
    assert load("eclstm.cli:app")(TRAIN.split()) == 0


@pytest.mark.parametrize(
    "name",
    [
        "eclstm:ECLSTM", "sinkd:SinKD", "peg:Peg", "disco:DisCo", "softclip:SoftClip", "dsan:DSAN", "iqa_distill:IQA",
        "mmict:MMICT",
    ],
)  # fmt: skip
def test_all_go_on_as_the_engine_does(name):
    trainer = load(f"{name}Trainer")
    for method in ("_load_optimizer_and_scheduler", "_load_rng_state", "_load_callback_state"):
        assert getattr(trainer, method) is getattr(Trainer, method)


# Images


def of_images(image):
    write("x/a.png", image)
    write("x/b.png", image)


def with_labels(image):
    write("x/a.png", image)
    write("x/gt.txt", "a.png\tab\n")


def with_captions(image):
    write("a.png", image)
    write("x.jsonl", '{"image": "a.png", "text": "a"}\n{"image": "a.png", "text": "b"}\n')


IMAGES = [
    ("disco", f"{DISCO} x", of_images),
    ("softclip", f"{SOFTCLIP} --arm clip", lambda image: shard("x.tar", samples({"png": image, "txt": "a"}))),
    ("dsan", "train --data x --test x --validation 0", with_labels),
    ("iqa-distill", "train --arm base --data x.csv", lambda image: rated([image] * 3)),
    ("mmict", "train --data x.jsonl --test x.jsonl", with_captions),
]


@pytest.mark.parametrize(("name", "command", "make"), IMAGES, ids=label)
def test_image_bombs_are_refused_by_their_header(name, command, make, refused):
    make(png(declared=(60_000, 60_000)))
    refused(name, command, BOMB, "png")


def test_bombs_of_other_kinds():
    """A text chunk of 100 MB in a small file, and a picture that only calls itself one."""
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    with pytest.raises(ValueError, match=r"^x\.png: .*too large"):
        open_image(png()[:33] + chunk + png()[33:], "x.png")
    with pytest.raises(ValueError, match=r"^x\.png: not an image that can be read"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.png")


def test_of_an_animation_one_picture_is_read(monkeypatch):
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(50)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", lambda picture, frame: pytest.fail("another was read"))
    assert open_image(file.getvalue()).size == (8, 8)


def test_a_strip_is_not_stretched_to_gigabytes(refused):
    shard("x.tar", samples({"png": png(1, 60_000), "txt": "a"}))
    refused("softclip", f"{SOFTCLIP} --arm clip", "a.png: the image cannot be decoded: 1 x 60000 pixels")


# Archives


def test_nothing_of_an_archive_is_written_anywhere():
    """Members that name other places are read where they are in the archive, or not at all."""
    text = dict.fromkeys(OUTSIDE, "1\tx")
    images = {f"{name}.png": png() for name in OUTSIDE}
    shard("x.tar", images | {f"{name}.cls": "0" for name in OUTSIDE})
    train, _ = load("disco.readers:read")("x.tar")
    assert [train.open(i).size for i in range(3)] == [(40, 40)] * 3
    shard("x.tar", images | {f"{name}.txt": "a" for name in OUTSIDE})
    pairs = load("softclip.data:load_pairs")(load("softclip.data:DataOptions")(data="x.tar", test="x.tar"))
    assert pairs.train.image(0).size == (40, 40)
    zipped("x.zip", images | {"gt.txt": "".join(f"{name}.png\ta\n" for name in OUTSIDE)})
    assert load("dsan.readers:read_crops")("x.zip").open(0).size == (40, 40)
    zipped("y.zip", text)
    shard("y.tar", text)
    for name in ("y.zip", "y.tar"):
        with pytest.raises(FileNotFoundError, match=r"train_FD001\.txt, .* not found"):
            load("eclstm:CMAPSS")(name)


def test_links_in_an_archive_lead_nowhere():
    write("secret.txt", "1 2 3")
    with tarfile.open("x.tar", "w") as tar:
        for name in ("train_FD001.txt", "a.png", "a.txt"):
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = kind, str(Path("secret.txt").absolute())
                tar.addfile(link)
    for read in ("eclstm:CMAPSS", "disco.readers:read"):
        with pytest.raises((ValueError, OSError), match=r"x\.tar"):
            load(read)("x.tar")
    with pytest.raises(ValueError, match="no samples"):
        load("softclip.readers:read_shards")(["x.tar"], load("softclip.readers:Fields")())


def sparse(name, member):
    """A tar of 2 kB that says it holds a terabyte of zeros."""
    info = tarfile.TarInfo(member)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 0
    header[483:495] = b"\x80" + (2**40).to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    write(name, bytes(header) + bytes(1024))


def test_archives_that_unpack_to_too_much_are_refused_by_their_header(refused, monkeypatch):
    sparse("x.tar", "train_FD001.txt")
    refused("eclstm", "train --data x.tar", "x.tar: train_FD001.txt unpacks to 1,099,511,627,776 bytes")
    for method in ("eclstm.cmapss", "dsan.readers"):
        monkeypatch.setattr(f"{method}.LARGEST", 10_000)
    zipped("x.zip", {"train_FD001.txt": bytes(10_001), "gt.txt": "a.png\tab", "a.png": bytes(10_001)})
    refused("eclstm", "train --data x.zip", "x.zip: train_FD001.txt unpacks to 10,001 bytes")
    refused("dsan", "train --data x.zip --test x.zip --validation 0", "x.zip: a.png unpacks to 10,001 bytes")


def test_arrays_that_say_they_are_huge_are_refused():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    zipped("x.npz", {"images.npy": header.getvalue()})
    with pytest.raises(ValueError, match=r"x\.npz: not an .npz file"):
        load("disco.readers:read")("x.npz")
    shard("x.tar", samples({"png": png(), "txt": "a", "roi.npy": header.getvalue()}))
    pairs = load("softclip.readers:read_shards")(["x.tar"], load("softclip.readers:Fields")(roi="roi.npy"))
    with pytest.raises(ValueError, match=r"roi\.npy: not an array"):
        load("softclip.readers:to_pairs")([pairs], load("softclip.readers:Fields")(roi="roi.npy"))[0].roi(0)


# Text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: !!python/object/apply:os.mkdir [owned]", "could not determine a constructor"),
        ("seed: !!python/name:os.mkdir", "could not determine a constructor"),
        (f"seed: {'[' * 500}", "recursion"),
        (f"seed: {'9' * 5000}", "4300 digits"),
        ("dense: &a [1, 1]\nfeatures: [*a, *a]", "it holds an alias"),
    ],
    ids=label,
)
def test_a_configuration_is_only_values(content, words, refused):
    write("x.yaml", content)
    refused("eclstm", "train --config x.yaml", "x.yaml: not readable as YAML", words)


JSONS = [
    ("disco", f"{DISCO} x.tar", lambda text: shard("x.tar", {"a.png": png(), "a.json": text})),
    ("softclip", f"{SOFTCLIP} --arm soft --tags_field json:a --roi thumbnails", lambda text: shard(
        "x.tar", samples({"png": png(), "txt": "a", "json": text})
    )),
    ("dsan", "train --data x.json --test x.json", lambda text: write("x.json", text)),
    ("sinkd", "train --data x.jsonl", lambda text: write("x.jsonl", text)),
    ("peg", "train --model static:8 --data x.jsonl", lambda text: write("x.jsonl", text)),
    ("mmict", "train --data x.jsonl", lambda text: write("x.jsonl", text)),
]  # fmt: skip


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
@pytest.mark.parametrize(("name", "command", "make"), JSONS, ids=label)
def test_json_that_is_too_deep_or_long_is_named(name, command, make, text, refused):
    make(text)
    refused(name, command, ".json" if name in ("disco", "softclip") else "x.json")


@pytest.mark.parametrize("name", ["eclstm", "sinkd", "peg", "disco", "softclip", "dsan", "iqa-distill", "mmict"])
def test_a_deep_configuration_of_a_model_is_one_line(name, refused):
    for file in ("config.json", "open_clip_config.json", "modules.json"):
        write(f"x/{file}", DEEP)
    poison("x/model.safetensors")
    refused(name, "eval --model x")
