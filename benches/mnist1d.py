"""Trains the four models of examples/mnist1d in PyTorch, on the data set that it has left, and prints the same table.

usage: mnist1d.py runs/mnist1d/data.pt [--iterations N] [--seeds N] [--smoke]
"""

import argparse
import time

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(40, 100), nn.Linear(100, 100), nn.Linear(100, 10)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.third(hidden + self.second(hidden).relu())


class GRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.linear = nn.GRU(1, 6, batch_first=True, bidirectional=True), nn.Linear(480, 10)

    def forward(self, x):
        return self.linear(self.gru(x.unsqueeze(-1))[0].flatten(1))


def cnn():
    conv = lambda channels, size: (nn.Conv1d(channels, 25, size, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 40)), *conv(1, 5), *conv(25, 3), *conv(25, 3), nn.Flatten(), nn.Linear(125, 10))


MODELS = {
    "logistic regression": (32, lambda: nn.Linear(40, 10)),
    "MLP": (68, MLP),
    "CNN": (94, cnn),
    "GRU": (91, GRU),
}


def accuracy(make, data, seed, iterations):
    torch.manual_seed(seed)
    (x, y), (x_test, y_test) = ((x.float(), y) for x, y in (data["train"], data["test"]))
    batches = list(zip(x.split(100), y.split(100)))
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for iteration in range(iterations):
        inputs, targets = batches[iteration % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * (net(x_test).argmax(1) == y_test).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.iterations, args.seeds = min(args.iterations, 40), 2
    torch.set_num_threads(1)
    data = torch.load(args.data)
    print("| model | published, % | PyTorch, % | lowest to highest | s a run |\n|---|---|---|---|---|")
    for name, (published, make) in MODELS.items():
        start = time.time()
        runs = [accuracy(make, data, seed, args.iterations) for seed in range(args.seeds)]
        seconds = (time.time() - start) / args.seeds
        print(f"| {name} | {published} | {sum(runs) / len(runs):.1f} | {min(runs):.1f} to {max(runs):.1f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
