"""The comparison: do softened targets and the relation between negatives help, and are the soft targets themselves right?"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from papercore.lab.study import Metric, Scale, Study
from scipy.stats import rankdata
from torch import Tensor

from softclip.data import DataOptions, Splits, load_pairs
from softclip.dataset import PairDataset
from softclip.evaluate import encode_pairs, evaluate
from softclip.guidance import GuideOptions, Guides, collect_guides
from softclip.model import SoftClipModel
from softclip.sample import scene_similarity
from softclip.train import ModelOptions, fit, new_network
from softclip.trainer import SoftClipConfig
from softclip.zero_shot import zero_shot_accuracy, zero_shot_classifier

RANKED = 500  # test scenes whose similarities are ranked


@cache
def splits_of(data: str) -> Splits:
    """The pairs, read once for all runs; ``data`` is DataOptions as JSON."""
    return load_pairs(DataOptions(**json.loads(data)))


@cache
def guides_of(data: str, guide: str, test: bool) -> Guides:
    """Regions and tags, looked at once for all runs."""
    pairs = splits_of(data).test if test else splits_of(data).train
    assert pairs is not None
    return collect_guides(pairs, GuideOptions(**json.loads(guide)))


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm on one task from one seed. All arms of a seed share first weights, order and crops."""
    data = json.dumps(options.pop("data"))
    clip, guide = options.pop("clip"), {"roi": "thumbnails", **options.pop("guide", {})}
    splits = splits_of(data)
    assert splits.test is not None
    config = SoftClipConfig(output_dir=str(folder), seed=seed, save_strategy="no", disable_tqdm=True, **options)
    guides = guides_of(data, json.dumps(guide), False) if config.needs else None
    network = new_network(ModelOptions(clip=clip), seed)
    frozen = guide.get("guides") == "frozen"
    trainer = fit(network, splits.train, guides, frozen, config)
    model: SoftClipModel = trainer.model
    test = PairDataset(splits.test, network.tokenizer, trainer.train_dataset.image_size)
    metrics = evaluate(model, network.tokenizer, test, templates=["{}"], device=config.device)
    metrics["scale"] = float(model.logit_scale.detach().exp())
    if json.loads(data)["data"] == "emoji":
        coarse = splits_of(json.dumps({**json.loads(data), "label_field": "json:group"})).test
        assert coarse is not None
        assert coarse.labels is not None
        classifier = zero_shot_classifier(model.encode_text, network.tokenizer, coarse.classes, ["{}"])
        found = zero_shot_accuracy(encode_pairs(model, test)[0], torch.tensor(coarse.labels), classifier)
        metrics["group_macro"] = found["zero_shot_macro"]
    else:
        wanted = guides_of(data, json.dumps({**guide, "shuffle_guides": False}), True) if config.needs else None
        metrics |= rank_correlations(model, test, network.tokenizer, trainer.loss.options["guidance"], wanted)
        if guide.get("shuffle_guides"):
            metrics.pop("target_rank", None)  # the guides of training were others'
    return metrics


def rank_correlations(
    model: SoftClipModel, test: PairDataset, tokenizer: Any, guidance: str, guides: Guides | None
) -> dict[str, float]:
    """Spearman's correlation with the true similarity of scenes, of each row's negatives, mean over rows and both directions.

    ``target_rank``: of what the soft targets are made of, on test scenes (their regions and tags are looked at for this alone);
    ``prediction_rank``: of the cosines between images and texts.
    """
    pairs = test.pairs
    part = list(range(min(RANKED, len(pairs))))
    truth = torch.from_numpy(np.asarray(scene_similarity(pairs.select(part))))
    images, texts = (features[: len(part)] for features in encode_pairs(model, test))
    cosines = images @ texts.T
    metrics = {"prediction_rank": (spearman(cosines, truth) + spearman(cosines.T, truth)) / 2}
    sides: tuple[Tensor, Tensor] | None = (images, texts) if guidance == "self" else None
    if guides is not None:
        tags = guides.tags[: len(part)]
        guided = PairDataset(
            pairs.select(part), tokenizer, test.image_size, roi=(guides.roi[part], guides.roi_mask[part]), tags=tags
        )
        batch, others = guided.__getitems__(part)
        batch = replace(batch, images=batch.images.float())  # what becomes of the images is not used
        with torch.no_grad():
            output = model.eval()(batch.to(images.device), others.to(images.device))
        sides = output["roi_features"], output["tag_features"]
    if sides is not None:
        metrics["target_rank"] = sum(spearman(side @ side.T, truth) for side in sides) / 2
    return metrics


def spearman(scores: Tensor, truth: Tensor) -> float:
    """Mean over rows of the rank correlation of what is off the diagonal; 0 for a row whose values are all equal.

    >>> spearman(torch.tensor([[0.0, 3, 2], [3, 0, 1], [2, 1, 0]]), torch.tensor([[0.0, 1, 0.5], [1, 0, 0], [0.5, 0, 0]]))
    1.0
    """
    n = len(scores)
    off = ~torch.eye(n, dtype=torch.bool)
    ranks = [rankdata(x.cpu().double()[off].view(n, n - 1).numpy(), axis=1) for x in (scores, truth)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    return float(np.mean((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)).clip(1e-9)))


# Ours, for two cores: 32 pixels, a modified ResNet of width 8, a text tower of one layer; the target's scale is fixed, because
# the learnt one would make targets one-hot.
COMMON: dict[str, Any] = {
    "clip": "tiny-resnet", "per_device_train_batch_size": 64, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 30,
    "target_scale": 10.0,
}  # fmt: skip
FROZEN = {"guides": "frozen"}
EMOJI, SCENES = {"data": {"data": "emoji"}}, {"data": {"data": "sample"}}

study = Study(
    name="softclip",
    claim="Targets softened by the similarity of regions and tags, and related negatives, make CLIP find more of what is alike.",
    metrics=[
        Metric("map", unit="%"), Metric("zero_shot_macro", unit="%"), Metric("zero_shot_top1", unit="%"),
        Metric("zero_shot_top5", unit="%"), Metric("group_macro", unit="%"), Metric("text_retrieval_recall@1", unit="%"),
        Metric("text_retrieval_recall@10", unit="%"), Metric("target_rank"), Metric("prediction_rank"),
    ],
    baseline="clip",
    method="soft_re",
    arms={
        "clip": {"arm": "clip"},
        "label_smoothing": {"arm": "label_smoothing"},
        "clip_roitag": {"arm": "clip_roitag"},
        "soft_self": {"arm": "soft_self"},
        "soft": {"arm": "soft"},
        "soft_re": {"arm": "soft_re"},
        "soft_re, shuffled guides": {"arm": "soft_re", "guide": {"shuffle_guides": True}},
        "soft_re, frozen guides": {"arm": "soft_re", "guide": FROZEN},
        "soft_re, frozen and shuffled": {"arm": "soft_re", "guide": {**FROZEN, "shuffle_guides": True}},
        "soft_re, kl": {"arm": "soft_re", "divergence": "kl"},
        "soft_re, learnt target scale": {"arm": "soft_re", "target_scale": None},
    },
    scales={
        "quick": Scale({"scenes": {"data": {"data": "sample", "max_train": 512, "max_test": 200}}}, seeds=1,
                       options={**COMMON, "max_steps": 20}),
        "small": Scale({"emoji": EMOJI, "scenes": SCENES}, seeds=3, options={**COMMON, "max_steps": 1500}),
        "full": Scale(
            {"emoji": EMOJI, "scenes": SCENES}, seeds=5,
            options={**COMMON, "clip": "tiny-vit", "per_device_train_batch_size": 256, "max_steps": 3000},
        ),
    },
    run=train_and_evaluate,
)  # fmt: skip
