"""Writes transforms.json: what torchvision makes of two pictures. Needs torchvision and torch 2.13.

    python3 tests/golden/transforms.py > tests/golden/transforms.json
"""

import json

import torch
import torchvision.transforms.v2.functional as F

SHAPE = (3, 6, 8)


def picture(kind):
    index = torch.arange(3 * 6 * 8)
    values = ((index * index * 7 + index * 13 + 5) % 256).to(torch.uint8).reshape(SHAPE)
    return values if kind == "uint8" else values.float() / 255


def cases():
    for size in [[4, 5], [12, 8], [4, 8], [6, 20]]:
        yield "resize", size, lambda x, size=size: F.resize(x, size, antialias=True)
    for length in [4, 13]:
        yield "resize_shorter_edge", [length], lambda x, length=length: F.resize(x, [length], antialias=True)
    for size in [[4, 4], [6, 8], [5, 3], [9, 5], [10, 11], [3, 5]]:
        yield "center_crop", size, lambda x, size=size: F.center_crop(x, size)
    for border in [[1, 2, 3, 4], [0, 0, 2, 0]]:
        yield "pad", border, lambda x, border=border: F.pad(x, border)
    yield "crop", [2, 3, 4, 5], lambda x: F.crop(x, 2, 3, 4, 5)
    yield "horizontal_flip", [], F.horizontal_flip
    for name in ["brightness", "contrast", "saturation"]:
        for factor in [0.0, 0.4, 1.0, 1.7]:
            change = getattr(F, "adjust_" + name)
            yield "adjust_" + name, [factor], lambda x, change=change, factor=factor: change(x, factor)
    for factor in [-0.5, -0.13, 0.0, 0.1, 0.37]:
        yield "adjust_hue", [factor], lambda x, factor=factor: F.adjust_hue(x, factor)


def main():
    lines = []
    for kind in ["uint8", "float32"]:
        for name, arguments, change in cases():
            out = change(picture(kind))
            values = [float(f"{v:.9g}") if kind == "float32" else v for v in out.flatten().tolist()]
            case = {"kind": kind, "name": name, "arguments": arguments, "shape": list(out.shape), "values": values}
            lines.append(json.dumps(case, separators=(",", ":")))
    print("[\n" + ",\n".join(lines) + "\n]")


main()
