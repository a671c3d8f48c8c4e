"""Runs the cases of kind `lr_finder`: FastaiLRFinder on given losses, and its suggestion for given histories."""

import torch
from ignite.engine import Engine
from ignite.handlers import FastaiLRFinder

from .engine import STATE_ATTRIBUTES
from .specs import build_optimizer
from .values import plain, plain_error


def lr_finder(config):
    return plain(suggestion(config) if config["mode"] == "suggestion" else finder_run(config))


def suggestion(config):
    finder = FastaiLRFinder()
    finder._history = config["history"]
    try:
        suggested = finder.lr_suggestion()
    except RuntimeError as error:
        return {"error": plain_error(error)}
    return {
        "suggestion": suggested,
        "index": config["history"]["lr"].index(suggested),
        "index_f64": steepest_descent(torch.tensor(config["history"]["loss"], dtype=torch.float64)),
    }


def steepest_descent(losses):
    """The index that ignite suggests, without its rounding of the losses to float32."""
    falling = losses[: int(torch.argmin(losses)) + 1]
    gradients = 0.5 * (falling[2:] - falling[:-2])
    return int(torch.argmin(gradients)) + 1


def finder_run(config):
    optimizer = build_optimizer(config["optimizer"])
    lr_seen = []

    def step(engine, batch):
        lr_seen.append(group_lrs(optimizer))
        return config["losses"][len(lr_seen) - 1]

    trainer = Engine(step)
    finder = FastaiLRFinder()
    arguments = {
        name: config[name] for name in ("num_iter", "step_mode", "smooth_f", "diverge_th", "start_lr", "end_lr")
    }
    with finder.attach(trainer, to_save={"optimizer": optimizer}, **arguments) as finding:
        finding.run(range(config["epoch_length"]), max_epochs=config["max_epochs"])

    expect = {
        "iterations_run": len(lr_seen),
        "lr_seen_by_step": lr_seen,
        "history": finder.get_results(),
        "diverged": finder._diverge_flag,
        "optimizer_lr_after": group_lrs(optimizer),
        "trainer_state_after": {name: getattr(trainer.state, name) for name in STATE_ATTRIBUTES},
    }
    try:
        expect["suggestion"] = finder.lr_suggestion()
        finder.apply_suggested_lr(optimizer)
        expect["optimizer_lr_applied"] = group_lrs(optimizer)
    except RuntimeError as error:
        expect["suggestion_error"] = plain_error(error)
    return expect


def group_lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]
