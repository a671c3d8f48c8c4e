"""Checks the golden files against pytorch-ignite, or writes them anew.

    python -m venv golden-venv
    golden-venv/bin/pip install torch==2.13.0 pytorch-ignite==0.5.5 numpy
    golden-venv/bin/pip install scikit-learn scipy tqdm tensorboardX  # optional, see below
    golden-venv/bin/pip install lion-pytorch==0.2.5 schedulefree==1.4.1  # optional, too
    golden-venv/bin/python regenerate.py              # check all files beside this script
    golden-venv/bin/python regenerate.py train.jsonl  # check one
    golden-venv/bin/python regenerate.py --write      # replace what differs

Every case's `config` is run through the real pytorch-ignite (float64, CPU, one thread), which gives a new `expect`.
Cases that differ from the stored one are listed with what differed; then come the counts of each file and of all.
The exit status is 1 if a case failed. README.md defines the format and the tolerances.
Cases whose metric or handler needs an optional package are skipped without it.

`--write` leaves the line of a case that agrees (or is skipped) as it is, byte for byte, and rewrites the others.
"""

import argparse
import collections
import json
import logging
import sys
import traceback
import warnings
from pathlib import Path

import ignite
import torch

from from_ignite.compare import differences
from from_ignite.engine import engine_trace
from from_ignite.errors import schedule_error
from from_ignite.handler import handler
from from_ignite.lr_finder import lr_finder
from from_ignite.metric import metric
from from_ignite.optimizer import optimizer
from from_ignite.schedule import schedule, schedule_resume
from from_ignite.train import train
from from_ignite.values import Unsupported, decode

KINDS = {
    "schedule": schedule,
    "schedule_resume": schedule_resume,
    "engine_trace": engine_trace,
    "train": train,
    "schedule_error": schedule_error,
    "lr_finder": lr_finder,
    "handler": handler,
    "metric": metric,
    "optimizer": optimizer,
}

SHOWN_DIFFERENCES = 3


def main():
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.disable()
    print(f"pytorch-ignite {ignite.__version__}, torch {torch.__version__}")
    total = Counts()
    for path in options.files or sorted(Path(__file__).parent.glob("*.jsonl")):
        counts = check_file(path, options.write)
        print(f"{path.name}: {counts}")
        total.add(counts)
    print(f"total: {total}")
    for reason, number in sorted(total.skip_reasons.items()):
        print(f"  skipped {number}: {reason}")
    return 1 if total.failed else 0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: every .jsonl beside this script")
    parser.add_argument("--write", action="store_true", help="replace the expect of the cases that differ")
    return parser.parse_args()


class Counts:
    def __init__(self):
        self.passed = 0
        self.failed = 0
        self.skip_reasons = collections.Counter()

    def add(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skip_reasons += other.skip_reasons

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skip_reasons.total()} skipped"


def check_file(path, write):
    counts = Counts()
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        case = json.loads(line)
        try:
            computed = compute(case)
            found = list(differences(case, computed))
        except Unsupported as reason:
            counts.skip_reasons[f"{case['kind']}: {reason}"] += 1
        except ModuleNotFoundError as error:
            counts.skip_reasons[f"{case['kind']}: {first_line(error)}"] += 1
        except Exception:
            counts.failed += 1
            print(f"{case['id']}: could not be run\n{traceback.format_exc()}")
        else:
            if found:
                counts.failed += 1
                report(case["id"], found)
                line = compact_json({**case, "expect": in_order_of(case["expect"], computed)}) + "\n"
            else:
                counts.passed += 1
        lines.append(line)
    if write:
        path.write_text("".join(lines), encoding="utf-8")
    return counts


def first_line(error):
    return str(error).splitlines()[0].rstrip(": ")


def compute(case):
    if case["kind"] not in KINDS:
        raise Unsupported("kind not supported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[case["kind"]](decode(case["config"]))


def report(identifier, found):
    print(f"{identifier}: {len(found)} differences")
    for difference in found[:SHOWN_DIFFERENCES]:
        print(f"  {difference}")
    if len(found) > SHOWN_DIFFERENCES:
        print("  ...")


def in_order_of(stored, computed):
    """Returns the computed value with the keys of its objects in the stored order, new ones last."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        keys = [key for key in stored if key in computed] + [key for key in computed if key not in stored]
        return {key: in_order_of(stored.get(key), computed[key]) for key in keys}
    if isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        return [in_order_of(old, new) for old, new in zip(stored, computed, strict=True)]
    return computed


def compact_json(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
