import numpy as np
import pandas as pd
import pytest
from iqa_distill import resynth
from iqa_distill.gmsd import psnr
from iqa_distill.resynth import make_resynth, read_resynth
from PIL import Image
from skimage import data


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Data as in the published tables, of one small picture and two kinds."""
    folder = tmp_path / "data" / "iqa-distill"
    (folder / "kodak24").mkdir(parents=True)
    Image.fromarray(data.coffee()[100:240, 200:340]).save(folder / "kodak24" / "07.png")
    crops = [{"reference": "I07", "kodak_file": "07.png", "y0": 4, "x0": 8, "height": 96, "width": 128}]
    pd.DataFrame(crops).to_csv(folder / "tid2013_reference_crops.csv", index=False)
    ratings = [
        {"reference": reference, "distortion_id": number, "level": level, "mos": number / 10 + 6 - level}
        for reference in ("I07", "I25")
        for number in range(1, 25)
        for level in range(1, 6)
    ]
    pd.DataFrame(ratings).sample(frac=1, random_state=0).to_csv(folder / "tid2013_mos.csv", index=False)
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(resynth, "TID2013_DISTORTIONS", {1: "gaussian noise", 10: "jpeg"})
    return folder


def test_images_have_the_nominal_psnr_and_the_score_of_their_kind_and_level(source, tmp_path):
    rated = read_resynth(tmp_path / "made", 1)
    assert len(rated) == 10
    assert rated.names[:2] == ["I07_01_1.png", "I07_01_2.png"]
    assert rated.scores == pytest.approx([5.1, 4.1, 3.1, 2.1, 1.1, 6, 5, 4, 3, 2])
    assert rated.references == ["I07"] * 10
    assert rated.distortions == ["gaussian noise"] * 5 + ["jpeg"] * 5
    assert (rated.low, rated.high) == (0, 9)
    pristine = data.coffee()[104:200, 208:336]
    reached = [psnr(rated.open(i), pristine) for i in range(5)]
    assert reached == pytest.approx([33, 30, 27, 24, 21], abs=0.05)
    assert pd.read_csv(tmp_path / "made" / "ratings.csv")["psnr"][:5].tolist() == pytest.approx(reached, abs=0.006)


def test_any_number_of_workers_makes_the_same_and_a_cut_off_run_goes_on(source, tmp_path, monkeypatch):
    whole, cut = make_resynth(tmp_path / "one", 1).parent, make_resynth(tmp_path / "two", 2).parent
    files = sorted(path.name for path in whole.iterdir())
    assert len(files) == 12
    contents = [(whole / name).read_bytes() for name in files]
    assert [(cut / name).read_bytes() for name in files] == contents
    for name in ("ratings.csv", "I07_10_5.png"):
        (cut / name).unlink()
    kept = (cut / "I07_01_1.png").stat().st_mtime_ns
    make_resynth(cut, 1)
    assert [(cut / name).read_bytes() for name in files] == contents
    assert (cut / "I07_01_1.png").stat().st_mtime_ns == kept
    monkeypatch.delenv("PAPERCORE_DATA")
    assert make_resynth(cut) == cut / "ratings.csv"  # what is whole needs no data


def test_refuses(source, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(ValueError, match="mine holds something else than"):
        make_resynth(tmp_path / "mine")
    (source / "tid2013_mos.csv").unlink()
    with pytest.raises(ValueError, match=r"which lacks tid2013_mos\.csv"):
        make_resynth(tmp_path / "new")
    monkeypatch.delenv("PAPERCORE_DATA")
    with pytest.raises(ValueError, match="set PAPERCORE_DATA"):
        make_resynth(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shared_data_holds_24_references_of_five_levels_and_nine_kinds():
    """The published tables themselves, where they are at hand."""
    try:
        folder = resynth._data()
    except ValueError as error:
        pytest.skip(str(error))
    crops = pd.read_csv(folder / "tid2013_reference_crops.csv")
    ratings = pd.read_csv(folder / "tid2013_mos.csv")
    used = ratings[
        ratings["reference"].isin(crops["reference"]) & ratings["distortion_id"].isin(resynth.TID2013_DISTORTIONS)
    ]
    assert len(crops) == 24
    assert len(used) == 1080
    genuine = np.asarray(Image.open(folder / "tid2013_i01_01_5.png"))
    first = resynth._cut(folder / "kodak24", crops.to_dict("records")[0])
    assert psnr(genuine, first) == pytest.approx(21.0, abs=0.05)
