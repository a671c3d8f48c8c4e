"""Exports three models with scripts/export_step.py, and trains them in eager PyTorch: python eager.py FOLDER

For each model the folder gets its export, and NAME.safetensors with the batches of 100 steps, their losses, and the
parameters and buffers at the end.
"""

import pathlib
import sys

import torch
import torch.utils.checkpoint
from safetensors.torch import save_file
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "scripts"))
from export_step import ExportError, decompositions, export_step, max_pool, max_pool_backward

torch.set_num_threads(1)
torch.manual_seed(0)
folder = pathlib.Path(sys.argv[1])
STEPS = 100


class Transformer(nn.Module):
    """Embeddings are tied to the head; `scale` is frozen, and nothing uses `spare`."""

    def __init__(self, dropout):
        super().__init__()
        self.embedding = nn.Embedding(13, 16)
        self.position = nn.Parameter(torch.randn(6, 16) / 10)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.spare = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.layers(self.embedding(tokens) + self.position)
        return {"logits": self.head(hidden) * self.scale, "hidden": hidden}


class Own(nn.Module):
    """Two parameters have one gradient, a buffer is assigned, another changed through its data, and a layer stays frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, 8))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros(()))
        self.eval()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        if self.training:
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
            self.count.data.add_(1)
        return nn.functional.linear(self.norm(x) - self.mean, self.a + self.b), self.a


def tokens_loss(output, targets):
    return nn.functional.cross_entropy(output["logits"].flatten(0, 1), targets.flatten())


def models():
    mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3))
    yield "mlp", mlp, nn.functional.cross_entropy, torch.randn(STEPS, 16, 8), torch.randint(0, 3, (STEPS, 16)), {}
    conv = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d((3, 2)), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip
    yield "conv", conv, nn.functional.cross_entropy, torch.randn(STEPS, 12, 1, 8, 8), torch.randint(0, 3, (STEPS, 12)), {}
    own_loss = lambda output, y: nn.functional.cross_entropy(output[0], y)
    yield "own", Own(), own_loss, torch.randn(STEPS, 16, 8), torch.randint(0, 3, (STEPS, 16)), {}
    x = torch.randint(0, 13, (STEPS, 8, 6))
    options = dict(train_outputs=True, batch_sizes=(8, 3))
    yield "transformer", Transformer(0.0), tokens_loss, x, x.roll(1, 2), options
    yield "dropout", Transformer(0.1), tokens_loss, x, x.roll(1, 2), dict(batch_sizes=8)


def train(model, loss, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(7)
    losses = []
    for inputs, targets in zip(x, y):
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def refused(expected, module, loss=None, x=torch.ones(4, 3), y=torch.ones(4), **options):
    loss = loss or (lambda output, y: (output.flatten()[0] - y).square().mean())
    try:
        export_step(module, loss, x, y, folder / "refused", **options)
    except ExportError as error:
        assert expected in str(error), (expected, str(error))
    else:
        raise AssertionError(f"not refused: {expected}")
    assert not list(folder.glob("refused*"))


class Branches(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Reads(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float(x.sum())


class Checkpointed(nn.Linear):
    def forward(self, x):
        part = lambda x: nn.functional.dropout(super(Checkpointed, self).forward(x), 0.5)
        return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)


@torch.library.custom_op("ours::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda context, gradient: gradient * 2)


class Custom(nn.Linear):
    def forward(self, x):
        return twice(super().forward(x))


class Grows(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("seen", torch.zeros(1, 3))

    def forward(self, x):
        self.seen = torch.cat([self.seen, self.seen])
        return super().forward(x)


refused("the buffer 'seen' is assigned a value of another shape", Grows())
refused("the example batch has 1 samples", nn.Linear(3, 1), x=torch.ones(1, 3), y=torch.ones(1))
if not torch.cpu._is_avx512_supported():
    refused("has no avx512", nn.Linear(3, 1), processor="avx512")
for text in ("{}", '{"format": 1, "programs": []}'):
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "manifest.json").write_text(text)
    (folder / "mine" / "notes.txt").write_text("mine")
    try:
        export_step(nn.Linear(3, 1), lambda output, y: output.sum(), torch.ones(4, 3), torch.ones(4), folder / "mine")
    except ExportError as error:
        assert "holds other files than an export" in str(error), error
    else:
        raise AssertionError("files were removed")
    assert (folder / "mine" / "notes.txt").read_text() == "mine"
refused("a value of the batch decides a branch", Branches(3, 1))
refused("read on the host", Reads(3, 1))
refused("ours.twice", Custom(3, 1))
refused("backward draws random numbers", Checkpointed(3, 1))
refused("no parameter of the module needs a gradient", nn.Linear(3, 1).requires_grad_(False))
refused("the loss is a scalar tensor, and a tensor of shape", nn.Linear(3, 1), lambda output, y: y + output[:, 0])
refused("autocast is to torch.bfloat16", nn.Linear(3, 1), autocast=torch.float16)
refused("processor is one of baseline, avx2, avx512", nn.Linear(3, 1), processor="mmx")
refused("number 0 is a list", nn.Linear(3, 1), x=([1.0],))
print("refusals", flush=True)

# Our max pooling takes the same of several maxima as libtorch's, and the same NaN.
decompositions()
for size, dtype, windows in (
    ((2, 3, 6, 4), torch.float64, ((3, 2),)),
    ((2, 3, 6, 4), torch.bfloat16, ((3, 2), (), (0, 0))),
    ((1, 2, 7, 5), torch.float32, (3, 2, 1)),
    ((1, 2, 7, 5), torch.float32, (2, 2, 0, 1, True)),
):
    x = torch.randint(-2, 3, size).to(dtype)
    x[0, 0, 0, 0], x[0, 0, 2, 1], x[0, 1, :3] = torch.nan, torch.nan, -torch.inf
    ours, theirs = max_pool(x, *windows), torch.ops.aten.max_pool2d_with_indices(x, *windows)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(ours, theirs)), (ours, theirs)
    if windows[0] == (3, 2):
        rest = torch.randn_like(theirs[0]), x, (3, 2), (3, 2), 0, 1, False
        back = max_pool_backward(*rest, ours[1])
        assert torch.equal(back, torch.ops.aten.max_pool2d_with_indices_backward(*rest, theirs[1]))
assert max_pool(torch.ones(1, 1, 7, 7), 6, 1) is NotImplemented

# Modules see the layouts of eager PyTorch, so that views work, and pooling has no search in its backward.
class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.register_buffer("bank", torch.randn(2, 4, 1, 2, 2))
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        pooled = nn.functional.max_pool2d(self.first(x), 2)
        kept = torch.utils.checkpoint.checkpoint(lambda x: nn.functional.max_pool2d(x, 2), pooled, use_reentrant=False)
        hidden = nn.functional.conv2d(self.second(pooled), self.bank[1], groups=4)
        return self.head(hidden.view(-1, 36)) + kept.sum()


x, y = torch.randn(3, 1, 14, 14), torch.randint(0, 3, (3,))
viewed = Viewed()
forward = lambda w: nn.functional.cross_entropy(torch.func.functional_call(viewed, {"first.weight": w}, x), y)
step = lambda w: torch.autograd.grad(forward(w), w)[0]
weight = viewed.first.weight.detach().requires_grad_()
for tracing in ("real", "symbolic"):
    traced = make_fx(step, decomposition_table=decompositions(), tracing_mode=tracing, _allow_non_fake_inputs=True)(weight)
    operators = [str(node.target) for node in traced.graph.nodes]
    assert operators.count("tch_ignite.keep.default") >= 2, operators
    assert "aten.max_pool2d_with_indices_backward.default" not in operators, operators
    torch.testing.assert_close(traced(weight), step(weight))
print("max pooling", flush=True)

for name, model, loss, x, y, options in models():
    manifest = export_step(model, loss, x[0], y[0], folder / name, **options)
    if name == "own":
        assert [b["name"] for b in manifest["buffers"] if b["updated"]] == ["mean", "count"], manifest["buffers"]
    model.train()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.stack([loss(model(x[0]), y[0]).detach() for _ in range(1000 if name == "dropout" else 1)])
    model.load_state_dict(start)
    losses = train(model, loss, x, y)
    trained = {f"trained.{key}": value.clone() for key, value in model.state_dict().items()}
    save_file({"x": x, "y": y, "losses": losses, "draws": draws, **trained}, folder / f"{name}.safetensors")
    print(name, flush=True)
