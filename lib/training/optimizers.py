"""Optimizers by name: a base of torch's, a sharpness-aware rule, or a rule on a base, each with options of its own.

    sgd    adamw(weight_decay=0.01)    sam    looksam(k=5, alpha=0.7)+adamw    my_package.rules:mine(beta=0.9)

An import path `package.module:name` brings a reader's own: a `torch.optim.Optimizer` is a base, a function a rule.
"""

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from lib.training import networks, privacy, sharpness

BASES = {
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
RULES = {**sharpness.RULES, "dpsgd": privacy.dpsgd, "dpsam": privacy.dpsam}
PART = re.compile(r"\s*(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*(?:\((?P<options>[^()]*)\))?\s*")
USUAL = {"lr": 0.1, "momentum": 0.9}
OUTSIDE = r"(?![^(]*\))"  # not within parentheses


class Named(NamedTuple):
    """A parsed optimizer: the rule with its options (without rho), the base with its own."""

    rule_name: str
    rule: Callable
    options: dict
    base_name: str  # with its options, as it would be written
    base: Callable
    base_options: dict
    rho: float | None  # of the options

    @property
    def wants(self):
        """Which of sharpness.CONTEXT the rule asks for."""
        return set(inspect.signature(self.rule).parameters) & set(sharpness.CONTEXT)

    @property
    def private(self):
        """True for a differentially private rule: it clips the gradient of every example and adds noise."""
        return {"per_example", "noise"} <= self.wants

    @property
    def least_batch(self):
        """The fewest examples of a batch: two for each of msam's shards."""
        return 2 * self.options.get("m", 2) if self.rule_name == "msam" else 1

    @property
    def own_base(self):
        """True if the base is a reader's own."""
        return self.base not in BASES.values()

    @property
    def text(self):
        """The optimizer as it would be written."""
        options = self.options | ({} if self.rho is None else {"rho": self.rho})
        rule = written(self.rule_name, options)
        if self.rule_name == "plain":
            return self.base_name
        return rule if self.base_name == "sgd" else f"{rule}+{self.base_name}"


def split(optimizers):
    """The names in a comma-separated string, whose parentheses may hold commas too."""
    return tuple(name.strip() for name in re.split("," + OUTSIDE, optimizers))


def written(name, options):
    """name(key=value, ...). No number is written with an exponent: a minus sign joins the two sides of a difference."""
    number = partial(np.format_float_positional, trim="0")
    shown = [f"{k}={number(v) if isinstance(v, float) else repr(v)}" for k, v in options.items()]
    return name + (f"({', '.join(shown)})" if options else "")


def parse(text) -> Named:
    """The optimizer of that name. Raises ValueError naming `optimizers` for an unknown name, import path or option."""
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"optimizers={text!r} is not valid: {error}") from None


@cache
def _parse(text):
    parts = [_part(part) for part in re.split(r"\+" + OUTSIDE, text)]
    kinds = [_kind(name, found) for name, found, _ in parts]
    if kinds == ["base"]:
        parts, kinds = [("plain", sharpness.plain, {}), *parts], ["rule", "base"]
    if kinds == ["rule"]:
        parts, kinds = [*parts, ("sgd", BASES["sgd"], {})], ["rule", "base"]
    if kinds != ["rule", "base"]:
        raise ValueError("a base, a rule, or rule+base is needed, as in sgd, sam or sam+adamw")
    (rule_name, rule, options), (base_name, base, base_options) = parts
    _check_rule(rule_name, rule, options)
    _check_base(base_name, base, base_options)
    rho = options.pop("rho", None)
    return Named(rule_name, rule, options, written(base_name, base_options), base, base_options, rho)


def _part(text):
    """(name, what it stands for, options)."""
    match = PART.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not written as name, name(option=value) or package.module:name")
    name, options = match["name"], {}
    try:
        for word in ast.parse(f"f({match['options'] or ''})", mode="eval").body.keywords:
            options[word.arg] = ast.literal_eval(word.value)
        positional = ast.parse(f"f({match['options'] or ''})", mode="eval").body.args
    except (SyntaxError, ValueError):
        positional = True
    if positional or None in options:
        raise ValueError(f"the options of {name} must be written as option=value, separated by commas")
    known = {**BASES, **RULES}
    if ":" not in name and (name not in known or name == "plain"):
        listed = ", ".join([*BASES, *(r for r in RULES if r != "plain")])
        raise ValueError(f"{name!r} is unknown: choose from {listed}, or package.module:name")
    return name, known[name] if name in known else networks.resolve(name, "optimizers"), options


def _kind(name, found):
    if name in BASES or inspect.isclass(found) and issubclass(found, torch.optim.Optimizer):
        return "base"
    if inspect.isfunction(found):
        return "rule"
    raise ValueError(f"{name} is {type(found).__name__}: an Optimizer class of torch or a function (a rule) is needed")


def _check_rule(name, rule, options):
    """A rule has (gradient, params), then names of the context, then options with defaults; no others are given."""
    arguments = list(inspect.signature(rule).parameters.values())
    free = {a.name: a.default for a in arguments[2:] if a.name not in sharpness.CONTEXT}
    bare = [n for n, default in free.items() if default is inspect.Parameter.empty]
    if len(arguments) < 2 or bare:
        raise ValueError(
            f"{name}{inspect.signature(rule)} is no rule: it must take gradient and params, then any of "
            f"{', '.join(sharpness.CONTEXT)}, and options with defaults"
        )
    valid = [*free, *(["rho"] if any(a.name == "rho" for a in arguments) else [])]
    _check_options(name, options, valid)
    limits = sharpness.LIMITS if name in RULES else {"k": sharpness.LIMITS["k"]}
    for option, value in options.items():
        kind = type(free.get(option, 0.0))
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{option}={value!r} of {name}: {kind.__name__} expected")
        low, high = limits.get(option, (value, value))
        if not low <= value <= high:
            raise ValueError(f"{option}={value!r} of {name} must lie between {low} and {high}")
        options[option] = kind(value)
        if kind is float and not np.isfinite(options[option]):
            raise ValueError(f"{option}={value!r} of {name} must be finite")
    if ":" in name:
        for is_kth_step in (True, False):
            _try_rule(name, rule, options, is_kth_step)


def _try_rule(name, rule, options, is_kth_step):
    """Have a reader's own rule make one step on two small tensors, so that it is said now if it is none.

    Returns how many passes forward and back it made; a forward pass alone is a third.
    """
    params = {"weight": torch.ones(3, 2), "bias": torch.ones(2)}
    if "noise" in inspect.signature(rule).parameters and not hasattr(rule, "queries"):
        raise ValueError(f"{name} asks for noise and must say how much: an attribute queries, as `rule.queries = 1`")
    aux, one = SimpleNamespace(losses=torch.ones(8)), torch.ones(())
    each, passes = {n: torch.ones(8, *p.shape) for n, p in params.items()}, []

    def counted(cost, result):
        passes.append(cost)
        return result

    context = {
        "rho": 0.1 * one,
        "rate": one,
        "step": 0 * one,
        "is_kth_step": is_kth_step,
        "size": 8,
        "uniform": torch.rand(2),
    }
    context |= {"losses": lambda params: counted(1 / 3, torch.ones(8))}
    context |= {"per_example": lambda params: counted(1, (each, aux))}
    context |= {"memory": {n: torch.zeros_like(p) for n, p in params.items()}}
    context |= {"noise": {n: torch.randn(getattr(rule, "queries", 1), *p.shape) for n, p in params.items()}}
    asked = {n: context[n] for n in inspect.signature(rule).parameters if n in context}
    options = {n: v for n, v in options.items() if n != "rho"}
    try:
        found = rule(lambda params, index=None: counted(1, (dict(params), aux)), params, **asked, **options)
        shapes = {n: tuple(g.shape) for n, g in found[0].items()}
    except Exception as error:
        raise ValueError(f"{name} is no rule: on two small tensors it fails with {error!r}") from None
    size = 3 if "memory" in asked else 2
    if len(found) != size or shapes != {n: tuple(p.shape) for n, p in params.items()}:
        form = "(grads, aux, memory)" if size == 3 else "(grads, aux)"
        raise ValueError(f"{name} is no rule: it must return {form}, with grads a dict of tensors like params")
    return sum(passes)


def passes(named):
    """Passes forward and back that a step of a reader's own rule makes, averaged over its turns; see `_try_rule`."""
    k = fingerprint(named)["options"].get("k", 1)
    on, off = (_try_rule(named.rule_name, named.rule, named.options, is_kth_step) for is_kth_step in (True, False))
    return (on + (k - 1) * off) / k


def asks_again(named):
    """True if a reader's own base evaluates the loss anew within a step, as L-BFGS does: tried on one weight."""
    weight, places = torch.ones(1, requires_grad=True), set()

    def closure():
        places.add(weight.item())
        weight.grad = weight.detach().clone()
        return weight.detach().square().sum() / 2

    optimizer = build(named, [weight], 0.1, 0.9, 0.0)
    if named.own_base and closure() and "closure" in inspect.signature(optimizer.step).parameters:
        optimizer.step(closure)
    return len(places) > 1


def _check_options(name, options, valid):
    for option in options:
        if option not in valid:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(valid) or 'none'}")


def _check_base(name, base, options):
    """Build it once on one weight, so that what it refuses is said before anything is trained."""
    valid = [n for n in inspect.signature(base).parameters if n not in ("params", "lr")]
    _check_options(name, options, valid)
    has = inspect.signature(base).parameters
    try:
        base([torch.zeros(1, requires_grad=True)], **{**{n: v for n, v in USUAL.items() if n in has}, **options})
    except Exception as error:
        raise ValueError(f"{name} can't be built: {error}") from None


def build(named, params, lr, momentum, weight_decay):
    """The base on these tensors, with those of lr, momentum and weight decay that it has; its options win."""
    given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    has = inspect.signature(named.base).parameters
    return named.base(params, **{**{n: v for n, v in given.items() if n in has}, **named.base_options})


def fingerprint(named):
    """What the name alone does not say: every option's value, and the source of a reader's own rule or base."""
    defaults = {a.name: a.default for a in inspect.signature(named.rule).parameters.values()}
    options = {n: v for n, v in defaults.items() if v is not inspect.Parameter.empty} | named.options
    return {"options": options, "source": [source(named.rule_name), source(named.base_name.partition("(")[0])]}


def source(name):
    """Hash of the module of a reader's own rule, optimizer or network, given by its import path; "" for ours.

    What that module imports is not in it.
    """
    return _source(networks.resolve(name, "import path")) if ":" in name else ""


@cache  # a file that is edited after its import changes no code that runs
def _source(found):
    for what in (inspect.getmodule(found), found):
        try:
            text = inspect.getsource(what)
            break
        except (OSError, TypeError):  # typed in, or compiled
            text = repr(found)
    return blake2b(text.encode(), digest_size=8).hexdigest()


class Each:
    """One base optimizer for every model, on weights of its own that are copied into the stack after each step: for a
    reader's own, which may look at whole tensors or norms and would otherwise mix the models.

    Its step gets a closure, as torch's own do: it evaluates the loss and the gradient anew, on the same batch, if
    the weights are not where they were the last time.
    """

    def __init__(self, named, params, *settings):
        n_stacked = range(len(next(iter(params.values()))))
        self.stack = params
        self.weights = [{name: p[k].clone().requires_grad_() for name, p in params.items()} for k in n_stacked]
        self.each = [build(named, list(w.values()), *settings) for w in self.weights]

    def set_rate(self, lr):
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self, losses, grads, again):
        """losses [M], grads: dict of [M, ...]; again(k, params) -> (loss, grads) of model k alone."""
        for k, (weights, optimizer) in enumerate(zip(self.weights, self.each, strict=True)):
            closure = self.closure(weights, losses[k], {n: g[k] for n, g in grads.items()}, partial(again, k))
            closure()
            optimizer.step(closure) if "closure" in inspect.signature(optimizer.step).parameters else optimizer.step()
            for name, weight in weights.items():
                self.stack[name][k].copy_(weight.detach())

    @staticmethod
    def closure(weights, loss, grads, again):
        seen = [{n: w.detach().clone() for n, w in weights.items()}, loss, grads]

        def evaluate():
            now = {n: w.detach().clone() for n, w in weights.items()}
            if not all(torch.equal(now[n], w) for n, w in seen[0].items()):
                seen[:] = now, *again(now)
            for name, weight in weights.items():
                weight.grad = seen[2][name].clone()
            return seen[1]

        return evaluate
