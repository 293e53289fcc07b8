import os
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
import scipy.io
from iqa_distill.readers import read_ratings, read_references
from PIL import Image

DATA = os.environ.get("PAPERCORE_DATA")
REAL = pytest.mark.skipif(DATA is None, reason="PAPERCORE_DATA is not set: no real data to read")


def paint(path, *names):
    """Images of one shade, which is their place in the list."""
    for shade, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (shade,) * 3).save(path / name)


def shades(rated):
    return [int(rated.open(i)[0, 0, 0]) for i in range(len(rated))]


def sheet(path, rows, title="Sheet1"):
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def cells(names):
    found = np.empty((len(names), 1), object)
    found[:, 0] = names
    return found


@pytest.fixture
def table(tmp_path):
    paint(tmp_path, "0.png", "below/1.png", "2.png", "3.png")

    def write(text):
        (tmp_path / "x.csv").write_text(text, encoding="utf-8")
        return tmp_path / "x.csv"

    return write


SIMPLE = "image,mos\n0.png,1\nbelow/1.png,2.5\n2.png,4\n"


class TestCSV:
    def test_simple(self, table):
        rated = read_ratings(table(SIMPLE))
        assert rated.scores.tolist() == [1, 2.5, 4]
        assert (rated.low, rated.high) == (1, 4)
        assert rated.names == ["0.png", "below/1.png", "2.png"]
        assert (rated.references, rated.splits, rated.distortions, rated.pristine, rated.resize) == (None,) * 5
        assert (shades(rated), rated.open(1).shape) == ([0, 1, 2], (32, 40, 3))

    def test_all_columns_in_any_order_and_case(self, table):
        head = "\ufeffSplit, MOS,note,Image,reference,distortion\n"
        text = head + "Training,3,,0.PNG,A,blur\nval,2,x,Below\\1.png,B,jpeg\ntest,1,,2.png,C,\n"
        with pytest.raises(ValueError, match=r"nothing in the column distortion: row 3 \(the header not counted\)"):
            read_ratings(table(text))
        rated = read_ratings(table(text.replace("C,", "C,blur")))
        assert rated.splits == ["train", "validation", "test"]
        assert rated.references == ["A", "B", "C"]
        assert rated.distortions == ["blur", "jpeg", "blur"]
        assert shades(rated) == [0, 1, 2]

    def test_lower_better_is_turned_round_within_its_range(self, table):
        rated = read_ratings(table(SIMPLE), lower_better=True)
        assert rated.scores.tolist() == [4, 2.5, 1]
        assert (rated.low, rated.high) == (1, 4)

    def test_references_that_are_files_are_the_pool(self, table):
        text = "image,mos,reference\n0.png,1,3\nbelow/1.png,2,below/1.png\n2.png,3,3\n"
        rated = read_ratings(table(text))
        assert {name: Path(file).name for name, file in rated.pristine.items()} == {
            "3": "3.png",
            "below/1.png": "1.png",
        }
        assert read_ratings(table(text.replace("2.png,3,3", "2.png,3,other"))).pristine is None

    def test_absolute_paths(self, table, tmp_path):
        assert shades(read_ratings(table(SIMPLE.replace("2.png", f"{tmp_path}/2.png")))) == [0, 1, 2]

    def test_select(self, table):
        rated = read_ratings(table("image,mos,split\n0.png,1,test\nbelow/1.png,2,train\n2.png,3,train\n")).select(
            [2, 0]
        )
        assert (rated.names, rated.scores.tolist(), rated.splits) == (["2.png", "0.png"], [3, 1], ["train", "test"])
        assert shades(rated.select([1, 0])) == [0, 2]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (SIMPLE.replace("mos", "score"), "no column mos; it has image, score$"),
            (SIMPLE.replace("2.5", "nan").replace("4\n", "inf\n"), r"no finite numbers: rows 2, 3 \(the header"),
            (SIMPLE.replace("2.5", ""), "no finite numbers: row 2 "),
            (SIMPLE.replace("2.5", "good"), "no finite numbers: row 2 "),
            (SIMPLE.replace("2.png", "4.png"), "images that are not in .*: 4.png"),
            (SIMPLE.replace("2.png", "./0.png"), "there more than once: rows 1, 3 "),
            (SIMPLE.replace("4\n", "1\n").replace("2.5", "1"), r"all 3 scores are equal \(1\)"),
            ("image,mos\n0.png,1\n2.png,2\n", "2 scored images are too few"),
            ("image,mos,split\n0.png,1,train\n2.png,2,dev\n3.png,3,test\n", "none of train, validation, test: row 2 "),
            ("image,mos\n0.png,1,5,6\n", r"x\.csv: "),
            ("", r"x\.csv: No columns"),
        ],
    )
    def test_what_is_wrong_is_told_in_a_line(self, table, text, message):
        """Trap 18, and errors of tables."""
        with pytest.raises(ValueError, match=message) as raised:
            read_ratings(table(text))
        assert "x.csv: " in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_a_damaged_image_is_named_when_it_is_opened(self, table, tmp_path):
        rated = read_ratings(table(SIMPLE))
        (tmp_path / "2.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"2\.png: the file is empty"):
            rated.open(2)


class TestReleases:
    def test_live(self, tmp_path):
        """Trap 6: DMOS, which is turned round. Copies of pristine images are left out."""
        paint(tmp_path, "jp2k/img2.bmp", "jpeg/img1.bmp", "fastfading/img174.bmp", "refimgs/a.bmp", "refimgs/b.bmp")
        dmos, orgs = np.zeros((1, 982)), np.ones((1, 982), np.uint8)
        for place, score in ((1, 20.0), (227, 90.5), (981, 0.0)):
            dmos[0, place], orgs[0, place] = score, 0
        scipy.io.savemat(tmp_path / "dmos_realigned.mat", {"dmos_new": dmos, "orgs": orgs})
        scipy.io.savemat(tmp_path / "refnames_all.mat", {"refnames_all": cells(["a.bmp", "b.bmp"] * 491).T})
        rated = read_ratings(tmp_path)
        assert rated.scores.tolist() == [80, 9.5, 100]
        assert (rated.low, rated.high) == (0, 100)
        assert rated.references == ["b.bmp", "b.bmp", "b.bmp"]
        assert rated.distortions == ["jp2k", "jpeg", "fastfading"]
        assert (shades(rated), list(rated.pristine)) == ([0, 1, 2], ["b.bmp"])
        assert read_ratings(tmp_path, lower_better=False).scores.tolist() == [20, 90.5, 0]

    def test_csiq(self, tmp_path):
        paint(
            tmp_path, "dst_imgs/awgn/1600.AWGN.1.png", "dst_imgs/jpeg2000/trolley.jpeg2000.5.png",
            "dst_imgs/contrast/1600.contrast.3.png", "src_imgs/1600.png", "src_imgs/trolley.png",
        )  # fmt: skip
        rows = [
            (None, "DMOS of CSIQ"),
            (None,),
            ("", "image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"),
            ("", 1600, 1, "noise", 1, 0.01, 0.062),
            ("", "trolley", 3, "jpeg 2000", 5, 0.01, 0.9),
            ("", 1600, 6, "contrast", 3, 0.01, 0.25),
        ]
        sheet(tmp_path / "csiq.DMOS.xlsx", rows, "all_by_image")
        rated = read_ratings(tmp_path)
        np.testing.assert_allclose(rated.scores, [0.938, 0.1, 0.75])
        assert rated.references == ["1600", "trolley", "1600"]
        assert rated.distortions == ["awgn", "jpeg2000", "contrast"]
        assert (shades(rated), rated.low, rated.high) == ([0, 1, 2], 0, 1)
        assert sorted(rated.pristine) == ["1600", "trolley"]

    def test_tid2013_in_whatever_case(self, tmp_path):
        paint(
            tmp_path, "distorted_images/i01_08_3.bmp", "distorted_images/I02_11_1.BMP", "distorted_images/i01_24_5.bmp"
        )
        paint(tmp_path, "reference_images/I01.BMP", "reference_images/i02.bmp")
        (tmp_path / "mos_with_names.txt").write_text("5.5 I01_08_3.bmp\n4 i02_11_1.bmp\n1.25 I01_24_5.bmp\n")
        rated = read_ratings(tmp_path)
        assert rated.scores.tolist() == [5.5, 4, 1.25]
        assert (rated.references, rated.distortions) == (["I01", "I02", "I01"], ["8", "11", "24"])
        assert (shades(rated), rated.low, rated.high, sorted(rated.pristine)) == ([0, 1, 2], 0, 9, ["I01", "I02"])

    def test_kadid_dmos_is_higher_better(self, tmp_path):
        """Trap 6."""
        paint(
            tmp_path,
            "images/I01_01_01.png",
            "images/I01_01_05.png",
            "images/I02_25_03.png",
            "images/I01.png",
            "images/I02.png",
        )
        (tmp_path / "dmos.csv").write_text(
            "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.4\nI01_01_05.png,I01.png,1.2,0.5\nI02_25_03.png,I02.png,3,1\n"
        )
        rated = read_ratings(tmp_path)
        assert rated.scores.tolist() == [4.57, 1.2, 3]
        assert (rated.low, rated.high) == (1, 5)
        assert (rated.references, rated.distortions) == (["I01", "I01", "I02"], ["1", "1", "25"])
        assert sorted(rated.pristine) == ["I01", "I02"]

    def test_livec_skips_the_first_seven(self, tmp_path):
        paint(tmp_path, "Images/3.bmp", "Images/4.JPG", "Images/5.bmp")
        names = [f"t{i}.bmp" for i in range(1, 8)] + ["3.bmp", "4.JPG", "5.bmp"]
        (tmp_path / "Data").mkdir()
        scipy.io.savemat(tmp_path / "Data" / "AllImages_release.mat", {"AllImages_release": cells(names)})
        scipy.io.savemat(tmp_path / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.arange(10.0)[None]})
        rated = read_ratings(tmp_path)
        assert (rated.scores.tolist(), rated.names, shades(rated)) == (
            [7, 8, 9],
            ["3.bmp", "4.JPG", "5.bmp"],
            [0, 1, 2],
        )
        assert (rated.low, rated.high, rated.references) == (0, 100, None)

    def test_koniq(self, tmp_path):
        paint(tmp_path, "1024x768/0.jpg", "1024x768/1.jpg", "1024x768/2.jpg")
        sets = "image_name,MOS,SD,set\n0.jpg,30,1,training\n1.jpg,50,1,validation\n2.jpg,70.5,1,test\n"
        (tmp_path / "koniq10k_distributions_sets.csv").write_text(sets)
        rated = read_ratings(tmp_path)
        assert (rated.scores.tolist(), rated.splits) == ([30, 50, 70.5], ["train", "validation", "test"])
        assert (rated.resize, rated.low, rated.high) == ((384, 512), 1, 100)
        scores = '"image_name","MOS","MOS_zscore"\n0.jpg,3,31\n1.jpg,4,51\n2.jpg,5,71\n'
        (tmp_path / "koniq10k_scores_and_distributions.csv").write_text(scores)
        rated = read_ratings(tmp_path)
        assert (rated.scores.tolist(), rated.splits) == ([31, 51, 71], None)

    def test_livefb(self, tmp_path):
        paint(tmp_path, "database/voc/a.jpg", "database/voc/b.jpg", "database/c.jpg")
        (tmp_path / "labels_image.csv").write_text(
            "name,mos,is_valid\nvoc/a.jpg,70,False\nvoc/b.jpg,60,True\nc.jpg,40,True\n"
        )
        rated = read_ratings(tmp_path)
        assert (rated.scores.tolist(), shades(rated)) == ([70, 60, 40], [0, 1, 2])

    def test_spaq(self, tmp_path):
        paint(tmp_path, "TestImage/00001.jpg", "TestImage/00002.jpg", "TestImage/00003.jpg")
        rows = [("Image name", "MOS", "Brightness"), ("00001.jpg", 69, 1), ("00002.jpg", 22.5, 2), ("00003.jpg", 80, 3)]
        sheet(tmp_path / "Annotations" / "MOS and Image attribute scores.xlsx", rows)
        rated = read_ratings(tmp_path)
        assert (rated.scores.tolist(), shades(rated), rated.high) == ([69, 22.5, 80], [0, 1, 2], 100)

    @pytest.mark.parametrize("name", ["csiq.DMOS.xlsx", "dmos_realigned.mat", "dmos.csv"])
    def test_damaged_tables(self, tmp_path, name):
        scipy.io.savemat(tmp_path / "refnames_all.mat", {"refnames_all": cells(["a.bmp"])})
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(200))
        with pytest.raises(ValueError, match=name):
            read_ratings(tmp_path)

    def test_other_names(self, tmp_path):
        paint(tmp_path, "images/x.png")
        (tmp_path / "dmos.csv").write_text("dist_img,ref_img,dmos,var\nx.png,I01.png,4.57,0.4\n")
        with pytest.raises(ValueError, match=r"names that are not as I01_08_3\.bmp: row 1"):
            read_ratings(tmp_path)


def test_what_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file or folder; expected a CSV"):
        read_ratings(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no label file that is known; expected a CSV with"):
        read_ratings(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match="expected a CSV"):
        read_ratings(tmp_path / "x.txt")


class TestReferences:
    def test_a_folder(self, tmp_path):
        paint(tmp_path, "b.png", "below/a.JPG", "c.png")
        (tmp_path / "notes.txt").touch()
        assert [file.name for file in read_references(tmp_path)] == ["b.png", "a.JPG", "c.png"]

    def test_fewer_than_two(self, tmp_path):
        """Trap 10."""
        paint(tmp_path, "a.png")
        with pytest.raises(ValueError, match="reference pool needs at least 2 images, found 1"):
            read_references(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such folder of pristine images"):
            read_references(tmp_path / "none")

    def test_bsds_without_data(self, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        with pytest.raises(ValueError, match="set PAPERCORE_DATA"):
            read_references("bsds")

    @REAL
    def test_bsds(self):
        assert len(read_references("bsds")) == 200


@REAL
def test_the_whole_table_of_tid2013(tmp_path):
    """The label table is the real one; its 3000 images are one file under 3000 names, all but the one that is at hand."""
    folder = Path(str(DATA)) / "iqa-distill"
    rows = pd.read_csv(folder / "tid2013_mos.csv")
    paint(tmp_path, "one.bmp")
    (tmp_path / "distorted_images").mkdir()
    for name in rows["image"]:
        target = folder / "tid2013_i01_01_5.png" if name == "i01_01_5" else tmp_path / "one.bmp"
        (tmp_path / "distorted_images" / f"{name.upper()}.BMP").symlink_to(target)
    (tmp_path / "mos_with_names.txt").write_text(
        "".join(f"{m} {n}.bmp\n" for m, n in zip(rows["mos"], rows["image"], strict=True))
    )
    rated = read_ratings(tmp_path)
    assert (len(rated), len(set(rated.references)), len(set(rated.distortions))) == (3000, 25, 24)
    place = rated.names.index("i01_01_5.bmp")
    assert (rated.scores[place], rated.open(place).shape) == (3.8649, (384, 512, 3))
