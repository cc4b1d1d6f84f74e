"""S4's state matrix, diagonal plus low rank: A = diag(L) - P P* (arXiv 2111.00396, section 3).

The eigenvectors of HiPPO-LegS are all but parallel, so no computer can make it diagonal. Without a matrix of rank one,
P P*, it can be. Every inverse that S4 needs is then that of a diagonal E and one correction, by Woodbury's identity:

    (E + s P P*)⁻¹ v = E⁻¹ v - E⁻¹ P · s (P* E⁻¹ v) / (1 + s P* E⁻¹ P)

so a step costs O(n), and the kernel of the convolution a few sums over n at each of its frequencies. L, P, B, C (…,n)
are complex, in the basis where A + P P* is diagonal; `hippo.normal_plus_low_rank` makes them.

A layer learns the same in real numbers: a pair of conjugates -a ± iω is a block [[-a, -ω], [ω, -a]] of A, which acts on
a real and an imaginary part. So nothing must keep two halves of a pair equal while P ties each pair to all others.

Axes: n state, l frequencies of the kernel.
"""

import math

import torch
from torch import Tensor

from anymamba.reference import hippo

# ---- in steps --------------------------------------------------------------------------------------------------


def solve(E: Tensor, P: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """(diag(E) + s P P*)⁻¹ v by Woodbury: E, P, v (…,n), s (…,1); O(n)."""
    share = s * (P.conj() * v / E).sum(-1, keepdim=True) / (1 + s * (P.conj() * P / E).sum(-1, keepdim=True))
    return (v - share * P) / E


def step(h: Tensor, x: Tensor, L: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> Tensor:
    """The state after one input x (…), by the bilinear rule, in O(n): h, L, P, B (…,n), dt (…).

    (1 - Δ/2 A) h_new = (1 + Δ/2 A) h + Δ B x (equation 3).
    """
    half = dt[..., None] / 2
    right = (1 + half * L) * h - half * P * (P.conj() * h).sum(-1, keepdim=True) + 2 * half * B * x[..., None]
    return solve(1 - half * L, P, half, right)


def bilinear(L: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar (…,n,n) and B_bar (…,n) of that step: with z = Δ A, (1 + z/2) / (1 - z/2) = 2 / (1 - z/2) - 1."""
    half, one = dt[..., None] / 2, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    E = 1 - half * L
    columns = solve(E[..., None, :], P[..., None, :], half[..., None], one)  # of the inverse, one a row
    return 2 * columns.mT - one, 2 * half * solve(E, P, half, B)


# ---- as a convolution ------------------------------------------------------------------------------------------


def kernel(L: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """K_k = C A_bar^k B_bar for k < length, (…,length) complex: L, P, B, C (…,n), dt (…). Section 3.2, appendix C.3.

    The Fourier transform of K are the sums Σ K_k z^k at the z with z^length = 1, and these are

        C (1 - A_bar^length) (1 - z A_bar)⁻¹ B_bar = C (1 - A_bar^length) ((1 - z) - (1 + z) Δ/2 A)⁻¹ Δ B

    on the right with the bilinear rule put in. The inverse is one of diagonal plus low rank again: for each z four sums
    over n, each a product with a Cauchy matrix 1 / E. The paper divides them by 1 + z, which is 0 at z = -1. It learns
    C (1 - A_bar^length) in place of C, and so needs no power at all.
    """
    A_bar, _ = bilinear(L, P, B, dt)
    C = C - (C[..., None, :] @ torch.linalg.matrix_power(A_bar, length))[..., 0, :]
    z = torch.exp(-2j * math.pi * torch.arange(length, dtype=dt.dtype, device=dt.device) / length)[:, None]  # (l,1)
    L, P, B, C, dt = L[..., None, :], P[..., None, :], B[..., None, :], C[..., None, :], dt[..., None, None]
    half = (1 + z) * dt / 2
    at_each_z = (C * solve(1 - z - half * L, P, half, dt * B)).sum(-1)
    return torch.fft.ifft(at_each_z)


# ---- in real numbers -------------------------------------------------------------------------------------------


def legs(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO-LegS for an even n: a, ω (n/2,), P, B (n,), A = `matrix(a, ω, P)`, all real, in an orthogonal basis."""
    if n % 2:
        raise ValueError(f"dplr.legs: n={n}, but states come in pairs: take an even number")
    pairs = slice(n // 2, n)  # one of each: ω > 0, as eigenvalues come in rising order
    L, P, B, _ = hippo.normal_plus_low_rank(n)
    P, B = (math.sqrt(2) * torch.view_as_real(v[pairs].resolve_conj()).flatten() for v in (P, B))
    return -L.real[pairs], L.imag[pairs], P, B


def matrix(a: Tensor, omega: Tensor, P: Tensor) -> Tensor:
    """A (…,n,n): blocks [[-a, -ω], [ω, -a]] on the diagonal, minus P Pᵀ; a, ω (…,n/2), P (…,n).

    Stable whatever P and ω are, as long as a > 0: A + Aᵀ = -2 (a + P Pᵀ) is negative definite, so |h| can only fall.
    """
    return _blocks(-a, omega) - P[..., :, None] * P[..., None, :]


def bilinear_real(a: Tensor, omega: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar (…,n,n) and B_bar (…,n) of `matrix(a, ω, P)`: the inverse of blocks is blocks; Woodbury does the rest."""
    half = dt[..., None] / 2
    size = (1 + half * a).square() + (half * omega).square()
    E = _blocks((1 + half * a) / size, half * omega / size)  # the inverse of 1 - Δ/2 A but for P
    left, right = E @ P[..., None], P[..., None, :] @ E
    half = half[..., None]
    inverse = E - half * left * right / (1 + half * (P[..., None, :] @ left))
    one = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    return 2 * inverse - one, dt[..., None] * (inverse @ B[..., None])[..., 0]


def _blocks(real, imaginary):
    """(…,n,n) that multiplies as the n/2 complex numbers do: [[real, -imaginary], [imaginary, real]]."""
    blocks = torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], -2)
    pairs = torch.eye(real.shape[-1], dtype=real.dtype, device=real.device)
    return torch.einsum("...pij,pq->...piqj", blocks, pairs).flatten(-4, -3).flatten(-2)
