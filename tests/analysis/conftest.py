"""Two small paired ensembles that all tests of the analysis share, and a stand-in with known properties."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.training import Recipe, train
from tests.conftest import blobs


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """dict optimizer -> Ensemble of 16 models on 120 examples."""
    folder, data = tmp_path_factory.mktemp("pair"), blobs(n=120, t=60)
    recipes = {name: Recipe(optimizer=name, epochs=15, batch_size=10, rho=0.2) for name in ("sgd", "sam")}
    return {name: train(recipe, data, 16, folder, "cpu", quiet=True) for name, recipe in recipes.items()}


def simulated(leak, skill, m=16, n=200, t=150, seed=0, classes=2, groups=None):
    """A stand-in for an Ensemble: members' logits are higher by `leak`, all by `skill`; the noise is shared by seed."""
    rng = np.random.default_rng(seed)
    y, y_test = np.arange(n) % classes, np.arange(t) % classes
    member = np.repeat(rng.random((m // 2, n)) < 0.5, 2, axis=0)
    member[1::2] = ~member[::2]
    logits, test_logits = rng.normal(size=(m, 1, n, classes)), rng.normal(size=(m, 1, t, classes))
    logits[:, 0, np.arange(n), y] += skill + leak * member
    test_logits[:, 0, np.arange(t), y_test] += skill
    about = {"n_classes": classes, "classes": tuple("abcdefghij"[:classes]), "groups": groups, "groups_test": None}
    dataset = SimpleNamespace(y=y, y_test=y_test, **about)
    arrays = {"logits": logits, "test_logits": test_logits, "member": member, "ids": np.arange(m)}
    return SimpleNamespace(**arrays, dataset=dataset, recipe=None)
