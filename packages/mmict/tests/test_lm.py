import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmict.lm import add_lora, check_tables, checkpoint_layers, is_seq2seq, load_lm, untied_t5
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

GOLDEN = Path(__file__).parent / "golden" / "forward_t5_equal.npz"


def t5(**options):
    torch.manual_seed(0)
    config = T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(untied_t5(config) if options.pop("untied", False) else config).eval()


def opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32)).eval()


def llama():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 29,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).eval()


MODELS = pytest.mark.parametrize("make", [t5, opt, llama])


def run(lm, rows):
    if not is_seq2seq(lm):
        return lm(inputs_embeds=rows).logits
    return lm(inputs_embeds=rows, decoder_input_ids=torch.tensor([[0, 3, 4]]).expand(len(rows), -1)).logits


class TestLoad:
    @MODELS
    def test_gives_the_saved_model_frozen_in_eval_mode(self, make, tmp_path):
        saved = make()
        saved.save_pretrained(tmp_path)
        lm = load_lm(str(tmp_path))
        rows = torch.randn(2, 5, 16)
        torch.testing.assert_close(run(lm, rows), run(saved, rows))
        assert is_seq2seq(lm) == (make is t5)
        assert not lm.training
        assert not any(parameter.requires_grad for parameter in lm.parameters())

    def test_t5_in_float16_is_refused(self, tmp_path):
        t5().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="T5 overflows in float16; load it in bfloat16 or float32"):
            load_lm(str(tmp_path), torch.float16)
        assert load_lm(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16

    def test_others_in_float16_are_not(self, tmp_path):
        opt().save_pretrained(tmp_path)
        assert load_lm(str(tmp_path), torch.float16).dtype == torch.float16

    def test_a_checkpoint_that_lacks_weights_is_refused(self, tmp_path):
        opt().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file(
            {name: value for name, value in load_file(file).items() if "fc1.bias" not in name}, file, {"format": "pt"}
        )
        with pytest.raises(ValueError, match=r"lacks weights of the language model, such as .*fc1\.bias"):
            load_lm(str(tmp_path))


class TestTables:
    """transformers 5 ties the tables of a T5 whatever it is told; FLAN-T5 has two."""

    def test_untied_t5_has_a_table_of_outputs_of_its_own(self):
        tied, untied = t5(), t5(untied=True)
        assert tied.lm_head.weight is tied.shared.weight
        assert untied.lm_head.weight is not untied.shared.weight
        assert untied.encoder.embed_tokens.weight.shape == (29, 16)

    def test_survive_saving_and_loading_more_than_once(self, tmp_path):
        saved, rows = t5(untied=True), torch.randn(1, 5, 16)
        wanted = run(saved, rows)
        for name in ("first", "second"):
            saved.save_pretrained(tmp_path / name)
            saved = load_lm(str(tmp_path / name))
            torch.testing.assert_close(run(saved, rows), wanted)

    def test_of_the_golden_case_give_its_loss(self, tmp_path):
        golden = np.load(GOLDEN)
        config = T5Config(
            vocab_size=29, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        config.dense_act_fn = "gelu"
        lm = T5ForConditionalGeneration(untied_t5(config))
        prefix = "w::t5_model."
        lm.load_state_dict(
            {k.removeprefix(prefix): torch.from_numpy(golden[k]) for k in golden if k.startswith(prefix)}
        )
        lm.save_pretrained(tmp_path)
        lm = load_lm(str(tmp_path))
        names = ("inputs_embeds", "attention_mask", "labels")
        loss = lm(**{name: torch.from_numpy(golden[f"call0_{name}"]) for name in names}).loss
        assert loss.item() == pytest.approx(float(golden["call0_loss"]), abs=1e-5)  # 3.0976; tied, it would be 3.860

    def test_tied_though_the_checkpoint_has_two_are_an_error(self, tmp_path):
        t5(untied=True).save_pretrained(tmp_path)
        tied = t5()
        tied.load_state_dict(load_file(tmp_path / "model.safetensors"))  # torch says nothing
        with pytest.raises(ValueError, match=r"(shared|lm_head)\.weight of the loaded model is not the checkpoint's"):
            check_tables(tied, str(tmp_path))
        check_tables(load_lm(str(tmp_path)), str(tmp_path))


class TestLora:
    @MODELS
    def test_begins_as_nothing_and_alone_is_trained(self, make):
        lm, rows = make().requires_grad_(False), torch.randn(2, 5, 16)
        wanted = run(lm, rows)
        with_lora = add_lora(lm, rank=2, alpha=4)
        torch.testing.assert_close(run(with_lora, rows), wanted)
        trained = [name for name, parameter in with_lora.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(".lora_" in name for name in trained)
        run(with_lora, rows).square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in with_lora.parameters())
        assert not with_lora.training

    def test_goes_into_named_layers(self):
        found = add_lora(opt(), rank=2, alpha=4, targets=["fc1"])
        assert all(".fc1." in name for name, parameter in found.named_parameters() if parameter.requires_grad)

    def test_without_peft_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r"pip install 'mmict\[lora\]'"):
            add_lora(opt(), 2, 4)


class TestCheckpointing:
    @MODELS
    def test_gradients_reach_the_rows_of_a_frozen_model_and_are_the_same(self, make):
        lm = make().requires_grad_(False)
        layers = [
            layer
            for layer in lm.modules()
            if type(layer).__name__ in ("T5Block", "OPTDecoderLayer", "LlamaDecoderLayer")
        ]
        calls = []
        for layer in layers:
            next(m for m in layer.modules() if isinstance(m, nn.Linear)).register_forward_hook(
                lambda *_: calls.append(1)
            )
        grads = []
        for checkpointed in (False, True):
            if checkpointed:
                checkpoint_layers(lm)
            rows = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            calls.clear()
            run(lm, rows * 1).square().sum().backward()
            assert len(calls) == len(layers) * (1 + checkpointed)  # each layer is computed again
            grads.append(rows.grad)
        assert grads[0].abs().sum() > 0
        torch.testing.assert_close(*grads)

    @MODELS
    def test_generates_the_same(self, make):
        lm, rows = make(), torch.randn(2, 5, 16)
        options = {"max_new_tokens": 4, "num_beams": 2, "pad_token_id": 0, "eos_token_id": 28}
        before = lm.generate(inputs_embeds=rows, **options)
        checkpoint_layers(lm)
        assert torch.equal(lm.generate(inputs_embeds=rows, **options), before)

    def test_refuses_a_model_without_layers(self):
        with pytest.raises(ValueError, match="Linear has no layers for gradient checkpointing"):
            checkpoint_layers(nn.Linear(2, 2))
