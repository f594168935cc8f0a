import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.data.dataset import inputs
from lib.training import Recipe, ensemble, recipe, step, store, train, workers
from tests.conftest import blobs
from tests.processes import ended, start, until


def arrays(found):
    return {name: np.array(getattr(found, name)) for name in ("logits", "test_logits", "member", "history")}


def assert_same(first, second):
    for name, array in arrays(first).items():
        np.testing.assert_array_equal(array, getattr(second, name), err_msg=name)


def test_halves_are_complementary_pairs_and_each_example_is_in_half_of_the_models():
    member = recipe.membership(Recipe(), 50, range(12))
    assert (member[0::2] != member[1::2]).all()
    assert (member.sum(0) == 6).all() and (member.sum(1) == 25).all()
    assert (member[0] != member[2]).any()


@pytest.mark.parametrize("sizes", [[2] * 20, [1, 1] + [2] * 19, [1, 2, 3, 4] * 4, [3, 3, 4, 10]])
def test_groups_stay_together_in_complementary_halves_of_one_size(sizes):
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    member = recipe.membership(Recipe(), len(groups), range(40), groups)
    assert (member[0::2] != member[1::2]).all() and (member.sum(1) == len(groups) // 2).all()
    for group in range(len(sizes)):
        rows = member[:, groups == group]
        assert (rows.all(1) | ~rows.any(1)).all()
    assert len({row.tobytes() for row in member}) > 2 or len(sizes) == 4
    assert len({row.tobytes() for row in recipe.membership(Recipe(subset=0.3), 40, range(40), np.arange(40))}) == 40


def test_groups_that_cannot_be_halved_are_refused_before_training(table, quick, tmp_path):
    uneven = replace(table, groups=np.repeat([0, 1], [30, 50]))
    with pytest.raises(ValueError, match="n_examples=80: no 40 .*whole groups"):
        train(quick, uneven, 2, tmp_path, "cpu", quiet=True)
    assert not list(tmp_path.iterdir())


def test_groups_reach_the_training(table, quick, tmp_path):
    paired = replace(table, groups=np.arange(80) // 2)
    found = train(quick, paired, 4, tmp_path, "cpu", quiet=True)
    assert (found.member[:, 0::2] == found.member[:, 1::2]).all()
    assert found.store.folder != ensemble.open_store(quick, table, tmp_path).folder


@pytest.mark.parametrize("warmup, n_steps", [(0.05, 400), (0.0, 40), (0.3, 10)])
def test_learning_rate_in_closed_form(warmup, n_steps):
    """A line up to the peak over the first share of the steps; then lr/2 (1 + cos(pi t / T))."""
    settings, rising = Recipe(warmup=warmup, lr=0.2, optimizer="sam"), warmup * n_steps
    for at in range(n_steps):
        cosine = 0.1 * (1 + np.cos(np.pi * (at - rising) / (n_steps - rising)))
        expected = 0.2 * (at + 1) / (rising + 1) if at < rising else cosine
        assert recipe.learning_rate(settings, at, n_steps) == pytest.approx(expected, rel=1e-12)


def test_other_fractions_draw_each_subset_alone():
    member = recipe.membership(Recipe(subset=0.7), 50, range(12))
    assert (member.sum(1) == 35).all()
    assert len({row.tobytes() for row in member}) == 12


def test_model_k_does_not_depend_on_how_many_train_or_on_a_resume(table, quick, tmp_path):
    long = train(quick, table, 40, tmp_path / "at_once", "cpu", quiet=True)
    train(quick, table, 6, tmp_path / "grown", "cpu", quiet=True)
    grown = train(quick, table, 40, tmp_path / "grown", "cpu", quiet=True)
    assert_same(long, grown)


@pytest.mark.parametrize("optimizer", ["looksam(k=3)", "fsam", "esam"])
def test_neither_do_models_whose_rule_remembers_or_draws(table, quick, tmp_path, optimizer):
    """Models 0 to 31 are one group and 32 to 63 the next, whose memory and draws start anew."""
    settings = replace(quick, optimizer=optimizer)
    long = train(settings, table, 40, tmp_path / "at_once", "cpu", quiet=True)
    train(settings, table, 6, tmp_path / "grown", "cpu", quiet=True)
    grown = train(settings, table, 40, tmp_path / "grown", "cpu", quiet=True)
    assert_same(long, grown)
    (grown.store.folder / "done" / "00034.json").unlink()  # as if killed before model 34 was saved
    assert_same(long, train(settings, table, 40, tmp_path / "grown", "cpu", quiet=True))


def test_only_new_models_train_when_the_number_is_raised(images, tmp_path, monkeypatch):
    recipe = Recipe("cnn", epochs=1, batch_size=8)
    trained, plain = [], ensemble.train_chunk
    monkeypatch.setattr(
        ensemble, "train_chunk", lambda r, i, ids, *more: (trained.extend(ids), plain(r, i, ids, *more))[1]
    )
    train(recipe, images, 2, tmp_path, "cpu", quiet=True)
    train(recipe, images, 4, tmp_path, "cpu", quiet=True)
    assert trained == [0, 1, 2, 3]


def test_optimizers_are_paired_and_seeds_are_not(table, quick, tmp_path):
    sgd, sam = (train(replace(quick, optimizer=o), table, 4, tmp_path, "cpu", quiet=True) for o in ("sgd", "sam"))
    other = train(replace(quick, seed=1), table, 4, tmp_path, "cpu", quiet=True)
    np.testing.assert_array_equal(sgd.member, sam.member)
    assert (np.array(sgd.member) != other.member).any()
    start = [step.initial_state(e.recipe, (6,), 4, range(4), "cpu")[0]["1.weight"] for e in (sgd, sam, other)]
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])


@pytest.mark.parametrize("change", [dict(lr=0.05), dict(epochs=4), dict(batch_size=4), dict(seed=3), dict(subset=0.7)])
def test_a_changed_setting_never_reuses_a_model(table, quick, tmp_path, change):
    first = ensemble.open_store(quick, table, tmp_path).folder
    assert ensemble.open_store(replace(quick, **change), table, tmp_path).folder != first


def test_changed_data_never_reuses_a_model_and_sgd_ignores_rho(table, quick, tmp_path):
    first = ensemble.open_store(quick, table, tmp_path).folder
    x = table.x.copy()
    x[0, 0] += 1
    assert ensemble.open_store(quick, replace(table, x=x), tmp_path).folder != first
    assert ensemble.open_store(replace(quick, rho=0.7), table, tmp_path).folder == first


@pytest.mark.parametrize("damage", ["flip", "truncate", "flag", "header", "missing"])
def test_damage_is_named_and_recomputed(table, quick, tmp_path, damage):
    before = arrays(train(quick, table, 4, tmp_path, "cpu", quiet=True))
    folder = ensemble.open_store(quick, table, tmp_path).folder
    logits, size = folder / "logits.npy", (folder / "logits.npy").stat().st_size
    if damage == "flag":
        (folder / "done" / "00002.json").write_text("{half a fl")
    elif damage == "missing":
        logits.unlink()
    elif damage == "truncate":
        os.truncate(logits, 128 + (size - 128) * 5 // 64)  # in the middle of model 2's row of 32
    else:
        with open(logits, "r+b") as file:
            file.seek(20 if damage == "header" else 128 + 500)
            file.write(b"\xff\xfe")
    with pytest.warns(UserWarning, match="damaged"):
        after = arrays(train(quick, table, 4, tmp_path, "cpu", quiet=True))
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


SHARED = Recipe("cnn", "sam", 0.1, epochs=2, batch_size=8)


def train_images(folder):
    """What several processes train into one store: 24 models, each a chunk of its own."""
    train(SHARED, blobs(48, 16, (3, 16, 16), 3), 24, folder, "cpu", quiet=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The arrays that one undisturbed process makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended(start(train_images, folder)) == 0
    return train(SHARED, blobs(48, 16, (3, 16, 16), 3), 24, folder, "cpu", quiet=True)


def n_finished(folder):
    return len(list(folder.glob("*/done/*.json")))


def test_killed_at_any_moment_it_goes_on_to_the_same_arrays(images, tmp_path, undisturbed):
    kills = 0
    for wanted in (0, 1, 4, 7, 11, 15):
        process = start(train_images, tmp_path)
        while process.is_alive() and n_finished(tmp_path) < wanted:
            time.sleep(0.005)
        process.kill()
        kills += ended(process) == -signal.SIGKILL
    assert kills >= 4 and 0 < n_finished(tmp_path) < 24
    assert ended(start(train_images, tmp_path)) == 0
    assert_same(undisturbed, train(SHARED, images, 24, tmp_path, "cpu", quiet=True))


def test_a_run_waits_for_the_chunk_that_another_trains_and_takes_the_others(images, tmp_path):
    claim = ensemble.open_store(SHARED, images, tmp_path).claim(5)
    said = tmp_path / "said"
    second = start(train_images, tmp_path, said=said)
    until(lambda: said.exists() and "another run is training" in said.read_text(), 60)
    assert second.is_alive() and n_finished(tmp_path) == 23
    claim.release()  # as the system does when its holder dies
    assert ended(second) == 0 and n_finished(tmp_path) == 24


def test_runs_that_share_a_store_share_the_work_and_change_nothing(images, tmp_path, undisturbed):
    runs = [start(train_images, tmp_path) for _ in range(2)]
    assert [ended(run) for run in runs] == [0, 0] and n_finished(tmp_path) == 24
    assert_same(undisturbed, train(SHARED, images, 24, tmp_path, "cpu", quiet=True))


def test_what_another_run_finished_meanwhile_is_not_trained_again(table, quick, tmp_path, monkeypatch):
    """A chunk is claimed after the look into the store: a model saved in between counts."""
    train(quick, table, 4, tmp_path, "cpu", quiet=True)
    stale = ensemble.open_store(quick, table, tmp_path)
    monkeypatch.setattr(ensemble, "train_chunk", None)  # training anything would fail
    inputs = ensemble.Inputs(table, quick, torch.device("cpu"))
    assert workers.train_one(quick, inputs, range(4), stale, 4) == 0
    assert [stale.flag(k)["status"] for k in range(4)] == ["finished"] * 4


def test_a_worker_that_does_not_wait_trains_what_is_free(images, tmp_path):
    recipe = Recipe("cnn", epochs=1, batch_size=8)
    kept = ensemble.open_store(recipe, images, tmp_path)
    claim = kept.claim(2)
    assert train(recipe, images, 4, tmp_path, "cpu", quiet=True, wait=False) is None
    kept = ensemble.open_store(recipe, images, tmp_path)
    assert [kept.flag(k) is not None for k in range(4)] == [True, True, False, True]
    claim.release()


@pytest.mark.parametrize(
    "optimizer, error",
    [("sgd", torch.OutOfMemoryError("CUDA out of memory")), ("looksam(k=2)", MemoryError())]
    + [("sgd", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))],
)
def test_a_chunk_for_which_memory_runs_out_is_halved(table, quick, tmp_path, monkeypatch, capsys, optimizer, error):
    recipe = replace(quick, optimizer=optimizer)
    whole, plain, tried = train(recipe, table, 8, tmp_path / "whole", "cpu", quiet=True), ensemble.train_chunk, []

    def small(recipe, inputs, ids, *more):
        tried.append(len(ids))
        if len(ids) > 2:
            raise error
        return plain(recipe, inputs, ids, *more)

    monkeypatch.setattr(step, "n_stacked_for", lambda net, device: 8)
    monkeypatch.setattr(ensemble, "train_chunk", small)
    halved = train(recipe, table, 8, tmp_path / "halved", "cpu", quiet=True)
    assert tried == [8, 4, 2, 2, 4, 2, 2] and "4 models are trained at once instead of 8" in capsys.readouterr().out
    np.testing.assert_allclose(halved.logits, whole.logits, rtol=1e-3, atol=1e-4)
    assert (halved.member == whole.member).all()
    monkeypatch.setattr(ensemble, "train_chunk", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="batch_size=8.*memory"):
        train(recipe, table, 2, tmp_path / "none", "cpu", quiet=True)


def test_an_average_over_steps_is_the_moving_average_and_zero_is_none(table, quick, tmp_path):
    plain = train(quick, table, 2, tmp_path, "cpu", quiet=True)
    recipe, weights, plain_step = replace(quick, ema=0.9), [], step.Stack.step

    def look(self, *args, **how):
        found = plain_step(self, *args, **how)
        weights.append({n: w[:2].clone() for n, w in self.params.items()})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Stack, "step", look)
        averaged = train(recipe, table, 2, tmp_path, "cpu", quiet=True)
    mean = weights[0]
    for t, now in enumerate(weights):
        d = min(0.9, (1 + t) / (10 + t))
        mean = {n: d * mean[n] + (1 - d) * now[n] for n in mean}
    _, params, _ = averaged.weights(1)
    for name, weight in params.items():
        torch.testing.assert_close(weight, mean[name][1], rtol=1e-4, atol=1e-5)
    assert (np.asarray(plain.logits) != averaged.logits).any()
    assert averaged.store.folder != plain.store.folder


def test_many_logits_are_kept_in_half_precision(table, quick, tmp_path, monkeypatch):
    full = train(quick, table, 2, tmp_path / "full", "cpu", quiet=True)
    monkeypatch.setattr(ensemble, "HALF", 1)
    half = train(quick, table, 2, tmp_path / "half", "cpu", quiet=True)
    assert half.logits.dtype == half.test_logits.dtype == np.float16 and half.history.dtype == np.float32
    np.testing.assert_allclose(half.logits, full.logits, rtol=1e-3, atol=1e-3)


def test_a_diverging_model_is_named_and_left_out_with_its_partner(table, quick, tmp_path, monkeypatch, capsys):
    plain = step.initial_state

    def with_infinite_weights(recipe, shape, n_classes, ids, device):
        params, buffers = plain(recipe, shape, n_classes, ids, device)
        for weight in params.values():
            weight[[2, 7]] = np.inf
        return params, buffers

    monkeypatch.setattr(step, "initial_state", with_infinite_weights)
    found = train(replace(quick, optimizer="sam"), table, 8, tmp_path, "cpu", quiet=True)
    said = capsys.readouterr().out
    assert "models [2, 7] diverged" in said and found.ids.tolist() == [0, 1, 4, 5]
    assert np.isfinite(found.logits).all() and found.logits.shape[0] == 4
    assert_same(found, train(found.recipe, table, 8, tmp_path, "cpu", quiet=True))


def test_a_loss_stuck_at_chance_counts_as_diverged(table, tmp_path, capsys):
    found = train(Recipe(lr=1e-9, epochs=5, batch_size=8), table, 2, tmp_path, "cpu", quiet=True)
    assert "diverged" in capsys.readouterr().out and len(found.ids) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["sam", "looksam(k=3)", "fsam", "esam", "gsam"])
def test_compiled_training_agrees_with_eager(table, tmp_path, monkeypatch, optimizer):
    settings = Recipe(optimizer=optimizer, rho=0.2, epochs=3, batch_size=8)
    eager = train(settings, table, 20, tmp_path / "eager", "cpu", quiet=True)
    monkeypatch.setattr(step, "worth_compiling", lambda *_: True)
    compiled = train(settings, table, 20, tmp_path / "compiled", "cpu", quiet=True)
    kept = dict(step.STACKS)
    assert kept, "nothing was compiled"
    np.testing.assert_allclose(compiled.logits, eager.logits, rtol=1e-3, atol=1e-4)
    again = train(settings, table, 20, tmp_path / "again", "cpu", quiet=True)
    assert step.STACKS == kept, "a second run compiled again"
    assert_same(compiled, again)


def test_augmentation_moves_and_mirrors_pictures(images):
    inputs = ensemble.Inputs(images, Recipe("cnn", augment=True, queries=4), torch.device("cpu"))
    index, centre = torch.arange(5), torch.from_numpy(inputs.border).expand(5, 2)
    still = inputs.crop(index, centre, torch.zeros(5, dtype=bool))
    assert torch.equal(still, inputs.x[:5])
    assert torch.equal(inputs.crop(index, centre, torch.ones(5, dtype=bool)), inputs.x[:5].flip(-1))
    moved = inputs.crop(index, centre - torch.tensor([1, 0]), torch.zeros(5, dtype=bool))
    assert torch.equal(moved[:, :, 1:], inputs.x[:5, :, :-1])
    assert torch.equal(inputs.query(1)[0], inputs.x.flip(-1)) and not torch.equal(inputs.query(2)[1], inputs.x_test)


@pytest.mark.parametrize("shape, border", [((20, 200), [2, 25]), ((1, 9), [0, 1]), ((9, 1), [1, 0]), ((1, 1), [0, 0])])
def test_pictures_of_any_shape_are_augmented_by_an_eighth_of_each_side(shape, border, tmp_path):
    pictures = blobs(24, 8, (1, *shape), classes=2)
    inputs = ensemble.Inputs(pictures, Recipe(augment=True), torch.device("cpu"))
    assert inputs.border.tolist() == border
    corner = inputs.crop(torch.arange(24), torch.zeros(24, 2, dtype=int), torch.zeros(24, dtype=bool))
    rows, columns = (np.abs(np.arange(side) - edge) for side, edge in zip(shape, border, strict=True))
    assert torch.equal(corner, inputs.x[:, :, rows][..., columns])  # a reflection: the pixel -1 is the pixel 1
    assert torch.equal(inputs.query(10)[0], corner)
    found = train(Recipe(epochs=1, batch_size=8, augment=True, queries=18), pictures, 2, tmp_path, "cpu", quiet=True)
    assert found.logits.shape == (2, 18, 24, 2) and np.isfinite(found.logits).all()


def test_augmented_queries_reach_the_store(images, tmp_path):
    found = train(
        Recipe("cnn", epochs=1, batch_size=8, augment=True, queries=3), images, 2, tmp_path, "cpu", quiet=True
    )
    assert found.logits.shape == (2, 3, 48, 3) and found.test_logits.shape == (2, 3, 16, 3)
    assert (found.logits[:, 0] != found.logits[:, 1]).any()


def test_kept_weights_give_the_stored_logits(table, quick, tmp_path):
    found = train(quick, table, 4, tmp_path, "cpu", quiet=True)
    net, params, buffers = found.weights(3)
    again = torch.func.functional_call(net, (params, buffers), (torch.from_numpy(inputs(found.dataset)[0]),))
    np.testing.assert_allclose(again, found.logits[3, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "field, value",
    [("arch", "vgg99"), ("optimizer", "sammy"), ("optimizer", "sam+rmsprop"), ("rho", -0.1), ("lr", 0.0), ("epochs", 0),
     ("batch_size", 0), ("subset", 0.0), ("subset", 1.0), ("weight_decay", -1.0), ("precision", "float8"),
     ("queries", 19)],
)  # fmt: skip
def test_a_bad_recipe_names_the_field(field, value):
    with pytest.raises(ValueError, match="optimizers" if field == "optimizer" else field):
        Recipe(**{"optimizer": "sam", field: value})


def test_a_bad_ensemble_is_refused_before_training(table, quick, tmp_path):
    for n_models in (1, 3, 0):
        with pytest.raises(ValueError, match="n_models"):
            train(quick, table, n_models, tmp_path, "cpu")
    with pytest.raises(ValueError, match="batch_size"):
        train(replace(quick, batch_size=41), table, 2, tmp_path, "cpu")
    with pytest.raises(ValueError, match="device"):
        train(quick, table, 2, tmp_path, "tpu")
    with pytest.raises(ValueError, match="augment"):
        train(replace(quick, augment=True), table, 2, tmp_path, "cpu")


def test_a_full_disk_and_an_unwritable_store_are_said(table, quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="store"):
        train(quick, table, 2, tmp_path / "file", "cpu", quiet=True)
    full = shutil._ntuple_diskusage(10**9, 10**9, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ValueError, match="store.*need"):
        train(quick, table, 2, tmp_path / "full", "cpu", quiet=True)


def test_a_disk_that_fills_up_in_mid_run_is_said_and_finished_models_are_kept(images, tmp_path, monkeypatch):
    recipe, plain = Recipe("cnn", epochs=1, batch_size=8), store.Rows.write

    def full(self, index, row):
        if index == 2:
            raise OSError(28, "No space left on device")
        plain(self, index, row)

    monkeypatch.setattr(store.Rows, "write", full)
    with pytest.raises(ValueError, match="store.*No space left.*2 finished models are kept"):
        train(recipe, images, 4, tmp_path, "cpu", quiet=True)
    monkeypatch.setattr(store.Rows, "write", plain)
    resumed = train(recipe, images, 4, tmp_path, "cpu", quiet=True)
    assert_same(resumed, train(recipe, images, 4, tmp_path / "undisturbed", "cpu", quiet=True))


def test_the_layout_in_which_images_were_read_does_not_reach_the_training(images, quick):
    strided = replace(images, x=np.ascontiguousarray(images.x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    assert strided.hash == images.hash and not strided.x.flags.c_contiguous
    one, other = (ensemble.Inputs(d, quick, torch.device("cpu")).x for d in (images, strided))
    assert other.stride() == one.stride() and torch.equal(one, other)
