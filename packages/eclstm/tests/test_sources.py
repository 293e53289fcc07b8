import pytest
from eclstm.data import RunToFailure
from eclstm.sources import DataOptions, load
from numpy.testing import assert_array_equal


class TestLoad:
    def test_simulated_fleets_are_the_default_and_the_same_for_every_seed(self):
        train, test = load(DataOptions(), seed=0)
        again, _ = load(DataOptions(), seed=7)
        assert len(train) == 20
        assert len(test) == 40
        assert_array_equal(train.remaining, 0)
        assert (test.remaining > 0).all()
        assert_array_equal(train.values, again.values)

    def test_cmapss_is_read_below_papercore_data(self, cmapss_folder, monkeypatch, tmp_path):
        cmapss_folder.rename(tmp_path / "eclstm")
        monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
        train, test = load(DataOptions(data="cmapss"), seed=0)
        assert len(train) == 2
        assert len(test) == 3

    def test_cmapss_without_papercore_data_says_so(self, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        with pytest.raises(ValueError, match="set PAPERCORE_DATA, or give the folder or archive itself"):
            load(DataOptions(data="cmapss"), seed=0)

    @pytest.mark.parametrize("name", ["", "a.zip", "a.tar.xz", "a.tar.gz", "a.tgz"])
    def test_folders_and_archives_are_cmapss_sets(self, cmapss_folder, tmp_path, name, pack):
        if name:
            pack(cmapss_folder, {"a.zip": "zip", "a.tar.xz": "xz"}.get(name, "gz"), tmp_path / name)
        _, test = load(DataOptions(data=str(tmp_path / name if name else cmapss_folder)), seed=0)
        assert_array_equal(test.remaining, [40, 150, 10])

    def test_a_table_alone_holds_out_a_fifth_of_its_units_cut_short(self, tiny_table):
        whole = RunToFailure(tiny_table)
        train, test = load(DataOptions(data=str(tiny_table)), seed=0)
        assert len(train) == 8
        assert sorted(train.units + test.units) == whole.units
        assert_array_equal(train.remaining, 0)
        lives = whole.lengths[[whole.units.index(u) for u in test.units]]
        assert (test.lengths > lives // 5).all()
        assert_array_equal(test.lengths + test.remaining, lives)
        assert (test.remaining > 0).any()
        again, other = load(DataOptions(data=str(tiny_table)), seed=0), load(DataOptions(data=str(tiny_table)), seed=3)
        assert_array_equal(again[1].lengths, test.lengths)
        assert other[1].units != test.units

    def test_test_data_is_read_with_the_columns_of_the_training_table(self, tiny_frame, tiny_table, tmp_path):
        path = tmp_path / "test.csv"
        tiny_frame[["flow", "cycle", "unit", "serial", "noise", "heat"]].assign(extra=1).to_csv(path, index=False)
        train, test = load(DataOptions(data=str(tiny_table), test_data=str(path)), seed=0)
        assert train.columns == test.columns == ["heat", "flow", "noise", "serial"]
        assert_array_equal(train.values, test.values)
        tiny_frame.drop(columns="flow").to_csv(path, index=False)
        with pytest.raises(ValueError, match=r"test\.csv: column 'flow' is missing"):
            load(DataOptions(data=str(tiny_table), test_data=str(path)), seed=0)

    def test_columns_may_have_other_names(self, tiny_frame, tmp_path):
        path = tmp_path / "pumps.csv"
        tiny_frame.rename(columns={"unit": "pump", "cycle": "hours"}).to_csv(path, index=False)
        train, _ = load(DataOptions(data=str(path), unit="pump", time="hours", features=["heat"]), seed=0)
        assert train.columns == ["heat"]
        assert len(train) == 8

    @pytest.mark.parametrize("data", ["simulated", "nowhere.csv"])
    def test_cap_is_checked_first(self, data):
        with pytest.raises(ValueError, match="cap must be a positive number of cycles, got -1"):
            load(DataOptions(data=data, cap=-1), seed=0)

    def test_short_names_for_folders_and_titles(self):
        assert DataOptions(data="cmapss", subset="FD003").name == "FD003"
        assert DataOptions(data="some/where/pumps.csv.gz").name == "pumps"
        assert DataOptions().name == "simulated"
