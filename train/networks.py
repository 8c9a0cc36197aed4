"""The pairs of networks that may play: a generator of (width, latent), and a critic of (width)."""

from dcgan import DcganCritic, DcganGenerator
from models import Critic, Generator
from torch import nn

NETWORKS = {"resnet": (Generator, Critic), "dcgan": (DcganGenerator, DcganCritic)}


def make_generator(network: str, width: int, latent: int) -> nn.Module:
    return NETWORKS[network][0](width, latent)


def make_critic(network: str, width: int) -> nn.Module:
    return NETWORKS[network][1](width)
