"""The ResNet generator and critic for 32 x 32 colour images, and the losses that the two players minimise.

Source: the ResNet of Gidel et al., "A Variational Inequality Perspective on GANs" (ICLR 2019), which the Q-GenX
experiment took over with LayerNorm in place of BatchNorm. Counted at width 128 and latent size 128: the generator has
1,548,547 parameters and the critic 1,053,825, as there. One thing is different: where that network changes the size of
its pictures by strides that see one pixel of four, this one repeats or averages pixels (as Gulrajani et al., 2017, do).
The counts stay the same, and the generator no longer has to unlearn a checkerboard.
"""

import torch
from torch import Tensor, nn


class LayerNorm(nn.GroupNorm):
    """y = gain[c] (x - mean) / std + bias[c], with one mean and one std per image over channels, height and width.

    The form that WGAN-GP uses for convolutions: gain and bias are per channel, so there are as many parameters as in
    BatchNorm, but no image sees another one: the gradient penalty, a norm per image, stays well defined.
    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), section 6.7 for convolutions.
    """

    def __init__(self, channels: int):
        super().__init__(1, channels)


def convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class UpBlock(nn.Module):
    """(batch, width, n, n) -> (batch, width, 2n, 2n): shortcut(x) + conv(relu(norm(upconv(relu(norm(x)))))).

    The shortcut repeats each pixel four times after its 1 x 1 convolution. A transposed 1 x 1 convolution of stride 2,
    of equally many parameters, would leave three of four pixels empty and start from a checkerboard.
    """

    def __init__(self, width: int):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.Upsample(scale_factor=2))
        self.block = nn.Sequential(
            LayerNorm(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            LayerNorm(width),
            nn.ReLU(),
            convolution(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class CriticBlock(nn.Module):
    """(batch, width, n, n) -> the same, or means of 2 x 2 pixels with `down`. The critic has no norm layers."""

    def __init__(self, width: int, down: bool = False):
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, width, 1)) if down else nn.Identity()
        self.block = nn.Sequential(
            nn.ReLU(),
            convolution(width, width),
            nn.ReLU(),
            convolution(width, width),
            nn.AvgPool2d(2) if down else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class Generator(nn.Module):
    """z: (batch, latent) -> images: (batch, 3, 32, 32) in [-1, 1]."""

    def __init__(self, width: int = 128, latent: int = 128):
        super().__init__()
        self.width = width
        self.latent = latent
        self.input = nn.Linear(latent, 4 * 4 * width)
        self.network = nn.Sequential(
            UpBlock(width),
            UpBlock(width),
            UpBlock(width),
            LayerNorm(width),
            nn.ReLU(),
            convolution(width, 3),
            nn.Tanh(),
        )
        initialise(self, width)

    def forward(self, noise: Tensor) -> Tensor:
        return self.network(self.input(noise).view(-1, self.width, 4, 4))


class Critic(nn.Module):
    """images: (batch, 3, 32, 32) -> one real number per image: (batch,)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, width, 1))
        self.block = nn.Sequential(convolution(3, width), nn.ReLU(), convolution(width, width), nn.AvgPool2d(2))
        self.network = nn.Sequential(CriticBlock(width, down=True), CriticBlock(width), CriticBlock(width), nn.ReLU())
        self.output = nn.Linear(width, 1)
        initialise(self, width)

    def forward(self, images: Tensor) -> Tensor:
        features = self.network(self.shortcut(images) + self.block(images))
        return self.output(features.mean(dim=(2, 3))).squeeze(1)


def initialise(model: nn.Module, width: int) -> None:
    """Weights N(0, std^2) with std = 0.02 sqrt(128 / width), biases 0, gains 1.

    At width 128 this is the experiment's N(0, 0.02). A sum over fewer channels would come out smaller with the same
    std, so narrower networks get a larger one: the signal then has the same size in every layer at any width.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02 * (128 / width) ** 0.5)
            nn.init.zeros_(layer.bias)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mixing: Tensor) -> Tensor:
    """mean over images of (||grad_x critic(x)||_2 - 1)^2 at x = mixing * real + (1 - mixing) * fake.

    real, fake: (batch, 3, height, width); mixing: (batch, 1, 1, 1), uniform on [0, 1]. Differentiable in the critic's
    parameters. Source: Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), equation 3.
    """
    between = torch.lerp(fake.detach(), real, mixing).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, mixing: Tensor, penalty: float, drift: float = 0.0
) -> Tensor:
    """E critic(fake) - E critic(real) + penalty * gradient_penalty + drift * E critic(real)^2.

    No gradient flows into the generator. The first terms leave the critic's offset free, and it wanders off; a small
    drift keeps it near 0. Source of the last term: Karras et al., "Progressive Growing of GANs" (2018), appendix A.1.
    """
    values = critic(real)
    loss = critic(fake.detach()).mean() - values.mean() + penalty * gradient_penalty(critic, real, fake, mixing)
    return loss + drift * values.square().mean() if drift else loss


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """-E critic(fake): the generator moves its images to where the critic is high."""
    return -critic(fake).mean()


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
