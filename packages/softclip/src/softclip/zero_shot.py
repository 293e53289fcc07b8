"""Zero-shot classification: images go to the class whose name, put into a few sentences, has the nearest text embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from softclip.retrieval import checked_labels, correct_ranks, unit_features

TEMPLATES = ("{}", "a picture of {}", "an image that shows {}")  # ours
BATCH = 256  # texts encoded at a time


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[str] | str | Path = TEMPLATES,
    *,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "classes width"]:
    """One unit vector for each class: the normalised mean, over the templates, of the normalised embeddings of its texts.

    Args:
        encode_text: tokens (n, length) to embeddings (n, width), normalised or not, such as ``clip.encode_text``.
        tokenizer: texts to tokens, such as ``open_clip.get_tokenizer`` gives.
        classes: names, put in place of ``{}`` in each template.
        templates: texts that hold ``{}``; or a file of them, for which see :func:`read_templates`. The default is ours.
        device: where the tokens go, that of the model.

    Raises:
        ValueError: for a template without ``{}``, no templates, no classes, a name that is empty or comes twice, or embeddings
            that are NaN. OSError: if there is no such file.

    >>> length_and_one = lambda texts: torch.tensor([[len(text), 1] for text in texts])
    >>> zero_shot_classifier(torch.Tensor.float, length_and_one, ["cat", "giraffe"], ["{}"]).shape
    torch.Size([2, 2])
    """
    templates = read_templates(templates) if isinstance(templates, str | Path) else _checked(templates, "templates")
    if not classes:
        raise ValueError("no classes: give at least one name")
    for number, name in enumerate(classes):
        if not name.strip():
            raise ValueError(f"class {number} has an empty name, of which there is nothing to encode")
    name, times = Counter(classes).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} classes are named {name!r}: join them, for nothing could tell them apart")
    texts = [template.replace("{}", name) for name in classes for template in templates]
    parts = [encode_text(tokenizer(texts[i : i + BATCH]).to(device)).float() for i in range(0, len(texts), BATCH)]
    (embeddings,) = unit_features(text_features=torch.cat(parts))
    (classifier,) = unit_features(classifier=embeddings.view(len(classes), len(templates), -1).mean(1))
    return classifier


def zero_shot_accuracy(
    image_features: Float[Tensor, "images width"],
    labels: Int64[Tensor, " images"],
    classifier: Float[Tensor, "classes width"],
    topk: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Percent of the images whose own class is among the k of largest cosine.

    Wrong classes with an equal cosine (within 1e-6) count ahead, so that a collapsed model scores 0. A k of as many as there are
    classes is 100.

    Args:
        image_features: normalised here, in float32. labels: rows of ``classifier``.
        classifier: one vector for each class, as of :func:`zero_shot_classifier`.

    Returns:
        "zero_shot_top<k>", and "zero_shot_macro": the mean over the classes that have images of their own top-1.

    Raises:
        ValueError: for labels out of range, features that are NaN, infinite or of different widths, or a k below 1.

    >>> accuracy = zero_shot_accuracy(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 0]), torch.eye(2), topk=[1])
    >>> accuracy
    {'zero_shot_top1': 75.0, 'zero_shot_macro': 75.0}
    """
    if not topk or min(topk) < 1:
        raise ValueError(f"topk must be numbers of classes of at least 1, got {tuple(topk)}")
    images, classes = unit_features(image_features=image_features, classifier=classifier)
    labels = checked_labels("labels", labels, len(images), len(classes)).to(images.device)
    ranks = correct_ranks(images, classes, labels, torch.arange(len(classes), device=images.device))
    own = [(ranks[labels == label] == 0).double().mean() for label in labels.unique()]
    accuracy = {f"zero_shot_top{k}": 100 * float((ranks < k).double().mean()) for k in topk}
    return accuracy | {"zero_shot_macro": 100 * float(torch.stack(own).mean())}


def read_templates(path: str | Path) -> tuple[str, ...]:
    """The lines of a UTF-8 text file, each with ``{}`` where a class's name goes; empty lines are passed over.

    Raises:
        ValueError: if the file has no line, or one without ``{}``, or is not UTF-8. OSError: if there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; give one template a line") from None
    return _checked([line.strip() for line in lines if line.strip()], str(path))


def _checked(templates: Sequence[str], source: str) -> tuple[str, ...]:
    if not templates:
        raise ValueError(f"{source}: no templates; give texts such as 'a picture of {{}}'")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"{source}: the template {template!r} has no {{}} where the name of a class would go")
    return tuple(templates)
