import copy
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from disco import DisCo
from disco.model import ARMS
from tiny_vision import LinearMap, encoder, golden, golden_steps, run_rank, views
from torch import nn


@pytest.mark.parametrize("case", ["disco_step", "disco_traj"])
def test_steps_equal_the_authors_program(case):
    """Student, key encoder, queue and pointer after each optimiser step; losses and gradients in each."""
    case = golden(case)
    disco = DisCo(
        LinearMap(case["w_student0"]), LinearMap(case["w_teacher"]), queue_size=case["K"], momentum=case["m"],
        temperature=case["T"], distill_weight=1.0, distill_reduction="sum",
    )  # fmt: skip
    disco.key.weight.data.copy_(case["w_key0"])
    disco.queue.queue.keys.copy_(case["queue0"].T)
    disco.queue.queue.pointer.fill_(case["ptr0"].item())
    optimizer = torch.optim.SGD(disco.student.parameters(), lr=case["lr"], momentum=0.9, weight_decay=1e-4)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for step in range(len(case["loss"])):
        output = disco(case["im_q"][step], case["im_k"][step])
        optimizer.zero_grad()
        output.loss.backward()
        torch.testing.assert_close(output.contrast, case["ce"][step], **close)
        torch.testing.assert_close(output.distill, case["mse_q"][step] + case["mse_k"][step], **close)
        torch.testing.assert_close(output.loss, case["loss"][step], **close)
        torch.testing.assert_close(disco.student.weight.grad, case["grad"][step], rtol=1e-4, atol=1e-6)
        optimizer.step()
        torch.testing.assert_close(disco.student.weight.data, case["w_student"][step], **close)
        torch.testing.assert_close(disco.key.weight.data, case["w_key"][step], **close)
        torch.testing.assert_close(disco.queue.queue.keys, case["queue"][step].T, **close)
        assert disco.queue.queue.pointer == case["ptr"][step]


def literal_step(student, key, teacher, queue, view_q, view_k, momentum=0.999, temperature=0.2, weight=32.0):
    """The specification's section 3.3, line by line, with plain torch."""
    s_q = F.normalize(student(view_q), dim=1)
    s_k = F.normalize(student(view_k), dim=1)
    with torch.no_grad():
        for mine, theirs in zip(key.parameters(), student.parameters(), strict=True):
            mine.copy_(momentum * mine + (1 - momentum) * theirs)
        t_k = F.normalize(teacher(view_k), dim=1)
        k = F.normalize(key(view_k), dim=1)
        t_q = F.normalize(teacher(view_q), dim=1)
    logits = torch.cat([(s_q * k).sum(1, keepdim=True), s_q @ queue.T], 1) / temperature
    contrast = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    distance = (s_q - t_q).square().sum(1).mean() + (s_k - t_k).square().sum(1).mean()
    return contrast + weight * distance, k


def test_a_step_with_batch_normalisation_equals_the_literal_one():
    student, teacher = encoder(seed=1), encoder("8-8", seed=2).eval()
    disco = DisCo(copy.deepcopy(student), copy.deepcopy(teacher), queue_size=32)
    key, queue = copy.deepcopy(student), disco.queue.queue.keys.clone()
    for parameter in disco.key.parameters():
        parameter.data.add_(0.01)
    key.load_state_dict(disco.key.state_dict())
    expected, keys = literal_step(student, key, teacher, queue, *views())
    output = disco(*views())
    torch.testing.assert_close(output.loss, expected)
    expected.backward()
    output.loss.backward()
    for mine, theirs in zip(disco.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for ours, literal in ((disco.student, student), (disco.key, key)):  # buffers: each view once, the key's own
        for name, value in literal.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    torch.testing.assert_close(disco.queue.queue.keys[: len(keys)], keys)


def test_key_buffers_are_not_averaged():
    disco = DisCo(encoder(), encoder("8-8", 1), queue_size=32, momentum=0.0)
    disco(*views())
    student, key = disco.student.backbone[1], disco.key.backbone[1]
    assert torch.equal(student.weight, key.weight)
    assert student.num_batches_tracked == 2
    assert key.num_batches_tracked == 1


@pytest.mark.parametrize("arm", ARMS)
def test_teacher_is_bit_identical_after_training(arm):
    teacher = encoder("8-8", 1).train()
    before = copy.deepcopy(teacher.state_dict())
    disco = DisCo(encoder(), teacher, arm=arm, queue_size=32)
    optimizer = torch.optim.SGD([p for p in disco.parameters() if p.requires_grad], lr=0.1)
    start = copy.deepcopy(disco.student.state_dict())
    for _ in range(3):
        disco.train()
        optimizer.zero_grad()
        disco(*views()).loss.backward()
        optimizer.step()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(start["head.0.weight"], disco.student.head[0].weight)


def test_teacher_in_train_mode_drifts_as_the_authors_does():
    teacher = encoder("8-8", 1)
    expected = copy.deepcopy(teacher)
    disco = DisCo(encoder(), teacher, queue_size=32, teacher_mode="train")
    disco(*views())
    expected.train()
    expected(views()[1])  # view k first
    expected(views()[0])
    for name, value in expected.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name
    disco.eval()
    assert not teacher.training


def test_teacher_is_nowhere_but_goes_along():
    teacher = encoder("8-8", 1)
    disco = DisCo(encoder(), teacher, queue_size=32)
    assert not any("teacher" in name for name in disco.state_dict())
    ids = {id(p) for p in disco.parameters()}
    assert not any(id(p) in ids or p.requires_grad for p in teacher.parameters())
    disco.double()
    assert next(teacher.parameters()).dtype == torch.float64


def test_separate_and_joint_views_differ_by_batch_statistics_alone():
    def student_loss(**options):
        disco = DisCo(
            encoder(), encoder("8-8", 1), queue_size=32, generator=torch.Generator().manual_seed(0), **options
        )
        return disco(*views()).loss, disco

    separate, _ = student_loss()
    joint, disco = student_loss(joint_views=True)
    assert not torch.allclose(separate, joint)
    assert disco.student.backbone[1].num_batches_tracked == 1
    view_q, view_k = views()
    disco.student.train()
    both = F.normalize(disco.student(torch.cat([view_q, view_k])), dim=1)
    teacher = F.normalize(disco.teacher(torch.cat([view_q, view_k])), dim=1)
    distance = 2 * (both - teacher).square().sum(1).mean()
    torch.testing.assert_close((joint - disco(*views()).contrast) / 32, distance, rtol=0.2, atol=0)


def test_one_or_two_passes_of_an_eval_teacher_are_equal():
    disco = DisCo(encoder(), encoder("8-8", 1), queue_size=32)
    view_q, view_k = views()
    for together, alone in zip(disco._teach(view_q, view_k), (view_q, view_k), strict=True):
        torch.testing.assert_close(together, F.normalize(disco.teacher(alone), dim=1))


def test_known_teacher_embeddings_replace_the_teacher():
    state = encoder().state_dict()
    outputs = []
    for known in (False, True):
        student = encoder()
        student.load_state_dict(state)
        disco = DisCo(student, encoder("8-8", 1), queue_size=32, generator=torch.Generator().manual_seed(0))
        embeddings = disco._teach(*views()) if known else None
        outputs.append(disco(*views(), embeddings).loss)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("splits", [2, 3])
def test_split_batch_normalisation_equals_parts_passed_alone(splits, monkeypatch):
    disco = DisCo(encoder(), encoder("8-8", 1), queue_size=32, bn_splits=splits)
    key, (_, view_k) = copy.deepcopy(disco.key), views()
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    monkeypatch.setattr(torch, "randperm", lambda n, device: order)
    keys = disco._keys(view_k)
    parts = [F.normalize(key(part), dim=1) for part in view_k[order].chunk(splits)]
    torch.testing.assert_close(keys[order], torch.cat(parts))


def test_evaluation_mode_changes_nothing():
    disco = DisCo(encoder(), encoder("8-8", 1), queue_size=32)
    for parameter in disco.key.parameters():
        parameter.data.add_(0.01)
    disco.eval()
    before = copy.deepcopy(disco.state_dict())
    with torch.no_grad():
        disco(*views())
    assert all(torch.equal(value, before[name]) for name, value in disco.state_dict().items())


def test_seed_compares_one_view_and_enqueues_the_teacher():
    teacher = encoder("8-8", 1)
    disco = DisCo(encoder(), teacher, arm="seed", queue_size=32)
    view_q, view_k = views()
    disco(view_q, view_k)
    torch.testing.assert_close(disco.queue.queue.keys[: len(view_q)], F.normalize(teacher(view_q), dim=1))
    assert disco.student.backbone[1].num_batches_tracked == 1
    assert disco.key is None


def test_rkd_disco_is_the_sum_of_its_parts():
    losses = {}
    for arm in ("moco", "disco", "rkd", "rkd+disco"):
        disco = DisCo(encoder(), encoder("8-8", 1), arm=arm, queue_size=32, generator=torch.Generator().manual_seed(0))
        losses[arm] = disco(*views()).loss
    torch.testing.assert_close(losses["rkd+disco"], losses["disco"] + losses["rkd"] - losses["moco"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "byol"}, "arm must be one of disco, moco, .*; got 'byol'"),
        ({"teacher_mode": "frozen"}, "teacher_mode must be one of eval, train; got 'frozen'"),
        ({"momentum": 1.1}, "momentum must be between 0 and 1, got 1.1"),
        ({"momentum": -0.1}, "momentum must be between 0 and 1"),
        ({"bn_splits": 0}, "bn_splits must be at least 1, got 0"),
        ({"queue_size": 0}, "at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"teacher": None}, "arm 'disco' needs a teacher"),
        ({"teacher": encoder("8-8", 1, dim=12)}, "the student's embeddings are 8 wide and the teacher's 12"),
    ],
)  # fmt: skip
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        DisCo(**{"student": encoder(), "teacher": encoder("8-8", 1), "queue_size": 32, **change})


def test_student_cannot_be_its_own_teacher():
    network = encoder()
    with pytest.raises(ValueError, match="teacher and student are the same object"):
        DisCo(network, network)


def test_a_module_without_dim_must_say_its_width():
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    with pytest.raises(ValueError, match="how wide its embeddings are by dim="):
        DisCo(student, encoder())
    disco = DisCo(student, nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), dim=8, queue_size=16)
    with pytest.raises(ValueError, match="the student's embeddings are 8 wide and the teacher's 9"):
        disco(*views())


def test_wrong_batches():
    disco = DisCo(encoder(), encoder("8-8", 1), queue_size=4)
    with pytest.raises(ValueError, match="a batch of 1 is too small"):
        disco(*views(1))
    with pytest.raises(ValueError, match=r"keys \(6, 8\) do not fit a memory bank of 4 x 8"):
        disco(*views(6))
    with pytest.raises(ValueError, match="must be equal"):
        disco(views(4)[0], views(5)[0])
    for bad in (float("nan"), float("inf")):
        view_q, view_k = views(4)
        view_k[2, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="view_k: not finite in image 2 of the batch"):
            disco(view_q, view_k)


def test_different_families_and_uneven_queue():
    """Any student and teacher of equal embedding width; a queue that no batch divides."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    disco = DisCo(student, encoder("8-8", 1), dim=8, queue_size=7)
    for _ in range(3):
        disco(*views(4)).loss.backward()
    assert disco.queue.queue.pointer == 12 % 7


def test_two_processes_equal_one(tmp_path):
    """Gradients through DistributedDataParallel, key encoder, queue and its order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (2, port, str(tmp_path)), nprocs=2)
    alone = golden_steps(golden("disco_traj")).state_dict()
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
