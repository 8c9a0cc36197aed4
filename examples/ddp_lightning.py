"""The same hook under Lightning, whose DDPStrategy registers it; on GPUs alone, so that on the CPU the module does.

torchrun --nproc-per-node 2 examples/ddp_lightning.py
"""

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

from hvd_qgenx.ddp import QGenXState, qgenx_hook

state = QGenXState(bits=4)


class Sums(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))

    def on_train_start(self):
        if self.device.type == "cpu":
            self.trainer.strategy.model.register_comm_hook(state, qgenx_hook)

    def training_step(self, batch, index):
        return (self.network(batch[0]) - batch[0].sum(dim=1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    strategy = DDPStrategy(ddp_comm_state=state, ddp_comm_hook=qgenx_hook, process_group_backend="gloo")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6400, 32)), batch_size=64)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **quiet)
    trainer.fit(Sums(), data)
    if trainer.is_global_zero:
        print(state.communication)
