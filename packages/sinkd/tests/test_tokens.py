import math

import pytest
import torch
from sinkd import SinKDLoss, select_token_logits
from sinkd.divergences import kl
from torch.testing import assert_close

B, L, V = 3, 6, 12
LABELS = torch.tensor([[-100, -100, 4, 7, 1, -100], [-100, 9, 1, -100, -100, -100], [-100, -100, 0, 11, 4, 7]])
COUNTS = [3, 2, 4]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, B, L, V, generator=generator, dtype=torch.float64)


def positions(shift):
    """(sequence, position of its logits, label) of what is to be predicted, in order."""
    return [(b, i - shift, LABELS[b, i].item()) for b in range(B) for i in range(L) if LABELS[b, i] != -100]


@pytest.mark.parametrize("shift", [True, False])
def test_token_batch_takes_every_labelled_row(logits, shift):
    chosen = select_token_logits(*logits, LABELS, shift=shift)
    where = positions(shift)
    assert chosen.mask is None
    assert chosen.labels.tolist() == [gold for _, _, gold in where]
    for ours, given in zip((chosen.student, chosen.teacher), logits, strict=True):
        assert_close(ours, torch.stack([given[b, i] for b, i, _ in where]), rtol=0, atol=0)


@pytest.mark.parametrize("shift", [True, False])
def test_first_token_takes_one_row_of_each_sequence(logits, shift):
    chosen = select_token_logits(*logits, LABELS, shift=shift, granularity="first_token")
    assert chosen.labels.tolist() == [4, 9, 0]
    expected = torch.stack([logits[0, b, i - shift] for b, i in ((0, 2), (1, 1), (2, 2))])
    assert_close(chosen.student, expected, rtol=0, atol=0)


def test_sequences_are_padded_to_the_longest(logits):
    chosen = select_token_logits(*logits, LABELS, shift=True, granularity="sequence")
    assert chosen.student.shape == chosen.teacher.shape == (B, 4, V)
    assert chosen.mask.sum(1).tolist() == COUNTS
    assert (chosen.mask.long().diff(dim=1) <= 0).all()  # padding comes last
    flat = select_token_logits(*logits, LABELS, shift=True)
    assert_close(chosen.student[chosen.mask], flat.student, rtol=0, atol=0)
    assert chosen.labels[chosen.mask].tolist() == flat.labels.tolist()
    assert (chosen.labels[~chosen.mask] == -100).all()


@pytest.mark.parametrize("granularity", ["token_batch", "sequence", "first_token"])
@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"vocab_ids": [4, 7, 1]}], ids=["all", "topk", "vocab_ids"])
def test_padding_contributes_nothing(logits, granularity, options):
    student, teacher = logits
    criterion = SinKDLoss(beta=5.0)
    ignored = torch.cat([LABELS[:, 1:], torch.full((B, 1), -100)], 1) == -100

    def run(student):
        student = student.clone().requires_grad_()
        chosen = select_token_logits(student, teacher, LABELS, shift=True, granularity=granularity, **options)
        out = criterion(*chosen)
        out.loss.backward()
        return out, student.grad

    clean, gradient = run(student)
    dirty, other = run(student.masked_fill(ignored.unsqueeze(-1), math.nan))
    assert_close(tuple(clean), tuple(dirty))
    assert_close(gradient, other)
    assert not gradient[ignored].any()
    assert gradient.any()


def test_one_problem_for_each_sequence_averaged(logits):
    student, teacher = logits
    for reduction in ("mean", "sum"):
        criterion = SinKDLoss(reduction=reduction, debias=reduction == "mean")
        together = criterion(*select_token_logits(student, teacher, LABELS, shift=True, granularity="sequence"))
        alone = [
            criterion(*select_token_logits(student[b : b + 1], teacher[b : b + 1], LABELS[b : b + 1], shift=True))
            for b in range(B)
        ]
        assert_close(together.sinkhorn, torch.stack([out.sinkhorn for out in alone]).mean())
        for part in ("kd", "ce"):  # means over tokens
            rows = sum(n * getattr(out, part) for n, out in zip(COUNTS, alone, strict=True))
            assert_close(getattr(together, part), rows / sum(COUNTS))


def test_a_sequence_without_labels_is_no_cloud(logits):
    labels = LABELS.clone()
    labels[1] = -100
    criterion = SinKDLoss()
    out = criterion(*select_token_logits(*logits, labels, shift=True, granularity="sequence"))
    others = [0, 2]
    expected = criterion(*select_token_logits(*logits[:, others], labels[others], shift=True, granularity="sequence"))
    assert_close(tuple(out), tuple(expected))


@pytest.mark.parametrize("granularity", ["token_batch", "sequence", "first_token"])
@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"vocab_ids": [4, 7]}])
def test_nothing_to_predict_is_a_loss_of_0(logits, granularity, options):
    student = logits[0].requires_grad_()
    labels = torch.full((B, L), -100)
    chosen = select_token_logits(student, logits[1], labels, shift=True, granularity=granularity, **options)
    with pytest.warns(UserWarning, match="no row to learn from"):
        out = SinKDLoss()(*chosen)
    out.loss.backward()
    assert out.loss == 0
    assert not student.grad.any()


class TestVocabIds:
    def test_columns_are_theirs_in_their_order(self, logits):
        chosen = select_token_logits(*logits, LABELS, shift=True, vocab_ids=[7, 1, 4])
        whole = select_token_logits(*logits, LABELS, shift=True)
        assert_close(chosen.student, whole.student[:, [7, 1, 4]], rtol=0, atol=0)
        assert_close(chosen.teacher, whole.teacher[:, [7, 1, 4]], rtol=0, atol=0)

    def test_labels_are_numbers_of_columns(self, logits):
        chosen = select_token_logits(*logits, LABELS, shift=True, vocab_ids=[7, 1, 4])
        number = {7: 0, 1: 1, 4: 2}
        assert chosen.labels.tolist() == [number.get(gold, -100) for _, _, gold in positions(True)]

    def test_rows_of_other_labels_leave_every_term_unless_there_are_no_labels(self, logits):
        chosen = select_token_logits(*logits, LABELS, shift=True, vocab_ids=[7, 1, 4])
        among = chosen.labels != -100
        criterion = SinKDLoss()
        expected = criterion(chosen.student[among], chosen.teacher[among], chosen.labels[among])
        assert_close(tuple(criterion(*chosen)), tuple(expected))
        unlabelled = criterion(chosen.student, chosen.teacher)
        assert_close(unlabelled.kd, kl(chosen.student, chosen.teacher, 2.0))


class TestTopk:
    def test_probabilities_are_the_chosen_ones_and_the_sum_of_the_rest(self, logits):
        tau = 1.7
        chosen = select_token_logits(*logits, LABELS, shift=True, topk=4, tau=tau)
        whole = select_token_logits(*logits, LABELS, shift=True)
        columns = (whole.teacher / tau).softmax(-1).mean(0).argsort(descending=True)[:4]
        assert chosen.student.shape == (sum(COUNTS), 5)
        for ours, given in ((chosen.student, whole.student), (chosen.teacher, whole.teacher)):
            expected = (given / tau).softmax(-1)[:, columns]
            expected = torch.cat([expected, 1 - expected.sum(1, keepdim=True)], 1)
            assert_close((ours / tau).softmax(-1), expected)

    def test_another_temperature_counts_the_rest_as_one_token(self, logits):
        chosen = select_token_logits(*logits, LABELS, shift=True, topk=4, tau=2.0)
        exact = select_token_logits(*logits, LABELS, shift=True, topk=4, tau=1.0)
        assert (chosen.student.softmax(-1) - exact.student.softmax(-1)).abs().max() > 1e-2

    def test_a_label_among_the_rest_is_the_last_column(self, logits):
        logits[1, :, :, [4, 1]] += 20
        chosen = select_token_logits(*logits, LABELS, shift=True, topk=2)
        number = dict.fromkeys(range(V), 2)
        whole = select_token_logits(*logits, LABELS, shift=True)
        order = (whole.teacher / 2).softmax(-1).mean(0).argsort(descending=True)[:2].tolist()
        number |= {order[0]: 0, order[1]: 1}
        assert sorted(order) == [1, 4]
        assert chosen.labels.tolist() == [number[gold] for _, _, gold in positions(True)]

    def test_one_column_set_for_all_sequences(self, logits):
        sequences = select_token_logits(*logits, LABELS, shift=True, topk=4, granularity="sequence")
        flat = select_token_logits(*logits, LABELS, shift=True, topk=4)
        assert_close(sequences.teacher[sequences.mask], flat.teacher, rtol=0, atol=0)

    def test_gradient_reaches_every_column_of_the_student_and_none_of_the_teacher(self, logits):
        student, teacher = (z.clone().requires_grad_() for z in logits)
        chosen = select_token_logits(student, teacher, LABELS, shift=True, topk=4)
        (chosen.student / 2).softmax(-1)[:, 0].sum().backward()
        row = student.grad[positions(True)[0][:2]]
        assert row.all()
        assert teacher.grad is None
        function = lambda z: select_token_logits(z, teacher, LABELS, shift=True, topk=4).student  # noqa: E731
        assert torch.autograd.gradcheck(function, (student.detach().requires_grad_(),), fast_mode=True)

    def test_masked_tokens_and_half_precision_are_fine(self, logits):
        columns = logits[1].softmax(-1).mean((0, 1)).argsort(descending=True)
        logits[..., columns[4:]] = -math.inf  # the rest is empty
        student, teacher = logits.half()
        student.requires_grad_()
        chosen = select_token_logits(student, teacher, LABELS, shift=True, topk=4)
        assert not chosen.student.softmax(-1)[:, 4].any()
        out = SinKDLoss(ce_weight=0.0)(*chosen)
        out.loss.backward()
        assert out.loss.isfinite()
        assert student.grad.isfinite().all()


class TestMaxRows:
    def drawn(self, logits, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return select_token_logits(*logits, LABELS, shift=True, generator=generator, **options)

    def test_are_drawn_from_the_labelled_rows_by_the_seed(self, logits):
        logits[0, ..., 0] = torch.arange(B * L).view(B, L)  # marks rows
        whole = select_token_logits(*logits, LABELS, shift=True).student[:, 0].tolist()
        draws = [self.drawn(logits, seed, max_rows=4).student[:, 0].tolist() for seed in range(20)]
        assert draws == [self.drawn(logits, seed, max_rows=4).student[:, 0].tolist() for seed in range(20)]
        assert all(len(set(rows)) == 4 and rows == sorted(rows) and set(rows) <= set(whole) for rows in draws)
        assert {row for rows in draws for row in rows} == set(whole)

    def test_are_of_each_sequence_where_it_is_a_cloud(self, logits):
        chosen = self.drawn(logits, 0, max_rows=3, granularity="sequence")
        assert chosen.mask.sum(1).tolist() == [3, 2, 3]

    def test_fewer_rows_than_that_are_all_kept(self, logits):
        assert self.drawn(logits, 0, max_rows=100).labels.tolist() == [gold for _, _, gold in positions(True)]

    def test_columns_are_chosen_by_the_rows_drawn(self, logits):
        chosen = self.drawn(logits, 0, max_rows=2, topk=3)
        rows = self.drawn(logits, 0, max_rows=2)
        columns = (rows.teacher / 2).softmax(-1).mean(0).argsort(descending=True)[:3]
        assert_close(chosen.teacher[:, :3], rows.teacher[:, columns], rtol=0, atol=0)


def test_vocabularies_of_two_sizes_need_leave(logits):
    student, teacher = logits
    padded = torch.cat([teacher, torch.zeros(B, L, 2, dtype=teacher.dtype)], -1)
    with pytest.raises(ValueError, match=r"student has 12 classes, teacher 14: .*allow_vocab_truncation=True"):
        select_token_logits(student, padded, LABELS, shift=True)
    with pytest.warns(UserWarning, match="student has 12 classes, teacher 14: cut to the first 12"):
        chosen = select_token_logits(student, padded, LABELS, shift=True, allow_vocab_truncation=True)
    assert_close(tuple(chosen), tuple(select_token_logits(student, teacher, LABELS, shift=True)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "word"}, "granularity must be one of token_batch, sequence, first_token; got 'word'"),
        ({"vocab_ids": [1, 2], "topk": 3}, "vocab_ids and topk both choose columns"),
        ({"vocab_ids": [1, 12]}, r"vocab_ids must be 2 or more different tokens in 0 to 11, got \[1, 12\]"),
        ({"vocab_ids": [1, 1]}, r"vocab_ids must be 2 or more different tokens in 0 to 11, got \[1, 1\]"),
        ({"vocab_ids": [1]}, "vocab_ids must be 2 or more"),
        ({"topk": 0}, "topk must be in 1 to 11"),
        ({"topk": 12}, "topk must be in 1 to 11"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
    ],
)
def test_bad_options_are_named(logits, options, message):
    with pytest.raises(ValueError, match=message):
        select_token_logits(*logits, LABELS, shift=True, **options)


def test_bad_shapes_and_labels_are_named(logits):
    with pytest.raises(ValueError, match=r"labels \(3, 5\) do not fit logits \(3, 6, 12\)"):
        select_token_logits(*logits, LABELS[:, 1:], shift=True)
    with pytest.raises(ValueError, match="differ in rows"):
        select_token_logits(logits[0], logits[1][:, 1:], LABELS, shift=True)
    with pytest.raises(ValueError, match="labels hold token 12, but the logits have 12 columns"):
        select_token_logits(*logits, LABELS.clone().fill_(12), shift=True)
