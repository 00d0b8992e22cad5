"""MatMul-Aware Compensation: the closed-form solutions (METHOD.md, 7). Pure functions of tensors.

The setting of the projection before one MatMul input, for one attention: samples i = 1..n, heads h. X_i are inputs of
the projection with a column of ones, so that the bias is the last row of W. For the query branch, per head,

    minimise over D   Σ_i ‖ X_i W K_iᵀ − X_i (W + D) K̂_iᵀ ‖² + λ ‖D‖²
    normal equation   Σ_i G_i D B_i + λ D = R,     G_i = X_iᵀX_i,  B_i = K̂_iᵀK̂_i,  R = − Σ_i G_i W E_iᵀK̂_i       (1)

with E_i = K̂_i − K_i. The key branch is the same with the roles of query and key exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carsam.errors import ConfigError

SOLVERS = ("pooled", "exact")


@dataclass
class ProductStatistics:
    """Second moments of one branch, gathered sample by sample.

    Attributes:
        gram: G_i, list of (d_in, d_in).
        other: B_i, list of (heads, d_head, d_head).
        cross: E_iᵀK̂_i, list of (heads, d_head, d_head).
    """

    gram: list[Tensor]
    other: list[Tensor]
    cross: list[Tensor]

    @classmethod
    def empty(cls) -> ProductStatistics:
        return cls([], [], [])

    def update(self, inputs: Tensor, reference: Tensor, quantized: Tensor, *, center: bool = False) -> None:
        """Adds one batch of samples.

        Args:
            inputs: (samples, tokens, d_in) inputs of the compensated projection, column of ones included.
            reference: (samples, heads, other_tokens, d_head) the other operand in floating point.
            quantized: The same, quantized.
            center: Remove the mean over ``other_tokens``: softmax ignores what is constant over the keys. For the
                query branch only (there the other operand is the keys).
        """
        error = quantized - reference
        if center:
            quantized = quantized - quantized.mean(-2, keepdim=True)
            error = error - error.mean(-2, keepdim=True)
        # Products in the precision of the inputs: a few thousand terms a sample; the sums over samples are in float64.
        self.gram.extend((inputs.transpose(-2, -1) @ inputs).double())
        self.other.extend((quantized.transpose(-2, -1) @ quantized).double())
        self.cross.extend((error.transpose(-2, -1) @ quantized).double())

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d_in, d_in), (n, heads, d_head, d_head) twice."""
        if not self.gram:
            raise RuntimeError("no sample was gathered for the compensation")
        return torch.stack(self.gram), torch.stack(self.other), torch.stack(self.cross)


def damping(gram: Tensor, other: Tensor, relative: float) -> Tensor:
    """λ of every head: relative · mean(diag ΣG) · mean(diag B), (heads,)."""
    mean_gram = gram.sum(0).diagonal().mean()
    return relative * mean_gram * other.mean(0).diagonal(dim1=-2, dim2=-1).mean(-1)


def solve_product(gram: Tensor, other: Tensor, right: Tensor, lam: Tensor) -> Tensor:
    """Solves G D B + λ D = R for every head by two eigendecompositions.

    With G = U g Uᵀ and B = V b Vᵀ: D = U ((Uᵀ R V) ⊘ (g bᵀ + λ)) Vᵀ. Multiplied by G⁻¹ this is the paper's Sylvester
    equation λ G⁻¹ D + D B = G⁻¹ R; A and B are symmetric, so Bartels–Stewart's Schur forms are eigendecompositions.

    Args:
        gram: (d_in, d_in), symmetric positive semidefinite.
        other: (heads, d_head, d_head), likewise.
        right: (heads, d_in, d_head).
        lam: (heads,), positive.

    Returns:
        (heads, d_in, d_head).
    """
    return ProductSolver(gram, other, lam)(right)


class ProductSolver:
    """:func:`solve_product` with the eigendecompositions kept, for many right sides (a preconditioner)."""

    def __init__(self, gram: Tensor, other: Tensor, lam: Tensor):
        g, self._u = torch.linalg.eigh(gram)
        b, self._v = torch.linalg.eigh(other)
        self._denominator = g.clamp(min=0)[:, None] * b.clamp(min=0)[:, None, :] + lam[:, None, None]

    def __call__(self, right: Tensor) -> Tensor:
        rotated = self._u.T @ right @ self._v
        return self._u @ (rotated / self._denominator) @ self._v.transpose(-2, -1)


def compensate_product(
    weight: Tensor,
    statistics: ProductStatistics,
    *,
    solver: str = "exact",
    relative_damping: float = 0.01,
    iterations: int = 40,
    tolerance: float = 1e-3,
) -> Tensor:
    """The compensation D of a query or key projection.

    Args:
        weight: (heads, d_in, d_head) W per head, bias as last row of d_in.
        statistics: Gathered second moments.
        solver: ``pooled`` (the paper: ΣG, mean B, mean EᵀK̂ as if all samples shared them) or ``exact`` (conjugate
            gradients on (1), pooled solution as preconditioner).
        relative_damping: λ relative to mean(diag ΣG) · mean(diag B).
        iterations, tolerance: Of the conjugate gradients; tolerance is relative to the right side.

    Returns:
        D of the shape of ``weight``, float64.

    Raises:
        ConfigError: The solver is unknown or the damping not positive.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"unknown MAC solver {solver!r}; choose from {', '.join(SOLVERS)}.")
    if relative_damping <= 0:
        raise ConfigError("the damping of MAC must be positive: its equations are singular without it.")
    weight = weight.double()
    grams, others, crosses = statistics.stacked()
    lam = damping(grams, others, relative_damping)
    if not bool((lam > 0).all()):
        return torch.zeros_like(weight)  # the operand is constant: nothing to compensate, nothing to divide by
    pooled = ProductSolver(grams.sum(0), others.mean(0), lam)
    if solver == "pooled":
        return pooled(-grams.sum(0) @ weight @ crosses.mean(0))

    heads, d_in, d_head = weight.shape
    n = len(grams)
    # Two matrix products for the whole sum: D times all B_i side by side, then all G_i side by side times that.
    # They are the whole cost, and single precision is enough for residuals down to about 1e-5.
    work = torch.float32 if tolerance >= 1e-4 else torch.float64
    side_by_side = others.permute(1, 2, 0, 3).reshape(heads, d_head, n * d_head).to(work)
    stacked = grams.permute(1, 0, 2).reshape(d_in, n * d_in).to(work)

    def operator(d: Tensor, right_factors: Tensor) -> Tensor:
        products = (
            (d.to(work) @ right_factors)
            .view(heads, d_in, n, d_head)
            .permute(2, 1, 0, 3)
            .reshape(n * d_in, heads * d_head)
        )
        return (stacked @ products).view(d_in, heads, d_head).transpose(0, 1).double()

    def apply(d: Tensor) -> Tensor:
        return operator(d, side_by_side) + lam[:, None, None] * d

    right = -operator(weight, crosses.permute(1, 2, 0, 3).reshape(heads, d_head, n * d_head).to(work))
    return conjugate_gradients(apply, right, pooled, iterations, tolerance)


def conjugate_gradients(apply, right: Tensor, precondition, iterations: int, tolerance: float) -> Tensor:
    """Preconditioned conjugate gradients on independent systems stacked along the first dimension.

    Args:
        apply: Symmetric positive definite operator on (systems, ...).
        right: Right sides.
        precondition: Approximate inverse.
        iterations: At most.
        tolerance: Ends when every residual is below this share of its right side.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))

    solution = precondition(right)
    residual = right - apply(solution)
    z = precondition(residual)
    direction, rz = z, dot(residual, z)
    goal = tolerance**2 * dot(right, right)
    for _ in range(iterations):
        if bool((dot(residual, residual) <= goal).all()):
            break
        image = apply(direction)
        step = rz / dot(direction, image).clamp(min=torch.finfo(torch.float64).tiny)
        solution = solution + step * direction
        residual = residual - step * image
        z = precondition(residual)
        rz_next = dot(residual, z)
        direction = z + rz_next / rz.clamp(min=torch.finfo(torch.float64).tiny) * direction
        rz = rz_next
    return solution


@dataclass
class ValueStatistics:
    """Second moments of the value branch: Σ (P̂X)ᵀ(P̂X) and Σ (P̂X)ᵀ(P − P̂)V per head, in float64."""

    gram: Tensor | None = None
    right: Tensor | None = None

    def update(self, inputs: Tensor, reference: Tensor, quantized: Tensor, value: Tensor) -> None:
        """Adds one batch of samples.

        Args:
            inputs: (samples, keys, d_in) inputs of the value projection, column of ones included.
            reference: (samples, heads, queries, keys) attention P in floating point.
            quantized: P̂, the attention of quantized scores, itself quantized.
            value: (samples, heads, keys, d_head) values.
        """
        missing = reference - quantized
        if quantized.shape[-1] < quantized.shape[-2]:
            # Few keys for many queries (image→token): through (keys × keys) products of the attentions.
            transposed, x = quantized.transpose(-2, -1), inputs[:, None]
            gram = x.transpose(-2, -1) @ (transposed @ quantized) @ x
            right = x.transpose(-2, -1) @ ((transposed @ missing) @ value)
        else:
            mixed = quantized @ inputs[:, None]  # P̂X: (samples, heads, queries, d_in)
            gram = mixed.transpose(-2, -1) @ mixed
            right = mixed.transpose(-2, -1) @ (missing @ value)
        gram, right = gram.double().sum(0), right.double().sum(0)
        self.gram = gram if self.gram is None else self.gram + gram
        self.right = right if self.right is None else self.right + right


def compensate_value(statistics: ValueStatistics, *, relative_damping: float = 0.01) -> Tensor:
    """D_V = (Σ XᵀP̂ᵀP̂X + λ I)⁻¹ Σ XᵀP̂ᵀ(P − P̂)V per head, λ relative to the mean diagonal.

    Returns:
        (heads, d_in, d_head), float64.
    """
    if statistics.gram is None:
        raise RuntimeError("no sample was gathered for the compensation")
    if relative_damping <= 0:
        raise ConfigError("the damping of MAC must be positive: its equations are singular without it.")
    gram = statistics.gram
    lam = relative_damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + lam.clamp(min=1e-30)[:, None, None] * eye, statistics.right)
