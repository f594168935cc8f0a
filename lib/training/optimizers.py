"""Optimizers by name: a base of torch's, a sharpness-aware rule, or a rule on a base, each with options of its own.

    sgd    adamw(weight_decay=0.01)    sam    looksam(k=5, alpha=0.7)+adamw    my_package.rules:mine(beta=0.9)

An import path `package.module:name` brings a reader's own: a `torch.optim.Optimizer` is a base, a function is a rule.
"""

import ast
import inspect
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import numpy as np
import torch

from lib import need
from lib.training import networks, privacy, sharpness

BASES = {"sgd": torch.optim.SGD, "nesterov": partial(torch.optim.SGD, nesterov=True)}
BASES |= {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
RULES = {**sharpness.RULES, "dpsgd": privacy.dpsgd, "dpsam": privacy.dpsam}


@dataclass(frozen=True)
class Optimizer:
    """A rule with its options, on a base with its options. Two optimizers are equal if their texts are."""

    text: str  # in its canonical spelling
    rule_name: str = field(compare=False)  # "plain": the base alone
    rule: Callable = field(compare=False)
    options: dict = field(compare=False)  # as given, without rho
    base_name: str = field(compare=False)  # with its options
    base: Callable = field(compare=False)
    base_options: dict = field(compare=False)
    rho: float | None = field(compare=False)  # radius among the options, if one was given

    @staticmethod
    def parse(text):
        """The Optimizer of a text. Raises ValueError naming `optimizers` for an unknown name, path or option."""
        try:
            return _parse(str(text))
        except ValueError as error:
            raise ValueError(f"optimizers={str(text)!r} is not valid: {error}") from None

    def __str__(self):
        return self.text

    def __reduce__(self):  # another process imports a reader's own rule by its path
        return Optimizer.parse, (self.text,)

    @cached_property
    def wants(self):
        """Which entries of sharpness.CONTEXT the rule asks for by its arguments' names."""
        return sharpness.CONTEXT.keys() & inspect.signature(self.rule).parameters

    has_radius = property(lambda self: "rho" in self.wants)  # sharpness-aware
    is_private = property(lambda self: {"noise", "per_example"} <= self.wants)  # clips examples' gradients, adds noise
    has_own_base = property(lambda self: self.base not in BASES.values())  # a reader's own optimizer class

    @cached_property
    def all_options(self):
        """Every option of the rule with its value, given or default."""
        arguments = inspect.signature(self.rule).parameters.values()
        return {a.name: a.default for a in arguments if a.default is not a.empty} | self.options

    # the fewest examples of a batch: two for each of msam's shards
    least_batch = property(lambda self: 2 * self.all_options["m"] if self.rule_name == "msam" else 1)
    # every k-th step is special to a rule that asks for is_kth_step
    k = property(lambda self: self.all_options.get("k", 1) if "is_kth_step" in self.wants else 1)

    def build(self, params, lr, momentum, weight_decay, fused=False):
        """The base on these tensors, with those of lr, momentum and weight_decay that it has; its own options win."""
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        if fused and not self.has_own_base and not {"foreach", "differentiable"} & set(self.base_options):
            given["fused"] = True
        given = {name: given[name] for name in given.keys() & inspect.signature(self.base).parameters}
        return self.base(params, **{**given, **self.base_options})

    def gradients_per_step(self):
        """Passes forward and back that a step takes: 1 for SGD, 2 for SAM. A forward pass alone counts one third."""
        # the rule is given functions that compute nothing and note how many examples it asks them for
        n, params, one, asked, counts = 300, {"weight": torch.ones(3, 2)}, torch.ones(()), [], []
        aux = namedtuple("Aux", "losses")(torch.ones(n))

        def counted(result, examples=n):
            asked.append(examples)
            return result

        offered = {"rho": one, "rate": one, "step": one, "size": n, "uniform": torch.ones(1), "memory": params}
        offered["noise"] = {"weight": torch.ones(getattr(self.rule, "queries", 1), 3, 2)}
        offered["losses"] = lambda at: counted(aux.losses, n / 3)
        offered["per_example"] = lambda at: (aux.losses, lambda weight: counted((at, aux)))
        for is_kth_step in (True, False):
            given = {name: {**offered, "is_kth_step": is_kth_step}[name] for name in self.wants}
            self.rule(lambda at, index=range(n): counted((at, aux), len(index)), params, **given, **self.options)
            counts.append(sum(asked))
        return (counts[0] + (self.k - 1) * (counts[1] - counts[0])) / (n * self.k)


def split(texts):
    """The optimizers in a comma-separated text, as a tuple of texts. Commas within parentheses do not separate."""
    found, depth = [""], 0
    for letter in texts:
        depth += (letter == "(") - (letter == ")")
        found = [*found, ""] if letter == "," and depth == 0 else [*found[:-1], found[-1] + letter]
    return tuple(text.strip() for text in found)


def written(name, options):
    """name(option=value, ...). Numbers are written without an exponent, whose sign would look like a plus or minus."""
    number = partial(np.format_float_positional, trim="0")
    shown = [f"{k}={number(v) if isinstance(v, float) else repr(v)}" for k, v in options.items()]
    return f"{name}({', '.join(shown)})" if options else name


@cache
def _parse(text):
    """rule(options)+base(options) is a Python expression once the colon of an import path is read as a dot."""
    text, given = text.strip(), []  # of each part, its name and options
    try:
        tree = ast.parse(text.replace(":", "."), mode="eval").body
        for node in [tree.left, tree.right] if isinstance(getattr(tree, "op", None), ast.Add) else [tree]:
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            need(not call.args and None not in options, "options are written with their names")
            given.append((ast.get_source_segment(text, call.func), options))
    except (SyntaxError, ValueError):
        form = "name, name(option=value, option=value), package.module:name, or two of these joined by +"
        raise ValueError(f"it is not written as {form}") from None
    known = {name: found for name, found in {**BASES, **RULES}.items() if name != "plain"}
    parts, kinds = {"rule": ("plain", sharpness.plain, {}), "base": ("sgd", BASES["sgd"], {})}, []
    for name, options in given:
        fine = ":" in name or name in known
        need(fine, f"{name!r} is unknown: choose from {', '.join(known)}, or package.module:name")
        found = known[name] if name in known else networks.resolve(name, "optimizers")
        is_base = name in BASES or (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer))
        what = f"{name} is {type(found).__name__}: an Optimizer class of torch or a function is needed"
        need(is_base or inspect.isfunction(found), what)
        kinds.append("base" if is_base else "rule")
        parts[kinds[-1]] = name, found, options
    fine = kinds in (["base"], ["rule"], ["rule", "base"])
    need(fine, "a base, a rule, or rule+base is needed, as in sgd, sam or sam+adamw")
    (rule_name, rule, options), (base, make, base_options) = parts["rule"], parts["base"]
    options = _checked_options(rule_name, rule, options)
    rho, base_name = options.pop("rho", None), written(base, base_options)
    with_rho = written(rule_name, options | ({} if rho is None else {"rho": rho}))
    whole = base_name if rule_name == "plain" else with_rho + (f"+{base_name}" if base_name != "sgd" else "")
    parsed = Optimizer(whole, rule_name, rule, options, base_name, make, base_options, rho)
    if make in BASES.values() and not base_options:
        return parsed  # nothing to refuse; building an optimizer of torch imports the compiler, which takes a second
    try:  # what the base refuses is said before anything is trained
        need("lr" not in base_options, "lr is a parameter of its own")
        inspect.signature(parsed.build([torch.zeros(2, 2, requires_grad=True)], 0.1, 0.9, 0.0).step).bind()
    except Exception as error:
        raise ValueError(f"{base} can't be built, or its step can't be made without a closure: {error}") from None
    return parsed


def _checked_options(name, rule, options):
    """The given options of a rule in the types of their defaults. ValueError for a bad one, or for what is no rule."""
    arguments = inspect.signature(rule).parameters
    own = {n: a.default for n, a in list(arguments.items())[2:] if n not in sharpness.CONTEXT}
    form = f"gradient and params, then any of {', '.join(sharpness.CONTEXT)}, and options with defaults"
    fine = len(arguments) >= 2 and inspect.Parameter.empty not in own.values()
    need(fine, f"{name}{inspect.signature(rule)} is no rule: it must take {form}")
    own |= {"rho": 0.0} if "rho" in arguments else {}
    limits, found = sharpness.LIMITS if name in RULES else {"k": sharpness.LIMITS["k"]}, {}
    for option, value in options.items():
        need(option in own, f"{name} has no option {option!r}; it has {', '.join(own) or 'none'}")
        kind, what = type(own[option]), f"{option}={value!r} of {name}"
        fine = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        need(fine, f"{what}: {kind.__name__} expected")
        low, high = limits.get(option, (value, value))
        need(low <= value <= high, f"{what} must lie between {low} and {high}")
        need(kind is not float or np.isfinite(value), f"{what} must be finite")
        found[option] = kind(value)
    return found
