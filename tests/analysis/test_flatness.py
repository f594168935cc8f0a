"""Flatness is positive and paired."""

import numpy as np
import pytest

from lib.analysis import flatness


def test_flatness_is_positive_and_paired(pair):
    frame = flatness.flatness_table(pair, 0.2).set_index(["optimizer", "baseline", "metric"]).value
    for metric in ("hessian_top_eigenvalue", "loss_rise_in_ball"):
        own = frame["sam", "", metric], frame["sgd", "", metric]
        assert own[1] > 0 and frame["sam", "sgd", metric] == pytest.approx(own[0] - own[1])
        assert frame["sam", "sgd", f"log_ratio_{metric}"] == pytest.approx(np.log(own[0] / own[1]))
