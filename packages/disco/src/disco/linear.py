"""Linear classification of frozen features: a logistic regression by L-BFGS, or the SGD protocols of the literature."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from tqdm.auto import tqdm

from disco.knn import check_features

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Protocol:
    """How SGD trains a linear classifier: momentum 0.9, no weight decay, the learning rate halved at milestones.

    Args:
        epochs: passes over the training images. learning_rate: at first, > 0 (authors: 3, their program's default 30).
        milestones: epochs, counted from 0, at which the rate is halved. batch_size: the last batch of an epoch may be smaller.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> optimizer, scheduler = Protocol(milestones=(1,)).optimizer(nn.Linear(2, 2).parameters())
        >>> for _ in range(3):
        ...     print(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        3.0
        1.5
        1.5
    """

    epochs: int = 100
    learning_rate: float = 3.0
    milestones: tuple[int, ...] = ()
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> tuple[torch.optim.SGD, MultiStepLR]:
        """SGD, and its schedule, to be stepped after each epoch."""
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=0.0)
        return optimizer, MultiStepLR(optimizer, list(self.milestones), gamma=0.5)


# Authors' runs: ImageNet; 1 % and 10 % of its labels; CIFAR-10 and CIFAR-100.
PROTOCOLS = {
    "imagenet": Protocol(milestones=(5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80)),
    "semi": Protocol(milestones=(60, 80)),
    "transfer": Protocol(epochs=200),
}


class ProbeResult(NamedTuple):
    """Percent of the test set.

    Args:
        top1: the class of largest score is the right one. top5: it is among five; None with fewer than six classes.
        method: what trained the classifier, lbfgs or sgd.
        penalty: lbfgs: the one chosen.
        best_epoch_top1: sgd: the largest top1 after any epoch, as the authors report it. It is chosen on the test set, hence too
            good; ``top1`` is the last epoch's.
    """

    top1: float
    top5: float | None
    method: str
    penalty: float | None = None
    best_epoch_top1: float | None = None


def linear_probe(
    train_features: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"] | None,
    test_features: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"] | None,
    *,
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    penalties: Sequence[float] = PENALTIES,
    protocol: Protocol = PROTOCOLS["imagenet"],
    seed: int = 0,
) -> ProbeResult:
    """Train a linear classifier on features, and judge it on others.

    ``lbfgs`` (ours, as usual for small data): each column less the training set's mean, by its deviation; then the minimum of
    mean cross entropy + penalty / 2 |W|^2, full batch. Of several penalties the one of highest accuracy on a held-out tenth of
    the training features, and of equal ones the largest; then all of them are trained on. sklearn's C is 1 / (penalty n).

    ``sgd`` (authors): features as they are, weights from N(0, 0.01), biases 0, trained by ``protocol``.

    Args:
        train_features, test_features: float16 and bfloat16 are computed in float32; all on one device. labels: classes, 0 and up.
        penalties: for lbfgs, at least 0. protocol, seed: for sgd; the seed draws weights and order. For lbfgs the tenth.

    Raises:
        ValueError: for an unknown method, no or a negative penalty, features of different widths or with NaN or inf, labels that
            are missing, not as many as the features, or of one class only; for sgd that diverges.

    Example:
        >>> features, labels = torch.tensor([[0.0, 1], [0, 2], [1, 0], [2, 0]]).repeat(5, 1), torch.tensor([0, 0, 1, 1]).repeat(5)
        >>> linear_probe(features, labels, torch.tensor([[0.0, 3], [3, 0]]), torch.tensor([0, 1])).top1
        100.0
    """
    check_features("train", train_features, train_labels)
    check_features("test", test_features, test_labels)
    assert train_labels is not None
    assert test_labels is not None
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"the training features are {train_features.shape[1]} wide, those of the test {test_features.shape[1]}"
        )
    train_features, test_features = train_features.float(), test_features.float()
    if method == "sgd":

        def features_of(batches: Sequence[Tensor]) -> Iterator[Tensor]:
            return (train_features[rows] for rows in batches)

        return train_linear(features_of, train_labels, test_features, test_labels, protocol=protocol, seed=seed)
    if method != "lbfgs":
        raise ValueError(f"method {method!r} is unknown: choose from lbfgs, sgd")
    if not penalties or min(penalties) < 0:
        raise ValueError(f"penalties must be one or more numbers of at least 0, got {list(penalties)}")
    mean, deviation = train_features.mean(0), train_features.std(0, correction=0)
    deviation = deviation.where(deviation > 1e-5 * mean.abs(), 1.0)  # what is constant but for rounding becomes 0
    train_features, test_features = (train_features - mean) / deviation, (test_features - mean) / deviation
    linear = _new_linear(train_features.shape[1], train_labels)
    penalty = penalties[0] if len(penalties) == 1 else _choose(penalties, linear, train_features, train_labels, seed)
    _fit(linear, train_features, train_labels, penalty)
    return ProbeResult(*_accuracy(linear, test_features, test_labels), "lbfgs", penalty=penalty)


def _choose(penalties: Sequence[float], linear: nn.Linear, features: Tensor, labels: Tensor, seed: int) -> float:
    """The best on a held-out tenth; ``linear`` is left at the weights of the last."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held, rest = order.split([tenth := max(1, len(order) // 10), len(order) - tenth])
    features, labels, held_features, held_labels = features[rest], labels[rest], features[held], labels[held]
    accuracy = {}
    for penalty in sorted(penalties, reverse=True):  # each starts where the one before ended
        _fit(linear, features, labels, penalty)
        accuracy[penalty] = _accuracy(linear, held_features, held_labels)[0]
    return max(accuracy, key=accuracy.__getitem__)


@torch.enable_grad()
def _fit(linear: nn.Linear, features: Tensor, labels: Tensor, penalty: float) -> None:
    """Minimise mean cross entropy + penalty / 2 |W|^2 from where ``linear`` is."""
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + penalty / 2 * linear.weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)


@torch.enable_grad()
def train_linear(
    features_of: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    labels: Int64[Tensor, " train"],
    test_features: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    *,
    protocol: Protocol,
    seed: int = 0,
) -> ProbeResult:
    """The method ``sgd`` of :func:`linear_probe`, for features that are made when they are needed.

    Args:
        features_of: an epoch's batches, each of rows (int64) -> the features of each batch, which may differ from epoch to epoch.

    Raises:
        ValueError: if the weights become NaN or infinite, or for labels of one class only.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = _new_linear(test_features.shape[1], labels)
    with torch.no_grad():
        linear.weight.copy_(0.01 * torch.randn(linear.weight.shape, generator=generator))
    optimizer, scheduler = protocol.optimizer(linear.parameters())
    best = top1 = 0.0
    top5: float | None = None
    steps = protocol.epochs * -(-len(labels) // protocol.batch_size)
    refresh = 0.1 if sys.stderr.isatty() else 20
    with tqdm(total=steps, desc="linear", unit="step", dynamic_ncols=True, mininterval=refresh, delay=1) as bar:
        for epoch in range(protocol.epochs):
            batches = torch.randperm(len(labels), generator=generator).split(protocol.batch_size)
            for rows, features in zip(batches, features_of(batches), strict=True):
                loss = F.cross_entropy(linear(features), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
            scheduler.step()
            if not linear.weight.isfinite().all():
                raise ValueError(
                    f"the linear classifier diverged in epoch {epoch}: lower the learning rate, {protocol.learning_rate}"
                )
            top1, top5 = _accuracy(linear, test_features, test_labels)
            best = max(best, top1)
            bar.set_postfix({"top-1": f"{top1:.2f}"}, refresh=False)
    return ProbeResult(top1, top5, "sgd", best_epoch_top1=best)


def _new_linear(width: int, labels: Tensor) -> nn.Linear:
    """All zeros, on the labels' device."""
    if int(labels.min()) == int(labels.max()):
        raise ValueError(f"all training labels are {int(labels[0])}: a classifier needs at least two classes")
    # Or torch's initialisation would draw from the global generator, and judging would change a training.
    linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, width, int(labels.max()) + 1, device=labels.device))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def _accuracy(linear: nn.Linear, features: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Top-1 and, from six classes on, top-5, in percent."""
    hits = linear(features).topk(min(5, linear.out_features)).indices == labels[:, None]
    return (
        100 * float(hits[:, 0].double().mean()),
        100 * float(hits.any(1).double().mean()) if linear.out_features > 5 else None,
    )
