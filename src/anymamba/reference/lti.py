"""Time-invariant state-space models in their three equal forms: continuous, recurrence, convolution.

    h'(t) = A h(t) + B x(t),   y = C h                     continuous
    h_t = A_bar h_{t-1} + B_bar x_t,   y_t = C h_t         recurrence
    y = K * x,   K = (C B_bar, C A_bar B_bar, …)           convolution (S4, arXiv 2111.00396, equations 3 to 5)

A is diagonal, and each complex entry stands for itself and its conjugate (S4D, arXiv 2206.11893, section 3.3): y is
twice the real part. A step size that does not depend on the input is all that sets this apart from the selective scan.

Axes: b batch, t time, d channels, n pairs of the state, q c chunks and place in one.
"""

import math

import torch
import torch.nn.functional as F

# ---- recurrence ------------------------------------------------------------------------------------------------


def recurrence(x, A_bar, B_bar, C, initial_state=None):
    """A loop over time: x (b,t,d), A_bar, B_bar, C (d,n) complex, initial_state (b,d,n) → y (b,t,d), final_state."""
    h = _state(x, A_bar, initial_state)
    y = []
    for x_t in x.unbind(1):
        h = A_bar * h + B_bar * x_t[:, :, None]
        y.append(2 * (C * h).sum(-1).real)
    return torch.stack(y, 1) if y else x, h


# ---- convolution -----------------------------------------------------------------------------------------------


def kernel_by_powers(A_bar, B_bar, C, length):
    """K (d,length), one power after the other: the definition."""
    power, K = B_bar, []
    for _ in range(length):
        K.append(2 * (C * power).sum(-1).real)
        power = A_bar * power
    return torch.stack(K, -1)


def kernel(A_bar, B_bar, C, length):
    """K (…,d,length) as a Vandermonde product, Σ_n C B_bar A_bar^l, without ever holding all d·n·length powers.

    With l = q·c + r the sum is a product of two small matrices, A_bar^(q·c) and A_bar^r, for each channel. B_bar may
    have axes in front.
    """
    c = max(1, math.isqrt(length))
    inner = powers(A_bar, c + 1)
    outer = (C * B_bar)[..., None] * powers(inner[..., c], -(-length // c))
    K = outer.real.mT @ inner[..., :c].real - outer.imag.mT @ inner[..., :c].imag  # (…,d,q,c): a real part
    return 2 * K.flatten(-2)[..., :length]


def convolution(x, A_bar, B_bar, C, initial_state=None):
    """What `recurrence` gives, by fast Fourier transforms: O(t log t), and no step waits for another.

    Transforms are twice as long as the text, so that its end does not reach round to its beginning. The state before
    adds C A_bar^(t+1) h, a kernel of its own; the state after is `state_after`.
    """
    t = x.shape[1]
    if t == 0:
        return x, _state(x, A_bar, initial_state)
    K, xs = kernel(A_bar, B_bar, C, t), x.transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(xs, 2 * t) * torch.fft.rfft(K, 2 * t), 2 * t)[..., :t]
    if initial_state is not None:
        y = y + kernel(A_bar, A_bar * initial_state, C, t)
    return y.transpose(1, 2), state_after(x, A_bar, B_bar, initial_state)


def state_after(x, A_bar, B_bar, initial_state=None):
    """The final state (b,d,n) as one sum over time, Σ_l A_bar^(t-1-l) B_bar x_l + A_bar^t h, without the recurrence."""
    t = x.shape[1]
    c = max(1, math.isqrt(t))
    q = -(-t // c)
    inner = powers(A_bar, c + 1)
    outer = powers(inner[..., c], q + 1)
    xs = F.pad(x.transpose(1, 2), (q * c - t, 0)).unflatten(-1, (q, c))  # zeros in front change nothing
    sums = torch.einsum("bdqc,dnc->bdqn", xs.to(A_bar.dtype), inner[..., :c].flip(-1))
    h = B_bar * torch.einsum("bdqn,dnq->bdn", sums, outer[..., :q].flip(-1))
    return h if initial_state is None else h + A_bar**t * initial_state


def chunked(x, A_bar, B_bar, C, initial_state=None, *, chunk_size=64):
    """What `recurrence` gives, as products of matrices: a convolution within each chunk, and the state between chunks.

    O(t · chunk_size), and on real machines faster than the transforms: it reads x once and writes y once.
    """
    (b, t, d), h, c = x.shape, _state(x, A_bar, initial_state), chunk_size
    if t % c and t > c:
        y, h = chunked(x[:, : t - t % c], A_bar, B_bar, C, h, chunk_size=c)
        end, h = chunked(x[:, t - t % c :], A_bar, B_bar, C, h, chunk_size=c)
        return torch.cat([y, end], 1), h
    if x.numel() == 0:
        return x, h
    c = min(c, t)
    power = powers(A_bar, c + 1)  # (d,n,c+1)
    into = (B_bar[..., None] * power[..., :c].flip(-1)).mT  # (d,c,n): what each input leaves in the state
    K = 2 * ((C * B_bar)[..., None] * power[..., :c]).sum(1).real  # (d,c)

    xs = x.reshape(b, -1, c, d).permute(3, 0, 1, 2).contiguous().view(d, -1, c)
    added = torch.view_as_complex((xs @ _pairs(into)).view(d, b, t // c, -1, 2))
    before, h = [], h.transpose(0, 1)  # the state (d,b,n) before each chunk
    for added_q in added.unbind(2):
        before.append(h)
        h = torch.addcmul(added_q, power[:, None, :, c], h)
    states = _pairs(torch.stack(before, 2)).flatten(1, 2)
    out = _pairs((2 * C[..., None] * power[..., 1:]).conj().mT).mT  # 2 Re(C A^i h) as a real product: (d,2n,c)
    y = (xs @ toeplitz(K)).baddbmm_(states, out)
    return y.view(d, b, t).permute(1, 2, 0), h.transpose(0, 1)


def toeplitz(K):
    """K (d,c) as the matrices (d,c,c) that convolve rows of c inputs, from the right."""
    place = torch.arange(K.shape[1], device=K.device)
    lag = place - place[:, None]  # of output i behind input j: (j,i)
    return K[:, lag.clamp(min=0)] * (lag >= 0)


def powers(A_bar, count):
    """(1, A_bar, A_bar², …) on a new last axis, by doubling: log2(count) products.

    The squares are made in float64, or each would double the error of the one before; MPS has none.
    """
    wide = A_bar.dtype if A_bar.device.type == "mps" else torch.complex128
    found, square = torch.ones_like(A_bar)[..., None], A_bar[..., None].to(wide)
    while found.shape[-1] < count:
        found = torch.cat([found, found * square.to(found.dtype)], -1)
        square = square * square
    return found[..., :count]


def _pairs(v):
    """Complex (…,n) as real (…,2n)."""
    return torch.view_as_real(v.resolve_conj()).flatten(-2)


def _state(x, A_bar, initial_state):
    return A_bar.new_zeros(x.shape[0], *A_bar.shape) if initial_state is None else initial_state
