import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkd.teacher_cache import TeacherCache
from torch.testing import assert_close

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def logits():
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(0)) * 5


def write(folder, logits, **options):
    options = {"classes": logits.shape[1], "total": len(logits), "fingerprint": "f", **options}
    return TeacherCache.write(folder, logits.split(3), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 6])
def test_round_trip_is_the_cast(tmp_path, logits, dtype, classes):
    logits = logits[:, :classes]
    cache = write(tmp_path / "c", logits, dtype=dtype)
    again = TeacherCache.open(tmp_path / "c", "f")
    for c in (cache, again):
        assert len(c) == 10
        assert (c.classes, c.dtype, c.topk, c.fingerprint) == (classes, dtype, None, "f")
        assert_close(c.logits(torch.tensor([3, 0, 3])), logits[[3, 0, 3]].to(DTYPES[dtype]).float(), rtol=0, atol=0)
    assert again.logits(4).shape == (1, classes)
    assert again.logits([]).shape == (0, classes)


@pytest.mark.parametrize("source", [torch.float64, torch.bfloat16])
def test_rows_may_have_any_dtype_and_a_graph(tmp_path, logits, source):
    rows = logits.to(source).requires_grad_()
    assert_close(write(tmp_path / "c", rows, dtype="float32").logits(range(10)), rows.detach().float(), rtol=0, atol=0)


class TestTopk:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
    def test_kept_probabilities_are_exact_to_rounding(self, tmp_path, logits, dtype, tolerance):
        logits = logits + 30  # a common offset costs no precision
        cache = write(tmp_path / "c", logits, dtype=dtype, topk=2)
        true, read = logits.softmax(1), cache.logits(range(10)).softmax(1)
        kept = true.topk(2).indices
        assert_close(read.gather(1, kept), true.gather(1, kept), rtol=tolerance * 4, atol=tolerance)
        others = torch.ones_like(true, dtype=torch.bool).scatter(1, kept, False)
        mass = (1 - true.gather(1, kept).sum(1)) / 4
        assert_close(read[others].view(10, 4), mass[:, None].expand(10, 4), rtol=tolerance * 4, atol=tolerance)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**16), k=st.integers(1, 8), scale=st.sampled_from([0.1, 3.0, 40.0]))
    def test_total_variation_is_at_most_the_mass_left_out(self, tmp_path_factory, seed, k, scale):
        logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) * scale
        cache = write(tmp_path_factory.mktemp("t") / "c", logits, dtype="float32", topk=k)
        true, read = logits.softmax(1), cache.logits(range(4)).softmax(1)
        left_out = 1 - true.topk(k).values.sum(1)
        assert (0.5 * (true - read).abs().sum(1) <= left_out + 1e-5).all()

    def test_masked_classes_stay_masked(self, tmp_path):
        logits = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf], [0.0, 1.0, 2.0, -torch.inf]])
        read = write(tmp_path / "c", logits, dtype="float32", topk=3).logits([0, 1]).softmax(1)
        assert_close(read, logits.softmax(1))

    @pytest.mark.parametrize("topk", [0, 6])
    def test_must_leave_something_out(self, tmp_path, logits, topk):
        with pytest.raises(
            ValueError, match=f"topk must be 1 to classes - 1 = 5, got {topk}; leave it out to keep all"
        ):
            write(tmp_path / "c", logits, topk=topk)


def test_rows_of_an_example_stay_together(tmp_path, logits):
    cache = write(tmp_path / "c", logits, dtype="float32", row_counts=[3, 0, 5, 2])
    assert len(cache) == 4
    assert_close(cache.logits(2), logits[3:8])
    assert_close(cache.logits([3, 1, 0]), torch.cat([logits[8:], logits[:3]]))
    assert cache.logits(1).shape == (0, 6)
    assert_close(TeacherCache.open(tmp_path / "c").logits(0), logits[:3])


class TestInterrupted:
    @staticmethod
    def stop(logits, after):
        yield logits[:after]
        raise KeyboardInterrupt

    @pytest.mark.parametrize(("row_counts", "whole", "rows"), [(None, 7, 7), ([3, 3, 2, 2], 2, 6)])
    def test_is_continued_and_equals_one_that_was_not(self, tmp_path, logits, row_counts, whole, rows):
        options = {"classes": 6, "total": 10, "fingerprint": "f", "row_counts": row_counts}
        with pytest.raises(KeyboardInterrupt):
            TeacherCache.write(tmp_path / "c", self.stop(logits, 7), **options)
        assert not (tmp_path / "c").exists()
        with pytest.raises(FileNotFoundError, match="no teacher cache"):
            TeacherCache.open(tmp_path / "c")
        assert TeacherCache.written(tmp_path / "c", "f") == whole
        assert TeacherCache.written(tmp_path / "c", "other") == 0
        TeacherCache.write(tmp_path / "c", [logits[rows:]], start=whole, **options)
        write(tmp_path / "d", logits, row_counts=row_counts)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "d"]
        for path in (tmp_path / "d").iterdir():
            assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes()

    def test_half_a_row_is_written_again(self, tmp_path, logits):
        with pytest.raises(KeyboardInterrupt):
            TeacherCache.write(tmp_path / "c", self.stop(logits, 7), classes=6, total=10, fingerprint="f")
        with (tmp_path / ".c.partial" / "rows.npy").open("ab") as file:
            file.write(b"\xff" * 5)
        assert TeacherCache.written(tmp_path / "c", "f") == 7
        cache = TeacherCache.write(tmp_path / "c", [logits[7:]], classes=6, total=10, fingerprint="f", start=7)
        assert_close(cache.logits(range(10)), logits.half().float(), rtol=0, atol=0)

    def test_goes_on_only_from_what_is_there(self, tmp_path, logits):
        with pytest.raises(ValueError, match="start 3, but nothing was written of this data and form"):
            write(tmp_path / "c", logits, start=3)
        with pytest.raises(ValueError, match="10 rows came, total is 12; what there is can be continued"):
            write(tmp_path / "c", logits, total=12)
        with pytest.raises(ValueError, match="start 11, but 10 examples are written"):
            write(tmp_path / "c", logits, total=12, start=11)
        with pytest.raises(ValueError, match="nothing was written of this data and form"):
            write(tmp_path / "c", logits, total=12, start=10, dtype="float32")
        again = write(tmp_path / "c", logits)  # from the beginning, in another form
        assert len(again) == 10


class TestRefuses:
    def test_other_data(self, tmp_path, logits):
        write(tmp_path / "c", logits)
        with pytest.raises(ValueError, match="made for 'f', asked for 'g': other data, tokenizer or teacher"):
            TeacherCache.open(tmp_path / "c", "g")

    def test_a_used_folder(self, tmp_path, logits):
        write(tmp_path / "c", logits)
        with pytest.raises(ValueError, match="not empty; delete it or name another folder"):
            write(tmp_path / "c", logits)

    @pytest.mark.parametrize("cut", [1, 50, 10**6])
    def test_a_truncated_file(self, tmp_path, logits, cut):
        write(tmp_path / "c", logits)
        path = tmp_path / "c" / "rows.npy"
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ValueError, match="damaged teacher cache, write it anew"):
            TeacherCache.open(tmp_path / "c")

    @pytest.mark.parametrize(
        "change", [{"rows": 9}, {"classes": 5}, {"dtype": "float32"}, {"dtype": "int8"}, {"topk": 2}]
    )
    def test_a_description_that_does_not_fit(self, tmp_path, logits, change):
        write(tmp_path / "c", logits)
        path = tmp_path / "c" / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match="damaged teacher cache"):
            TeacherCache.open(tmp_path / "c")

    def test_pickles(self, tmp_path, logits):
        write(tmp_path / "c", logits)
        np.save(tmp_path / "c" / "rows.npy", np.array([{}], object))
        with pytest.raises(ValueError, match="damaged teacher cache"):
            TeacherCache.open(tmp_path / "c")

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_logits_that_are_no_numbers(self, tmp_path, logits, bad):
        logits[4, 2] = bad
        with pytest.raises(ValueError, match="teacher logits of row 4 are NaN"):
            write(tmp_path / "c", logits)

    def test_a_row_of_masked_classes_only(self, tmp_path, logits):
        logits[2] = -torch.inf
        with pytest.raises(ValueError, match=r"teacher logits of row 2 are NaN, \+inf, or all -inf"):
            write(tmp_path / "c", logits)

    def test_logits_beyond_half_precision(self, tmp_path, logits):
        logits[0, 0] = 1e5
        with pytest.raises(ValueError, match=r"up to 100000 do not fit float16: choose bfloat16 or float32"):
            write(tmp_path / "c", logits)
        assert write(tmp_path / "c", logits, dtype="bfloat16").logits(0)[0, 0] == pytest.approx(1e5, rel=1e-2)

    def test_rows_of_another_width_or_number(self, tmp_path, logits):
        with pytest.raises(ValueError, match=r"rows 0 on have shape \(3, 6\), expected \(n, 7\)"):
            write(tmp_path / "c", logits, classes=7)
        with pytest.raises(ValueError, match="more rows than total 9"):
            write(tmp_path / "c", logits, total=9)
        with pytest.raises(ValueError, match="total is 10, row_counts sum to 9"):
            write(tmp_path / "c", logits, row_counts=[4, 5])

    def test_an_unknown_dtype(self, tmp_path, logits):
        with pytest.raises(ValueError, match="dtype 'int8' is unknown: choose from float16, bfloat16, float32"):
            write(tmp_path / "c", logits, dtype="int8")

    @pytest.mark.parametrize("index", [-1, 10])
    def test_an_index_outside(self, tmp_path, logits, index):
        with pytest.raises(IndexError, match=f"indices 0 to {index}|indices {index} to 0"):
            write(tmp_path / "c", logits).logits([0, index])


def test_rows_are_read_from_the_map_not_into_memory(tmp_path):
    """A gigabyte that the disk holds sparsely: one row is touched."""
    cache = TeacherCache.write(tmp_path / "c", [torch.ones(1, 500)], classes=500, total=1, fingerprint="f")
    row = (tmp_path / "c" / "rows.npy").read_bytes()[-1000:]
    rows = 10**6
    meta = json.loads((tmp_path / "c" / "meta.json").read_text()) | {"rows": rows}
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta))
    with (tmp_path / "c" / "rows.npy").open("wb") as file:
        descr = np.lib.format.dtype_to_descr(cache._rows.dtype)
        np.lib.format.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": (rows,)})
        file.truncate(file.tell() + rows * 1000)
        file.seek(-1000, 2)
        file.write(row)
    cache = TeacherCache.open(tmp_path / "c")
    assert isinstance(cache._rows, np.memmap)
    assert_close(cache.logits([0, rows - 1]), torch.tensor([[0.0], [1.0]]).expand(2, 500))
