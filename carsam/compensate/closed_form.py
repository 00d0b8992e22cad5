"""MatMul-Aware Compensation: the closed-form solutions (METHOD.md, 7). Pure functions of tensors.

The setting of the projection before one MatMul input, for one attention: samples i = 1..n, heads h. X_i are inputs of
the projection with a column of ones, so that the bias is the last row of W. For the query branch, per head,

    minimise over D   Σ_i ‖ X_i W K_iᵀ − X_i (W + D) K̂_iᵀ ‖² + λ ‖D‖²
    normal equation   Σ_i G_i D B_i + λ D = R,     G_i = X_iᵀX_i,  B_i = K̂_iᵀK̂_i,  R = − Σ_i G_i W E_iᵀK̂_i       (1)

with E_i = K̂_i − K_i. The key branch is the same with the roles of query and key exchanged.

Errors from further upstream are met too where the targets come from the float model, as in GPTAQ (arXiv 2504.02692):
with the inputs X̄_i there and C_i = X_iᵀX̄_i, M_i = K_iᵀK̂_i (K_i the keys of the float model) the right side is

    R = Σ_i (C_i W M_i − G_i W B_i)                                                                              (2)

which is (1)'s where X̄ = X, for then M − B = − EᵀK̂. Where the other branch was compensated before, Q = X W is no longer
what it should be multiplied with: what is left is met by Q̂_i, the operand quantized, in the place of X_i W,

    R = Σ_i (C_i W M_i − X_iᵀQ̂_i B_i)                                                                            (3)

Where tokens are turned by their positions between projection and MatMul (RoPE), token t has R_t B_i R_tᵀ for B_i, and
M_i and E_iᵀK̂_i likewise. Their means over the tokens stand for them: positions are pooled, as if the inputs had the
same second moments at all of them. Solved token by token, a sum over 256 positions would stand for each G_i D B_i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from carsam.errors import ConfigError
from carsam.models.rotation import Rotation

SOLVERS = ("pooled", "exact")


@dataclass
class ProductStatistics:
    """Second moments of one branch, gathered sample by sample.

    Attributes:
        gram: G_i, list of (d_in, d_in).
        other: B_i, list of (heads, d_head, d_head).
        cross: E_iᵀK̂_i, list of (heads, d_head, d_head); with float inputs K_iᵀK̂_i.
        float_gram: C_i, list of (d_in, d_in); empty where targets are taken at the inputs themselves.
        own: X_iᵀQ̂_i, list of (heads, d_in, d_head), with ``float_gram``; empty for the operand X_i W in floating point.
        groups: For every sample the number of the calibration item that it came with.
    """

    gram: list[Tensor] = field(default_factory=list)
    other: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    float_gram: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def update(
        self,
        inputs: Tensor,
        reference: Tensor,
        quantized: Tensor,
        *,
        center: bool = False,
        float_inputs: Tensor | None = None,
        own: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """Adds one batch of samples.

        Args:
            inputs: (samples, tokens, d_in) inputs of the compensated projection, column of ones included.
            reference: (samples, heads, other_tokens, d_head) the other operand in floating point.
            quantized: The same, quantized.
            center: Remove the mean over ``other_tokens``: softmax ignores what is constant over the keys. For the
                query branch only (there the other operand is the keys).
            float_inputs: (samples, tokens, d_in) of the float model, where the targets are its; ``reference`` then is
                the other operand there. All batches or none.
            own: (samples, heads, tokens, d_head) the operand that the projection gives, quantized, where what is left
                of its error counts; ``float_inputs`` must be given then. All batches or none.
            rotation: How what the projection gives is turned before the product; ``reference`` and ``quantized`` are
                turned already, ``own`` is turned back.
        """
        assert own is None or float_inputs is not None, "what is left needs the float inputs of its target"
        error = quantized - reference if float_inputs is None else reference
        if center:
            quantized = quantized - quantized.mean(-2, keepdim=True)
            error = error - error.mean(-2, keepdim=True)
        # Products in the precision of the inputs: a few thousand terms a sample; the sums over samples are in float64.
        transposed = inputs.transpose(-2, -1)
        self.groups.extend([self.groups[-1] + 1 if self.groups else 0] * len(inputs))
        self.gram.extend((transposed @ inputs).double())
        other, cross = (each.transpose(-2, -1) @ quantized for each in (quantized, error))
        if rotation is not None:
            other, cross = rotation.mean(other), rotation.mean(cross)
        self.other.extend(other.double())
        self.cross.extend(cross.double())
        if float_inputs is not None:
            self.float_gram.extend((transposed @ float_inputs).double())
        if own is not None:
            self.own.extend((transposed[:, None] @ own).double())

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d_in, d_in), (n, heads, d_head, d_head) twice."""
        if not self.gram:
            raise RuntimeError("no sample was gathered for the compensation")
        return torch.stack(self.gram), torch.stack(self.other), torch.stack(self.cross)

    def of_groups(self, chosen: Callable[[int], bool]) -> ProductStatistics:
        """The statistics of some calibration items alone."""
        kept = [i for i, group in enumerate(self.groups) if chosen(group)]

        def take(values: list[Any]) -> list[Any]:
            return [values[i] for i in kept] if values else []

        return ProductStatistics(*(take(getattr(self, f.name)) for f in fields(self)))


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
        if not statistics.float_gram:
            return pooled(-grams.sum(0) @ weight @ crosses.mean(0))
        targets = torch.stack(statistics.float_gram).sum(0) @ weight @ crosses.mean(0)
        own = torch.stack(statistics.own).sum(0) if statistics.own else grams.sum(0) @ weight
        return pooled(targets - own @ others.mean(0))

    # Single precision is enough for residuals down to about 1e-5.
    sums = _Sums(statistics, torch.float32 if tolerance >= 1e-4 else torch.float64)

    def apply(d: Tensor) -> Tensor:
        return sums.left(d) + lam[:, None, None] * d

    return conjugate_gradients(apply, sums.right(weight), pooled, iterations, tolerance)


class _Sums:
    """Both sides of (1), (2) and (3) over all samples.

    Two matrix products for a whole sum: D times all B_i side by side, then all G_i side by side times that. They are
    the whole cost of a solution.
    """

    def __init__(self, statistics: ProductStatistics, work: torch.dtype):
        grams, others, crosses = statistics.stacked()
        self._work = work
        self._grams, self._others, self._crosses = self._stacked(grams), self._beside(others), self._beside(crosses)
        self._floats = self._stacked(torch.stack(statistics.float_gram)) if statistics.float_gram else None
        self._own = (torch.stack(statistics.own) @ others).sum(0) if statistics.own else None

    def _beside(self, matrices: Tensor) -> Tensor:
        """(n, heads, d_head, d_head) to (heads, d_head, n · d_head)."""
        return matrices.permute(1, 2, 0, 3).flatten(2).to(self._work)

    def _stacked(self, matrices: Tensor) -> Tensor:
        """(n, d_in, d_in) to (d_in, n · d_in)."""
        return matrices.permute(1, 0, 2).flatten(1).to(self._work)

    def _sum(self, grams: Tensor, d: Tensor, factors: Tensor) -> Tensor:
        heads, d_in, d_head = d.shape
        n = grams.shape[1] // d_in
        products = (d.to(self._work) @ factors).view(heads, d_in, n, d_head).permute(2, 1, 0, 3)
        summed = grams @ products.reshape(n * d_in, heads * d_head)
        return summed.view(d_in, heads, d_head).transpose(0, 1).double()

    def left(self, d: Tensor) -> Tensor:
        """Σ G_i D B_i, (heads, d_in, d_head)."""
        return self._sum(self._grams, d, self._others)

    def right(self, weight: Tensor) -> Tensor:
        """R, (heads, d_in, d_head)."""
        if self._floats is None:
            return -self._sum(self._grams, weight, self._crosses)
        own = self.left(weight) if self._own is None else self._own
        return self._sum(self._floats, weight, self._crosses) - own


# λ relative to the mean diagonals, from almost none to next to no compensation.
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)
# Every fourth calibration item judges.
HELD_OUT = 4


def choose_damping(weight: Tensor, statistics: ProductStatistics, *, solver: str = "exact") -> float | None:
    """λ by held-out calibration items: solved on three quarters of them, judged by the squared error on the rest.

    What is compared is the objective itself, ‖X W Kᵀ − X (W + D) K̂ᵀ‖² without its constant: Σ ⟨D, G D B⟩ − 2 ⟨D, R⟩.

    Args:
        weight: (heads, d_in, d_head), as :func:`compensate_product` takes it.
        statistics: Of all items.
        solver: As for the final solution.

    Returns:
        The relative damping; None where every one of them makes held-out items worse, or there are too few items.
    """
    judges = statistics.of_groups(lambda group: group % HELD_OUT == HELD_OUT - 1)
    if not judges.gram:
        return None
    rest = statistics.of_groups(lambda group: group % HELD_OUT != HELD_OUT - 1)
    sums, weight = _Sums(judges, torch.float32), weight.double()
    right = sums.right(weight)
    best, least = None, 0.0
    for relative in DAMPINGS:
        change = compensate_product(weight, rest, solver=solver, relative_damping=relative)
        error = float((change * (sums.left(change) - 2 * right)).sum())
        if error < least:
            best, least = relative, error
    return best


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

    def update(
        self, inputs: Tensor, reference: Tensor, quantized: Tensor, value: Tensor, *, target: Tensor | None = None
    ) -> None:
        """Adds one batch of samples.

        Args:
            inputs: (samples, keys, d_in) inputs of the value projection, column of ones included.
            reference: (samples, heads, queries, keys) attention P in floating point.
            quantized: P̂, the attention of quantized scores, itself quantized.
            value: (samples, heads, keys, d_head) values.
            target: (samples, heads, queries, d_head) PV of the float model; None for ``reference`` times ``value``.
        """
        if target is not None:
            mixed = quantized @ inputs[:, None]
            gram = mixed.transpose(-2, -1) @ mixed
            self._add(gram, mixed.transpose(-2, -1) @ (target - quantized @ value))
            return
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
        self._add(gram, right)

    def _add(self, gram: Tensor, right: Tensor) -> None:
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
