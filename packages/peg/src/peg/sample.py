"""The embedded sample: from the first sentence of a docstring of the standard library, find the rest of it."""

from __future__ import annotations

import ast
import gc
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from peg.data import RetrievalData

SHARES = {"test": 0.2, "dev": 0.1}  # of the pairs; the rest is for training
LEFT_OUT = {
    "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
FIRST_SENTENCE = re.compile(r"(.+?[.!?])\s+(?=[A-Z0-9*`'\"(\[-])(.*)", re.DOTALL)
FEWEST_QUERY_WORDS, FEWEST_DOCUMENT_WORDS = 4, 8


class _Pair(NamedTuple):
    module: str
    symbol: str
    query: str
    document: str


def sample(seed: int = 0) -> dict[str, RetrievalData]:
    """Data sets train, dev and test over one corpus of about 2,700 documents; the seed decides which module is in which.

    A query is the first sentence of the docstring of a class, function or method, and its document is the rest. Docstrings
    are read from the source: nothing is imported. The modules of dev and test, about a tenth and a fifth of the pairs, are
    not trained on. BM25 has an nDCG@10 of about 0.4 on the queries of test.

    Raises:
        FileNotFoundError: if the standard library is installed without its sources.

    >>> data = sample()
    >>> list(data)
    ['train', 'dev', 'test']
    >>> data["test"].corpus["textwrap.shorten"][:50]
    'The text first has its whitespace collapsed. If it'
    """
    pairs = _pairs()
    sizes = Counter(pair.module for pair in pairs)
    shuffled = np.random.default_rng(seed).permutation(sorted(sizes)).tolist()
    split_of = dict.fromkeys(sizes, "train")
    for split, share in SHARES.items():
        free = round(share * len(pairs))
        for module in shuffled:
            if split_of[module] == "train" and sizes[module] <= free:
                split_of[module] = split
                free -= sizes[module]
    # Within a module, the same sentence may open several docstrings, and the same rest may follow several sentences.
    query_ids: dict[str, str] = {}
    document_ids: dict[str, str] = {}
    queries: dict[str, dict[str, str]] = defaultdict(dict)
    qrels: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for module, symbol, query, document in pairs:
        query_id = query_ids.setdefault(query, f"{symbol}?")
        queries[split_of[module]][query_id] = query
        qrels[split_of[module]].setdefault(query_id, {})[document_ids.setdefault(document, symbol)] = 1
    corpus = {id: document for document, id in document_ids.items()}
    return {split: RetrievalData(queries[split], corpus, qrels[split]) for split in ("train", "dev", "test")}


@cache
def _pairs() -> tuple[_Pair, ...]:
    """Every query with its document, without texts that occur in two modules; they do not depend on a seed."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles; looking for some would double the time
    try:
        pairs = list({pair.symbol: pair for pair in _read()}.values())
    finally:
        if collecting:
            gc.enable()
    modules: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        modules[pair.query].add(pair.module)
        modules[pair.document].add(pair.module)
    return tuple(pair for pair in pairs if len(modules[pair.query]) == len(modules[pair.document]) == 1)


def _read() -> Iterator[_Pair]:
    library = Path(sysconfig.get_path("stdlib"))
    entries = [entry for entry in sorted(library.iterdir()) if entry.name not in LEFT_OUT] if library.is_dir() else []
    files = [file for entry in entries for file in ([entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")))]
    if not files:
        raise FileNotFoundError(f"{library}: no sources of the standard library, which the sample is made of")
    for file in files:
        parts = file.relative_to(library).with_suffix("").parts
        source = file.read_bytes()
        if LEFT_OUT & set(parts) or not source.count(b'"""'):
            continue
        for name, definition in _definitions(ast.parse(source)):
            docstring = ast.get_docstring(definition) or ""
            query, document = _split(docstring)
            if (
                len(query.split()) >= FEWEST_QUERY_WORDS
                and len(document.split()) >= FEWEST_DOCUMENT_WORDS
                and "->" not in query  # a signature
            ):
                symbol = ".".join([*(part for part in parts if part != "__init__"), name])
                yield _Pair(parts[0].strip("_"), symbol, query, document)


def _split(docstring: str) -> tuple[str, str]:
    """(first sentence, the rest), white space made blanks; the first paragraph, if it has no end of a sentence in it.

    >>> _split("Close the file. It cannot\\n    be read again.\\n\\nMore.")
    ('Close the file.', 'It cannot be read again. More.')
    """
    paragraph, _, rest = docstring.partition("\n\n")
    if found := FIRST_SENTENCE.fullmatch(paragraph):
        paragraph, rest = found[1], f"{found[2]} {rest}"
    return " ".join(paragraph.split()), " ".join(rest.split())


def _definitions(
    node: ast.AST, within: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(dotted name, definition) of every class, function and method."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield within + child.name, child
            yield from _definitions(child, f"{within}{child.name}.")
        elif isinstance(child, ast.stmt):  # the far more numerous expressions define nothing
            yield from _definitions(child, within)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of byte pairs (BPE) for a BERT-like encoder: ``[CLS] text [SEP]``, padding is token 0.

    The same texts give the same vocabulary in every process.

    >>> tokenizer = train_tokenizer(["Close the file.", "Open the file."], vocab_size=60)
    >>> tokenizer.tokenize("The files", add_special_tokens=True)
    ['[CLS]', 'the', 'file', 's', '[SEP]']
    """
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    # Of the library's trainers only this one, and without a mark for pieces inside a word, is the same in every process.
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
