import json
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from papercore.lab.training import ModuleTrainer, resumable
from torch import nn
from transformers import TrainingArguments


@dataclass
class Options:
    width: int = 3
    names: tuple[str, ...] = ("a", "b")


def checkpoint(folder, step, state='{"epoch": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return str(path)


class TestResumable:
    def test_starts_where_there_is_nothing_and_records_the_options(self, tmp_path):
        folder = tmp_path / "new"
        assert resumable(folder, Options(), TrainingArguments(str(folder), learning_rate=0.5)) is None
        record = json.loads((folder / "options.json").read_text())
        assert record["width"] == 3
        assert record["names"] == ["a", "b"]
        assert record["learning_rate"] == 0.5
        assert "output_dir" not in record

    def test_picks_the_newest_checkpoint_by_number(self, tmp_path):
        checkpoint(tmp_path, 9), checkpoint(tmp_path, 80)
        newest = checkpoint(tmp_path, 100)
        assert resumable(tmp_path, Options()) == newest

    @pytest.mark.parametrize("state", [None, "", '{"epoch": 1, "log'])
    def test_passes_over_half_written_checkpoints(self, tmp_path, state):
        complete = checkpoint(tmp_path, 10)
        checkpoint(tmp_path, 20, state)
        assert resumable(tmp_path, Options()) == complete

    def test_all_half_written_is_nothing(self, tmp_path):
        checkpoint(tmp_path, 20, None)
        assert resumable(tmp_path, Options()) is None

    def test_the_same_options_go_on(self, tmp_path):
        arguments = TrainingArguments(str(tmp_path), num_train_epochs=2)
        resumable(tmp_path, Options(), arguments)
        complete = checkpoint(tmp_path, 10)
        again = TrainingArguments(
            str(tmp_path), num_train_epochs=2, disable_tqdm=True
        )  # how it shows itself may change
        assert resumable(tmp_path, Options(), again) == complete

    def test_other_options_are_refused_by_name(self, tmp_path):
        resumable(tmp_path, Options())
        checkpoint(tmp_path, 10)
        with pytest.raises(
            ValueError, match="holds a run with width 3, now 4: give another --output_dir, or delete that folder"
        ):
            resumable(tmp_path, Options(width=4))

    def test_an_option_that_may_change_may_change(self, tmp_path):
        resumable(tmp_path, Options(), may_change=("width",))
        complete = checkpoint(tmp_path, 10)
        assert resumable(tmp_path, Options(width=4), may_change=("width",)) == complete

    def test_a_run_that_never_began_is_replaced(self, tmp_path):
        resumable(tmp_path, Options())
        assert resumable(tmp_path, Options(width=4)) is None
        assert json.loads((tmp_path / "options.json").read_text())["width"] == 4


class Line(nn.Module, PyTorchModelHubMixin):
    def __init__(self, inputs: int = 2):
        super().__init__()
        self.weight = nn.Linear(inputs, 1)

    def forward(self, x, labels):
        return {"loss": (self.weight(x).squeeze(1) - labels).square().mean()}


class Batches(torch.utils.data.Dataset):
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 32

    def __getitems__(self, indices):
        x = self.x[torch.as_tensor(indices)]
        return {"x": x, "labels": x @ torch.tensor([2.0, -1.0])}


class TestModuleTrainer:
    def train(self, folder, **options):
        torch.manual_seed(0)
        options = {
            "per_device_train_batch_size": 8,
            "learning_rate": 0.1,
            "num_train_epochs": 3,
            "report_to": "none",
            "save_strategy": "epoch",
            **options,
        }
        arguments = TrainingArguments(str(folder), logging_steps=1, use_cpu=True, **options)
        trainer = ModuleTrainer(model=Line(), args=arguments, train_dataset=Batches())
        trainer.train()
        return trainer

    def test_whole_batches_of_the_data_set_reach_the_model(self, tmp_path):
        trainer = self.train(tmp_path, num_train_epochs=30)
        torch.testing.assert_close(trainer.model.weight.weight.data, torch.tensor([[2.0, -1.0]]), rtol=0, atol=0.1)

    def test_checkpoints_are_what_from_pretrained_reads(self, tmp_path):
        trainer = self.train(tmp_path)
        folder = tmp_path / "checkpoint-12"
        assert {"config.json", "model.safetensors", "trainer_state.json"} <= {p.name for p in folder.iterdir()}
        torch.testing.assert_close(Line.from_pretrained(folder).weight.weight, trainer.model.weight.weight)

    def test_one_progress_bar_with_loss_and_nothing_else(self, tmp_path, capsys):
        self.train(tmp_path)
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.replace("\r", "\n").strip().splitlines()
        assert all(line.startswith("train:") for line in lines if line.strip())
        assert "12/12" in lines[-1]
        assert "loss=" in lines[-1]

    def test_disable_tqdm_prints_nothing(self, tmp_path, capsys):
        self.train(tmp_path, disable_tqdm=True)
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out == ""

    @pytest.mark.parametrize("steps", [4, 6])  # the end of an epoch, and within one
    def test_a_finished_run_stays_as_it_is(self, tmp_path, steps):
        first = self.train(tmp_path, max_steps=steps, save_strategy="steps", save_steps=steps)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=0.1,
            report_to="none",
            use_cpu=True,
        )
        again = ModuleTrainer(model=Line(), args=arguments, train_dataset=Batches())
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        assert again.state.global_step == steps
        assert torch.equal(again.model.weight.weight, first.model.weight.weight)

    def test_parts_of_a_loss_are_logged_as_means(self, tmp_path):
        trainer = self.train(tmp_path, max_steps=1)
        for value in (1.0, 3.0):
            trainer.note(soft=torch.tensor(value), lacking=torch.tensor(0.0))
        logs = {"loss": 0.5}
        trainer.log(logs)
        assert logs["soft"] == 2
        assert "lacking" not in logs
        assert trainer.terms == {}

    def test_a_batch_draws_by_seed_step_and_place_in_the_step(self, tmp_path):
        one, other = self.train(tmp_path / "a", max_steps=2), self.train(tmp_path / "b", max_steps=2)
        first, second = (one.batch_generator().initial_seed() for _ in range(2))
        assert first != second
        assert other.batch_generator().initial_seed() == first
        one.state.global_step = 7
        assert one.batch_generator().initial_seed() not in (first, second)
