"""DisCo on SwAV: the loss against a literal one, prototypes, queue, and the verb."""

import copy
import json
import math
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from disco.cli import app
from disco.encoder import Encoder
from disco.swav import DisCoSwAV, swav_crops, swav_loss
from disco.train import build
from disco.trainer import DisCoConfig
from safetensors.torch import load_file
from tiny_vision import LinearMap, encoder, run_swav_rank, swav_steps
from torch import nn


def sinkhorn_codes(scores, epsilon=0.05, iterations=3):
    """SwAV's algorithm 1, written out: prototypes share the samples equally, then each sample's code sums to 1."""
    q = torch.exp(scores.double() / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T.to(scores.dtype)


def literal_swav(crops, prototypes, queues=(), temperature=0.1):
    """The loops of SwAV's program; the mean over other crops, the sum over the two assigning ones."""
    loss = 0.0
    for assigning in (0, 1):
        known = torch.cat([queues[assigning], crops[assigning]]) if queues else crops[assigning]
        codes = sinkhorn_codes((known @ prototypes.T).detach())[-len(crops[assigning]) :]
        for other in set(range(len(crops))) - {assigning}:
            log_p = torch.log_softmax(crops[other] @ prototypes.T / temperature, 1)
            loss -= (codes * log_p).sum(1).mean() / (len(crops) - 1)
    return loss


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def crops(count=6, sizes=(8, 8, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, size, size, generator=generator) for size in sizes]


def swav(teacher=True, **options):
    student = encoder()
    options = {"prototypes": 10, "queue_size": 0, "frozen_prototype_steps": 0, **options}
    generator = torch.Generator().manual_seed(0)
    return DisCoSwAV(student, encoder("8-8", 1) if teacher else None, generator=generator, **options)


def steps(disco, count, lr=0.1, seed=0):
    optimizer = torch.optim.SGD([p for p in disco.parameters() if p.requires_grad], lr, 0.9, weight_decay=1e-4)
    for step in range(count):
        optimizer.zero_grad()
        disco(crops(seed=seed + step)).loss.backward()
        optimizer.step()


class TestLoss:
    @pytest.mark.parametrize("count", [2, 4])
    @pytest.mark.parametrize("queue", [0, 20])
    def test_equals_the_literal_one_with_its_gradients(self, count, queue):
        queues = [rows(queue, 8, seed=seed) for seed in (2, 3)] if queue else []
        results = []
        for loss in (swav_loss, literal_swav):
            embeddings, prototypes = rows(count, 12, 8).requires_grad_(), rows(5, 8, seed=1).requires_grad_()
            value = loss(embeddings, prototypes, queues)
            results.append([value, *torch.autograd.grad(value, [embeddings, prototypes])])
        for ours, literal in zip(*results, strict=True):
            torch.testing.assert_close(ours, literal, rtol=1e-4, atol=1e-6)

    def test_each_assignment_has_a_queue_of_its_own(self):
        embeddings, prototypes = rows(3, 6, 8), rows(5, 8, seed=1)
        crowd = prototypes[:1].expand(50, 8)  # the first prototype is taken: codes move to the others
        alone = swav_loss(embeddings, prototypes)
        assert not torch.isclose(alone, swav_loss(embeddings, prototypes, [crowd, crowd]))
        one_sided = swav_loss(embeddings, prototypes, [crowd, embeddings[1][:0]])
        assert not torch.isclose(alone, one_sided)

    def test_half_precision_is_computed_in_float32(self):
        embeddings, prototypes = rows(4, 12, 8), rows(5, 8, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            value = swav_loss(embeddings, prototypes)
        assert torch.equal(value, swav_loss(embeddings, prototypes))

    @pytest.mark.parametrize(
        ("shapes", "queues", "message"),
        [
            (((1, 4, 8), (5, 8)), 0, r"are \(1, 4, 8\) and \(5, 8\): expected \(2 or more crops"),
            (((2, 4, 8), (5, 7)), 0, r"are \(2, 4, 8\) and \(5, 7\)"),
            (((2, 4, 8), (5, 8)), 1, "one queue for each of the 2 assigning crops, or none; got 1"),
        ],
    )
    def test_wrong_shapes(self, shapes, queues, message):
        embeddings, prototypes = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=message):
            swav_loss(embeddings, prototypes, [torch.zeros(3, 8)] * queues)


class TestStep:
    @pytest.mark.parametrize("weight", [0.0, 1.0, 1000.0])  # the last: the teacher's gradient outweighs the other
    def test_equals_the_literal_one(self, weight):
        """Of linear maps, so that each crop can be embedded alone; teacher and student are both normalised."""
        student, teacher = LinearMap(torch.randn(192, 8)), LinearMap(5 * torch.randn(192, 8))
        disco = DisCoSwAV(
            student, teacher, prototypes=10, queue_size=0, frozen_prototype_steps=0, distill_weight=weight
        )
        views = crops(sizes=(8, 8, 8))
        output = disco(views)
        mine = [F.normalize(student(view), dim=1) for view in views]
        theirs = [F.normalize(teacher(view), dim=1) for view in views]
        distance = F.mse_loss(torch.cat(mine), torch.cat(theirs))
        contrast = literal_swav(mine, disco.prototypes)
        torch.testing.assert_close(output.contrast, contrast.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.distill, distance.detach())
        expected = (contrast + weight * distance) / 2
        torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
        parameters = [student.weight, disco.prototypes]
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (output.loss, expected)]
        for ours, literal in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, literal, rtol=1e-4, atol=1e-6)

    def test_without_a_teacher_it_is_swav(self):
        output = swav(teacher=False)(crops())
        assert output.distill == 0
        torch.testing.assert_close(output.loss.detach(), output.contrast / 2)

    def test_backbone_sees_one_size_at_once_and_the_head_all_crops(self):
        student = Encoder("cnn:4-8", dim=8, hidden=16, batch_norm=True, image_size=8)
        expected, views = copy.deepcopy(student), crops()
        expected.head(torch.cat([expected.backbone(torch.cat(group)) for group in (views[:2], views[2:])]))
        DisCoSwAV(student, prototypes=10)(views)
        for name, value in expected.state_dict().items():
            assert torch.equal(student.state_dict()[name], value), name
        assert student.backbone[1].num_batches_tracked == 2
        assert student.head[1].num_batches_tracked == 1

    def test_teacher_is_bit_identical_and_nowhere(self):
        disco = swav(queue_size=12)
        before, start = copy.deepcopy(disco.teacher.state_dict()), copy.deepcopy(disco.student.state_dict())
        disco.train()
        steps(disco, 3)
        assert all(torch.equal(value, before[name]) for name, value in disco.teacher.state_dict().items())
        assert not torch.equal(start["head.0.weight"], disco.student.head[0].weight)
        assert not any("teacher" in name for name in disco.state_dict())
        disco.double()
        assert next(disco.teacher.parameters()).dtype == torch.float64

    def test_evaluation_mode_changes_nothing(self):
        disco = swav(queue_size=12)
        steps(disco, 2)
        before = copy.deepcopy(disco.eval().state_dict())
        disco(crops())
        assert all(torch.equal(value, before[name]) for name, value in disco.state_dict().items())

    def test_crops_of_an_image_find_each_other(self):
        """2 ln 10 is the loss of crops that all look the same, which a head without batch normalisation ends at here."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(24, 3, 8, 8, generator=generator)
        torch.manual_seed(0)
        student = Encoder("cnn:8-16", dim=8, hidden=32, batch_norm=True, image_size=8)
        disco = DisCoSwAV(student, encoder("8-8", 1), prototypes=10, frozen_prototype_steps=5, generator=generator)
        optimizer, outputs = torch.optim.SGD(disco.parameters(), 0.02, 0.9), []
        for _ in range(40):
            noise = [0.1 * torch.randn(24, 3, size, size, generator=generator) for size in (8, 8, 4, 4)]
            outputs.append(disco([F.adaptive_avg_pool2d(images, view.shape[2]) + view for view in noise]))
            optimizer.zero_grad()
            outputs[-1].loss.backward()
            optimizer.step()
        assert outputs[-1].contrast < 0.5 * 2 * math.log(10)


class TestPrototypes:
    def test_stay_bit_identical_while_frozen_then_move_on_the_sphere(self):
        disco = swav(frozen_prototype_steps=2)
        start = disco.prototypes.detach().clone()
        steps(disco, 2)
        assert torch.equal(disco.prototypes, start)  # neither gradient, nor weight decay, nor momentum
        assert disco.steps == 2
        steps(disco, 1)
        assert not torch.allclose(disco.prototypes, start, atol=1e-4)
        disco(crops())
        torch.testing.assert_close(disco.prototypes.norm(dim=1), torch.ones(10))

    def test_are_used_by_direction_alone(self):
        disco = swav()
        losses = [disco(crops()).contrast]
        disco.prototypes.data.mul_(7)
        losses.append(disco(crops()).contrast)
        torch.testing.assert_close(*losses)


class TestQueue:
    def test_keeps_the_latest_of_each_assigning_crop_around_the_end(self):
        disco = swav(queue_size=8)
        network = disco.student.eval()  # so that crops can be embedded alone
        expected = [torch.zeros(8, 8), torch.zeros(8, 8)]
        for step in range(2):
            views = crops(sizes=(8, 8), seed=step)
            disco(views)
            for queue, view in zip(expected, views, strict=True):
                queue[[(6 * step + row) % 8 for row in range(6)]] = F.normalize(network(view), dim=1).detach()
        for queue, bank in zip(expected, disco.queues, strict=True):
            torch.testing.assert_close(bank.keys, queue)
            assert bank.pointer == 4

    @pytest.mark.parametrize(("after", "joins"), [(0, 3), (3, 3), (5, 5)])
    def test_joins_once_it_is_full_and_its_time_has_come(self, after, joins, monkeypatch):
        """18 places take three batches of 6."""
        seen = []

        def recording(embeddings, prototypes, queues, **options):
            seen.append(len(queues))
            return swav_loss(embeddings, prototypes, queues, **options)

        monkeypatch.setattr("disco.swav.swav_loss", recording)
        disco = swav(queue_size=18, queue_after=after)
        for step in range(7):
            disco(crops(seed=step))
        assert seen == [0] * joins + [2] * (7 - joins)

    def test_must_hold_a_batch(self):
        with pytest.raises(ValueError, match=r"keys \(6, 8\) do not fit a memory bank of 4 x 8"):
            swav(queue_size=4)(crops())


def test_state_goes_on_where_it_stopped(tmp_path):
    """Prototypes, queues, pointers and the counter; from safetensors."""
    whole = swav(queue_size=12, frozen_prototype_steps=3)
    for step in range(3):
        whole(crops(seed=step))
    whole.save_pretrained(tmp_path)
    other = swav(queue_size=12, frozen_prototype_steps=3)
    other.prototypes.data.neg_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.steps == 3
    losses = []
    for disco in (whole, other):
        output = disco(crops(seed=9))
        output.loss.backward()
        losses.append((output.loss, disco.prototypes.grad))
    for mine, theirs in zip(*losses, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature and epsilon must be positive, got 0.0 and 0.05"),
        ({"epsilon": -1.0}, "temperature and epsilon must be positive, got 0.1 and -1.0"),
        ({"prototypes": 0}, "prototypes must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"queue_size": -1}, "queue_size must be at least 0, got -1"),
        ({"queue_after": -1}, "queue_after must be at least 0, got -1"),
        ({"frozen_prototype_steps": -1}, "frozen_prototype_steps must be at least 0, got -1"),
        ({"distill_weight": -1.0}, "distill_weight must be at least 0, got -1.0"),
        ({"teacher": encoder("8-8", 1, dim=12)}, "the student's embeddings are 8 wide and the teacher's 12"),
        ({"student": nn.Linear(2, 2)}, "how wide its embeddings are by dim="),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        DisCoSwAV(**{"student": encoder(), "teacher": encoder("8-8", 1), **change})


def test_wrong_crops():
    disco, network = swav(), encoder()
    with pytest.raises(ValueError, match="teacher and student are the same object"):
        DisCoSwAV(network, network)
    with pytest.raises(ValueError, match=r"expected 2 or more crops of the same images, got crops of \[6\] images"):
        disco(crops(sizes=(8,)))
    with pytest.raises(ValueError, match=r"got crops of \[6, 5\] images"):
        disco([*crops(6, (8,)), *crops(5, (8,))])
    with pytest.raises(ValueError, match="a batch of 1 is too small"):
        disco(crops(1))
    views = crops()
    views[2][3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="crop 2: not finite in image 3 of the batch"):
        disco(views)


def test_two_processes_equal_one(tmp_path):
    """Gradients through DistributedDataParallel, assignments over all rows, queues and their order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_swav_rank, (2, port, str(tmp_path)), nprocs=2)
    alone = swav_steps().state_dict()
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


class TestVerb:
    def test_crops_are_swavs(self):
        large, *_, small = crop_list = swav_crops(224)
        assert len(crop_list) == 8
        assert (large.size, large.area, small.size, small.area) == (224, (0.14, 1.0), 96, (0.05, 0.14))
        assert (large.jitter, large.grey, large.blur, small.blur) == ((0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.5)
        assert [crop.blur for crop in swav_crops(32, 1)] == [0, 0, 0]
        with pytest.raises(ValueError, match="small_crops must be at least 0, got -1"):
            swav_crops(32, -1)

    def test_trains_on_the_sample(self, tmp_path):
        flags = [
            "--arm",
            "disco-swav",
            "--max_train",
            "160",
            "--max_test",
            "40",
            "--max_steps",
            "3",
            "--compare",
            "false",
        ]
        flags += [
            "--per_device_train_batch_size",
            "32",
            "--prototypes",
            "20",
            "--swav_queue",
            "64",
            "--logging_steps",
            "1",
        ]
        assert (
            app(
                [
                    "train",
                    *flags,
                    "--hidden",
                    "32",
                    "--save_strategy",
                    "steps",
                    "--save_steps",
                    "2",
                    "--output_dir",
                    str(tmp_path),
                ]
            )
            == 0
        )
        assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"random", "teacher", "disco-swav"}
        (checkpoint,) = tmp_path.glob("checkpoint-*")
        state = load_file(checkpoint / "model.safetensors")
        assert state["steps"] == 3
        assert state["prototypes"].shape == (20, 128)
        assert state["queues.0.pointer"] == 96 % 64
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        for row in [row for row in history if "contrast" in row]:
            assert row["loss"] == pytest.approx((row["contrast"] + row["distill"]) / 2, rel=1e-3)
        student = Encoder.from_pretrained(tmp_path)
        assert isinstance(student.head[1], nn.BatchNorm1d)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fixed_views": 4}, "the arm disco-swav has no fixed_views"),
            ({"queue_init": "teacher", "bn_splits": 2}, "the arm disco-swav has no queue_init, bn_splits"),
        ],
    )
    def test_refuses_what_it_does_not_have(self, changes, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            DisCoConfig(output_dir=str(tmp_path), arm="disco-swav", **changes)

    def test_sizes_follow_the_run_and_stand_if_given(self, tmp_path):
        def built(images=1_281_167, **changes):
            config = DisCoConfig(output_dir=str(tmp_path), arm="disco-swav", prototypes=10, **changes)
            disco = build(encoder(), encoder("8-8", 1), images, config)
            return disco.frozen_prototype_steps, disco.queue_after

        authors = built(per_device_train_batch_size=512)
        assert authors == pytest.approx((5005, 15 * 2502), rel=1e-3)
        assert built(max_steps=400) == (4, 30)
        assert built(frozen_prototype_steps=7, swav_queue_after=0) == (7, 0)

    def test_a_backbone_of_a_fixed_size_has_no_small_crops(self, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
        student = Encoder(network, dim=8, hidden=16, image_size=8)
        config = DisCoConfig(output_dir=str(tmp_path), arm="disco-swav")
        with pytest.raises(ValueError, match="the backbone cannot take images of 3 x 3"):
            build(student, encoder("8-8", 1), 64, config)
        config.small_crops = 0
        build(student, encoder("8-8", 1), 64, config)
