"""train/models.py and dcgan.py: shapes, sizes, norms, and the losses against values worked out by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import models
from dcgan import DcganCritic, DcganGenerator
from networks import NETWORKS, make_critic, make_generator

sys.path.pop(0)


class LinearCritic(nn.Module):
    """critic(x) = <weight, x>: its gradient is the same vector everywhere."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [4, 24])
def test_the_generator_makes_colour_images_between_minus_one_and_one(network, width):
    images = make_generator(network, width, 5)(torch.randn(3, 5))
    assert images.shape == (3, 3, 32, 32)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [4, 24])
def test_the_critic_gives_one_number_per_image(network, width):
    assert make_critic(network, width)(torch.randn(3, 3, 32, 32)).shape == (3,)


def test_parameter_counts_at_width_128_are_those_of_the_experiment():
    assert models.count_parameters(models.Generator(128, latent=128)) == 1_548_547
    assert models.count_parameters(models.Critic(128)) == 1_053_825


def test_a_dcgan_has_the_layers_of_its_source():
    """From noise to 512 x 4 x 4, 256 x 8 x 8, 128 x 16 x 16, 3 x 32 x 32; from there by 64, 128, 256 channels to 1."""
    norms = 2 * (512 + 256 + 128)
    ups = 129 * 512 * 16 + (512 * 16 + 1) * 256 + (256 * 16 + 1) * 128 + (128 * 16 + 1) * 3
    assert models.count_parameters(DcganGenerator()) == norms + ups
    downs = (3 * 16 + 1) * 64 + (64 * 16 + 1) * 128 + (128 * 16 + 1) * 256 + 256 * 16 + 1
    assert models.count_parameters(DcganCritic()) == downs


def test_the_signal_of_a_fresh_dcgan_neither_dies_nor_explodes():
    torch.manual_seed(0)
    values = DcganCritic(32)(torch.randn(256, 3, 32, 32))
    # Of one critic the deviation over images is about 1 at any width; ten times more or less would be another start.
    assert 0.1 < values.std().item() < 10
    assert 0.1 < DcganGenerator(16)(torch.randn(64, 128)).std().item() < 0.9


@pytest.mark.parametrize(("network", "norms"), [("resnet", 7), ("dcgan", 3)])
def test_there_is_no_batchnorm_and_no_norm_at_all_in_the_critic(network, norms):
    generator, critic = make_generator(network, 8, 5), make_critic(network, 8)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in generator.modules())
    assert sum(isinstance(m, models.LayerNorm) for m in generator.modules()) == norms
    assert not any(
        isinstance(m, (models.LayerNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)) for m in critic.modules()
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_no_image_depends_on_the_others_of_its_batch(network):
    torch.manual_seed(0)
    generator, noise = make_generator(network, 8, 5), torch.randn(4, 5)
    torch.testing.assert_close(generator(noise)[1:2], generator(noise[1:2]))


def test_layernorm_is_torchs_layer_norm_over_channels_and_pixels():
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(models.LayerNorm(6)(x), expected)


def test_weights_are_normal_with_the_experiments_deviation_and_biases_zero():
    torch.manual_seed(0)
    layer = models.Generator(128).network[0].block[2]
    # 262,144 draws: the deviation is known to 0.14 % (one sigma); 1 % is seven of them.
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not layer.bias.any()


@pytest.mark.parametrize("length", [0.0, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_the_squared_distance_of_its_slope_from_one(length):
    weight = torch.zeros(3 * 32 * 32)
    weight[:2] = torch.tensor([0.6, 0.8]) * length
    real, fake = torch.randn(2, 4, 3, 32, 32)
    penalty = models.gradient_penalty(LinearCritic(weight), real, fake, torch.rand(4, 1, 1, 1))
    assert penalty.item() == pytest.approx((length - 1) ** 2, abs=1e-6)


def test_the_penalty_has_the_slopes_gradient_in_the_critics_parameters():
    """d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w|: the second derivative really flows."""
    weight = torch.zeros(3 * 32 * 32)
    weight[:2] = torch.tensor([1.8, 2.4])  # of length 3
    critic = LinearCritic(weight)
    real, fake = torch.randn(2, 4, 3, 32, 32)
    models.gradient_penalty(critic, real, fake, torch.rand(4, 1, 1, 1)).backward()
    torch.testing.assert_close(critic.weight.grad[:3], torch.tensor([2.4, 3.2, 0.0]))


def test_the_penalty_is_taken_between_the_images_at_the_mixing_ratio():
    """critic(x) = |x|^2 / 2 has the slope x, so the penalty tells where it was taken."""
    real, fake = torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 1.0)
    mixing = torch.tensor([0.25, 1.0]).view(2, 1, 1, 1)  # x = 2 and x = 5
    penalty = models.gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, mixing)
    assert penalty.item() == pytest.approx((1**2 + 4**2) / 2)


def test_the_losses_are_those_of_wgan_gp():
    weight = torch.zeros(3 * 32 * 32)
    weight[0] = 2.0
    critic = LinearCritic(weight)
    real, fake = torch.full((4, 3, 32, 32), 3.0), torch.full((4, 3, 32, 32), -1.0)
    loss = models.critic_loss(critic, real, fake, torch.rand(4, 1, 1, 1), penalty=10.0)
    assert loss.item() == pytest.approx(-2.0 - 6.0 + 10.0)
    assert models.generator_loss(critic, fake).item() == pytest.approx(2.0)


def test_the_critics_loss_sends_no_gradient_to_the_generator():
    generator, critic = models.Generator(4, latent=5), models.Critic(4)
    fake = generator(torch.randn(2, 5))
    loss = models.critic_loss(critic, torch.randn(2, 3, 32, 32), fake, torch.rand(2, 1, 1, 1), 10.0)
    loss.backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is not None for p in critic.parameters())
