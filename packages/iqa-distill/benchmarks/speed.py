"""Speed and memory beside what they are compared with, in one process and in turn: quote the ratios. Weights are random.

    rate     images/s of whole images, decoded, 10 crops each; pyiqa's metrics beside it where that is installed
    memory   peak of tensors while an image of 6000 x 4000 is scored, against one of 512 x 384; decoded images not counted
    crops    an epoch of crops: each image decoded once, against a loader that opens the file for each of its 10 crops, as DEIQT's
    step     a training step of arm mcd: pristine features kept, against computed anew
    eager    crops/s, against a twin as DEIQT's program computes it: softmax(Q K^T) V written out, in float32

    uv run python packages/iqa-distill/benchmarks/speed.py --part rate [--threads 1] [--rounds 5] [--peers cnniqa hyperiqa]

with pyiqa, which brings much along: uv run --with pyiqa python packages/iqa-distill/benchmarks/speed.py --part rate

pyiqa's networks look at other crops or sizes than ours, each as its authors published it: a yardstick, not an equal.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from iqa_distill.images import Preprocessing, open_rgb
from iqa_distill.model import RKIQT
from iqa_distill.pixels import Pixels
from iqa_distill.scoring import score_images
from iqa_distill.teacher import NARTeacher
from iqa_distill.training import Distillation
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from PIL import Image
from torch import Tensor, nn

BACKBONES = ("tiny", "deit3_small_patch16_224")


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


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def parameters(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}"


def random_weights(*args: Any, create: Callable[..., nn.Module] = timm.create_model, **options: Any) -> nn.Module:
    """Of timm, whatever is asked for."""
    return create(*args, **{**options, "pretrained": False})


def rate(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, images = pick_device(), [picture(384, 512)] * args.images
    runs: dict[str, Callable[[], Any]] = {}
    size: dict[str, str] = {}
    for backbone in BACKBONES:
        model = RKIQT(backbone).eval().to(device)
        runs[f"ours, {backbone}"] = lambda model=model: score_images(model, images)  # type: ignore[misc]
        size[f"ours, {backbone}"] = parameters(model)
    try:
        import pyiqa
    except ImportError:
        print("pyiqa is not installed: no peers\n")
    else:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device) / 255
        for name in args.peers:
            with patch("timm.create_model", random_weights):  # nothing is fetched
                metric = pyiqa.create_metric(name, device=device, pretrained=None)
            runs[f"pyiqa, {name}"] = lambda metric=metric: [metric(image[None]) for image in batch]  # type: ignore[misc]
            size[f"pyiqa, {name}"] = parameters(metric)
    times = median_times(runs, args.rounds, device)
    rows = [[name, size[name], f"{args.images / spent:.2f}"] for name, spent in times.items()]
    return [f"{args.images} images of 384 x 512", "million parameters", "images/s"], rows


def memory(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, rows = pick_device(), []
    model = RKIQT("deit3_small_patch16_224").eval().to(device)
    peaks = []
    for height, width in ((384, 512), (4000, 6000)):
        image = picture(height, width)
        with peak_memory(device) as peak:
            score_images(model, [image])
        peaks.append(peak.bytes)
        decoded = f"{image.nbytes / 2**20:.1f}"
        rows.append([f"{height} x {width}", decoded, f"{peak.bytes / 2**20:.1f}", f"{peaks[-1] / peaks[0]:.3f}"])
    return ["one image", "decoded, MiB", "peak of tensors, MiB", "ratio"], rows


def crops(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    each, side = 10, 224
    how, generator = Preprocessing(side, each), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{i}.png" for i in range(args.images)]
        for name in names:
            smooth = np.asarray(Image.fromarray(picture(48, 64)).resize((512, 384), Image.Resampling.BICUBIC))
            Image.fromarray(smooth).save(name)

        def once() -> None:
            pixels, _ = Pixels.decode(names, lambda i: open_rgb(names[i]))
            for index in torch.arange(args.images).repeat_interleave(each).split(16):
                how.normalize(pixels.crops(index, side, generator))

        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))

        def per_crop() -> None:
            for name in np.repeat(names, each):
                image = Image.open(name).convert("RGB")
                y, x = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (image.height, image.width))
                array = np.array(image.crop((x, y, x + side, y + side)))
                (torch.from_numpy(array).permute(2, 0, 1).float().div(255) - mean) / std

        times = median_times({"ours": once, "per crop": per_crop}, args.rounds, torch.device("cpu"))
    rows = [[name, f"{args.images / t:.1f}", f"{times['per crop'] / t:.2f}"] for name, t in times.items()]
    return ["PNG images of 384 x 512, 10 crops of 224", "images/s", "times the loader's speed"], rows


def step(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, rows = pick_device(), []
    for backbone, trunk, batch in (("tiny", "tiny", 32), ("deit3_small_patch16_224", "inception_resnet_v2", 4)):
        student, nar = RKIQT(backbone).to(device), NARTeacher(trunk).to(device)
        size = student.preprocessing.crop_size
        lq, hq = torch.randn(2, batch, 3, size, size).to(device).unbind(0)
        targets, training = torch.randn(batch).to(device), Distillation(student, nar)
        with torch.no_grad():
            kept = nar.features(hq)

        def run(
            known: Tensor | None,
            training: Distillation = training,
            nar: NARTeacher = nar,
            data: Any = (lq, hq, targets),
        ) -> None:
            with torch.no_grad():
                features = nar.features(data[1]) if known is None else known
            training(data[0], data[2], features)[0].backward()

        times = median_times({"anew": lambda: run(None), "kept": lambda: run(kept)}, args.rounds, device)  # noqa: B023
        for name, spent in times.items():
            rows.append([f"{backbone}, {trunk}, {batch} crops", name, f"{spent:.3f}", f"{spent / times['anew']:.2f}"])
    return ["student, teacher", "pristine features", "s a step", "share of the time"], rows


class EagerAttention(nn.Module):
    """A timm attention layer as DEIQT's program computes it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.layer.qkv(x).reshape(batch, tokens, 3, self.layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query * self.layer.scale @ key.transpose(-2, -1)).softmax(-1)
        return self.layer.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, dim))


class EagerPanel(nn.Module):
    """The panel's layer with both attentions written out."""

    def __init__(self, layer: nn.TransformerDecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def attend(self, attention: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> Tensor:
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, memory, memory), weights, biases, strict=True)
        )
        shares = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return attention.out_proj((shares @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        layer, inner = self.layer, self.layer.norm1(x)
        x = x + self.attend(layer.self_attn, inner, inner)
        x = x + self.attend(layer.multihead_attn, layer.norm2(x), memory)
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))


def eager_twin(model: RKIQT) -> RKIQT:
    """The same weights."""
    twin = copy.deepcopy(model)
    for block in twin.vit.blocks:
        block.attn = EagerAttention(block.attn)
    twin.panel.layer = EagerPanel(twin.panel.layer)
    return twin


@torch.inference_mode()
def eager(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device = pick_device()
    model = RKIQT("deit3_small_patch16_224", token_init="learned").eval().to(device)
    twin = eager_twin(model)
    crops = torch.randn(args.crops, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.allclose(model.predict(crops), twin.predict(crops), atol=1e-4)
    runs: dict[str, Callable[[], Any]] = {
        "eager twin": lambda: twin.predict(crops),
        "ours": lambda: model.predict(crops),
    }
    if device.type == "cuda":

        def half(network: RKIQT) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                network.predict(crops)

        runs |= {"eager twin, autocast": lambda: half(twin), "ours, autocast": lambda: half(model)}
    times = median_times(runs, args.rounds, device)
    rows = []
    for name, spent in times.items():
        twin_time = times["eager twin, autocast" if "autocast" in name else "eager twin"]
        rows.append([name, f"{args.crops / spent:.1f}", f"{twin_time / spent:.2f}"])
    return [f"ViT-S/16, {args.crops} crops of 224", "crops/s", "times the twin's speed"], rows


def main() -> None:
    parts = {"rate": rate, "memory": memory, "crops": crops, "step": step, "eager": eager}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(parts), required=True)
    parser.add_argument("--images", type=int, default=4, help="rate and crops: images in a round")
    parser.add_argument("--peers", nargs="+", default=["cnniqa", "hyperiqa"], help="rate: names of pyiqa's metrics")
    parser.add_argument("--crops", type=int, default=10, help="eager: crops in a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(markdown_table(*parts[args.part](args)))
    print(f"{datetime.date.today()}, {machine()}, {args.threads} threads, {versions('iqa-distill')}")


if __name__ == "__main__":
    main()
