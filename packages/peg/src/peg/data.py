"""Retrieval data: BEIR folders, and rows of a query with its positive and negative texts to train on."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

TEXTS = [datasets.Value("string")]
FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "pos": TEXTS,
        "neg": TEXTS,
        "pos_ids": TEXTS,
        "neg_ids": TEXTS,
        "source": datasets.Value("string"),
    }
)
QUERY, POSITIVE, NEGATIVE = ("query", "anchor", "question"), ("pos", "positive", "answer"), ("neg", "negative")


@dataclass(frozen=True)
class RetrievalData:
    """One split to search in or to mine from.

    Args:
        queries: id to text. corpus: id to text.
        qrels: query id to the gains of its judged documents, by document id; a gain of 0 says judged and not relevant.

    Raises:
        ValueError: if there are no queries or no documents, or if ``qrels`` names one that there is not.

    >>> RetrievalData({"q": "who?"}, {"d": "me"}, {"q": {"d": 1, "e": 1}})
    Traceback (most recent call last):
    ValueError: qrels name 1 document that the corpus lacks: e
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("the corpus is empty")
        if not self.queries:
            raise ValueError("there are no queries")
        judged = dict.fromkeys(document for gains in self.qrels.values() for document in gains)
        _refuse_unknown(self.qrels, self.queries, "query", "queries", "queries lack")
        _refuse_unknown(judged, self.corpus, "document", "documents", "corpus lacks")


def _refuse_unknown(named: Iterable[str], known: Mapping[str, str], one: str, many: str, lack: str) -> None:
    unknown = [id for id in named if id not in known]
    if unknown:
        what = f"1 {one}" if len(unknown) == 1 else f"{len(unknown)} {many}"
        raise ValueError(f"qrels name {what} that the {lack}: {_first(unknown)}")


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")


# BEIR folders


def is_beir(path: str | Path) -> bool:
    """Whether there is a folder with a corpus in it."""
    return _plain_or_gz(Path(path) / "corpus.jsonl") is not None


def read_beir(folder: str | Path, split: str) -> RetrievalData:
    """Read a folder in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``, each plain or ``.gz``.

    A document's text is its title and text, joined by a blank; it may be empty. Only the queries that the split judges are
    kept. Ids may be numbers; they become texts.

    Args:
        folder: the folder. split: train, dev, test, or what else its ``qrels`` are named.

    Raises:
        FileNotFoundError: if a file is missing; for the split's it names the splits there are.
        ValueError: for a line that is not what it should be, an id that occurs twice, qrels that name unknown ids, or an
            empty file: file, line, and what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; BEIR folders hold corpus.jsonl, queries.jsonl and qrels/")
    path = _plain_or_gz(folder / "qrels" / f"{split}.tsv")
    if path is None:
        found = {_stem(file) for file in (folder / "qrels").glob("*.tsv*") if _suffix(file) == ".tsv"}
        raise FileNotFoundError(
            f"{folder}: no qrels/{split}.tsv; it has the splits {', '.join(sorted(found)) or 'none'}"
        )
    qrels = _read_qrels(path)
    corpus = read_corpus(folder)
    queries = _read_texts(folder, "queries", only=qrels)
    try:
        return RetrievalData(queries, corpus, qrels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_corpus(folder: str | Path) -> dict[str, str]:
    """The documents of a BEIR folder, id to text, as :func:`read_beir` reads them."""
    return _read_texts(Path(folder), "corpus")


def _read_texts(folder: Path, name: str, only: Mapping[str, Any] | None = None) -> dict[str, str]:
    """id -> text; ``only`` says which ids to keep."""
    path = _plain_or_gz(folder / f"{name}.jsonl")
    if path is None:
        raise FileNotFoundError(f"{folder}: no {name}.jsonl or {name}.jsonl.gz, which a BEIR folder has")
    texts: dict[str, str] = {}
    empty = True
    for place, row in tqdm(_objects(path), desc=path.name, unit=" lines", delay=2, leave=False):
        empty = False
        id = row.get("_id")
        if not isinstance(id, str | int) or id == "":
            raise ValueError(f"{place}: _id is {id!r}, not a text or a whole number")
        parts = [row.get("title") if name == "corpus" else None, row.get("text")]
        if "text" not in row or not all(part is None or isinstance(part, str) for part in parts):
            raise ValueError(f"{place}: text and title must be texts, and there must be a text")
        if str(id) in texts:
            raise ValueError(f"{place}: _id {id} occurs twice")
        if only is None or str(id) in only:
            texts[str(id)] = " ".join(part for part in parts if part).strip()
            if name == "queries" and not texts[str(id)]:
                raise ValueError(f"{place}: query {id} is empty")
    if empty:
        raise ValueError(f"{path}: no lines")
    return texts


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 3:
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, not query id, document id and gain, parted by tabs"
            )
        query, document, gain = fields
        if number == 1 and not re.fullmatch(r"-?\d+", gain):  # the header
            continue
        if not gain.isdecimal():
            raise ValueError(f"{path}, line {number}: the gain is {gain!r}, not a whole number of at least 0")
        gains = qrels.setdefault(query, {})
        if gains.setdefault(document, int(gain)) != int(gain):
            raise ValueError(f"{path}, line {number}: query {query} and document {document} have another gain above")
    if not qrels:
        raise ValueError(f"{path}: no judgements")
    return qrels


# Training rows


def training_rows(
    data: RetrievalData, negatives: Mapping[str, Sequence[str]] | None = None, source: str = ""
) -> datasets.Dataset:
    """One row for each query: its text, those of its positives (gain above 0) and of its negatives.

    Args:
        data: the split to train on. negatives: query id to document ids, as mining finds them; queries may lack any.
        source: the name of the data, for batches from one source.

    Returns:
        A data set with the columns query (str), pos, neg, pos_ids, neg_ids (lists of str), source (str).

    Raises:
        ValueError: if queries have no positive, or if a negative is not in the corpus; it lists the first five.

    >>> data = RetrievalData({"q": "who?"}, {"a": "me", "b": "there"}, {"q": {"a": 1}})
    >>> training_rows(data, {"q": ["b"]})[0]
    {'query': 'who?', 'pos': ['me'], 'neg': ['there'], 'pos_ids': ['a'], 'neg_ids': ['b'], 'source': ''}
    """
    negatives = negatives or {}
    positives = {q: [d for d, gain in data.qrels.get(q, {}).items() if gain > 0] for q in data.queries}
    lonely = [query for query, found in positives.items() if not found]
    if lonely:
        raise ValueError(
            f"no positive document to train on for {len(lonely)} of {len(data.queries)} queries: {_first(lonely)}"
        )
    unknown = [d for q in data.queries for d in negatives.get(q, ()) if d not in data.corpus]
    if unknown:
        raise ValueError(f"the corpus lacks {len(unknown)} of the negatives: {_first(unknown)}")
    rows = [
        {
            "query": text,
            "pos": [data.corpus[d] for d in positives[query]],
            "neg": [data.corpus[d] for d in negatives.get(query, ())],
            "pos_ids": positives[query],
            "neg_ids": list(negatives.get(query, ())),
            "source": source,
        }
        for query, text in data.queries.items()
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def load_rows(path: str | Path, source: str | None = None, *, cache_dir: str | Path | None = None) -> datasets.Dataset:
    """The rows of :func:`read_rows` as a data set on disk, whatever their number: memory stays bounded.

    Args:
        path, source: as for :func:`read_rows`.
        cache_dir: where to put the data set; by default where the ``datasets`` library puts its own. A file that has not
            changed is not read again.

    Returns:
        A data set with the columns that :func:`training_rows` gives.

    Raises:
        ValueError, OSError: as :func:`read_rows`, and for an empty query or text, or if there are no rows.
    """
    path = str(path)
    arguments = {"path": path, "source": source, "stamp": _stamp(path)}
    try:
        return datasets.Dataset.from_generator(
            _full_rows, FEATURES, cache_dir=None if cache_dir is None else str(cache_dir), gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _full_rows(path: str, source: str | None, stamp: Any) -> Iterator[dict[str, Any]]:
    """Rows without an empty text; ``stamp`` tells the cache whether the files are the ones it has read."""
    empty = True
    for place, row in _rows(path, source):
        empty = False
        for column, texts in (("query", [row["query"]]), ("pos", row["pos"] or [""]), ("neg", row["neg"])):
            if not all(text.strip() for text in texts):
                raise ValueError(f"{place}: {column} is empty or has an empty text; peg clean removes those")
        yield row
    if empty:
        raise ValueError(f"{path}: no rows")


def read_rows(path: str | Path, source: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of queries, positives and negatives, one by one, with the columns that :func:`training_rows` gives.

    Args:
        path: a ``.jsonl`` or ``.json`` file (plain or ``.gz``) of lines ``{"query": str, "pos": [str], "neg": [str]}``, the
            format of FlagEmbedding; a folder of such files; a folder that ``Dataset.save_to_disk`` wrote; or
            ``hub:NAME[:CONFIG]``, whose split train is read. Instead of query there may be anchor or question, of pos
            positive or answer, of neg negative or negative_1, negative_2, ...; for a list of one text, the text alone.
            Optional are neg, pos_ids, neg_ids and source. Other columns are passed over.
        source: the name of the data; by default each row's own, or else the name of its file without the suffix.

    Raises:
        ValueError: for a line or row that is not so: file, line, and what is wrong. Texts may be empty.
        OSError: for a file that is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_rows(f"{folder}/trivia.jsonl", [{"query": "who?", "pos": ["me"]}])
    ...     list(read_rows(f"{folder}/trivia.jsonl"))
    [{'query': 'who?', 'pos': ['me'], 'neg': [], 'pos_ids': [], 'neg_ids': [], 'source': 'trivia'}]
    """
    return (row for _, row in _rows(str(path), source))


def _rows(path: str, source: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row); the place is for messages."""
    if path.startswith("hub:") or _is_saved(path):
        name = path.removeprefix("hub:").partition(":")[0] if path.startswith("hub:") else Path(path).name
        for number, row in enumerate(_dataset(path), 1):
            place = f"{path}, row {number}"
            yield place, _row(row, place, source, name)
    else:
        for file in _files(path):
            for place, row in _objects(file):
                yield place, _row(row, place, source, _stem(file))


def _row(given: Mapping[str, Any], place: str, source: str | None, name: str) -> dict[str, Any]:
    columns = {"query": _find(given, QUERY), "pos": _find(given, POSITIVE), "neg": _find(given, NEGATIVE)}
    for column, names in (("query", QUERY), ("pos", POSITIVE)):
        if columns[column] is None:
            raise ValueError(
                f"{place}: no {column} (nor {' or '.join(names[1:])}); it has {', '.join(given) or 'nothing'}"
            )
    query = given[columns["query"] or ""]
    if not isinstance(query, str):
        raise ValueError(f"{place}: {columns['query']} is a {type(query).__name__}, not a text")
    negatives = [column for column in given if re.fullmatch(r"negative_\d+", column)]
    negatives = [columns["neg"]] if columns["neg"] else negatives
    row = {
        "query": query,
        "pos": _texts(given, columns["pos"] or "", place),
        "neg": [text for column in negatives for text in _texts(given, column, place)],
        "pos_ids": _texts(given, "pos_ids", place, ids=True),
        "neg_ids": _texts(given, "neg_ids", place, ids=True),
        "source": str(given.get("source") or name) if source is None else source,
    }
    if not row["pos"]:
        raise ValueError(f"{place}: {columns['pos']} has no text")
    for side in ("pos", "neg"):
        if row[f"{side}_ids"] and len(row[f"{side}_ids"]) != len(row[side]):
            raise ValueError(f"{place}: {len(row[f'{side}_ids'])} {side}_ids for {len(row[side])} texts in {side}")
    return row


def _find(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _texts(row: Mapping[str, Any], column: str, place: str, ids: bool = False) -> list[str]:
    values = row.get(column)
    values = [] if values is None else values if isinstance(values, list) else [values]
    for value in values:
        if not isinstance(value, str | int if ids else str):
            raise ValueError(f"{place}: {column} holds a {type(value).__name__}, not a text")
    return [str(value) for value in values]


def _files(path: str) -> list[Path]:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder; data sets of the Hub are called hub:NAME")
    if not Path(path).is_dir():
        if _suffix(Path(path)) not in (".jsonl", ".json"):
            raise ValueError(f"{path}: not a .jsonl or .json file, plain or .gz")
        return [Path(path)]
    files = sorted(file for file in Path(path).iterdir() if _suffix(file) in (".jsonl", ".json"))
    if not files:
        raise FileNotFoundError(f"{path}: a folder without .jsonl or .json files")
    return files


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json"))


def _dataset(path: str) -> datasets.Dataset:
    """The split train of a data set of the ``datasets`` library."""
    if path.startswith("hub:"):
        name, _, config = path.removeprefix("hub:").partition(":")
        parts = datasets.load_dataset(name, config or None)
    else:
        parts = datasets.load_from_disk(path)
    if isinstance(parts, datasets.Dataset):
        return parts
    if "train" not in parts:
        raise ValueError(f"{path}: no split train; it has {', '.join(parts)}")
    return parts["train"]


def _stamp(path: str) -> Any:
    """What changes when the data do."""
    if path.startswith("hub:") or _is_saved(path):
        return _dataset(path)._fingerprint
    return tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(path))


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as lines of JSON, compressed if the name ends in ``.gz``.

    They are written one by one under a temporary name, which the file loses when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            # Without its name and time the same rows give the same bytes.
            out = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else file
            with out:
                for row in rows:
                    out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Files


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.exists()), None)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of those that are not blank."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = raw[error.start]
                    raise ValueError(f"{path}, line {number}: not UTF-8 (byte {byte:#04x}); save it as UTF-8") from None
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of JSON; the place is for messages."""
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place}: half of a surrogate pair, which is no character") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a {type(row).__name__} where an object was expected")
        yield place, row
