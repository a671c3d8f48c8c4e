"""Runs the cases of kind `train`: a small network is trained with schedulers attached."""

import torch
from ignite.engine import Events, create_supervised_trainer

from .specs import attach_scheduler, build_event, build_optimizer, build_scheduler
from .values import plain

ACTIVATIONS = {"tanh": torch.nn.Tanh, "sigmoid": torch.nn.Sigmoid, "identity": torch.nn.Identity}
LOSSES = {"mse": torch.nn.MSELoss, "l1": torch.nn.L1Loss, "huber": torch.nn.SmoothL1Loss}


class TwoLayers(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.l1 = linear(spec["l1.weight"], spec["l1.bias"])
        self.l2 = linear(spec["l2.weight"], spec["l2.bias"])
        self.act = ACTIVATIONS[spec["act"]]()

    def forward(self, x):
        return self.l2(self.act(self.l1(x)))


def linear(weight, bias):
    weight = float64(weight)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(float64(bias))
    return layer


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def train(config):
    model = TwoLayers(config["model"])
    optimizer = build_optimizer(config["optimizer"], [list(model.l1.parameters()), list(model.l2.parameters())])
    trainer = create_supervised_trainer(
        model,
        optimizer,
        LOSSES[config["loss"]](),
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
    )
    for entry in config["schedulers"]:
        scheduler = build_scheduler(entry["scheduler"], optimizer)
        attach_scheduler(scheduler, trainer, build_event(entry["event"]))

    seen = {"loss": [], "lr": []}
    if schedules_momentum(config["schedulers"]):
        seen["momentum"] = []

    # This handler is registered after the schedulers, so it records the values that the step sees.
    @trainer.on(Events.ITERATION_STARTED)
    def record_parameters():
        for name in seen.keys() - {"loss"}:
            seen[name].append([group[name] for group in optimizer.param_groups])

    @trainer.on(Events.ITERATION_COMPLETED)
    def record_loss():
        seen["loss"].append(trainer.state.output)

    batches = [(float64(batch["x"]), float64(batch["y"])) for batch in config["batches"]]
    trainer.run(batches, max_epochs=config["max_epochs"])
    return plain(
        {
            **seen,
            "params": dict(model.named_parameters()),
            "optimizer_state": {name: optimizer.state[param] for name, param in model.named_parameters()},
        }
    )


def schedules_momentum(schedulers):
    """Returns whether any spec inside names the momentum."""
    if isinstance(schedulers, dict):
        return schedulers.get("param_name") == "momentum" or schedules_momentum(list(schedulers.values()))
    if isinstance(schedulers, list):
        return any(schedules_momentum(item) for item in schedulers)
    return False
