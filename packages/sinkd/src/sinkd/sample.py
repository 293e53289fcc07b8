"""The embedded sample: which part of the standard library does a piece of its documentation come from?"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Metaspace, Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sinkd.tasks import Examples, generic

# The modules of each class; those that a Python version lacks are passed over.
TOPICS = {
    "concurrency": "asyncio concurrent multiprocessing queue subprocess threading",
    "files": "_pyio bz2 gzip lzma pathlib shutil tarfile tempfile zipfile",
    "introspection": "ast enum importlib inspect pydoc typing",
    "logging": "logging",
    "mail": "email imaplib mailbox mimetypes poplib smtplib",
    "numbers": "_pydatetime _pydecimal calendar datetime fractions ipaddress random statistics",
    "testing": "bdb doctest pdb unittest",
    "web": "ftplib html http socketserver ssl urllib wsgiref xmlrpc",
}
TASK = generic("sample", tuple(TOPICS))
MOST, FEWEST_WORDS, TEST_SHARE = 350, 5, 0.2


def sample(seed: int) -> tuple[Examples, Examples]:
    """Training and test texts (about 2,100 and 500, in 8 classes); the seed decides which is which.

    A text is the first paragraph of the docstring of a class, function or method, read from the source: nothing is imported.
    Words that contain a name of the class's modules are taken out, and so are texts that occur in two classes. A logistic
    regression on bags of words gets about 71 % of the test texts right.

    Raises:
        FileNotFoundError: if the standard library is installed without its sources.
    """
    rows = _corpus()
    order = np.random.default_rng([seed, 0]).permutation(len(rows)).tolist()
    everything = Examples(TASK, [t for t, _ in rows], None, [y for _, y in rows], list(range(len(rows))))
    held_out = round(TEST_SHARE * len(rows))
    return everything.select(order[held_out:]), everything.select(order[:held_out])


@cache
def _corpus() -> tuple[tuple[str, int], ...]:
    """Every text with its label; which ones there are does not depend on a seed."""
    texts = {topic: sorted(set(_paragraphs(modules.split()))) for topic, modules in TOPICS.items()}
    occurs = Counter(text for paragraphs in texts.values() for text in paragraphs)
    rng = np.random.default_rng(0)
    rows: list[tuple[str, int]] = []
    for label, paragraphs in enumerate(texts.values()):
        own = [text for text in paragraphs if occurs[text] == 1]
        rows += [(own[i], label) for i in sorted(rng.permutation(len(own))[:MOST].tolist())]
    return tuple(rows)


def _paragraphs(modules: Sequence[str]) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    found = [file for m in modules for file in (library / f"{m}.py", *sorted((library / m).rglob("*.py")))]
    # Some versions keep a module's tests inside it.
    files = [file for file in found if file.exists() and "test" not in file.relative_to(library).parts]
    if not files:
        raise FileNotFoundError(f"{library}: no sources of {', '.join(modules)}, which the sample is made of")
    names = "|".join(module.strip("_") for module in modules)
    for file in files:
        for definition in _definitions(ast.parse(file.read_bytes())):
            paragraph = (ast.get_docstring(definition) or "").split("\n\n")[0]
            text = " ".join(re.sub(rf"\S*({names})\S*", " ", paragraph, flags=re.IGNORECASE).split())
            if len(text.split()) >= FEWEST_WORDS and ">>>" not in text:
                yield text


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # the far more numerous expressions define nothing
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _definitions(child)


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of byte pairs (BPE), which serves BERT-, T5- and GPT-like models.

    It frames texts with [CLS], which is also the beginning of a text, and [SEP], its end; padding is token 0.

    >>> tokenizer = train_tokenizer(["Close the file.", "Open the file."], vocab_size=60)
    >>> tokenizer.decode(tokenizer("The file", "close").input_ids)
    '[CLS] the file[SEP] close[SEP]'
    """
    pad, unknown, first, last, mask = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(BPE(unk_token=unknown))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    # Of the library's trainers only BPE without "##" gives the same vocabulary in every process; "▁" marks a word's start.
    tokenizer.pre_tokenizer = InTurn([WhitespaceSplit(), Metaspace(), Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, special.index(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last, mask_token=mask,
        bos_token=first, eos_token=last,
    )  # fmt: skip
