"""Runs the cases of kind `schedule` and `schedule_resume`: parameter values during a run."""

import copy
import math

from ignite.engine import Engine
from ignite.handlers import ConcatScheduler, LRScheduler, ParamGroupScheduler

from .specs import (
    OPTIMIZER_SCHEDULERS,
    attach_scheduler,
    build_event,
    build_optimizer,
    build_scheduler,
    build_torch_scheduler,
    build_with_warmup,
    constructor_arguments,
    without,
)
from .values import Unsupported, plain, plain_error

# How far two runs of the same schedule through different formulas may differ.
SAME_VALUES_TOLERANCE = 1e-9


def schedule(config):
    specs = [entry["scheduler"] for entry in config["schedulers"]]
    if specs[0]["type"] == "ReduceLROnPlateau":
        return plateau_run(config)

    optimizer = build_optimizer(config["optimizer"])
    record = Recorder(config, optimizer)
    trainer = Engine(record)
    schedulers = []
    for entry in config["schedulers"]:
        scheduler = build_scheduler(entry["scheduler"], optimizer)
        attach_scheduler(scheduler, trainer, build_event(entry["event"]))
        schedulers.append(scheduler)

    expect = {}
    try:
        trainer.run(range(config["run"]["epoch_length"]), max_epochs=config["run"]["max_epochs"])
    except Exception as error:
        expect["error"] = {**plain_error(error), "at_iteration": trainer.state.iteration}

    expect["values"] = record.values[config["record"][0]]
    if len(config["record"]) > 1:
        expect["extra"] = {name: record.values[name] for name in config["record"][1:]}
    history = getattr(trainer.state, "param_history", None)
    if history is not None:
        expect["param_history"] = history
    expect["final_event_index"] = [getattr(scheduler, "event_index", None) for scheduler in schedulers]

    if specs[0]["type"] == "LRScheduler":
        native, closed_form = torch_native_values(config["optimizer"], specs[0]["torch"], len(expect["values"]))
        add_torch_native(expect, native, closed_form)
    if "simulate" in config:
        try:
            expect["simulated"] = simulated_values(config, specs[0])
        except Exception as error:
            expect["simulated_error"] = plain_error(error)
    return plain(expect)


class Recorder:
    """A process function that notes the recorded parameters as the training step sees them."""

    def __init__(self, config, optimizer):
        self.on_state = config.get("state_param", False)
        self.optimizer = optimizer
        self.values = {name: [] for name in config["record"]}

    def __call__(self, engine, batch):
        for name, seen in self.values.items():
            if self.on_state:
                seen.append(getattr(engine.state, name, None))
            else:
                seen.append([group.get(name) for group in self.optimizer.param_groups])


def plateau_run(config):
    """Runs one training step in each epoch, then an evaluator that calls the scheduler with the epoch's metric."""
    entry = config["schedulers"][0]
    spec = entry["scheduler"]
    optimizer = build_optimizer(config["optimizer"])
    record = Recorder(config, optimizer)
    trainer = Engine(record)
    evaluator = Engine(lambda engine, batch: None)
    scheduler = build_scheduler(spec, optimizer, trainer)
    evaluator.add_event_handler(build_event(without(entry["event"], "engine")), scheduler)

    for epoch, metric in enumerate(config["metrics"], start=1):
        trainer.run([0], max_epochs=epoch)
        evaluator.state.metrics[spec["metric_name"]] = metric
        evaluator.run([0])
    record(trainer, None)

    expect = {
        "values": record.values[config["record"][0]],
        "final_event_index": [scheduler.event_index],
    }
    if spec.get("param_group_index") is None:
        add_torch_native(expect, plateau_native_values(config, spec))
    if spec.get("save_history"):
        expect["param_history"] = trainer.state.param_history
    return plain(expect)


def add_torch_native(expect, native, closed_form=None):
    same = all(
        math.isclose(own, other, rel_tol=SAME_VALUES_TOLERANCE)
        for own_groups, other_groups in zip(expect["values"], native, strict=True)
        for own, other in zip(own_groups, other_groups, strict=True)
    )
    expect["torch_native"] = native
    expect["same_as_torch_native"] = same
    if closed_form is not None and not same:
        expect["torch_closed_form"] = closed_form


def torch_native_values(optimizer_spec, torch_spec, steps):
    """Returns the rates of torch's scheduler, stepped as torch intends, and those of its closed form if it has one."""
    optimizer = build_optimizer(optimizer_spec)
    scheduler = build_torch_scheduler(torch_spec, optimizer)
    native = []
    closed_form = [] if hasattr(scheduler, "_get_closed_form_lr") else None
    for _ in range(steps):
        native.append([group["lr"] for group in optimizer.param_groups])
        if closed_form is not None:
            closed_form.append(list(scheduler._get_closed_form_lr()))
        optimizer.step()
        scheduler.step()
    return native, closed_form


def plateau_native_values(config, spec):
    optimizer = build_optimizer(config["optimizer"])
    torch_spec = without(spec, "metric_name", "param_group_index", "save_history")
    scheduler = build_torch_scheduler(torch_spec, optimizer)
    native = [[group["lr"] for group in optimizer.param_groups]]
    for metric in config["metrics"]:
        optimizer.step()
        scheduler.step(metric)
        native.append([group["lr"] for group in optimizer.param_groups])
    return native


def simulated_values(config, spec):
    """Returns the result of `simulate_values` of the scheduler's class, on a fresh optimizer."""
    num_events = config["simulate"]
    optimizer = build_optimizer(config["optimizer"])
    kind = spec["type"]
    if kind in OPTIMIZER_SCHEDULERS:
        return OPTIMIZER_SCHEDULERS[kind].simulate_values(num_events=num_events, **constructor_arguments(spec))
    if kind == "LRScheduler":
        torch_scheduler = build_torch_scheduler(spec["torch"], optimizer)
        return LRScheduler.simulate_values(num_events=num_events, lr_scheduler=torch_scheduler)
    if kind == "WithWarmup":
        output = [None] * num_events
        build_with_warmup(spec, optimizer, output_simulated_values=output)
        return output
    children = [build_scheduler(child, optimizer) for child in spec["schedulers"]]
    if kind == "ParamGroup":
        return ParamGroupScheduler.simulate_values(num_events=num_events, schedulers=children)
    if kind == "Concat":
        return ConcatScheduler.simulate_values(num_events=num_events, schedulers=children, durations=spec["durations"])
    raise Unsupported(f"simulate_values of {kind}")


def schedule_resume(config):
    before = ResumeRun(config)
    before.run(config["k"])
    state_dict = copy.deepcopy(before.scheduler.state_dict())
    optimizer_lr = [group["lr"] for group in before.optimizer.param_groups]

    after = ResumeRun(config)
    if config["restore_optimizer_lr"]:
        for group, lr in zip(after.optimizer.param_groups, optimizer_lr, strict=True):
            group["lr"] = lr
    after.scheduler.load_state_dict(copy.deepcopy(state_dict))
    after.run(config["total"] - config["k"])

    uninterrupted = ResumeRun(config)
    uninterrupted.run(config["total"])

    return plain(
        {
            "state_dict": state_dict,
            "optimizer_lr_at_k": optimizer_lr,
            "values_before": before.values,
            "values_after": after.values,
            "equals_uninterrupted": before.values + after.values == uninterrupted.values,
            "state_dict_end": after.scheduler.state_dict(),
        }
    )


class ResumeRun:
    """A fresh optimizer, scheduler and trainer for `schedule_resume`."""

    def __init__(self, config):
        self.optimizer = build_optimizer(config["optimizer"])
        self.scheduler = build_scheduler(config["scheduler"], self.optimizer)
        record = Recorder(config, self.optimizer)
        self.values = record.values[config["record"][0]]
        self.trainer = Engine(record)
        attach_scheduler(self.scheduler, self.trainer, build_event(config["event"]))

    def run(self, events):
        if events > 0:
            self.trainer.run(range(events))
