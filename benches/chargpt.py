"""Trains the network of examples/chargpt in PyTorch: the same settings, text and schedule, other random numbers.

usage: chargpt.py TEXT [--iterations N] [--seed N] [--threads N]

Prints the validation loss every 250 iterations, over all windows of the last tenth of the text, and the time.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT, LAYERS, HEADS, WIDTH, BATCH = 64, 4, 4, 128, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.c_attn, self.attn_proj = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.c_fc, self.mlp_proj = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n, t, _ = x.shape
        heads = lambda x: x.view(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
        q, k, v = map(heads, self.c_attn(self.ln_1(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if "_proj" in name else 0.02)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    with open(args.text) as file:
        text = file.read()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[c] for c in text])
    cut = len(text) // 10 * 9
    train, val = tokens[:cut], tokens[cut:]
    window = lambda tokens, step: (tokens[:-1].unfold(0, CONTEXT, step), tokens[1:].unfold(0, CONTEXT, step))
    (x, y), (val_x, val_y) = window(train, 1), window(val, CONTEXT)

    net = Gpt(len(number))
    matrices = [p for p in net.parameters() if p.dim() > 1]
    flat = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    warmup = min(100, args.iterations // 10)

    def lr(k):
        if k < warmup:
            return 1e-5 + (1e-3 - 1e-5) * k / warmup
        progress = (k - warmup) / (args.iterations - warmup)
        return 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * progress))

    def validation():
        net.eval()
        with torch.no_grad():
            total = sum(
                F.cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="sum").item()
                for a, b in zip(val_x.split(128), val_y.split(128))
            )
        net.train()
        return total / val_y.numel()

    order = torch.randperm(len(x))
    begun, evaluating = time.time(), 0.0
    for k in range(args.iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr(k)
        rows = order[k * BATCH : (k + 1) * BATCH]
        loss = F.cross_entropy(net(x[rows]).flatten(0, 1), y[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (k + 1) % 250 == 0 or k + 1 == args.iterations:
            paused = time.time()
            print(f"batch {k + 1}: validation loss {validation():.4f}", flush=True)
            evaluating += time.time() - paused
    print(f"training took {time.time() - begun - evaluating:.1f} s")


if __name__ == "__main__":
    main()
