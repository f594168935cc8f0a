"""Flatness is measured on the models whose weights are kept."""

import numpy as np

from lib.analysis import flatness


def test_flatness_is_positive_and_has_a_row_for_each_model(pair):
    found = flatness.flatness(pair["sam"], 0.2, n_models=4)
    assert found.shape == (4, 2) and (found > 0).all()
    assert (found[:, 1] < flatness.flatness(pair["sam"], 0.4, n_models=4)[:, 1]).all()
    np.testing.assert_array_equal(flatness.flatness(pair["sam"].only([2, 3]), 0.2), found[2:])
