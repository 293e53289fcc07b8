import pytest
import torch
import torch.nn.functional as F
from iqa_distill.bias import BiasTeacher
from iqa_distill.teacher import NARTeacher
from iqa_distill.training import BiasTraining, Distillation, TeacherTraining
from safetensors.torch import load_file
from tiny_rkiqt import tiny_rkiqt
from torch import nn


@pytest.fixture
def nar():
    torch.manual_seed(0)
    return NARTeacher("tiny", crop_size=32, dim=8, depth=2, kinds=3)


@pytest.fixture
def bias():
    torch.manual_seed(0)
    return {kind: BiasTeacher(kind) for kind in ("conv", "inv")}


@pytest.fixture
def batch(nar):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=random)
    return {"images": images, "targets": torch.randn(4, generator=random), "hq_features": torch.randn(4, 8, 2, 2)}


def test_the_loss_is_the_weighted_sum_of_its_terms(nar, bias, batch):
    student = tiny_rkiqt()
    model = Distillation(student, nar, bias, mcd_weight=0.3, reg_weight=3.0)
    total, terms = model(**batch, generator=torch.Generator().manual_seed(1))
    output = student(batch["images"])
    torch.testing.assert_close(terms["score"], F.l1_loss(output.score, batch["targets"]))
    layers = nar(batch["images"], hq_features=batch["hq_features"]).layers
    torch.testing.assert_close(
        terms["mcd"], model.mcd(output.patches, layers, generator=torch.Generator().manual_seed(1))
    )
    outputs = {kind: teacher(batch["images"]) for kind, teacher in bias.items()}
    torch.testing.assert_close(terms["reg"], model.reg(outputs, output.conv, output.inv)[0])
    torch.testing.assert_close(total, terms["score"] + 0.3 * terms["mcd"] + 3 * terms["reg"])


def test_without_teachers_there_is_the_score_alone(batch):
    model = Distillation(tiny_rkiqt(), loss="smooth_l1")
    total, terms = model(batch["images"], batch["targets"])
    assert set(terms) == {"score"}
    expected = F.smooth_l1_loss(model.network(batch["images"]).score, batch["targets"])
    assert total == terms["score"]
    torch.testing.assert_close(total, expected)
    assert not model.compares
    assert model.nar is None


def test_teachers_learn_nothing_and_stay_in_eval_mode(nar, bias, batch):
    model = Distillation(tiny_rkiqt(), nar.train(), {kind: t.train() for kind, t in bias.items()}).train()
    before = [value.clone() for t in (nar, *bias.values()) for value in t.state_dict().values()]
    loss, _ = model(**batch)
    loss.backward()
    for teacher in (nar, *bias.values()):
        assert not any(module.training for module in teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    after = [value for t in (nar, *bias.values()) for value in t.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.network.training
    assert all(p.grad is not None for p in model.parameters())


def test_checkpoints_hold_no_teacher(nar, bias, tmp_path):
    model = Distillation(tiny_rkiqt(), nar, bias)
    model.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert {name.split(".")[0] for name in saved} == {"network", "mcd", "reg"}
    teachers = {id(p) for t in (nar, *bias.values()) for p in t.parameters()}
    assert not teachers & {id(p) for p in model.parameters()}


def test_teachers_move_along(nar, bias, batch):
    model = Distillation(tiny_rkiqt(), nar, bias).to(torch.float64)
    assert {p.dtype for t in (nar, *bias.values()) for p in t.parameters()} == {torch.float64}
    loss, _ = model(**{name: value.double() for name, value in batch.items()})
    assert loss.dtype == torch.float64


def test_blocks_of_the_student_are_paired_with_layers(nar, batch):
    student = tiny_rkiqt(options={"depth": 3, "embed_dim": 16, "num_heads": 2})
    model = Distillation(student, nar, blocks=[0, 2], mcd={"generate": False})
    _, terms = model(**batch)
    blocks = student(batch["images"], [0, 2]).blocks
    layers = nar(batch["images"], hq_features=batch["hq_features"]).layers
    torch.testing.assert_close(terms["mcd"], model.mcd(blocks, layers))
    with pytest.raises(ValueError, match="1 student blocks for a teacher of 2 layers"):
        Distillation(student, nar, blocks=[0])


def test_crops_of_teacher_and_student_must_agree(nar):
    with pytest.raises(ValueError, match="the teacher sees crops of 32 pixels, the student of 48: they must be equal"):
        Distillation(tiny_rkiqt(crop_size=48), nar)


def test_a_nar_teacher_learns_scores_and_kinds(nar, batch):
    model, hq, kinds = TeacherTraining(nar, 0.5), torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 0])
    nar.eval()
    total, terms = model(batch["images"], batch["targets"], hq=hq, kinds=kinds)
    output = nar(batch["images"], hq)
    torch.testing.assert_close(terms["score"], F.l1_loss(output.score, batch["targets"]))
    torch.testing.assert_close(terms["kind"], F.cross_entropy(output.kinds, kinds))
    torch.testing.assert_close(total, terms["score"] + 0.5 * terms["kind"])
    assert set(model(batch["images"], batch["targets"], hq=hq)[1]) == {"score"}
    assert model.compares


def test_a_teacher_of_inductive_bias_learns_scores(bias, batch):
    model = BiasTraining(bias["inv"].eval())
    loss, terms = model(batch["images"], batch["targets"], generator=None, kinds=torch.zeros(4))
    torch.testing.assert_close(loss, F.l1_loss(bias["inv"](batch["images"]).score, batch["targets"]))
    assert terms == {"score": loss}
    assert not model.compares


def test_half_precision_keeps_the_loss_finite(nar, bias, batch):
    model = Distillation(tiny_rkiqt(), nar, bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = model(**batch)
    loss.backward()
    assert all(value.isfinite() for value in terms.values())
    assert isinstance(model.network, nn.Module)
    assert all(p.grad.isfinite().all() for p in model.parameters())
