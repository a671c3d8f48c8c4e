"""Runs the cases of kind `engine_trace`, which record what an engine does, in order."""

import itertools
import warnings

from ignite.engine import Engine, EventEnum
from ignite.engine.events import State

from .specs import build_event
from .values import plain, plain_error

EXCEPTIONS = {kind.__name__: kind for kind in (RuntimeError, StopIteration, ValueError)}
STATE_ATTRIBUTES = ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters")


def engine_trace(config):
    # Registered events enter a table that all engines share; no case may see those of another.
    shared_attributes = dict(State.event_to_attr)
    try:
        return plain(TracedCase(config).expect())
    finally:
        State.event_to_attr.clear()
        State.event_to_attr.update(shared_attributes)


class TracedEngine(Engine):
    """Logs the start of every event, whether it has handlers or not."""

    def __init__(self, process_function):
        self.trace = []
        self.custom_names = {}
        super().__init__(process_function)

    def log(self, what, label, *more):
        self.trace.append([what, label, self.state.epoch, self.state.iteration, *more])

    def _fire_event(self, event_name, *event_args, **event_kwargs):
        self.log("event", self.custom_names.get(event_name, event_name.name))
        super()._fire_event(event_name, *event_args, **event_kwargs)


class TracedCase:
    def __init__(self, config):
        self.config = config
        self.process = config.get("process", {})
        self.handles = {}
        self.engine = TracedEngine(self.process_function)
        self.custom_events = self.register_custom_events()
        for handler in config["handlers"]:
            self.add_handler(handler)

    def register_custom_events(self):
        specs = self.config.get("custom_events", [])
        if not specs:
            return {}
        members = EventEnum("CustomEvents", {spec["name"].upper(): spec["name"] for spec in specs})
        events = {event.value: event for event in members}
        attributes = {events[spec["name"]]: spec["attr"] for spec in specs if spec["attr"] is not None}
        self.engine.register_events(*events.values(), event_to_attr=attributes)
        self.engine.custom_names = {event: name for name, event in events.items()}
        return events

    def expect(self):
        steps = []
        for index, step in enumerate(self.config["steps"]):
            if len(self.config["steps"]) > 1:
                self.engine.log("step", index)
            steps.append(self.run_step(step))
        return {"trace": self.engine.trace, "steps": steps}

    def run_step(self, step):
        result = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state = self.perform(step)
                if step["op"] == "run":
                    result["returned"] = "none" if state is None else "state"
            except Exception as error:
                result["error"] = plain_error(error)
        if caught:
            result["warnings"] = [str(warning.message) for warning in caught]

        attributes = list(STATE_ATTRIBUTES)
        attributes += [spec["attr"] for spec in self.config.get("custom_events", []) if spec["attr"] is not None]
        result["state"] = {name: getattr(self.engine.state, name) for name in attributes}
        result["state_dict"] = self.engine.state_dict()
        return result

    def perform(self, step):
        if step["op"] == "run":
            limits = {key: step[key] for key in ("max_epochs", "max_iters", "epoch_length") if key in step}
            return self.engine.run(build_data(step["data"]), **limits)
        if step["op"] == "load_state_dict":
            return self.engine.load_state_dict(step["state_dict"])
        if step["op"] == "set_state":
            return setattr(self.engine.state, step["attr"], step["value"])
        raise ValueError(f"unknown step {step['op']}")

    def process_function(self, engine, batch):
        engine.log("process", batch)
        for spec in self.config.get("custom_events", []):
            if spec["attr"] is not None:
                setattr(engine.state, spec["attr"], getattr(engine.state, spec["attr"]) + 1)
            engine.fire_event(self.custom_events[spec["name"]])
        if self.process.get("raise_at_iteration") == engine.state.iteration:
            raise EXCEPTIONS[self.process["exception"]](f"boom at {engine.state.iteration}")

    def add_handler(self, spec):
        action = spec.get("action")
        calls = 0

        def handler(engine, *event_args, **event_kwargs):
            nonlocal calls
            exception = event_args[0] if spec.get("on_exception") else None
            text = [] if exception is None else [f"{type(exception).__name__}: {exception}"]
            engine.log("handler", spec["tag"], *text)
            if action is not None and self.passes_guards(action, calls):
                calls += 1
                self.act(action, exception)

        event = build_event(spec["event"], self.custom_events)
        self.engine.add_event_handler(event, handler)
        self.handles[spec["tag"]] = (handler, event)

    def passes_guards(self, action, calls):
        state = self.engine.state
        return (
            calls < action.get("max_calls", calls + 1)
            and state.iteration == action.get("at_iteration", state.iteration)
            and state.epoch == action.get("at_epoch", state.epoch)
        )

    def act(self, action, exception):
        engine = self.engine
        kind = action["type"]
        if kind == "terminate":
            engine.terminate(skip_completed=action.get("skip_completed", False))
        elif kind == "terminate_epoch":
            engine.terminate_epoch(skip_epoch_completed=action.get("skip_epoch_completed", False))
        elif kind == "interrupt":
            engine.interrupt()
        elif kind == "raise":
            raise EXCEPTIONS[action["exception"]](action["message"])
        elif kind == "reraise":
            raise exception
        elif kind == "set_data":
            engine.set_data(build_data(action["data"]))
        elif kind == "add_handler":
            self.add_handler(action["handler"])
        elif kind == "remove":
            engine.remove_event_handler(*self.handles[action["tag"]])
        elif kind == "set_state":
            setattr(engine.state, action["attr"], action["value"])
        else:
            raise ValueError(f"unknown action {kind}")


class Restartable:
    """Data without a length that starts again at each `iter`."""

    def __init__(self, start_iteration):
        self.start_iteration = start_iteration

    def __iter__(self):
        return self.start_iteration()


def build_data(spec):
    kind = spec["type"]
    if kind == "list":
        offset = spec.get("offset", 0)
        return list(range(offset, offset + spec["len"]))
    if kind == "restartable":
        return Restartable(lambda: iter(range(spec["len"])))
    if kind == "one_shot":
        return iter(range(spec["len"]))
    if kind == "infinite":
        return Restartable(itertools.count)
    if kind == "none":
        return None
    raise ValueError(f"unknown data {kind}")
