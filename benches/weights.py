"""Measures as weights.rs does, with torch.load: python benches/weights.py --file FILE --way mmap"""

import argparse
import json
import os
import time

import torch


def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith(key))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", required=True)
    parser.add_argument("--way", choices=("load", "load into model", "mmap into model"), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    names = [f"layer{layer}" for layer in range(64)]
    model = None
    if "model" in arguments.way:
        layers = {name: torch.nn.Linear(2048, 2048, bias=False, device="meta") for name in names}
        model = torch.nn.ModuleDict(layers).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1)
    with open(arguments.file, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, begin = memory("VmRSS:"), time.perf_counter()
    state = torch.load(arguments.file, weights_only=True, mmap="mmap" in arguments.way)
    if model:
        model.load_state_dict(state)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": round(seconds, 4), "added_mb": round(memory("VmHWM:") - before, 1)}))


if __name__ == "__main__":
    main()
