"""Measures the same as steps.rs with PyTorch, in turns with it: see there. python benches/steps.py [--threads N] --shape NAME

Optimizers that PyTorch does not have are those of lion-pytorch, schedulefree and ademamix.py
(https://github.com/apple/ml-ademamix), each where Python finds it.
"""

import argparse
import gc
import importlib
import json
import sys
import time

import torch


def shapes():
    resnet = [(64, 3, 7, 7), (64,), (64,)]
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        for to, source in ((after, before), (after, after)):
            resnet += [(to, source, 3, 3), (to,), (to,), (to, to, 3, 3), (to,), (to,)]
            if to != source:
                resnet += [(to, source, 1, 1), (to,), (to,)]
    resnet += [(1000, 512), (1000,)]
    d = 768
    gpt2 = [(50257, d), (1024, d)]
    for _ in range(12):
        gpt2 += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
        gpt2 += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    gpt2 += [(d,), (d,)]
    return {
        "200 of 16x16": [(16, 16)] * 200,
        "ResNet-18": resnet,
        "4 of 4M": [(2048, 2048)] * 4,
        "GPT-2 small": gpt2,
    }


def parameters(shapes):
    made = [torch.nn.Parameter(torch.randn(shape) * 0.1) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


# How each optimizer can be stepped.
LOOP, FOREACH, FUSED = "torch default", "torch foreach", "torch fused"
OPTIONS = {LOOP: {"foreach": False}, FOREACH: {"foreach": True}, FUSED: {"fused": True}}
WAYS = {
    "SGD": (LOOP, FOREACH, FUSED), "Adam": (LOOP, FOREACH, FUSED), "AdamW": (LOOP, FOREACH, FUSED),
    "RMSprop": (LOOP, FOREACH), "Adagrad": (LOOP, FOREACH, FUSED), "NAdam": (LOOP, FOREACH), "RAdam": (LOOP, FOREACH),
    "Adamax": (LOOP, FOREACH), "Adadelta": (LOOP, FOREACH), "ASGD": (LOOP, FOREACH), "Rprop": (LOOP, FOREACH),
    "Adafactor": (LOOP, FOREACH),
}  # fmt: skip
PACKAGES = {
    "Lion": ("lion_pytorch", "Lion", (LOOP,)),
    "SGDScheduleFree": ("schedulefree", "SGDScheduleFree", (LOOP, FOREACH)),
    "AdamWScheduleFree": ("schedulefree", "AdamWScheduleFree", (LOOP, FOREACH)),
    "AdEMAMix": ("ademamix", "AdEMAMix", (LOOP,)),
}


def optimizers(shape):
    """Yields name, way, class and options."""
    large = shape == "GPT-2 small"
    for name, ways in WAYS.items():
        if not large or name in ("SGD", "Adam", "AdamW", "RMSprop"):
            for way in ways:
                options = {**OPTIONS[way], "momentum": 0.9} if name == "SGD" else OPTIONS[way]
                yield name, way, getattr(torch.optim, name), options
    if large:
        yield "Muon", LOOP, torch.optim.Muon, {}
        return
    for name, (package, optimizer, ways) in PACKAGES.items():
        try:
            made = getattr(importlib.import_module(package), optimizer)
        except ImportError:
            continue
        for way in ways:
            yield name, way, made, OPTIONS[way] if len(ways) > 1 else {}


def sparse_adam():
    table = torch.nn.Parameter(torch.randn(50257, 768) * 0.1)
    words = torch.randint(50257, (1024,))
    torch.nn.functional.embedding(words, table, sparse=True).sum().backward()
    return torch.optim.SparseAdam([table], lr=1e-6).step


def lbfgs(own):
    """Returns what makes a first step possible again, and the step."""
    slopes = [torch.linspace(1, 100, p.numel()).view_as(p) for p in own]
    begin = [p.detach().clone() for p in own]
    made = []

    @torch.no_grad()
    def loss():
        loss = torch.zeros([])
        for p, slope in zip(own, slopes):
            p.grad.copy_(p).mul_(slope)
            loss += p.grad.view(-1).dot(p.view(-1)) / 2
        return loss

    def fresh():
        for p, value in zip(own, begin):
            p.detach().copy_(value)
        made[:] = [torch.optim.LBFGS(own)]

    return fresh, lambda: made[0].step(loss)


def contenders(shape, shapes, group):
    """Makes the contenders of a group: name, the function to time, and what is called before it."""
    if group == "SparseAdam":
        yield LOOP, sparse_adam(), None
        return
    # Muon steps the matrices of one of the 12 blocks.
    hidden = [size for size in shapes if len(size) == 2][2:6]
    for name, way, make, kwargs in optimizers(shape):
        if name != group:
            continue
        own = parameters(hidden if name == "Muon" else shapes)
        optimizer = make(own, lr=1e-6, **kwargs)
        if "ScheduleFree" in name:
            optimizer.train()
        yield way, optimizer.step, None
        if name == "AdamW":
            bound = [100.0]

            # The bound gets smaller every time, so that clipping always has to scale the gradients.
            def clipped(own=own, optimizer=optimizer, bound=bound, foreach=way != LOOP):
                bound[0] *= 0.99
                torch.nn.utils.clip_grad_norm_(own, bound[0], foreach=foreach)
                optimizer.step()

            yield f"clip + step, {way}", clipped, None
    if group not in ("LBFGS", "gradients", "EMA"):
        return
    own = parameters(shapes)
    if group == "LBFGS":
        fresh, step = lbfgs(own)
        yield LOOP, step, fresh
    elif group == "gradients":
        shrinking = [100.0]

        def clip():
            shrinking[0] *= 0.99
            torch.nn.utils.clip_grad_norm_(own, shrinking[0])

        yield "clip_grad_norm, clipped, torch", clip, None
        yield "clip_grad_norm, below the bound, torch", lambda: torch.nn.utils.clip_grad_norm_(own, 1e9), None
        yield "zeros, torch foreach", lambda: torch._foreach_zero_([p.grad for p in own]), None
    elif group == "EMA":
        copies = [p.detach().clone() for p in own]

        @torch.no_grad()
        def lerp():
            torch._foreach_lerp_(copies, own, 1e-3)

        yield "torch, _foreach_lerp_", lerp, None


def names(shape):
    """Yields group and contender, without making them."""
    for name, way, _, _ in optimizers(shape):
        yield name, way
        if name == "AdamW":
            yield name, f"clip + step, {way}"
    if shape == "GPT-2 small":
        yield "SparseAdam", LOOP
    elif shape != "4 of 4M":
        yield "LBFGS", LOOP
    yield "gradients", "clip_grad_norm, clipped, torch"
    yield "gradients", "clip_grad_norm, below the bound, torch"
    yield "gradients", "zeros, torch foreach"
    yield "EMA", "torch, _foreach_lerp_"


def measure(call, before, clock):
    """The median time of a call in a turn, as in steps.rs."""

    def once():
        if before:
            before()
        start = clock()
        call()
        return clock() - start

    turn, least, most = 50_000_000, 3, 500
    times = [once()]
    if times[0] < turn:
        times = [once()]
    while (len(times) < least and times[0] < turn) or (len(times) < most and sum(times) < turn):
        times.append(once())
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=shapes(), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # As in steps.rs.
    clock = time.thread_time_ns if arguments.threads == 1 else time.perf_counter_ns
    sizes = shapes()[arguments.shape]
    for group, name in names(arguments.shape):
        print(json.dumps({"group": f"{group}, {arguments.shape}", "name": name}))
    print(flush=True)
    made = {}
    for line in sys.stdin:
        line = line.rstrip("\n")
        if line.startswith("group "):
            made = {}
            group = line.removeprefix("group ").partition(", ")[0]
            gc.collect()
            made = {name: (call, before) for name, call, before in contenders(arguments.shape, sizes, group)}
            for call, before in made.values():
                if before:
                    before()
                call()
            print(flush=True)
            continue
        print(measure(*made[line], clock), flush=True)


if __name__ == "__main__":
    main()
