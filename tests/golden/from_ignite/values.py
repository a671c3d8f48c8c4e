"""Turns Python objects into plain JSON values, and back."""

import math
import re
from collections.abc import Mapping

import torch

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# The language-neutral head of a message ends here, because the rest quotes the argument as Python prints
# it.
MATCH_END = re.compile(r", but given|, got | in provided state_dict|\(filter=|\. Input state_dict")

LONGEST_MULTI_LINE_MESSAGE = 80


class Unsupported(Exception):
    """Raised for a case that these scripts cannot run; the message is the reason."""


def decode(value):
    """Undoes the JSON form of non-finite floats."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    return value


def plain(value):
    """Returns the JSON form of a value: lists for tuples and tensors, strings for keys and non-finite floats."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return plain_float(value)
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"no JSON form for {type(value)}")


def plain_float(value):
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def plain_error(error):
    """Returns the error object of the golden format."""
    message = re.sub(r"0x[0-9a-f]+", "0x0", str(error))
    if "\n" in message:
        message = message[:LONGEST_MULTI_LINE_MESSAGE] + " ..."
    match = MATCH_END.split(message, maxsplit=1)[0]
    return {"type": type(error).__name__, "message": message, "match": match}
