"""Runs the parts of examples/gpu_check in PyTorch's process, and PyTorch's own speeds; see scripts/gpu-check.sh --help.

usage: gpu_check.py LIBRARY [--cpu] [--out FILE]

Each part is a process of its own with a time limit. Prints a line for each, writes a page of Markdown, and ends with 1 where
a part differs, takes too long, or is left out because the time for all of them is over.
"""

import argparse
import ctypes
import datetime
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ITERATIONS = 100
SECONDS = 240  # for all parts, on a GPU
WAITS = {
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize",
}  # fmt: skip


def loaded(path):
    """Our library, which takes libtorch from the PyTorch of this process."""
    import torch  # noqa: F401

    library = ctypes.CDLL(os.path.abspath(path))
    library.gpu_check_run.argtypes = [ctypes.c_size_t, ctypes.c_bool]
    library.gpu_check_train.argtypes = [ctypes.c_uint64, ctypes.c_bool, ctypes.c_bool]
    return library


def waits(library, cuda):
    """Counts with PyTorch's profiler what waits for the device in 100 iterations: those that 200 have more than 100.

    On the CPU it counts the operations that would wait. Clipping, the GradScaler and TerminateOnNan read CPU tensors, which
    costs nothing, so a dry run only looks that it sees the reads of the program."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    names = WAITS if cuda else {"aten::_local_scalar_dense", "aten::nonzero"}

    def counted(iterations, read):
        with profile(activities=[activity]) as seen:
            if library.gpu_check_train(iterations, read, cuda):
                sys.exit(1)
        return sum(event.name in names for event in seen.events())

    library.gpu_check_train(ITERATIONS, False, cuda)
    # The profiler may lose an event where it begins or ends. A dry run only looks that it sees the reads, so it tries again.
    for _ in range(1 if cuda else 3):
        none, read = (counted(2 * ITERATIONS, read) - counted(ITERATIONS, read) for read in (False, True))
        good = read - none >= ITERATIONS and not (cuda and none != 0)
        if good:
            break
    print(f"{none} in {ITERATIONS} iterations, {read} where each reads its loss")
    sys.exit(int(not good))


def child(arguments):
    os.chdir(ROOT)
    library, cuda = loaded(arguments.library), not arguments.cpu
    if arguments.part == "list":
        library.gpu_check_parts()
    elif arguments.part == "waits":
        waits(library, cuda)
    else:
        sys.exit(library.gpu_check_run(int(arguments.part), cuda))


def limited(command, seconds):
    """The lines that the command printed, whether it succeeded, and how long it took."""
    start = time.monotonic()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
        lines, good = ran.stdout.splitlines(), ran.returncode == 0
        if not good:
            lines += ran.stderr.splitlines()[-3:] + [f"exit status {ran.returncode}"] * (not lines)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        lines, good = printed.decode().splitlines() + [f"no end after {seconds:.0f} s"], False
    return lines, good, time.monotonic() - start


def check(arguments):
    import torch

    own = [sys.executable, __file__, arguments.library] + ["--cpu"] * arguments.cpu + ["--part"]
    # For the part that makes a process group.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    listed, good, _ = limited(own + ["list"], 60)
    if not good:
        sys.exit("gpu_check.py: the library cannot be loaded:\n" + "\n".join(listed))
    parts = [(name, own + [str(number)], int(seconds)) for number, (name, seconds) in enumerate(line.split("\t") for line in listed)]
    parts.append(("waits for the device, by PyTorch's profiler", own + ["waits"], 30))
    bench = [sys.executable, "benches/gpu.py"] + ["--cpu"] * arguments.cpu
    parts.append(("speed of PyTorch", bench, 100))

    rows, speeds, failed, left_out = [], {}, 0, 0
    begun = time.monotonic()
    for name, command, seconds in parts:
        # A CPU is slower, and is not what is measured.
        limit = 8 * seconds if arguments.cpu else min(seconds, SECONDS - (time.monotonic() - begun))
        lines, good, took = limited(command, limit) if limit >= 1 else (["not begun"], False, 0.0)
        for line in [line for line in lines if line.startswith("speed\t")]:
            _, what, way, value = line.split("\t")
            speeds.setdefault(what, {})[way] = float(value)
        lines = [line for line in lines if not line.startswith("speed\t")] or ["measured"]
        # PyTorch's compiler may be absent or slow, which is no fault of ours; without it there are speeds to compare with.
        if command is bench:
            good = len(speeds) > 0 and all("eager" in ways for ways in speeds.values())
        # Nor is it a fault of a part that those before it took the time.
        out = not good and limit < seconds and (limit < 1 or took >= limit)
        failed += not good and not out
        left_out += out
        for line in [] if good else lines[:-1]:
            print(f"    {line}")
        text = " ".join(lines[-1].split())
        word = "ok" if good else "left out" if out else "FAILED"
        print(f"{word:8} {name}: {text} ({took:.1f} s)", flush=True)
        rows.append(f"| {name} | {'' if good else f'**{word.lower()}:** '}{text} | {took:.1f} |")

    device = "the CPU, tried only" if arguments.cpu else torch.cuda.get_device_name(0)
    ways = ["ours", "eager", "fused", "compiled"]
    page = [
        "# On a GPU",
        "",
        f"`scripts/gpu-check.sh` wrote this on {datetime.date.today()}: {device}, torch {torch.__version__}.",
        "",
        "| part | result | s |",
        "|---|---|---|",
        *rows,
        "",
        "What is done in a second, beside PyTorch on the same device in the same minutes (`benches/gpu.py`):",
        "",
        "| | " + " | ".join(["ours"] + [f"PyTorch, {way}" for way in ways[1:]]) + " |",
        "|---" * 5 + "|",
    ]
    for what, values in speeds.items():
        cells = [f"{values[way]:,.0f}" if way in values else "–" for way in ways]
        page.append(f"| {what} | " + " | ".join(cells) + " |")
    pathlib.Path(arguments.out).write_text("\n".join(page) + "\n")
    right = len(rows) - failed - left_out
    print(f"{right} parts are right, {failed} failed, {left_out} are left out; {arguments.out} has the table")
    sys.exit(int(right < len(rows)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libgpu_check.so")
    parser.add_argument("--cpu", action="store_true", help="a dry run")
    parser.add_argument("--out", default=str(ROOT / "docs" / "GPU.md"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.library, arguments.out = map(os.path.abspath, (arguments.library, arguments.out))
    (child if arguments.part else check)(arguments)


if __name__ == "__main__":
    main()
