"""What synthetic crops say: words, numbers and strings without meaning, in the cases and with the marks of real signs."""

from __future__ import annotations

import gzip
import itertools
import string
from collections.abc import Sequence
from pathlib import Path
from random import Random

_COMMON = """
a about access all an and apartment are area at avenue bank bar beach best big blue book bridge bus by cafe call car care castle
center central change children church city class clean close club coffee college come court credit cross day dental design diner
door down drink drive drug east emergency enjoy enter exit express family farm fast fire first fish flowers food for free fresh
from furniture garden gift gold good grand great green grill group hair hall happy health help here high home hospital hotel house
ice in international is it jewelry keep kitchen lake lane law left library life light limited line live love made main market
media medical menu mobile money music national new news next night no north now of office oil old on one only open or organic our
out paint park parking pay people pharmacy phone photo pizza place plan play please police post power press price public radio red
rent restaurant right river road royal safety sale school sea service shoes shop show sign smart social south special sport spring
star state station stop store street studio summer super supply taxi tea team test thai the theatre this time to top tour town
travel tree union united university up video view visit vote want warning water way we welcome west white wine with wood work
world year you your zone
"""
_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sl sp st str t th tr v w y z"
_VOWELS, _CODAS = "a e i o u ai ea ee oo ou", "b ck d g l ll m n nd ng p r rd s ss st t tt x"


def builtin_words() -> list[str]:
    """Common English words of signs, and 2,000 that can be pronounced but mean nothing; always the same ones."""
    random = Random(0)
    codas = ["", "", "", *_CODAS.split()]
    syllables = ["".join(parts) for parts in itertools.product(_ONSETS.split(), _VOWELS.split(), codas)]
    invented = ["".join(random.sample(syllables, random.choice((1, 2, 2, 3)))) for _ in range(2000)]
    return _COMMON.split() + invented


def read_words(path: str | Path) -> list[str]:
    """Words of a text file in UTF-8 (one a line, or several between white space), or of one packed by gzip (.gz).

    Raises:
        ValueError: if there are none, or it is not text.
    """
    content = Path(path).read_bytes()
    try:
        words = (gzip.decompress(content) if Path(path).suffix == ".gz" else content).decode().split()
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a text of words in UTF-8 ({error})") from None
    if not words:
        raise ValueError(f"{path}: no words in it")
    return words


class Vocabulary:
    """Draws what a crop says: 72 % words, 14 % numbers, 10 % strings of random characters, 4 % two words joined (ours).

    Words are drawn with weights 1 / length ** 3, which gives the lengths of scene text (median 5) from a dictionary (median 8).
    44 % are UPPER, 27 % Capital, 24 % lower, 5 % miXEd; 13 % of all texts get marks, as in ``WE'VE``, ``$4.00`` or ``END.``.

    Args:
        words: at least one. None: :func:`builtin_words`.

    Raises:
        ValueError: for an empty list or an empty word.
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = builtin_words() if words is None else list(words)
        if not self.words or not all(self.words):
            raise ValueError("the list of words is empty, or a word in it is: give words of one character or more")
        self._weights = list(itertools.accumulate(max(len(word), 2) ** -3 for word in self.words))

    def _word(self, random: Random) -> str:
        return random.choices(self.words, cum_weights=self._weights)[0]

    def draw(self, random: Random) -> str:
        """One text, case and marks included."""
        kind = random.random()
        if kind < 0.72:
            text = _in_some_case(random, self._word(random))
        elif kind < 0.86:
            text = "".join(random.choices(string.digits, k=random.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))))
        elif kind < 0.96:
            letters = string.ascii_letters if random.random() < 0.4 else string.ascii_uppercase + string.digits
            text = "".join(random.choices(letters, k=random.randint(1, 8)))
        else:
            first, second = self._word(random), self._word(random)
            text = _in_some_case(random, first) + random.choice(("", "-", ".", "&", "/")) + second
            text = text.upper() if random.random() < 0.3 else text
        return _marked(random, text) if random.random() < 0.13 else text


def _in_some_case(random: Random, word: str) -> str:
    kind = random.random()
    if kind < 0.44:
        return word.upper()
    if kind < 0.71:
        return word.capitalize()
    if kind < 0.95:
        return word.lower()
    return "".join(random.choice((c.lower(), c.upper())) for c in word)


def _marked(random: Random, text: str) -> str:
    kind = random.random()
    if kind < 0.6:
        return text + random.choice((".", ".", ".", ",", "!", "?", ":", '"', "'", ")", "%", "...", "!!"))
    if kind < 0.75:
        return random.choice(('"', "'", "(", "$", "#", "@", "-")) + text
    place = random.randint(1, max(1, len(text) - 1))
    mark = random.choice((".", ".", ",", ":", "-")) if text[0].isdigit() else random.choice(("'", "'", "-", "."))
    return text[:place] + mark + text[place:]
