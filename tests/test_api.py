"""The public names: each exists, and its docstring has an example, which the doctests of the suite run."""

import doctest
import importlib
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

NAMES = {  # promised to users, by module
    "papercore.ops": "sinkhorn SinkhornResult sinkhorn_cost sinkhorn_divergence pairwise_lp balanced_assignment info_nce "
    "soft_cross_entropy soft_kl negatives_log_softmax soften gather_features MemoryBank MemoryBank.enqueue pick_device "
    "autocast_dtype peak_memory seed_everything",
    "papercore.lab.study": "Study",
    "sinkd": "SinKDLoss SinKDLoss.paper kl reverse_kl js generalized_jsd tvd sample_l1 select_token_logits SinKDConfig "
    "SinKDTrainer",
    "softclip": "SoftClipLoss softclip_loss frozen_teacher_soft_clip_loss SoftClipModel RoiTagProvider SoftClipConfig "
    "SoftClipTrainer retrieval_recall zero_shot_accuracy",
    "mmict": "MHubConfig MHub MMICTConfig MMICTModel MMICTModel.from_parts MMICTModel.from_blip2 MMICTModel.generate "
    "MMICTModel.save_pretrained MMICTModel.from_pretrained DemonstrationSampler MMICTTrainingConfig MMICTTrainer bleu rouge_l "
    "cider_d vqa_accuracy",
    "iqa_distill": "RKIQT RKIQT.from_pretrained RKIQT.score NARTeacher MaskedQualityDistillation InductiveBiasRegularization "
    "Involution IQAConfig IQATrainer load_metric srcc krcc plcc fit_logistic",
    "peg": "progressive_info_nce HardnessSchedule ProgressiveContrastiveLoss PegConfig PegTrainer mine_hard_negatives "
    "retrieval_metrics",
    "disco": "DisCo DisCoLoss ContrastiveHead seed_loss rkd_loss DisCoConfig DisCoTrainer knn_accuracy linear_probe load_teacher",
    "eclstm": "ECLSTMCell ECLSTM ECLSTMRegressor ECLSTMRegressor.from_pretrained load_keras_weights CMAPSS RunToFailure "
    "piecewise_rul rul_score hyperband ECLSTMConfig ECLSTMTrainer",
    "dsan": "DSAN DSAN.from_pretrained DSAN.read TextAttention DoubleSupervisionLoss CTCCharset ctc_greedy ctc_beam ctc_lexicon "
    "SyntheticWords word_accuracy DSANConfig DSANTrainer",
}
VERBS = {  # the same of the command lines
    "papercore.lab.__main__": "list reproduce",
    "sinkd.cli": "train eval reproduce cache-teacher",
    "softclip.cli": "train eval reproduce",
    "mmict.cli": "train eval caption answer reproduce",
    "iqa_distill.cli": "train eval score teacher export reproduce",
    "peg.cli": "train eval encode mine clean search reproduce",
    "disco.cli": "pretrain-teacher train distill eval export reproduce",
    "eclstm.cli": "train eval predict tune reproduce",
    "dsan.cli": "train eval read synth convert reproduce",
}


def exported(module):
    """What the module's stub, or the module itself where it has none, hands on."""
    path = Path(importlib.import_module(module).__file__)
    stub = path.with_suffix(".pyi")
    return re.findall(r"import (\w+) as \1$", (stub if stub.exists() else path).read_text(), re.MULTILINE)


def runs(docstring):
    return any(doctest.SKIP not in example.options for example in doctest.DocTestParser().get_examples(docstring or ""))


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_exists_and_has_an_example(module):
    found = importlib.import_module(module)
    names = {name: attrgetter(name)(found) for name in [*NAMES[module].split(), *exported(module)]}
    assert not [name for name, value in names.items() if "." not in name and not runs(value.__doc__)]


@pytest.mark.parametrize("module", VERBS)
def test_every_verb_is_there(module):
    assert set(VERBS[module].split()) <= set(importlib.import_module(module).app.verbs)


def test_a_method_is_imported_without_the_engine():
    """Whoever uses a loss or a model in a loop of their own waits for torch, and not for what the command lines need."""
    names = [
        "eclstm.ECLSTMRegressor",
        "sinkd.SinKDLoss",
        "peg.progressive_info_nce",
        "disco.DisCo",
        "softclip.SoftClipLoss",
    ]
    names += ["iqa_distill.RKIQT", "dsan.DSAN"]  # and mmict, whose hub is one of transformers' models
    lines = [f"import {name.split('.')[0]}; {name}" for name in names]
    code = "\n".join([*lines, "import sys; print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "accelerate", "datasets", "pandas", "matplotlib", "optuna"} & set(done.stdout.split())
