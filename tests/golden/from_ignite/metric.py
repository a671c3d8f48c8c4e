"""Runs the cases of kind `metric`: values of metrics over given batches."""

import ast
from contextlib import contextmanager

import torch
from ignite import metrics
from ignite.metrics import regression

from .handler import engine_with_outputs, metric_values
from .specs import without
from .values import Unsupported, plain

LOSS_FUNCTIONS = {
    "bce_with_logits": torch.nn.functional.binary_cross_entropy_with_logits,
    "cross_entropy": torch.nn.functional.cross_entropy,
    "l1": torch.nn.functional.l1_loss,
    "mse": torch.nn.functional.mse_loss,
    "nll": torch.nn.functional.nll_loss,
}
# Metrics of a confusion matrix, which the caller has to update.
OF_CONFUSION_MATRIX = (
    "DiceCoefficient",
    "IoU",
    "JaccardIndex",
    "cmAccuracy",
    "cmPrecision",
    "cmRecall",
    "mIoU",
)
# The parts that an expression of P and R, per-class precision and recall, may have.
EXPRESSION_PARTS = (
    ast.Expression,
    ast.BinOp,
    ast.operator,
    ast.Call,
    ast.Attribute,
    ast.Subscript,
    ast.Slice,
    ast.UnaryOp,
    ast.unaryop,
    ast.Constant,
    ast.Name,
    ast.Load,
)


def metric(config):
    if "usage" in config:
        return plain(with_usage(config))

    with default_dtype(torch.float64):
        per_batch, dtype = value_per_batch(config)
    with default_dtype(torch.float32):
        per_batch_f32, _ = value_per_batch(config)

    expect = {"value": per_batch[-1], "per_batch": per_batch}
    if dtype is not None:
        expect["dtype"] = dtype
    if per_batch_f32[-1] != per_batch[-1]:
        expect["value_f32_accumulator"] = per_batch_f32[-1]
    return expect


@contextmanager
def default_dtype(dtype):
    """Sets torch's default type, which ignite's accumulators have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def value_per_batch(config):
    """Returns the result after every update, and its type if it is a tensor."""
    result, updated = build(config["metric"], config["args"])
    per_batch = []
    for batch in config["batches"]:
        for part in updated:
            part.update(output_of(batch, config))
        value = result.compute()
        per_batch.append(plain(value))
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None
    return per_batch, dtype


def build(name, args):
    """Returns the metric and the metrics to update. They are different if the metric is derived from others."""
    if name in OF_CONFUSION_MATRIX:
        matrix = metrics.ConfusionMatrix(num_classes=args["num_classes"])
        return getattr(metrics.confusion_matrix, name)(matrix, **without(args, "num_classes")), [matrix]
    if name == "Fbeta":
        precision, recall = metrics.Precision(average=False), metrics.Recall(average=False)
        return metrics.Fbeta(**args, precision=precision, recall=recall), [precision, recall]
    if name == "MetricsLambda":
        precision, recall = metrics.Precision(average=False), metrics.Recall(average=False)
        return evaluate(args["expr"], {"P": precision, "R": recall}), [precision, recall]
    if name == "Loss":
        result = metrics.Loss(LOSS_FUNCTIONS[args["loss_fn"]])
    elif name.startswith("regression."):
        result = getattr(regression, name.removeprefix("regression."))(**args)
    else:
        result = getattr(metrics, name)(**args)
    return result, [result]


def evaluate(text, names):
    """Returns the value of an arithmetic expression; raises Unsupported if the text is anything else."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        unknown = isinstance(node, ast.Name) and node.id not in names
        if unknown or not isinstance(node, EXPRESSION_PARTS):
            raise Unsupported(f"expression {text}")
    return eval(compile(tree, text, "eval"), {"__builtins__": {}}, names)


def output_of(batch, config):
    """Returns a batch in the form that the metric takes: a pair of tensors, or the value to average."""
    if "x" in batch:
        if config["y_pred_dtype"] == "number":
            return batch["x"]
        return torch.tensor(batch["x"], dtype=torch.float64)
    y_pred = torch.tensor(batch["y_pred"], dtype=getattr(torch, config["y_pred_dtype"]))
    y = torch.tensor(batch["y"], dtype=getattr(torch, config["y_dtype"]))
    return y_pred, y


def with_usage(config):
    usage = config["usage"]
    if isinstance(usage, dict):
        usage = metrics.metric.BatchFiltered(**usage["batch_filtered"])
    outputs = [(torch.tensor(batch["y_pred"]), torch.tensor(batch["y"])) for batch in config["batches"]]
    trainer = engine_with_outputs(outputs)
    getattr(metrics, config["metric"])().attach(trainer, "metric", usage)
    return metric_values(trainer, "metric", config)
