import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from dsan.evaluate import EvalOptions, evaluate_checkpoint
from dsan.metrics import scores
from dsan.read import SearchOptions, load_model
from dsan.words import Words
from papercore.lab.cli import App
from PIL import Image
from tiny_dsan import tiny_dsan

app = App("dsan", "test")
app.command("eval", "dsan.evaluate:evaluate_checkpoint", "test")
READ = 4  # of the words, the first, are what the network reads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_dsan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, model):
    """Crops of noise with gt.txt; the context branch has half of the words right."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(2 * READ)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (24, 60), dtype=np.uint8)).save(folder / name)
    texts = [reading.text.upper() for reading in load_model(model).read([folder / name for name in names[:READ]])]
    texts += ["it", "don't", "Caf\u00e9", "!!"]
    (folder / "gt.txt").write_text("".join(f"{n}\t{t}\n" for n, t in zip(names, texts, strict=True)), encoding="utf-8")
    return folder


def judged(model, data, capsys, search=None, **options):
    results = evaluate_checkpoint(EvalOptions(str(model), [str(data)], **options), search or SearchOptions())
    return results, " ".join(capsys.readouterr().out.split())


def test_scores_predictions_and_what_was_judged(model, data, capsys):
    results, printed = judged(model, data, capsys, decode=["ctx", "enh", "fuse"])
    assert results["ctx"]["words"] == 2 * READ
    assert results["ctx"]["accuracy"] == 0.5
    assert results["ctx"]["exact"] < 0.5
    assert "all 8 words, compared by a-z and 0-9; search greedy" in printed
    assert "1 words have nothing to compare" in printed
    record = json.loads((model / f"eval-{data.name}.json").read_text())
    assert record["scores"] == results
    truths = [row["truth"] for row in record["predictions"]]
    assert truths[READ:] == ["it", "don't", "Caf\u00e9", "!!"]
    assert [row["name"] for row in record["predictions"]] == [f"{i}.png" for i in range(2 * READ)]
    network = load_model(model)
    for branch, found in results.items():
        readings = network.read([data / f"{i}.png" for i in range(2 * READ)], decode=branch)
        assert [row[branch]["text"] for row in record["predictions"]] == [reading.text for reading in readings]
        assert found == scores([reading.text for reading in readings], truths)


def test_older_protocols_leave_words_out_and_say_so(model, data, capsys):
    results, printed = judged(model, data, capsys, min_length=3, alphanumeric=True)
    assert results["ctx"]["words"] == READ
    assert results["ctx"]["accuracy"] == 1
    assert "4 of 8 words (left out: shorter than 3, or with a character other than 0-9, a-z and A-Z)" in printed
    with pytest.raises(ValueError, match="no word to judge is left of 8"):
        judged(model, data, capsys, min_length=99)


def test_case_and_punctuation_count_if_asked_for(model, data, capsys):
    results, printed = judged(model, data, capsys, cased=True, punctuation=True)
    assert results["ctx"]["accuracy"] == results["ctx"]["exact"]
    assert "compared by all characters, case counts" in printed
    assert "have characters that the model has not" in printed


def test_a_lexicon_and_another_output(model, data, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("it\ndont\n")
    search = SearchOptions(lexicon=str(tmp_path / "words.txt"))
    _, printed = judged(model, data, capsys, search, output=str(tmp_path / "new" / "out.json"))
    assert "search lexicon" in printed
    predictions = json.loads((tmp_path / "new" / "out.json").read_text())["predictions"]
    assert {row["ctx"]["text"] for row in predictions} <= {"it", "dont"}


@pytest.mark.parametrize("keep_ratio", [False, True])
def test_the_sample(tmp_path, capsys, monkeypatch, keep_ratio):
    """Its crops are fitted already."""
    network = tiny_dsan(keep_ratio=keep_ratio)
    network.save_pretrained(tmp_path)
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (1, 32, 100 - 9 * keep_ratio * i), dtype=np.uint8) for i in range(3)]
    texts = [reading.text for reading in network.read_fitted(arrays)]
    sample = SimpleNamespace(sample_words=lambda size: (None, Words.from_arrays(arrays, texts)))
    monkeypatch.setitem(sys.modules, "dsan.sample", sample)
    results, _ = judged(tmp_path, "sample", capsys)
    assert results["ctx"]["exact"] == 1


def test_wrong_input_is_told_in_a_line(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PAPERCORE_DATA", raising=False)
    (tmp_path / "gt.txt").write_text("a.png\tword\n")
    (tmp_path / "a.png").write_bytes(b"no image")
    for flags, message in (
        (["--data", tmp_path], "a.png"),
        (["--data", tmp_path / "absent"], "absent"),
        (["--data", "iiit5k"], "set PAPERCORE_DATA"),
        (["--data", data, "--decode", "ctx", "all"], "got 'all'"),
    ):
        assert app(["eval", "--model", str(model), *map(str, flags)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
