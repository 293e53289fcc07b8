import argparse
import copy
import os
import re

import pytest
import torch
from disco import Encoder, load_teacher
from disco.checkpoints import describe, load_encoder, load_queue, weights_hash
from disco.model import DisCo
from safetensors.torch import save_file
from torch import nn
from torchvision import models

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.fixture
def encoder():
    """A small one whose running statistics have moved off their start."""
    torch.manual_seed(0)
    encoder = Encoder("cnn:4-6", dim=5, hidden=8, image_size=16)
    encoder(torch.randn(8, 3, 16, 16))
    return encoder.eval()


def moco(encoder):
    """The names of MoCo for an encoder of ours, and its queue."""
    torch.manual_seed(1)
    names = {f"encoder_q.{_inner(name, 'fc')}": tensor for name, tensor in encoder.state_dict().items()}
    keys = {name.replace("encoder_q", "encoder_k"): torch.randn_like(tensor.float()) for name, tensor in names.items()}
    queue = nn.functional.normalize(torch.randn(5, 32), dim=0)
    return names | keys | {"queue": queue, "queue_ptr": torch.tensor([7])}


def swav(encoder):
    names = {_inner(name, "projection_head"): tensor for name, tensor in encoder.state_dict().items()}
    return names | {"prototypes.weight": torch.randn(9, 5)}


def _inner(name, head):
    return name.removeprefix("backbone.") if name.startswith("backbone.") else head + name.removeprefix("head")


def same(encoder, other):
    theirs = other.state_dict()
    return encoder.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in encoder.state_dict().items()
    )


# The published programs' own forms, by networks built as they build them


def test_moco_v2_with_resnet(tmp_path):
    torch.manual_seed(0)
    network = models.resnet18(num_classes=16)  # as in MoCo's program, where --mlp puts two layers before the last
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)
    network(torch.randn(4, 3, 32, 32))
    state = {f"module.encoder_q.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"module.encoder_k.{name}": torch.zeros(tensor.shape) for name, tensor in network.state_dict().items()}
    state |= {"module.queue": torch.randn(16, 64), "module.queue_ptr": torch.tensor([48])}
    path = tmp_path / "checkpoint_0199.pth.tar"
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9).state_dict()
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}, path)
    images = torch.randn(2, 3, 32, 32)
    for name in ("resnet18", "torchvision:resnet18"):
        teacher = load_teacher(path, name, image_size=32)
        assert not teacher.training
        assert (teacher.dim, teacher.width, teacher.image_size) == (16, 512, 32)
        torch.testing.assert_close(teacher(images), network.eval()(images))
        assert torch.equal(teacher.head[2].weight, network.fc[2].weight)
    keys, pointer = load_queue(path)
    assert torch.equal(keys, state["module.queue"].T)
    assert pointer == 48
    assert keys.is_contiguous()
    with pytest.raises(
        ValueError,
        match=r"does not fit the backbone timm:resnet34: 96 tensors are missing: backbone\.layer1\.2\.conv1.weight, ",
    ):
        load_teacher(path, "timm:resnet34", image_size=32)


@pytest.mark.parametrize("several", [False, True], ids=["SwAV", "DeepCluster-v2 or SeLa"])
def test_swav_family_with_resnet(tmp_path, several):
    torch.manual_seed(0)
    network = models.resnet18()
    network.fc = nn.Identity()
    network.projection_head = nn.Sequential(
        nn.Linear(512, 24), nn.BatchNorm1d(24), nn.ReLU(inplace=True), nn.Linear(24, 16)
    )
    images = torch.randn(4, 3, 32, 32)
    network.projection_head(network(images))
    network.prototypes = nn.Module() if several else nn.Linear(16, 30, bias=False)
    if several:
        network.prototypes.prototypes0 = network.prototypes.prototypes1 = nn.Linear(16, 30, bias=False)
    state = nn.DataParallel(network).state_dict()
    torch.save(state, tmp_path / "swav.pth")
    teacher = load_teacher(tmp_path / "swav.pth", "resnet18", image_size=32)
    network.eval()
    torch.testing.assert_close(teacher(images), network.projection_head(network(images)))
    assert describe(teacher).endswith("; not used: prototypes" + (" (2 tensors)" if several else ""))
    assert "head 512-24-16 with batch normalisation" in describe(teacher)
    assert load_queue(tmp_path / "swav.pth") is None


# Forms and prefixes


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", [moco, swav, lambda encoder: encoder.state_dict()], ids=["MoCo", "SwAV", "disco"])
def test_prefixes_in_any_nesting(tmp_path, encoder, form, prefix):
    torch.save({prefix + name: tensor for name, tensor in form(encoder).items()}, tmp_path / "t.pt")
    teacher = load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16)
    assert same(teacher, encoder)
    assert (teacher.backbone_name, teacher.dim, teacher.training) == ("cnn:4-6", 5, False)


def test_prefixes_inside_names(tmp_path, encoder):
    state = {name.replace("encoder_q.", "module.encoder_q._orig_mod."): t for name, t in moco(encoder).items()}
    torch.save({"model": state}, tmp_path / "t.pt")
    assert same(load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16), encoder)


def test_head_with_batch_normalisation(tmp_path):
    encoder = Encoder("cnn:4-6", dim=5, hidden=8, batch_norm=True, image_size=16)
    encoder(torch.randn(8, 3, 16, 16))
    torch.save(swav(encoder), tmp_path / "t.pth")
    assert same(load_teacher(tmp_path / "t.pth", "cnn:4-6", image_size=16), encoder)


def test_moco_v1_has_a_single_linear(tmp_path):
    encoder = Encoder("cnn:4-6", dim=5, hidden=0, image_size=16)
    state = {name.replace("fc.0.", "fc."): tensor for name, tensor in moco(encoder).items()}
    assert {"encoder_q.fc.weight", "encoder_q.fc.bias"} <= state.keys()
    torch.save({"state_dict": state}, tmp_path / "t.pth.tar")
    teacher = load_teacher(tmp_path / "t.pth.tar", "cnn:4-6", image_size=16)
    assert same(teacher, encoder)
    assert "head 6-5;" in describe(teacher)


def test_plain_names_and_safetensors(tmp_path, encoder):
    save_file({_inner(name, "fc"): tensor for name, tensor in encoder.state_dict().items()}, tmp_path / "t.safetensors")
    assert same(load_teacher(tmp_path / "t.safetensors", "cnn:4-6", image_size=16), encoder)


def test_backbone_may_be_a_module(tmp_path, encoder):
    torch.save(moco(encoder), tmp_path / "t.pt")
    backbone = Encoder("cnn:4-6").backbone
    teacher = load_teacher(tmp_path / "t.pt", backbone, image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert same(teacher, encoder)
    assert teacher.backbone is backbone
    assert (teacher.backbone_name, teacher.mean, teacher.std) == (None, (0.5,) * 3, (0.2,) * 3)
    wrapped = nn.DataParallel(Encoder("cnn:4-6").backbone)
    load_teacher(tmp_path / "t.pt", wrapped, image_size=16)
    assert torch.equal(wrapped.module[0].weight, encoder.backbone[0].weight)


def test_halves_are_read_into_floats(tmp_path, encoder):
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in moco(encoder).items()}, tmp_path / "t.pt")
    teacher = load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16)
    assert teacher.head[0].weight.dtype == torch.float32
    assert torch.equal(teacher.head[0].weight, encoder.head[0].weight.half().float())


# Folders


def test_folder(tmp_path, encoder):
    encoder.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert same(teacher, encoder)
    assert not teacher.training
    assert load_queue(tmp_path) is None
    assert describe(teacher) == (
        "cnn:4-6: 12 tensors, 0.00 M parameters, 6 features; head 6-8-5; "
        f"weights {weights_hash(encoder)}\nfrom {tmp_path}"
    )


def test_folder_of_a_module(tmp_path):
    parts = nn.Flatten(), nn.Linear(48, 6)
    encoder = Encoder(nn.Sequential(*parts), dim=5, hidden=8, image_size=4)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*its config.json names no backbone"):
        load_teacher(tmp_path)
    assert same(load_teacher(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(48, 6))), encoder)


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ("cnn:4-6", "cnn:4-6-6", r"Missing key\(s\)"),
        ("cnn:4-6-6", "cnn:4-6", r"Unexpected key\(s\)"),
        ("cnn:4-6", "cnn:4-7", "size mismatch"),
        ("cnn:4-6", "cnn:4-", "write widths"),
    ],
)
def test_folder_is_read_strictly(tmp_path, saved, given, message):
    Encoder(saved, dim=5, hidden=8, image_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: not an encoder of disco: .*{message}") as caught:
        load_teacher(tmp_path, given)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_folders_that_are_none(tmp_path, encoder):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_teacher(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no such folder; expected one that a finished run"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(
        FileNotFoundError, match=r"no config\.json; expected a folder that a finished run of disco wrote"
    ):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_teacher(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not an encoder of disco"):
        load_teacher(tmp_path)
    with pytest.raises(FileNotFoundError, match="a file, not a folder"):
        load_encoder(tmp_path / "config.json")
    encoder.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="not an encoder of disco"):
        load_teacher(tmp_path)


def test_state_of_a_training_names_the_folder_to_give(tmp_path, encoder):
    DisCo(encoder, arm="moco", queue_size=16).save_pretrained(tmp_path / "checkpoint-40")
    for path in (tmp_path / "checkpoint-40", tmp_path / "checkpoint-40" / "model.safetensors"):
        with pytest.raises(
            ValueError, match=f"is the state of a training: give the folder of the run, {tmp_path}, once"
        ):
            load_teacher(path, "cnn:4-6")


# Strictness


def test_every_name_must_match_both_ways(tmp_path, encoder):
    state = moco(encoder)
    del state["encoder_q.0.weight"], state["encoder_q.fc.2.bias"]
    state |= {f"encoder_q.extra.{i}": torch.zeros(1) for i in range(4)} | {"predictor.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16)
    assert str(caught.value) == (
        f"{tmp_path / 't.pt'} (MoCo) does not fit the backbone cnn:4-6: "
        "2 tensors are missing: backbone.0.weight, head.2.bias; "
        "5 are unknown: predictor.weight, encoder_q.extra.0, encoder_q.extra.1, ..."
    )


def test_shapes_must_match(tmp_path, encoder):
    torch.save(moco(encoder), tmp_path / "t.pt")
    with pytest.raises(
        ValueError, match=r"encoder_q\.0\.weight is \(4, 3, 3, 3\) in the file and \(3, 3, 3, 3\) in the net"
    ):
        load_teacher(tmp_path / "t.pt", "cnn:3-6", image_size=16)
    torch.save(moco(encoder) | {"encoder_q.fc.0.weight": torch.zeros(8, 7)}, tmp_path / "t.pt")
    with pytest.raises(
        ValueError,
        match=r"1 have another shape: encoder_q\.fc\.0\.weight is \(8, 7\) in the file and \(8, 6\) in the network$",
    ):
        load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16)


def test_a_head_of_another_form(tmp_path, encoder):
    deep = {"fc.4.weight": torch.zeros(5, 5), "fc.4.bias": torch.zeros(5)}
    state = {_inner(name, "fc"): tensor for name, tensor in encoder.state_dict().items()}
    torch.save(state | deep, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"2 are unknown: fc\.4\.weight, fc\.4\.bias"):
        load_teacher(tmp_path / "t.pt", "cnn:4-6", image_size=16)
    torch.save({"encoder_q.0.weight": torch.zeros(4), "encoder_q.fc.bias": torch.zeros(5)}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"projection head has no Linear: head\.0\.bias"):
        load_teacher(tmp_path / "t.pt", "cnn:4-6")


def test_no_head(tmp_path, encoder):
    backbone = encoder.backbone.state_dict()
    supervised = backbone | {"fc.weight": torch.zeros(10, 6), "fc.bias": torch.zeros(10)}  # a classifier's, not MoCo's
    headless = {f"module.encoder_q.{name}": tensor for name, tensor in backbone.items()}
    own = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    for state in (backbone, supervised, headless, own):
        torch.save(state, tmp_path / "t.pth")
        with pytest.raises(
            ValueError,
            match=f"^{tmp_path / 't.pth'} holds a backbone but no projection head: .*`disco pretrain-teacher`",
        ):
            load_teacher(tmp_path / "t.pth", "cnn:4-6")


def test_a_file_needs_a_backbone(tmp_path, encoder):
    torch.save(moco(encoder), tmp_path / "t.pth")
    with pytest.raises(ValueError, match="does not say which network it is: give its backbone"):
        load_teacher(tmp_path / "t.pth")


# Files that are not what they should be


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_refused(tmp_path, encoder, zipped):
    content = {"state_dict": moco(encoder), "args": Malicious(tmp_path / "harm")}
    torch.save(content, tmp_path / "t.pth", _use_new_zipfile_serialization=zipped)
    for read in (lambda path: load_teacher(path, "cnn:4-6"), load_queue):
        with pytest.raises(
            ValueError, match=r"not read, as it holds (posix|nt)\.mkdir, and such objects may run code"
        ) as caught:
            read(tmp_path / "t.pth")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_objects_beside_the_tensors_are_named(tmp_path, encoder):
    torch.save({"state_dict": moco(encoder), "args": argparse.Namespace(lr=0.03)}, tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"holds argparse\.Namespace, .* save the state dict alone"):
        load_teacher(tmp_path / "t.pth", "cnn:4-6")


@pytest.mark.parametrize("name", ["t.pth", "t.safetensors", "old.pth"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, encoder, name, share):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(encoder.state_dict(), path)
    else:
        torch.save(moco(encoder), path, _use_new_zipfile_serialization=name != "old.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: damaged, or not a file of weights"):
        load_teacher(path, "cnn:4-6")


def test_files_of_other_kinds(tmp_path):
    for content in (b"hello world, a text", bytes(range(256))):
        (tmp_path / "t.pth").write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or not a file of weights"):
            load_teacher(tmp_path / "t.pth", "cnn:4-6")
    for content in ({"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {}):
        torch.save(content, tmp_path / "t.pth")
        with pytest.raises(ValueError, match="no tensors, neither by name nor under state_dict or model"):
            load_teacher(tmp_path / "t.pth", "cnn:4-6")


# Queue, hash


@pytest.mark.parametrize(("queue", "pointer"), [(torch.zeros(5), 0), (torch.zeros(5, 8), 8), (torch.zeros(5, 8), -1)])
def test_queue_must_be_a_matrix(tmp_path, queue, pointer):
    torch.save({"module.queue": queue, "module.queue_ptr": torch.tensor([pointer])}, tmp_path / "t.pth")
    with pytest.raises(ValueError, match=rf"a queue of shape .* with pointer {pointer}; expected \(dim, K\)"):
        load_queue(tmp_path / "t.pth")


def test_hash(encoder):
    before = weights_hash(encoder)
    assert re.fullmatch("[0-9a-f]{12}", before)
    other = copy.deepcopy(encoder)
    assert weights_hash(other.train()) == before
    assert weights_hash(other.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        other.head[2].weight[0, 0] = torch.nextafter(other.head[2].weight[0, 0], torch.tensor(9.0))
    assert weights_hash(other) != before
    other = copy.deepcopy(encoder)
    other.backbone[1].num_batches_tracked += 1
    assert weights_hash(other) != before
    assert weights_hash(encoder.bfloat16()) != before


def test_hash_tells_names_apart():
    layer = nn.Linear(2, 1)
    assert weights_hash(nn.ModuleDict({"a": layer})) != weights_hash(nn.ModuleDict({"b": layer}))
