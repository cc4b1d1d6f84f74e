"""Time-invariant models h_t = A_bar h_{t-1} + B_bar x_t, y_t = C h_t whose A_bar is a whole matrix, all real.

Axes: b batch, t time, d channels, n state, q c chunks and place in one.
"""

import torch
import torch.nn.functional as F

from anymamba.reference.lti import toeplitz


def recurrence(x, A_bar, B_bar, C, initial_state=None):
    """A loop over time: x (b,t,d), A_bar (d,n,n), B_bar, C (d,n), initial_state (b,d,n) → y (b,t,d), final_state."""
    h = x.new_zeros(x.shape[0], *B_bar.shape) if initial_state is None else initial_state
    y = []
    for x_t in x.unbind(1):
        h = torch.einsum("dnm,bdm->bdn", A_bar, h) + B_bar * x_t[:, :, None]
        y.append((C * h).sum(-1))
    return torch.stack(y, 1) if y else x, h


def chunked(x, A_bar, B_bar, C, initial_state=None, lengths=None, *, chunk_size=64):
    """What `recurrence` gives, as products of matrices: a convolution within each chunk, and the state between chunks.

    With `lengths` (b,) the state is that after so many steps of each row. chunk_size is a power of 2. A step takes
    about c + 2 n + n²/c products a channel, where the loop takes n² + 2 n one after the other.
    """
    b, t, d = x.shape
    h = x.new_zeros(b, *B_bar.shape) if initial_state is None else initial_state
    if x.numel() == 0:
        return x, h
    c = 1
    while c < min(t, chunk_size):
        c *= 2
    squares = _squares(A_bar, c)
    written = _powers(B_bar, [v.mT for v in squares[:-1]])  # (d,c,n): A_bar^k B_bar, what an input leaves k steps later
    read = _powers((C[:, None] @ A_bar)[:, 0], squares[:-1])  # (d,c,n): C A_bar^(k+1), what is read of the state before
    K = (written @ C[..., None])[..., 0]  # (d,c)

    xs = F.pad(x.permute(2, 0, 1), (0, -t % c)).reshape(d, -1, c)
    added, states = (xs @ written.flip(1)).view(d, b, -1, B_bar.shape[1]), [h.transpose(0, 1)]
    for added_q in added.unbind(2):
        states.append(torch.baddbmm(added_q, states[-1], squares[-1].mT))
    states = torch.stack(states, 2)  # (d,b,q+1,n): before each chunk, and at the end
    y = (xs @ toeplitz(K)).baddbmm(states[:, :, :-1].flatten(1, 2), read.mT).view(d, b, -1)[..., :t].permute(1, 2, 0)
    if lengths is None and t % c == 0:
        return y, states[:, :, -1].transpose(0, 1)
    lengths = torch.full((b,), t, device=x.device) if lengths is None else lengths
    return y, _state_after(x, lengths, states, written, squares[:-1])


def _squares(A_bar, c):
    """A_bar, A_bar², A_bar⁴, …, A_bar^c, made in float64 as `lti.powers` has it."""
    square = A_bar if A_bar.device.type == "mps" else A_bar.double()
    found = [A_bar]
    while 2 ** len(found) <= c:
        square = square @ square
        found.append(square.to(A_bar.dtype))
    return found


def _powers(v, squares):
    """(d,2^k,n): v (d,n) times M⁰, M¹, M², …, where `squares` are the k matrices M, M², M⁴, …"""
    v = v[:, None]
    for square in squares:
        v = torch.cat([v, v @ square], 1)
    return v


def _state_after(x, lengths, states, written, squares):
    """(b,d,n) after `lengths` (b,) steps of each row: from the state before their last chunk, its first r steps."""
    c, rows = written.shape[1], torch.arange(len(lengths), device=x.device)
    q, r = lengths // c, lengths % c
    h = states[:, rows, q]  # (d,b,n)
    for i, square in enumerate(squares):  # A_bar^r h, by the bits of r
        h = torch.where(((r >> i) & 1).bool()[:, None], h @ square.mT, h)
    place = torch.arange(c, device=x.device) + (lengths - c)[:, None]  # of the c inputs that end there: (b,c)
    last = x.take_along_dim(place.clamp(min=0)[..., None], 1) * (place >= (q * c)[:, None])[..., None]
    return (h + last.permute(2, 0, 1) @ written.flip(1)).transpose(0, 1)
