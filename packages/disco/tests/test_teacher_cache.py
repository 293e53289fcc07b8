"""Fixed views, and a teacher that sees each of them once."""

import pytest
import torch
from disco.augment import Augmentation
from disco.data import Images
from disco.loss import unit
from disco.model import DisCo
from disco.teacher_cache import FixedViews
from disco.trainer import DisCoConfig, DisCoTrainer
from safetensors.torch import save_file
from tiny_vision import encoder

CPU = torch.device("cpu")
AUGMENTATION = Augmentation.moco(8)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(256, (300, 3, 10, 10), generator=generator, dtype=torch.uint8))


@pytest.fixture
def teacher():
    """With statistics that are not those of a new network."""
    network = encoder("8-16", seed=1)
    for _ in range(3):
        network(torch.randn(16, 3, 8, 8))
    return network.eval()


@pytest.fixture
def kept(images, teacher, tmp_path):
    views = FixedViews(AUGMENTATION, len(images), 3)
    views.embed(teacher, images, tmp_path / "folder" / "views.safetensors", CPU)
    return views


class TestViews:
    def test_are_the_draws_of_their_seed(self):
        views = FixedViews(AUGMENTATION, 20, 3, seed=5)
        index, view = torch.tensor([7, 0, 7]), torch.tensor([2, 0, 1])
        for row, (i, v) in enumerate(zip(index.tolist(), view.tolist(), strict=True)):
            live = AUGMENTATION.draw(20, torch.Generator().manual_seed(5 * 1_000_003 + v))
            for ours, theirs in zip(views.of(index, view), live, strict=True):
                assert torch.equal(ours[row], theirs[i])

    def test_of_an_image_do_not_depend_on_its_batch(self, images):
        views = FixedViews(AUGMENTATION, len(images), 2)

        def view_1(index):
            index = torch.tensor(index)
            return AUGMENTATION(images.__getitems__(index.tolist())["images"], views.of(index, torch.ones_like(index)))

        torch.testing.assert_close(view_1([3, 250, 9])[1], view_1([250])[0])

    def test_a_pair_is_never_one_view_twice_and_all_come_alike(self):
        views = FixedViews(AUGMENTATION, 2, 4)
        first, second = views.pair(12_000, torch.Generator().manual_seed(0))
        counts = torch.bincount(4 * first + second, minlength=16).view(4, 4)
        assert counts.diagonal().tolist() == [0] * 4
        others = counts[~torch.eye(4, dtype=torch.bool)]  # 1000 each, standard deviation 30
        assert others.min() > 850
        assert others.max() < 1150

    @pytest.mark.parametrize("views", [1, 0, -1])
    def test_are_at_least_two(self, views):
        with pytest.raises(ValueError, match=f"needs at least 2 for each image, got {views}"):
            FixedViews(AUGMENTATION, 10, views)


class TestEmbeddings:
    @pytest.mark.parametrize("bf16", [False, True])
    def test_are_those_of_the_live_teacher(self, images, teacher, tmp_path, bf16):
        views = FixedViews(AUGMENTATION, len(images), 2)
        views.embed(teacher, images, tmp_path / "views.safetensors", CPU, bf16)
        index, view = torch.tensor([299, 0, 256, 17]), torch.tensor([1, 1, 0, 0])
        pixels = AUGMENTATION(images.__getitems__(index.tolist())["images"], views.of(index, view))
        with torch.no_grad():
            live = unit(teacher(teacher.normalize(pixels)))
        found = views.teacher(index, view)
        assert views.embeddings.dtype == torch.float16
        torch.testing.assert_close(found, live, rtol=0, atol=3e-2 if bf16 else 1e-3)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4))

    def test_leave_the_teacher_in_eval_mode_as_it_was(self, images, teacher, tmp_path):
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        FixedViews(AUGMENTATION, 300, 2).embed(teacher.train(), images, tmp_path / "v.safetensors", CPU)
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_a_file_is_read_again(self, kept, images, teacher, tmp_path, monkeypatch):
        again = FixedViews(AUGMENTATION, 300, 3)
        monkeypatch.setattr(type(teacher), "forward", None)
        again.embed(teacher, images, tmp_path / "folder" / "views.safetensors", CPU)
        assert torch.equal(again.embeddings, kept.embeddings)
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["views.safetensors"]


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"views": 4}, "for views 3 of seed 0"),
            ({"seed": 1}, "for views 3 of seed 0"),
            ({"augmentation": Augmentation.crop_flip(8)}, "for views 3 of seed 0"),
            ({"images": 299}, "for images 300, now 299"),
        ],
    )
    def test_what_was_written_for_others(self, options, message, kept, images, teacher, tmp_path):
        other = FixedViews(**{"augmentation": AUGMENTATION, "images": 300, "views": 3, **options})
        part = images.select(range(options.get("images", 300)))
        with pytest.raises(ValueError, match=f"{message}.*delete it, or name another"):
            other.embed(teacher, part, tmp_path / "folder" / "views.safetensors", CPU)

    def test_another_teacher(self, kept, images, teacher, tmp_path):
        teacher.backbone(torch.zeros(1, 3, 8, 8))
        next(buffer for name, buffer in teacher.named_buffers() if "running_mean" in name).add_(1)
        with pytest.raises(ValueError, match="written for teacher"):
            FixedViews(AUGMENTATION, 300, 3).embed(teacher, images, tmp_path / "folder" / "views.safetensors", CPU)

    def test_what_is_no_such_file(self, images, teacher, tmp_path):
        path = tmp_path / "views.safetensors"
        path.write_bytes(b"no")
        with pytest.raises(ValueError, match="not a file of embeddings"):
            FixedViews(AUGMENTATION, 300, 3).embed(teacher, images, path, CPU)
        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="written for teacher None"):
            FixedViews(AUGMENTATION, 300, 3).embed(teacher, images, path, CPU)


def test_training_with_kept_embeddings_is_training_with_the_live_teacher(kept, images, teacher, tmp_path):
    losses = []
    live = FixedViews(AUGMENTATION, 300, 3)
    for views in (kept, live):
        torch.manual_seed(0)
        config = DisCoConfig(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=32, max_steps=6, learning_rate=0.3,
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        disco = DisCo(encoder(), teacher, queue_size=64, generator=torch.Generator().manual_seed(0))
        calls = []
        hook = teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = DisCoTrainer(disco, config, train_dataset=images, views=views)
        trainer.train()
        hook.remove()
        assert len(calls) == (0 if views is kept else 6)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]
