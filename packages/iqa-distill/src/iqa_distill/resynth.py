"""TID2013-resynth: 1080 distorted Kodak photographs made anew, with the human scores of TID2013's own images.

The data set's pictures cannot be had everywhere; its references (crops of the Kodak suite), its kinds of distortion and their
PSNR at each level can. So the pictures are not TID2013's, and results are results on TID2013-resynth.
"""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from papercore.lab.files import write_json, write_text
from PIL import Image
from tqdm.auto import tqdm

from iqa_distill.distortions import TID2013_DISTORTIONS
from iqa_distill.gmsd import psnr
from iqa_distill.readers import RatedImages, read_ratings
from iqa_distill.strength import at_psnr

LEVELS = {1: 33.0, 2: 30.0, 3: 27.0, 4: 24.0, 5: 21.0}  # dB
ABOUT = {"data": "TID2013-resynth", "version": 1}  # of the pictures: a folder of another one is refused


def read_resynth(folder: str | Path, workers: int | None = None) -> RatedImages:
    """The 1080 images and their human scores, 0 to 9, higher is better, out of :func:`make_resynth`'s folder.

    Args and errors as there.
    """
    return replace(read_ratings(make_resynth(folder, workers)), low=0.0, high=9.0)


def make_resynth(folder: str | Path, workers: int | None = None) -> Path:
    """``folder`` with 1080 PNG files (0.35 GB) and ``ratings.csv``, which is returned; what is there already is kept.

    24 references (all but the artificial I25), nine kinds of distortion, five levels. The CSV has the columns image, mos (0 to 9,
    higher is better), reference, distortion, level and psnr: the one reached. That is 33, 30, 27, 24 or 21 dB but for two things:
    half of the references stay above 21 dB under JPEG, whose tables end at 255 (as, by their scores, TID2013's own seem to); and
    one image each of JPEG2000 and of quantisation, which move in steps, is 0.6 and 1 dB off.

    Args:
        folder: made where it is missing. A run that was cut off is continued.
        workers: processes. None: one for each core. The pictures are the same for any number.

    Raises:
        ValueError: without PAPERCORE_DATA, if that holds no such data, or if ``folder`` holds something else.
    """
    folder = Path(folder)
    ratings = folder / "ratings.csv"
    if folder.exists() and any(folder.iterdir()) and _about(folder) != ABOUT:
        raise ValueError(f"{folder} holds something else than {ABOUT}: delete it, or name another folder")
    if ratings.exists():
        return ratings
    data = _data()
    write_json(folder / "about.json", ABOUT)
    crops = pd.read_csv(data / "tid2013_reference_crops.csv")
    tasks = list(product(crops.to_dict("records"), TID2013_DISTORTIONS))
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(_make, folder, data / "kodak24"), *zip(*tasks, strict=True))
        rows = list(chain.from_iterable(tqdm(made, "TID2013-resynth", len(tasks), unit="set", dynamic_ncols=True)))
    scores = pd.read_csv(data / "tid2013_mos.csv").rename(columns={"distortion_id": "number"})
    keys = ["reference", "number", "level"]
    table = pd.DataFrame(rows).merge(scores[[*keys, "mos"]], on=keys, validate="one_to_one")
    table = table[["image", "mos", "reference", "distortion", "level", "psnr"]]
    return write_text(ratings, table.to_csv(index=False))


def _data() -> Path:
    if "PAPERCORE_DATA" not in os.environ:
        raise ValueError("tid2013-resynth is made from $PAPERCORE_DATA/iqa-distill: set PAPERCORE_DATA")
    data = Path(os.environ["PAPERCORE_DATA"]) / "iqa-distill"
    for name in ("tid2013_reference_crops.csv", "tid2013_mos.csv", "kodak24"):
        if not (data / name).exists():
            raise ValueError(f"tid2013-resynth is made from {data}, which lacks {name}")
    return data


def _about(folder: Path) -> object:
    file = folder / "about.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _make(folder: Path, kodak: Path, crop: dict[str, object], number: int) -> list[dict[str, object]]:
    """The five levels of one kind on one reference: rows of the table without the score."""
    rows: list[dict[str, object]] = []
    name = TID2013_DISTORTIONS[number]
    reference = _cut(kodak, crop)
    for level, decibels in LEVELS.items():
        path = folder / f"{crop['reference']}_{number:02}_{level}.png"
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the column psnr tells
                image, _ = at_psnr(reference, name, decibels, [int(str(crop["reference"])[1:]), number, level])
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            Image.fromarray(image).save(temporary, "PNG")
            temporary.replace(path)
        reached = round(psnr(np.asarray(Image.open(path)), reference), 2)
        row = {"image": path.name, "reference": crop["reference"], "number": number, "distortion": name}
        rows.append({**row, "level": level, "psnr": reached})
    return rows


def _cut(kodak: Path, crop: dict[str, object]) -> NDArray[np.uint8]:
    y, x, height, width = (int(str(crop[key])) for key in ("y0", "x0", "height", "width"))
    return np.asarray(Image.open(kodak / str(crop["kodak_file"])).convert("RGB"))[y : y + height, x : x + width]
