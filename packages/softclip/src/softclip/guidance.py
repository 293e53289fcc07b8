"""What tells which pairs are alike: regions and tags of every training image, to be encoded by weights that learn, or frozen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from papercore.lab.cli import flag
from torch import Tensor

from softclip.readers import Pairs
from softclip.roi import collect, provider_for

MOST_FROZEN = 2**31  # bytes of frozen features, which are held in memory


@dataclass
class GuideOptions:
    """What guides the targets of the arms soft_re, soft and clip_roitag."""

    roi: str | None = flag(
        "regions: thumbnails (of the data's boxes, else of a grid), grid:TIMM_MODEL, detector:TORCHVISION_MODEL (which gives "
        "tags too), field (the data's own arrays); if not given: thumbnails for sample and emoji",
        None,
    )
    guides: str = flag(
        "trained: regions and tags are encoded by the towers as they learn; frozen: by fixed rules (ours)", "trained"
    )
    shuffle_guides: bool = flag("give each pair another's regions and tags, a control", False)

    def __post_init__(self) -> None:
        if self.guides not in ("trained", "frozen"):
            raise ValueError(f"guides must be trained or frozen, got {self.guides!r}")


@dataclass
class Guides:
    """Of n images.

    Args:
        roi: float32 (n, k, f). roi_mask: bool (n, k), False: padding.
        tags: of each image its tags, an empty list if it has none; or their frozen features, float32 (n, width).
    """

    roi: Tensor
    roi_mask: Tensor
    tags: list[list[str]] | Tensor


def collect_guides(pairs: Pairs, options: GuideOptions, seed: int = 0) -> Guides:
    """Look at every image once.

    Raises:
        ValueError: if it is not said what regions are, or there are no tags.
    """
    if options.roi is None:
        raise ValueError("this arm is guided by regions: say what they are by --roi, or take --arm soft_self or clip")
    provider = provider_for(options.roi, pairs)
    if provider is None:
        raise ValueError("this arm is guided by regions, and --roi none has none: take --arm soft_self or clip")
    roi, mask, tags = collect(provider, pairs)
    tags = tags or pairs.tags
    if tags is None:
        raise ValueError(
            "this arm is guided by tags, and the data have none: name them by --tags_field, or take --roi detector:NAME"
        )
    if options.shuffle_guides:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        roi, mask, tags = roi[order], mask[order], [tags[i] for i in order]
    if options.guides == "frozen":
        return Guides(centred(roi, mask), mask.any(1, keepdim=True), tf_idf(tags))
    return Guides(roi, mask, tags)


def centred(roi: Tensor, mask: Tensor) -> Tensor:
    """Regions in their order as one frozen vector, less the mean over images: (n, k, f) -> (n, 1, k f).

    Without centring all images are alike, because most have the same background.
    """
    kept = mask.unsqueeze(-1)
    mean = (roi * kept).sum(0) / kept.sum(0).clamp_min(1)
    return ((roi - mean) * kept).flatten(1).unsqueeze(1)


def tf_idf(tags: list[list[str]]) -> Tensor:
    """Tags as frozen features whose cosine is high where two images share rare tags: (n, distinct tags).

    >>> features = tf_idf([["sun", "sky"], ["sun"], ["moon", "sky"]])
    >>> features.shape, bool(features[0] @ features[1] > 0), float(features[1] @ features[2])
    (torch.Size([3, 3]), True, 0.0)

    Raises:
        ValueError: if they would take more than 2 GiB.
    """
    found = Counter(tag for image in tags for tag in set(image))
    column = {tag: i for i, tag in enumerate(sorted(found))}
    if 4 * len(tags) * len(column) > MOST_FROZEN:
        raise ValueError(
            f"{len(column)} distinct tags of {len(tags)} images do not fit in memory: take --guides trained"
        )
    idf = torch.tensor([(1 + len(tags)) / (1 + found[tag]) for tag in sorted(found)]).log() + 1
    features = torch.zeros(len(tags), len(column))
    for row, image in enumerate(tags):
        for tag in image:
            features[row, column[tag]] += 1
    return features * idf
