"""The verb ``train``: fit a CLIP by one arm, on the sample by CLIP's own loss beside it; judge, and draw."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import seed_everything, soften

from softclip.checkpoints import load_clip, load_roi, new_clip, tokenizer_of
from softclip.data import DataOptions, load_pairs
from softclip.dataset import PairDataset, square
from softclip.evaluate import evaluate
from softclip.guidance import GuideOptions, Guides, collect_guides
from softclip.model import RoiEncoder, SoftClipModel, normalized
from softclip.plots import plot_targets, plot_training
from softclip.readers import Pairs
from softclip.trainer import SoftClipConfig, SoftClipTrainer, save

SAMPLE: dict[str, Any] = {
    "num_train_epochs": 12, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "target_scale": 10.0,
}  # fmt: skip
SHOWN = 12  # pairs in the picture of targets


@dataclass
class ModelOptions:
    """What is trained."""

    clip: str | None = flag(
        "an open_clip model (RN50, ViT-B-32, ...), tiny-resnet, tiny-vit, a JSON file like open_clip's; on the sample "
        "tiny-resnet",
        None,
    )
    pretrained: str | None = flag("start from these weights: a folder that we wrote, or NAME:FILE", None)
    image_size: int | None = flag("side of the images, pixels; by default the model's", None)


@dataclass
class TrainOptions:
    """What it is compared with."""

    compare: bool | None = flag("also train by CLIP's own loss; if not given: on the sample only", None)


class Network(NamedTuple):
    """A CLIP, how open_clip describes it, its tokenizer, and its encoder of regions if it comes with one."""

    clip: Any
    model_cfg: dict[str, Any]
    tokenizer: Any
    roi_encoder: RoiEncoder | None = None


def suited(data: DataOptions, guides: GuideOptions, config: SoftClipConfig) -> tuple[GuideOptions, SoftClipConfig]:
    """For data that we know, what suits them, where the defaults stand."""
    if data.data in ("sample", "emoji") and guides.roi is None:
        guides = dataclasses.replace(guides, roi="thumbnails")
    if data.data == "sample":
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{k: v for k, v in SAMPLE.items() if getattr(config, k) == defaults[k]})
    return guides, config


def new_network(options: ModelOptions, seed: int) -> Network:
    """With random weights of ``seed``, or those it is to start from.

    Raises:
        ValueError: if none is named, or two are; and as :func:`softclip.checkpoints.new_clip` and ``load_clip``.
    """
    if options.pretrained is not None:
        if options.clip is not None or options.image_size is not None:
            raise ValueError(
                "--pretrained says which network it is, and its image size: leave out --clip and --image_size"
            )
        loaded = load_clip(options.pretrained)
        clip: Any = loaded.clip
        return Network(clip, loaded.model_cfg, loaded.tokenizer, load_roi(options.pretrained, clip.visual))
    if options.clip is None:
        raise ValueError("give --clip, such as RN50, ViT-B-32 or tiny-resnet, or --pretrained")
    clip, model_cfg = new_clip(options.clip, seed, options.image_size)
    return Network(clip, model_cfg, tokenizer_of(model_cfg))


def fit(
    network: Network, pairs: Pairs, guides: Guides | None, frozen: bool, config: SoftClipConfig, *record: Any
) -> SoftClipTrainer:
    """Train, or go on with training, in ``config.output_dir``; what is saved there open_clip loads.

    Args:
        guides: of the pairs; None: of the arms that need none. frozen: they are not encoded by what learns.
        record: the other options that define the run.
    """
    folder = Path(str(config.output_dir))
    checkpoint = resumable(folder, config, *record)
    seed_everything(config.seed)
    clip, model_cfg, tokenizer, known = network
    roi_encoder = None
    if guides is not None and not frozen:
        roi_encoder = known or RoiEncoder(clip.visual, guides.roi.shape[-1])
    size = clip.visual.image_size
    dataset = PairDataset(
        pairs, tokenizer, size if isinstance(size, int) else size[0],
        roi=None if guides is None else (guides.roi, guides.roi_mask), tags=None if guides is None else guides.tags,
        group_positives=config.group_positives,
    )  # fmt: skip
    trainer = SoftClipTrainer(SoftClipModel(clip, roi_encoder), model_cfg, config, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save(folder, trainer.model, model_cfg)
    return trainer


def train(
    data: DataOptions, model: ModelOptions, guide: GuideOptions, options: TrainOptions, config: SoftClipConfig
) -> dict[str, dict[str, float]]:
    """The verb ``train``."""
    config.output_dir = config.output_dir or f"runs/softclip-{name_of(data)}"
    guide, config = suited(data, guide, config)
    folder, sample = Path(str(config.output_dir)), data.data == "sample"
    if sample and model.clip is None and model.pretrained is None:
        model = dataclasses.replace(model, clip="tiny-resnet")
    first = new_network(model, config.seed)
    if config.arm == "clip_roitag" and guide.guides == "frozen":
        raise ValueError(
            "clip_roitag is about regions and tags that learn: frozen guides leave CLIP alone; take --arm clip"
        )
    splits = load_pairs(data)
    arms = {config.arm: config}
    if config.arm != "clip" and (sample if options.compare is None else options.compare):
        arms = {"clip": dataclasses.replace(config, arm="clip", output_dir=str(folder / "clip")), **arms}
    guides = collect_guides(splits.train, guide, config.seed) if any(c.needs for c in arms.values()) else None
    results: dict[str, dict[str, float]] = {}
    histories: dict[str, list[dict[str, float]]] = {}
    for name, own in arms.items():
        network = new_network(model, own.seed) if len(arms) > 1 else first
        trainer = fit(
            network, splits.train, guides if own.needs else None, guide.guides == "frozen", own, data, model, guide
        )
        histories[name] = trainer.state.log_history
        if splits.test is not None:
            test = PairDataset(splits.test, network.tokenizer, trainer.train_dataset.image_size)
            results[name] = evaluate(trainer.model, network.tokenizer, test, device=own.device)
    if trainer.is_world_process_zero():
        report(results, histories, trainer, len(splits.test) if splits.test is not None else 0, folder)
    return results


def report(
    results: dict[str, dict[str, float]], histories: dict[str, Any], trainer: SoftClipTrainer, tested: int, folder: Path
) -> None:
    """The table, metrics.json and the pictures."""
    if results:
        write_json(folder / "metrics.json", results)
        columns = list(next(iter(results.values())))
        rows = [[metric, *(f"{metrics[metric]:.1f}" for metrics in results.values())] for metric in columns]
        print_table(f"{tested} test pairs, percent", ["metric", *results], rows)
    plot_training(histories, folder / "training.png")
    written = [folder / "training.png"]
    if draw_targets(trainer, folder / "targets.png"):
        written.append(folder / "targets.png")
    console.print(f"checkpoint {folder}, pictures {' and '.join(str(p) for p in written)}", soft_wrap=True)


@torch.no_grad()
def draw_targets(trainer: SoftClipTrainer, path: Path) -> bool:
    """One-hot target, softened target and prediction of a few training pairs, as the loss has them; for arms with a guide."""
    model, config, dataset = trainer.model.eval(), trainer.args, trainer.train_dataset
    rows = list(range(0, len(dataset), max(1, len(dataset) // SHOWN)))[:SHOWN]
    images, texts = dataset.__getitems__(rows)
    if images.images.dtype == torch.uint8:
        images = dataclasses.replace(images, images=normalized(images.images.float() / 255, model.visual))
    output = model(images.to(config.device), texts.to(config.device))
    v, t, s = (output[name].float() for name in ("image_features", "text_features", "logit_scale"))
    loss = trainer.loss.options
    guide = {"self": v, "roi_tag": output.get("roi_features")}.get(loss["guidance"])
    if guide is None or not loss["beta"]:
        return False
    scale = s if loss["target_scale"] is None else loss["target_scale"]
    valid = output.get("roi_valid", torch.ones(len(v), dtype=torch.bool, device=v.device))
    log_p = torch.log_softmax(scale * guide.float() @ guide.float().T, 1)
    target = soften(log_p, loss["beta"] * valid.unsqueeze(1)).exp()
    predicted = torch.softmax(s * v @ t.T, 1)
    thumbnails = torch.stack([square(dataset.pairs.image(i), 64) for i in rows])
    captions = [dataset.pairs.captions[i] for i in rows]
    plot_targets(torch.eye(len(rows)), target.cpu(), predicted.cpu(), captions, thumbnails, path)
    return True


def name_of(data: DataOptions) -> str:
    """Of a data set, for a folder."""
    stem = Path(data.data.rstrip("/*")).name.split(".")[0]
    return re.sub(r"\W+", "-", stem).strip("-") or "data"
