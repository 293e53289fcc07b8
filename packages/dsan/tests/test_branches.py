import pytest
import torch
from dsan.branches import BLSTM, AttentionDecoder, Branch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("project", "dim"), [(False, 10), (True, 5)])
@pytest.mark.parametrize("layers", [1, 2])
def test_blstm_gives_a_crop_the_same_whatever_stands_beside_it(project, dim, layers):
    blstm = BLSTM(6, 5, layers, project)
    columns, lengths = torch.randn(3, 7, 6), torch.tensor([3, 7, 5])
    out = blstm(columns, lengths)
    assert out.shape == (3, 7, dim)
    assert blstm.dim == dim
    for row, length in zip(range(3), lengths, strict=True):
        torch.testing.assert_close(out[row : row + 1, :length], blstm(columns[row : row + 1, :length]))


def test_blstm_looks_both_ways():
    blstm, columns = BLSTM(6, 5, 1), torch.randn(1, 7, 6, requires_grad=True)
    for frame in (0, 6):
        (gradient,) = torch.autograd.grad(blstm(columns)[0, frame].sum(), columns)
        assert (gradient.abs().sum(2) > 0).all()


class TestAttentionDecoder:
    def test_columns_beyond_a_crop_change_nothing(self):
        decoder, columns, lengths = AttentionDecoder(6, 8, 10, 4), torch.randn(2, 7, 6), torch.tensor([4, 7])
        out = decoder(columns, lengths)
        assert out.shape == (2, 5, 12)
        torch.testing.assert_close(out[:1], decoder(columns[:1, :4]))
        assert not torch.allclose(out[:1], decoder(columns[:1]))

    def test_is_fed_its_own_characters_or_those_given(self):
        decoder, columns = AttentionDecoder(6, 8, 10, 4), 3 * torch.randn(2, 7, 6)
        own = decoder(columns)
        fed = own.argmax(2)
        torch.testing.assert_close(decoder(columns, targets=fed), own)
        fed[0, 1] = (fed[0, 1] + 1) % 12
        other = decoder(columns, targets=fed)
        changed = (other != own).any(2)
        assert changed.tolist() == [[False, False, True, True, True], [False] * 5]  # from the next character on


class TestBranch:
    def test_without_recurrence_a_column_speaks_for_itself(self):
        columns = torch.randn(1, 7, 6, requires_grad=True)
        branch = Branch("ctc", 6, 10)
        assert branch(columns).shape == (1, 7, 11)
        (gradient,) = torch.autograd.grad(branch(columns)[0, 3].sum(), columns)
        assert gradient.abs().sum(2).nonzero()[:, 1].tolist() == [3]

    @pytest.mark.parametrize(("kind", "shape"), [("ctc", (2, 7, 11)), ("frame", (2, 7, 11)), ("attn", (2, 6, 12))])
    def test_heads_stand_behind_a_blstm(self, kind, shape):
        branch = Branch(kind, 6, 10, blstm=BLSTM(6, 5), hidden=8, max_length=5)
        assert branch(torch.randn(2, 7, 6)).shape == shape

    def test_dropout_is_for_training(self):
        branch, columns = Branch("ctc", 6, 10, dropout=0.5), torch.randn(2, 7, 6)
        assert not torch.equal(branch(columns), branch(columns))
        branch.eval()
        assert torch.equal(branch(columns), branch(columns))
