"""The kind `optimizer`: the steps of one optimizer with given gradients."""

import torch

from .values import Unsupported, plain

DTYPES = {"float32": torch.float32, "float64": torch.float64}
PAIRS = ("betas", "etas", "step_sizes", "eps")


def optimizer(config):
    if config["type"] == "LBFGS":
        return lbfgs(config)
    if config["type"] == "SAM":
        return sam(config)
    dtype = DTYPES[config["dtype"]]
    parameters = [torch.nn.Parameter(tensor(spec["data"], spec["shape"], dtype)) for spec in config["params"]]
    groups = [
        {"params": [p for p, spec in zip(parameters, config["params"], strict=True) if spec["group"] == index]}
        | options(own)
        for index, own in enumerate(config["groups"])
    ]
    made = build(config["type"], groups, options(config["defaults"]))
    if config["type"].endswith("ScheduleFree"):
        made.train()
    seen = {}
    for step, gradients in enumerate(config["grads"]):
        for change in config["set"]:
            if change["step"] == step:
                made.param_groups[change["group"]][change["option"]] = change["value"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = given(gradient, parameter)
        made.step()
        if step in kept_steps(len(config["grads"])):
            seen[str(step)] = [flat(parameter) for parameter in parameters]
    expect = {"params": seen, "state": [state_of(made.state[parameter]) for parameter in parameters]}
    if config["type"].endswith("ScheduleFree"):
        made.eval()
        expect["eval_params"] = [flat(parameter) for parameter in parameters]
    return plain(expect)


def kept_steps(count):
    """The steps after which a case has the parameters."""
    return {0, 1, 2, count // 2, count - 1}


def build(name, groups, defaults):
    if name == "Lion":
        from lion_pytorch import Lion

        return Lion(groups, **defaults)
    if name == "AdEMAMix":
        from ademamix import AdEMAMix

        return AdEMAMix(groups, **defaults)
    if name in ("AdamWScheduleFree", "SGDScheduleFree"):
        import schedulefree

        return getattr(schedulefree, name)(groups, **defaults)
    slow = {} if name in ("Muon", "SparseAdam") else {"foreach": False}
    return getattr(torch.optim, name)(groups, **defaults, **slow)


def options(spec):
    """Pairs are tuples in Python."""
    return {name: tuple(value) if name in PAIRS and isinstance(value, list) else value for name, value in spec.items()}


def tensor(data, shape, dtype):
    return torch.tensor(data, dtype=dtype).reshape(shape)


def given(gradient, parameter):
    if gradient is None:
        return None
    if isinstance(gradient, dict):
        rows = torch.tensor([gradient["rows"]])
        data = tensor(gradient["data"], [len(gradient["rows"]), *parameter.shape[1:]], parameter.dtype)
        return torch.sparse_coo_tensor(rows, data, parameter.shape)
    return tensor(gradient, parameter.shape, parameter.dtype)


def flat(value):
    return value.detach().to(torch.float64).reshape(-1).tolist() if isinstance(value, torch.Tensor) else value


def state_of(state):
    return {name: flat(value) for name, value in state.items()}


def lbfgs(config):
    problem = config["problem"]
    dtype = DTYPES[config["dtype"]]
    raise_unless(problem.keys() >= {"m", "b", "x0", "quartic"})
    m = torch.tensor(problem["m"], dtype=dtype)
    b, x = (torch.tensor(problem[name], dtype=dtype) for name in ("b", "x0"))
    a = m.T @ m + 0.1 * torch.eye(len(b), dtype=dtype)
    x = torch.nn.Parameter(x)
    made = torch.optim.LBFGS([x], **config["defaults"])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        made.zero_grad()
        loss = 0.5 * x @ a @ x - b @ x + problem["quartic"] * (x**4).sum()
        loss.backward()
        return loss

    steps = []
    for _ in range(config["steps"]):
        loss = made.step(closure)
        steps.append({"loss": loss.item(), "x": flat(x), "closure_calls": calls})
    return plain({"steps": steps})


def sam(config):
    from sam import SAM

    problem = config["problem"]
    dtype = DTYPES[config["dtype"]]
    m = torch.tensor(problem["m"], dtype=dtype)
    b, x0 = (torch.tensor(problem[name], dtype=dtype) for name in ("b", "x0"))
    a = m.T @ m + 0.1 * torch.eye(len(b), dtype=dtype)
    parts = [torch.nn.Parameter(part.clone()) for part in x0.tensor_split([problem["split"]])]
    base = {"foreach": False, **options(config["defaults"])}
    made = SAM(parts, getattr(torch.optim, config["base"]), rho=config["rho"], adaptive=config["adaptive"], **base)

    def closure():
        made.zero_grad()
        x = torch.cat(parts)
        loss = 0.5 * x @ a @ x - b @ x + problem["quartic"] * (x**4).sum()
        loss.backward()
        return loss

    steps = []
    for _ in range(config["steps"]):
        loss = closure()
        made.step(closure)
        steps.append({"loss": loss.item(), "x": flat(torch.cat(parts))})
    return plain({"steps": steps})


def raise_unless(condition):
    if not condition:
        raise Unsupported("a problem of another form")
