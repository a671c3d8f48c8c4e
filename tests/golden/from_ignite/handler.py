"""Runs the cases of kind `handler`, with one function for each handler of the README's list."""

import tempfile
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import (
    Checkpoint,
    EarlyStopping,
    EMAHandler,
    EpochOutputStore,
    ModelCheckpoint,
    ProgressBar,
    TensorboardLogger,
    TerminateOnNan,
    global_step_from_engine,
)
from ignite.handlers.checkpoint import BaseSaveHandler
from ignite.handlers.tensorboard_logger import (
    GradsScalarHandler,
    OptimizerParamsHandler,
    OutputHandler,
    WeightsScalarHandler,
)
from ignite.metrics import Accuracy, RunningAverage

from .engine import Restartable
from .specs import build_event, build_optimizer
from .values import Unsupported, plain, plain_error


def handler(config):
    name = config["handler"]
    if name not in HANDLERS:
        raise Unsupported(name)
    return plain(HANDLERS[name](config))


def run(trainer, config):
    trainer.run(range(config["epoch_length"]), max_epochs=config["max_epochs"])


def engine_with_outputs(outputs):
    """An engine whose iteration i gives outputs[i - 1]."""
    return Engine(lambda engine, batch: outputs[engine.state.iteration - 1])


# Checkpoints


def setup_filename_pattern(config):
    flags = {name: config[name] for name in ("with_prefix", "with_score", "with_score_name", "with_global_step")}
    try:
        return {"pattern": Checkpoint.setup_filename_pattern(**flags)}
    except ValueError as error:
        return {"error": plain_error(error)}


class InMemorySaveHandler(BaseSaveHandler):
    def __init__(self):
        self.operations = []
        self.files = set()
        self.last_content = None

    def __call__(self, checkpoint, filename, metadata=None):
        self.operations.append(["save", filename, dict(metadata)])
        self.files.add(filename)
        self.last_content = checkpoint

    def remove(self, filename):
        self.operations.append(["remove", filename])
        self.files.remove(filename)


def objects_to_save(names):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {name: optimizer if name == "optimizer" else model for name in names}


def score_of_epoch(scores):
    return lambda engine: scores[engine.state.epoch - 1]


def checkpoint(config):
    options = ("n_saved", "filename_prefix", "score_name", "greater_or_equal", "filename_pattern", "include_self")
    arguments = {name: config[name] for name in options if name in config}
    if "scores" in config:
        arguments["score_function"] = score_of_epoch(config["scores"])
    if config["global_step"] is not None:
        arguments["global_step_transform"] = lambda engine, event: getattr(engine.state, config["global_step"])

    trainer = Engine(lambda engine, batch: None)
    storage = InMemorySaveHandler()
    saver = Checkpoint(objects_to_save(config["to_save"]), storage, **arguments)
    calls = []

    def record_call(engine):
        calls.append(
            {
                "epoch": engine.state.epoch,
                "iteration": engine.state.iteration,
                "ops": list(storage.operations),
                "saved": list(saver._saved),
                "last_checkpoint": saver.last_checkpoint,
                "files": sorted(storage.files),
            }
        )
        storage.operations.clear()

    event = build_event(config["event"])
    trainer.add_event_handler(event, saver)
    trainer.add_event_handler(event, record_call)
    run(trainer, config)

    expect = {"calls": calls, "state_dict": saver.state_dict(), "checkpoint_keys": sorted(storage.last_content)}
    if config["include_self"]:
        expect["checkpointer_state_in_last_checkpoint"] = storage.last_content["checkpointer"]
    return expect


def model_checkpoint(config):
    options = ("filename_prefix", "n_saved", "greater_or_equal", "atomic")
    arguments = {name: config[name] for name in options}
    if config["scores"] is not None:
        arguments["score_function"] = score_of_epoch(config["scores"])
        arguments["score_name"] = config["score_name"]
    trainer = Engine(lambda engine, batch: None)
    files = []
    with tempfile.TemporaryDirectory() as directory:
        saver = ModelCheckpoint(directory, **arguments)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver, objects_to_save(config["to_save"]))

        @trainer.on(Events.EPOCH_COMPLETED)
        def list_files():
            files.append(sorted(path.name for path in Path(directory).iterdir()))

        run(trainer, config)
        return {"files": files, "last_checkpoint": Path(saver.last_checkpoint).name}


# Handlers that watch the run


def early_stopping(config):
    trainer = Engine(lambda engine, batch: None)
    scores = iter(config["scores"])
    options = ("patience", "threshold", "threshold_mode", "cumulative", "mode")

    def new_stopper():
        arguments = {name: config[name] for name in options}
        return EarlyStopping(score_function=lambda engine: next(scores), trainer=trainer, **arguments)

    stopper = new_stopper()
    expect = {"first_stop_index": None, "trace": []}
    for index in range(len(config["scores"])):
        if index == config.get("save_load_after"):
            expect["state_dict_saved"] = stopper.state_dict()
            stopper = new_stopper()
            stopper.load_state_dict(expect["state_dict_saved"])
        stopper(trainer)
        terminated = trainer.should_terminate
        if terminated and expect["first_stop_index"] is None:
            expect["first_stop_index"] = index
        expect["trace"].append({"counter": stopper.counter, "best_score": stopper.best_score, "terminated": terminated})
    expect["state_dict"] = stopper.state_dict()
    return expect


def terminate_on_nan(config):
    trainer = engine_with_outputs(config["outputs"])
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run(range(len(config["outputs"])))
    return {"iterations_run": trainer.state.iteration, "terminated": trainer.should_terminate}


class WeightAndBuffer(torch.nn.Module):
    def __init__(self, weight, buffer):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.register_buffer("b", torch.tensor(buffer, dtype=torch.float64))

    def set_values(self, weight, buffer):
        with torch.no_grad():
            self.w.copy_(torch.tensor(weight, dtype=torch.float64))
            self.b.copy_(torch.tensor(buffer, dtype=torch.float64))


def ema(config):
    model = WeightAndBuffer(config["initial"], config["initial_buffer"])
    trainer = Engine(lambda engine, index: model.set_values(config["weights"][index], config["buffers"][index]))
    options = ("momentum", "momentum_warmup", "warmup_iters", "handle_buffers")
    averager = EMAHandler(model, **{name: config[name] for name in options if name in config})
    averager.attach(trainer, name=config["name"], event=build_event(config["event"]))

    expect = {"ema_w": [], "ema_b": [], "momentum": []}
    if config["name"] != "ema_momentum":
        expect["state_ema_momentum"] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def record():
        expect["ema_w"].append(averager.ema_model.w.tolist())
        expect["ema_b"].append(averager.ema_model.b.tolist())
        expect["momentum"].append(getattr(trainer.state, config["name"]))
        if "state_ema_momentum" in expect:
            expect["state_ema_momentum"].append(getattr(trainer.state, "ema_momentum", None))

    trainer.run(range(len(config["weights"])))
    expect["training_mode"] = averager.ema_model.training
    return expect


def running_average(config):
    if config["src"] == "Accuracy":
        batches = zip(config["y_pred"], config["y"], strict=True)
        outputs = [(torch.tensor(y_pred), torch.tensor(y)) for y_pred, y in batches]
        average = RunningAverage(Accuracy(), alpha=config["alpha"])
    else:
        outputs = config["outputs"]
        average = RunningAverage(output_transform=lambda output: output, alpha=config["alpha"])
    trainer = engine_with_outputs(outputs)
    average.attach(trainer, "average", config["usage"])
    return metric_values(trainer, "average", config)


def metric_values(trainer, name, config):
    """Returns the values of an attached metric that handlers registered after it read."""
    expect = {"after_iteration": [], "after_epoch": []}

    @trainer.on(Events.ITERATION_COMPLETED)
    def after_iteration():
        expect["after_iteration"].append(trainer.state.metrics.get(name))

    @trainer.on(Events.EPOCH_COMPLETED)
    def after_epoch():
        expect["after_epoch"].append(trainer.state.metrics.get(name))

    run(trainer, config)
    return expect


def epoch_output_store(config):
    trainer = engine_with_outputs(config["outputs"])
    store = EpochOutputStore()
    store.attach(trainer)
    per_epoch = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: per_epoch.append(list(store.data)))
    run(trainer, config)
    return {"per_epoch": per_epoch}


def global_step(config):
    custom_event = Events[config["custom_event"]] if config["custom_event"] is not None else None
    trainer = Engine(lambda engine, batch: None)
    transform = global_step_from_engine(trainer, custom_event, config["fallback_attr"])
    run(trainer, config)
    return {"value": transform(Engine(lambda engine, batch: None), Events[config["event"]])}


# Loggers


class RecordingWriter:
    def __init__(self):
        self.calls = []

    def add_scalar(self, tag, value, step):
        self.calls.append([tag, value, step])

    def close(self):
        pass


def tensorboard(config):
    trainer = Engine(lambda engine, batch: config.get("output"))
    trainer.state.metrics = config.get("metrics", {})
    trainer.state.alpha = 0.25
    writer = RecordingWriter()
    with tempfile.TemporaryDirectory() as directory, TensorboardLogger(log_dir=directory) as logger:
        logger.writer.close()
        logger.writer = writer
        logger.attach(trainer, TENSORBOARD_HANDLERS[config["what"]](config), build_event(config["event"]))
        run(trainer, config)
    return {"calls": writer.calls}


def tensorboard_output(config):
    step = config["global_step"]
    return OutputHandler(
        config["tag"],
        metric_names=config["metric_names"],
        output_transform=None if config["output"] is None else lambda output: output,
        global_step_transform=None if step is None else lambda engine, event: step,
        state_attributes=config["state_attributes"],
    )


def tensorboard_optimizer(config):
    optimizer = build_optimizer({"type": "SGD", "groups": [{"lr": lr} for lr in config["lrs"]]})
    return OptimizerParamsHandler(optimizer, tag=config["tag"])


def tensorboard_weights(config):
    return WeightsScalarHandler(model_with_fc(config), tag=config["tag"], whitelist=config["whitelist"])


def tensorboard_grads(config):
    model = model_with_fc(config)
    model.fc.weight.grad = 0.5 * model.fc.weight.detach()
    return GradsScalarHandler(model, tag=config["tag"], whitelist=config["whitelist"])


def model_with_fc(config):
    model = torch.nn.Module()
    model.fc = torch.nn.Linear(3, 2, dtype=torch.float64)
    model.fc.weight = torch.nn.Parameter(torch.tensor(config["weight"], dtype=torch.float64))
    model.fc.bias = torch.nn.Parameter(torch.tensor(config["bias"], dtype=torch.float64))
    return model


TENSORBOARD_HANDLERS = {
    "output": tensorboard_output,
    "opt": tensorboard_optimizer,
    "weights": tensorboard_weights,
    "grads": tensorboard_grads,
}


def progress_bar(config):
    calls = []

    class RecordingBar:
        """The part of tqdm's bar that ignite uses."""

        def __init__(self, total, initial, **display_options):
            self.total = total
            self.n = initial
            calls.append(["open", total, initial])

        def set_description(self, text):
            calls.append(["desc", text])

        def set_postfix(self, values):
            calls.append(["postfix", dict(values)])

        def update(self, n):
            self.n += n
            calls.append(["n", self.n])

        def close(self):
            calls.append(["close", self.n])

    trainer = Engine(lambda engine, batch: config["output"])
    trainer.state.metrics = config["metrics"]
    bar = ProgressBar(desc=config["desc"])
    bar.pbar_cls = RecordingBar
    bar.attach(
        trainer,
        metric_names=config["metric_names"],
        output_transform=None if config["output"] is None else lambda output: output,
        event_name=build_event(config["event"]),
        closing_event_name=Events[config["closing_event"]],
    )
    if config["epoch_length"] is None:
        data = Restartable(lambda: iter(range(config["data_len"])))
    else:
        data = range(config["data_len"])
    trainer.run(data, max_epochs=config["max_epochs"], epoch_length=config["epoch_length"])
    return {"calls": calls}


HANDLERS = {
    "setup_filename_pattern": setup_filename_pattern,
    "Checkpoint": checkpoint,
    "ModelCheckpoint": model_checkpoint,
    "EarlyStopping": early_stopping,
    "TerminateOnNan": terminate_on_nan,
    "EMA": ema,
    "RunningAverage": running_average,
    "EpochOutputStore": epoch_output_store,
    "global_step_from_engine": global_step,
    "Tensorboard": tensorboard,
    "ProgressBar": progress_bar,
}
