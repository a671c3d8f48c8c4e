"""Writes random cases of the golden format, of shapes that the files beside this script have few or none of.

    golden-venv/bin/python variants.py 200 1 > variants.jsonl   # 200 of each kind, from seed 1
    cargo run --release --example conformance -- variants.jsonl

regenerate.py names the packages. Each `config` is drawn, and run through pytorch-ignite for its `expect`; a config that
ignite refuses to build is left out.
"""

import argparse
import json
import logging
import random
import signal
import sys

import torch

from from_ignite.specs import build_optimizer
from regenerate import compact_json, compute

ITERATION_EVENTS = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"]
EPOCH_EVENTS = ["STARTED", "EPOCH_STARTED", "EPOCH_COMPLETED", "COMPLETED"]
# Events that most runs never fire.
RARE_EVENTS = ["TERMINATE", "INTERRUPT", "EXCEPTION_RAISED", "TERMINATE_SINGLE_EPOCH", "DATALOADER_STOP_ITERATION"]
SCALARS = {
    "SGD": ["lr", "momentum", "weight_decay", "dampening"],
    "Adam": ["lr", "weight_decay", "eps"],
    "AdamW": ["lr", "weight_decay", "eps"],
    "RMSprop": ["lr", "momentum", "weight_decay", "alpha", "eps"],
}


class Draw(random.Random):
    def chance(self, probability):
        return self.random() < probability

    def rate(self, negative=0.15):
        value = round(self.uniform(0.001, 1), self.choice([2, 4, 17]))
        return -value if self.chance(negative) else value

    def event(self, filters=0.5, names=None):
        spec = {"name": self.choice(names or ITERATION_EVENTS * 3 + EPOCH_EVENTS)}
        if self.chance(filters):
            kind = self.choice(["every", "once", "once_list", "before", "after", "both", "every_after"])
            if kind == "every":
                spec["every"] = self.randint(1, 4)
            elif kind == "once":
                spec["once"] = self.randint(1, 8)
            elif kind == "once_list":
                spec["once"] = sorted(self.sample(range(1, 12), 3))
            elif kind == "before":
                spec["before"] = self.randint(1, 9)
            elif kind == "after":
                spec["after"] = self.randint(0, 9)
            elif kind == "both":
                spec["after"] = self.randint(0, 3)
                spec["before"] = spec["after"] + self.randint(1, 8)
            else:
                spec["after"] = self.randint(0, 3)
                spec["every"] = self.randint(1, 3)
        return spec

    def events(self):
        return [self.event() for _ in range(self.randint(1, 3))] if self.chance(0.2) else self.event()


# Schedules


def optimizer(draw, kinds=("SGD", "SGD", "Adam", "AdamW", "RMSprop")):
    kind = draw.choice(kinds)
    groups = []
    for _ in range(draw.randint(1, 3)):
        group = {"lr": draw.rate(0)}
        if kind in ("SGD", "RMSprop") and draw.chance(0.4):
            group["momentum"] = draw.rate(0)
        if draw.chance(0.2):
            group["weight_decay"] = draw.rate(0)
        groups.append(group)
    return {"type": kind, "groups": groups}


def param(draw, spec):
    return draw.choice(["lr"] * 6 + SCALARS[spec["type"]] + ["no_such", "temperature"])


def leaf(draw, spec, name=None, group=0.5, negative=0.15):
    kind = draw.choice(["LinearCyclical", "CosineAnnealing", "PiecewiseLinear"])
    result = {"type": kind, "param_name": name or param(draw, spec)}
    if kind == "PiecewiseLinear":
        events = sorted(draw.sample(range(0, 25), draw.randint(2, 5)))
        result["milestones_values"] = [[event, draw.rate(negative)] for event in events]
    else:
        result["start_value"] = draw.rate(negative)
        result["end_value"] = draw.rate(negative)
        result["cycle_size"] = draw.randint(2, 20)
        for key in ("cycle_mult", "start_value_mult", "end_value_mult"):
            if draw.chance(0.2):
                result[key] = draw.choice([1.0, 2.0, 1.5, 0.75])
        if draw.chance(0.2):
            result["warmup_duration"] = draw.randint(1, 6)
        if kind == "LinearCyclical" and draw.chance(0.3):
            result["monotonic"] = True
    result["param_group_index"] = draw.randrange(len(spec["groups"])) if draw.chance(group) else None
    return result


def torch_schedule(draw, spec):
    return draw.choice(
        [
            {"type": "StepLR", "step_size": draw.randint(1, 6), "gamma": draw.rate(0)},
            {"type": "MultiStepLR", "milestones": sorted(draw.sample(range(1, 20), 3)), "gamma": draw.rate(0)},
            {"type": "ConstantLR", "factor": draw.rate(0), "total_iters": draw.randint(1, 8)},
            {"type": "LinearLR", "start_factor": draw.rate(0), "end_factor": draw.rate(0), "total_iters": draw.randint(1, 8)},
            {"type": "ExponentialLR", "gamma": draw.rate(0)},
            {"type": "CosineAnnealingLR", "T_max": draw.randint(2, 9), "eta_min": 0.0},
            {"type": "PolynomialLR", "total_iters": draw.randint(2, 20), "power": draw.choice([1.0, 2.0, 0.5])},
            {"type": "OneCycleLR", "max_lr": draw.rate(0), "total_steps": 400, "cycle_momentum": False},
        ]
    )


def scheduler(draw, spec, depth=0):
    kind = draw.choice(["leaf"] * 4 + ([] if depth > 1 else ["Concat", "ParamGroup"]) + ([] if depth else ["LRScheduler", "WithWarmup"]))
    if kind == "leaf":
        result = leaf(draw, spec)
    elif kind == "Concat":
        name, count = param(draw, spec), draw.randint(2, 3)
        group = draw.choice([None, draw.randrange(len(spec["groups"]))])
        children = []
        for _ in range(count):
            child = leaf(draw, spec, name)
            child["param_group_index"] = group
            children.append(child)
        result = {"type": kind, "schedulers": children, "durations": [draw.randint(1, 12) for _ in range(count - 1)]}
    elif kind == "ParamGroup":
        children = [leaf(draw, spec, group=0.9) for _ in range(draw.randint(2, 3))]
        result = {"type": kind, "schedulers": children}
        if draw.chance(0.5):
            result["names"] = [f"name {index}" for index in range(len(children))]
    elif kind == "LRScheduler":
        result = {"type": kind, "torch": torch_schedule(draw, spec)}
    else:
        inner = {"type": "Torch", "torch": torch_schedule(draw, spec)} if draw.chance(0.5) else leaf(draw, spec, "lr", 0, 0)
        result = {"type": kind, "lr_scheduler": inner, "warmup_start_value": draw.rate(0.2), "warmup_duration": draw.randint(2, 9)}
        if draw.chance(0.5):
            result["warmup_end_value"] = draw.rate(0.1)
    if draw.chance(0.4):
        result["save_history"] = True
    return result


def state_scheduler(draw):
    kind = draw.choice(["ExpState", "StepState", "MultiStepState", "PiecewiseLinearState"])
    result = {"type": kind, "param_name": "param", "create_new": True, "save_history": draw.chance(0.5)}
    if kind == "PiecewiseLinearState":
        events = sorted(draw.sample(range(0, 25), draw.randint(2, 5)))
        result["milestones_values"] = [[event, draw.rate()] for event in events]
    else:
        result["initial_value"] = draw.rate()
        result["gamma"] = draw.rate()
        if kind == "StepState":
            result["step_size"] = draw.randint(1, 6)
        if kind == "MultiStepState":
            result["milestones"] = sorted(draw.sample(range(1, 20), 3))
    return result


def schedule(draw):
    spec = optimizer(draw)
    run = {"epoch_length": draw.randint(1, 14), "max_epochs": draw.randint(1, 6)}
    family = draw.choice(["any"] * 6 + ["state", "plateau"])
    if family == "state":
        one = {"scheduler": state_scheduler(draw), "event": draw.events()}
        return {"family": family, "optimizer": spec, "schedulers": [one], "record": ["param"], "run": run, "state_param": True}
    if family == "plateau":
        plateau = {
            "type": "ReduceLROnPlateau",
            "metric_name": "score",
            "mode": draw.choice(["min", "max"]),
            "factor": draw.choice([0.1, 0.5, 0.9]),
            "patience": draw.randint(0, 3),
            "threshold": draw.choice([0.0, 0.1, 1e-4]),
            "threshold_mode": draw.choice(["rel", "abs"]),
            "cooldown": draw.randint(0, 2),
            "eps": draw.choice([1e-8, 1e-2]),
            "param_group_index": draw.choice([None, 0]),
            "save_history": draw.chance(0.6),
        }
        metrics = [round(draw.uniform(-1, 3), 3) for _ in range(draw.randint(4, 15))]
        for index in range(1, len(metrics)):
            if draw.chance(0.08):
                metrics[index] = draw.choice(["NaN", "Infinity", "-Infinity"])
        entry = {"scheduler": plateau, "event": {"name": "COMPLETED", "engine": "evaluator"}}
        return {"family": family, "optimizer": spec, "schedulers": [entry], "record": ["lr"], "metrics": metrics, "run": None}
    count = draw.choice([1, 1, 2, 3])
    entries = [{"scheduler": scheduler(draw, spec), "event": draw.events()} for _ in range(count)]
    if count > 1 and draw.chance(0.4):
        # The second scheduler overwrites the value that the first one has written at the same
        # event.
        entries[0]["scheduler"] = leaf(draw, spec, "lr", 0, 0.8)
        entries[1]["scheduler"] = leaf(draw, spec, "lr", 0, 0)
        entries[1]["event"] = entries[0]["event"]
    if any(entry["scheduler"]["type"] == "LRScheduler" for entry in entries):
        entries = [entry for entry in entries if entry["scheduler"]["type"] == "LRScheduler"][:1]
        entries[0]["event"] = {"name": "ITERATION_COMPLETED"}
    record = [param(draw, spec)]
    record += [name for name in sorted({param(draw, spec) for _ in range(2)}) if name not in record]
    result = {"family": family, "optimizer": spec, "schedulers": entries, "record": record, "run": run}
    if entries[0]["scheduler"]["type"] == "LRScheduler":
        result["record"] = ["lr"]
    if count == 1 and draw.chance(0.2):
        result["simulate"] = draw.randint(1, 30)
    return result


def schedule_resume(draw):
    spec = optimizer(draw)
    total = draw.randint(2, 40)
    result = {
        "optimizer": spec,
        "scheduler": scheduler(draw, spec),
        "record": [param(draw, spec)],
        "event": {"name": "ITERATION_STARTED"},
        "k": draw.randint(0, total),
        "total": total,
        "restore_optimizer_lr": draw.chance(0.5),
    }
    if draw.chance(0.2):
        result.update(scheduler=state_scheduler(draw), record=["param"], state_param=True)
    if result["scheduler"]["type"] == "LRScheduler":
        result["record"] = ["lr"]
    return result


# Training


def matrix(draw, rows, columns):
    return [[round(draw.uniform(-1, 1), 4) for _ in range(columns)] for _ in range(rows)]


def train(draw):
    inputs, hidden, outputs = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 2)
    model = {
        "act": draw.choice(["tanh", "sigmoid", "identity"]),
        "l1.weight": matrix(draw, hidden, inputs),
        "l1.bias": matrix(draw, 1, hidden)[0],
        "l2.weight": matrix(draw, outputs, hidden),
        "l2.bias": matrix(draw, 1, outputs)[0],
    }
    batches = []
    for _ in range(draw.randint(1, 4)):
        size = draw.randint(1, 4)
        batches.append({"x": matrix(draw, size, inputs), "y": matrix(draw, size, outputs)})
    kind = draw.choice(list(SCALARS))
    groups = [{"lr": draw.choice([0.01, 0.03])}, {"lr": draw.choice([0.01, 0.02])}]
    defaults = {"weight_decay": draw.choice([0.0, 0.01])}
    if kind in ("SGD", "RMSprop"):
        defaults["momentum"] = draw.choice([0.0, 0.9])
    spec = {"type": kind, "groups": groups, "defaults": defaults}
    entries = []
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(["lr", "lr", "momentum" if kind == "SGD" else "lr", "weight_decay", "no_such"])
        child = leaf(draw, spec, name, negative=0.1)
        for key in ("start_value", "end_value"):
            if key in child:
                child[key] = round(child[key] * 0.05, 4)
        for pair in child.get("milestones_values", []):
            pair[1] = round(pair[1] * 0.05, 4)
        entries.append({"scheduler": child, "event": draw.event(0.3, ["ITERATION_STARTED", "EPOCH_STARTED", "ITERATION_COMPLETED"])})
    return {
        "model": model,
        "loss": draw.choice(["mse", "l1", "huber"]),
        "batches": batches,
        "max_epochs": draw.randint(1, 4),
        "optimizer": spec,
        "schedulers": entries,
        "gradient_accumulation_steps": draw.choice([1, 1, 2, 3]),
    }


# Metrics


def classes(draw, count, size):
    y_pred = [[round(draw.random(), 3) for _ in range(count)] for _ in range(size)]
    return {"y_pred": y_pred, "y": [draw.randrange(count) for _ in range(size)]}


def expression(draw, depth=0):
    """Draws an arithmetic expression of per-class precision P and recall R."""
    kind = draw.choice(["name", "number"] + ([] if depth > 2 else ["two", "two", "two", "reduced"]))
    if kind == "name":
        return draw.choice(["P", "R"])
    if kind == "number":
        return str(draw.choice([0.3, 1.0, 2.0, 0.5]))
    if kind == "reduced":
        return f"{operand(draw, depth)}.{draw.choice(['mean', 'sum', 'max', 'min', 'abs', 'sqrt'])}()"
    sign = draw.choice(["+", "-", "*", "/", "//", "%", "**"])
    return f"{operand(draw, depth)}{sign}{operand(draw, depth)}"


def operand(draw, depth):
    inner = expression(draw, depth + 1)
    return inner if inner in ("P", "R") else f"({inner})"


def metric(draw):
    family = draw.choice(["expression", "expression", "usage", "average"])
    if family == "average":
        name = draw.choice(["Average", "GeometricAverage"])
        sign = (0.1, 3) if name == "GeometricAverage" else (-2, 3)
        value = lambda: round(draw.uniform(*sign), 3)
        rows = draw.chance(0.5)
        batches = [{"x": [value(), value()] if rows else value()} for _ in range(draw.randint(1, 6))]
        return {"metric": name, "args": {}, "y_pred_dtype": "float64" if rows else "number", "y_dtype": None, "batches": batches}
    if family == "usage":
        length, epochs = draw.randint(1, 6), draw.randint(1, 4)
        usage = draw.choice(
            [
                "epoch_wise",
                "running_epoch_wise",
                "batch_wise",
                "running_batch_wise",
                "single_epoch_running_batch_wise",
                {"batch_filtered": {"every": draw.randint(1, 4)}},
                {"batch_filtered": {"once": draw.randint(1, 8)}},
                {"batch_filtered": {"after": draw.randint(1, 4)}},
                {"batch_filtered": {"before": draw.randint(1, 6)}},
            ]
        )
        size = draw.randint(1, 5)
        bits = lambda: [draw.randint(0, 1) for _ in range(size)]
        batches = [{"y_pred": bits(), "y": bits()} for _ in range(length * epochs)]
        return {"metric": "Accuracy", "usage": usage, "epoch_length": length, "max_epochs": epochs, "batches": batches}
    text = expression(draw)
    while "P" not in text and "R" not in text:
        text = expression(draw)
    count = draw.randint(2, 4)
    batches = [classes(draw, count, draw.randint(1, 5)) for _ in range(draw.randint(1, 4))]
    return {"metric": "MetricsLambda", "args": {"expr": text}, "y_pred_dtype": "float64", "y_dtype": "int64", "batches": batches}


# Handlers


def numbers(draw, count, low=-1, high=1):
    return [round(draw.uniform(low, high), 4) for _ in range(count)]


def ema(draw):
    count = draw.randint(1, 12)
    result = {
        "handler": "EMA",
        "initial": numbers(draw, 2),
        "initial_buffer": numbers(draw, 2),
        "weights": [numbers(draw, 2) for _ in range(count)],
        "buffers": [numbers(draw, 2) for _ in range(count)],
        "momentum": draw.choice([0.1, 0.3, 0.002]),
        "handle_buffers": draw.choice(["copy", "update", "ema_train", "ema_eval"]),
        "name": draw.choice(["ema_momentum", "other"]),
        "event": draw.choice([draw.event(0.8, ITERATION_EVENTS), draw.event(0, ["EPOCH_COMPLETED", "COMPLETED", "EPOCH_STARTED"])]),
    }
    if draw.chance(0.5):
        result.update(momentum_warmup=draw.choice([0.5, 0.01]), warmup_iters=draw.randint(1, 6))
    return result


def running_average(draw):
    length, epochs = draw.randint(1, 5), draw.randint(1, 4)
    result = {
        "handler": "RunningAverage",
        "alpha": draw.choice([0.98, 0.5, 0.1]),
        "usage": draw.choice(["running_epoch_wise", "running_batch_wise", "single_epoch_running_batch_wise"]),
        "epoch_length": length,
        "max_epochs": epochs,
    }
    if draw.chance(0.5):
        bits = lambda: [draw.randint(0, 1) for _ in range(3)]
        steps = range(length * epochs)
        return {**result, "src": "Accuracy", "y_pred": [bits() for _ in steps], "y": [bits() for _ in steps]}
    return {**result, "src": "output", "outputs": numbers(draw, length * epochs)}


def global_step(draw):
    return {
        "handler": "global_step_from_engine",
        "event": draw.choice(ITERATION_EVENTS + EPOCH_EVENTS + RARE_EVENTS),
        "custom_event": draw.choice([None] + ITERATION_EVENTS + EPOCH_EVENTS + RARE_EVENTS),
        "epoch_length": draw.randint(1, 5),
        "max_epochs": draw.randint(1, 4),
        "fallback_attr": draw.choice(["iteration", "epoch"]),
    }


def tensorboard(draw):
    result = {"handler": "Tensorboard", "what": draw.choice(["output", "opt", "weights", "grads"])}
    result.update(epoch_length=draw.randint(1, 5), max_epochs=draw.randint(1, 3))
    result.update(event=draw.event(0.6), tag=draw.choice(["gen", "a/b", None]))
    if result["what"] == "output":
        result["metrics"] = {
            "acc": draw.rate(),
            "loss": draw.choice(["NaN", "Infinity", draw.rate(), 3, 0]),
            "nested": {"a": draw.rate(), "b": {"c": 1}},
            "list": numbers(draw, draw.randint(0, 3)),
            "text": "hello",
        }
        names = ["all", ["acc"], ["nested"], ["list", "acc"], ["text"], ["loss", "missing"], None]
        result["metric_names"] = draw.choice(names)
        outputs = [None, 0.5, True, 3, "NaN", "x", {"a": 0.25, "b": 1.5}, {"a": [1.0, 2.0]}, {"a": {"b": 2.0}}, [1.0, 2.0]]
        result["output"] = draw.choice(outputs)
        result["state_attributes"] = draw.choice([None, ["alpha"]])
        result["global_step"] = draw.choice([None, 7])
    elif result["what"] == "opt":
        result["lrs"] = [draw.rate(0) for _ in range(draw.randint(1, 3))]
    else:
        result["weight"], result["bias"] = [numbers(draw, 3), numbers(draw, 3)], numbers(draw, 2)
        result["whitelist"] = draw.choice([None, ["fc"], ["fc.weight"], ["other"], []])
    if result["tag"] is None and result["what"] == "output":
        result["tag"] = "gen"
    return result


def early_stopping(draw):
    scores = numbers(draw, draw.randint(1, 20), -1, 2)
    result = {
        "handler": "EarlyStopping",
        "patience": draw.randint(1, 4),
        "threshold": draw.choice([0.0, 0.05, 0.5]),
        "threshold_mode": draw.choice(["abs", "rel"]),
        "cumulative": draw.chance(0.5),
        "mode": draw.choice(["min", "max"]),
        "scores": scores,
    }
    if draw.chance(0.4):
        result["save_load_after"] = draw.randrange(len(scores) + 1)
    return result


def checkpoint(draw):
    epochs = draw.randint(1, 7)
    scored = draw.chance(0.5)
    result = {
        "handler": "Checkpoint",
        "to_save": draw.choice([["model"], ["net"], ["model", "optimizer"]]),
        "n_saved": draw.choice([1, 2, 3, None]),
        "global_step": draw.choice([None, "epoch", "iteration"]),
        "include_self": False,
        "epoch_length": draw.randint(1, 4),
        "max_epochs": epochs,
        "event": draw.event(0.5, ["EPOCH_COMPLETED"] if scored else ["EPOCH_COMPLETED", "ITERATION_COMPLETED", "COMPLETED"]),
    }
    if draw.chance(0.5):
        result["filename_prefix"] = "best"
    if scored:
        result["scores"] = numbers(draw, epochs)
        result["score_name"] = draw.choice([None, "acc"])
        result["greater_or_equal"] = draw.chance(0.5)
    return result


def store(draw):
    length, epochs = draw.randint(1, 4), draw.randint(1, 4)
    return {"handler": "EpochOutputStore", "outputs": numbers(draw, length * epochs), "epoch_length": length, "max_epochs": epochs}


def handler(draw):
    makers = [ema, ema, running_average, global_step, global_step, tensorboard, early_stopping, checkpoint, store]
    return draw.choice(makers)(draw)


# Learning rate finder


def lr_finder(draw):
    if draw.chance(0.5):
        groups, count = draw.randint(1, 3), draw.randint(0, 12)
        lr = [[draw.rate(0) for _ in range(groups)] if groups > 1 else draw.rate(0) for _ in range(count)]
        history = {"lr": lr, "loss": numbers(draw, count, 0, 3)}
        return {"mode": "suggestion", "history": history, "n_groups": groups}
    spec = optimizer(draw)
    length, epochs = draw.randint(2, 8), draw.randint(1, 4)
    groups = len(spec["groups"])
    return {
        "mode": "run",
        "optimizer": spec,
        "epoch_length": length,
        "max_epochs": epochs,
        "losses": numbers(draw, length * epochs + 60, 0.1, 3),
        "num_iter": draw.choice([None, draw.randint(2, 40)]),
        "step_mode": draw.choice(["exp", "linear"]),
        "smooth_f": draw.choice([0.0, 0.05, 0.5]),
        "diverge_th": draw.choice([1.5, 5.0, 1000.0]),
        "start_lr": draw.choice([None, 1e-5, [1e-5] * groups]),
        "end_lr": draw.choice([1.0, 10.0, [2.0] * groups]),
    }


# Engine


def data(draw, offset=False):
    kind = draw.choice(["list"] * 5 + ["restartable", "one_shot", "infinite", "none"])
    if kind == "list":
        result = {"type": "list", "len": draw.randint(1, 5)}
        if offset:
            result["offset"] = 100
        return result
    if kind in ("restartable", "one_shot"):
        return {"type": kind, "len": draw.randint(1, 9)}
    return {"type": kind}


def run_step(draw):
    step = {"op": "run", "data": data(draw)}
    if draw.chance(0.8):
        step["max_epochs"] = draw.randint(1, 4)
    else:
        step["max_iters"] = draw.randint(1, 9)
    if step["data"]["type"] in ("infinite", "none") or draw.chance(0.25):
        step["epoch_length"] = draw.randint(1, 6)
    return step


def engine_trace(draw):
    handlers = []
    everything = ITERATION_EVENTS * 2 + EPOCH_EVENTS * 2 + RARE_EVENTS
    controls = {"terminate", "terminate_epoch", "interrupt"}
    for index in range(draw.randint(0, 4)):
        spec = {"tag": f"h{index}", "event": draw.events() if draw.chance(0.4) else {"name": draw.choice(everything)}}
        if draw.chance(0.4):
            action = draw.choice(
                [
                    {"type": "terminate"},
                    {"type": "terminate", "skip_completed": True},
                    {"type": "terminate_epoch"},
                    {"type": "terminate_epoch", "skip_epoch_completed": True},
                    {"type": "interrupt"},
                    {"type": "set_data", "data": {"type": "list", "len": draw.randint(2, 5), "offset": 100}},
                    {"type": "add_handler", "handler": {"tag": f"a{index}", "event": {"name": draw.choice(everything)}}},
                    {"type": "remove", "tag": f"h{draw.randint(0, index)}"},
                    {"type": "set_state", "attr": "epoch_length", "value": draw.randint(1, 7)},
                    {"type": "set_state", "attr": draw.choice(["max_epochs", "max_iters"]), "value": draw.randint(1, 7)},
                ]
            )
            action["max_calls"] = 1
            guard = draw.choice(["at_iteration", "at_epoch", None])
            if guard:
                action[guard] = draw.randint(1, 4)
            spec["action"] = action
            if action["type"] in controls:
                # Cases do not test several requests at one event.
                if any(other.get("action", {}).get("type") in controls for other in handlers):
                    del spec["action"]
        handlers.append(spec)
    steps = [run_step(draw)]
    if draw.chance(0.3):
        steps.append(run_step(draw))
    return {"family": "any", "handlers": handlers, "steps": steps}


# With some configs ignite never ends, so a run is stopped after this time.
SECONDS = 2

KINDS = {
    "schedule": schedule,
    "schedule_resume": schedule_resume,
    "train": train,
    "metric": metric,
    "handler": handler,
    "lr_finder": lr_finder,
    "engine_trace": engine_trace,
}


class TooLong(BaseException):
    """Raised when a run takes too long. It is no Exception, so that no case takes it for an error of its run."""


def too_long(signum, frame):
    raise TooLong


def main():
    signal.signal(signal.SIGALRM, too_long)
    build_optimizer({"type": "SGD", "groups": [{"lr": 0.1}]})  # imports modules, which must not be interrupted
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="cases of each kind")
    parser.add_argument("seed", type=int)
    parser.add_argument("kinds", nargs="*", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    for kind in options.kinds or KINDS:
        refused = 0
        for number in range(options.count):
            draw = Draw(f"{kind} {options.seed} {number}")
            config = KINDS[kind](draw)
            case = {"id": f"{kind}-v{options.seed}-{number:04}", "kind": kind, "config": config}
            signal.alarm(SECONDS)
            try:
                case["expect"] = compute(case)
            except (Exception, TooLong):
                refused += 1
                continue
            finally:
                signal.alarm(0)
            print(compact_json(case))
        print(f"{kind}: {options.count - refused} cases, {refused} that ignite refuses", file=sys.stderr)


if __name__ == "__main__":
    main()
