import pytest
import torch
from papercore.ops import MemoryBank
from torch.testing import assert_close


def test_starts_with_random_unit_vectors():
    bank, again = (MemoryBank(6, 3, torch.Generator().manual_seed(0)) for _ in range(2))
    assert_close(bank.keys.norm(dim=1), torch.ones(6))
    assert torch.equal(bank.keys, again.keys)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [4, 4, 4], [5, 1, 3], [6, 6], [0, 4]])
def test_keeps_the_latest_keys_around_the_end(sizes):
    bank = MemoryBank(6, 3, torch.Generator().manual_seed(0))
    expected, place = bank.keys.clone(), 0
    for number, size in enumerate(sizes):
        keys = torch.full((size, 3), float(number)) + torch.arange(size)[:, None]
        bank.enqueue(keys)
        for key in keys:
            expected[place % 6] = key
            place += 1
    assert torch.equal(bank.keys, expected)
    assert int(bank.pointer) == place % 6


def test_a_state_dict_goes_on_where_it_was():
    bank, other = MemoryBank(5, 2), MemoryBank(5, 2)
    bank.enqueue(torch.ones(3, 2))
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        each.enqueue(torch.zeros(3, 2))
    assert torch.equal(bank.keys, other.keys)


def test_takes_no_gradient():
    bank = MemoryBank(4, 2)
    bank.enqueue(torch.ones(2, 2, requires_grad=True))
    assert not bank.keys.requires_grad


@pytest.mark.parametrize("keys", [torch.ones(5, 2), torch.ones(2, 3), torch.ones(2)])
def test_what_does_not_fit(keys):
    with pytest.raises(ValueError, match="do not fit a memory bank of 4 x 2"):
        MemoryBank(4, 2).enqueue(keys)


def test_no_room():
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        MemoryBank(0, 2)
