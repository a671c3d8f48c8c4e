"""Makes a Markdown table of the times that `scripts/bench.sh` measured.

bench-table.py steps FILE
bench-table.py training FILE
bench-table.py compiled FILE
bench-table.py weights FILE

The table of steps has medians; how many times as fast as tch's own and as the fastest of torch's they are; and the ratio
to the least time that the memory allows: the bytes that an operation reads and writes, at the rate of an update in
place. Ratios are medians of those of single rounds, because the rate of a machine's memory changes.
"""

import json
import pathlib
import statistics
import sys

# How many bytes an operation reads and writes for each element, if it touches each of them once.
BYTES = {
    "SGD": 20, "Adam": 28, "AdamW": 28, "RMSprop": 20, "AdamW clip": 32, "Adagrad": 20, "NAdam": 28, "RAdam": 28,
    "Adamax": 28, "Adadelta": 28, "ASGD": 20, "Rprop": 28, "Lion": 20, "SGDScheduleFree": 20, "AdamWScheduleFree": 28,
    "AdEMAMix": 36, "clip": 12, "norm": 4, "EMA": 12, "zeros": 4,
}  # fmt: skip
# What the floor's update reads and writes.
FLOOR_BYTES = 1 << 29
ELEMENTS = {"ResNet-18": 11_689_512, "4 of 4M": 4 * 2048 * 2048, "GPT-2 small": 124_439_808}


def operations(rows):
    """Returns the times of all rounds by operation and contender."""
    found = {}
    for name, times in rows.items():
        operation, _, who = name.rpartition(", ")
        if name.startswith(("tch, ", "torch, ")):
            operation, who = "", name
        found.setdefault(operation, {})[who] = times
    return found


def least(group, operation):
    """Returns the least time of an operation over that of the floor's update in place; none where memory is no bound."""
    kind, _, shape = group.partition(", ")
    if shape not in ELEMENTS:
        return None
    if kind == "gradients":
        kind = {"zeros": "zeros", "clip_grad_norm, clipped": "clip"}.get(operation, "norm")
    elif operation:
        kind = f"{kind} clip"
    return BYTES[kind] * ELEMENTS[shape] / FLOOR_BYTES if kind in BYTES else None


def training(file):
    runs = {}
    for line in pathlib.Path(file).read_text().splitlines():
        line = json.loads(line)
        runs.setdefault((line["model"], line["batch"]), {}).setdefault(line["way"], []).append(line["result"])
    print("| | | samples/s | ours / this | peak MB | s to first batch | accuracy |\n|---|---|---|---|---|---|---|")
    for (model, batch), ways in runs.items():
        found = {way: {key: statistics.median(r[key] for r in results) for key in results[0]} for way, results in ways.items()}
        for way, median in found.items():
            rate = median["samples_per_second"]
            print(
                f"| {model}, batch {batch} | {way} | {rate:,.0f} | {found['ours']['samples_per_second'] / rate:.2f} "
                f"| {median['peak_mb']:,.0f} | {median['first_batch']:.2f} | {median['accuracy']:.3f} |"
            )


def compiled(file):
    runs = {}
    for line in pathlib.Path(file).read_text().splitlines():
        line = json.loads(line)
        runs.setdefault(line["model"], {}).setdefault(line["way"], []).append(line["samples_per_second"])
    names = {"compiled": "here, compiled", "eager": "here, tch's network", "torch": "PyTorch, eager"}
    print("| | | samples/s | compiled here / this |\n|---|---|---|---|")
    for model, ways in runs.items():
        ours = statistics.median(ways["compiled"])
        for way, rates in ways.items():
            rate = statistics.median(rates)
            print(f"| {model} | {names.get(way, way)} | {rate:,.0f} | {ours / rate:.2f} |")


def weights(file):
    runs = {}
    for line in pathlib.Path(file).read_text().splitlines():
        line = json.loads(line)
        runs.setdefault(line["way"], []).append(line["result"])
    found = {way: {key: statistics.median(r[key] for r in results) for key in results[0]} for way, results in runs.items()}
    names = {
        "bytes": "the bytes, into new memory", "buffer": "the bytes, into memory that is there",
        "tensors": "here, into new tensors", "store": "here, into a store",
        "load": "`torch.load`", "load into model": "`torch.load`, `load_state_dict`",
        "mmap into model": "`torch.load(mmap=True)`, `load_state_dict`",
    }  # fmt: skip
    print("| | s | / the bytes | added MB |\n|---|---|---|---|")
    for way, median in found.items():
        base = found["buffer" if way in ("buffer", "store") or "model" in way else "bytes"]
        ratio = median["seconds"] / base["seconds"]
        print(f"| {names[way]} | {median['seconds']:.3f} | {ratio:.2f} | {median['added_mb']:,.0f} |")


def steps(file):
    groups = {}
    for line in pathlib.Path(file).read_text().splitlines():
        line = json.loads(line)
        groups.setdefault(line["group"], {}).setdefault(line["name"], []).append(line["ns"])
    for shape in dict.fromkeys(group.partition(", ")[2] for group in groups):
        rates = [FLOOR_BYTES / ns for group, rows in groups.items() if group.endswith(f", {shape}") for ns in rows["floor"]]
        print(f"Memory is updated in place at {statistics.median(rates):.1f} GB/s, read and written, beside {shape}.\n")
    print("| | µs | tch's / ours | torch's best / ours | × floor |\n|---|---|---|---|---|")
    for group, rows in groups.items():
        floors = rows.pop("floor")
        for operation, whose in operations(rows).items():
            ours = whose.get("ours")
            if ours is None:
                continue

            def best(who):
                own = [times for name, times in whose.items() if name.startswith(who)]
                return min(own, key=statistics.median, default=None)

            def ratio(times, others):
                return statistics.median(one / other for one, other in zip(times, others))

            tch, torch, share = best("tch"), best("torch"), least(group, operation)
            columns = [
                f"{group}: {operation}" if operation else group,
                f"{statistics.median(ours) / 1e3:,.1f}",
                f"{ratio(tch, ours):.2f}" if tch else "",
                f"{ratio(torch, ours):.2f}" if torch else "",
                f"{ratio(ours, floors) / share:.2f}" if share else "",
            ]
            print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {"steps": steps, "training": training, "compiled": compiled, "weights": weights}[what](*arguments)
