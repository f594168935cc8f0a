"""One step of many models at once: gradients by the recipe's rule, the base optimizer, compiled and replayed.

A `Stepper` holds the stacked weights of `lanes` models and takes one step of all of them. How it is made fast is
decided here, by small functions of the network and the device alone: how many lanes, whether to compile, whether to
record the step as a CUDA graph, and in which memory format images lie.
"""

import logging
import os
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lib.training import networks, optimizers, sharpness
from lib.training.recipe import generator

BLOCK = 2000  # examples that finished models are asked about at once, at most


def initial_state(recipe, shape, n_classes, ids, device, last=False):
    """Stacked initial parameters and buffers: two dicts of tensors [len(ids), ...]. last: kernels channels last."""
    nets = []
    with torch.random.fork_rng(devices=[]):
        for k in ids:
            # the CPU's generator alone: torch.manual_seed also visits the GPUs, 3 ms a model
            torch.default_generator.manual_seed(int(generator(recipe, "weights", k).integers(2**62)))
            nets.append(networks.build(recipe.arch, shape, n_classes))
    params, buffers = torch.func.stack_module_state(nets)
    params = {n: in_format(p.detach().to(device), last) for n, p in params.items()}
    return params, {n: b.to(device) for n, b in buffers.items()}


def in_format(stack, last):
    """A stack of images or kernels [1, B, C, H, W] with the channels last in memory, where that is asked for."""
    return stack[0].contiguous(memory_format=torch.channels_last)[None] if last and stack.ndim == 5 else stack


# ---- one step of all the models -----------------------------------------------------------------------------


def over_models(function, n_stacked):
    """Map a one-model function over the leading axis. One lane skips vmap, which would hide the memory format."""
    if n_stacked > 1:
        return vmap(function)

    def one(*trees):
        return tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], trees)))

    return one


class Pass(NamedTuple):
    """What a pass at some weights gives beside the gradient."""

    loss: torch.Tensor  # mean over the batch
    accuracy: torch.Tensor
    buffers: dict  # BatchNorm's, after it
    losses: torch.Tensor | tuple  # [B], or () where the rule does not ask for them


class Batch:
    """One model's loss and gradients on one batch, as the rules of sharpness.py call them."""

    def __init__(self, net, recipe, buffers, x, y, keep=False):
        self.net, self.recipe, self.buffers, self.x, self.y = net, recipe, buffers, x, y
        self.size, self.keep = len(y), keep

    def pass_at(self, params, index=None):
        """(mean loss, Pass) on the whole batch, or on the examples `index` of it."""
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        running = {name: b.clone() for name, b in self.buffers.items()}  # BatchNorm writes into these
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = functional_call(self.net, (params, running), (x,)).float()
        cross_entropy = partial(F.cross_entropy, target=y, label_smoothing=self.recipe.smoothing)
        loss, accuracy = cross_entropy(logits), (logits.argmax(-1) == y).float().mean()
        losses = cross_entropy(logits, reduction="none") if self.keep else ()
        return loss, Pass(loss, accuracy, running, losses)

    def gradient(self, params, index=None):
        """(gradient of the mean loss, Pass)."""
        grads, (_, aux) = grad_and_value(self.pass_at, has_aux=True)(params, index)
        return grads, aux

    def losses(self, params):
        """Loss of every example, [B]."""
        return self.pass_at(params)[1].losses

    def per_example(self, params):
        """(gradient of every example: dict of [B, ...], Pass)."""

        def alone(params, x, y):
            loss, aux = Batch(self.net, self.recipe, self.buffers, x[None], y[None]).pass_at(params)
            return loss, aux.accuracy

        grads, (losses, hits) = vmap(grad_and_value(alone, has_aux=True), (None, 0, 0))(params, self.x, self.y)
        return grads, Pass(losses.mean(), hits.mean(), self.buffers, ())


def gradient_of(net, recipe):
    """A function of one model: (params, buffers, x, y, context, turn) -> (grads, Pass, memory) by the recipe's rule.

    context: those of sharpness.CONTEXT that are tensors and that the rule asks for. At rho 0 every rule of
    sharpness.py is plain; a private one is not, and a reader's own may not be.
    """
    named = recipe.named
    if named.rule_name in sharpness.RULES and recipe.has_radius and not np.any(recipe.rho):
        named = optimizers.parse("sgd")
    wants = named.wants

    def gradient(params, buffers, x, y, context, is_kth_step=True):
        batch = Batch(net, recipe, buffers, x, y, keep="losses" in wants)
        context = {name: value for name, value in context.items() if name in wants}
        offered = {
            "is_kth_step": is_kth_step,
            "size": batch.size,
            "losses": batch.losses,
            "per_example": batch.per_example,
        }
        asked = {**context, **{name: offered[name] for name in wants & set(offered)}}
        found = named.rule(batch.gradient, params, **asked, **named.options)
        return found if "memory" in wants else (*found, {})

    return gradient


class Stepper:
    """Weights, base optimizer and step of `lanes` models: built (and compiled) once, reset for each next group."""

    def __init__(self, recipe, shape, n_classes, n_stacked, device, compiled):
        self.recipe, self.named, self.lanes = recipe, recipe.named, n_stacked
        self.remembers = "memory" in self.named.wants
        self.net = networks.build(recipe.arch, shape, n_classes)
        self.last = channels_last(self.net, n_stacked, device)
        self.params, self.buffers = initial_state(recipe, shape, n_classes, range(n_stacked), device, self.last)
        self.graphs = {} if compiled and worth_recording(self.named, device) else None  # turn -> the step for it
        home = "cpu" if self.graphs is None else device  # a number on the host would be frozen into a graph
        # a tensor: no recompilation when it changes
        self.rate = torch.tensor(recipe.lr, device=home) if compiled else recipe.lr
        self.model_gradient = gradient_of(self.net, recipe)
        self.optimizer = self.base()
        if not self.named.own_base:
            self.apply({name: torch.zeros_like(p) for name, p in self.params.items()})  # makes the optimizer's state
        self.run = torch.compile(self.plain_step, dynamic=False) if compiled else self.plain_step

    def base(self):
        """One of torch's own for the stacked weights of all the models; a reader's own for each of them."""
        settings = self.rate, self.recipe.momentum, self.recipe.weight_decay
        if self.named.own_base:
            return optimizers.Each(self.named, self.params, *settings)
        return optimizers.build(self.named, list(self.params.values()), *settings)

    def reset(self, recipe, shape, n_classes, ids, device):
        """Fresh weights for models `ids`, and an optimizer and a rule that remember nothing."""
        params, self.buffers = initial_state(recipe, shape, n_classes, ids, device, self.last)
        for name, weight in self.params.items():
            weight.copy_(params[name])
        self.memory = {n: torch.zeros_like(p) for n, p in params.items()} if self.remembers else {}
        if self.named.own_base:
            self.optimizer = self.base()
            return
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def apply(self, grads):
        """One step of the base optimizer."""
        for name, weight in self.params.items():
            weight.grad = grads[name]
        self.optimizer.step()

    def plain_step(self, buffers, x, y, context, memory, is_kth_step):
        """Gradients by the rule, then the base optimizer: loss and accuracy [M], new buffers, the rule's memory."""
        if self.remembers:
            context = {**context, "memory": memory}

        def gradient(params, buffers, x, y, context):
            return self.model_gradient(params, buffers, x, y, context, is_kth_step)

        grads, aux, memory = over_models(gradient, self.lanes)(self.params, buffers, x, y, context)
        if self.named.own_base:
            self.optimizer.step(
                aux.loss, grads, lambda k, params: self.again(k, params, buffers, x, y, context, is_kth_step)
            )
        else:
            self.apply(grads)
        return aux.loss, aux.accuracy, aux.buffers, memory

    def again(self, k, params, buffers, x, y, context, is_kth_step):
        """(loss, gradient) of model k alone, at other weights."""
        mine = tree_map(lambda t: t[k], (buffers, x, y, context))
        grads, aux, _ = self.model_gradient(params, *mine, is_kth_step)
        return aux.loss, grads

    def step(self, x, y, context, lr, is_kth_step):
        """x [M, B, ...], y [M, B], context: dict of [M, ...] -> loss and accuracy before the step, each [M]."""
        if self.named.own_base:
            self.optimizer.set_rate(lr)
        elif torch.is_tensor(self.rate):
            self.rate.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        inputs = self.buffers, in_format(x, self.last), y, context, self.memory
        loss, accuracy, self.buffers, self.memory = self.turned(is_kth_step, inputs)(*inputs)
        return loss, accuracy

    def turned(self, is_kth_step, inputs):
        """The step for this turn as a function of its tensors alone, recorded where that pays."""
        step = partial(self.run, is_kth_step=is_kth_step)
        if self.graphs is None:
            return step
        if is_kth_step not in self.graphs:
            kept = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            self.graphs[is_kth_step] = recorded(step, inputs, [*self.params.values(), *kept])
        return self.graphs[is_kth_step]


# ---- a step as a CUDA graph ---------------------------------------------------------------------------------


class Recorded:
    """A function of trees of tensors, recorded once and replayed: nothing is launched from Python then.

    record(work) -> (outputs of work, a function without arguments that does it again, into the same outputs).
    """

    def __init__(self, function, inputs, record):
        leaves, shape = tree_flatten(inputs)
        self.inputs = [leaf.clone() for leaf in leaves]
        self.outputs, self.replay = record(lambda: function(*tree_unflatten(self.inputs, shape)))

    def __call__(self, *inputs):
        for kept, new in zip(self.inputs, tree_flatten(inputs)[0], strict=True):
            kept.copy_(new)
        self.replay()
        return tree_map(torch.clone, self.outputs)


def cuda_graph(work):
    """(outputs, replay) of work as a CUDA graph, after three warm-ups on a stream of their own (PyTorch's manual)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return outputs, graph.replay


def recorded(step, inputs, state, record=cuda_graph):
    """step as a CUDA graph, once it was seen to do the same; else, and this is said, step itself.

    state: the tensors that step changes in place. They are left as they were.
    """
    before = [tensor.clone() for tensor in state]

    def done(function):
        found = [t.clone() for t in tree_flatten(function(*inputs))[0]] + [t.clone() for t in state]
        torch._foreach_copy_(state, before)
        return found

    try:
        fast = Recorded(step, inputs, record)
        torch._foreach_copy_(state, before)
        pairs = zip(done(step), done(fast), strict=True)
        if all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3) for a, b in pairs):
            return fast
        why = "its replay gives other numbers"
    except RuntimeError as error:
        torch._foreach_copy_(state, before)
        why = str(error).partition("\n")[0]
    print(f"the step is not recorded as a CUDA graph, which is slower: {why}", flush=True)
    return step


# ---- how a step is made fast, and what it takes -------------------------------------------------------------

STEPPERS = {}


def stepper(recipe, inputs, n_stacked, compiled):
    """The stepper for this kind of run; compiled ones are kept, since neither rho nor epochs asks for a new one."""
    radius = float(np.sign(np.max(recipe.rho)) or np.sign(np.min(recipe.rho)))
    fixed = replace(recipe, rho=radius, epochs=1, seed=0, subset=0.5, queries=1, warmup=0.0, lr=1.0, stop=1.0)
    key = (fixed, inputs.shape, inputs.n_classes, n_stacked, inputs.device)
    args = (recipe, inputs.shape, inputs.n_classes, n_stacked, inputs.device, compiled)
    if not compiled:
        return Stepper(*args)
    quiet_compiler()
    return STEPPERS.get(key) or STEPPERS.setdefault(key, Stepper(*args))


def quiet_compiler():
    """The compiler's notes are for its developers. Each kind of run compiles its own step: allow for many."""
    for name in ("torch._dynamo", "torch._inductor", "torch._logging", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64


@cache
def can_compile():
    """True if torch.compile works on this machine: it needs a C++ compiler, Python's headers and a writable cache."""
    try:
        quiet_compiler()
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))
        return True
    except Exception:  # whatever is missing, eager mode serves
        return False


def worth_compiling(recipe, n_steps, device):
    """Compilation fuses what lies between the matrix products; a short run is over before it pays.

    A reader's own optimizer is run as it is, and so is what asks for the gradient of every example.
    """
    ours = not (recipe.named.own_base or recipe.named.private)
    return ours and n_steps >= 300 and device.type in ("cpu", "cuda") and can_compile()


def worth_recording(named, device):
    """A recorded step is launched as one: where the base keeps nothing on the host, as SGD's does not."""
    return device.type == "cuda" and named.base_name in ("sgd", "nesterov")


def channels_last(net, n_stacked, device):
    """Tensor cores want the channels last. (On CPUs it gained nothing; under vmap it would not be seen.)"""
    return device.type == "cuda" and n_stacked == 1 and networks.is_convolutional(net)


def block_for(device):
    """Examples that a model is asked about at once: on a CPU, as many as its cache holds."""
    return 250 if device.type == "cpu" else BLOCK


def lanes_for(net, device):
    """How many models train together, from the device and the network alone: a resumed run cuts the work alike."""
    if networks.is_convolutional(net):
        return 1
    size = sum(p.numel() for p in net.parameters())
    # weights, gradients and momentum of all the lanes stay in the cache (CPU), or in 1 GB (GPU)
    budget, most = (4e6, 32) if device.type == "cpu" else (1e9, 128)
    return int(min(most, 2 ** np.floor(np.log2(max(1, budget / (12 * size))))))


def predicted_memory(recipe, shape, n_classes, n_stacked=1):
    """Bytes that training `lanes` models takes at its peak, beside the data: an estimate from above.

    Weights, and all that is as large as they are; what the layers put out, once for the way back and once in passing.
    """
    net = networks.build(recipe.arch, shape, n_classes).eval()
    sizes = output_sizes(net, shape)
    weights, wants = sum(p.numel() for p in net.parameters()), recipe.named.wants
    # weights, gradient, momentum, one in passing; a rule's moved weights and second gradient; memory; Adam's square
    copies = 4 + 2 * (recipe.named.rule_name != "plain") + ("memory" in wants) + ("adam" in recipe.named.base_name)
    copies += 2 * recipe.batch_size * recipe.named.private
    width = 2 if recipe.precision == "bfloat16" else 4
    training = 4 * copies * weights + 2 * width * recipe.batch_size * sum(sizes)
    asking = 4 * 2 * weights + 4 * BLOCK * 2 * max(sizes)
    return n_stacked * max(training, asking)


def output_sizes(net, shape):
    """How many numbers each layer of a network puts out for one example: a list."""
    found = []
    layers = [m for m in net.modules() if not list(m.children())] or [net]
    hooks = [m.register_forward_hook(lambda m, i, out: found.append(out[0].numel())) for m in layers]
    with torch.no_grad():
        net(torch.zeros(2, *shape))
    for hook in hooks:
        hook.remove()
    return found


def free_memory(device):
    """Bytes that are free on a device (on a CPU without /proc: that it has)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in table.read_text().splitlines()) if table.exists() else {}
    if "MemAvailable" in lines:
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def lanes_that_fit(recipe, shape, n_classes, device):
    """`lanes_for`, halved until memory is predicted to suffice. Raises ValueError if it won't for one model."""
    n_stacked, free = lanes_for(networks.build(recipe.arch, shape, n_classes), device), free_memory(device)
    while (needed := predicted_memory(recipe, shape, n_classes, n_stacked)) > free:
        if n_stacked == 1:
            raise ValueError(
                f"batch_size={recipe.batch_size}: training one {recipe.arch} on it takes about {needed / 1e9:.1f} GB "
                f"beside the data, {free / 1e9:.1f} GB are free on {device}: choose a smaller batch_size or arch"
            )
        n_stacked //= 2
    return n_stacked
