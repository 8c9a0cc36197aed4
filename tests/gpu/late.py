"""Devices without kernels, whose memory is the CPU's."""

import torch

from hvd_qgenx.backends.cuda.device import Device


class Late(Device):
    """Memory of the CPU, where a copy is made when it is waited for, as late as a device may make it."""

    name = "late"

    def __init__(self):
        self.log, self.left = [], []

    def launch(self, *arguments):
        raise AssertionError("there are no kernels")

    def pinned(self, num_bytes):
        self.log.append(("pinned", num_bytes))
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def copy_aside(self, pairs, where):
        number = len([entry for entry in self.log if entry[0] == "start"])
        self.log.append(("start", number))
        self.left.append((number, pairs))

        def wait():
            # In the order in which they were started, as on a stream.
            while self.left and self.left[0][0] <= number:
                for target, source in self.left.pop(0)[1]:
                    target.copy_(source)
            self.log.append(("done", number))

        return wait

    def wait(self, where):
        raise AssertionError("all is waited for by its own event")


class Prompt(Late):
    """The same, but a copy is made at once: for who reads means without an event of his own."""

    name = "prompt"

    def copy_aside(self, pairs, where):
        wait = super().copy_aside(pairs, where)
        wait()
        return lambda: None
