"""The same hook under Hugging Face Accelerate.

torchrun --nproc-per-node 2 examples/ddp_accelerate.py

Its DistributedDataParallelKwargs(comm_hook=...) takes torch's own hooks alone, by name. What prepare() returns is a
DistributedDataParallel like any other, though, and takes this one.
"""

import torch
from accelerate import Accelerator

import hvd_qgenx


def main():
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6400, 32)), batch_size=64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    model, optimizer, data = accelerator.prepare(network, optimizer, data)
    state = hvd_qgenx.ddp.QGenXState(bits=4)
    model.register_comm_hook(state, hvd_qgenx.ddp.qgenx_hook)

    for (x,) in data:
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

    accelerator.print(f"loss {loss.item():.3f}")
    accelerator.print(state.communication)
    accelerator.end_training()


if __name__ == "__main__":
    main()
