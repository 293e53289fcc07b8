"""Parts so small that a test is done at once, with weights so large that every input tells."""

import numpy as np
import torch
from mmict.corpus import prepare
from mmict.hub import MHub, MHubConfig
from mmict.lm import load_lm
from mmict.model import MMICTConfig, MMICTModel
from mmict.processor import Processor
from mmict.samples import Samples
from mmict.small import word_tokenizers
from mmict.vision import load_vision
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = "a the red blue green big small round flat cat dog cow bird fish car bus runs sits sleeps here there"
KINDS = ("t5", "opt", "llama")
WIDTH = 16


def samples(count=12, questions=False, videos=True, seed=0):
    """Random pictures of 16 x 16 pixels with 1 to 8 random words; every third is a video of 3 frames. Two are of a group."""
    random, words = np.random.default_rng(seed), WORDS.split()
    frames, images = [], 0
    for i in range(count):
        many = 3 if videos and i % 3 == 2 else 1
        frames.append(tuple(range(images, images + many)))
        images += many
    texts = [" ".join(random.choice(words, 1 + i % 8)) for i in range(count)]
    asked = [" ".join(random.choice(words, 1 + 3 * i % 7)) if questions else "" for i in range(count)]
    return Samples(
        list(random.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)), frames, texts, asked,
        [f"{seed} group {i // 2}" for i in range(count)], [f"{seed} {i}" for i in range(count)], [[text] for text in texts],
    )  # fmt: skip


def large(module, seed=0):
    """Matrices of standard deviation 0.3."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.3)
    return module.eval()


def save_parts(folder):
    """An encoder and a language model of each kind, as transformers saves them."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": WIDTH}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=16, image_size=16, patch_size=8))
    large(vision, 1).save_pretrained(str(folder / "vision"))
    v = len(processor().lm_tokenizer)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    t5 = T5Config(
        vocab_size=v, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    opt = OPTConfig(vocab_size=v, **sizes, ffn_dim=16, word_embed_proj_dim=WIDTH, max_position_embeddings=256, **ends)
    llama = LlamaConfig(vocab_size=v, **sizes, intermediate_size=16, max_position_embeddings=256, **ends)
    for name, lm in (
        ("t5", T5ForConditionalGeneration(t5)),
        ("opt", OPTForCausalLM(opt)),
        ("llama", LlamaForCausalLM(llama)),
    ):
        large(lm, 8).save_pretrained(str(folder / name))


def processor(causal=False):
    return Processor(*word_tokenizers([WORDS], 100), causal=causal)


def hub(dropout=0.0):
    sizes = {"queries": 3, "hidden": WIDTH, "layers": 2, "heads": 2, "intermediate": 16, "positions": 40}
    vocabulary = len(processor().hub_tokenizer)
    torch.manual_seed(3)
    return large(
        MHub(MHubConfig(vision_width=WIDTH, lm_width=WIDTH, vocabulary=vocabulary, dropout=dropout, **sizes)), 3
    )


def model(folder, kind="t5", dropout=0.0, **config):
    """Of the parts in a folder."""
    vision, lm = load_vision(str(folder / "vision")), load_lm(str(folder / kind))
    return MMICTModel(vision, hub(dropout), lm, processor(kind != "t5"), MMICTConfig(**config)).eval()


def corpus(model, *args, **how):
    """Of samples(...)."""
    return prepare(model, samples(*args, **how))
