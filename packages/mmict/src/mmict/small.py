"""A small pretrained model where none can be had: vision encoder, language model and hub from scratch, for CPUs (ours).

The paper tunes BLIP-2, whose parts have seen millions of pictures. This stands for it: three short trainings on the training
samples alone. The language model sees their texts, as any language model has seen text, and no picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from papercore.lab.files import write_json
from papercore.lab.training import resumable
from papercore.ops import seed_everything
from PIL import Image
from safetensors.torch import save_file
from scipy import sparse
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mmict.checkpoints import quiet_loading
from mmict.corpus import Corpus, prepare
from mmict.dialogs import make_dialogs, pad
from mmict.hub import MHub, MHubConfig
from mmict.lm import load_lm
from mmict.model import PLAIN, VARIANTS, MMICTModel, Variant
from mmict.processor import Processor
from mmict.samples import Samples
from mmict.texts import IMAGE_PROMPTS, QUESTION, VIDEO_PROMPTS, demonstration_text, prompt
from mmict.trainer import MMICTTrainingConfig, PartTrainer, Rows
from mmict.vision import MEAN, STD, load_vision

PAD, END, UNKNOWN, CHUNK, START, STOP = SPECIAL = ("<pad>", "</s>", "<unk>", "<|endofchunk|>", "[CLS]", "[SEP]")


@dataclasses.dataclass(frozen=True)
class SmallOptions:
    """Sizes and lengths. steps: of the encoder, the language model and the hub; queries, layers and width: of the hub."""

    steps: tuple[int, ...] = (600, 700, 500)
    image_size: int = 48
    patch: int = 8
    vision_width: int = 96
    width: int = 128
    queries: int = 8
    layers: int = 4
    vocabulary: int = 6000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Origin:
    """What parts were made of, as a hash: else a language model might be used that has read what is test data now."""

    texts: str

    @classmethod
    def of(cls, samples: Samples, texts: Sequence[str]) -> Origin:
        """Of these samples, by their ids and texts, and more texts."""
        read = json.dumps([samples.ids, samples.questions, samples.texts, list(texts)])
        return cls(hashlib.sha256(read.encode()).hexdigest()[:16])


def small_model(
    folder: Path, samples: Samples, texts: Sequence[str] = (), options: SmallOptions | None = None
) -> MMICTModel:
    """Train the parts in ``folder``, or read them there: an encoder in ``vision``, a language model in ``lm``, all in ``warm``.

    Args:
        samples: to train on. texts: more texts for the language model.

    Raises:
        ValueError: for parts in ``folder`` that were made of other samples or texts, or with other options.
    """
    options = options or SmallOptions()
    resumable(folder, options, Origin.of(samples, texts))
    if not (folder / "vision" / "config.json").exists():
        _train_vision(folder, samples, options)
    if not (folder / "lm" / "config.json").exists():
        _train_lm(folder, samples, texts, options)
    if not (folder / "warm" / "config.json").exists():
        model = cold_model(folder, options)
        corpus = prepare(model, samples, folder / "features.npy")
        save = partial(model.save_pretrained, folder / "warm")
        _fit(WarmUp(model, corpus), folder / "warming", options, options.steps[2], 24, save)
    return MMICTModel.from_pretrained(folder / "warm")


def cold_model(folder: Path, options: SmallOptions) -> MMICTModel:
    """The small encoder and language model, joined by a hub that knows nothing."""
    lm, vision = load_lm(str(folder / "lm")), load_vision(str(folder / "vision"))
    processor = Processor.from_pretrained(folder / "tokenizers")
    torch.manual_seed(options.seed)
    hub = MHub(
        MHubConfig(
            vision_width=vision.width, lm_width=options.width, queries=options.queries, hidden=options.width,
            layers=options.layers, heads=4, intermediate=4 * options.width, vocabulary=len(processor.hub_tokenizer),
            positions=64,
        )
    )  # fmt: skip
    return MMICTModel(vision, hub, lm, processor)


def word_tokenizers(texts: Sequence[str], most: int) -> tuple[Any, Any]:
    """Of whole words, most frequent first, one vocabulary for both: with the marks of the hub, and of the language model."""
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?:,.]"), behavior="isolated")]
    )
    always = " ".join([*IMAGE_PROMPTS, *VIDEO_PROMPTS, QUESTION.format("")])
    counts = Counter(word for text in [always, *texts] for word, _ in pieces.pre_tokenize_str(text.lower()))
    first = [word for word, _ in pieces.pre_tokenize_str(always.lower())]
    words = list(dict.fromkeys([*first, *(word for word, _ in counts.most_common(most))]))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *words])}

    def made(before: str | None, after: str) -> Any:
        inner = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pieces
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, [before, "$A", after])),
            special_tokens=[(mark, vocab[mark]) for mark in (before, after) if mark],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token=PAD, eos_token=after, unk_token=UNKNOWN, bos_token=before,
            extra_special_tokens=[CHUNK],
        )  # fmt: skip

    return made(START, STOP), made(None, END)


def words_of(texts: Sequence[str], least: int = 1) -> sparse.csr_matrix:
    """Which of the words that ``least`` texts have is in which text: (texts, words) of 0 and 1."""
    found = [sorted(set(re.findall(r"[a-z0-9']+", text.lower()))) for text in texts]
    counts = Counter(word for words in found for word in words)
    place = {word: i for i, word in enumerate(word for word, count in counts.items() if count >= least)}
    pairs = [(i, place[word]) for i, words in enumerate(found) for word in words if word in place]
    rows, columns = np.array(pairs, int).reshape(-1, 2).T
    return sparse.csr_matrix((np.ones(len(pairs), np.float32), (rows, columns)), (len(texts), len(place)))


class Stage(nn.Module):
    """A module that learns from ``count`` numbered things. Its checkpoints are what it trains."""

    count: int

    def forward(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of these rows, and its parts."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """All that a stopped training needs to go on."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        kept = {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}
        save_file(kept, str(Path(folder) / "model.safetensors"), {"format": "pt"})


class Naming(Stage):
    """The encoder learns which words of its texts belong to a picture."""

    def __init__(self, samples: Samples, options: SmallOptions) -> None:
        super().__init__()
        width, size = options.vision_width, options.image_size
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=4,
                image_size=size, patch_size=options.patch,
            )
        )  # fmt: skip
        texts = [""] * len(samples.images)
        for frames, text in zip(samples.frames, samples.texts, strict=True):
            for image in frames:
                texts[image] += f" {text}"
        often = words_of(texts, least=3)
        self.words = often if often.shape[1] else words_of(texts)
        self.head = nn.Linear(width, self.words.shape[1])
        self.count = len(texts)
        resized = [
            Image.fromarray(samples.open(i)).resize((size, size), Image.Resampling.BICUBIC) for i in range(self.count)
        ]
        self.pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)

    def forward(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of each word, from the mean over the tokens."""
        device = self.head.weight.device
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (self.pictures[rows].to(device).float() / 255 - mean) / std
        logits = self.head(self.vision(pixels).last_hidden_state.mean(1))
        wanted = torch.from_numpy(self.words[rows.numpy()].toarray()).to(device)
        return F.binary_cross_entropy_with_logits(logits, wanted), {}


class Completing(Stage):
    """The language model learns to write a text from some of its words and a prompt, at times after related texts.

    This is where it learns to use what stands before a query: half of the time there are none to four related texts (those that
    share the most words), each ended by the end-of-chunk token.
    """

    def __init__(self, lm: Any, processor: Processor, samples: Samples, texts: Sequence[str]) -> None:
        super().__init__()
        self.lm, self.processor = lm, processor
        answers: dict[str, list[str]] = {}
        for group, text in zip(samples.groups, samples.texts, strict=True):
            answers.setdefault(group, []).append(text)
        shown: dict[str, tuple[str, str, str]] = {}  # what a demonstration reads -> question, text, hints
        for group, text, question in zip(samples.groups, samples.texts, samples.questions, strict=True):
            hints = " ".join(dict.fromkeys(answers[group])) if question else text
            shown.setdefault(demonstration_text(text, question), (question, text, hints))
        for text in texts:
            shown.setdefault(text, ("", text, text))
        self.count = len(shown)
        self.shown, self.targets = processor.lm(list(shown)), processor.targets([text for _, text, _ in shown.values()])
        self.questions = [question for question, _, _ in shown.values()]
        self.hints = [hints.split() for _, _, hints in shown.values()]
        self.related = _related(list(shown))
        self.chunk = processor.lm_tokenizer.convert_tokens_to_ids(CHUNK)

    def forward(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the texts."""
        random = Random(int(torch.randint(2**62, (), generator=generator)))
        before: list[list[int]] = []
        for row in rows.tolist():
            related = list(self.related[row])
            chunks = random.sample(related, min(random.randint(0, 4), len(related))) if random.random() < 0.5 else []
            before.append([token for other in chunks for token in [*self.shown[other], self.chunk]])
        kept = [" ".join(word for word in self.hints[row] if random.random() < 0.4) for row in rows.tolist()]
        asked = [prompt(self.questions[row], False, random.randrange(len(IMAGE_PROMPTS))) for row in rows.tolist()]
        read = self.processor.lm([f"{hints} {text}" for hints, text in zip(kept, asked, strict=True)])
        ids, mask = pad([a + b for a, b in zip(before, read, strict=True)], self.processor.pad)
        labels = pad([self.targets[row] for row in rows.tolist()], -100)[0]
        device = self.lm.device
        found = self.lm(input_ids=ids.to(device), attention_mask=mask.long().to(device), labels=labels.to(device))
        return found.loss, {}


class WarmUp(Stage):
    """The hub learns to be read by the language model, both of its kinds of rows; all arms of a comparison start from it.

    ``L = L_caption + L_copy + L_align``: write the text from uni-modal visual features, as BLIP-2 does; write it from the pair's
    own visual-guided textual features; bring these near the language model's embeddings of the same tokens (one vocabulary).
    """

    def __init__(self, model: MMICTModel, corpus: Corpus) -> None:
        super().__init__()
        self.model, self.corpus, self.count = model, corpus, len(corpus)

    def forward(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """All three."""
        model, chosen = self.model, rows.tolist()
        choices = torch.randint(len(IMAGE_PROMPTS), rows.shape, generator=generator).tolist()
        alone = make_dialogs(self.corpus, chosen, self.corpus, [[]] * len(rows), choices).to(model.device)
        itself = make_dialogs(self.corpus, chosen, self.corpus, [[row] for row in chosen], choices).to(model.device)
        assert itself.labels is not None
        context = model.context(itself, VARIANTS["vt_text"], Variant(raw=True))
        ids = itself.hub_ids[~itself.query]
        words = itself.hub_mask[~itself.query] & (ids >= len(SPECIAL))
        at = context.starts[:, None] + torch.arange(
            ids.shape[1], device=ids.device
        )  # a dialog begins with its text's rows
        terms = {
            "caption": model(alone, asked=PLAIN).loss,
            "copy": model.answer(context, itself.labels).loss,
            "align": F.mse_loss(context.rows[at[words]], model.lm.get_input_embeddings()(ids[words])),
        }
        return torch.stack(list(terms.values())).sum(), terms


class StageTrainer(PartTrainer):
    """The engine for a :class:`Stage`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What the stage says."""
        loss, terms = model(inputs["rows"].cpu(), self.batch_generator())
        self.note(**terms)
        return (loss, {}) if return_outputs else loss


def _fit(stage: Stage, folder: Path, options: SmallOptions, steps: int, batch: int, save: Callable[[], None]) -> None:
    """Train a stage in ``folder``, or go on with it; of several processes one saves what it made, before another reads it."""
    config = MMICTTrainingConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, max_grad_norm=1.0,
        warmup_steps=0.1, seed=options.seed, save_strategy="steps", save_steps=0.5,
    )  # fmt: skip
    checkpoint = resumable(folder, config, options)
    StageTrainer(model=stage, args=config, train_dataset=Rows(stage.count)).train(resume_from_checkpoint=checkpoint)
    with config.main_process_first(local=False):
        if config.process_index == 0:
            save()


def _train_vision(folder: Path, samples: Samples, options: SmallOptions) -> None:
    seed_everything(options.seed)
    stage = Naming(samples, options)
    size = {"height": options.image_size, "width": options.image_size}

    def save() -> None:
        write_json(
            folder / "vision" / "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor", "size": size, "image_mean": MEAN, "image_std": STD},
        )
        with quiet_loading():
            stage.vision.save_pretrained(str(folder / "vision"))

    _fit(stage, folder / "naming", options, options.steps[0], 32, save)


def _train_lm(folder: Path, samples: Samples, texts: Sequence[str], options: SmallOptions) -> None:
    seed_everything(options.seed)
    read = [demonstration_text(*pair) for pair in zip(samples.texts, samples.questions, strict=True)]
    processor = Processor(*word_tokenizers([*read, *texts], options.vocabulary))
    lm = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(processor.lm_tokenizer), d_model=options.width, d_kv=options.width // 4, d_ff=2 * options.width,
            num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    lm.config.decoder_start_token_id = lm.generation_config.decoder_start_token_id = 0

    def save() -> None:
        processor.save_pretrained(folder / "tokenizers")
        with quiet_loading():
            lm.save_pretrained(str(folder / "lm"))

    _fit(Completing(lm, processor, samples, texts), folder / "completing", options, options.steps[1], 24, save)


def _related(texts: Sequence[str], most: int = 8) -> np.ndarray:
    """(texts, most): for each the others that are most like it by their words, rare words counting more."""
    words = words_of(texts)
    words = words @ sparse.diags(np.log(len(texts) / np.maximum(1, words.sum(0).A1)))
    words = sparse.diags(1 / np.maximum(1e-6, np.sqrt(words.multiply(words).sum(1)).A1)) @ words
    most = min(most, len(texts) - 1)
    found = []
    for start in range(0, len(texts), 512):
        like = (words[start : start + 512] @ words.T).toarray()
        like[np.arange(len(like)), np.arange(start, start + len(like))] = -1
        found.append(np.argpartition(-like, most, axis=1)[:, :most])
    return np.concatenate(found)
