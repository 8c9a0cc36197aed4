"""The DCGAN generator and critic for 32 x 32 colour images: channels double where height and width halve.

Source: the DCGAN of Gidel et al., "A Variational Inequality Perspective on GANs" (ICLR 2019), at width 64 but for two
things: LayerNorm in place of BatchNorm, so that no image sees those of its own rank, and weights of He et al. (2015).
To a gradient of equal size belongs about a tenth of the ResNet's arithmetic, since its wide layers see small pictures.
"""

from models import LayerNorm
from torch import Tensor, nn

SLOPE = 0.2  # of the critic's leaky ReLU


def _up(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [LayerNorm(channels_in), nn.ReLU(), nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)]


def _down(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]


class DcganGenerator(nn.Module):
    """z: (batch, latent) -> images: (batch, 3, 32, 32) in [-1, 1]."""

    def __init__(self, width: int = 64, latent: int = 128):
        super().__init__()
        self.input = nn.Sequential(nn.Linear(latent, 16 * 8 * width), nn.Unflatten(1, (8 * width, 4, 4)))
        self.network = nn.Sequential(
            *_up(8 * width, 4 * width), *_up(4 * width, 2 * width), *_up(2 * width, 3), nn.Tanh()
        )
        initialise(self)

    def forward(self, noise: Tensor) -> Tensor:
        return self.network(self.input(noise))


class DcganCritic(nn.Module):
    """images: (batch, 3, 32, 32) -> one real number per image: (batch,)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.network = nn.Sequential(*_down(3, width), *_down(width, 2 * width), *_down(2 * width, 4 * width))
        self.output = nn.Linear(16 * 4 * width, 1)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.network(images).flatten(1)).squeeze(1)


def initialise(model: nn.Module) -> None:
    """Weights N(0, 2 / n), where n is how many inputs of the layer an output sees; biases 0, gains 1."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            if isinstance(layer, nn.ConvTranspose2d):
                inputs = layer.weight[:, 0].numel() / (layer.stride[0] * layer.stride[1])
            else:
                inputs = layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0.0, (2 / inputs) ** 0.5)
            nn.init.zeros_(layer.bias)
