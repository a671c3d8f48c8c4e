"""A rank of a group in Python: trains the model of tests/distributed/interop.rs with torch's own
DistributedDataParallel, and prints the bits of its parameters."""

import os
import struct
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

STEPS, LOCAL = 12, 8


class Linear(torch.nn.Module):
    """A linear layer whose bias comes first, as tch makes it, because all ranks need one order of parameters."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=torch.float64))
        self.weight = torch.nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float64))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def main():
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    fd = os.environ.get("TCH_IGNITE_LISTEN_FD")
    timeout = timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout, multi_tenant=True,
                          **({"master_listen_fd": int(fd)} if fd else {}))
    # init_process_group puts this prefix around a store that it makes itself.
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    net = torch.nn.Sequential(Linear(6, 16), torch.nn.Tanh(), Linear(16, 1))
    with torch.no_grad():  # if rank 0 is in Python, all ranks take these values
        for index, parameter in enumerate(net.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(values + index).view_as(parameter) * 0.3)
    ddp = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x = torch.sin(torch.arange(96 * 6, dtype=torch.float64) * 0.7).view(96, 6)
    y = torch.cos(torch.arange(96, dtype=torch.float64) * 0.3).view(96, 1)
    for step in range(STEPS):
        begin = (step * LOCAL * world) % 96 + rank * LOCAL
        loss = torch.nn.functional.mse_loss(ddp(x[begin:begin + LOCAL]), y[begin:begin + LOCAL])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]).tolist()
    print("\nCASE interop =", " ".join(struct.pack(">d", value).hex() for value in values))
    sys.stdout.flush()
    dist.destroy_process_group()


main()
