import json

import pytest
import torch
from papercore.lab.cli import parse
from peg.encode import encode_texts, encode_verb, load_embeddings, read_documents, save_embeddings
from peg.sample import sample
from safetensors import safe_open
from tiny_retrieval import word_model

VECTORS = {"a": [3.0, 0.0], "b": [0.0, 4.0], "ask": [0.0, 2.0], "tell": [-3.0, 0.0]}


@pytest.fixture
def model():
    return word_model(VECTORS)


def test_embeddings_are_of_length_1_in_the_order_given(model):
    texts = ["a", "a a a b b b b b", "b", "unknown", ""]
    embeddings = encode_texts(model, texts, side="passage", batch_size=2)
    assert (embeddings.dtype, embeddings.device.type) == (torch.float32, "cpu")
    expected = torch.tensor([[1, 0], [9 / 481**0.5, 20 / 481**0.5], [0, 1], [0, 0], [0, 0]])
    assert torch.allclose(embeddings, expected, atol=5e-3)  # where bfloat16 is fast it is used
    assert torch.allclose(embeddings[:3].norm(dim=1), torch.ones(3), atol=1e-6)


def test_each_side_has_the_prompt_that_the_model_stores(model):
    model.prompts = {"query": "ask ", "document": "tell "}
    query, passage = (encode_texts(model, ["a"], side=side)[0] for side in ("query", "passage"))
    assert torch.allclose(query, torch.tensor([3, 2]) / 13**0.5, atol=5e-3)
    assert torch.allclose(passage, torch.zeros(2), atol=5e-3)


def test_normalise_can_be_left_to_the_model(model):
    del model[1]
    assert encode_texts(model, ["b"], side="query", normalise=False).tolist() == [[0, 4]]
    assert encode_texts(model, ["b"], side="query").tolist() == [[0, 1]]


def test_no_texts(model):
    assert encode_texts(model, [], side="query").shape == (0, 2)


def test_an_embedding_that_is_not_finite_is_named():
    model = word_model({"a": [1.0], "b": [torch.nan]})
    with pytest.raises(
        ValueError, match="the model gives no finite embedding of passage 1, 'a b'; it may have diverged"
    ):
        encode_texts(model, ["a", "a b"], side="passage")


DOCUMENTS = {"x": "a", "é": "b", "z": "a b"}


def test_saved_embeddings_are_read_again(model, tmp_path):
    embeddings = encode_texts(model, list(DOCUMENTS.values()), side="passage")
    path = save_embeddings(tmp_path / "new" / "e.safetensors", embeddings, DOCUMENTS)
    assert torch.equal(load_embeddings(path, DOCUMENTS, model), embeddings)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ids"]) == ["x", "é", "z"]
    assert [file.name for file in path.parent.iterdir()] == ["e.safetensors"]


def test_embeddings_of_something_else_are_refused(model, tmp_path):
    path = save_embeddings(tmp_path / "e", encode_texts(model, list(DOCUMENTS.values()), side="passage"), DOCUMENTS)
    for others in (
        DOCUMENTS | {"z": "b a"},
        dict(list(DOCUMENTS.items())[:2]),
        {"y" + k: v for k, v in DOCUMENTS.items()},
    ):
        with pytest.raises(ValueError, match="e: embeddings of other documents; run `peg encode` on these"):
            load_embeddings(path, others, model)
    for vectors in ({"a": [0.0, 1.0], "b": [1.0, 0.0]}, {"a": [1.0], "b": [1.0]}):
        with pytest.raises(ValueError, match="e: embeddings of another model; run `peg encode` with this one"):
            load_embeddings(path, DOCUMENTS, word_model(vectors))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text: no embeddings that `peg encode` wrote"):
        load_embeddings(tmp_path / "text", DOCUMENTS, model)
    with pytest.raises(FileNotFoundError, match="none: no such file; `peg encode` writes one"):
        load_embeddings(tmp_path / "none", DOCUMENTS, model)


def test_documents_are_lines_or_a_corpus_or_the_sample(tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffone\r\n\n  zwei ü \n".encode())
    assert read_documents(str(tmp_path / "lines.txt")) == {"1": "one", "3": "zwei ü"}
    (tmp_path / "corpus.jsonl").write_text('{"_id": 1, "title": "t", "text": "x"}\n')
    assert read_documents(str(tmp_path)) == {"1": "t x"}
    assert read_documents("sample") == sample()["test"].corpus


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "f.txt: no such file or folder; expected sample, a BEIR folder or a text file"),
        (b" \n\n", "f.txt: no text; expected one document a line"),
        (b"ab\xff", r"f.txt: not UTF-8 text \(byte 2\)"),
    ],
)
def test_errors_of_documents(tmp_path, content, message):
    if content is not None:
        (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_documents(str(tmp_path / "f.txt"))


def test_the_verb(model, tmp_path, capsys):
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "lines.txt").write_text("a\nb\n")
    flags = ["--model", "model", "--data", "lines.txt", "--output_file", "e.safetensors"]
    flags = [str(tmp_path / word) if not word.startswith("--") else word for word in flags]
    encode_verb(*parse(encode_verb, flags))
    assert "e.safetensors: 2 embeddings of 2 numbers" in capsys.readouterr().out.replace("\n", "")
    assert load_embeddings(tmp_path / "e.safetensors", {"1": "a", "2": "b"}, model).shape == (2, 2)
