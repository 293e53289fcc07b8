import numpy as np
from eclstm.cmapss import SENSORS, SETTINGS
from eclstm.simulated import simulate
from numpy.testing import assert_array_equal


class TestSimulate:
    def test_is_the_same_for_the_same_seed(self):
        first, again, other = simulate(3, seed=4), simulate(3, seed=4), simulate(3, seed=5)
        assert_array_equal(first.values, again.values)
        assert_array_equal(first.starts, again.starts)
        assert not np.array_equal(first.values[:100], other.values[:100])

    def test_has_the_shape_of_cmapss(self):
        table = simulate(5, seed=0)
        assert table.columns == SETTINGS + SENSORS
        assert table.units == [1, 2, 3, 4, 5]
        assert ((table.lengths >= 100) & (table.lengths <= 300)).all()
        assert_array_equal(table.remaining, 0)
        assert sum(len(np.unique(column)) == 1 for column in table.values[:, 3:].T) == 4  # four sensors never change

    def test_cut_histories_end_before_failure(self):
        table = simulate(20, seed=1, cut=True)
        assert (table.remaining >= 5).all()
        assert (table.lengths >= 30).all()

    def test_flies_in_the_conditions_asked_for(self):
        flown = simulate(5, seed=0, conditions=2).values[:, 0].round(-1)
        assert_array_equal(np.unique(flown), [0, 10])
