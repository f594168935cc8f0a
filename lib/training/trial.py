"""What a reader brings is tried before anything is trained: a network, a rule, an optimizer."""

import gc
import pickle
import random
import sys
from dataclasses import replace
from functools import cache
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch

from lib import need
from lib.training import networks, step
from lib.training.recipe import generator

DRAWS = "draws random numbers in training, which two optimizers would not share"
LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "lib"}  # they hold no generator of their own


@cache
def trial(recipe, shape, n_classes, device):
    """Why these models are trained one at a time, in words; "" if torch.func maps a training step over them.

    What a reader brings takes two real steps here, and predicts: with two stacked models or, where torch.func refuses
    that, with one by ordinary autograd. Raises ValueError naming `arch` or `optimizers` if that fails too, or if random
    numbers are drawn that are no function of the seed."""
    if ":" not in recipe.arch + recipe.optimizer.text and not recipe.optimizer.base_options:
        return ""
    arch, optimizers = f"arch={recipe.arch!r}", f"optimizers={recipe.optimizer.text!r}"
    params, buffers = step.initial_state(recipe, shape, n_classes, [0, 0], device)
    need(params, f"{arch} has no parameter that is trained")
    twins = all(torch.equal(*tensor.nan_to_num()) for tensor in [*params.values(), *buffers.values()])
    need(twins, f"{arch} draws its initial weights elsewhere than from torch's global generator: use that")
    n_stacked = min(2, step.n_stacked_for(networks.build(recipe.arch, shape, n_classes), device))

    def fault(optimizer, alone):
        """What goes wrong, in words, if the models are trained alone or stacked; "" if nothing does."""
        one, ids = replace(recipe, optimizer=optimizer), range(1 if alone else n_stacked)
        try:
            stack = step.Stack(one, shape, n_classes, len(ids), device, alone=alone).reset(one, ids)
            x = torch.randn(len(ids), one.batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            y = torch.arange(one.batch_size, device=device).remainder(n_classes).expand(len(ids), -1)
            draws, used = [generator(one, "rule", k) for k in ids], (one.optimizer.rule, stack.net, stack.eval_net)
            before = random_states(*used, stack.bases)
            stack.of_bases("train")
            for number in range(2):  # a rule may remember, and have a k-th step
                context = step.rule_context(one, stack.params, draws, number, one.lr)
                stack.step(x, y, context, one.lr, is_kth_step=number == 0)
            stack.of_bases("eval")
            stack.predict(x[0, :2])
            if random_states(*used, stack.bases) != before:
                return f"{DRAWS}: take out what does (dropout, say; a rule may ask for `noise`)"
            gradient = stack.over_models(stack.gradient_of_one)
            first, again = (gradient(stack.params, stack.buffers, x[:, :8], y[:, :8])[1].loss for _ in range(2))
            same = torch.allclose(first, again, 0 if device.type == "cpu" else 1e-4, 0, equal_nan=True)
            return "" if same else f"{DRAWS}, or remembers earlier batches: one batch has two losses"
        except Exception as error:
            said = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:")[:200]
            return f"fails with {type(error).__name__}: {said}"

    if not (mapped := fault(recipe.optimizer, alone=False)):
        return ""
    unmapped, unfit = fault("sgd", alone=False), fault("sgd", alone=True)  # of the network, by itself
    need(not unfit, f"{arch} {unfit}")
    alone = fault(recipe.optimizer, alone=True)
    form = "a rule returns (grads, aux), or (grads, aux, memory) if it asks for memory, with grads like params"
    need(not alone, f"{optimizers} {alone}; it was tried on {arch}; {form}")
    why = f"models are trained one at a time, since a step that maps over them {unmapped or mapped}"
    return f"{arch if unmapped else optimizers}: {why}"


def random_states(*used):
    """The states of the global generators of random numbers, and of those that `used` reaches by attributes, elements,
    closures and names, but not inside libraries."""
    todo, seen, found = [*used, random.random.__self__, np.random.rand.__self__], {}, []
    todo += [torch.default_generator, *torch.cuda.default_generators]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, torch.Tensor | ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            found.append(thing.get_state().tolist() if isinstance(thing, torch.Generator) else thing)
        elif isinstance(thing, type | FunctionType) and (thing.__module__ or "").partition(".")[0] in LIBRARIES:
            continue
        elif isinstance(thing, FunctionType):
            for code in (codes := [thing.__code__]):  # those of functions within it too
                codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
                todo += [thing.__globals__.get(name) for name in code.co_names]
            todo += thing.__closure__ or ()
        else:
            todo += gc.get_referents(thing)  # attributes, elements, a class and its bases, a method's object
    return [pickle.dumps(one) for one in found]
