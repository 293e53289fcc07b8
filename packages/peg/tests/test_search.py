import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.lab.cli import parse
from papercore.ops.device import peak_memory
from peg.encode import encode_texts, save_embeddings
from peg.search import search_verb, top_k
from tiny_retrieval import cosine_model


def literal(queries, documents, k):
    """A stable sort of all scores."""
    order = (queries.double() @ documents.double().T).sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def whole_numbers(n, m, d, seed, largest=1):
    """Small whole numbers: products are exact, and most scores are tied."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (n, d), (m, d)
    return [torch.randint(-largest, largest + 1, size, generator=generator).float() for size in sizes]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 60), d=st.integers(1, 4), k=st.integers(1, 70),
    memory=st.sampled_from([1, 3_000, 100_000, 2**28]), seed=st.integers(0, 99),
)  # fmt: skip
def test_exact_and_ties_by_document_order(n, m, d, k, memory, seed):
    queries, documents = whole_numbers(n, m, d, seed)
    scores, indices = top_k(queries, documents, k, memory=memory)
    expected_scores, expected = literal(queries, documents, k)
    assert torch.equal(indices, expected)
    assert torch.equal(scores.double(), expected_scores + 0.0)
    assert indices.shape == (n, min(k, m))


def test_real_numbers_of_both_signs_and_half_precision():
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(size, generator=generator) for size in ((50, 16), (3000, 16)))
    scores, indices = top_k(queries, documents, 40)
    assert torch.equal(indices, literal(queries, documents, 40)[1])
    assert torch.allclose(scores, (queries[:, None] * documents[indices]).sum(2), atol=1e-5)
    worst = top_k(queries, documents, 3000)[0]
    assert worst.min() < -5
    assert bool((worst.diff(dim=1) <= 0).all())
    half = top_k(queries.bfloat16(), documents.bfloat16(), 5)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[1], literal(queries.bfloat16(), documents.bfloat16(), 5)[1])


def test_equal_documents_come_in_their_order_wherever_blocks_end():
    documents = torch.zeros(1000, 3)
    documents[[999, 700, 5, 6, 300]] = torch.tensor([1.0, -0.0, 0.0])
    scores, indices = top_k(torch.tensor([[2.0, 1, -1], [0, 0, 0]]), documents, 7, memory=50_000)
    assert indices.tolist() == [[5, 6, 300, 700, 999, 0, 1], list(range(7))]
    assert scores[0].tolist() == [2.0] * 5 + [0.0] * 2


@pytest.mark.parametrize("tied", [1, 3, 600])
def test_memory_is_bounded_even_where_all_scores_are_equal(tied):
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(size, generator=generator) for size in ((512, 16), (8000, 16)))
    queries[::tied] = 0
    budget = 4 * 2**20  # all scores would take 16 MB
    with peak_memory() as peak:
        top_k(queries, documents, 10, memory=budget)
    assert peak.bytes < budget + 512 * 10 * (4 + 8)


def test_no_queries():
    scores, indices = top_k(torch.zeros(0, 3), torch.zeros(5, 3), 2)
    assert (scores.shape, indices.shape, indices.dtype) == ((0, 2), (0, 2), torch.int64)


def test_faiss_finds_the_same(monkeypatch):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(size, generator=generator) for size in ((9, 16), (300, 16)))
    ours, theirs = (top_k(queries, documents, 7, backend=backend) for backend in ("torch", "faiss"))
    assert torch.equal(ours[1], theirs[1])
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


def test_faiss_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"the backend faiss needs the library: pip install 'peg\[faiss\]'"):
        top_k(torch.zeros(1, 2), torch.zeros(1, 2), 1, backend="faiss")


@pytest.mark.parametrize(
    ("queries", "documents", "k", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 2), 0, "k must be at least 1, got 0"),
        (
            torch.zeros(1, 2),
            torch.zeros(1, 3),
            1,
            r"queries \(1, 2\) and documents \(1, 3\) must be matrices of the same",
        ),
        (torch.zeros(2), torch.zeros(1, 2), 1, r"queries \(2,\) and documents"),
        (torch.zeros(1, 2), torch.zeros(0, 2), 1, "there are no documents to search in"),
        (torch.tensor([[0.0, 1], [torch.inf, 0]]), torch.zeros(1, 2), 1, "queries, row 1: a value is not finite"),
        (torch.zeros(1, 2), torch.tensor([[0.0, torch.nan]]), 1, "documents, row 0: a value is not finite"),
    ],
)
def test_errors(queries, documents, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(queries, documents, k)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be torch or faiss, got 'annoy'"):
        top_k(torch.zeros(1, 2), torch.zeros(1, 2), 1, backend="annoy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    queries, documents = (part.cuda() for part in whole_numbers(40, 2000, 4, 0))
    scores, indices = top_k(queries, documents, 30, memory=300_000)
    assert torch.equal(indices.cpu(), literal(queries.cpu(), documents.cpu(), 30)[1])
    assert scores.is_cuda


@pytest.fixture
def folder(tmp_path):
    """A model, and a text file to search in."""
    model = cosine_model({"far": -0.5, "near": 0.9, "[middle]": 0.2})
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("far\n\n[middle]\nnear\n")
    return tmp_path, model


def search(*flags):
    return search_verb(*parse(search_verb, [str(word) for word in flags]))


def test_the_verb_shows_the_best_documents(folder, capsys):
    path, _ = folder
    flags = ["--model", path / "model", "--data", path / "texts.txt"]
    assert search("query", "far", *flags, "--k", 2) == [["4", "3"], ["1", "3"]]
    out = capsys.readouterr().out
    assert "0.9000" in out
    assert "[middle]" in out  # brackets are text here, not markup


def test_the_verb_takes_embeddings_of_the_same_documents_and_model_alone(folder, tmp_path):
    path, model = folder
    documents = {"1": "far", "3": "[middle]", "4": "near"}
    saved = encode_texts(model, list(documents.values()), side="passage")
    save_embeddings(tmp_path / "e.safetensors", saved, documents)
    flags = [
        "query",
        "--model",
        path / "model",
        "--data",
        path / "texts.txt",
        "--embeddings",
        tmp_path / "e.safetensors",
    ]
    assert search(*flags) == [["4", "3", "1"]]
    (path / "texts.txt").write_text("far\n\n[middle]\nNear\n")
    with pytest.raises(ValueError, match=r"e.safetensors: embeddings of other documents; run `peg encode` on these"):
        search(*flags)


def test_the_verb_needs_a_query(folder):
    with pytest.raises(ValueError, match="queries"):
        search("--model", folder[0] / "model")
