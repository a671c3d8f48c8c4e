"""Measures the same as examples/gpu_check/speed.rs with PyTorch, on a GPU or the CPU: python benches/gpu.py [--cpu]

The ways: eager (torch's defaults), fused (the optimizer's fused step), compiled (fused, and the model with torch.compile).
Prints a line for each: speed, what, way, how many in a second, with tabs between.
"""

import sys
import time

import torch
import torch.nn.functional as F
from chargpt import Gpt
from steps import parameters, shapes
from training import network

DEVICE = torch.device("cpu" if "--cpu" in sys.argv else "cuda")
CUDA = DEVICE.type == "cuda"
SECONDS = 1.5 if CUDA else 0.1
PASS = 20


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def rate(call):
    for _ in range(3):
        call()
    synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for _ in range(PASS):
            call()
        synchronize()
        calls += PASS
    return calls / (time.perf_counter() - start)


def steps(way):
    with torch.device(DEVICE):
        own = parameters(shapes()["ResNet-18"])
    optimizer = torch.optim.AdamW(own, lr=1e-6, fused=way != "eager" or None)
    step = torch.compile(optimizer.step) if way == "compiled" else optimizer.step
    return rate(step)


def iterations(way, net, optimizer, x, y, loss, batch, bf16=False, clip=False):
    """Samples a second: gathering a batch, step, and a running average of the loss that stays on the device."""
    run = torch.compile(net) if way == "compiled" else net
    optimizer = optimizer(net.parameters(), lr=1e-3, fused=way != "eager" or None)
    average, order, done = torch.zeros((), device=DEVICE), [], 0

    def call():
        nonlocal order, done, average
        if done % PASS == 0:
            order = torch.randperm(len(x), device=DEVICE).split(batch)
        rows = order[done % PASS]
        done += 1
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            value = loss(run(x[rows]), y[rows])
        value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average = 0.98 * average + 0.02 * value.detach()

    return batch * rate(call)


def convolutions(way, batch):
    net = network("cnn").to(DEVICE)
    x = torch.rand(PASS * batch, 1, 28, 28, device=DEVICE)
    y = torch.randint(10, (PASS * batch,), device=DEVICE)
    return iterations(way, net, torch.optim.Adam, x, y, F.cross_entropy, batch)


def chargpt(way, batch):
    net = Gpt(65).to(DEVICE)
    tokens = torch.randint(65, (PASS * batch, 65), device=DEVICE)
    loss = lambda y_pred, y: F.cross_entropy(y_pred.flatten(0, 1), y.flatten())
    x, y = tokens[:, :-1], tokens[:, 1:]
    return 64 * iterations(way, net, torch.optim.AdamW, x, y, loss, batch, bf16=batch > 12, clip=True)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measured = {
        "AdamW on ResNet-18, steps": steps,
        "convolutions, batch 64, samples": lambda way: convolutions(way, 64),
        "chargpt, batch 12, tokens": lambda way: chargpt(way, 12),
    }
    if CUDA:
        measured["convolutions, batch 1024, samples"] = lambda way: convolutions(way, 1024)
        measured["chargpt, batch 256 in bf16, tokens"] = lambda way: chargpt(way, 256)
    # What is compiled takes longest, so that it comes last where the time is limited.
    for way in ("eager", "fused", "compiled") if CUDA else ("eager", "fused"):
        for name, measure in measured.items():
            try:
                print("speed", name, way, measure(way), sep="\t", flush=True)
            except Exception as error:  # torch.compile needs a compiler, and may lack one
                if way == "eager":
                    raise
                print(f"{name}, {way}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
