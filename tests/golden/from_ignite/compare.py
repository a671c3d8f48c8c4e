"""Compares a stored `expect` with a computed one, within the README's tolerances."""

import math

ERROR_KEYS = {"type", "message", "match"}
EXACT_HANDLERS = ("Checkpoint", "EarlyStopping", "ModelCheckpoint")
ROUNDED = "value_f32_accumulator"


def exact(stored, computed):
    return stored == computed


def within(relative, floor=0.0):
    """Returns a test whether floats are close: relative to the stored value, but never stricter than the floor."""
    return lambda stored, computed: math.isclose(stored, computed, rel_tol=relative, abs_tol=floor)


def tolerance(case):
    """Returns the test for the floats of a case, `value_f32_accumulator` excepted."""
    kind = case["kind"]
    if kind == "train":
        return within(1e-9, floor=1e-11)
    if kind == "metric" and case["expect"].get("dtype") == "float32":
        return within(1e-6)
    if kind == "optimizer":
        if case["config"]["type"] == "LBFGS":
            return within(1e-9)
        single = case["config"]["dtype"] == "float32"
        return within(1e-6, floor=1e-7) if single else within(1e-12, floor=1e-14)
    if kind == "handler" and case["config"]["handler"] in EXACT_HANDLERS:
        return exact
    if kind in ("handler", "lr_finder", "metric"):
        return within(1e-12)
    return exact


def differences(case, computed):
    """Yields one line per place where the stored and the computed `expect` differ."""
    stored = dict(case["expect"])
    computed = dict(computed)
    if ROUNDED in stored and ROUNDED in computed:
        yield from compare(stored.pop(ROUNDED), computed.pop(ROUNDED), within(1e-6), f"expect.{ROUNDED}")
    yield from compare(stored, computed, tolerance(case), "expect")


def compare(stored, computed, close, path):
    if isinstance(stored, dict) and isinstance(computed, dict):
        yield from compare_objects(stored, computed, close, path)
    elif isinstance(stored, list) and isinstance(computed, list):
        if len(stored) != len(computed):
            yield f"{path}: stored {len(stored)} entries, computed {len(computed)}"
        for index, (old, new) in enumerate(zip(stored, computed, strict=False)):
            yield from compare(old, new, close, f"{path}[{index}]")
    elif not same_value(stored, computed, close):
        yield f"{path}: stored {stored!r}, computed {computed!r}"


def compare_objects(stored, computed, close, path):
    is_error = stored.keys() >= ERROR_KEYS
    for key, value in stored.items():
        if key not in computed:
            yield f"{path}.{key}: missing in the computed"
        elif is_error and key == "message":
            continue  # Python's own text, which the README says not to test
        else:
            yield from compare(value, computed[key], close, f"{path}.{key}")
    for key in computed:
        if key not in stored:
            yield f"{path}.{key}: missing in the stored"


def same_value(stored, computed, close):
    if is_number(stored) and is_number(computed):
        return close(stored, computed)
    return type(stored) is type(computed) and stored == computed


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
