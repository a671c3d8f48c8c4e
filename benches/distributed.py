"""Measures the same as benches/distributed.rs with torch's own DistributedDataParallel. Each process is one rank."""

import os
import statistics
import time

import torch
import torch.distributed as dist

REPEATS, STEPS, LAYERS, WIDTH, BATCH = 30, 20, 8, 1024, 32


def median_ms(repeats, call):
    times = []
    for index in range(repeats + 5):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if index >= 5:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main():
    torch.set_num_threads(1)
    port, rank = int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    fd = os.environ.get("TCH_IGNITE_LISTEN_FD")
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, **({"master_listen_fd": int(fd)} if fd else {}))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tensor = torch.ones(2_500_000)
    all_reduce = median_ms(REPEATS, lambda: dist.all_reduce(tensor, op=dist.ReduceOp.AVG))

    torch.manual_seed(1)
    layers = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers)
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.ones(BATCH, WIDTH), torch.ones(BATCH, WIDTH)

    def step():
        loss = torch.nn.functional.mse_loss(ddp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"\nMEASURED {all_reduce} {median_ms(STEPS, step)}", flush=True)
    dist.destroy_process_group()


main()
