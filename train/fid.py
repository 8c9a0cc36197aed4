"""FID and KID of features, as formulas: nothing here knows of images, networks or ranks.

    FID = ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))     of two sets' means and covariances
    KID = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)         over different x, x' and y, y'; k(a, b) = (a.b/d + 1)^3

FID has a bias that falls with the number of features N, so two FIDs are comparable at the same N only. KID is an
unbiased estimate of its limit at every N. Sources: Heusel et al. (2017); Binkowski et al. (2018).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Moments:
    """Sums over features: their number, sum (d,), and sum of outer products (d, d), float64. Sums of ranks add up."""

    count: int
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """features: (n, d)."""
        wide = features.double()
        return cls(len(wide), wide.sum(0), wide.T @ wide)

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    @property
    def covariance(self) -> Tensor:
        """With the divisor count - 1, as numpy.cov."""
        mean = self.mean
        return (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """FID. tr((C_1 C_2)^(1/2)) is the sum of the roots of the eigenvalues of R C_2 R, with R R = C_1.

    Raises:
        ValueError: if one of them has fewer than two features.
    """
    if min(one.count, other.count) < 2:
        raise ValueError("FID needs at least two images on either side")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum()
    return float(distance + one.covariance.trace() + other.covariance.trace() - 2 * shared)


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """KID of features (n, d) and (m, d) without bias, and its standard error by leaving out one feature at a time.

    Raises:
        ValueError: if one of them has fewer than three features.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError("KID needs at least three images on either side")
    own_x, own_y = _row_sums(x, x, True), _row_sums(y, y, True)
    cross_x, cross_y = _row_sums(x, y), _row_sums(y, x)
    sum_x, sum_y, cross = own_x.sum(), own_y.sum(), cross_x.sum()
    value = sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * cross / (n * m)
    # Without feature i the sum over pairs loses its row and its column.
    without_x = (
        (sum_x - 2 * own_x) / ((n - 1) * (n - 2)) + sum_y / (m * (m - 1)) - 2 * (cross - cross_x) / ((n - 1) * m)
    )
    without_y = (
        sum_x / (n * (n - 1)) + (sum_y - 2 * own_y) / ((m - 1) * (m - 2)) - 2 * (cross - cross_y) / (n * (m - 1))
    )
    variance = sum((len(w) - 1) / len(w) * (w - w.mean()).square().sum() for w in (without_x, without_y))
    return Estimate(float(value), float(variance) ** 0.5)


def _row_sums(x: Tensor, y: Tensor, same: bool = False) -> Tensor:
    """sum_j k(x_i, y_j), float64 (n,); of one set with itself without j = i."""
    x, y = x.double(), y.double()
    sums = torch.cat([_kernel(part, y).sum(1) for part in x.split(ROWS_AT_ONCE)])
    return sums - (x.square().sum(1) / x.shape[1] + 1).pow(3) if same else sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)
