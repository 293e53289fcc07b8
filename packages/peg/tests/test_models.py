import numpy as np
import pytest
import torch
from peg.models import load_model, new_model, static_model
from peg.sample import train_tokenizer
from sentence_transformers import SentenceTransformer
from tiny_training import CORPUS, QUERIES, same, weights
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

TEXTS = [*QUERIES, *CORPUS]


@pytest.fixture
def plain(tmp_path):
    """A folder as transformers writes it, without a pooling."""
    tokenizer = train_tokenizer(TEXTS)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    BertModel(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


@pytest.mark.parametrize("name", ["static:24", "scratch:24x1", "scratch:64x2"])
def test_new_models_train_and_are_loaded_again(name, tmp_path):
    model = new_model(name, TEXTS)
    assert model.get_embedding_dimension() == int(name.split(":")[1].split("x")[0])
    before = weights(model)
    output = model(model.preprocess(CORPUS[:4]))["sentence_embedding"]
    torch.testing.assert_close(output.norm(dim=1), torch.ones(4))
    output[:, 0].sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert not same(weights(model), before)
    model.save_pretrained(str(tmp_path / "model"))
    again = load_model(str(tmp_path / "model"))
    assert same(weights(again), weights(model))
    assert np.array_equal(again.encode(CORPUS), model.eval().encode(CORPUS))


def test_sizes_of_a_new_encoder():
    model = new_model("scratch:64x3", TEXTS)
    config = model[0].auto_model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    tokens = model.preprocess(["open the file"])
    with torch.no_grad():
        states = model.eval()[0].auto_model(tokens["input_ids"]).last_hidden_state
    mean = torch.nn.functional.normalize(states.mean(1), dim=1)
    torch.testing.assert_close(model(tokens)["sentence_embedding"], mean)


def test_new_models_say_nothing_of_missing_weights(caplog):
    new_model("scratch:32x1", TEXTS)
    assert "MISSING" not in caplog.text


@pytest.mark.parametrize("name", ["static:24", "scratch:32x1"])
def test_the_seed_makes_the_weights(name):
    torch.manual_seed(3)
    first = weights(new_model(name, TEXTS))
    other = weights(new_model(name, TEXTS))
    torch.manual_seed(3)
    assert same(weights(new_model(name, TEXTS)), first)
    assert not same(other, first)


def test_rows_of_a_static_table_have_about_length_1():
    norms = new_model("static:256", TEXTS)[0].embedding.weight.norm(dim=1)
    assert norms.mean().item() == pytest.approx(1, abs=0.05)


def test_a_static_model_of_given_vectors():
    tokenizer = train_tokenizer(TEXTS).backend_tokenizer
    table = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 6)).astype(np.float32)
    model = static_model(tokenizer, 6, table)
    vector = table[tokenizer.encode("open the file", add_special_tokens=False).ids].mean(0)
    assert model.encode("open the file") == pytest.approx(vector / np.linalg.norm(vector), abs=1e-6)


@pytest.mark.parametrize("name", ["bert-base", "folder/model", "statics:3", "8"])
def test_other_names_are_not_new_models(name):
    assert new_model(name, TEXTS) is None


@pytest.mark.parametrize(
    "name", ["static:", "static", "static:0", "static:3x2", "scratch:64", "scratch:64x0", "scratch:x2", "scratch:64x2 "]
)
def test_new_models_without_a_size(name):
    with pytest.raises(ValueError, match=f"{name}: a new model is named static:WIDTH or scratch:WIDTHxLAYERS, such as"):
        new_model(name, TEXTS)


class TestPlainModels:
    texts = ("open the file", "close", "raise an error and open the file")

    def states(self, folder):
        tokens = AutoTokenizer.from_pretrained(folder)(list(self.texts), padding=True, return_tensors="pt")
        with torch.no_grad():
            return AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state, tokens["attention_mask"]

    @pytest.mark.parametrize("pooling", [None, "cls", "mean", "last"])
    def test_pooling(self, plain, pooling):
        states, mask = self.states(plain)
        assert not mask.all()
        expected = {
            "cls": states[:, 0],
            "mean": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
            "last": states[torch.arange(3), mask.sum(1) - 1],
        }[pooling or "cls"]
        embeddings = load_model(plain, pooling).encode(list(self.texts), convert_to_tensor=True)
        torch.testing.assert_close(embeddings, torch.nn.functional.normalize(expected, dim=1))

    def test_saved_it_keeps_its_pooling(self, plain, tmp_path):
        model = load_model(plain, "mean")
        model.save_pretrained(str(tmp_path / "model"))
        again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
        assert np.array_equal(again.encode(CORPUS), model.encode(CORPUS))

    def test_unknown_pooling(self, plain):
        with pytest.raises(ValueError, match="pooling must be one of cls, mean, last; got 'max'"):
            load_model(plain, "max")


def test_a_pooling_for_a_model_that_has_one(tmp_path):
    folder = str(tmp_path / "model")
    new_model("static:8", TEXTS).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is a SentenceTransformer with a pooling of its own: leave out --pooling"):
        load_model(folder, "cls")


def test_no_such_folder(tmp_path):
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "none"), "./none", "a/b/c", str(tmp_path / "file")):
        with pytest.raises(
            FileNotFoundError, match="no such folder; expected a model that `peg train` wrote, or a Hub name"
        ):
            load_model(name)
