"""Speed and memory beside what they are compared with, in one process and in turn: quote the ratios. Weights are random.

hub       40 pairs, forward and backward: one call of the hub, against one for each pair as in the official code
step      a training step at k = 4, n = 32: MMICT against vanilla in-context tuning; rows that enter the language model, peak
cache     a training step with features that were encoded once, against one that encodes its pictures
generate  captions with 4 cached demonstrations, with the same encoded anew, and without

uv run python packages/mmict/benchmarks/speed.py --part hub [--threads 1] [--rounds 5]
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mmict.dialogs import Dialogs
from mmict.hub import MHub, MHubConfig
from mmict.lm import untied_t5
from mmict.model import Demonstrations, MMICTConfig, MMICTModel
from mmict.processor import Processor
from mmict.small import word_tokenizers
from mmict.vision import VisionEncoder
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

WORDS = 1000
QUERIES, TEXT, PROMPT, TARGET, K = 32, 16, 10, 8, 4


def median_times(contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds: each once to warm up, then all of them in turn, round after round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in found.items()}


def model(device: torch.device, *, large_vit: bool = False, hidden: int = 256, lm_layers: int = 8) -> MMICTModel:
    """A ViT-S/16 at 224 or a small encoder, a hub of 4 layers, and a T5 of FLAN-T5-small's shape (8 + 8 layers of 512)."""
    vit, image_size = (384, 224) if large_vit else (96, 48)
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vit, intermediate_size=4 * vit, num_hidden_layers=12 if large_vit else 3, num_attention_heads=vit // 32,
            image_size=image_size, patch_size=16 if large_vit else 8,
        )
    )  # fmt: skip
    hub_tokenizer, lm_tokenizer = word_tokenizers([" ".join(f"w{i}" for i in range(WORDS))], WORDS)
    shape = T5Config(
        vocab_size=len(lm_tokenizer), d_model=512, d_kv=64, d_ff=1024, num_layers=lm_layers, num_heads=6,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    lm = T5ForConditionalGeneration(untied_t5(shape)).requires_grad_(False)
    lm.config.decoder_start_token_id = lm.generation_config.decoder_start_token_id = 0
    encoder = VisionEncoder(vision, source="random", image_size=image_size)
    hub = MHub(
        MHubConfig(
            vision_width=vit, lm_width=512, queries=QUERIES, hidden=hidden, layers=4, heads=hidden // 32,
            intermediate=4 * hidden, vocabulary=len(hub_tokenizer), positions=64, dropout=0.0,
        )
    )  # fmt: skip
    return MMICTModel(encoder, hub, lm, Processor(hub_tokenizer, lm_tokenizer)).to(device).train()


def dialogs(count: int, k: int, vision: Tensor, device: torch.device) -> Dialogs:
    """Random texts of fixed lengths; ``vision``: a row for each pair."""
    pairs = count * (k + 1)
    query = torch.arange(pairs) % (k + 1) == k
    length = torch.where(query, PROMPT, TEXT)
    ids = torch.randint(10, WORDS, (pairs, TEXT), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(TEXT) < length[:, None]
    return Dialogs(
        vision, torch.arange(pairs)[:, None], ids, mask, ids, mask, query, torch.randint(10, WORDS, (count, TARGET))
    ).to(device)


def hub(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, pairs = pick_device(), 40
    network = model(device, hidden=128).hub
    vision = torch.randn(pairs, 36, 96, device=device)
    ids = torch.randint(10, WORDS, (pairs, TEXT), device=device)
    mask = torch.ones_like(ids)

    def loop() -> None:
        rows = [network(ids[i : i + 1], mask[i : i + 1], vision[i : i + 1]) for i in range(pairs)]
        torch.cat(rows).square().mean().backward()

    def batched() -> None:
        network(ids, mask, vision).square().mean().backward()

    times = median_times({"a call for each pair": loop, "one call": batched}, args.rounds, device)
    slow = times["a call for each pair"]
    return [f"`hub`: {pairs} pairs, 4 layers of 128", "s", "times the loop's speed"], [
        [name, f"{t:.3f}", f"{slow / t:.1f}"] for name, t in times.items()
    ]


def step(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, count = pick_device(), 8
    network = model(device)
    batch = dialogs(count, K, torch.randn(count * (K + 1), 36, 96), device)
    arms = {
        "vanilla ICT": MMICTConfig(demonstration="visual+raw_text", guided=False),
        "MMICT": MMICTConfig(demonstration="vt_text"),
    }
    rows, peaks = {}, {}

    def run(config: MMICTConfig) -> None:
        network.config = config
        network(batch).loss.backward()

    for name, config in arms.items():
        network.config = config
        with torch.no_grad():
            rows[name] = int(network.context(batch).lengths[0])
        with peak_memory(device) as peak:
            run(config)
        peaks[name] = peak.bytes
    times = median_times({name: lambda c=config: run(c) for name, config in arms.items()}, args.rounds, device)  # type: ignore[misc]
    base = "vanilla ICT"
    return ["`step`: 8 dialogs, k = 4, n = 32", "rows for the LM", "of ICT's", "s a step", "of ICT's", "peak MiB", "of ICT's"], [
        [
            name, str(rows[name]), f"{rows[name] / rows[base]:.2f}", f"{t:.3f}", f"{t / times[base]:.2f}",
            f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[base]:.2f}",
        ]
        for name, t in times.items()
    ]  # fmt: skip


def cache(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, count = pick_device(), 2
    network = model(device, large_vit=True, lm_layers=2)  # the LM a tenth of the encoder's work, as in the paper
    pixels = torch.randn(count * (K + 1), 3, 224, 224)
    batches = {"encoded in each step": dialogs(count, K, pixels, device)}
    features = network.vision(pixels.to(device))
    batches["kept"] = dialogs(count, K, features, device)
    times = median_times(
        {name: lambda b=batch: network(b).loss.backward() for name, batch in batches.items()},  # type: ignore[misc]
        args.rounds, device,
    )  # fmt: skip
    slow = times["encoded in each step"]
    return ["`cache`: ViT-S/16 at 224, 10 pictures", "s a step", "times the speed"], [
        [name, f"{t:.2f}", f"{slow / t:.1f}"] for name, t in times.items()
    ]


def generate(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, count = pick_device(), 16
    network = model(device, large_vit=True, lm_layers=2).eval()  # as above
    how: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 20, "min_length": 20}
    alone = dialogs(count, 0, torch.randn(count, 3, 224, 224), device)
    full = dialogs(count, K, torch.randn(count * (K + 1), 3, 224, 224), device)
    with torch.no_grad():
        shown = dialogs(1, K, torch.randn(K + 1, 3, 224, 224), device)
        context = network.context(shown)
        kept = Demonstrations(context.rows[: K * (TEXT + 1)])
    runs = {
        "k = 0": lambda: network.generate_dialogs(alone, **how),
        "k = 4, cached": lambda: network.generate_dialogs(alone, kept, **how),
        "k = 4, encoded for each query": lambda: network.generate_dialogs(full, **how),
    }
    times = median_times(runs, args.rounds, device)
    return ["`generate`: 16 pictures of 224, 5 beams, 20 tokens", "s", "of k = 0"], [
        [name, f"{t:.2f}", f"{t / times['k = 0']:.2f}"] for name, t in times.items()
    ]


PARTS = {"hub": hub, "step": step, "cache": cache, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{datetime.date.today()}, {machine()}, {args.threads} thread(s), {versions('mmict')}\n")
    for part in args.part:
        heads, rows = PARTS[part](args)
        print(markdown_table(heads, rows), flush=True)


if __name__ == "__main__":
    main()
