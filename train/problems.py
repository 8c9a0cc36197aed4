"""Monotone problems with an exact measure of error: find x* with <A(x), x - x*> >= 0 for all x of a set C.

Every problem is a batch of instances, one for each seed: points are float64 of shape (seeds, dimension). It has

    start           X_1
    operator(x)     A(x)
    project(x)      the nearest point of the set on which the problem is posed, x itself if that is the whole space
    gap(x)          float64[seeds], how far x is from a solution, 0 only there: computed exactly, never sampled

For affine operators gap is the restricted gap of Nesterov, sup {<A(z), x - z>: z in C}, C the ball about the solution
that reaches to X_1. For the two saddle points on simplices it is max_v L(u, v') - min_u L(u', v), which bounds that
one. Lengths are scaled so that ||X_1 - x*|| and the Lipschitz constant of A are 1 where that is possible.
"""

import math

import torch
from torch import Tensor

BLOCK = 20  # affine problems of more dimensions are many independent ones of this size
NOISES = ("none", "absolute", "relative")


def add_noise(value: Tensor, noise: str, size: float, random: torch.Generator) -> Tensor:
    """An unbiased oracle's answer g where A is `value`, over the last axis.

    absolute: E||g - A||^2 = size^2.     relative: E||g - A||^2 = size^2 ||A||^2.
    """
    if noise == "none":
        return value
    scale = size / math.sqrt(value.shape[-1])
    draws = torch.randn(value.shape, generator=random, dtype=value.dtype).mul_(scale)
    return value + (draws if noise == "absolute" else draws * value.norm(dim=-1, keepdim=True))


class Affine:
    """A(x) = B (x - x*), B (seeds, blocks, m, m) positive semidefinite: a diagonal of blocks. X_1 = 0, ||x*|| = 1."""

    def __init__(self, matrix: Tensor, random: torch.Generator):
        self.matrix = matrix
        seeds, blocks, size, _ = matrix.shape
        solution = torch.randn(seeds, blocks * size, generator=random, dtype=matrix.dtype)
        self.solution = solution / solution.norm(dim=1, keepdim=True)
        self.start = torch.zeros_like(solution)
        # The symmetric part in its own basis, for the gap.
        self.curvature, self.basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
        self.curvature = self.curvature.clamp(min=0.0)  # eigh leaves 1e-17 of either sign where it is zero

    def operator(self, x: Tensor) -> Tensor:
        return self._apply(self.matrix, x - self.solution)

    def project(self, x: Tensor) -> Tensor:
        return x

    def gap(self, x: Tensor) -> Tensor:
        """sup over ||z|| <= 1 of <B z, (x - x*) - z> = <w, z> - <z, S z> with w = B^T (x - x*), S = (B + B^T) / 2."""
        w = self._apply(self.matrix.mT, x - self.solution)
        return largest_in_ball(self._apply(self.basis.mT, w), self.curvature.flatten(1))

    @staticmethod
    def _apply(matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x.view(*matrix.shape[:-1], 1)).reshape(x.shape)


def largest_in_ball(w: Tensor, s: Tensor) -> Tensor:
    """max of <w, z> - sum s_i z_i^2 over ||z|| <= 1, s >= 0, along the last axis.

    The maximiser is z = w / (2 (s + m)) with the least m >= 0 that keeps it in the ball, found by bisection: ||z||
    falls in m, and m = ||w|| / 2 is large enough.
    """
    low, high = torch.zeros_like(w[..., :1]), w.norm(dim=-1, keepdim=True) / 2

    def maximiser(m: Tensor) -> Tensor:
        return torch.where(w == 0, 0.0, w / (2 * (s + m)))

    for _ in range(100):  # halves a float64 until nothing is left
        middle = (low + high) / 2
        outside = maximiser(middle).norm(dim=-1, keepdim=True) > 1
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    z = maximiser(high)
    return (w * z - s * z.square()).sum(-1)


def bilinear(dimension: int, seeds: int, random: torch.Generator) -> Affine:
    """min_u max_v <u - u*, M (v - v*)>: monotone and no more, so that plain descent-ascent diverges."""
    return Affine(_skew(dimension, seeds, random), random)


def regularised(dimension: int, seeds: int, random: torch.Generator) -> Affine:
    """The bilinear game plus 0.3 / 2 (||u - u*||^2 - ||v - v*||^2): strongly monotone."""
    matrix = _skew(dimension, seeds, random)
    return Affine(matrix + 0.3 * torch.eye(matrix.shape[-1], dtype=matrix.dtype), random)


def quadratic(dimension: int, seeds: int, random: torch.Generator) -> Affine:
    """min 1/2 <x - x*, S (x - x*)>, S with eigenvalues from 0.05 to 1: cocoercive with constant 1."""
    size, blocks = _blocks(dimension)
    turn = _rotation(seeds, blocks, size, random)
    values = torch.logspace(math.log10(0.05), 0, size, dtype=turn.dtype)
    return Affine(turn * values @ turn.mT, random)


def _skew(dimension: int, seeds: int, random: torch.Generator) -> Tensor:
    """[[0, M], [-M^T, 0]], the singular values of M from 0.1 to 1."""
    size, blocks = _blocks(dimension)
    half = size // 2
    values = torch.linspace(0.1, 1.0, half, dtype=torch.float64)
    m = _rotation(seeds, blocks, half, random) * values @ _rotation(seeds, blocks, half, random)
    zero = torch.zeros_like(m)
    return torch.cat((torch.cat((zero, m), -1), torch.cat((-m.mT, zero), -1)), -2)


def _rotation(seeds: int, blocks: int, size: int, random: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(seeds, blocks, size, size, generator=random, dtype=torch.float64))[0]


def _blocks(dimension: int) -> tuple[int, int]:
    """(size, count) of the blocks."""
    if dimension % 2 or dimension < 2 or (dimension > BLOCK and dimension % BLOCK):
        raise ValueError(f"dimension must be even, and beyond {BLOCK} a multiple of it, got {dimension}")
    return min(dimension, BLOCK), max(dimension // BLOCK, 1)


class MatrixGame:
    """min_u max_v <u, M v> over two simplices, M normal of norm 1; x = (u, v), X_1 its centre."""

    def __init__(self, dimension: int, seeds: int, random: torch.Generator):
        half = _blocks(dimension)[0] // 2 * _blocks(dimension)[1]
        m = torch.randn(seeds, half, half, generator=random, dtype=torch.float64)
        self.matrix = m / torch.linalg.matrix_norm(m, 2)[:, None, None]
        self.start = torch.full((seeds, dimension), 1.0 / half, dtype=torch.float64)

    def operator(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=1)
        return torch.cat((self._times(self.matrix, v), -self._times(self.matrix.mT, u)), dim=1)

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([onto_simplex(part) for part in x.chunk(2, dim=1)], dim=1)

    def gap(self, x: Tensor) -> Tensor:
        """max_v' <u, M v'> - min_u' <u', M v>: both are at a corner."""
        u, v = x.chunk(2, dim=1)
        return self._times(self.matrix.mT, u).amax(1) - self._times(self.matrix, v).amin(1)

    @staticmethod
    def _times(matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x[..., None])[..., 0]


def onto_simplex(x: Tensor, total: float = 1.0) -> Tensor:
    """The nearest point with non-negative coordinates of sum `total`, along the last axis (Held et al., 1974)."""
    ordered = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    shifts = (ordered.cumsum(-1) - total) / count
    last = (ordered > shifts).sum(-1, keepdim=True) - 1
    return (x - shifts.gather(-1, last)).clamp(min=0.0)


class RobustLogistic:
    """Logistic regression on the breast-cancer set, the n samples weighed by an adversary on the simplex.

        L(w, q) = <q, l(w)> / sqrt(n) + 0.01 / 2 ||w||^2 - 0.5 / 2 ||q - q_1||^2,    sum q = sqrt(n), q >= 0,

    l_i(w) = log(1 + exp(-y_i <a_i, w>)), a_i the standardised features and a constant, of mean norm 1; q_1 weighs all
    alike. x = (w, q) has 31 + 569 coordinates. All seeds share the data and differ in noise.
    """

    def __init__(self, dimension: int, seeds: int, random: torch.Generator):
        from sklearn.datasets import load_breast_cancer

        features, labels = (torch.tensor(array, dtype=torch.float64) for array in load_breast_cancer(return_X_y=True))
        features = (features - features.mean(0)) / features.std(0)
        features = torch.cat((features, torch.ones(len(features), 1)), 1) / math.sqrt(features.shape[1] + 1)
        self.rows = features * (2 * labels - 1)[:, None]  # y_i a_i
        self.root = math.sqrt(len(features))
        self.pull, self.grip = 0.01, 0.5
        centre = torch.full((len(features),), 1 / self.root, dtype=torch.float64)
        self.start = torch.cat((torch.zeros(features.shape[1]), centre)).repeat(seeds, 1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = self.rows.shape[1]
        return x[..., :width], x[..., width:]

    def _losses(self, w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-w @ self.rows.T)

    def operator(self, x: Tensor) -> Tensor:
        w, q = self._split(x)
        slopes = -torch.sigmoid(-w @ self.rows.T)
        ascent = self._losses(w) / self.root - self.grip * (q - 1 / self.root)
        return torch.cat(((q * slopes) @ self.rows / self.root + self.pull * w, -ascent), dim=1)

    def project(self, x: Tensor) -> Tensor:
        w, q = self._split(x)
        return torch.cat((w, onto_simplex(q, self.root)), dim=1)

    def value(self, w: Tensor, q: Tensor) -> Tensor:
        spread = (q - 1 / self.root).square().sum(-1)
        return (q * self._losses(w)).sum(-1) / self.root + self.pull / 2 * w.square().sum(-1) - self.grip / 2 * spread

    def gap(self, x: Tensor) -> Tensor:
        """max_q L(w, .) - min_w L(., q): the first is a projection, the second a convex problem solved by Newton."""
        w, q = self._split(x)
        worst = onto_simplex(1 / self.root + self._losses(w) / self.root / self.grip, self.root)
        best = torch.stack([self._best_response(one) for one in q])
        return self.value(w, worst) - self.value(best, q)

    def _best_response(self, q: Tensor) -> Tensor:
        """argmin_w L(w, q) by damped Newton; the last steps are at float64's precision."""
        w = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for _ in range(100):
            s = torch.sigmoid(-self.rows @ w)
            gradient = -(q * s) @ self.rows / self.root + self.pull * w
            curvature = (self.rows.T * (q * s * (1 - s))) @ self.rows / self.root
            move = torch.linalg.solve(curvature + self.pull * torch.eye(len(w), dtype=w.dtype), gradient)
            decrement = float(gradient @ move) ** 0.5
            w = w - move / (1 + decrement)
            if decrement < 1e-12:
                break
        return w


PROBLEMS = {
    "bilinear": bilinear,
    "regularised": regularised,
    "quadratic": quadratic,
    "matrix": MatrixGame,
    "logistic": RobustLogistic,
}


def make(name: str, dimension: int = 20, seeds: int = 1, seed: int = 0):
    """`seeds` instances of a problem; `dimension` is that of the problem's own data for "logistic"."""
    return PROBLEMS[name](dimension, seeds, torch.Generator().manual_seed(seed))
