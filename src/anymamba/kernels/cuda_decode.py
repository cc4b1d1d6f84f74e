"""A token through a whole model on an NVIDIA GPU: `cuda_decode*.cu`, compiled by NVRTC, for bfloat16 weights.

Up to FEW rows a block is four kernels: in_proj with norm and convolution; x_proj; dt_proj with scan and gate; out_proj
with the residual stream. Each starts while the one before it ends. For more rows a library multiplies the large
matrices, and what is between stands in kernels of its own.

Axes: b rows, m d_model, d d_inner, n d_state, r dt_rank, v padded vocabulary.
"""

import math
import struct

import torch

from anymamba.kernels.cuda_launch import load

FEW = 16
THREADS = 256
STATES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTS, IN, OUT, LOGITS = range(4)  # what `product` does with its sums


def supports(config, dtype: torch.dtype) -> bool:
    """Whether the kernels decode a model of this config and dtype."""
    sizes = config.d_model % 64 == 0 and config.d_inner % 64 == 0 and config.rank % 8 == 0
    return dtype == torch.bfloat16 and sizes and config.d_state in (8, 16, 32, 64, 128) and config.rank <= 512


def product_plan(outputs: int, k: int, b: int, epilogue: int) -> dict:
    """Tiles of 16 MT outputs and 8 NT rows; WARPS that share k, each DEPTH - 1 units of it ahead; units of a slice."""
    NT = next(NT for NT in (1, 2, 4, 8) if b <= 8 * NT or NT == 8)
    units = k // 64
    if epilogue == PARTS:
        units = 8 if b <= 4 else min(16, max(4, units * math.ceil(outputs / 16) * math.ceil(b / 64) // 120))
        return {"MT": 1, "NT": NT, "WARPS": 8 if NT <= 2 else 4, "DEPTH": 3, "BLOCKS": 1, "units": units}
    depth = 4 if epilogue == OUT and NT == 1 else 3  # what the fewest blocks bring before x is there
    return {"MT": 1, "NT": NT, "WARPS": 8 if NT <= 2 else 4, "DEPTH": depth, "BLOCKS": 2, "units": units}


def ways(b: int, m: int) -> tuple[str, str]:
    """How [x; z] and what is added to the stream are computed: "fused", "split" or by a "library"."""
    return ("fused" if b <= FEW else "library"), ("fused" if b <= FEW else "library")


class Step:
    """Decodes rows whose states are `layers`, in place; every call, with ids (b,), gives logits (b,v) in float32."""

    @torch.no_grad()
    def __init__(self, blocks, embedding, norm_f, head, config, layers):
        self.config, self.layers, self.device = config, layers, embedding.device
        self.b = len(layers[0].ssm)
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.eps = struct.unpack("<i", struct.pack("<f", config.norm_eps))[0]
        self.kept = []  # what launches point to
        m, d, n, r = config.d_model, config.d_inner, config.d_state, config.rank
        self.stream, self.x = self._empty(m, torch.float32), self._empty(m)
        self.xz, self.xc, self.y, self.out = self._empty(2 * d), self._empty(d), self._empty(d), self._empty(m)
        self.squares = self._empty(m // 16, torch.float32)
        self.logits = self._empty(len(head), torch.float32)
        self.slices = math.ceil(d // 64 / product_plan(r + 2 * n, d, self.b, PARTS)["units"])
        self.parts = torch.empty(self.slices, self.b, r + 2 * n, device=self.device)
        norms = [block.norm for block in blocks] + [norm_f]
        self.embedding, self.first = self._at(embedding), self._at(norms[0])
        self.calls, self.shares = [], 0  # shares: of the sum of squares that the next norm has to add
        by_in, by_out = ways(self.b, m)
        for block, state, norm in zip(blocks, layers, norms[1:], strict=True):
            getattr(self, f"_in_{by_in}")(block, state)
            self._scan(block, state)
            getattr(self, f"_out_{by_out}")(block, norm)
        self._head(head)

    def __call__(self, ids):
        # the first does not overlap what came before it
        self._residual_norm(self.first, ids=ids.data_ptr(), add=self.embedding, overlap=False)
        for call in self.calls:
            call()
        return self.logits

    # ---- the parts of a step ----

    def _in_fused(self, block, state):
        rest = (self.xc.data_ptr(), *self._conv(block, state))
        self._product(IN, block.in_proj, self.x, block.in_bias, self.xz, rest)

    def _in_library(self, block, state):
        self.calls.append(lambda: _multiply(self.x, block.in_proj, block.in_bias, self.xz))
        kernel, d = self._step_kernel("convolution"), self.config.d_inner
        args = (self.xz.data_ptr(), self.b, d, *self._conv(block, state), self.xc.data_ptr())
        grid = (math.ceil(self.b * d / THREADS), 1, 1)
        self.calls.append(lambda: kernel.launch(grid, THREADS, 0, args, overlap=True))

    def _scan(self, block, state):
        c, slices = self.config, self._product(PARTS, block.x_proj, self.xc, None, self.parts)
        assert slices == self.slices
        kernel, A = self._step_kernel("scan_step"), -block.A_log.float().exp() * math.log2(math.e)
        args = (self.parts.data_ptr(), self.b, c.d_inner, self.xc.data_ptr(), self.xz.data_ptr(),
                *map(self._at, (block.dt_proj, block.dt_bias.float(), A, block.D.float(), state.ssm)),
                self.y.data_ptr())  # fmt: skip
        channels, pitch = 64 if c.d_state <= 64 else 32, -(-c.rank // 16) * 16 + 8
        ROWS = self._rows()
        stage = ROWS * channels * (c.d_state * state.ssm.element_size() + 4)
        shared = self._stages() * stage + 2 * (channels + ROWS) * pitch + 4 * ROWS * (2 * c.d_state + channels + 1) + 64
        grid = (c.d_inner // channels, self._columns(), 1)
        self.calls.append(lambda: kernel.launch(grid, THREADS, shared, args, overlap=True))

    def _columns(self):
        """Blocks that share the rows of the scan: as many as run at a time, with as many rows each."""
        groups = math.ceil(self.b / self._rows())
        at_once = 2 * self.multiprocessors // (self.config.d_inner // 64)
        return math.ceil(groups / math.ceil(groups / max(1, at_once)))

    def _rows(self):
        """Rows that a block of the scan has at a time."""
        small = self.layers[0].ssm.element_size() * self.config.d_state <= 32
        return 16 if small and self.b > 16 else 8

    def _stages(self):
        return 1 if self._columns() * self._rows() >= self.b else 2

    def _out_fused(self, block, next_norm):
        rest = (self.x.data_ptr(), 0, self._at(next_norm), 0)
        self._product(OUT, block.out_proj, self.y, block.out_bias, self.stream, rest)
        self.shares = self.config.d_model // self.grain

    def _out_library(self, block, next_norm):
        self.calls.append(lambda: _multiply(self.y, block.out_proj, block.out_bias, self.out))
        weight = self._at(next_norm)
        self.calls.append(lambda: self._residual_norm(weight, add=self.out.data_ptr()))

    def _head(self, head):
        vocab = self.config.vocab_size
        if ways(self.b, self.config.d_model)[0] == "fused":
            self._product(LOGITS, head, self.x, None, self.logits, (0, 0, 0, 0, vocab))
            return
        rough = self._empty(len(head))

        def multiply():
            _multiply(self.x, head, None, rough)
            self.logits.copy_(rough)
            self.logits[:, vocab:] = -math.inf

        self.calls.append(multiply)

    # ---- launches ----

    def _product(self, epilogue, matrix, x, bias, out, rest=(), **forced):
        (outputs, k), b = matrix.shape, self.b
        plan = product_plan(outputs, k, b, epilogue) | forced
        units = plan.pop("units")
        self.grain = min(32, 16 * plan["MT"])
        rows, columns, warps = 16 * plan["MT"], 8 * plan["NT"], plan["WARPS"]
        shared = warps * max(plan["DEPTH"] * (rows + columns) * 128, rows * (columns + 1) * 4)
        slices = math.ceil(k // 64 / units)
        kernel = self._kernel("product", "product", EPILOGUE=epilogue, TAPS=self.config.d_conv, **plan)
        args = (self._at(matrix), x.data_ptr(), outputs, k, b, units, self._at(bias), self.squares.data_ptr(),
                self.shares, self.eps, out.data_ptr(), *rest, *(0,) * (5 - len(rest)))  # fmt: skip
        grid = (math.ceil(outputs / rows), slices, math.ceil(b / columns))
        self.calls.append(lambda: kernel.launch(grid, 32 * warps, shared, args, overlap=True))
        return slices

    def _residual_norm(self, weight, ids=0, add=0, parts=0, slices=0, bias=0, overlap=True):
        kernel, m = self._step_kernel("residual_norm"), self.config.d_model
        args = (ids, add, parts, slices, self.b, m, self.eps, bias, weight, self.stream.data_ptr(), self.x.data_ptr())
        kernel.launch((self.b, 1, 1), THREADS, 0, args, overlap=overlap)

    def _conv(self, block, state):
        return self._at(state.conv), self._at(block.conv), self._at(block.conv_bias)

    def _step_kernel(self, name):
        c, state = self.config, STATES[self.layers[0].ssm.dtype]
        sizes = {"STATE": state, "N": c.d_state, "RANK": c.rank, "TAPS": c.d_conv}
        return self._kernel("step", name, ROWS=self._rows(), SLICES=self.slices, STAGES=self._stages(), **sizes)

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
