"""The label-only attack on trained ensembles: compare.label_only_table and what it stands on."""

from dataclasses import replace

import numpy as np
import pytest

from lib.analysis import compare
from lib.attacks import catalogue, intervals, label_only, thresholds
from lib.attacks.intervals import auc_influence_values
from lib.training import Recipe, train
from tests.conftest import blobs


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    recipe, folder = Recipe(epochs=15, batch_size=10, rho=0.2), tmp_path_factory.mktemp("store")
    data = blobs(n=120, t=60)
    return {o: train(replace(recipe, optimizer=o), data, 10, folder, "cpu", quiet=True) for o in ("sgd", "sam")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    recipe, data = Recipe("cnn", epochs=3, batch_size=8), blobs(n=48, t=16, shape=(3, 16, 16), classes=3)
    return train(recipe, data, 8, tmp_path_factory.mktemp("store"), "cpu", quiet=True)


def test_unchanged_inputs_are_labelled_as_the_stored_logits_say(images, tables):
    for ensemble in (images, tables["sgd"]):
        found = compare.label_answers(ensemble, range(8))
        gap = catalogue.run(np.array(ensemble.logits), ensemble.dataset.y, np.array(ensemble.member), learned=False)[
            "gap"
        ]
        np.testing.assert_array_equal(found[0], gap[:8])


def test_trained_models_are_told_by_their_labels_and_no_shuffled_ones(tables):
    member = np.array(tables["sgd"].member)
    answered = compare.label_answers(tables["sgd"], range(10))
    found = label_only.scores(answered, member)
    assert found.shape == (10, 120) and found.dtype == np.float32
    assert intervals.estimate(auc_influence_values(found, member)).low > 0.5
    shuffled = [catalogue.null_member(member, seed) for seed in range(20)]
    null = [auc_influence_values(label_only.scores(answered, alleged), alleged).mean() for alleged in shuffled]
    assert np.mean(null) == pytest.approx(0.5, abs=0.02)


def test_one_example_is_asked_as_among_all(tables, images):
    one, ids = compare.label_only_of_one(images, 5, 8)
    np.testing.assert_array_equal(compare.label_answers(images, ids)[1][:, [5]], one)
    one, ids = compare.label_only_of_one(tables["sgd"], 5, 8)
    member = np.array(tables["sgd"].only(ids).member)
    np.testing.assert_array_equal(label_only.scores(compare.label_answers(tables["sgd"], ids), member)[:, [5]], one)


def test_table_has_both_attacks_each_optimizer_and_the_paired_difference(tables):
    pair = {"sgd": tables["sgd"], "sam": tables["sam"].only([0, 1, 2, 3, 6, 7, 8, 9])}
    frame = compare.label_only_table(pair)
    auc = frame[frame.metric == "auc"].set_index(["attack", "optimizer", "baseline"]).value
    ids, y = [0, 1, 2, 3, 6, 7, 8, 9], tables["sgd"].dataset.y
    assert set(frame.n_models) == {8}
    for name, ensemble in pair.items():
        member = np.array(ensemble.only(ids).member)
        scores = label_only.scores(compare.label_answers(ensemble, ids), member)
        assert auc["label_only", name, ""] == pytest.approx(auc_influence_values(scores, member).mean())
        by_class = thresholds.classwise(scores, member, y)
        assert auc["label_only_classwise", name, ""] == pytest.approx(auc_influence_values(by_class, member).mean())
    difference = auc["label_only", "sam", ""] - auc["label_only", "sgd", ""]
    assert auc["label_only", "sam", "sgd"] == pytest.approx(difference)
    own = frame[(frame.optimizer == "sam") & (frame.baseline == "") & (frame.metric == "balanced_accuracy")]
    expected = intervals.balanced_accuracy_influence_values(by_class, member, 0.0).mean()
    assert own.set_index("attack").value["label_only_classwise"] == pytest.approx(expected)
    null = frame[frame.metric == "null_auc"].set_index("optimizer")
    assert list(null.index) == ["sgd", "sam"] and null.value.between(0.4, 0.6).all()


def test_too_few_models_are_named(tables):
    with pytest.raises(ValueError, match="n_models: only 6 models .* 8 are needed"):
        compare.label_only_table({"sgd": tables["sgd"], "sam": tables["sam"].only(range(6))})
    with pytest.raises(ValueError, match="n_models=7 is not valid"):
        compare.models_with_weights([tables["sgd"]], 7)
    with pytest.raises(ValueError, match="n_models: only 6 "):  # a half pair does not count
        compare.models_with_weights([tables["sgd"].only([0, 1, 2, 3, 4, 5, 6])])
