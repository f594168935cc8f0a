"""A stack of models: every weight has a leading axis of models, and one step trains them all.

`torch.func.vmap` maps a rule of sharpness.py over the stack; the gradient that the rule asks for is computed for all
models by one function, which is compiled once and serves every rule. On a CPU the mapped rule is traced at its first
step, and the later steps replay the trace: mapped in every step, SAM took 1.1 times as long."""

import ctypes
import inspect
import logging
import os
import tempfile
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._pytree import tree_leaves, tree_map

from lib.training import networks, privacy, sharpness
from lib.training.recipe import generator


class Pass(NamedTuple):
    """What a pass of one model gives beside the gradient."""

    loss: torch.Tensor  # mean over the batch
    accuracy: torch.Tensor
    buffers: dict  # BatchNorm's statistics after the pass
    losses: torch.Tensor | tuple  # [B]; () for a rule that does not ask for the losses


def initial_state(recipe, shape, n_classes, ids, device):
    """Stacked initial parts of models `ids`, as in networks.parts: two dicts of tensors [len(ids), ...]."""
    nets = []
    with torch.random.fork_rng(devices=[]):
        for k in ids:
            # the CPU's generator alone: torch.manual_seed also seeds the GPUs, which takes 3 ms a model
            torch.default_generator.manual_seed(int(generator(recipe, "weights", k).integers(2**62)))
            nets.append(networks.parts(networks.build(recipe.arch, shape, n_classes)))
    # of each part (parameters, buffers): name -> the tensors of all the models, stacked
    return [{n: torch.stack([net[i][n] for net in nets]).to(device) for n in nets[0][i]} for i in range(2)]


def in_format(stack, last):
    """A stack of images or kernels [1, B, C, H, W], with the channels last in memory if `last`."""
    return stack[0].contiguous(memory_format=torch.channels_last)[None] if last and stack.ndim == 5 else stack


class Stack:
    """The weights, buffers and optimizer state of M models: dicts of tensors [M, ...].

    Frozen parameters are among the buffers. alone: a stack of one model, whose gradients are ordinary autograd's."""

    def __init__(self, recipe, shape, n_classes, n_stacked, device, compiled=False, alone=False):
        self.recipe, self.shape, self.n_classes = recipe, shape, n_classes
        self.n_stacked, self.device = n_stacked, device
        self.net, self.eval_net = (networks.build(recipe.arch, shape, n_classes) for _ in range(2))
        self.eval_net.eval()
        self.frozen = {name for name, p in self.net.named_parameters() if not p.requires_grad}
        # tensor cores want the channels last; on CPUs it gained nothing in training, and vmap would not see it
        self.channels_last = device.type == "cuda" and n_stacked == 1 and networks.is_convolutional(self.net)
        self.gradient_of_one = self.by_autograd if alone else grad(self.loss_of_one, has_aux=True)
        self.gradient = vmap(self.gradient_of_one) if n_stacked > 1 else self.gradient_of_one
        is_ours = recipe.arch in networks.MODELS  # a reader's own network may do another thing at another call
        self.graphs = {}  # of our rules: (rule, options, is_kth_step) -> GraphModule
        self.traces_rules = compiled and is_ours and n_stacked > 1 and device.type == "cpu"
        if compiled:
            self.gradient = compiled_once(self.gradient, device, is_ours)

    def reset(self, recipe, ids):
        """Fresh weights for models `ids`; the base and the rule remember nothing. Returns the stack itself."""
        self.recipe, optimizer = recipe, recipe.optimizer
        params, self.buffers = initial_state(recipe, self.shape, self.n_classes, ids, self.device)
        self.params = {name: in_format(p, self.channels_last) for name, p in params.items()}
        self.memory = {n: torch.zeros_like(p) for n, p in params.items()} if "memory" in optimizer.wants else {}
        # of each model, the tensors that a reader's own base steps on: it may use norms of whole tensors
        own = range(self.n_stacked) if optimizer.has_own_base else ()
        self.own = [{n: p[k].clone().requires_grad_() for n, p in params.items()} for k in own]
        rate = recipe.lr
        settings = rate, recipe.momentum, recipe.weight_decay, self.device.type in ("cpu", "cuda")
        self.bases = [optimizer.build(list(tensors.values()), *settings) for tensors in self.own or [self.params]]
        if "lr" not in inspect.signature(optimizer.base).parameters:
            rate = self.bases[0].defaults.get("lr", rate)  # a rate of its own, which the recipe's replaces
        # as torch's schedulers do, the schedule scales each group's initial rate: here as a share of the recipe's
        groups = [group for base in self.bases for group in base.param_groups]
        self.rates = [(group, group.get("lr", rate) / rate) for group in groups]
        return self

    def of_bases(self, call):
        """Call train, eval or step of every base that has it: schedule-free ones hold other weights in evaluation."""
        for base in self.bases:
            getattr(base, call, lambda: None)()
        for k, weights in enumerate(self.own):
            for name, weight in weights.items():
                self.params[name][k].copy_(weight.detach())

    def step(self, x, y, context, lr, is_kth_step):
        """Train all models on x [M, B, ...], y [M, B], with a rule_context: loss and accuracy before the step, [M]."""
        optimizer, loss = self.recipe.optimizer, self.loss_of_one
        rule, wants, options = optimizer.rule, optimizer.wants, optimizer.options
        if optimizer.rule_name in sharpness.RULES and optimizer.has_radius and self.recipe.rho == 0:
            rule, wants, options = sharpness.plain, (), {}  # at radius 0 every one of these rules is the base alone
        gradient_of = self.gradient if self.n_stacked == 1 else partial(on_the_stack, self.gradient)

        def rule_of_one(params, buffers, x, y, context):
            """(gradients, Pass, memory) of one model by the rule."""

            def gradient(at, index=None):
                grads, aux = gradient_of(at, buffers, *((x, y) if index is None else (x[index], y[index])))
                return grads, aux if "losses" in wants else aux._replace(losses=())  # msam's shards may be unequal

            offered = {
                "is_kth_step": is_kth_step,
                "size": len(y),
                "losses": lambda at: loss(at, buffers, x, y)[1].losses,
                "per_example": lambda at: privacy.way_for(self.net)(lambda p, *xy: loss(p, buffers, *xy), at, x, y),
            }
            found = rule(gradient, params, **{name: {**offered, **context}[name] for name in wants}, **options)
            return found if "memory" in wants else (*found, {})

        x = in_format(x, self.channels_last)
        if rule in (sharpness.plain, sharpness.swa):  # the gradient itself: mapping would only cost time
            whole = self.gradient if self.n_stacked > 1 else self.over_models(self.gradient)
            grads, aux = whole(self.params, self.buffers, x, y)
        else:
            context = {**context, "memory": self.memory} if self.memory else context
            whole, args = self.over_models(rule_of_one), (self.params, self.buffers, x, y, context)
            if self.traces_rules and rule in sharpness.RULES.values():
                key = rule, *options.items(), is_kth_step
                whole = self.graphs[key] = self.graphs.get(key) or make_fx(whole)(*args)
            grads, aux, self.memory = whole(*args)
        self.buffers = {**self.buffers, **aux.buffers}
        for group, share in self.rates:
            group["lr"] = lr * share
        self.update(grads)
        return aux.loss, aux.accuracy

    def loss_of_one(self, params, buffers, x, y, weight=None):
        """(mean loss, Pass) of one model on x [B, ...], y [B]; with weight [B]: (weighted sum of the losses, Pass)."""
        running = {n: b.clone() for n, b in buffers.items() if n not in self.frozen}  # BatchNorm writes into these
        state = {**params, **buffers, **running}  # functional_call puts newly assigned buffers into it
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = functional_call(self.net, state, (x,)).float()
        cross_entropy = partial(F.cross_entropy, target=y, label_smoothing=self.recipe.smoothing)
        loss, accuracy = cross_entropy(logits), (logits.argmax(-1) == y).float().mean()
        losses = cross_entropy(logits, reduction="none")
        aimed = loss if weight is None else (weight * losses).sum()
        return aimed, Pass(loss, accuracy, {n: state[n] for n in running}, losses)

    def by_autograd(self, params, *batch):
        """(gradients, Pass) of one model by ordinary autograd, for networks that torch.func.grad refuses."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        aim, aux = self.loss_of_one(leaves, *batch)
        aim.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in leaves.items()}
        return grads, tree_map(torch.Tensor.detach, aux)

    def over_models(self, function):
        """Map a one-model function over the leading axis. A single model skips vmap, which hides the memory format."""
        if self.n_stacked > 1:
            return vmap(function)
        return lambda *trees: tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], trees)))

    def update(self, grads):
        """One step of the base on the stacked weights, or of a reader's own base on the weights of each model."""
        for name, weight in self.params.items():
            # torch's fused update assumes that weight and gradient lie alike in memory, and does not check
            fits = grads[name].stride() == weight.stride()
            weight.grad = grads[name] if fits else torch.empty_like(weight).copy_(grads[name])
            for k, weights in enumerate(self.own):
                weights[name].grad = weight.grad[k].clone()
        self.of_bases("step")
        for weight in self.params.values():
            weight.grad = None  # its memory, still in the cache, serves the next gradient

    @torch.no_grad()
    def predict(self, x):
        """Logits [M, len(x), C], float32 NumPy, in evaluation mode and at full precision. x [N, ...]."""
        last = self.n_stacked == 1 and networks.is_convolutional(self.eval_net)

        def logits(part):
            part = part.contiguous(memory_format=torch.channels_last) if last else part
            call = self.over_models(lambda p, b: functional_call(self.eval_net, (p, b), (part,)))
            return call(params, self.buffers).float().clamp(-6e4, 6e4).cpu().numpy()  # what half precision holds

        params = {name: in_format(p, last) for name, p in self.params.items()}
        block = min(250, 2000 // self.n_stacked) if self.device.type == "cpu" else 2000  # what a CPU's cache holds
        return np.concatenate([logits(part) for part in x.split(block)], axis=1)

    @torch.no_grad()
    def refresh_batchnorm(self, batches):
        """BatchNorm's statistics anew, as their mean over these batches: averaged weights have others."""
        net = networks.build(self.recipe.arch, self.shape, self.n_classes)
        norms = networks.batchnorms(net)

        def buffers_after(params, buffers, x):
            running = {name: b.clone() for name, b in buffers.items()}
            functional_call(net, (params, running), (x,))
            return running

        for count, (x, _) in enumerate(batches, 1) if norms else ():
            for module in norms:
                module.momentum = 1 / count  # r <- r + (batch - r) / count
            self.buffers = self.over_models(buffers_after)(self.params, self.buffers, x)


def rule_context(recipe, params, draws, number, lr):
    """What the rule asks for at step `number` (sharpness.CONTEXT), as tensors [M, ...]."""
    wants, device = recipe.optimizer.wants, next(iter(params.values())).device
    numbers = {"rho": recipe.rho, "rate": lr / recipe.lr, "step": float(number)}
    found = {name: torch.full((len(draws),), numbers[name], device=device) for name in numbers.keys() & wants}

    def stacked(draw):
        return torch.from_numpy(np.stack([draw(rng) for rng in draws])).to(device)

    if "uniform" in wants:
        found["uniform"] = stacked(lambda rng: rng.random(len(params), np.float32))
    if "noise" in wants:
        m, queries, source = len(draws), recipe.optimizer.rule.queries, torch.Generator()
        noise = {name: torch.empty(m, queries, *p.shape[1:]) for name, p in params.items()}
        for k, rng in enumerate(draws):
            source.manual_seed(int(rng.integers(2**62)))  # torch draws three times as fast as NumPy
            for tensor in noise.values():
                tensor[k].normal_(generator=source)
        found["noise"] = {name: tensor.to(device) for name, tensor in noise.items()}
    return found


def on_the_stack(gradient, *trees):
    """Within vmap: one model's part of gradient(*trees) on the whole stack; a compiled function can't be mapped.

    While make_fx traces what calls this, it records one call of the gradient and does not look inside."""
    mapping = retrieve_current_functorch_interpreter()

    def whole(t):
        stacked, dim = _unwrap_batched(t, mapping.level())
        if dim is None:
            return stacked.expand(mapping.batch_size(), *stacked.shape)
        return stacked.movedim(dim, 0) if dim else stacked

    trees = tree_map(whole, trees)
    with mapping.lower():
        tracer = getattr(get_proxy_mode(), "tracer", None)
        with disable_proxy_modes_tracing() if tracer else nullcontext():
            found = grads, aux = gradient(*trees)
            if tracer:
                call = tracer.create_proxy("call_function", gradient, tree_map(tracer.unwrap_proxy, trees), {})
                track_tensor_tree((grads, tuple(aux)), call, constant=None, tracer=tracer)
    return tree_map(lambda t: _add_batch_dim(t, 0, mapping.level()), found)


# ---- what makes a step fast: each choice with its reason -------------------------------------------------------

STACKS = {}  # compiled stacks of this process, which serve every rule, base, rate, decay, radius and length
WORTH = 2e8  # models x steps x weights of an ensemble from which compiling its gradient saves more than it takes


def stack_for(recipe, inputs, ids, n_models, n_steps, alone):
    """A stack with fresh weights for models `ids` of an ensemble of n_models: a kept one, if it was compiled before."""
    args = recipe, inputs.shape, inputs.n_classes, len(ids), inputs.device
    if alone or not worth_compiling(recipe, inputs, n_models, n_steps):
        return Stack(*args, alone=alone).reset(recipe, ids)
    key = recipe.arch, recipe.smoothing, recipe.precision, recipe.batch_size, *args[1:]
    if key not in STACKS:
        STACKS[key] = Stack(*args, compiled=True)
    return STACKS[key].reset(recipe, ids)


def worth_compiling(recipe, inputs, n_models, n_steps):
    """Compiling fuses what lies between the matrix products, but a small ensemble is trained before that pays."""
    # a private rule does not ask for the batch's gradient
    if recipe.optimizer.has_own_base or recipe.optimizer.is_private or inputs.device.type not in ("cpu", "cuda"):
        return False
    net = networks.build(recipe.arch, inputs.shape, inputs.n_classes)
    return n_models * n_steps * sum(p.numel() for p in net.parameters()) >= WORTH


def compiled_once(function, device, is_traced):
    """The function compiled for arguments like those of its first call; the function itself where compiling fails.

    The processes of a machine compile in turn, and find the code in the compiler's cache. On a GPU the kernels are
    recorded as a CUDA graph: 1.4 times the images a second of ResNet-9 on an H200. is_traced: one call shows all that
    it ever does. Where not, torch.compile reads its code, which takes 4 s more, and 0.1 ms more for each call."""
    import torch._inductor.config as inductor  # here: it takes seconds, and many runs compile nothing
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for name in ("torch._dynamo", "torch._inductor", "torch._logging", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)  # notes to the compiler's developers
    torch._dynamo.config.recompile_limit = 64
    inductor.cpp.vec_isa_ok = True  # no trial of the vector instructions, which takes seconds
    record, made = device.type == "cuda", {}

    def call(*args):
        key = tuple((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tree_leaves(args))
        if key not in made:
            made[key], lock = function, Path(tempfile.gettempdir()) / f"torch_compile_{os.getuid()}.lock"
            with FileLock(lock), suppress(Exception):  # where compiling fails, the function itself remains
                if record or not is_traced:
                    compiled = torch.compile(function, dynamic=False, mode="reduce-overhead" if record else None)
                else:
                    graph = make_fx(lambda *trees: function(*trees))(*args)
                    # the compiler's cache holds whole graphs only where it is told of their shapes
                    shapes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
                    with tracing(TracingContext(shapes)):
                        compiled = torch._inductor.compile(graph, [*args])
                compiled(*args)
                made[key] = compiled
        if not record or made[key] is function:
            return made[key](*args)
        torch.compiler.cudagraph_mark_step_begin()  # the next replay overwrites these outputs: they are copied
        return tree_map(torch.clone, made[key](*args))

    return call


with suppress(Exception):  # there is no mallopt but in glibc
    library = ctypes.CDLL(None)  # it keeps what is freed for the next step: given back, it costs a fault for every 4 KB
    library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks of up to 32 MB come from the heap
    library.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: of which 1 GB may lie free


def n_stacked_for(net, device):
    """How many models train together. It depends on the network and the device alone, so a resumed run cuts alike."""
    if networks.is_convolutional(net):
        return 1  # stacked convolutions are grouped ones, which are slow
    size = sum(p.numel() for p in net.parameters())
    # weights, gradients and momentum of all the models stay in the cache (CPU), or in 1 GB (GPU)
    budget, most = (4e6, 32) if device.type == "cpu" else (1e9, 128)
    return int(min(most, 2 ** np.floor(np.log2(max(1, budget / (12 * size))))))
