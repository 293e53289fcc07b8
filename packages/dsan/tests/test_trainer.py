"""The engine: both supervisions and their targets, schedules, and that a stopped training goes on as if nothing had happened."""

import math
import os

import numpy as np
import pytest
import torch
from dsan import DSAN, sample
from dsan.data import WordBatch, Words, read_data
from dsan.images import Size
from dsan.metrics import word_accuracy
from dsan.trainer import DSANConfig, DSANTrainer

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
ARMS = {
    "A": {"attention": False, "enhancement": None}, "B": {"enhancement": None}, "C": {"attention": False}, "D": {},
}  # fmt: skip


def drawn(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "TRAIN", 48)
        patch.setattr(sample, "TEST", 16)
        return sample.sample_words(size)


@pytest.fixture(scope="module")
def words():
    """48 words with boxes, and 16 others."""
    return drawn(Size())


@pytest.fixture(scope="module")
def wide():
    """Words of their own widths."""
    return drawn(Size(keep_ratio=True))


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        options = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "num_train_epochs": 2, "disable_tqdm": True,
            "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.01,
        }  # fmt: skip
        return DSANConfig(**{**options, **changes})

    return make


@pytest.fixture
def trainer(config, words):
    """For a new network of ``model``'s options."""

    def make(model=None, train=None, validation=None, **changes):
        torch.manual_seed(0)
        network = DSAN(**{"widths": (4, 4, 8, 8), "hidden": 4, **(model or {})})
        return DSANTrainer(network, config(**changes), train_dataset=train or words[0], validation=validation)

    return make


def trained(one, **options):
    one.train(**options)
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def different(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


def losses(one, name="loss"):
    return [row[name] for row in one.state.log_history if name in row]


class TestDeterminism:
    def test_the_same_seed_gives_the_same_bits_and_another_others(self, trainer):
        first = trained(trainer())
        assert different(first, trained(trainer())) == []
        assert "context.head.weight" in different(first, trained(trainer(seed=1)))

    def test_reading_validation_words_changes_nothing(self, trainer, words):
        one = trainer(validation=words[1], eval_strategy="epoch")
        assert different(trained(one), trained(trainer())) == []
        assert len(losses(one, "eval_accuracy")) == 2

    @pytest.mark.parametrize(
        ("model", "options"),
        [
            ({}, {}), ({"context": "attn"}, {"optimizer": "adadelta", "learning_rate": 1.0}), ({"keep_ratio": True}, {}),
            ({"enhancement": "frame"}, {"mask_weight": 1.0}),
        ],
    )  # fmt: skip
    def test_killed_and_resumed_gives_the_same_bits(self, model, options, trainer, wide):
        """The kill is after two thirds of 12 steps, in the middle of an epoch."""
        train = wide[0] if "keep_ratio" in model else None
        saved = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None, **options}
        whole = trainer(model, train, **saved)
        end = trained(whole)
        torch.manual_seed(99)
        again = trainer(model, train, **saved)
        assert different(end, trained(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-8")) == []
        assert losses(again, "grad_norm") == losses(whole, "grad_norm")

    def test_without_weight_the_second_supervision_is_as_if_it_was_not_there(self, trainer):
        """The base arm and the full one agree to the bit in all that they have in common."""
        for attention in (False, True):
            base = trained(trainer({"attention": attention, "enhancement": None}, max_steps=4))
            zero = trained(trainer({"attention": attention}, enhancement_weight=0.0, max_steps=4))
            assert different(base, zero) == []
            assert {name.split(".")[0] for name in zero.keys() - base.keys()} == {"enhancement"}


class TestLoss:
    def test_terms_are_logged(self, trainer):
        one = trainer(enhancement_weight=0.5, mask_weight=2.0, num_train_epochs=1)
        one.train()
        for total, context, enhancement, mask in zip(
            losses(one), losses(one, "context"), losses(one, "enhancement"), losses(one, "mask"), strict=True
        ):
            assert total == pytest.approx(context + 0.5 * enhancement + 2 * mask, rel=1e-3)

    def test_terms_that_an_arm_lacks_are_not(self, trainer):
        one = trainer({"enhancement": None}, num_train_epochs=1)
        one.train()
        assert losses(one) == pytest.approx(losses(one, "context"), rel=1e-3)
        assert losses(one, "enhancement") == losses(one, "mask") == []

    def test_columns_and_mask_learn_from_boxes(self, trainer):
        one = trainer({"enhancement": "frame"}, mask_weight=1.0, num_train_epochs=10)
        one.train()
        for name in ("enhancement", "mask"):
            own = losses(one, name)
            assert np.mean(own[-6:]) < 0.9 * np.mean(own[:6])

    def test_words_of_different_widths_are_learnt(self, trainer, wide):
        one = trainer({"keep_ratio": True}, wide[0], validation=wide[1], num_train_epochs=4)
        one.train()
        assert np.mean(losses(one)[-6:]) < 0.9 * np.mean(losses(one)[:6])
        assert all(0 <= accuracy <= 1 for accuracy in losses(one, "eval_accuracy"))

    def test_bfloat16(self, trainer):
        one = trainer(bf16=True, num_train_epochs=1)
        one.train()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in one.model.parameters())


class TestRealCrops:
    """Of up to three characters, which a network without augmentation learns by heart."""

    def right(self, trainer, count, steps, rate, **model):
        crops = read_data(["iiit5k"])
        crops = crops.select([i for i, label in enumerate(crops.labels) if len(label) <= 3][:count])
        crops.labels = [label.lower() for label in crops.labels]
        words = Words(crops, width=32)
        one = trainer(
            {"widths": (16, 16, 32, 64), "hidden": 64, "width": 32, "max_length": 3, **model}, words, augment=False,
            max_steps=steps, per_device_train_batch_size=min(32, count), learning_rate=rate, warmup_steps=0.5,
        )  # fmt: skip
        one.train()
        return word_accuracy([reading.text for reading in one.model.read_fitted(words.arrays())], words.labels)

    @REAL
    @pytest.mark.parametrize(("arm", "steps"), [("A", 210), ("B", 210), ("C", 170), ("D", 170)])
    def test_64_are_all_read_by_each_arm(self, arm, steps, trainer):
        assert self.right(trainer, 64, steps, 0.03, **ARMS[arm]) == 1

    @REAL
    def test_a_few_by_an_attention_decoder(self, trainer):
        assert self.right(trainer, 8, 200, 0.01, context="attn", **ARMS["A"]) == 1


def batch_of(boxes, labels, width=16, widths=None):
    images = torch.zeros(len(labels), 1, 32, width, dtype=torch.uint8)
    boxes = [np.array(own, np.float32).reshape(-1, 4) for own in boxes]
    return WordBatch(images, widths, labels, torch.arange(len(labels)), boxes)


class TestBoxes:
    """Columns and masks are 4 pixels apart, with centres at 2, 6, ..."""

    BATCH = batch_of([[[0, 8, 5, 16], [5, 8, 4, 8]], []], ["0b", "c"], widths=torch.tensor([12, 16]))

    def test_columns(self, trainer):
        one = trainer({"enhancement": "frame"})
        targets, _ = one.model.charset.encode(self.BATCH.labels)
        columns = one._columns(self.BATCH, 4, targets, torch.tensor([3, 4]))
        assert columns.tolist() == [[1, 12, 0, -100], [-100] * 4]
        overlapping = batch_of([[[0, 0, 9, 9], [5, 0, 9, 9]]], ["0b"])
        assert one._columns(overlapping, 4, targets[:2], None).tolist() == [[1, 1, 12, 0]]

    def test_mask(self, trainer):
        """Of the word whose boxes are known."""
        wanted = torch.zeros(1, 1, 8, 4)
        wanted[0, 0, 2:6, 0] = wanted[0, 0, 2:4, 1] = 1
        mask = torch.rand(2, 1, 8, 4)
        expected = torch.nn.functional.binary_cross_entropy(mask[:1], wanted)
        one = trainer(mask_weight=1.0)
        assert float(one._mask_loss(self.BATCH, mask)) == pytest.approx(float(expected))
        maps = mask.expand(2, 3, 8, 4)  # one for each channel
        assert float(one._mask_loss(self.BATCH, maps)) == pytest.approx(float(expected))

    def test_places_are_not_changed_where_boxes_matter(self, trainer):
        assert trainer().augmentation.turn > 0
        assert trainer({"enhancement": "frame"}).augmentation.turn == 0
        assert trainer(mask_weight=1.0).augmentation.turn == 0
        assert trainer({"enhancement": "frame"}, enhancement_weight=0.0).augmentation.turn > 0
        assert trainer(augment=False).augmentation is None


class TestBatches:
    def shown(self, one, monkeypatch, steps, world=1, rank=0):
        """What the network would be shown at some steps."""
        monkeypatch.setattr(DSANConfig, "process_index", property(lambda self: rank))
        monkeypatch.setattr(DSANConfig, "world_size", property(lambda self: world))
        seen = []
        one.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for step in steps:
            one.state.global_step = step
            one.compute_loss(one.model, (one.train_dataset.__getitems__(range(8)),))
        monkeypatch.undo()
        return seen

    def test_crops_change_with_step_seed_process_and_accumulated_batch(self, trainer, monkeypatch):
        first = self.shown(trainer(), monkeypatch, [3, 4])
        assert all(map(torch.equal, first, self.shown(trainer(), monkeypatch, [3, 4])))
        for seen in (
            first + self.shown(trainer(seed=1), monkeypatch, [3]),
            [image for rank in (0, 1) for image in self.shown(trainer(), monkeypatch, [3, 4], world=2, rank=rank)],
            self.shown(trainer(gradient_accumulation_steps=2), monkeypatch, [3, 3, 4, 4]),
        ):
            assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    def test_crops_of_like_width_share_a_batch_in_a_new_order_each_epoch(self, trainer, wide, monkeypatch):
        one, orders = trainer({"keep_ratio": True}, wide[0]), []
        original = one.compute_loss

        def recording(model, inputs, *rest, **more):
            orders.append(inputs[0].index.tolist())
            return original(model, inputs, *rest, **more)

        monkeypatch.setattr(one, "compute_loss", recording)
        one.train()
        for epoch in (orders[:6], orders[6:]):
            assert sorted(i for batch in epoch for i in batch) == list(range(48))
        assert orders[:6] != orders[6:]
        spread = [np.ptp(wide[0].widths[rows]) for rows in orders]
        assert np.mean(spread) < 0.5 * np.ptp(wide[0].widths)

    def test_fewer_crops_than_a_step_is_one_line(self, trainer, words):
        few = words[0].select(range(5))
        with pytest.raises(ValueError, match=r"^5 crops are fewer than the 8 of a step: give a smaller --per_device"):
            trainer(train=few)
        one = trainer(train=few, dataloader_drop_last=False, num_train_epochs=1)
        one.train()
        assert one.state.global_step == 1


class TestSchedule:
    @staticmethod
    def rates(one, steps):
        optimizer = one.create_optimizer()
        scheduler, rates = one.create_scheduler(steps, optimizer), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    def test_is_pytorchs_one_cycle(self, trainer):
        rates = self.rates(trainer(learning_rate=2.0, warmup_steps=0.1), 100)
        assert rates[0] == pytest.approx(2.0 / 25)
        assert rates[5] == pytest.approx((2.0 + 2.0 / 25) / 2)
        assert rates[10] == max(rates) == pytest.approx(2.0)
        assert rates[55] == pytest.approx(1.0, rel=1e-4)
        assert rates[99] == pytest.approx(2 * (0.5 + 0.5 * math.cos(math.pi * 89 / 90)), rel=0.02)

    def test_weights_decay_but_not_biases_and_norms(self, trainer):
        one = trainer(weight_decay=0.25)
        groups = one.create_optimizer().param_groups
        names = {id(p): name for name, p in one.model.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decay.keys() == set(names.values())
        for name, parameter in one.model.named_parameters():
            assert decay[name] == (0.25 if parameter.ndim > 1 else 0)

    def test_adadeltas_rate_is_constant(self, trainer):
        one = trainer(optimizer="adadelta", learning_rate=1.0)
        assert self.rates(one, 5) == [1.0] * 5
        assert isinstance(one.optimizer, torch.optim.Adadelta)
        assert (one.optimizer.defaults["rho"], one.optimizer.defaults["eps"]) == (0.95, 1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be adamw or adadelta; got 'sgd'"),
        ({"mask_weight": -1.0}, "mask_weight must not be negative, got -1"),
        ({"enhancement_weight": -1.0}, "weight must not be negative, got -1"),
        ({"ctc_reduction": "sum"}, "ctc_reduction must be one of mean_per_sample, torch_mean; got 'sum'"),
    ],
)
def test_wrong_options(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("model", "options", "boxes", "message"),
    [
        (
            {"enhancement": "frame"},
            {},
            None,
            "no boxes of characters, which --enhancement frame and --mask_weight need",
        ),
        ({}, {"mask_weight": 1.0}, [np.zeros((0, 4), np.float32)] * 8, "no boxes of characters"),
        ({"attention": False}, {"mask_weight": 1.0}, [np.ones((1, 4), np.float32)] * 8, "needs text attention"),
    ],
)
def test_words_or_networks_that_lack_what_a_loss_needs(model, options, boxes, message, trainer):
    words = Words.from_arrays(np.zeros((8, 1, 32, 100), np.uint8), list("abcdefgh"), boxes)
    with pytest.raises(ValueError, match=message):
        trainer(model, words, **options).train()
