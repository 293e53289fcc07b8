"""Every method's ``train`` under torchrun, from the command line: two processes train one model, each on rows of its own.

Run by torchrun, this file is each of the two. It gives the commands one after the other, since imports take longer than they do.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.lab.training import OneBar
from PIL import Image
from safetensors.torch import load_file
from sinkd.models import from_scratch
from sinkd.sample import train_tokenizer
from sinkd.tasks import generic
from torch.testing import assert_close
from transformers import Trainer

BATCH = 4
# Nothing is drawn for a batch, and no Adam, whose steps have full length where gradients are only noise.
EXACT = ["--optim", "sgd", "--learning_rate", "0.5", "--max_grad_norm", "0", "--lr_scheduler_type", "constant"]
COMMANDS = {
    "eclstm": ["--every", "20"],
    "sinkd": ["--data", "texts.csv", "--teacher", "bert", "--student", "bert", "--gather", "true", "--beta", "1", *EXACT],
    "softclip": ["--data", "pairs.csv", "--csv_separator", ",", "--clip", "tiny-vit", "--tags_field", "tags", "--roi",
                 "thumbnails", "--crop", "1", *EXACT],
    "mmict": ["--max_train", "96", "--max_test", "4", "--compare", "false"],
    "iqa-distill": [],
    "peg": ["--data", "rows.jsonl", "--model", "static:16", "--hard_negatives", "2", "--hardness_start", "2",
            "--micro_batch_tokens", "40", "--own_sources", "a", *EXACT],
    "disco": ["--compare", "false", "--fixed_views", "2"],
    "dsan": ["--data", "words", "--validation", "0"],
}  # fmt: skip
AS_ONE = ["sinkd", "softclip", "peg"]  # their losses compare the rows of all processes with each other
WORDS = np.array(["red", "blue", "green", "round", "square", "small", "large", "old", "new", "fast"])


def write_data():
    """Little ones, where the sample takes long or is drawn anew for each batch; in the working directory."""
    rng = np.random.default_rng(0)
    Path("words").mkdir()
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (32, 100), dtype=np.uint8)).save(f"words/{i}.png")
    names = [" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(32)]
    Path("words/gt.txt").write_text("".join(f"{i}.png\t{name.split()[0]}\n" for i, name in enumerate(names)))
    tokenizer = train_tokenizer(names)
    bert = from_scratch("encoder", generic("texts", ("0", "1", "2")), tokenizer, 16, 1)
    bert.config.hidden_dropout_prob = bert.config.attention_probs_dropout_prob = 0.0
    bert.classifier.weight.data *= 100  # a teacher with opinions
    bert.save_pretrained("bert")
    tokenizer.save_pretrained("bert")
    Path("texts.csv").write_text("text,label\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    rows = [f"words/{i}.png,{name},{name.replace(' ', ';')}\n" for i, name in enumerate(names)]
    Path("pairs.csv").write_text("filepath,title,tags\n" + "".join(rows))
    rows = [
        {"query": name, "pos": [f"the {name} one"], "neg": names[i + 1 : i + 1 + i % 4], "source": "ab"[i % 2]}
        for i, name in enumerate(names)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(name, batch):
    short = ["--max_steps", "2", "--per_device_train_batch_size", str(batch), "--output_dir", f"{batch}/{name}"]
    return ["train", "--use_cpu", "true", *short, *COMMANDS[name]]


def work(rank):
    """Run all commands; leave what each printed, its exit code, and of each training the batches and the weights in the end."""
    trainings = []
    step, train = Trainer.training_step, OneBar.train

    def noted_step(self, model, inputs, *args, **kwargs):
        trainings[-1]["batches"].append(hashlib.sha256(pickle.dumps(inputs)).hexdigest())
        return step(self, model, inputs, *args, **kwargs)

    def noted_train(self, *args, **kwargs):
        trainings.append({"trainer": type(self).__name__, "batches": []})
        result = train(self, *args, **kwargs)
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.model.parameters()))
        trainings[-1] |= {"weights": weights.hexdigest(), "step": self.state.global_step}
        return result

    Trainer.training_step, OneBar.train = noted_step, noted_train
    for name in COMMANDS:
        trainings.clear()
        sys.argv = [name, *command(name, BATCH)]
        with open(f"{name}-{rank}.out", "w") as out, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            runpy.run_module(f"{name.replace('-', '_')}.cli", run_name="__main__")
        Path(f"{name}-{rank}.json").write_text(json.dumps({"code": end.value.code, "trainings": trainings}))


def test_two_processes_train_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {k: v for k, v in os.environ.items() if k != "PAPERCORE_DATA"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    for name in COMMANDS:
        folder = Path(f"{BATCH}/{name}")
        first, second = (json.loads(Path(f"{name}-{rank}.json").read_text()) for rank in range(2))
        assert (first["code"], second["code"]) == (0, 0), done.stderr
        assert len(first["trainings"]) == len(second["trainings"]) >= 1
        for own, others in zip(first["trainings"], second["trainings"], strict=True):
            assert own["weights"] == others["weights"], (name, own["trainer"])
            assert len(own["batches"]) == len(others["batches"]) == own["step"] == others["step"]
            assert not set(own["batches"]) & set(others["batches"]), (name, own["trainer"])
        assert str(folder) in Path(f"{name}-0.out").read_text()
        said = Path(f"{name}-1.out").read_text()
        assert said.replace("Loading weights from local directory\n", "") == "", name  # which a library says
        assert len(list(folder.glob("checkpoint-*"))) == 1
    for name in AS_ONE:
        app = importlib.import_module(f"{name}.cli").app
        assert app(command(name, 2 * BATCH)) == 0
        two, one = ({p.relative_to(f"{b}/{name}"): load_file(p) for p in Path(f"{b}/{name}").glob("**/*.safetensors")}
                    for b in (BATCH, 2 * BATCH))  # fmt: skip
        assert_close(two, one, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(int(os.environ["RANK"]))
    torch.distributed.barrier()  # so that neither leaves while the other is talking
    torch.distributed.destroy_process_group()
