import os
import sys
import types

import numpy as np
import pytest
import torch
from iqa_distill.data import (
    DataOptions,
    ReferencePool,
    check_leakage,
    hashes,
    load_pool,
    load_ratings,
    reference_id,
    split,
)
from iqa_distill.pixels import Pixels
from iqa_distill.readers import RatedImages
from PIL import Image

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
REFERENCES, EACH = 10, 4


def paint(path, shade, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (shade,) * 3).save(path)


@pytest.fixture
def table(tmp_path):
    """40 images of 10 references; the shade says which one it is, and its score is its shade."""
    rows = []
    for i in range(REFERENCES):
        paint(tmp_path / "refs" / f"R{i}.png", 200 + i)
        for j in range(EACH):
            shade = EACH * i + j
            paint(tmp_path / f"{shade}.png", shade)
            rows.append(f"{shade}.png,{shade},refs/R{i}.png")

    def write(change=lambda row, i: row, head="image,mos,reference"):
        (tmp_path / "x.csv").write_text("\n".join([head, *(change(row, i) for i, row in enumerate(rows))]))
        return str(tmp_path / "x.csv")

    return write


def rated(units=REFERENCES, each=EACH, **fields):
    names = [f"{i} {j}" for i in range(units) for j in range(each)]
    own = {"references": [name.split()[0] for name in names], "splits": None} | fields
    return RatedImages(names, np.arange(len(names), dtype=float), low=0, high=1, opener=lambda i: None, **own)


class TestSplit:
    @pytest.mark.parametrize("seed", range(3))
    def test_by_reference(self, seed):
        """Trap 5: no reference is on two sides."""
        data = rated()
        parts = split(data, DataOptions(split_seed=seed, validation=0.25))
        assert [len(part) for part in parts] == [24, 8, 8]
        assert sorted(np.concatenate(parts)) == list(range(40))
        references = [{data.references[i] for i in part} for part in parts]
        assert sum(map(len, references)) == REFERENCES

    def test_by_image_where_references_are_unknown(self):
        parts = split(rated(references=None), DataOptions(validation=0.25))
        assert [len(part) for part in parts] == [24, 8, 8]

    def test_by_seed_and_names_alone(self):
        data, backwards = rated(), np.arange(40)[::-1]
        for part, again in zip(split(data, DataOptions()), split(data.select(backwards), DataOptions()), strict=True):
            assert part.tolist() == sorted(backwards[again])
        assert [split(data, DataOptions(split_seed=s))[2].tolist() for s in (0, 1)] == [
            [8, 9, 10, 11, 32, 33, 34, 35],
            [8, 9, 10, 11, 36, 37, 38, 39],
        ]

    def test_fewer_references_are_a_part_of_more_and_the_others_stay(self):
        data = rated()
        found = [split(data, DataOptions(train_references=n, validation=0.2)) for n in (1, 3, 6)]
        assert [len(parts[0]) for parts in found] == [4, 12, 24]
        assert set(found[0][0]) < set(found[1][0]) < set(found[2][0])
        for i in (1, 2):
            assert found[0][i].tolist() == found[2][i].tolist()

    def test_a_given_split_is_kept(self):
        words = ["train"] * 20 + ["test"] * 12 + ["validation"] * 8
        parts = split(rated(splits=words), DataOptions(test_share=0.5, validation=0.5))
        assert [part.tolist() for part in parts] == [list(range(20)), list(range(32, 40)), list(range(20, 32))]
        parts = split(rated(splits=["train"] * 20 + ["test"] * 20), DataOptions(validation=0.4))
        assert [len(part) for part in parts] == [12, 8, 20]

    def test_a_given_split_that_shares_a_reference_is_refused(self):
        """Trap 5."""
        with pytest.raises(ValueError, match=r"references on two sides, .*: 5; leave the column split out"):
            split(rated(splits=["train"] * 22 + ["test"] * 18), DataOptions())
        split(rated(references=None, splits=["train"] * 22 + ["test"] * 18), DataOptions())

    def test_no_test_part(self):
        assert [len(part) for part in split(rated(), DataOptions(test_share=0))] == [40, 0, 0]

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            (rated(), {"train_references": 9}, "train_references 9: there are 8 to train on"),
            (rated(references=None), {"train_references": 2}, "this data has none: give a column reference"),
            (rated(units=2), {"validation": 0.2}, "no references are left to train on: give smaller shares"),
            (rated(splits=["test"] * 40), {}, "no references are left to train on"),
        ],
    )
    def test_errors(self, data, options, message):
        with pytest.raises(ValueError, match=message):
            split(data, DataOptions(**options))


class TestLoad:
    def test_parts(self, table):
        splits = load_ratings(DataOptions(table(), validation=0.2))
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        assert {name: len(part) for name, part in parts.items()} == {"train": 24, "validation": 8, "test": 8}
        for part in parts.values():
            assert [int(part.pixels[i].max()) for i in range(len(part))] == part.scores.tolist()
            assert [f"{score:.0f}.png" for score in part.scores] == part.names
            assert part.references == [f"refs/R{score // EACH:.0f}.png" for score in part.scores]
        assert splits.scale.mean == splits.train.scores.mean()
        assert (splits.scale.low, splits.scale.high) == (0, 39)
        assert splits.resize is None
        assert len({name for part in parts.values() for name in part.ids}) == 40

    def test_the_pool_is_of_training_references_only(self, table):
        splits = load_ratings(DataOptions(table(), train_references=5))
        assert sorted(splits.pool.ids) == sorted(set(splits.train.references))
        assert all(splits.pool.pixels[i].max() == 200 + int(name[6]) for i, name in enumerate(splits.pool.ids))
        assert load_ratings(DataOptions(table(), train_references=1)).pool is None

    def test_a_pool_that_is_named(self, table, tmp_path):
        splits = load_ratings(DataOptions(table(), references=str(tmp_path / "refs")))
        assert len(splits.pool) == REFERENCES
        rows = splits.pool.draw(splits.train.references * 20, torch.Generator())
        own = [reference_id(name) for name in splits.train.references * 20]
        assert not any(reference_id(splits.pool.ids[row]) == name for row, name in zip(rows, own, strict=True))

    def test_no_pool(self, table):
        splits = load_ratings(DataOptions(table(lambda row, i: row.replace("refs/", ""))))
        assert splits.pool is None

    def test_resize(self, table):
        splits = load_ratings(DataOptions(table(), resize=[36, 50]))
        assert splits.train.pixels.shapes[0].tolist() == [36, 50]
        assert splits.resize == (36, 50)
        with pytest.raises(ValueError, match="deiqt_compat is about the size of KonIQ-10k"):
            load_ratings(DataOptions(table(), deiqt_compat=True))

    @pytest.mark.parametrize(("compat", "size"), [(False, (384, 512)), (True, (512, 384))])
    def test_koniq_is_resized(self, tmp_path, compat, size):
        for i in range(4):
            paint(tmp_path / "512x384" / f"{i}.png", i)
        rows = "".join(f"{i}.png,{i}\n" for i in range(4))
        (tmp_path / "koniq10k_scores_and_distributions.csv").write_text("image_name,MOS_zscore\n" + rows)
        splits = load_ratings(DataOptions(str(tmp_path), deiqt_compat=compat))
        assert tuple(splits.train.pixels.shapes[0]) == splits.resize == size
        assert splits.pool is None

    def test_bad_images(self, table, tmp_path, caplog):
        """Trap 12. The others stay in the part that they were in."""
        data = table()
        whole = load_ratings(DataOptions(data))
        bad = whole.train.names[5]
        (tmp_path / bad).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{bad} cannot be read: .*; --skip_bad leaves"):
            load_ratings(DataOptions(data))
        rest = load_ratings(DataOptions(data, skip_bad=True))
        assert rest.train.names == [name for name in whole.train.names if name != bad]
        assert rest.train.ids == [
            own for own, name in zip(whole.train.ids, whole.train.names, strict=True) if name != bad
        ]
        assert rest.test.names == whole.test.names
        assert bad in caplog.text

    def test_one_pixel_cache_for_all_splits(self, table, tmp_path):
        data, cache = table(), str(tmp_path / "x.npy")
        expected = load_ratings(DataOptions(data, split_seed=1, train_references=3))
        load_ratings(DataOptions(data, pixel_cache=cache))
        found = load_ratings(DataOptions(data, split_seed=1, train_references=3, pixel_cache=cache))
        assert (found.train.ids, found.test.ids) == (expected.train.ids, expected.test.ids)

    def test_lower_better(self, table):
        assert load_ratings(DataOptions(table(), lower_better=True)).test.scores[0] == (
            39 - load_ratings(DataOptions(table())).test.scores[0]
        )

    def test_equal_training_scores(self, table):
        """Trap 18, of a part."""
        data = table(lambda row, i: f"{i}.png,{int(i > 35)},{i > 35}")
        with pytest.raises(ValueError, match="scores are equal"):
            load_ratings(DataOptions(data, split_seed=next(s for s in range(9) if _tests_the_last(data, s))))

    def test_sample(self, monkeypatch):
        images = [np.full((40, 40, 3), i, np.uint8) for i in range(9)]
        data = RatedImages(
            list("abcdefghi"), np.arange(9.0), list("xxxyyyzzz"), None, 0.0, 100.0, images.__getitem__, ["blur"] * 9
        )
        sample = types.ModuleType("sample")
        sample.sample_ratings = lambda: data
        sample.sample_references = lambda: dict(zip("xyz", images, strict=False))
        monkeypatch.setitem(sys.modules, "iqa_distill.sample", sample)
        splits = load_ratings(DataOptions())
        assert (len(splits.train), len(splits.test), len(splits.pool)) == (6, 3, 2)
        assert set(splits.pool.ids) == set(splits.train.references)
        assert splits.test.distortions == ["blur"] * 3

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"test_share": 1.0}, "test_share is a share, 0 <= test_share < 1"),
            ({"validation": -0.1}, "validation is a share"),
            ({"crops": 0}, "crops at least 1"),
            ({"split_seed": -1}, "split_seed must be at least 0"),
            ({"train_references": 0}, "train_references must be at least 1"),
            ({"resize": [384]}, "resize takes HEIGHT WIDTH"),
        ],
    )
    def test_wrong_options(self, fields, message):
        with pytest.raises(ValueError, match=message):
            DataOptions(**fields)


def _tests_the_last(data, seed):
    from iqa_distill.readers import read_ratings

    return 39 in split(read_ratings(data), DataOptions(split_seed=seed, test_share=0.5))[2]


class TestReferencePool:
    """Trap 10: what is compared is never the image's own original."""

    def pool(self, ids):
        arrays = [np.full((32, 32, 3), i, np.uint8) for i in range(len(ids))]
        return ReferencePool(Pixels.of(arrays, ids), ids)

    def test_never_its_own_and_all_others_alike(self):
        pool = self.pool(["I03.png", "I01.BMP", "refs/i02.bmp", "I01"])
        own = ["I01"] * 3000 + ["I02"] * 3000 + ["I09"] * 4000 + [None] * 4000
        rows = pool.draw(own, torch.Generator().manual_seed(0))
        assert rows.dtype == torch.int64
        parts = rows.split([3000, 3000, 4000, 4000])
        wanted = [[0.5, 0, 0.5, 0], [1 / 3, 1 / 3, 0, 1 / 3], [0.25] * 4, [0.25] * 4]
        for part, shares in zip(parts, wanted, strict=True):
            found = part.bincount(minlength=4) / len(part)
            torch.testing.assert_close(found, torch.tensor(shares), atol=0.04, rtol=0)
            assert all((share > 0) == (count > 0) for share, count in zip(shares, found, strict=True))

    def test_by_generator(self):
        pool = self.pool(list("abcdefgh"))
        first, again = (pool.draw(["a"] * 50, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert pool.draw([], torch.Generator()).shape == (0,)

    def test_too_few(self):
        for ids in ([], ["a"]):
            with pytest.raises(ValueError, match="reference pool needs at least 2 images"):
                self.pool(ids)

    def test_none_remains(self):
        pool = self.pool(["I01.png", "i01.bmp"])
        assert pool.draw(["I02"], torch.Generator()).shape == (1,)
        with pytest.raises(ValueError, match=r"nothing but I01\.png: no other image to compare with"):
            pool.draw(["I02", "I01"], torch.Generator())

    def test_load_pool(self, tmp_path):
        paint(tmp_path / "a.png", 1)
        paint(tmp_path / "b.jpg", 2, side=50)
        pool = load_pool(str(tmp_path))
        assert (pool.ids, pool.pixels.shapes.tolist()) == (["a.png", "b.jpg"], [[40, 40], [50, 50]])


class TestLeakage:
    def test_refused(self):
        with pytest.raises(ValueError, match=r"2 of 3 test images were trained on by a teacher, .* id b"):
            check_leakage(["a", "b", "c", "c"], ["b", "c", "d"])
        check_leakage(["a", "b"], ["c"])

    def test_ids_are_of_pixels_and_shape(self):
        image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
        other = image.copy()
        other[39, 59, 2] ^= 1
        same, changed, again = hashes(Pixels.of([image, other, image.copy()], list("abc")))
        assert same == again != changed
        black = [np.zeros((40, 60, 3), np.uint8), np.zeros((60, 40, 3), np.uint8)]
        assert len(set(hashes(Pixels.of(black, list("ab"))))) == 2

    def test_teacher_of_one_split_on_the_test_part_of_another(self, table):
        one, other = (load_ratings(DataOptions(table(), split_seed=seed)) for seed in (0, 1))
        check_leakage(one.train.ids, one.test.ids)
        with pytest.raises(ValueError, match="trained on by a teacher"):
            check_leakage(one.train.ids, other.test.ids)


@REAL
def test_one_real_image_beside_bsds(tmp_path):
    """A genuine TID2013 image is decoded as it is."""
    folder = os.path.join(os.environ["PAPERCORE_DATA"], "iqa-distill")
    for i in range(5):
        paint(tmp_path / f"{i}.png", i)
    rows = "".join(f"{i}.png,{i}\n" for i in range(5))
    (tmp_path / "x.csv").write_text(f"image,mos\n{rows}{folder}/tid2013_i01_01_5.png,3.8649\n")
    splits = load_ratings(DataOptions(str(tmp_path / "x.csv"), test_share=0))
    place = splits.train.names.index(f"{folder}/tid2013_i01_01_5.png")
    with Image.open(f"{folder}/tid2013_i01_01_5.png") as picture:
        expected = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(2, 0)
    assert torch.equal(splits.train.pixels[place], expected)
    assert splits.validation is splits.test is None
