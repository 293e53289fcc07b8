import dataclasses

import pytest
import torch
from sinkd.models import (
    ModelOptions,
    architecture_of,
    check_pair,
    copy_shared,
    cut_layers,
    from_scratch,
    load_model,
    load_tokenizer,
    scratch_size,
)
from sinkd.tasks import generic
from transformers import AutoConfig, GPTNeoConfig, GPTNeoForCausalLM

KINDS = ("encoder", "encoder-decoder", "decoder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded_as_its_kind(kind, make_model, examples, tmp_path):
    model = make_model(kind, layers=3)
    model.save_pretrained(tmp_path)
    assert architecture_of(model) == architecture_of(AutoConfig.from_pretrained(tmp_path)) == kind
    again = load_model(str(tmp_path), kind, examples.task)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_first_layers_are_the_teachers(kind, make_model, examples, tmp_path):
    model = make_model(kind, layers=3)
    model.save_pretrained(tmp_path)
    student = load_model(str(tmp_path), kind, examples.task, layers=2)
    assert student.config.num_hidden_layers == 2
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_gpt_neo_keeps_its_kinds_of_attention(tmp_path, examples):
    config = GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]]
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    student = load_model(str(tmp_path), "decoder", examples.task, layers=3)
    assert student.config.attention_layers == ["global", "local", "global"]
    student(torch.tensor([[1, 2, 3]]))


def test_more_layers_than_there_are(make_model):
    with pytest.raises(ValueError, match="student_layers 5: there has only 2"):
        cut_layers(make_model(layers=2).config, 5, "there")


def test_labels_in_another_order_are_refused(make_model, examples, tmp_path):
    make_model().save_pretrained(tmp_path)
    turned = dataclasses.replace(examples.task, labels=examples.task.labels[::-1])
    with pytest.raises(ValueError, match=r"0: 'file' / 'error', 1: 'error' / 'file'"):
        load_model(str(tmp_path), "encoder", turned)
    with pytest.raises(ValueError, match="has 2 labels, x has 3"):
        load_model(str(tmp_path), "encoder", generic("x", ("a", "b", "c")))


def test_pairs_that_do_not_fit(make_model):
    three = generic("x", ("a", "b", "c"))
    for student, teacher, message in (
        (make_model(), make_model("decoder"), "encoder, the teacher decoder"),
        (make_model(), make_model(task=three), "the student has 2 classes, the teacher 3"),
        (make_model(), make_model(task=generic("y", ("error", "file"))), "0: 'file' / 'error'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pair(student, teacher, "encoder", False)


def test_vocabularies_of_different_size(make_model):
    student, teacher = make_model("decoder"), make_model("decoder")
    teacher.resize_token_embeddings(student.config.vocab_size + 8)
    with pytest.raises(ValueError, match="allow_vocab_truncation"):
        check_pair(student, teacher, "decoder", False)
    check_pair(student, teacher, "decoder", True)


def test_copy_takes_over_tensors_of_the_same_name_and_shape(make_model):
    teacher, student = make_model(layers=3, seed=1), make_model(layers=1, seed=2)
    assert copy_shared(student, teacher) == len(student.state_dict())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[name])
    with pytest.raises(ValueError, match="no tensor in common"):
        copy_shared(make_model(), make_model("decoder"))


def test_a_tokenizer_without_padding_gets_some(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.pad_token_id


def test_regression_has_one_output(tokenizer):
    model = from_scratch("encoder", generic("scores", None), tokenizer, 32, 1)
    assert model.config.num_labels == 1


@pytest.mark.parametrize("name", ["scratch:", "scratch:64", "scratch:0x2", "scratch:64x2x2", "scratch"])
def test_a_size_from_scratch_that_is_none(name):
    with pytest.raises(ValueError, match=f"{name}: a model from scratch is named by its width and layers"):
        scratch_size(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "cnn"}, "architecture must be one of"),
        ({"student_init": "x"}, "student_init must be"),
        ({"student_layers": 0}, "student_layers must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)
