"""One step on images of CIFAR's size: the arm moco against lightly's building blocks, the arm disco against the plain order.

The same student, queue and batch for all, on the CPU unless there is a GPU; contestants take turns. lightly is used as in its own
examples: its NTXentLoss with a memory bank, update_momentum, and torchvision on PIL images for the views, or our views for both.

    uv run --group peers python packages/disco/benchmarks/step.py [--threads 1] [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from disco import DisCo, Encoder
from disco.augment import Augmentation
from lightly.loss import NTXentLoss
from lightly.models.utils import update_momentum
from papercore.lab.study import machine, versions
from papercore.ops import pick_device
from parts import Contestants, table
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as V

BATCH, QUEUE = 256, 4096


def step(loss: Tensor, network: nn.Module) -> None:
    """Backward and a plain SGD step."""
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-4)
                parameter.grad = None


def run(backbone: str, teacher_backbone: str, bf16: bool, rounds: int) -> None:
    device = pick_device()
    torch.manual_seed(0)
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    pictures = [V.to_pil_image(image) for image in images]
    images = images.to(device)
    augmentation = Augmentation.moco(32)
    pipeline = T.Compose(
        [
            T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )  # fmt: skip
    student = Encoder(backbone, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3).to(device)
    teacher = Encoder(teacher_backbone, hidden=-1, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3).to(device)

    def batched() -> tuple[Tensor, Tensor]:
        view_q, view_k = (student.normalize(augmentation(images, augmentation.draw(BATCH))) for _ in range(2))
        return view_q, view_k

    def one_by_one() -> tuple[Tensor, Tensor]:
        view_q, view_k = (torch.stack([pipeline(picture) for picture in pictures]).to(device) for _ in range(2))
        return view_q, view_k

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    moco = DisCo(copy.deepcopy(student), arm="moco", queue_size=QUEUE).to(device)
    query, key = copy.deepcopy(student), copy.deepcopy(student).requires_grad_(False)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128)).to(device)

    def ours() -> None:
        view_q, view_k = batched()
        with autocast():
            step(moco(view_q, view_k).loss, moco.student)

    def lightly(views: object) -> None:
        view_q, view_k = views()  # type: ignore[operator]
        with autocast():
            update_momentum(query, key, 0.999)
            keys = key(view_k).detach()
            loss = criterion(query(view_q), keys)
            step(loss, query)

    disco, plain = (
        DisCo(copy.deepcopy(student), copy.deepcopy(teacher), queue_size=QUEUE).to(device) for _ in range(2)
    )
    known = tuple(F.normalize(torch.randn(BATCH, 128, device=device), dim=1) for _ in range(2))

    def ours_distilling(embeddings: object = None) -> None:
        view_q, view_k = batched()
        with autocast():
            step(disco(view_q, view_k, embeddings).loss, disco.student)  # type: ignore[arg-type]

    def official_order() -> None:
        """The specification's step with the whole matrix of logits, two passes of the teacher, and PIL's views."""
        view_q, view_k = one_by_one()
        assert plain.key is not None
        assert plain.teacher is not None
        with autocast():
            s_q, s_k = (F.normalize(plain.student(view).float(), dim=1) for view in (view_q, view_k))
            with torch.no_grad():
                for mine, theirs in zip(plain.key.parameters(), plain.student.parameters(), strict=True):
                    mine.data = 0.999 * mine.data + 0.001 * theirs.data
                t_k = F.normalize(plain.teacher(view_k).float(), dim=1)
                keys = F.normalize(plain.key(view_k).float(), dim=1)
                t_q = F.normalize(plain.teacher(view_q).float(), dim=1)
            queue = plain.queue.queue.keys.clone()
            logits = torch.cat([(s_q * keys).sum(1, keepdim=True), s_q @ queue.T], 1) / 0.2
            loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long, device=device))
            loss = loss + 32 * ((s_q - t_q).square().sum(1) + (s_k - t_k).square().sum(1)).mean()
            step(loss, plain.student)
        plain.queue.enqueue(keys)

    precision = "bfloat16" if bf16 else "float32"
    contestants: Contestants = {
        "ours": ours, "lightly's parts, PIL views": lambda: lightly(one_by_one),
        "lightly's parts, our views": lambda: lightly(batched),
    }  # fmt: skip
    table(f"arm moco, {backbone}, batch {BATCH}, queue {QUEUE:,}, {precision}", contestants, rounds)
    contestants = {
        "ours": ours_distilling, "ours, teacher's embeddings of fixed views": lambda: ours_distilling(known),
        "plain order, PIL views": official_order,
    }  # fmt: skip
    table(f"arm disco, {teacher_backbone} to {backbone}, {precision}", contestants, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), versions("disco"), f"{arguments.threads} thread(s)")
    for bf16 in (False, True):
        run("cnn:12-12-24-48", "cnn:48-48-96-192x2", bf16, arguments.rounds)
