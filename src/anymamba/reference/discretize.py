"""From a continuous state-space model to a recurrence over steps of size Δ.

    h'(t) = A h(t) + B u(t)    →    h_k = A_bar h_{k-1} + B_bar u_k    (+ B_prev u_{k-1}, trapezoidal only)

u_k is the input over the step that ends at k. With z = Δ A (a diagonal A elementwise, a dense one as a matrix):

| rule | A_bar | B_bar | order, constant input | stable where |
|---|---|---|---|---|
| zoh | e^z | Δ (e^z − 1)/z B | exact | Re z ≤ 0 |
| mamba | e^z | Δ B | 1 | Re z ≤ 0 |
| bilinear | (1 − z/2)⁻¹ (1 + z/2) | Δ (1 − z/2)⁻¹ B | 2 | Re z ≤ 0 |
| euler | 1 + z | Δ B | 1 | abs(1 + z) ≤ 1 |
| trapezoidal | e^z | Δ/2 B, and B_prev = Δ/2 e^z B | 2, also for a smooth input | Re z ≤ 0 |

"Stable" is where abs(A_bar) ≤ 1 for every eigenvalue: the recurrence forgets, or keeps, but does not blow up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_TERMS = 17  # of the series of φ₂ for |z| < 1: the first left out is below 1e-17


class Discrete(NamedTuple):
    """h_k = A_bar h_{k-1} + B_bar u_k + B_prev u_{k-1}; no B_prev: 0."""

    A_bar: Tensor
    B_bar: Tensor
    B_prev: Tensor | None = None


def discretize(A: Tensor, B: Tensor, dt: Tensor | float, rule: str = "zoh", *, dense: bool = False) -> Discrete:
    """(A_bar, B_bar, B_prev) of a rule of the table above.

    Args:
        A: (…,n), the diagonal of the state matrix, or (…,n,n) if `dense`; real or complex; it may be singular.
        B: (…,n) as A, or (…,n,inputs) if `dense`.
        dt: a number or a tensor: one that broadcasts with a diagonal A, or (…) of a dense one. No step at 0, and a
            negative one goes back in time.

    A, B and dt may be arrays and lists too, and whole numbers become real ones. Differentiable in all three. Values are
    not looked at: what is NaN stays so. Raises ValueError for a rule that does not exist, shapes that do not fit, and a
    dense A that has no bilinear step.
    """
    if rule not in RULES:
        raise ValueError(f"discretize: rule={rule!r} does not exist: choose one of {', '.join(RULES)}")
    A, B = _tensor("A", A), _tensor("B", B)
    dt = dt if isinstance(dt, (int, float)) else _tensor("dt", dt)
    if dense and (A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.dim() < 2 or B.shape[-2] != A.shape[-1]):
        raise ValueError(f"discretize: A is {tuple(A.shape)} and B {tuple(B.shape)}, but dense ones are (…,n,n) and "
                         "(…,n,inputs): leave `dense` out for a diagonal A")  # fmt: skip
    if not dense and A.shape[-1:] != B.shape[-1:]:
        raise ValueError(f"discretize: A is {tuple(A.shape)} and B {tuple(B.shape)}, but a diagonal A and B have the "
                         "same last axis: dense=True for matrices (…,n,n) and (…,n,inputs)")  # fmt: skip
    sizes = [v.shape[:-2] if dense else v.shape for v in (A, B)] + [dt.shape if isinstance(dt, Tensor) else ()]
    try:
        torch.broadcast_shapes(*sizes)
    except RuntimeError:
        raise ValueError(f"discretize: A is {tuple(A.shape)}, B {tuple(B.shape)}, dt {tuple(sizes[2])}, but they must "
                         "broadcast, for dense ones the axes before the matrices: dt[:, None] gives each row of a "
                         "diagonal A its own step") from None  # fmt: skip
    if dense:
        number = torch.promote_types(A.dtype, B.dtype)  # linear algebra takes matrices of one type
        A, B, dt = A.to(number), B.to(number), dt[..., None, None] if isinstance(dt, Tensor) else dt
    return RULES[rule](A, B, dt, dense=dense)


def _tensor(name: str, v: Any) -> Tensor:
    """A real or complex tensor. Raises ValueError for what makes none."""
    try:
        v = torch.as_tensor(v)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"discretize: {name} is a {type(v).__name__} that makes no tensor ({error})") from None
    return v if v.is_floating_point() or v.is_complex() else v.to(torch.get_default_dtype())


# ---- the rules -------------------------------------------------------------------------------------------------


def zoh(A, B, dt, *, dense=False):
    """Zero-order hold: the solution itself for an input that holds still over each step (S4D, arXiv 2206.11893, section
    3.1). Stable for Re z ≤ 0, as the model is; modes that fall fast are gone after a step.

    Dense: both are blocks of one exponential, e^[[z, Δ B], [0, 0]], so that no inverse of A is needed.
    """
    if not dense:
        return _diagonal(A, B, dt, "zoh")
    z, inputs = dt * A, dt * B
    lead, (n, m) = torch.broadcast_shapes(z.shape[:-2], inputs.shape[:-2]), inputs.shape[-2:]
    top = torch.cat([z.expand(*lead, n, n), inputs.expand(*lead, n, m)], -1)
    both = torch.linalg.matrix_exp(torch.cat([top, top.new_zeros(*lead, m, n + m)], -2))
    return Discrete(both[..., :n, :n], both[..., :n, n:])


def mamba(A, B, dt, *, dense=False):
    """A by zero-order hold, B by Euler's rule, as Mamba computes (arXiv 2312.00752, section 3.6 and its code). Stable
    for Re z ≤ 0. First order in what the input adds: a mode with a large -z takes in -z times too much of it."""
    return Discrete(torch.linalg.matrix_exp(dt * A), dt * B) if dense else _diagonal(A, B, dt, "mamba")


def bilinear(A, B, dt, *, dense=False):
    """Tustin's rule (S4, arXiv 2111.00396, equation 3): the implicit trapezoidal rule with the input held. Stable for
    Re z ≤ 0; but A_bar → -1 for z → -∞: modes that fall fast alternate in sign and stay. An unstable mode
    of z = 2 exactly has no step: infinite for a diagonal A, a ValueError for a dense one."""
    if not dense:
        return _diagonal(A, B, dt, "bilinear")
    half, one = dt * A / 2, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    try:
        return Discrete(torch.linalg.solve(one - half, one + half), torch.linalg.solve(one - half, dt * B))
    except torch.linalg.LinAlgError:
        raise ValueError("discretize: 2 is an eigenvalue of dt·A, where the rule bilinear has no step: take another dt "
                         "or rule") from None  # fmt: skip


def euler(A, B, dt, *, dense=False):
    """Forward Euler: one slope for the whole step. Stable in the disc |1 + z| ≤ 1: for a real A, Δ ≤ 2 / |A|; an
    undamped oscillation (Re z = 0) always grows."""
    if not dense:
        return _diagonal(A, B, dt, "euler")
    return Discrete(torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) + dt * A, dt * B)


def trapezoidal(A, B, dt, *, dense=False):
    """The exponential-trapezoidal rule (the one of Mamba-3, there with a learned share λ, here λ = 1/2).

    The exact solution over a step is e^z h_{k-1} + ∫ e^{A (t_k - s)} B u(s) ds. The integral is taken from its two
    ends, u_{k-1} and u_k as samples at them: (1 - λ) Δ e^z B u_{k-1} + λ Δ B u_k. λ = 1 is the rule "mamba". Stable for
    Re z ≤ 0. Before the first input there is 0.
    """
    A_bar, whole, _ = mamba(A, B, dt, dense=dense)
    return Discrete(A_bar, whole / 2, (A_bar @ whole if dense else A_bar * whole) / 2)


RULES = {rule.__name__: rule for rule in (mamba, zoh, bilinear, euler, trapezoidal)}


def _diagonal(A, B, dt, rule):
    A_bar, p = factors(dt * A, rule)
    return Discrete(A_bar, dt * p * B)


# ---- elementwise, as a scan needs them -------------------------------------------------------------------------


def factors(z: Tensor, rule: str) -> tuple[Tensor, Tensor | float]:
    """(a, p) of h_k = a h_{k-1} + Δ p B u_k, the same shape as z = Δ A; p is a number where it depends on nothing."""
    if rule == "mamba":
        return torch.exp(z), 1
    if rule == "trapezoidal":
        return torch.exp(z), 0.5
    if rule == "euler":
        return 1 + z, 1
    if rule == "bilinear":
        p = 1 / (1 - z / 2)
        return (1 + z / 2) * p, p
    return _exponentials(z)


def _exponentials(z):
    """e^z and (e^z - 1)/z, right in all digits, and in their gradients too, however small z is.

    Within |z| < 1 by the series of φ₂(z) = Σ z^k / (k + 2)!: then (e^z - 1)/z = 1 + z φ₂ and e^z = 1 + z + z² φ₂.
    """
    small = z.abs() < 1
    near, far = torch.where(small, z, 0), torch.where(small, 1, z)  # each branch sees only what it can bear
    phi = torch.zeros_like(near)
    for k in range(_TERMS + 1, 1, -1):  # Horner: 1/2! (1 + z/3 (1 + z/4 (…)))
        phi = (1 + near * phi) / k
    p = 1 + near * phi
    e = torch.exp(far)
    return torch.where(small, 1 + near * p, e), torch.where(small, p, (e - 1) / far)
