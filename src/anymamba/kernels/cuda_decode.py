"""A token through a whole model on an NVIDIA GPU: `cuda_decode*.cu`, compiled by NVRTC, for bfloat16 weights.

Up to FEW rows a block is four kernels: in_proj with norm and convolution; x_proj; dt_proj with scan and gate; out_proj
with the residual stream. Each starts while the one before it ends. For more rows a library multiplies the large
matrices, and what is between stands in kernels of its own; but on Hopper up to WIDE rows, which have a product of
their own in place of the first.

Axes: b rows, m d_model, d d_inner, n d_state, r dt_rank, v padded vocabulary.
"""

import functools
import math
import struct

import torch

from anymamba.kernels.cuda_launch import load, tensor_map

FEW = 16
WIDE = 96  # rows up to which Hopper's tensor cores multiply faster here than in a library
THREADS = 256
STATES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTS, IN, OUT, LOGITS = range(4)  # what `product` does with its sums


def supports(config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels decode a model of this config and dtype on this device."""
    if config.inner_norm_eps is not None:
        return False
    sizes = config.d_model % 64 == 0 and config.d_inner % 64 == 0 and config.rank % 8 == 0
    if dtype != torch.bfloat16 or not sizes or config.d_state not in (8, 16, 32, 64, 128) or config.rank > 512:
        return False
    return _scan_bytes(config, 8, 4) <= _shared_limit(device)


@functools.cache
def _shared_limit(device):
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 2048  # the static part


def _is_hopper(device):
    return torch.cuda.get_device_capability(device) == (9, 0)


def product_plan(outputs: int, k: int, b: int, epilogue: int, limit: int) -> dict:
    """Tiles of 16 MT outputs and 8 NT rows; WARPS that share k, each DEPTH - 1 units of it ahead; units of a slice."""
    NT = next(NT for NT in (1, 2, 4, 8) if b <= 8 * NT or NT == 8)
    plan = {"MT": 1, "NT": NT, "WARPS": 8 if NT <= 2 else 4, "DEPTH": 3, "BLOCKS": 2, "units": k // 64}
    if epilogue == PARTS:  # few outputs: k is cut, such that there are blocks for the whole chip
        units = min(16, max(4, plan["units"] * math.ceil(outputs / 16) * math.ceil(b / 64) // 120))
        plan |= {"BLOCKS": 1, "units": 8 if b <= 4 else units}
    elif epilogue == OUT and NT == 1:  # the fewest blocks: more of the matrix is on its way before x is there
        plan["DEPTH"] = 4
    elif epilogue != OUT and NT == 2:  # many blocks, and smaller ones so that more run at a time
        plan |= {"DEPTH": 2, "BLOCKS": 3}
    while _product_bytes(plan) > limit:
        plan["DEPTH"] -= 1
    return plan


def wide_plan(outputs: int, k: int, b: int, epilogue: int, limit: int) -> dict:
    """Tiles of 64 GROUPS outputs and COLS rows; SPLIT blocks that share k; DEPTH units of 64 of it on their way."""
    tiles, units = math.ceil(outputs / 64), k // 64
    GROUPS = 2 if tiles * units >= 3000 else 1
    blocks = math.ceil(tiles / GROUPS)
    SPLIT = 1 if epilogue == LOGITS else next((n for n in (1, 2) if blocks * n >= 80), 4)  # else half the chip idles
    COLS = next(c for c in (32, 64, 96) if b <= c)
    plan = {"GROUPS": GROUPS, "COLS": COLS, "SPLIT": SPLIT, "DEPTH": min(8 if SPLIT == 1 else 6, units)}
    while _wide_bytes(plan) > limit:
        plan["DEPTH"] -= 1
    return plan


def _wide_bytes(plan):
    """Of shared memory: the ring, or the sums."""
    outputs = 64 * plan["GROUPS"]
    return max(plan["DEPTH"] * (outputs + plan["COLS"]) * 128, plan["COLS"] * (outputs + 4) * 4)


def _product_bytes(plan):
    """Of shared memory: the rings, or the warps' sums."""
    rows, columns = 16 * plan["MT"], 8 * plan["NT"]
    return plan["WARPS"] * max(plan["DEPTH"] * (rows + columns) * 128, rows * (columns + 1) * 4)


def _scan_bytes(config, rows, element):
    """Of `struct Shared` of cuda_decode_step.cu, for states of so many bytes."""
    n, channels, pitch = config.d_state, _channels(config), math.ceil(config.rank / 16) * 16 + 8
    shared = rows * channels * (n * element + 4) + 2 * (channels + rows) * pitch
    return shared + 4 * rows * (2 * n + channels + 1) + 64


def _channels(config):
    """Of a block of the scan."""
    return 64 if config.d_state <= 64 else 32


class Step:
    """Decodes rows whose states are `layers`, in place; every call, with ids (b,), gives logits (b,v) in float32."""

    @torch.no_grad()
    def __init__(self, blocks, embedding, norm_f, head, config, layers):
        self.config, self.layers, self.device = config, layers, embedding.device
        self.b = len(layers[0].ssm)
        self.wide = FEW < self.b <= WIDE and _is_hopper(self.device)
        few = self.b <= FEW or self.wide
        small = layers[0].ssm.element_size() * config.d_state <= 32
        self.rows = 16 if small and self.b > FEW else 8  # of a block of the scan
        self.eps = struct.unpack("<i", struct.pack("<f", config.norm_eps))[0]
        self.kept = []  # what launches point to
        m, d, n, r = config.d_model, config.d_inner, config.d_state, config.rank
        self.stream, self.x = self._empty(m, torch.float32), self._empty(m)
        self.xz, self.xc, self.y, self.out = self._empty(2 * d), self._empty(d), self._empty(d), self._empty(m)
        self.squares = self._empty(m // 16, torch.float32)
        self.logits = self._empty(len(head), torch.float32)
        self.slices = math.ceil(d // 64 / self._plan(PARTS, r + 2 * n, d)["units"])
        self.parts = torch.empty(self.slices, self.b, r + 2 * n, device=self.device)
        norms = [block.norm for block in blocks] + [norm_f]
        self.embedding, self.first = self._at(embedding), self._at(norms[0])
        self.calls, self.shares = [], 0  # shares: of the sum of squares that the next norm has to add
        for block, state, norm in zip(blocks, layers, norms[1:], strict=True):
            (self._in if few else self._in_many)(block, state)
            self._scan(block, state)
            (self._out if few else self._out_many)(block, norm)
        (self._head if few else self._head_many)(head)

    def __call__(self, ids):
        # the first does not overlap what came before it
        self._residual_norm(self.first, self.embedding, ids.data_ptr(), overlap=False)
        for call in self.calls:
            call()
        return self.logits

    # ---- the parts of a step ----

    def _in(self, block, state):
        rest = (self.xc.data_ptr(), *self._conv(block, state))
        self._product(IN, block.in_proj, self.x, block.in_bias, self.xz, rest)

    def _in_many(self, block, state):
        self.calls.append(lambda: _multiply(self.x, block.in_proj, block.in_bias, self.xz))
        kernel, d = self._step_kernel("convolution"), self.config.d_inner
        args = (self.xz.data_ptr(), self.b, d, *self._conv(block, state), self.xc.data_ptr())
        grid = (math.ceil(self.b * d / (8 * THREADS)), 1, 1)
        self.calls.append(lambda: kernel.launch(grid, THREADS, 0, args, overlap=True))

    def _scan(self, block, state):
        c = self.config
        self._product(PARTS, block.x_proj, self.xc, None, self.parts)
        kernel, A = self._step_kernel("scan_step"), -block.A_log.float().exp() * math.log2(math.e)
        args = (self.parts.data_ptr(), self.b, c.d_inner, self.xc.data_ptr(), self.xz.data_ptr(),
                *map(self._at, (block.dt_proj, block.dt_bias.float(), A, block.D.float(), state.ssm)),
                self.y.data_ptr())  # fmt: skip
        grid = (c.d_inner // _channels(c), math.ceil(self.b / self.rows), 1)
        shared = self._scan_bytes()
        self.calls.append(lambda: kernel.launch(grid, THREADS, shared, args, overlap=True))

    def _out(self, block, next_norm):
        rest = (self.x.data_ptr(), 0, self._at(next_norm), 0)
        self._product(OUT, block.out_proj, self.y, block.out_bias, self.stream, rest)
        self.shares = math.ceil(self.config.d_model / self.grain)

    def _out_many(self, block, next_norm):
        self.calls.append(lambda: _multiply(self.y, block.out_proj, block.out_bias, self.out))
        weight = self._at(next_norm)
        self.calls.append(lambda: self._residual_norm(weight, self.out.data_ptr()))

    def _head(self, head):
        self._product(LOGITS, head, self.x, None, self.logits, (0, 0, 0, 0, self.config.vocab_size))

    def _head_many(self, head):
        rough = self._empty(len(head))

        def multiply():
            _multiply(self.x, head, None, rough)
            self.logits.copy_(rough)
            self.logits[:, self.config.vocab_size :] = -math.inf

        self.calls.append(multiply)

    # ---- launches ----

    def _plan(self, epilogue, outputs, k):
        return product_plan(outputs, k, self.b, epilogue, _shared_limit(self.device))

    def _product(self, epilogue, matrix, x, bias, out, rest=()):
        (outputs, k), b = matrix.shape, self.b
        if self.wide and epilogue != PARTS:
            return self._wide_product(epilogue, matrix, x, bias, out, rest)
        plan = self._plan(epilogue, outputs, k)
        units, shared = plan.pop("units"), _product_bytes(plan)
        self.grain = min(32, 16 * plan["MT"])
        kernel = self._kernel("product", "product", EPILOGUE=epilogue, TAPS=self.config.d_conv, **plan)
        args = (self._at(matrix), x.data_ptr(), outputs, k, b, units, self._at(bias), self.squares.data_ptr(),
                self.shares, self.eps, out.data_ptr(), *rest, *(0,) * (5 - len(rest)))  # fmt: skip
        grid = tuple(map(math.ceil, (outputs / (16 * plan["MT"]), k // 64 / units, b / (8 * plan["NT"]))))
        self.calls.append(lambda: kernel.launch(grid, 32 * plan["WARPS"], shared, args, overlap=True))

    def _wide_product(self, epilogue, matrix, x, bias, out, rest):
        (outputs, k), b = matrix.shape, self.b
        plan = wide_plan(outputs, k, b, epilogue, _shared_limit(self.device))
        shared, self.grain = _wide_bytes(plan), 64 * plan["GROUPS"]
        kernel = self._kernel("wide", "wide_product", EPILOGUE=epilogue, TAPS=self.config.d_conv, **plan)
        self._at(matrix)
        maps = (self._kept(tensor_map(self.kept[-1], self.grain)), self._kept(tensor_map(x, plan["COLS"])))
        units = math.ceil(k // 64 / plan["SPLIT"])
        args = (*(v.data_ptr() for v in maps), outputs, k, b, units, self._at(bias), self.squares.data_ptr(),
                self.shares, self.eps, out.data_ptr(), *rest, *(0,) * (5 - len(rest)))  # fmt: skip
        grid = (math.ceil(outputs / self.grain), plan["SPLIT"], 1)
        self.calls.append(lambda: kernel.launch(grid, 128 * plan["GROUPS"] + 32, shared, args, overlap=True))

    def _residual_norm(self, weight, add, ids=0, overlap=True):
        kernel, m = self._step_kernel("residual_norm"), self.config.d_model
        args = (ids, add, m, self.eps, weight, self.stream.data_ptr(), self.x.data_ptr())
        kernel.launch((self.b, 1, 1), THREADS, 0, args, overlap=overlap)

    def _conv(self, block, state):
        return self._at(state.conv), self._at(block.conv), self._at(block.conv_bias)

    def _scan_bytes(self):
        return _scan_bytes(self.config, self.rows, self.layers[0].ssm.element_size())

    def _step_kernel(self, name):
        c, state = self.config, STATES[self.layers[0].ssm.dtype]
        sizes = {"STATE": state, "N": c.d_state, "RANK": c.rank, "TAPS": c.d_conv}
        return self._kernel("step", name, ROWS=self.rows, SLICES=self.slices, SHARED=self._scan_bytes(), **sizes)

    # ---- memory and kernels ----

    def _empty(self, columns, dtype=torch.bfloat16):
        return torch.empty(self.b, columns, dtype=dtype, device=self.device)

    def _at(self, v):
        """Address of a dense tensor that is kept, 0 for None."""
        if v is None:
            return 0
        v = v.detach()
        v = v if v.is_contiguous() and v.data_ptr() % 16 == 0 else v.clone(memory_format=torch.contiguous_format)
        return self._kept(v).data_ptr()

    def _kept(self, v):
        self.kept.append(v)
        return v

    def _kernel(self, file, name, **defines):
        return load(f"cuda_decode_{file}.cu", name, tuple(sorted(defines.items())), self.device)


@torch.no_grad()
def _multiply(x, matrix, bias, out):
    if bias is None:
        torch.mm(x, matrix.T, out=out)
    else:
        torch.addmm(bias, x, matrix.T, out=out)
