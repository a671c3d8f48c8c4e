"""Measures the same as data_loading.rs with PyTorch's DataLoader: OMP_NUM_THREADS=1 python benches/data_loading.py"""

import time

import torch
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, ROUNDS = 60_000, 3
MEAN, STD = 0.2860, 0.3530


class Whole(torch.utils.data.Dataset):
    """Gathers a whole batch with one call, which is the fastest way that DataLoader offers."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return (self.images[indices].float() / 255 - MEAN) / STD, self.labels[indices]


def main():
    images = torch.randint(256, (SAMPLES, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (SAMPLES,))
    floats = TensorDataset((images.float() / 255 - MEAN) / STD, labels)
    print(f"ns a sample, best of {ROUNDS} passes; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for size in (64, 256):
        whole = dict(dataset=Whole(images, labels), collate_fn=lambda batch: batch)
        for name, arguments in (
            ("DataLoader, bytes normalised by batch, 0 workers", whole),
            ("DataLoader, TensorDataset of floats, 0 workers", dict(dataset=floats)),
            ("DataLoader, TensorDataset of floats, 2 workers", dict(dataset=floats, num_workers=2)),
        ):
            best = float("inf")
            for _ in range(ROUNDS):
                start = time.perf_counter()
                count = sum(len(y) for _, y in DataLoader(batch_size=size, shuffle=True, **arguments))
                best = min(best, (time.perf_counter() - start) / count)
            print(f"{best * 1e9:8.0f}  batch {size}: {name}", flush=True)


if __name__ == "__main__":
    main()
