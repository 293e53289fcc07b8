"""Pictures with texts where users have them: JSON lines of several kinds, COCO captions, VQAv2. No image is decoded here."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmict.samples import Samples
from mmict.texts import clean_caption, split_question

OnBad = Literal["error", "skip"]
IMAGES = ("images", "image", "frames")  # keys, of which a row has one
MARK = "<image>"  # where an image stands in a message
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
ENVIRONMENT = "PAPERCORE_DATA"


class _Sample(NamedTuple):
    """A sample as it was read; ``answers`` are several of one question, ``group`` and ``id`` may have to be made."""

    images: Sequence[str]
    text: str
    question: str = ""
    answers: Sequence[str] = ()
    group: str = ""
    id: str = ""
    demos: Sequence[str] | None = None
    split: str = ""


Parse = Callable[[Any], list[_Sample]]  # a row -> its samples


def read_samples(
    path: str | Path,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    on_bad: OnBad = "error",
) -> Samples:
    """A file of any kind: VQAv2's questions if ``annotations`` are given, COCO's captions if it is one JSON object, else rows.

    Raises:
        ValueError, OSError: as :func:`read_vqa`, :func:`read_coco` and :func:`read_jsonl`.
    """
    if annotations is not None:
        return read_vqa(path, annotations, image_root, on_bad)
    if Path(path).suffix == ".json" and _text(Path(path)).lstrip()[:1] == "{":
        return read_coco(path, image_root, on_bad)
    return read_jsonl(path, image_root, on_bad)


def read_jsonl(path: str | Path, image_root: str | Path | None = None, on_bad: OnBad = "error") -> Samples:
    """Rows of JSON, one a line, or a .json file with a list of them. The keys of a row say of which kind it is:

    - our own: ``image``, ``images`` or ``frames`` (a path or a list; several are the frames of one video), and ``text``,
      ``captions`` (a list, a sample for each), or ``question`` with ``answer`` or ``answers`` (a list, of several annotators; the
      most frequent is learned). A text "question | answer" is parted at the first bar. If you like: ``id``, ``group`` (the same
      for what must not be a demonstration of each other; by default the first image), ``demos`` (ids of fixed demonstrations),
      ``split`` (train, the default, validation or test).
    - conversations of TRL and LLaMA-Factory: ``messages`` of ``role`` and ``content`` (text with ``<image>``, or a list of typed
      parts), with ``images``. Without any mark the images belong to the first question.
    - LLaVA's: ``conversations`` of ``from`` and ``value`` (text with ``<image>``), with ``image``.

    Of a conversation each question with its answer is a sample, about the images marked in the question or else those of the
    question before; it does not see what was said before. A request without words, only an image, makes its answer a caption.
    Other keys are passed over. Captions are cleaned, and the references of one are all captions of its images.

    Args:
        path: the file. image_root: where relative paths of images start; by default the file's folder.
        on_bad: "error", or "skip": leave out rows that are wrong, with one warning.

    Raises:
        ValueError: with the row's number, from 1, for what is no JSON object; keys that are missing, with those that are there;
            values that are no text or no list of texts; no image, or a file that is not there; as many marks as images not; an
            empty caption, question or answer; an unknown role or split. Without it for an id that is there twice, or no rows.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix == ".json":
        rows = _json(path, text)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
        return _collect(path, enumerate(rows, 1), _parse_row, image_root, on_bad)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _collect(path, lines, lambda line: _parse_row(json.loads(line)), image_root, on_bad)


def read_coco(path: str | Path, image_root: str | Path | None = None, on_bad: OnBad = "error") -> Samples:
    """COCO's captions (``captions_val2017.json``): a sample for each, grouped by image.

    Args:
        path: an object with ``images`` and ``annotations``. image_root, on_bad: as for :func:`read_jsonl`.

    Raises:
        ValueError: with the annotation's number, as :func:`read_jsonl`; for an image that is not listed; for another object.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    data = _object(path, "images", "annotations")
    files = {str(image.get("id")): image.get("file_name") for image in data["images"]}

    def parse(row: Any) -> list[_Sample]:
        _need(row, "image_id", "caption")
        if str(row["image_id"]) not in files:
            raise ValueError(f"image_id {row['image_id']} is not among the images of the file")
        file = _word(files[str(row["image_id"])], "file_name")
        return [_caption([file], row["caption"], "caption", id=str(row.get("id", "")))]

    return _collect(path, enumerate(data["annotations"], 1), parse, image_root, on_bad, "annotation")


def read_vqa(
    path: str | Path, annotations: str | Path, image_root: str | Path | None = None, on_bad: OnBad = "error"
) -> Samples:
    """VQAv2: questions with the answers of ten annotators, of which the most frequent is learned; grouped by image.

    Args:
        path: ``v2_OpenEnded_mscoco_train2014_questions.json``. annotations: ``v2_mscoco_train2014_annotations.json``.
        image_root: where ``COCO_train2014_000000000009.jpg``, or ``000000000009.jpg``, is; by default the file's folder.
        on_bad: as for :func:`read_jsonl`.

    Raises:
        ValueError: with the question's number, as :func:`read_jsonl`; for a question without annotation; for other objects.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    data = _object(path, "questions")
    rows = _object(Path(annotations), "annotations")["annotations"]
    answers = {str(row.get("question_id")): _listed(row.get("answers", [])) for row in rows}
    prefix = f"COCO_{data.get('data_subtype', '')}_"

    def parse(row: Any) -> list[_Sample]:
        _need(row, "question", "question_id", "image_id")
        if str(row["question_id"]) not in answers:
            raise ValueError(f"question_id {row['question_id']} has no annotation in {annotations}")
        given = answers[str(row["question_id"])]
        for answer in given:
            _need(answer, "answer")
        name = f"{row['image_id']!s:0>12}.jpg"
        file = prefix + name if (root / (prefix + name)).is_file() else name
        words = [answer["answer"] for answer in given]
        return [_answer([file], row["question"], words, id=str(row["question_id"]))]

    return _collect(path, enumerate(data["questions"], 1), parse, root, on_bad, "question")


def read_emoji48() -> dict[str, Samples]:
    """Emoji drawings with their names as captions: train, val_seen, val_new, test_seen and test_new; grouped by code point.

    Raises:
        ValueError: without $PAPERCORE_DATA, in whose folder mmict/emoji48.npz is.
    """
    data = _real("emoji48")
    designs = data["design_names"].tolist()
    points = data["codepoint"].tolist()
    captions = [clean_caption(text) for text in data["caption"].tolist()]
    every = Samples(
        list(data["images"]),
        [(i,) for i in range(len(points))],
        captions,
        [""] * len(points),
        points,
        [f"{point}-{designs[design]}" for point, design in zip(points, data["design"], strict=True)],
        [[caption] for caption in captions],
    )
    parts = ("train", "val_seen", "val_new", "test_seen", "test_new")
    return {part: every.select(np.flatnonzero(data["split"] == part).tolist()) for part in parts}


def read_easyvqa() -> dict[str, Samples]:
    """Pictures of one shape with questions and answers: train and test; grouped by picture.

    Raises:
        ValueError: without $PAPERCORE_DATA, in whose folder mmict/easyvqa64.npz is.
    """
    data = _real("easyvqa64")

    def part(name: str) -> Samples:
        rows, answers = data[f"{name}_image_index"].tolist(), data[f"{name}_answer"].tolist()
        return Samples(
            list(data[f"{name}_images"]),
            [(row,) for row in rows],
            answers,
            data[f"{name}_question"].tolist(),
            [f"{name}-{row}" for row in rows],
            [f"{name}-{row}-{i}" for i, row in enumerate(rows)],
            [[answer] for answer in answers],
        )

    return {"train": part("train"), "test": part("test")}


# Rows


def _parse_row(row: Any) -> list[_Sample]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r:.60}")
    row = {key: value for key, value in row.items() if value is not None}  # tables are often exported with nulls
    key = next((key for key in IMAGES if key in row), None)
    if key is None:
        raise ValueError(f"no {', '.join(IMAGES[:-1])} or {IMAGES[-1]}; it has {', '.join(row) or 'no keys'}")
    images = [_word(image, key) for image in _listed(row[key])]
    if not images:
        raise ValueError(f"{key} is empty; a sample needs at least 1 picture")
    if "messages" in row:
        return _turns(images, row["messages"], "role", "content", all_first=True)
    if "conversations" in row:
        return _turns(images, row["conversations"], "from", "value", all_first=False)
    split = str(row.get("split", "")).lower()
    if split and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r:.60}")
    more: dict[str, Any] = {name: str(row.get(name, "")) for name in ("group", "id")}
    more["split"] = SPLITS.get(split, "")
    if "demos" in row:
        more["demos"] = tuple(str(demo) for demo in _listed(row["demos"]))
    if "question" in row:
        answers = _listed(row["answers"]) if "answers" in row else [row["answer"]] if "answer" in row else []
        return [_answer(images, row["question"], answers, **more)]
    if "captions" in row:
        captions = _listed(row["captions"])
        if not captions:
            raise ValueError("captions is empty")
        return [_caption(images, text, "captions", **more) for text in captions]
    if "text" not in row:
        raise ValueError(f"no text, captions, question, messages or conversations; it has {', '.join(row)}")
    text = _word(row["text"], "text")
    if "|" in text:
        question, answer = split_question(text)
        return [_answer(images, question, [answer], **more)]
    return [_caption(images, text, "text", **more)]


def _turns(images: Sequence[str], turns: Any, role: str, value: str, all_first: bool) -> list[_Sample]:
    """Questions and answers of a conversation; ``all_first``: without marks all images belong to the first question."""
    if not isinstance(turns, list):
        raise ValueError(f"expected a list of messages, got {turns!r:.60}")
    spoken = []
    for turn in turns:
        _need(turn, role, value)
        if turn[role] != "system":
            if _word(turn[role], role) not in ROLES:
                raise ValueError(f"{role} must be one of system, {', '.join(ROLES)}; got {turn[role]!r:.60}")
            spoken.append((ROLES[turn[role]], *_content(turn[value], value)))
    if [who for who, _, _ in spoken] != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise ValueError("a conversation is questions and answers in turn, and ends with an answer")
    if any(marks for who, _, marks in spoken if who == "assistant"):
        raise ValueError(f"an answer has {MARK}; only questions may")
    marks = [marks for who, _, marks in spoken if who == "user"]
    if all_first and not any(marks):
        marks[0] = len(images)
    if sum(marks) != len(images):
        raise ValueError(f"{sum(marks)} {MARK} in the messages, but {len(images)} images; give one for each image")
    samples, start, shown = [], 0, images[:0]
    for count, (_, question, _), (_, answer, _) in zip(marks, spoken[::2], spoken[1::2], strict=True):
        shown, start = images[start : start + count] or shown, start + count
        if not shown:
            raise ValueError("a question comes before the first image")
        samples.append(_answer(shown, question, [answer]) if question else _caption(shown, answer, "the answer"))
    return samples


def _content(content: Any, name: str) -> tuple[str, int]:
    """The text of a message, with single blanks, and the number of its images."""
    parts = []
    for part in [content] if isinstance(content, str) else content if isinstance(content, list) else [None]:
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            parts.append(MARK)
        elif isinstance(part, dict) and part.get("type") == "text":
            parts.append(_word(part.get("text"), name))
        else:
            parts.append(_word(part, name))
    text = " ".join(parts)
    return " ".join(text.replace(MARK, " ").split()), text.count(MARK)


def _caption(images: Sequence[str], text: Any, name: str, **more: Any) -> _Sample:
    caption = clean_caption(_word(text, name))
    if not caption:
        raise ValueError(f"an empty caption: nothing is left of {text!r:.60} after cleaning")
    return _Sample(images, caption, **more)


def _answer(images: Sequence[str], question: Any, answers: Sequence[Any], **more: Any) -> _Sample:
    question = _word(question, "question").strip()
    if not question:
        raise ValueError("an empty question; for a caption give text")
    words = [_word(answer, "answer").strip() for answer in answers]
    if not any(words):
        raise ValueError(f"no answer to {question!r:.60}")
    return _Sample(images, Counter(filter(None, words)).most_common(1)[0][0], question, words, **more)


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r:.60}")
    return value


def _listed(value: Any) -> list[Any]:
    """A list as it is; anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _need(row: Any, *keys: str) -> None:
    for key in keys:
        if not isinstance(row, dict) or key not in row:
            has = ", ".join(row) if isinstance(row, dict) else f"{row!r:.60}"
            raise ValueError(f"no {key}; it has {has or 'no keys'}")


# Files


def _collect(
    path: Path,
    rows: Iterable[tuple[int, Any]],
    parse: Parse,
    image_root: str | Path | None,
    on_bad: OnBad,
    unit: str = "row",
) -> Samples:
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad must be error or skip, got {on_bad!r}")
    root = str(path.parent if image_root is None else image_root)
    images: dict[str, int] = {}
    found: list[tuple[tuple[int, ...], _Sample]] = []
    bad: list[str] = []
    for number, row in rows:
        try:
            samples = parse(row)
            for each in samples:
                for name in each.images:
                    _place(images, os.path.normpath(os.path.join(root, name)))
        except (ValueError, RecursionError) as error:
            bad.append(f"{unit} {number}: {error}")
            if on_bad == "error":
                raise ValueError(f"{path}: {bad[0]}") from None
            continue
        for i, each in enumerate(samples, 1):
            name = (each.id or str(number)) + (f".{i}" if len(samples) > 1 else "")
            frames = tuple(images[os.path.normpath(os.path.join(root, image))] for image in each.images)
            found.append((frames, each._replace(id=name)))
    if bad:
        warnings.warn(f"{path}: left out {len(bad)} {unit}s; the first: {bad[0]}", stacklevel=3)
    if not found:
        raise ValueError(f"{path}: no {unit}s that can be used")
    try:
        return _samples(list(images), found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _place(images: dict[str, int], file: str) -> None:
    if file not in images:
        if not os.path.isfile(file):
            raise ValueError(f"no image {file}; paths start at the file's folder, or at image_root")
        images[file] = len(images)


def _samples(images: list[str], found: Sequence[tuple[tuple[int, ...], _Sample]]) -> Samples:
    captions: dict[tuple[int, ...], list[str]] = {}
    for frames, each in found:
        if not each.question:
            captions.setdefault(frames, []).append(each.text)
    fixed = any(each.demos is not None for _, each in found)
    return Samples(
        images,
        [frames for frames, _ in found],
        [each.text for _, each in found],
        [each.question for _, each in found],
        [each.group or images[frames[0]] for frames, each in found],
        [each.id for _, each in found],
        [list(each.answers) if each.question else captions[frames] for frames, each in found],
        [tuple(each.demos or ()) for _, each in found] if fixed else None,
        [each.split or "train" for _, each in found] if any(each.split for _, each in found) else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from None


def _object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object whose ``keys`` are lists of objects."""
    data = _json(path, _text(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object with {' and '.join(keys)}, got {type(data).__name__}")
    for key in keys:
        rows = data.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: no list {key} of objects; it has {', '.join(data)}")
    return data


def _real(name: str) -> Mapping[str, np.ndarray]:
    """Arrays of a file of the real data."""
    if ENVIRONMENT not in os.environ:
        raise ValueError(f"this data is in ${ENVIRONMENT}/mmict/{name}.npz: set {ENVIRONMENT}")
    with np.load(Path(os.environ[ENVIRONMENT]) / "mmict" / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
