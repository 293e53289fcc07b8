import json

import pytest
from papercore.lab.cli import parse
from peg.data import RetrievalData
from peg.evaluate import evaluate, evaluate_verb, model_run, read_split
from peg.sample import sample
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny_retrieval import cosine_model, one_query, random_set


def test_documents_are_ranked_by_cosine_and_equal_ones_by_place():
    cosines = {"far": -0.9, "near": 0.9, "twin": 0.3, "double": 0.3}
    data = one_query(cosines, ["twin"])
    assert model_run(cosine_model(cosines), data) == {"q": ["near", "twin", "double", "far"]}
    result = evaluate(cosine_model(cosines), data, ks=[1, 3])
    assert (result.mean["MRR@3"], result.mean["MRR@1"]) == (0.5, 0)


def test_equal_to_sentence_transformers_evaluator():
    model, data = random_set()
    binary = {q: {d: int(gain > 0) for d, gain in gains.items()} for q, gains in data.qrels.items()}
    ours = evaluate(model, RetrievalData(data.queries, data.corpus, binary), ks=[10], batch_size=7).mean
    relevant = {q: {d for d, gain in gains.items() if gain} for q, gains in binary.items()}
    evaluator = InformationRetrievalEvaluator(
        data.queries, data.corpus, relevant, mrr_at_k=[10], ndcg_at_k=[10], precision_recall_at_k=[10], map_at_k=[10],
        write_csv=False,
    )  # fmt: skip
    theirs = evaluator(model)
    for name, key in (("nDCG", "ndcg"), ("MRR", "mrr"), ("Recall", "recall"), ("MAP", "map")):
        assert ours[f"{name}@10"] == pytest.approx(theirs[f"cosine_{key}@10"], abs=1e-9)


def test_splits_of_the_sample_and_of_folders(tmp_path):
    assert read_split("sample", "dev") == sample()["dev"]
    with pytest.raises(ValueError, match="the sample has no split 'trial'; it has train, dev, test"):
        read_split("sample", "trial")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_split(str(tmp_path / "none"), "test")


@pytest.fixture
def folder(tmp_path):
    """A model and a BEIR folder: one query that can be answered, one that cannot."""
    cosine_model({"far": -0.9, "near": 0.9}).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    (tmp_path / "set" / "corpus.jsonl").write_text('{"_id": "1", "text": "near"}\n{"_id": "2", "text": "far query"}\n')
    (tmp_path / "set" / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n{"_id": "r", "text": "near"}\n')
    (tmp_path / "set" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\t2\t1\nr\t1\t0\n")
    return tmp_path


def judge(*flags):
    return evaluate_verb(*parse(evaluate_verb, [str(word) for word in flags]))


def test_the_verb_prints_a_table_and_writes_it(folder, capsys):
    flags = ["--data", folder / "set", "--split", "dev", "--bm25", "--model", folder / "model"]
    results = judge(*flags)
    assert [result.mean["MRR@10"] for result in results.values()] == [1.0, 0.5]
    out = " ".join(capsys.readouterr().out.split())
    assert "dev: 1 queries, 2 documents; 1 more without a relevant document left out" in out
    assert "nDCG@10" in out
    assert "0.6309" in out
    saved = folder / "model" / "eval-set-dev"
    record = json.loads((saved / "metrics.json").read_text())
    assert (record["queries"], record["dropped"], record["split"]) == (1, 1, "dev")
    assert record["metrics"]["BM25"]["MRR@10"] == 1.0
    assert json.loads((saved / "per_query.json").read_text())["BM25"]["Recall@10"] == {"q": 1.0}


def test_the_verb_judges_bm25_alone(folder):
    results = judge("--data", folder / "set", "--split", "dev", "--bm25", "--output_dir", folder / "out")
    assert list(results) == ["BM25"]
    assert (folder / "out" / "metrics.json").is_file()
    with pytest.raises(ValueError, match="nothing to judge: give --model, --bm25, or both"):
        judge("--data", folder / "set")
