"""Fast versions of the functions in `reference/`, one op a file. They import nothing of the package."""

LANES = 16  # channels that a CPU kernel works on at once
WIDEST = 16  # convolution that a GPU kernel takes: its taps are unrolled


def chunk_length(n: int) -> int:
    """Steps between the states that a scan saves for its backward: their memory is at most half of x's."""
    return max(32, -(-2 * n // 32) * 32)
