"""Builds the optimizers, events and schedulers that a config describes."""

import torch
from ignite.engine import Events, EventsList
from ignite.handlers import (
    ConcatScheduler,
    CosineAnnealingScheduler,
    LinearCyclicalScheduler,
    LRScheduler,
    ParamGroupScheduler,
    PiecewiseLinear,
    ReduceLROnPlateauScheduler,
    create_lr_scheduler_with_warmup,
)
from ignite.handlers.state_param_scheduler import (
    ExpStateScheduler,
    MultiStepStateScheduler,
    PiecewiseLinearStateScheduler,
    StateParamScheduler,
    StepStateScheduler,
)

EVENT_FILTERS = ("every", "once", "before", "after")

# Schedulers whose spec holds nothing but arguments of the constructor.
OPTIMIZER_SCHEDULERS = {
    "LinearCyclical": LinearCyclicalScheduler,
    "CosineAnnealing": CosineAnnealingScheduler,
    "PiecewiseLinear": PiecewiseLinear,
}
STATE_SCHEDULERS = {
    "ExpState": ExpStateScheduler,
    "StepState": StepStateScheduler,
    "MultiStepState": MultiStepStateScheduler,
    "PiecewiseLinearState": PiecewiseLinearStateScheduler,
}


def without(spec, *keys):
    return {key: value for key, value in spec.items() if key not in keys}


def build_optimizer(spec, params=None):
    """Returns an optimizer with the given list of parameters for each group, by default one scalar each."""
    if params is None:
        params = [[torch.zeros(1, dtype=torch.float64, requires_grad=True)] for _ in spec["groups"]]
    groups = [{"params": own, **group} for own, group in zip(params, spec["groups"], strict=True)]
    defaults = dict(spec.get("defaults", {}))
    if "betas" in defaults:
        defaults["betas"] = tuple(defaults["betas"])
    return getattr(torch.optim, spec["type"])(groups, **defaults)


def build_event(spec, custom_events=None):
    """Returns an event with its filter, or several joined by OR; custom events are given by name."""
    custom_events = custom_events or {}
    if isinstance(spec, list):
        events = EventsList()
        for entry in spec:
            events |= build_event(entry, custom_events)
        return events
    name = spec["name"]
    event = custom_events[name] if name in custom_events else Events[name]
    filters = {key: spec[key] for key in EVENT_FILTERS if key in spec}
    return event(**filters) if filters else event


def build_torch_scheduler(spec, optimizer):
    return getattr(torch.optim.lr_scheduler, spec["type"])(optimizer, **without(spec, "type"))


def constructor_arguments(spec):
    """Returns the keys of a leaf spec as keyword arguments."""
    arguments = without(spec, "type")
    if "milestones_values" in arguments:
        arguments["milestones_values"] = [tuple(pair) for pair in arguments["milestones_values"]]
    return arguments


def build_scheduler(spec, optimizer, trainer=None):
    """Returns the scheduler of any spec of the README's table. A plateau scheduler writes its history to `trainer`."""
    kind = spec["type"]
    if kind in OPTIMIZER_SCHEDULERS:
        return OPTIMIZER_SCHEDULERS[kind](optimizer, **constructor_arguments(spec))
    if kind in STATE_SCHEDULERS:
        return STATE_SCHEDULERS[kind](**constructor_arguments(spec))
    if kind in ("Concat", "ParamGroup"):
        children = [build_scheduler(child, optimizer) for child in spec["schedulers"]]
        container = ConcatScheduler if kind == "Concat" else ParamGroupScheduler
        return container(children, **without(spec, "type", "schedulers"))
    if kind == "Torch":
        return build_torch_scheduler(spec["torch"], optimizer)
    if kind == "LRScheduler":
        return LRScheduler(build_torch_scheduler(spec["torch"], optimizer), **without(spec, "type", "torch"))
    if kind == "WithWarmup":
        return build_with_warmup(spec, optimizer)
    if kind == "ReduceLROnPlateau":
        return ReduceLROnPlateauScheduler(optimizer, trainer=trainer, **without(spec, "type"))
    raise ValueError(f"unknown scheduler type {kind}")


def build_with_warmup(spec, optimizer, output_simulated_values=None):
    inner = build_scheduler(spec["lr_scheduler"], optimizer)
    return create_lr_scheduler_with_warmup(
        inner, **without(spec, "type", "lr_scheduler"), output_simulated_values=output_simulated_values
    )


def attach_scheduler(scheduler, engine, event):
    if isinstance(scheduler, StateParamScheduler):
        scheduler.attach(engine, event)
    else:
        engine.add_event_handler(event, scheduler)
