"""Runs the cases of kind `schedule_error`: arguments and states that ignite refuses, and its errors.

Each function below provokes the error of one target. The `args` of a case name only what matters;
`DEFAULTS` and the builders fill in valid values for the rest.
"""

import tempfile
from pathlib import Path

import torch
from ignite import handlers, metrics
from ignite.engine import Engine, Events
from ignite.handlers.param_scheduler import ParamScheduler
from ignite.handlers.state_param_scheduler import (
    LambdaStateScheduler,
    PiecewiseLinearStateScheduler,
    StateParamScheduler,
    StepStateScheduler,
)

from .specs import build_optimizer, build_torch_scheduler, without
from .values import Unsupported, plain_error

CYCLE = {"param_name": "lr", "start_value": 1.0, "end_value": 0.1, "cycle_size": 10}
DEFAULTS = {
    "LinearCyclicalScheduler": CYCLE,
    "CosineAnnealingScheduler": CYCLE,
    "PiecewiseLinear": {"param_name": "lr", "milestones_values": [(0, 1.0), (10, 0.1)]},
    "PiecewiseLinearStateScheduler": {"param_name": "param", "milestones_values": [(0, 1.0), (10, 0.1)]},
    "StepStateScheduler": {"param_name": "param", "initial_value": 1.0, "gamma": 0.5, "step_size": 5},
    "LambdaStateScheduler": {"param_name": "param"},
    "ReduceLROnPlateauScheduler": {"metric_name": "score"},
}


def schedule_error(config):
    target = config["target"]
    if target not in TARGETS:
        raise Unsupported(f"target {target}")
    try:
        TARGETS[target](config)
    except (ModuleNotFoundError, FailedTooEarly):
        raise
    except Exception as error:
        return plain_error(error)
    raise RuntimeError(f"{target} raised no error")


class FailedTooEarly(Exception):
    """A scheduler failed at an event before the expected one."""


# Schedulers of an optimizer


def optimizer_with(groups=1):
    return build_optimizer({"type": "SGD", "groups": [{"lr": 0.1, "momentum": 0.9}] * groups})


def linear(optimizer, **changes):
    return handlers.LinearCyclicalScheduler(optimizer, **{**CYCLE, **changes})


def pairs_as_tuples(args):
    """`args` with a list of milestones as ignite wants it: pairs are tuples there, lists in JSON."""
    milestones = args.get("milestones_values")
    if milestones is None:
        return args
    return {**args, "milestones_values": [tuple(pair) for pair in milestones]}


def step_until(scheduler, at_event):
    """Calls a scheduler for the events 0 to `at_event`; only the last call may fail."""
    for event in range(at_event):
        try:
            scheduler(None)
        except Exception as error:
            raise FailedTooEarly(f"at event {event}, not {at_event}") from error
    scheduler(None)


def optimizer_scheduler(scheduler_class):
    def provoke(config):
        args = pairs_as_tuples(config["args"])
        optimizer = args["optimizer"] if "optimizer" in args else optimizer_with(args.get("n_groups", 1))
        defaults = DEFAULTS[scheduler_class.__name__]
        scheduler = scheduler_class(optimizer, **{**defaults, **without(args, "optimizer", "n_groups")})
        if config.get("call") == "step":
            step_until(scheduler, config["at_event"])

    return provoke


def load_own_state(scheduler, args):
    """Loads the given state, or the scheduler's own state without the key `missing`."""
    if "missing" in args:
        state_dict = scheduler.state_dict()
        del state_dict[args["missing"]]
    else:
        state_dict = args["state_dict"]
    scheduler.load_state_dict(state_dict)


def load_optimizer_scheduler(scheduler_class):
    def provoke(config):
        scheduler = scheduler_class(optimizer_with(), **DEFAULTS[scheduler_class.__name__])
        load_own_state(scheduler, config["args"])

    return provoke


def param_scheduler(config):
    class GivenLength(ParamScheduler):
        def get_param(self):
            return [0.1] * config["args"]["get_param_len"]

        @classmethod
        def simulate_values(cls, num_events, **scheduler_kwargs):
            raise NotImplementedError

    step_until(GivenLength(optimizer_with(config["args"]["n_groups"]), "lr"), config["at_event"])


def child_schedulers(words):
    """The list that the words of an argument `schedulers` stand for; other values stand for themselves."""
    optimizer = optimizer_with()
    lists = {
        "1 scheduler": [linear(optimizer)],
        "2 schedulers": [linear(optimizer), linear(optimizer)],
        "[scheduler, 12]": [linear(optimizer), 12],
        "2 schedulers on different optimizers": [linear(optimizer), linear(optimizer_with())],
        "2 schedulers with param_name lr and momentum": [linear(optimizer), linear(optimizer, param_name="momentum")],
    }
    return lists[words] if isinstance(words, str) else words


def concat(config):
    args = config["args"]
    handlers.ConcatScheduler(child_schedulers(args["schedulers"]), args.get("durations", [10]))


def concat_of(count, durations):
    optimizer = optimizer_with()
    return handlers.ConcatScheduler([linear(optimizer) for _ in range(count)], durations)


def concat_load(config):
    args = config["args"]
    if "from" in args:
        state_dict = concat_of(args["from"], [10] * (args["from"] - 1)).state_dict()
        concat_of(args["to"], args["durations"]).load_state_dict(state_dict)
    else:
        load_own_state(concat_of(2, [10]), args)


def concat_simulate(config):
    handlers.ConcatScheduler.simulate_values(
        num_events=10,
        schedulers=child_schedulers("2 schedulers"),
        durations=[5],
        param_names=config["args"]["param_names"],
    )


def param_group(config):
    args = config["args"]
    handlers.ParamGroupScheduler(child_schedulers(args.get("schedulers", "2 schedulers")), args.get("names"))


def param_group_load(config):
    args = config["args"]
    if "names_saved" in args:
        saved = handlers.ParamGroupScheduler(child_schedulers("2 schedulers"), args["names_saved"])
        own = handlers.ParamGroupScheduler(child_schedulers("2 schedulers"), args["names_own"])
        own.load_state_dict(saved.state_dict())
    else:
        load_own_state(handlers.ParamGroupScheduler(child_schedulers("2 schedulers")), args)


def lr_scheduler(config):
    args = config["args"]
    if "lr_scheduler" in args:
        handlers.LRScheduler(args["lr_scheduler"])
    else:
        step_until(handlers.LRScheduler(torch_scheduler(args["torch"])), config["at_event"])


def torch_scheduler(spec):
    optimizer = optimizer_with()
    if spec["type"] == "SequentialLR":
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
    return build_torch_scheduler(spec, optimizer)


def lr_scheduler_simulate(config):
    handlers.LRScheduler.simulate_values(num_events=10, **config["args"])


def with_warmup(config):
    args = without(config["args"], "note")
    if config["args"].get("note") == "a dict given":
        args["output_simulated_values"] = {}
    defaults = {"lr_scheduler": linear(optimizer_with()), "warmup_start_value": 0.0, "warmup_duration": 5}
    handlers.create_lr_scheduler_with_warmup(**{**defaults, **args})


def plateau(config):
    args = without(config["args"], "metrics")
    optimizer = optimizer_with(2)
    scheduler = handlers.ReduceLROnPlateauScheduler(optimizer, **{**DEFAULTS["ReduceLROnPlateauScheduler"], **args})
    if config.get("call") == "step":
        evaluator = idle_engine()
        evaluator.state.metrics = config["args"]["metrics"]
        scheduler(evaluator)


def plateau_simulate(config):
    args = config["args"]
    handlers.ReduceLROnPlateauScheduler.simulate_values(
        num_events=args["num_events"], metric_values=[1.0] * args["len_metric_values"], init_lr=0.1
    )


# Schedulers of a state attribute


def state_scheduler(scheduler_class):
    def provoke(config):
        scheduler_class(**{**DEFAULTS[scheduler_class.__name__], **pairs_as_tuples(config["args"])})

    return provoke


def load_state_scheduler(scheduler_class):
    def provoke(config):
        load_own_state(scheduler_class(**DEFAULTS[scheduler_class.__name__]), config["args"])

    return provoke


def state_attach(config):
    args = config["args"]
    engine = idle_engine()
    if args["already_there"]:
        setattr(engine.state, args["param_name"], 0.0)
    scheduler = StepStateScheduler(
        **{**DEFAULTS["StepStateScheduler"], "param_name": args["param_name"], "create_new": args["create_new"]}
    )
    StateParamScheduler.attach(scheduler, engine, Events.ITERATION_STARTED)


# Engine and events


def idle_engine():
    return Engine(lambda engine, batch: None)


def event_filter(config):
    Events.ITERATION_STARTED(**config["args"])


def add_event_handler(config):
    idle_engine().add_event_handler(config["args"]["event"], lambda: None)


def fire_event(config):
    idle_engine().fire_event(config["args"]["event"])


def remove_event_handler(config):
    idle_engine().remove_event_handler(lambda: None, config["args"]["event"])


def engine_run(config):
    args = dict(config["args"])
    engine = idle_engine()
    if "loaded" in args:
        engine.load_state_dict(args.pop("loaded"))
    data = list(range(args.pop("data_len"))) if "data_len" in args else args.pop("data")
    engine.run(data, **args)


def engine_load(config):
    args = config["args"]
    engine = idle_engine()
    engine.state_dict_user_keys.extend(args.get("user_keys", []))
    engine.load_state_dict(args["state_dict"])


# Handlers and the learning rate finder


def small_model():
    return torch.nn.Linear(2, 1)


def checkpoint(config):
    args = config["args"]
    to_save = {key: idle_engine() for key in args.get("to_save_keys", ["trainer"])}
    handlers.Checkpoint(to_save, lambda content, filename: None, **without(args, "to_save_keys"))


def default_score_fn(config):
    handlers.Checkpoint.get_default_score_fn("score", **config["args"])


def disk_saver(config):
    args = dict(config["args"])
    if args["dirname"] != "<dir>":
        handlers.DiskSaver(**args)
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in args.pop("files"):
            (Path(directory) / name).touch()
        try:
            handlers.DiskSaver(**{**args, "dirname": directory})
        except ValueError as error:
            raise ValueError(str(error).replace(directory, "<dir>")) from error


def ema(config):
    handlers.EMAHandler(small_model(), **config["args"])


def early_stopping(config):
    defaults = {"patience": 2, "score_function": lambda engine: 0.0, "trainer": idle_engine()}
    handlers.EarlyStopping(**{**defaults, **config["args"]})


def model_checkpoint(config):
    with tempfile.TemporaryDirectory() as directory:
        handlers.ModelCheckpoint(directory)(idle_engine(), config["args"]["to_save"])


def time_limit(config):
    handlers.TimeLimit(**config["args"])


def lr_finder_attach(config):
    args = config["args"]
    parts = {"model": small_model(), "optimizer": optimizer_with()}
    to_save = {key: parts[key] for key in args.get("to_save_keys", parts)}
    with handlers.FastaiLRFinder().attach(idle_engine(), to_save, **without(args, "to_save_keys")):
        pass


def lr_suggestion(config):
    finder = handlers.FastaiLRFinder()
    finder._history = config["args"]["history"]
    finder.lr_suggestion()


# Metrics


def metric(metric_class):
    def provoke(config):
        metric_class(**config["args"])

    return provoke


def metric_compute(metric_class):
    """Computes a metric that has seen no batch."""

    def provoke(config):
        metric_class(**without(config["args"], "batches")).compute()

    return provoke


def iou(config):
    args = config["args"]
    metrics.IoU(metrics.ConfusionMatrix(num_classes=args["num_classes"]), ignore_index=args["ignore_index"])


def accuracy_update(config):
    args = config["args"]
    if "y_pred" in args:
        output = torch.tensor(args["y_pred"]), torch.tensor(args["y"])
    else:
        output = torch.zeros(args["y_pred_shape"]), torch.zeros(args["y_shape"], dtype=torch.int64)
    metrics.Accuracy().update(output)


def running_average(config):
    metrics.RunningAverage(output_transform=lambda output: output, **config["args"])


TARGETS = {
    "LinearCyclicalScheduler": optimizer_scheduler(handlers.LinearCyclicalScheduler),
    "CosineAnnealingScheduler": optimizer_scheduler(handlers.CosineAnnealingScheduler),
    "CosineAnnealingScheduler.load_state_dict": load_optimizer_scheduler(handlers.CosineAnnealingScheduler),
    "PiecewiseLinear": optimizer_scheduler(handlers.PiecewiseLinear),
    "PiecewiseLinear.load_state_dict": load_optimizer_scheduler(handlers.PiecewiseLinear),
    "ParamScheduler": param_scheduler,
    "ConcatScheduler": concat,
    "ConcatScheduler.load_state_dict": concat_load,
    "ConcatScheduler.simulate_values": concat_simulate,
    "ParamGroupScheduler": param_group,
    "ParamGroupScheduler.load_state_dict": param_group_load,
    "LRScheduler": lr_scheduler,
    "LRScheduler.simulate_values": lr_scheduler_simulate,
    "create_lr_scheduler_with_warmup": with_warmup,
    "ReduceLROnPlateauScheduler": plateau,
    "ReduceLROnPlateauScheduler.simulate_values": plateau_simulate,
    "PiecewiseLinearStateScheduler": state_scheduler(PiecewiseLinearStateScheduler),
    "LambdaStateScheduler": state_scheduler(LambdaStateScheduler),
    "StepStateScheduler.load_state_dict": load_state_scheduler(StepStateScheduler),
    "StateParamScheduler.attach": state_attach,
    "Events.ITERATION_STARTED": event_filter,
    "Engine.add_event_handler": add_event_handler,
    "Engine.fire_event": fire_event,
    "Engine.remove_event_handler": remove_event_handler,
    "Engine.run": engine_run,
    "Engine.load_state_dict": engine_load,
    "Checkpoint": checkpoint,
    "Checkpoint.get_default_score_fn": default_score_fn,
    "DiskSaver": disk_saver,
    "EMAHandler": ema,
    "EarlyStopping": early_stopping,
    "ModelCheckpoint": model_checkpoint,
    "TimeLimit": time_limit,
    "FastaiLRFinder.attach": lr_finder_attach,
    "FastaiLRFinder.lr_suggestion": lr_suggestion,
    "Accuracy.compute": metric_compute(metrics.Accuracy),
    "Accuracy.update": accuracy_update,
    "Average.compute": metric_compute(metrics.Average),
    "CohenKappa": metric(metrics.CohenKappa),
    "ConfusionMatrix": metric(metrics.ConfusionMatrix),
    "ConfusionMatrix.compute": metric_compute(metrics.ConfusionMatrix),
    "Fbeta": metric(metrics.Fbeta),
    "IoU": iou,
    "MeanAbsoluteError.compute": metric_compute(metrics.MeanAbsoluteError),
    "MeanSquaredError.compute": metric_compute(metrics.MeanSquaredError),
    "Precision": metric(metrics.Precision),
    "Precision.compute": metric_compute(metrics.Precision),
    "ROC_AUC.compute": metric_compute(metrics.ROC_AUC),
    "RunningAverage": running_average,
    "TopKCategoricalAccuracy.compute": metric_compute(metrics.TopKCategoricalAccuracy),
}
