"""The console script ``softclip-train``: open_clip's own training program with SoftCLIP's loss, regions and tags.

    softclip-train --roi field --roi-field roi.npy --tags-field json:tags --beta 0.3 \\
        --train-data 'shards/train-{0000..0003}.tar' --model RN50 --batch-size 256 --local-loss --gather-with-grad

Our flags are those of :class:`RunOptions`; all others are open_clip's. Its loop, optimiser, schedule, precision, evaluation and
checkpoints run unchanged, as three functions that ``open_clip_train.main`` calls by name are replaced meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import open_clip
import torch
from papercore.lab.cli import flag
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from softclip.data import DataOptions, load_pairs
from softclip.dataset import PairDataset
from softclip.loss import DIVERGENCES, SoftClipLoss
from softclip.model import RoiEncoder, SoftClipModel
from softclip.readers import Pairs
from softclip.roi import collect, provider_for

# What is relied upon: the functions that open_clip_train.main calls by name, with the parameters that are passed to them ...
REPLACED = {
    "create_model_and_transforms": ("model_name", "precision", "device", "output_dict"),
    "get_data": ("args", "preprocess_fns", "epoch", "tokenizer"),
    "create_loss": ("args",),
}
# ... its flags that are read ...
READ = (
    "train_data", "val_data", "train_num_samples", "csv_img_key", "csv_caption_key", "csv_separator", "batch_size", "workers",
    "accum_freq", "seed", "model", "local_loss", "gather_with_grad",
)  # fmt: skip
# ... and those that do not go together with what is replaced.
REFUSED = {
    "siglip": "another loss", "distill_model": "another loss", "horovod": "torchrun is supported instead",
    "trace": "the model's batches are no tensors", "torchscript": "the model's batches are no tensors",
    "dataset_resampled": "every pair is seen once in an epoch", "train_data_upsampling_factors": "the same",
}  # fmt: skip


@dataclass
class RunOptions:
    """SoftCLIP's share of the flags."""

    beta: float = flag("weight of the similarities in the target, 0 to 1 (the paper's value is unknown)", 0.3)
    lam: float = flag("weight of the relation between negatives (the paper's value is unknown)", 1.0)
    divergence: str = flag(", ".join(DIVERGENCES), "symmetric_kl")
    guidance: str = flag(
        "roi_tag (without --roi: self), roi_only, self, label_smoothing or torch_label_smoothing", "roi_tag"
    )
    target_scale: float | None = flag("scale of the similarities; not given: the model's own logit scale", None)
    clip_weight: float = flag("weight of CLIP's own loss beside it", 0.0)
    roi_tag_weight: float | None = flag(
        "weight of CLIP's loss between regions and tags, which trains the ROI encoder; not given: 1 with --roi and tags, "
        "else 0; with 0 there is no ROI encoder",
        None,
    )
    chunk_size: int | None = flag("rows of logits formed at a time; not given: as suits the processor's cache", None)
    roi: str = flag(
        "where regions come from: none, thumbnails, grid:TIMM_NAME, detector:TORCHVISION_NAME, or field", "none"
    )
    roi_field: str | None = flag("with --roi field: the shards' file, such as roi.npy, or the table's column", None)
    tags_field: str | None = flag("the tags, such as json:tags in shards, or the table's column", None)
    group_field: str | None = flag("pairs with the same value are positives of each other, such as json:root", None)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Exit codes as those of ``softclip``; open_clip's ``--debug`` shows the traceback, too."""
    arguments = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    try:
        train(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if "--debug" in arguments:
            raise
        print(f"softclip-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def train(arguments: Sequence[str]) -> None:
    """Run ``open_clip_train.main.main`` with our loss.

    Args:
        arguments: our flags and open_clip's, mixed.

    Raises:
        ValueError: for an open_clip that lacks what is relied upon, flags that exclude each other, or data with fewer pairs than
            a step. OSError: for data that is missing.
    """
    program = open_clip_program()
    options, rest = parse(arguments)
    args = program.parse_args(rest)
    for name, why in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"--{name.replace('_', '-')} does not go with softclip-train: {why}; leave it out")
    if "coca" in args.model.lower():
        raise ValueError(
            f"--model {args.model} has a captioning loss, which softclip-train does not know: take another"
        )
    with replaced(program, options, read_data(options, args)):
        if program.main(rest):
            raise ValueError("open_clip did not start, for the reason above")


def parse(arguments: Sequence[str]) -> tuple[RunOptions, list[str]]:
    """Our flags, and what is left for open_clip.

    >>> parse(["--beta", "0.2", "--beta1", "0.9", "--model", "RN50"])[1]
    ['--beta1', '0.9', '--model', 'RN50']
    """
    parser = argparse.ArgumentParser(
        "softclip-train",
        description="open_clip's training with SoftCLIP's loss",
        epilog="All other flags are open_clip's: see python -m open_clip_train.main --help",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = inspect.get_annotations(RunOptions, eval_str=True)
    for field in dataclasses.fields(RunOptions):
        kind = next(
            t for t in (float, int, str) if t in (types[field.name], *getattr(types[field.name], "__args__", ()))
        )
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=kind, default=field.default, help=field.metadata["help"])
    ours, rest = parser.parse_known_args(arguments)
    return RunOptions(**vars(ours)), rest


def open_clip_program() -> ModuleType:
    """The module ``open_clip_train.main``.

    Raises:
        ValueError: if it lacks what is relied upon, or calls it otherwise.
    """
    version, wanted = open_clip.__version__, "pip install 'open_clip_torch[training]>=3.3,<4'"
    if version.split(".")[0] != "3":
        raise ValueError(f"softclip-train works inside open_clip 3, and this is {version}: {wanted}")
    try:
        import open_clip_train.main as program
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"softclip-train needs open_clip's training program ({error}): {wanted}") from None
    lacking = []
    for name, parameters in REPLACED.items():
        if not hasattr(program, name) or name not in program.main.__code__.co_names:
            lacking.append(f"the call of {name}")
        else:
            known = inspect.signature(getattr(program, name)).parameters
            lacking += [f"{name}({parameter})" for parameter in parameters if parameter not in known]
    known_flags = vars(program.parse_args([])) if hasattr(program, "parse_args") else {}
    lacking += [f"--{name.replace('_', '-')}" for name in READ if name not in known_flags]
    if lacking:
        raise ValueError(
            f"open_clip {version} lacks what softclip-train replaces or reads: {', '.join(lacking)}; {wanted}"
        )
    return program


@dataclass
class RunData:
    """Pairs with their regions and tags. roi (n, k, f), mask bool (n, k)."""

    train: Pairs
    val: Pairs | None
    roi: tuple[Tensor, Tensor] | None = None
    tags: list[list[str]] | None = None


def read_data(options: RunOptions, args: argparse.Namespace) -> RunData | None:
    """What ``--train-data`` and ``--val-data`` hold; None without ``--train-data``, for open_clip to evaluate or synthesise."""
    if options.roi == "none" and (options.tags_field or options.roi_field):
        raise ValueError(
            "--tags-field and --roi-field go with --roi: tags guide the texts where regions guide the images"
        )
    if not args.train_data:
        return None
    names = ("csv_img_key", "csv_caption_key", "csv_separator")
    splits = load_pairs(
        DataOptions(
            data=args.train_data,
            test=args.val_data,
            roi_field=options.roi_field,
            tags_field=options.tags_field,
            group_field=options.group_field,
            **{name: getattr(args, name) for name in names},
        )
    )
    data = RunData(splits.train, splits.test if args.val_data else None)
    if args.train_num_samples not in (None, len(data.train)):
        logging.warning(
            "--train-num-samples %d is not used: there are %d pairs", args.train_num_samples, len(data.train)
        )
    provider = provider_for(options.roi, data.train)
    if provider is not None:
        roi, mask, tags = collect(provider, data.train)
        data.roi, data.tags = (roi, mask), data.train.tags if tags is None else tags
    return data


@contextlib.contextmanager
def replaced(program: ModuleType, options: RunOptions, data: RunData | None) -> Iterator[None]:
    """Meanwhile ``open_clip_train.main`` makes our model, data and loss; afterwards its own again."""
    originals = {name: getattr(program, name) for name in REPLACED}
    both = data is not None and data.roi is not None and data.tags is not None
    roi_tag_weight = float(both) if options.roi_tag_weight is None else options.roi_tag_weight
    if roi_tag_weight and not both:
        raise ValueError("--roi-tag-weight needs --roi, and tags from it or by --tags-field")

    def create_model_and_transforms(*args: Any, **kwargs: Any) -> tuple[nn.Module, Any, Any]:
        clip, *transforms = originals["create_model_and_transforms"](*args, **kwargs)
        encoder = None
        if roi_tag_weight and data is not None and data.roi is not None:
            encoder = RoiEncoder(clip.visual, data.roi[0].shape[-1])
            encoder.to(device=kwargs["device"], dtype=open_clip.get_input_dtype(kwargs["precision"]))
        return SoftClipModel(clip, encoder), transforms[0], transforms[1]

    def get_data(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        if data is None:
            return originals["get_data"](args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        others = argparse.Namespace(**vars(args) | {"train_data": None, "val_data": None, "dataset_type": "auto"})
        loaders = originals["get_data"](others, preprocess_fns, epoch=epoch, tokenizer=tokenizer)  # ImageNet
        loaders["train"] = _data_info(data.train, preprocess_fns[0], tokenizer, args, data)
        if data.val is not None:
            loaders["val"] = _data_info(data.val, preprocess_fns[1], tokenizer, args)
        return loaders

    def create_loss(args: Any) -> SoftClipLoss:
        names = ("beta", "lam", "divergence", "guidance", "target_scale", "clip_weight", "chunk_size")
        return SoftClipLoss(
            **{name: getattr(options, name) for name in names},
            roi_tag_weight=roi_tag_weight,
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            rank=args.rank,
            world_size=args.world_size,
        )

    try:
        for function in (create_model_and_transforms, get_data, create_loss):
            setattr(program, function.__name__, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(program, name, function)


def _data_info(pairs: Pairs, preprocess: Any, tokenizer: Any, args: Any, training: RunData | None = None) -> Any:
    """As open_clip's get_csv_dataset: the same order of pairs and of random numbers."""
    from open_clip_train.data import DataInfo

    roi, tags = (None, None) if training is None else (training.roi, training.tags)
    dataset = PairDataset(pairs, tokenizer, 0, preprocess=preprocess, roi=roi, tags=tags, group_positives=True)
    sampler: Any = DistributedSampler(dataset, seed=args.seed) if training and args.distributed else None
    loader: Any = DataLoader(
        dataset,
        args.batch_size,
        shuffle=training is not None and sampler is None,
        sampler=sampler,
        num_workers=args.workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        drop_last=training is not None,
    )
    loader.num_samples, loader.num_batches = len(dataset), len(loader)
    if training and loader.num_batches < args.accum_freq:
        raise ValueError(
            f"{len(dataset)} training pairs are fewer than a step's {args.batch_size} x {args.accum_freq} x {args.world_size} "
            "(--batch-size, --accum-freq, processes)"
        )
    return DataInfo(loader, sampler)


def _as_it_is(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    raise SystemExit(main())
