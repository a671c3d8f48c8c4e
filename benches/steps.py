"""Measures the same as steps.rs with PyTorch: python benches/steps.py [--threads N] [--out FILE]

Writes a JSON object on each line: group, name, median in ns.
"""

import argparse
import json
import statistics
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


def optimizers(shape):
    ways = {"torch default": {}, "torch foreach": {"foreach": True}, "torch fused": {"fused": True}}
    for name, make, kwargs in (
        ("SGD", torch.optim.SGD, {"momentum": 0.9}),
        ("Adam", torch.optim.Adam, {}),
        ("AdamW", torch.optim.AdamW, {}),
        ("RMSprop", torch.optim.RMSprop, {}),
    ):
        for way, options in ways.items():
            if not (name == "RMSprop" and "fused" in options):
                yield name, way, make, {**kwargs, **options}
    if shape in ("200 of 16x16", "ResNet-18"):
        for name in ("Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"):
            for way, options in ways.items():
                if name == "Adagrad" or "fused" not in options:
                    yield name, way, getattr(torch.optim, name), options
    if shape == "GPT-2 small":
        yield "Muon", "torch default", torch.optim.Muon, {}


def contenders(shape, shapes):
    """Yields group, name and the function to time, for each contender."""
    for name, way, make, kwargs in optimizers(shape):
        # Muon steps the matrices of the hidden layers.
        hidden = [size for size in shapes if len(size) == 2 and size[0] < 4096 and size[0] != 1024]
        own = parameters(hidden if name == "Muon" else shapes)
        optimizer = make(own, lr=1e-6, **kwargs)
        yield name, way, optimizer.step
        if name == "AdamW":
            bound = [1e3]

            # The bound gets smaller every time, so that clipping always has to scale the gradients.
            def clipped(own=own, optimizer=optimizer, bound=bound, foreach=way != "torch default"):
                bound[0] *= 0.999
                torch.nn.utils.clip_grad_norm_(own, bound[0], foreach=foreach)
                optimizer.step()

            yield name, f"clip + step, {way}", clipped
    own = parameters(shapes)
    bound = [1e3]

    def clip():
        bound[0] *= 0.999
        torch.nn.utils.clip_grad_norm_(own, bound[0])

    yield "gradients", "clip_grad_norm, clipped, torch", clip
    yield "gradients", "clip_grad_norm, below the bound, torch", lambda: torch.nn.utils.clip_grad_norm_(own, 1e9)
    yield "gradients", "zeros, torch foreach", lambda: torch._foreach_zero_([p.grad for p in own])
    copies = [p.detach().clone() for p in own]

    @torch.no_grad()
    def lerp():
        torch._foreach_lerp_(copies, own, 1e-3)

    yield "EMA", "torch, _foreach_lerp_", lerp


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape, sizes in shapes().items():
        large = sum(torch.Size(size).numel() for size in sizes) > 1 << 26
        for group, name, call in contenders(shape, sizes):
            call()
            call()
            times = []
            until = time.perf_counter() + 2
            while len(times) < 5 or (time.perf_counter() < until and len(times) < (10 if large else 2000)):
                start = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - start)
            line = {"group": f"{group}, {shape}", "name": name, "median": statistics.median(times)}
            print(json.dumps(line), file=arguments.out, flush=True)


if __name__ == "__main__":
    main()
