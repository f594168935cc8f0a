import importlib
import linecache
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.training import Recipe, ensemble, networks, optimizers, sharpness, train
from lib.training.optimizers import Optimizer
from tests.training.test_sharpness import REFERENCE, assert_is_the_twin

OWN = '''
import torch


class Whole(torch.optim.Optimizer):
    """Normalised descent with momentum: the norm is that of the whole tensor."""

    def __init__(self, params, lr=0.1, momentum=0.0, damping=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "damping": damping})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad)
                p.sub_(group["lr"] * v / (v.norm() + group["damping"]))


def signed(gradient, params, share=0.5):
    """Part gradient, part its sign."""
    grads, aux = gradient(params)
    return {n: (1 - share) * g + share * 0.01 * g.sign() for n, g in grads.items()}, aux


def heavy(gradient, params, rho, memory, is_kth_step, k=2, kept=0.5):
    """A gradient at rho w, and every k-th step the memory of those before."""
    grads, aux = gradient({n: (1 + rho) * w for n, w in params.items()})
    memory = {n: kept * m + grads[n] for n, m in memory.items()}
    return memory if is_kth_step else grads, aux, memory


def no_rule(gradient, params, needed):
    return gradient(params)


NUMBER = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a temporary module that holds a reader's own optimizers."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield "own_optimizers"
    forget()


def forget():
    """As a new process would start."""
    sys.modules.pop("own_optimizers", None)
    importlib.invalidate_caches()
    linecache.checkcache()
    optimizers._parse.cache_clear()
    networks.source_hash.cache_clear()


# ---- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rule, base, options, base_options, rho",
    [
        ("sgd", "plain", "sgd", {}, {}, None),
        ("nesterov", "plain", "nesterov", {}, {}, None),
        (" sam ", "sam", "sgd", {}, {}, None),
        ("sam+adamw", "sam", "adamw", {}, {}, None),
        ("sam(rho=0.3)", "sam", "sgd", {}, {}, 0.3),
        ("looksam(k=3, alpha=1)+adam(eps=1e-7)", "looksam", "adam(eps=0.0000001)", {"k": 3, "alpha": 1.0},
         {"eps": 1e-7}, None),
        ("adamw(weight_decay=0.01)", "plain", "adamw(weight_decay=0.01)", {}, {"weight_decay": 0.01}, None),
        ("adam(betas=[0.8, 0.9])", "plain", "adam(betas=[0.8, 0.9])", {}, {"betas": [0.8, 0.9]}, None),
        ("torch.optim:RMSprop(alpha=0.9)", "plain", "torch.optim:RMSprop(alpha=0.9)", {}, {"alpha": 0.9}, None),
        ("looksam(layerwise=True)", "looksam", "sgd", {"layerwise": True}, {}, None),
        ("looksam(rho=0.2, k=3)", "looksam", "sgd", {"k": 3}, {}, 0.2),
    ],
)  # fmt: skip
def test_a_name_is_taken_apart(text, rule, base, options, base_options, rho):
    named = Optimizer.parse(text)
    assert (named.rule_name, named.base_name, named.options) == (rule, base, options)
    assert (named.base_options, named.rho) == (base_options, rho)
    assert Optimizer.parse(named.text) == named == pickle.loads(pickle.dumps(named))


def test_a_list_of_names_is_split_outside_parentheses():
    found = optimizers.split("sgd, looksam(k=5, alpha=0.7)+adamw ,sam")
    assert found == ("sgd", "looksam(k=5, alpha=0.7)+adamw", "sam")


def test_one_optimizer_has_one_name_however_it_is_written():
    assert Recipe(optimizer="looksam(rho=0.2, k=3)").optimizer.text == "looksam(k=3, rho=0.2)"
    names = {Recipe(optimizer=o).optimizer.text for o in ("swa( start=1 )", "swa(start=1.0)", "swa(start=1)+sgd")}
    assert names == {"swa(start=1.0)"}
    assert "e-" not in Recipe(optimizer="sam(rho=0.00001)").optimizer.text


def test_a_radius_among_the_options_wins_and_an_optimizer_without_one_has_none():
    assert Recipe(optimizer="sam(rho=0.3)", rho=0.1).rho == 0.3
    assert Recipe(optimizer="swa", rho=0.1).rho == 0.0
    assert [Recipe(optimizer=o).optimizer.has_radius for o in ("sgd", "swa", "sam", "asam")] == [
        False,
        False,
        True,
        True,
    ]


def test_every_option_reaches_the_store_whether_written_or_not(table, quick, tmp_path):
    folder = {o: ensemble.open_store(replace(quick, optimizer=o), table, tmp_path).folder for o in
              ("looksam", "looksam(k=5)", "looksam(k=3)", "looksam(alpha=0.5)", "sam")}  # fmt: skip
    assert len(set(folder.values())) == 5
    assert Optimizer.parse("looksam").all_options == {"k": 5, "alpha": 0.7, "layerwise": False}


BAD = {
    "sammy": "'sammy' is unknown: .* sam",
    "plain": "unknown",
    "sam+rmsprop": "'rmsprop' is unknown",
    "": "not written",
    "looksam(q=3)": "no option 'q'; it has k, alpha, layerwise, rho",
    "swa(rho=0.1)": "no option 'rho'",
    "adamw(beta=0.9)": "beta",
    "adamw(lr=0.9)": "lr",
    "adamw(weight_decay=-1)": "can't be built",
    "looksam(3)": "not written",
    "looksam(**{})": "not written",
    "looksam(k=)": "not written",
    "looksam(k=open)": "not written",
    "looksam(k=2.5)": "int expected",
    "looksam(k=True)": "int expected",
    "looksam(layerwise=1)": "bool expected",
    "gsam(alpha='much')": "float expected",
    "gsam(alpha=True)": "float expected",
    "sam(rho=[0.1])": "float expected",
    "looksam(k=0)": "k=0 of looksam must lie between 1",
    "msam(m=0)": "m=0 of msam must lie between 1",
    "esam(beta=0)": "beta=0 of esam must lie between",
    "esam(gamma=2.0)": "gamma=2.0 of esam must lie between",
    "dpsgd(clip=0.0)": "clip=0.0 of dpsgd must lie between",
    "dpsam(sigma=-1.0)": "sigma=-1.0 of dpsam must lie between 0",
    "gsam(alpha=-3.0)": "alpha=-3.0 of gsam must lie between 0",
    "sam(rho=1e999)": "rho=inf of sam must be finite",
    "swa(start=1.5)": "start=1.5 of swa must lie between 0 and 1",
    "sgd+sam": "rule\\+base is needed",
    "sam+sam": "rule\\+base is needed",
    "sgd+adam": "rule\\+base is needed",
    "sam+sgd+adam": "unknown",
    "sam(rho=0.1": "not written",
    "sam)": "not written",
    "looksam((k=3))": "not written",
    "no_such_module_here:f": "no_such_module_here",
    "torch.optim:Nothing": "Nothing",
    "torch.optim:lr_scheduler": "is module",
    "torch.optim:Optimizer": "can't be built",
    "torch.nn:Linear": "is type",
    "torch.optim:LBFGS": "closure",
    "sam-sgd": "unknown",
    "own_optimizers:NUMBER": "is int",
    "own_optimizers:no_rule": "is no rule",
    "own_optimizers:signed(share='half')": "float expected",
    "own_optimizers:signed(rho=0.1)": "no option 'rho'",
    "own_optimizers:heavy(k=0)": "k=0",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_name_is_one_clear_error(own, text):
    with pytest.raises(ValueError, match=f"optimizers=.*{BAD[text]}"):
        Recipe(optimizer=text)


@pytest.mark.parametrize("optimizer, rho", [("sam", -0.1), ("sharpreg", 0.1), ("sharpreg(rho=0.1)", 0)])
def test_a_radius_of_the_wrong_sign_names_rho(optimizer, rho):
    with pytest.raises(ValueError, match="rho="):
        Recipe(optimizer=optimizer, rho=rho)


@pytest.mark.parametrize("optimizer", ["dpsgd", "dpsam"])
def test_a_private_rule_is_refused_on_batchnorm_and_stays_private_at_rho_zero(images, tmp_path, optimizer):
    with pytest.raises(ValueError, match="arch='cnn' has BatchNorm"):
        train(Recipe("cnn", optimizer, batch_size=8), images, 2, tmp_path, "cpu")
    settings = Recipe("mlp", optimizer, rho=0.0, epochs=1, batch_size=8)
    private, plain = (
        train(r, images, 2, tmp_path, "cpu", quiet=True) for r in (settings, replace(settings, optimizer="sgd"))
    )
    assert (private.logits[0] != plain.logits[0]).any()


def test_all_that_a_rule_asks_for_is_offered_or_an_option():
    rules = [Optimizer.parse(name) for name in optimizers.RULES if name != "plain"]
    assert set(sharpness.LIMITS) <= {option for rule in rules for option in rule.all_options}


@pytest.mark.parametrize(
    "text, passes",
    [("sgd", 1), ("adamw", 1), ("swa", 1), ("sam", 2), ("sharpreg", 2), ("looksam(k=3)", 4 / 3), ("looksam(k=1)", 2)]
    + [("msam(m=7)", 2), ("esam(gamma=0.25)", 1 + 1 / 3 + 0.25), ("dpsgd", 1), ("dpsam", 2), ("looksam(k=999999)", 1)]
    + [("own_optimizers:signed", 1), ("own_optimizers:heavy(k=3)+adamw", 1)],
)
def test_the_passes_of_a_step_are_counted(own, text, passes):
    assert Optimizer.parse(text).gradients_per_step() == pytest.approx(passes, abs=1e-5)


# ---- a reader's own -----------------------------------------------------------------------------------------


def assert_each_is_trained_alone(dataset, folder, settings, atol=5e-6):
    found = train(settings, dataset, 4, folder, "cpu", quiet=True)
    for k in range(3):
        assert_is_the_twin(found, dataset, k, rtol=1e-3, atol=atol)
    return found


@pytest.mark.parametrize("optimizer", ["torch.optim:RMSprop", "torch.optim:RMSprop(alpha=0.9, centered=True)"])
def test_a_base_of_torch_by_import_path(table, tmp_path, optimizer):
    assert_each_is_trained_alone(table, tmp_path, Recipe(optimizer=optimizer, epochs=3, batch_size=8, lr=0.001))


@pytest.mark.parametrize("name", ["Whole", "Whole(damping=0.5)"])
def test_an_own_base_that_looks_at_whole_tensors_does_not_mix_the_models(table, tmp_path, own, name):
    settings = Recipe(optimizer=f"{own}:{name}", epochs=3, batch_size=8, lr=0.02)
    assert_each_is_trained_alone(table, tmp_path, settings)


def test_an_own_base_trains_under_a_rule_and_beside_batchnorm(images, table, tmp_path, own):
    settings = Recipe(optimizer=f"looksam(k=2)+{own}:Whole", rho=0.1, epochs=3, batch_size=8, lr=0.02)
    assert_each_is_trained_alone(table, tmp_path, settings)
    found = train(replace(settings, arch="cnn", epochs=2), images, 2, tmp_path, "cpu", quiet=True)
    assert_is_the_twin(found, images, 1, rtol=1e-2, atol=2e-4)


def test_an_own_rule_with_an_option(table, tmp_path, own, monkeypatch):
    def signed_twin(twin, x, y, share=0.5):
        g = twin.gradient(x, y)
        return (1 - share) * g + share * 0.01 * g.sign()

    for name, options in (("signed", ""), ("signed", "(share=0.9)")):
        monkeypatch.setitem(REFERENCE, f"{own}:{name}", signed_twin)
        settings = Recipe(optimizer=f"{own}:{name}{options}", epochs=2, batch_size=8, lr=0.02)
        assert_each_is_trained_alone(table, tmp_path, settings, atol=2e-4)  # a sign may turn on a rounding


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_an_own_rule_with_memory_turns_and_a_radius_that_is_not_plain_at_zero(table, tmp_path, own, monkeypatch, rho):
    def heavy_twin(twin, x, y, k=2, kept=0.5):
        g = twin.gradient(x, y, rho * torch.cat([p.detach().flatten() for p in twin.weights]))
        twin.memory = g if twin.memory is None else kept * twin.memory + g
        return twin.memory if twin.at % k == 0 else g

    monkeypatch.setitem(REFERENCE, f"{own}:heavy", heavy_twin)
    settings = Recipe(optimizer=f"{own}:heavy(k=3)+adamw", rho=rho, epochs=3, batch_size=8, lr=0.01)
    assert_each_is_trained_alone(table, tmp_path, settings)


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("signed", "share * 0.01", "share * 0.02"),
        ("Whole", "+ group", "+ 2 * group"),
        ("Whole", "NUMBER = 3", "NUMBER = 4"),
    ],
)
def test_changing_the_source_of_an_own_optimizer_changes_the_store(table, quick, tmp_path, own, name, old, new):
    settings = replace(quick, optimizer=f"{own}:{name}")
    first = ensemble.open_store(settings, table, tmp_path).folder
    forget()
    assert ensemble.open_store(settings, table, tmp_path).folder == first
    assert OWN.count(old) == 1
    (tmp_path / f"{own}.py").write_text(OWN.replace(old, new) + "\n# longer\n")
    assert ensemble.open_store(settings, table, tmp_path).folder == first  # until it is imported anew
    forget()
    assert ensemble.open_store(settings, table, tmp_path).folder != first


def test_the_models_of_an_own_optimizer_do_not_depend_on_how_many_train(table, tmp_path, own):
    settings = Recipe(optimizer=f"{own}:Whole", epochs=2, batch_size=8, lr=0.02)
    long = train(settings, table, 40, tmp_path / "at_once", "cpu", quiet=True)
    train(settings, table, 6, tmp_path / "grown", "cpu", quiet=True)
    grown = train(settings, table, 40, tmp_path / "grown", "cpu", quiet=True)
    np.testing.assert_array_equal(long.logits, grown.logits)
