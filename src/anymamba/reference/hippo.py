"""Initial state matrices of time-invariant models: HiPPO-LegS and the diagonal ones that stand in for it.

Sources: S4 (arXiv 2111.00396, equation 2 and appendix C.1), S4D (arXiv 2206.11893, section 4).
All are computed in float64 and complex128. Axes: n state.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A (n,n), B (n,). The state holds the coefficients of the past in Legendre polynomials.

    A_ij = -√(2i+1) √(2j+1) below the diagonal, -(i+1) on it, 0 above; B_i = √(2i+1).
    """
    B = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    return -(torch.tril(torch.outer(B, B), -1) + torch.diag((B.square() + 1) / 2)), B


def normal_plus_low_rank(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LegS as V (diag(L) - P P*) V*: L (n,) complex eigenvalues by rising imaginary part, P (n,), B (n,), V (n,n).

    A + p pᵀ with p_i = √(i+1/2) is -1/2 plus a skew-symmetric matrix, which has orthogonal eigenvectors; P = V* p and
    the B given are in their basis.
    """
    A, B = legs(n)
    p = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(p, p) + torch.eye(n, dtype=torch.float64) / 2
    imaginary, V = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary), V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype), V


# ---- diagonals: one of each pair of conjugates ------------------------------------------------------------------


def s4d_legs(pairs: int) -> Tensor:
    """The eigenvalues of LegS's normal part: LegS without its low-rank term (section 4.1)."""
    return normal_plus_low_rank(2 * pairs)[0][pairs:]


def s4d_inv(pairs: int) -> Tensor:
    """-1/2 + i (N/π) (N/(2n+1) - 1), N = 2·pairs: close to the eigenvalues of LegS (equation 8)."""
    size = 2 * pairs
    return _complex(-0.5, size / math.pi * (size / (2 * torch.arange(pairs, dtype=torch.float64) + 1) - 1))


def s4d_lin(pairs: int) -> Tensor:
    """-1/2 + iπn: the frequencies of a Fourier series (equation 9)."""
    return _complex(-0.5, math.pi * torch.arange(pairs, dtype=torch.float64))


def s4d_real(pairs: int) -> Tensor:
    """-(n+1): LegS's own eigenvalues, real; what Mamba starts from (section 4.3)."""
    return _complex(-1 - torch.arange(pairs, dtype=torch.float64), torch.zeros(pairs, dtype=torch.float64))


DIAGONALS: dict[str, Callable[[int], Tensor]] = {"lin": s4d_lin, "inv": s4d_inv, "real": s4d_real, "legs": s4d_legs}


def _complex(real, imaginary):
    return torch.complex(torch.as_tensor(real, dtype=torch.float64).expand_as(imaginary), imaginary)
