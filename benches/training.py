"""Measures as training.rs does, with PyTorch's plain loop and with ignite: python benches/training.py --way ignite"""

import time

START = time.time()

import argparse
import json
import os
import resource
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MEAN, STD = 0.2860, 0.3530


def network(model):
    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def load(folder, part):
    def idx(name, shape):
        data = np.fromfile(os.path.join(folder, name), dtype=np.uint8)
        return torch.from_numpy(data[len(data) - int(np.prod(shape)) :].reshape(shape).copy())

    count = 60_000 if part == "train" else 10_000
    images = idx(f"{part}-images-idx3-ubyte", (count, 1, 28, 28))
    return (images.float() / 255 - MEAN) / STD, idx(f"{part}-labels-idx1-ubyte", (count,)).long()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data/fashion-mnist")
    parser.add_argument("--way", choices=("torch", "ignite"), default="ignite")
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    net = network(arguments.model)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*load(arguments.data, "train")), arguments.batch_size, shuffle=True)
    first = []

    def step(x, y):
        optimizer.zero_grad()
        y_pred = net(x)
        loss = nn.functional.cross_entropy(y_pred, y)
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not first:
            first.append(time.time() - START)
        return value, y_pred.detach(), y

    start = time.perf_counter()
    if arguments.way == "torch":
        for x, y in loader:
            step(x, y)
    else:
        from ignite.engine import Engine, Events
        from ignite.handlers import CosineAnnealingScheduler, LinearCyclicalScheduler, ProgressBar
        from ignite.metrics import Accuracy, Loss, RunningAverage

        trainer = Engine(lambda engine, batch: step(*batch))
        Accuracy(lambda out: out[1:]).attach(trainer, "accuracy")
        Loss(nn.functional.cross_entropy, lambda out: out[1:]).attach(trainer, "nll")
        RunningAverage(output_transform=lambda out: out[0]).attach(trainer, "loss")
        steps = len(loader)
        lr = CosineAnnealingScheduler(optimizer, "lr", 1e-3, 5e-4, 2 * steps)
        eps = LinearCyclicalScheduler(optimizer, "eps", 1e-8, 1.1e-8, steps)
        trainer.add_event_handler(Events.ITERATION_STARTED, lr)
        trainer.add_event_handler(Events.ITERATION_STARTED, eps)
        ProgressBar(file=sys.stderr).attach(trainer, ["loss"])
        start = time.perf_counter()
        trainer.run(loader, max_epochs=1)
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    images, labels = load(arguments.data, "t10k")
    with torch.no_grad():
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
    result = {"samples_per_second": 60_000 / took, "first_batch": first[0], "peak_mb": peak, "accuracy": accuracy}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
