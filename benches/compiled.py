"""Exports the networks of compiled.rs, and measures as it does: python benches/compiled.py torch --model gpt"""

import argparse
import os
import pathlib
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))

CHARACTERS, CONTEXT, WIDTH, HEADS = 128, 64, 128, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


def example(model):
    """Module, loss, inputs and targets of one batch."""
    torch.manual_seed(0)
    if model == "gpt":
        tokens = torch.randint(0, CHARACTERS, (12, CONTEXT + 1))
        loss = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return GPT(), loss, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if model == "mlp":
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 32, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
    return net, F.cross_entropy, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("export", "torch", "torch.compile"))
    parser.add_argument("--model", choices=("mlp", "cnn", "gpt"), required=True)
    parser.add_argument("--folder")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error("--steps must be at least 10: an epoch has 8")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    net, loss, x, y = example(arguments.model)
    if arguments.way == "export":
        from export_step import export_step

        # The processor that measures is the one that exports, as torch.compile's is.
        flags = pathlib.Path("/proc/cpuinfo").read_text()
        processor = "avx512" if "avx512bw" in flags else "avx2" if "avx2" in flags else "baseline"
        export_step(net, loss, x, y, arguments.folder, batch_sizes=len(x), train_outputs=True, processor=processor)
        return

    def forward(x, y):
        y_pred = net(x)
        return loss(y_pred, y), y_pred

    if arguments.way == "torch.compile":
        forward = torch.compile(forward)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    data = TensorDataset(x.repeat(8, *[1] * (x.dim() - 1)), y.repeat(8, *[1] * (y.dim() - 1)))
    loader = DataLoader(data, len(x), shuffle=True)
    warm, done, start, average = -(-arguments.steps // 5), 0, 0.0, None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, warm + arguments.steps, 1e-4)
    while True:
        correct, classes = torch.zeros((), dtype=torch.int64), 0
        for inputs, targets in loader:
            if done == warm:
                start = time.perf_counter()
            if done == warm + arguments.steps:
                took = time.perf_counter() - start
                print(f"loss {average.item():.4f}, accuracy {accuracy:.4f}", file=sys.stderr)
                print(f"{arguments.steps * len(x) / took:.1f}")
                return
            optimizer.zero_grad()
            value, y_pred = forward(inputs, targets)
            value.backward()
            optimizer.step()
            schedule.step()
            # Nothing is read from tensors before the end of the epoch, as in compiled.rs.
            value, y_pred = value.detach().double(), y_pred.detach()
            average = value if average is None else average * 0.98 + value * 0.02
            correct += (y_pred.argmax(-1) == targets).sum()
            classes += targets.numel()
            done += 1
        accuracy = correct.item() / classes


if __name__ == "__main__":
    main()
