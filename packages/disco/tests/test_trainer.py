"""The engine: views, optimiser, schedules, and that a stopped training goes on as if nothing had happened."""

import json
from pathlib import Path

import pytest
import torch
from disco.data import Images
from disco.model import DisCo, DisCoOutput
from disco.teacher_cache import FixedViews
from disco.train import fit
from disco.trainer import DisCoConfig, DisCoTrainer
from safetensors import safe_open
from tiny_vision import GOLDEN, encoder


def pictures(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8))


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        options = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "num_train_epochs": 2, "queue_size": 20,
            "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.3,
        }  # fmt: skip
        return DisCoConfig(**{**options, **changes})

    return make


@pytest.fixture
def trainer(config):
    """For a new student, with the teacher of seed 1."""

    def make(images=None, views=None, batch_norm_splits=1, **changes):
        own = config(**changes)
        disco = DisCo(
            encoder(), None if own.arm == "moco" else encoder("8-16", seed=1), arm=own.arm, queue_size=own.queue_size,
            momentum=0.9, bn_splits=batch_norm_splits,
        )  # fmt: skip
        return DisCoTrainer(disco, own, train_dataset=images or pictures(), views=views)

    return make


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def views_of(trainer, step, images=None):
    """What the networks would be shown at a step."""
    shown = []

    def network(view_q, view_k, known):
        shown.extend([view_q, view_k])
        zero = view_q.sum()
        return DisCoOutput(zero, zero, zero)

    trainer.state.global_step = step
    batch = (images or pictures()).__getitems__(list(range(8)))
    trainer.compute_loss(network, batch)
    return torch.stack(shown)


class TestViews:
    def test_of_a_step_are_always_the_same(self, trainer):
        assert torch.equal(views_of(trainer(), 3), views_of(trainer(), 3))

    def test_differ_from_each_other_and_from_those_of_other_steps_and_seeds(self, trainer):
        first, second, other = views_of(trainer(), 3), views_of(trainer(), 4), views_of(trainer(seed=1), 3)
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_differ_between_processes(self, trainer, monkeypatch):
        seen = []
        for rank in range(3):
            one = trainer()
            monkeypatch.setattr(DisCoConfig, "process_index", property(lambda self, rank=rank: rank))
            monkeypatch.setattr(DisCoConfig, "world_size", property(lambda self: 3))
            seen += [views_of(one, step) for step in (0, 1)]
            monkeypatch.undo()
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    def test_differ_between_the_batches_of_an_accumulated_step(self, trainer):
        one = trainer(gradient_accumulation_steps=2)
        seen = [views_of(one, step) for step in (0, 0, 1, 1)]
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    def test_are_normalised_as_the_encoder_says(self, trainer):
        one, grey = trainer(), Images(torch.full((8, 3, 8, 8), 255, dtype=torch.uint8))
        one.augmentation = type(one.augmentation).crop_flip(8)
        torch.testing.assert_close(views_of(one, 0, grey), torch.full((2, 8, 3, 8, 8), (1 - 0.5) / 0.25))


class TestOptimiser:
    def test_is_sgd_on_the_students_parameters_alike(self, trainer):
        one = trainer(weight_decay=1e-4)
        (group,) = one.create_optimizer().param_groups
        assert type(one.optimizer) is torch.optim.SGD
        assert {id(p) for p in group["params"]} == {id(p) for p in one.model.student.parameters()}
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)

    @pytest.mark.parametrize(("batch", "accumulation", "rate"), [(256, 1, 0.03), (8, 1, 0.0009375), (8, 4, 0.00375)])
    def test_rate_grows_with_the_images_of_a_step(self, trainer, batch, accumulation, rate):
        one = trainer(
            pictures(batch), learning_rate=0.03, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, queue_size=256,
        )  # fmt: skip
        assert one.create_optimizer().param_groups[0]["lr"] == pytest.approx(rate)

    def test_rate_per_epoch_is_the_authors(self, trainer):
        case = json.loads((GOLDEN / "schedules.json").read_text())["pretrain_cosine_per_epoch"]
        one = trainer(num_train_epochs=case["epochs"], learning_rate=case["lr0"] * 256 / 8, lr_per_epoch=True)
        rates = self.rates(one, steps=3 * case["epochs"])
        for epoch, rate in case["lr_at_epoch"].items():
            assert rates[3 * int(epoch) : 3 * int(epoch) + 3] == pytest.approx([rate] * 3)

    def test_rate_per_step_is_a_cosine_to_zero(self, trainer):
        rates = self.rates(trainer(learning_rate=32.0), steps=8)
        assert rates == pytest.approx([0.5 * (1 + torch.tensor(torch.pi * i / 8).cos().item()) for i in range(8)])

    @staticmethod
    def rates(one, steps):
        optimizer = one.create_optimizer()
        scheduler, rates = one.create_scheduler(steps, optimizer), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates


class TestTeacher:
    def test_is_bit_identical_after_training_and_in_no_checkpoint(self, trainer, config):
        one = trainer(save_strategy="epoch")
        teacher = one.model.teacher
        before = state(teacher)
        assert any("running" in name for name in before)
        one.train()
        assert_same(state(teacher), before)
        (checkpoint,) = Path(one.args.output_dir).glob("checkpoint-*")
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            assert {name.split(".")[0] for name in file.keys()} == {"student", "key", "loss"}  # noqa: SIM118
        held = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
        assert not held & {id(p) for p in teacher.parameters()}

    def test_needs_eval_mode_for_fixed_views(self, config):
        with pytest.raises(ValueError, match="fixed_views needs teacher_mode eval"):
            config(fixed_views=4, teacher_mode="train")


def test_the_student_approaches_its_teacher_and_terms_are_logged(trainer):
    one = trainer(num_train_epochs=15)
    one.train()
    rows = [row for row in one.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(rows[0]["contrast"] + 32 * rows[0]["distill"], rel=1e-3)
    assert rows[-1]["distill"] < 0.7 * rows[0]["distill"]


@pytest.mark.parametrize(
    ("arm", "options"),
    [("disco", {}), ("disco", {"batch_norm_splits": 2}), ("disco", {"views": True}), ("moco", {}), ("seed", {})],
)
def test_killed_and_resumed_gives_the_same_bits(arm, options, trainer, tmp_path):
    """Student, key encoder with its statistics, queue and pointer; the kill is after two thirds of 12 steps."""
    fixed = options.pop("views", False)

    def make():
        views = None
        if fixed:
            teacher = encoder("8-16", seed=1)
            views = FixedViews(trainer(arm=arm).augmentation, 48, 3)
            views.embed(teacher, pictures(), tmp_path / "views.safetensors", torch.device("cpu"))
        return trainer(
            arm=arm, views=views, save_strategy="steps", save_steps=4, save_total_limit=None, **options
        )  # fmt: skip

    whole = make()
    whole.train()
    torch.manual_seed(99)
    again = make()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-8")
    assert_same(state(whole.model), state(again.model))
    assert int(whole.model.queue.queue.pointer) == 12 * 8 % 20


class TestBatches:
    def test_fewer_images_than_a_step_is_one_line(self, trainer):
        with pytest.raises(ValueError, match=r"^5 images are fewer than the 8 of a step: give a smaller --per_device"):
            trainer(pictures(5))

    def test_the_last_smaller_one_is_left_out_or_taken(self, trainer):
        for drop, steps, pointer in ((True, 2, 16), (False, 3, 0)):
            one = trainer(pictures(20), dataloader_drop_last=drop, num_train_epochs=1)
            one.train()
            assert one.state.global_step == steps
            assert int(one.model.queue.queue.pointer) == pointer

    def test_accumulated_ones_sum_to_their_mean(self, trainer):
        """The key encoder and the queue move with every batch, the student with every step."""
        one = trainer(arm="moco", gradient_accumulation_steps=2, max_steps=1, learning_rate=256 / 16, weight_decay=0.0)
        key, student = state(one.model.key), state(one.model.student)
        gradients = []
        forward = one.model.forward

        def recording(*batch):
            output = forward(*batch)
            gradients.append(torch.autograd.grad(output.loss, one.model.student.head[0].weight, retain_graph=True)[0])
            return output

        one.model.forward = recording
        one.args.max_grad_norm = 0.0
        one.train()
        moved = one.model.student.head[0].weight
        torch.testing.assert_close(moved, student["head.0.weight"] - (gradients[0] + gradients[1]) / 2)
        assert int(one.model.queue.queue.pointer) == 16
        assert_same(
            {k: v for k, v in key.items() if "head" in k},
            {f"head.{k}": v for k, v in state(one.model.key.head).items()},
        )

    def test_bfloat16_leaves_the_loss_in_float32(self, trainer, monkeypatch):
        one, seen = trainer(bf16=True, num_train_epochs=1), []
        original = one.compute_loss
        hook = one.model.student.head[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

        def recording(*arguments, **keywords):
            loss = original(*arguments, **keywords)
            seen.append(loss.dtype)
            return loss

        monkeypatch.setattr(one, "compute_loss", recording)
        one.train()
        hook.remove()
        assert seen == [torch.bfloat16, torch.bfloat16, torch.float32] * 6
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in one.model.parameters())


class TestSizes:
    @pytest.mark.parametrize(
        ("images", "size"), [(1_281_167, 65536), (50_000, 8192), (262_144, 65536), (262_143, 32768)]
    )
    def test_the_queue_is_the_largest_power_of_two_up_to_a_quarter(self, config, images, size):
        assert config(queue_size=None).queue_for(images) == size

    def test_but_holds_a_step(self, config):
        assert config(queue_size=None, per_device_train_batch_size=200).queue_for(300) == 200

    def test_a_given_queue_stands(self, config, trainer):
        assert config(queue_size=7).queue_for(10**6) == 7
        with pytest.raises(ValueError, match="size and a dim of at least 1, got 0"):
            trainer(queue_size=config(queue_size=0).queue_for(10**6))

    @pytest.mark.parametrize(
        ("options", "momentum"),
        [
            ({"num_train_epochs": 200, "per_device_train_batch_size": 256}, 0.999),
            ({"num_train_epochs": 1, "per_device_train_batch_size": 256}, 0.99),
            ({"max_steps": 49_999}, 0.99),
            ({"max_steps": 50_000}, 0.999),
            ({"max_steps": 50_000, "key_momentum": 0.5}, 0.5),
        ],
    )
    def test_key_momentum_follows_the_number_of_steps(self, config, options, momentum):
        assert config(**options).key_momentum_for(1_281_167) == momentum

    def test_steps_are_those_of_all_processes_together(self, config, monkeypatch):
        one = config(num_train_epochs=4, per_device_train_batch_size=32)  # 160,146 steps alone, 20,018 of eight
        assert one.key_momentum_for(1_281_167) == 0.999
        monkeypatch.setattr(DisCoConfig, "world_size", property(lambda self: 8))
        assert one.key_momentum_for(1_281_167) == 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "x"}, "arm must be one of disco, moco"),
        ({"queue_init": "x"}, "queue_init must be random or teacher, got 'x'"),
        ({"queue_init": "teacher", "arm": "mse_only"}, "the arm mse_only has no queue"),
    ],
)
def test_wrong_options(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)


class TestTeachersQueue:
    def test_is_what_the_students_starts_with(self, config, tmp_path):
        keys = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
        trained = fit(
            encoder(), encoder("8-16", seed=1), pictures(), config(queue_init="teacher", max_steps=1), queue=(keys, 15)
        )
        bank = trained.model.queue.queue
        assert int(bank.pointer) == 3
        assert torch.equal(bank.keys[3:15], keys[3:15])
        assert not torch.isclose(bank.keys, keys).all(1)[[15, 16, 17, 18, 19, 0, 1, 2]].any()

    def test_must_have_the_same_size(self, config):
        with pytest.raises(
            ValueError, match=r"the teacher's queue is \(24, 8\), the student's \(20, 8\): give --queue_size 24"
        ):
            fit(
                encoder(),
                encoder("8-16", seed=1),
                pictures(),
                config(queue_init="teacher"),
                queue=(torch.zeros(24, 8), 0),
            )

    def test_must_be_there(self, config):
        with pytest.raises(ValueError, match="needs a --teacher checkpoint of MoCo"):
            fit(encoder(), encoder("8-16", seed=1), pictures(), config(queue_init="teacher"))
