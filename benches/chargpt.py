"""Trains the network of examples/chargpt in PyTorch: the same settings, text and schedule, other random numbers.

Prints the validation loss every 100 iterations, over all windows of the last tenth of the text, and the time. With
--log the losses go into a table as the example's, too. `tests/integration/chargpt.rs` gives both the same weights and
windows, and compares each loss.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT, LAYERS, HEADS, WIDTH, BATCH = 64, 4, 4, 128, 12
LR = 1e-3


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": linear(WIDTH, 3 * WIDTH), "c_proj": linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"c_fc": linear(WIDTH, 4 * WIDTH), "c_proj": linear(4 * WIDTH, WIDTH)})

    def forward(self, x):
        n, t, _ = x.shape
        heads = lambda x: x.view(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
        q, k, v = map(heads, self.attn["c_attn"](self.ln_1(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if "c_proj" in name else 0.02)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def read(path):
    """The size of the vocabulary, and inputs and targets of training and validation."""
    with open(path, newline="") as file:
        text = file.read()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[c] for c in text])
    cut = len(text) * 9 // 10
    windows = lambda tokens, step: (tokens[:-1].unfold(0, CONTEXT, step), tokens[1:].unfold(0, CONTEXT, step))
    return len(number), windows(tokens[:cut], 1), windows(tokens[cut:], CONTEXT)


def lr(iteration, iterations):
    """The learning rate of an iteration, counted from 0."""
    warmup = min(100, iterations // 10)
    if iteration < warmup:
        return LR * (iteration + 1) / (warmup + 1)
    progress = (iteration - warmup) / (iterations - warmup)
    return LR / 10 + (LR - LR / 10) * 0.5 * (1 + math.cos(math.pi * progress))


def train(net, windows, order, iterations):
    """Trains on the windows in this order, and yields the loss of each iteration."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    flat = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr(iteration, iterations)
        rows = order[iteration * BATCH : (iteration + 1) * BATCH]
        x, y = (part[rows] for part in windows)
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def validate(net, windows):
    net.eval()
    total = sum(
        F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(*(part.split(128) for part in windows))
    )
    net.train()
    return total / windows[1].numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--iterations", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=1337, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--log", type=argparse.FileType("w"), metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    vocabulary, training, validation = read(args.text)
    net = Gpt(vocabulary)
    if args.log:
        print("time,step,tag,value", file=args.log)
    begun, evaluating = time.time(), 0.0
    losses = train(net, training, torch.randperm(len(training[0])), args.iterations)
    for iteration, _ in enumerate(losses, start=1):
        if iteration % 100 == 0 or iteration == args.iterations:
            paused = time.time()
            loss = validate(net, validation)
            print(f"batch {iteration}: validation loss {loss:.4f}", flush=True)
            if args.log:
                print(f"{paused:.3f},{iteration},val/loss,{loss}", file=args.log, flush=True)
            evaluating += time.time() - paused
    print(f"training took {time.time() - begun - evaluating:.1f} s")


if __name__ == "__main__":
    main()
