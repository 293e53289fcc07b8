import json
import re
import signal

import datasets
import peg.train
import pytest
from peg.cli import app
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_training import CORPUS, QUERIES, same

QUICK = [
    "--model",
    "static:16",
    "--num_train_epochs",
    "3",
    "--per_device_train_batch_size",
    "6",
    "--hard_negatives",
    "2",
]
MINE = ["--mine_ranks", "0", "12"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the datasets library puts what it reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """12 queries to train on, 8 to judge on, each with its own document of 20."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(CORPUS)])
    write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)])
    for split, numbers in (("train", range(12)), ("test", range(12, 20))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in numbers)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(
        path,
        [
            {"query": q, "pos": [p], "neg": [CORPUS[i - 2]]}
            for i, (q, p) in enumerate(zip(QUERIES, CORPUS, strict=True))
        ],
    )
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder, *flags):
    return app(["train", *QUICK, "--output_dir", str(folder), *map(str, flags)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, beir):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder, "--data", beir, *MINE) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


class TestBeirFolder:
    def test_files(self, trained):
        metrics = read(trained / "metrics.json")
        assert list(metrics) == ["before", "after"]
        assert all(0 <= value <= 1 for m in metrics.values() for value in m.values())
        assert metrics["before"] == read(trained / "before.json")
        assert metrics["after"] != metrics["before"]
        assert (trained / "training.png").stat().st_size > 10_000
        steps = [row for row in read(trained / "history.json") if "loss" in row]
        assert steps[0]["hardness"] == 0 < steps[-1]["hardness"]
        assert len(SentenceTransformer(str(trained), device="cpu").encode("open the file")) == 16

    def test_negatives_are_mined_by_query_and_are_no_positives(self, trained):
        negatives = read(trained / "negatives.json")
        assert set(negatives) == {f"q{i}" for i in range(12)}
        assert all(len(found) == len(set(found)) == 2 for found in negatives.values())
        assert not [q for q, found in negatives.items() if q.replace("q", "d") in found]

    def test_eval_reads_the_model_and_finds_the_same(self, trained, beir, tmp_path):
        flags = ["--model", str(trained), "--data", str(beir), "--output_dir", str(tmp_path)]
        assert app(["eval", *flags]) == 0
        (again,) = read(tmp_path / "metrics.json")["metrics"].values()
        for name, value in read(trained / "metrics.json")["after"].items():
            assert again[name] == pytest.approx(value, abs=1e-6)

    def test_the_same_command_goes_on_and_computes_nothing_again(self, trained, beir, monkeypatch, capsys):
        def never(*args, **kwargs):
            raise AssertionError("mined again")

        monkeypatch.setattr(peg.train, "mine_hard_negatives", never)
        before = load_file(trained / "model.safetensors")
        files = {name: (trained / f"{name}.json").read_bytes() for name in ("before", "metrics")}
        (trained / "before.json").write_text(json.dumps(read(trained / "before.json") | {"MRR@10": 0.125}))
        assert train(trained, "--data", beir, *MINE) == 0
        assert same(before, load_file(trained / "model.safetensors"))
        assert read(trained / "metrics.json")["before"]["MRR@10"] == 0.125
        assert "0.1250" in capsys.readouterr().out
        for name in ("before", "metrics"):
            (trained / f"{name}.json").write_bytes(files[name])

    def test_another_command_is_refused(self, trained, beir, capsys):
        assert train(trained, "--data", beir, *MINE, "--temperature", "0.5") == 2
        assert re.search("temperature .*, now 0.5: give another --output_dir", capsys.readouterr().err)

    def test_example_searches(self, beir, tmp_path, capsys):
        """Of three test queries; a star marks the relevant document."""
        assert train(tmp_path / "run", "--data", beir, "--mine", "False", "--num_train_epochs", "20") == 0
        assert not (tmp_path / "run" / "negatives.json").exists()
        _, *tables = re.split("^(how to .*)$", capsys.readouterr().out, flags=re.MULTILINE)
        assert len(set(tables[::2]) & set(QUERIES[12:])) == 3
        for query, table in zip(tables[::2], tables[1::2], strict=True):
            number = QUERIES.index(query)
            lines = [line for line in table.splitlines() if re.search(r"\bd\d+\b", line)]
            assert len(lines) >= 3
            assert [line for line in lines if f"d{number} " in line] == [line for line in lines if "*" in line] != []

    def test_searches_of_ones_own(self, beir, tmp_path, capsys):
        flags = ["--data", beir, "--mine", "False", "--queries", "where is the socket", "and its path"]
        assert train(tmp_path / "run", *flags) == 0
        out = capsys.readouterr().out
        assert out.count("cosine") == 2
        assert "where is the socket" in out
        assert QUERIES[12] not in out


class TestRows:
    def test_a_file_of_rows(self, jsonl, tmp_path, capsys):
        assert train(tmp_path / "run", "--data", jsonl) == 0
        files = {path.name for path in (tmp_path / "run").iterdir()}
        assert {"model.safetensors", "history.json", "training.png", "options.json"} <= files
        assert not {"before.json", "metrics.json", "negatives.json"} & files
        assert "model" in capsys.readouterr().out

    def test_judged_on_other_data_in_a_folder_named_after_the_rows(self, jsonl, beir, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert app(["train", *QUICK, "--data", str(jsonl), "--test_data", str(beir)]) == 0
        assert list(read(tmp_path / "runs" / "peg-pairs" / "metrics.json")) == ["before", "after"]

    def test_rows_without_negatives(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        write(path, [{"query": q, "pos": [p]} for q, p in zip(QUERIES, CORPUS, strict=True)])
        assert train(tmp_path / "run", "--data", path) == 0
        steps = [row for row in read(tmp_path / "run" / "history.json") if "masked" in row]
        assert all(row["effective_negatives"] <= 5 for row in steps)  # of a batch of 6


class TestDryRun:
    @pytest.mark.parametrize("kind", ["beir", "rows"])
    def test_it_shows_a_table_and_writes_nothing(self, kind, jsonl, beir, tmp_path, capsys):
        flags = ["--data", {"beir": beir, "rows": jsonl}[kind], "--model", "scratch:32x1", "--dry_run"]
        assert train(tmp_path / "run", *flags) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "memory of a step, 6 queries" in out
        assert "measured: one micro-batch of" in out
        assert not (tmp_path / "run").exists()


def test_a_new_model_gets_a_recipe_of_its_own_where_defaults_stand(jsonl, tmp_path):
    flags = ["train", "--data", str(jsonl), "--hard_negatives", "1", "--output_dir"]
    assert app([*flags, str(tmp_path / "new"), "--model", "static:8", "--num_train_epochs", "2"]) == 0
    options = read(tmp_path / "new" / "options.json")
    assert (options["learning_rate"], options["num_train_epochs"]) == (5e-3, 2)
    assert app([*flags, str(tmp_path / "old"), "--model", str(tmp_path / "new"), "--num_train_epochs", "1"]) == 0
    assert read(tmp_path / "old" / "options.json")["learning_rate"] == 5e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "static:0"], "static:0: a new model is named static:WIDTH"),
        (["--model", "./none"], "./none: no such folder"),
        (["--mine_ranks", "3"], "mine_ranks are two numbers, from and below; got [3]"),
        (["--split", "dev"], "dev"),
        (["--test_split", "dev"], "dev"),
        (["--target_negatives", "90"], "target_negatives 90 needs 30 queries in a step, the data has 12"),
        (["--own_sources", "web"], "no source 'web' in the data"),
    ],
)
def test_wrong_input_is_one_line(flags, message, beir, tmp_path, capsys):
    assert train(tmp_path / "run", "--data", beir, "--mine", "False", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


def test_a_model_must_be_named(jsonl, tmp_path, capsys):
    assert app(["train", "--data", str(jsonl), "--output_dir", str(tmp_path / "run")]) == 2
    assert "give --model: a folder, a Hub name, static:WIDTH or scratch:WIDTHxLAYERS" in capsys.readouterr().err


def test_killed_in_training_the_same_command_ends_as_if_it_had_not_been(beir, launch, tmp_path):
    flags = ["--data", beir, *MINE, "--num_train_epochs", 15, "--save_strategy", "steps", "--save_steps", 2]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    running = launch("peg.cli", ["train", *QUICK, "--output_dir", killed, *flags])
    code, _ = running.wait_for(killed, "checkpoint-*").end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    for folder in (killed, whole):
        assert train(folder, *flags) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("negatives.json", "metrics.json"):
        assert read(killed / name) == read(whole / name)
