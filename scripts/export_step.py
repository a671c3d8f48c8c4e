"""Exports a PyTorch model with its loss and backward as programs that `tch_ignite::compiled::CompiledModel` trains.

    python export_step.py FILE.py:FUNCTION FOLDER [--batch-sizes dynamic|64,27] [--autocast bfloat16] [--help]

FUNCTION takes nothing and returns the arguments of `export_step` as a dict; at least module, loss, inputs and targets:

    def example():
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
        x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
        return dict(module=model, loss=nn.functional.cross_entropy, inputs=x, targets=y)

The folder gets `manifest.json`, the initial weights (`model.safetensors`), and programs of machine code (`*.pt2`): the
training step, which returns the loss and the gradients, and the evaluation step. Needs torch, safetensors and a C++
compiler.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib

import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

FORMAT = 1
# A program for a range of sizes is not made for one sample: PyTorch treats a dimension of one as another program.
SMALLEST, LARGEST = 2, 1 << 20
# Inductor is told this for each processor: the bits of a vector, and the instructions that it then has to choose.
PROCESSORS = {"baseline": (1, None), "avx2": (256, "avx2"), "avx512": (512, "avx512f")}


class ExportError(RuntimeError):
    """The model cannot be exported; the text names the operator, or the argument."""


def export_step(
    module,
    loss,
    inputs,
    targets,
    folder,
    *,
    batch_sizes="dynamic",
    train_outputs=False,
    autocast=None,
    groups=None,
    processor="baseline",
    deterministic=True,
):
    """Writes the programs of a module and its loss to a folder, which must be new or hold an earlier export.

    `inputs` are the module's arguments (a tensor or a tuple of tensors, an example batch), `targets` those of the loss
    after the module's output: `loss(output, *targets)` is a scalar. The first dimension of the first input is the
    batch; inputs and targets that are as long have it as well. The module's mode and values are left as they are;
    parameters that need no gradient stay frozen.

    batch_sizes    "dynamic": one program for all sizes from 2 on. A size, or several, such as (64, 27): programs for
                   these sizes, where the dynamic one cannot be had or is slower
    train_outputs  the training step returns the module's outputs, too
    autocast       torch.bfloat16: module and loss run under autocast. Not torch.float16, whose gradients a scaler would
                   have to reach within the program
    groups         parameter groups, as an optimizer takes them ([{"params": …}, …]), or the optimizer: parameters get
                   the number of theirs
    processor      "baseline" (any x86-64, or the machine's own kind), "avx2" or "avx512"
    deterministic  sums of gradients in one order, whatever the threads do, so that resumed runs are bit for bit
    """
    inputs, targets = as_tuple(inputs), as_tuple(targets)
    check_arguments(module, inputs, targets, autocast, processor)
    shared = Shared(module, loss, inputs, targets, train_outputs, autocast)
    sizes = None if batch_sizes == "dynamic" else as_sizes(batch_sizes)
    if sizes is None and shared.batch < SMALLEST:
        raise ExportError(f"the example batch has {shared.batch} samples, and a program for all sizes is traced with {SMALLEST} or more: give a larger one, or batch_sizes")
    folder = pathlib.Path(folder).resolve()
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=folder.name + ".part.", dir=folder.parent))
    try:
        options = inductor_options(shared.device, processor)
        instructions = instructions_of(options, processor) if shared.device.type == "cpu" else []
        programs = []
        for mode in ("train", "eval"):
            for size in sizes or [None]:
                name = f"{mode}.pt2" if size is None else f"{mode}-{size}.pt2"
                compile_program(shared, mode, size, work / name, options, deterministic)
                batch = [SMALLEST, LARGEST] if size is None else [size, size]
                code = (work / name).read_bytes()
                programs.append({"mode": mode, "file": name, "batch": batch, "length": len(code), "crc32": zlib.crc32(code)})
        manifest = shared.manifest(groups)
        manifest |= {"programs": programs, "instructions": instructions}
        tensors = {**shared.parameters, **shared.buffers}
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, work / "model.safetensors")
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)
        check_folder(folder)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def check_folder(folder):
    """Refuses a folder that holds anything but an export, as it is going to be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    with contextlib.suppress(OSError, ValueError):
        names = re.compile(r"manifest\.json|model\.safetensors|(train|eval)(-\d+)?\.pt2")
        ours = all(names.fullmatch(file.name) and file.is_file() and not file.is_symlink() for file in folder.iterdir())
        manifest = json.loads((folder / "manifest.json").read_text())
        if ours and isinstance(manifest, dict) and {"format", "programs"} <= manifest.keys():
            return
    raise ExportError(f"{folder} holds other files than an export: name a new folder")


def as_tuple(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def as_sizes(value):
    sizes = [int(size) for size in (as_tuple(value) if not isinstance(value, str) else value.split(","))]
    if min(sizes) < 1:
        raise ExportError(f"batch sizes are at least 1, and {sizes} was given")
    return sorted(set(sizes), reverse=True)


def check_arguments(module, inputs, targets, autocast, processor):
    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"module is a torch.nn.Module, and {type(module).__name__} was given")
    for what, tensors in (("inputs", inputs), ("targets", targets)):
        for number, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise ExportError(f"{what} are tensors, and number {number} is a {type(tensor).__name__}")
    if not inputs or inputs[0].dim() == 0:
        raise ExportError("the first input has a batch dimension, and none was given")
    if autocast not in (None, torch.bfloat16):
        raise ExportError(f"autocast is to torch.bfloat16, and {autocast} was given (f16 needs its loss scaled within the program)")
    if processor not in PROCESSORS:
        raise ExportError(f"processor is one of {', '.join(PROCESSORS)}, and {processor!r} was given")
    devices = {t.device for t in (*module.parameters(), *module.buffers(), *inputs, *targets)}
    if len(devices) > 1:
        raise ExportError(f"module, inputs and targets are on one device, and these are on {sorted(map(str, devices))}")


class Writes(TorchDispatchMode):
    """Notes which buffers operators write to, be it through views or `.data`, which count no version."""

    def __init__(self, buffers):
        super().__init__()
        self.names, self.updated = {}, set()
        for name, tensor in buffers.items():
            self.names.setdefault(memory(tensor), []).append(name)

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        described = operator._schema.arguments
        given = {argument.name: value for argument, value in zip(described, arguments)} | (options or {})
        # Some operators of batch normalisation do not say that they write to the statistics.
        statistics = ("running_mean", "running_var") if given.get("training") else ()
        for argument in described:
            value = given.get(argument.name)
            if (argument.is_write or argument.name in statistics) and isinstance(value, torch.Tensor):
                self.updated |= set(self.names.get(memory(value), ()))
        return operator(*arguments, **(options or {}))


def memory(tensor):
    return tensor.untyped_storage()._cdata


class NoRandomNumbers(TorchDispatchMode):
    """Refuses a backward that draws random numbers: a checkpointed part would have other ones than in forward."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if torch.Tag.nondeterministic_seeded in operator.tags:
            raise ExportError(f"backward draws random numbers ({operator}), as a checkpointed part with dropout does: they would not be those of forward")
        return operator(*arguments, **(options or {}))


class Shared:
    """A module and all that its programs have in common."""

    def __init__(self, module, loss, inputs, targets, train_outputs, autocast):
        self.module, self.loss, self.inputs, self.targets = module, loss, inputs, targets
        self.train_outputs, self.autocast = train_outputs, autocast
        self.device = inputs[0].device
        self.batch = inputs[0].shape[0]
        self.parameters = dict(module.named_parameters())
        self.buffers = dict(module.named_buffers())
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        if not self.trained:
            raise ExportError("no parameter of the module needs a gradient")
        self.without_gradient, self.updated, self.outputs = [], [], []
        self.tied = {}
        for one, other in (
            (dict(module.named_parameters(remove_duplicate=False)), self.parameters),
            (dict(module.named_buffers(remove_duplicate=False)), self.buffers),
        ):
            names = {id(tensor): name for name, tensor in other.items()}
            self.tied |= {name: names[id(tensor)] for name, tensor in one.items() if name not in other}

    def call(self, mode, parameters, buffers, inputs):
        """The module's output, as a tree. Buffers that the module assigns are put into the dict."""
        was = {inner: inner.training for inner in self.module.modules()}
        self.module.train(mode == "train")
        # Layers that the program left in evaluation mode, such as frozen ones, stay in it.
        if mode == "train" and any(was.values()):
            for inner, training in was.items():
                inner.training = training
        values = {**parameters, **buffers}
        try:
            output = functional_call(self.module, values, inputs)
            buffers.update({name: values[name] for name in buffers})
            return output
        finally:
            for inner, training in was.items():
                inner.training = training

    def casts(self):
        if self.autocast is None:
            return contextlib.nullcontext()
        # A cache of casts would keep tensors of the trace.
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def split(self, values, counts):
        values, parts = list(values), []
        for count in counts:
            parts.append(values[:count])
            values = values[count:]
        return parts

    def train(self, *values):
        """The training step: loss, gradients, outputs and new buffers."""
        counts = (len(self.inputs), len(self.targets), len(self.parameters), len(self.buffers))
        inputs, targets, parameters, buffers = self.split(values, counts)
        parameters = {
            name: p.detach().requires_grad_(name in self.trained) for name, p in zip(self.parameters, parameters)
        }
        buffers = {name: b.clone() for name, b in zip(self.buffers, buffers)}
        given, places = dict(buffers), {name: memory(b) for name, b in buffers.items()}
        with torch.enable_grad(), self.casts():
            with Writes(buffers) as writes:
                output = self.call("train", parameters, buffers, tuple(inputs))
            loss = self.loss(output, *targets)
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ExportError(f"the loss is a scalar tensor, and {given} was returned")
        wanted = [parameters[name] for name in self.trained]
        with NoRandomNumbers():
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        self.without_gradient = [name for name, g in zip(self.trained, gradients) if g is None]
        for name, b in buffers.items():
            if given[name] is b and memory(b) != places[name]:
                raise ExportError(f"the buffer '{name}' is given other memory (by `.data =` or `set_`): assign the buffer, or copy_ to it")
            if not isinstance(b, torch.Tensor) or b.shape != given[name].shape or b.dtype != given[name].dtype:
                raise ExportError(f"the buffer '{name}' is assigned a value of another shape or type")
        self.updated = [name for name, b in buffers.items() if b is not given[name] or name in writes.updated]
        self.outputs = flat_outputs(output)
        outputs = [tensor.detach() for _, tensor in self.outputs] if self.train_outputs else []
        return (
            loss.detach(), *(g for g in gradients if g is not None), *outputs, *(buffers[name].detach() for name in self.updated)
        )  # fmt: skip

    def eval(self, *values):
        """The evaluation step: the outputs."""
        inputs, parameters, buffers = self.split(values, (len(self.inputs), len(self.parameters), len(self.buffers)))
        buffers = {name: b.clone() for name, b in zip(self.buffers, buffers)}
        with torch.no_grad(), self.casts():
            output = self.call("eval", dict(zip(self.parameters, parameters)), buffers, tuple(inputs))
        return tuple(tensor.detach() for _, tensor in flat_outputs(output))

    def arguments(self, mode, size):
        """Values to trace a program with, and how many of them are of a batch."""
        of_batch = [*self.inputs, *(self.targets if mode == "train" else ())]
        if size is not None:
            of_batch = [resized(t, size) if self.has_batch(t) else t for t in of_batch]
        # Two tensors that are one would be one argument of the program.
        of_batch = [t.detach().clone(memory_format=torch.contiguous_format) for t in of_batch]
        state = [*self.parameters.values(), *self.buffers.values()]
        return of_batch + [t.detach().clone(memory_format=torch.contiguous_format) for t in state], len(of_batch)

    def has_batch(self, tensor):
        return tensor.dim() > 0 and tensor.shape[0] == self.batch

    def manifest(self, groups):
        numbers = group_numbers(groups, self.parameters)

        def described(name, tensor, **more):
            return {"name": name, "shape": list(tensor.shape), "dtype": dtype_name(tensor)} | more

        def of_batch(name, tensor):
            shape = [None if index == 0 and self.has_batch(tensor) else size for index, size in enumerate(tensor.shape)]
            return {"name": name, "shape": shape, "dtype": dtype_name(tensor)}

        def gradient(name):
            return "frozen" if name not in self.trained else "unused" if name in self.without_gradient else "given"

        return {
            "format": FORMAT,
            "torch": torch.__version__.split("+")[0],
            "device": self.device.type,
            "machine": os.uname().machine,
            "inputs": [of_batch(f"input {n}", t) for n, t in enumerate(self.inputs)],
            "targets": [of_batch(f"target {n}", t) for n, t in enumerate(self.targets)],
            "parameters": [
                described(name, p, gradient=gradient(name), group=numbers.get(name)) for name, p in self.parameters.items()
            ],
            "buffers": [described(name, b, updated=name in self.updated) for name, b in self.buffers.items()],
            "tied": self.tied,
            "outputs": [name for name, _ in self.outputs],
            "train_outputs": self.train_outputs,
        }


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def group_numbers(groups, parameters):
    if groups is None:
        return {}
    groups = groups.param_groups if isinstance(groups, torch.optim.Optimizer) else groups
    names = {id(p): name for name, p in parameters.items()}
    numbers = {names[id(p)]: n for n, group in enumerate(groups) for p in group["params"] if id(p) in names}
    missing = [name for name, p in parameters.items() if p.requires_grad and name not in numbers]
    if missing:
        raise ExportError(f"no group has the parameters {', '.join(missing)}")
    return numbers


def flat_outputs(output):
    """The tensors of an output with their names in it."""
    leaves = pytree.tree_flatten_with_path(output)[0]
    for path, leaf in leaves:
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise ExportError(f"outputs are tensors, and {pytree.keystr(path) or 'the output'} is a {type(leaf).__name__}")
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if leaf is not None]


def resized(tensor, size):
    """A batch of another size, of the samples that there are."""
    return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]]


def inductor_options(device, processor):
    if device.type != "cpu":  # The part that runs on the host has to run on any processor.
        return {"cpp.simdlen": PROCESSORS["baseline"][0], "cpp.march": ""}
    # The number of threads is that of the process that trains.
    return {"cpp.simdlen": PROCESSORS[processor][0], "cpp.march": "", "cpp.dynamic_threads": True}


def instructions_of(options, processor):
    """The instructions that inductor chooses under these options, by their names in the flags of compilers."""
    with torch._inductor.config.patch(options):
        flags = pick_vec_isa().build_arch_flags().split()
    instructions = [flag.removeprefix("-m") for flag in flags]
    needed = PROCESSORS[processor][1]
    if needed and needed not in instructions:
        raise ExportError(f"this machine, or its compiler, has no {processor}: export on one that has, or for processor \"baseline\"")
    return instructions


@contextlib.contextmanager
def determinism(on):
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(on)
        torch.utils.deterministic.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# The offset of each maximum within its window, by the indices that max pooling has returned.
OFFSETS = WeakIdKeyDictionary()
# Inductor makes a loop of larger windows.
LARGEST_WINDOW = 25


@functools.cache
def decompositions():
    """What the programs have in place of some of libtorch's operators, because it is faster there. All give the same numbers.

    Inductor computes what is cheap anew where it is read. Forward and backward are one program here, so that the backward
    of max pooling would search each window again, for every element. `tch_ignite::keep` writes a tensor to memory.
    """
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    # This file may be loaded twice in one process.
    if not hasattr(torch.ops.tch_ignite, "keep"):
        torch.library.define("tch_ignite::keep", "(Tensor x) -> Tensor")
        torch.library.impl("tch_ignite::keep", "CompositeExplicitAutograd", torch.clone)
        torch.library.register_fake("tch_ignite::keep", torch.empty_like)

        @register_lowering(torch.ops.tch_ignite.keep.default, type_promotion_kind=None)
        def lower_keep(x):
            size = x.get_size()
            # Convolutions of pictures have this layout; those of sequences have another.
            if V.graph.layout_opt and len(size) == 4 and size[2] != 1:
                return ExternKernel.require_channels_last(x)
            x.realize()
            return x

    aten = torch.ops.aten
    return {
        aten.max_pool2d_with_indices.default: max_pool,
        aten.max_pool2d_with_indices_backward.default: max_pool_backward,
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_backward,
    }


def pair(value):
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return value * 2 if len(value) == 1 else value


def disjoint(x, kernel, stride, padding, dilation):
    """Whether windows lie side by side and cover the whole picture."""
    kernel, sizes = pair(kernel), x.shape[-2:]
    return (
        x.dim() == 4
        and x.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and (pair(stride or kernel), pair(padding), pair(dilation)) == (kernel, [0, 0], [1, 1])
        and 1 < kernel[0] * kernel[1] <= LARGEST_WINDOW
        and all(size % length == 0 for size, length in zip(sizes, kernel))
    )


def max_pool(x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
    """max_pool2d_with_indices, which keeps for the backward where the maxima are."""
    keep, prims = torch.ops.tch_ignite.keep, torch.ops.prims
    sizes = pair(kernel)
    if not disjoint(x, kernel, stride, padding, dilation):
        if sizes[0] * sizes[1] > LARGEST_WINDOW:
            return NotImplemented
        windows = sizes, pair(stride or kernel), pair(padding), pair(dilation)
        best, offset = prims._low_memory_max_pool_with_offsets(x, *windows, ceil_mode)
        # Offsets have one byte and indices eight, but on a CPU the way from one to the other takes longer than the rest.
        on_cpu = x.device.type == "cpu"
        offset = offset if on_cpu else keep(offset)
        indices = prims._low_memory_max_pool_offsets_to_indices(offset, sizes, x.shape[-2:], *windows[1:])
        return best, keep(indices) if on_cpu else indices
    (rows, columns), width = sizes, x.shape[-1]
    best = offset = None
    for number in range(rows * columns):
        candidate = x[:, :, number // columns :: rows, number % columns :: columns]
        if best is None:
            best, offset = candidate, torch.zeros_like(candidate)
            continue
        # A NaN is the maximum, and the last one is taken, as in libtorch.
        better = (candidate > best) | (candidate != candidate)
        best = torch.where(better, candidate, best)
        offset = torch.where(better, float(number), offset)
    # An offset has the type of the maxima, because vectors of one width are compared fastest.
    offset = keep(offset)
    within = offset.to(torch.int64)
    top = torch.arange(best.shape[-2], device=x.device).unsqueeze(1) * rows
    left = torch.arange(best.shape[-1], device=x.device) * columns
    indices = (top + within // columns) * width + left + within % columns
    OFFSETS[indices] = offset
    return best, indices


def max_pool_backward(gradient, x, kernel, stride, padding, dilation, ceil_mode, indices):
    """The backward of max_pool: each gradient goes to the element whose offset was kept. Windows do not overlap."""
    offset = OFFSETS.get(indices)
    if offset is None or not disjoint(x, kernel, stride, padding, dilation):
        return NotImplemented
    (rows, columns), shape = pair(kernel), x.shape
    above, beside = shape[-2] // rows, shape[-1] // columns

    def spread(pooled):
        """The value of each window at all its elements."""
        pooled = pooled.unsqueeze(4).unsqueeze(3)
        return pooled.expand(shape[0], shape[1], above, rows, beside, columns).reshape(shape)

    row, column = (torch.arange(size, device=x.device) for size in shape[-2:])
    number = ((row % rows).unsqueeze(1) * columns + column % columns).to(offset.dtype)
    return torch.where(spread(offset) == number, spread(gradient), 0.0)


def channels_last(x):
    """One channel, described as channels last: the memory is the same, and a convolution's result needs no transposing."""
    batch, _, height, width = x.shape
    return x.reshape(batch, height, width, 1).permute(0, 3, 1, 2)


def has_one_channel(x):
    return x.dim() == 4 and x.device.type == "cpu" and x.shape[1] == 1 and x.is_contiguous() and x.stride(1) != 1


def convolution(x, *rest):
    """A convolution of pictures of one channel, computed in the layout of channels last."""
    if not has_one_channel(x):
        return NotImplemented
    # The module sees the layout that it would see without this.
    return torch.ops.aten.convolution(channels_last(x), *rest).contiguous()


def convolution_backward(gradient, x, *rest):
    """The backward of such a convolution, in the same layout."""
    if not has_one_channel(x):
        return NotImplemented
    results = torch.ops.aten.convolution_backward(gradient, channels_last(x), *rest)
    return tuple(result if result is None else result.contiguous() for result in results)


def compile_program(shared, mode, size, path, options, deterministic):
    function = shared.train if mode == "train" else shared.eval
    arguments, of_batch = shared.arguments(mode, size)
    what = f"the {'training' if mode == 'train' else 'evaluation'} step"
    with determinism(deterministic), rng_unchanged(shared.device):
        with explained(f"{what} cannot be traced"):
            tracing = "symbolic" if size is None else "real"
            trace = make_fx(function, decomposition_table=decompositions(), tracing_mode=tracing, _allow_non_fake_inputs=True)
            graph = trace(*arguments)
        check_operators(graph, what)
        shapes = None
        if size is None:
            batch = torch.export.Dim("batch", min=SMALLEST, max=LARGEST)
            shapes = tuple(
                {0: batch} if n < of_batch and shared.has_batch(t) else None for n, t in enumerate(arguments)
            )
        with explained(f"{what} cannot be exported"), torch.no_grad():
            program = torch.export.export(graph, tuple(arguments), dynamic_shapes=shapes)
        with explained(f"{what} cannot be compiled"), torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


@contextlib.contextmanager
def rng_unchanged(device):
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        yield


def check_operators(graph, what):
    """Names operators that libtorch does not have, and those that ask for a value on the host."""
    operators = {str(node.target) for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    foreign = sorted(name for name in operators if name.split(".")[0] not in ("aten", "prims", "tch_ignite"))
    if foreign:
        raise ExportError(f"{what} has operators that libtorch does not have: {', '.join(foreign)}")
    if "aten._local_scalar_dense.default" in operators:
        raise ExportError(f"{what} reads a value on the host (aten._local_scalar_dense), which a program cannot")
    constants = [name for name, t in graph.named_buffers() if t.numel() > 0 and t.requires_grad]
    if constants:
        raise ExportError(f"{what} uses tensors with gradients that are no parameters of the module: {', '.join(constants)}")


@contextlib.contextmanager
def explained(failed):
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        operators = sorted(set(re.findall(r"\b(?:aten|prims|tch_ignite|torchvision|quantized)[.:]+[a-z_0-9]+(?:\.[A-Za-z_0-9]+)?", text)))
        named = f" (operator {', '.join(operators)})" if operators else ""
        if "data-dependent" in text:
            named = " (a value of the batch decides a branch or a size, or is read on the host, as by .item())"
        raise ExportError(f"{failed}{named}: {text}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", metavar="FILE.py:FUNCTION")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--batch-sizes", help='"dynamic" (the default), or sizes such as 64,27')
    parser.add_argument("--train-outputs", action="store_true", default=None, help="the training step returns the outputs, too")
    parser.add_argument("--autocast", choices=("bfloat16",))
    parser.add_argument("--processor", choices=tuple(PROCESSORS), help="instructions of the programs (default baseline)")
    given = parser.parse_args()
    file, _, function = given.function.rpartition(":")
    if not file:
        parser.error(f"{given.function!r} is not FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("exported", file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    arguments = getattr(program, function)()
    options = {
        "batch_sizes": given.batch_sizes,
        "train_outputs": given.train_outputs,
        "autocast": getattr(torch, given.autocast) if given.autocast else None,
        "processor": given.processor,
    }
    arguments |= {name: value for name, value in options.items() if value is not None}
    try:
        manifest = export_step(folder=given.folder, **arguments)
    except ExportError as error:
        raise SystemExit(f"export_step: {error}") from None
    print(f"{given.folder}: {len(manifest['parameters'])} parameters, {len(manifest['programs'])} programs for torch {manifest['torch']}")


if __name__ == "__main__":
    main()
