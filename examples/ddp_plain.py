"""DistributedDataParallel with coded gradients.

torchrun --nproc-per-node 2 examples/ddp_plain.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hvd_qgenx


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    network = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    model = DistributedDataParallel(network)  # rank 0's parameters become those of all ranks
    state = hvd_qgenx.ddp.QGenXState(bits=4)
    model.register_comm_hook(state, hvd_qgenx.ddp.qgenx_hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for step in range(100):
        x = torch.randn(64, 32)  # of this rank alone
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    if dist.get_rank() == 0:
        print(state.communication)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
