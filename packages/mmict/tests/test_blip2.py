import pytest
import torch
from mmict.blip2 import from_blip2
from mmict.lm import load_lm, untied_t5
from mmict.vision import fingerprint, load_vision
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8, "layer_norm_eps": 1e-5}  # fmt: skip
QFORMER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 31,
           "encoder_hidden_size": 24, "max_position_embeddings": 20}  # fmt: skip


def lm_config(kind):
    if kind == "opt":
        return OPTConfig(
            vocab_size=40,
            hidden_size=20,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=20,
        )
    sizes = {"vocab_size": 40, "d_model": 20, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return untied_t5(T5Config(**sizes, decoder_start_token_id=0))


def tokenizer(words, folder):
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1").save_pretrained(folder)


def save(folder, kind, lm):
    """A tiny checkpoint with weights that matter everywhere, the LayerNorms included."""
    torch.manual_seed(0)
    config, model = {
        "blip2": (Blip2Config, Blip2ForConditionalGeneration),
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    }[kind]
    made = model(
        config(vision_config=VISION, qformer_config=QFORMER, text_config=lm_config(lm).to_dict(), num_query_tokens=3)
    )
    if lm == "t5":  # as FLAN-T5, with two tables
        made.language_model.lm_head.weight = nn.Parameter(torch.zeros(40, 20))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    made.eval().save_pretrained(folder)
    tokenizer(40, folder)
    if kind == "instructblip":
        tokenizer(31, folder / "qformer_tokenizer")
    return made


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    BertModel(BertConfig(**sizes, max_position_embeddings=20)).save_pretrained(folder)
    tokenizer(30, folder)
    return folder


@pytest.mark.parametrize("lm", ["opt", "t5"])
def test_blip2_gives_the_rows_that_its_own_language_model_reads(lm, bert, tmp_path):
    theirs = save(tmp_path, "blip2", lm)
    vision, hub, language_model, hub_tokenizer, lm_tokenizer = from_blip2(str(tmp_path), bert=str(bert))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = theirs.get_image_features(pixels).pooler_output
        found = hub.eval().proj(hub(vision=vision(pixels), mode="V"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert isinstance(vision.network.post_layernorm, nn.Identity)
    assert torch.equal(hub.norm.weight, theirs.vision_model.post_layernorm.weight)
    assert fingerprint(language_model) == fingerprint(theirs.language_model)
    assert (len(hub_tokenizer), len(lm_tokenizer)) == (30, 40)


def test_instructblip_has_the_whole_hub(tmp_path):
    theirs = save(tmp_path, "instructblip", "t5")
    vision, hub, _, hub_tokenizer, _ = from_blip2(str(tmp_path))
    pixels, ids, mask = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([[5, 6, 7], [8, 9, 0]]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )
    with torch.no_grad():
        wanted = theirs.get_image_features(pixels, ids, mask)
        found = hub.eval()(ids, mask, vision(pixels), mode="VT")
    torch.testing.assert_close(hub.proj(found[:, :3]), wanted.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[0], wanted.qformer_outputs.last_hidden_state[0], rtol=1e-5, atol=1e-5
    )  # text rows, too
    assert len(hub_tokenizer) == 31


def test_blip2_takes_its_text_branch_from_bert(bert, tmp_path):
    save(tmp_path, "blip2", "opt")
    hub = from_blip2(str(tmp_path), bert=str(bert))[1].qformer
    source = BertModel.from_pretrained(bert)
    words = hub.embeddings.word_embeddings.weight
    assert torch.equal(words[:30], source.embeddings.word_embeddings.weight)
    assert words.shape == (31, 16)
    assert torch.equal(hub.embeddings.position_embeddings.weight, source.embeddings.position_embeddings.weight)
    ours, theirs = hub.encoder.layer[2], source.encoder.layer[2]
    for name in ("intermediate.dense", "output.dense", "output.LayerNorm"):
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)
    assert not torch.equal(ours.attention.output.dense.weight, theirs.attention.output.dense.weight)


def test_vision_and_language_model_are_found_again_by_the_same_name(bert, tmp_path, capfd):
    theirs = save(tmp_path, "blip2", "t5")
    vision, _, lm, *_ = from_blip2(str(tmp_path), bert=str(bert))
    printed = capfd.readouterr()
    assert "UNEXPECTED" not in printed.out + printed.err
    assert "NOT tie" not in printed.out + printed.err
    assert fingerprint(load_vision(**vision.record()).network) == fingerprint(vision.network)
    assert fingerprint(load_lm(lm.name_or_path)) == fingerprint(lm)
    assert torch.equal(lm.lm_head.weight, theirs.language_model.lm_head.weight)
    assert not torch.equal(lm.lm_head.weight, lm.shared.weight)


class TestRefuses:
    def test_another_kind(self, bert):
        with pytest.raises(ValueError, match="is of the type bert; expected blip-2 or instructblip"):
            from_blip2(str(bert))

    def test_weights_that_are_missing(self, bert, tmp_path):
        save(tmp_path, "blip2", "opt")
        file = tmp_path / "model.safetensors"
        kept = {name: value for name, value in load_file(file).items() if name != "language_projection.bias"}
        save_file(kept, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit the hub: Missing key.*proj\.bias"):
            from_blip2(str(tmp_path), bert=str(bert))

    def test_a_bert_that_is_not_there(self, tmp_path):
        save(tmp_path, "blip2", "opt")
        with pytest.raises(OSError, match=r"has no text branch and takes one from BERT, but .*nowhere was not found"):
            from_blip2(str(tmp_path), bert=str(tmp_path / "nowhere"))
