"""Decoding by a Transformer of the size of mamba-2.8b, beside mamba-2.8b: against batch, against context, in memory.

    python benchmarks/gpu_transformer.py [--quick] [--save]

The Transformer is Llama-shaped: 32 layers of width 2560, 32 heads of 80, SwiGLU, rotary positions, RMS norm, tied head,
2.76 G parameters, bfloat16, random weights, the cache of keys and values allocated beforehand. All between the matrix
products is fused by torch.compile, layer by layer, for nothing could be fused across their bounds: the residual is
added where the next norm reads it. Attention is the fastest of FlashAttention (which splits a long cache over the
GPU), cuDNN's, the memory-efficient one and two batched products, measured for each row. A step with its argmax is one
CUDA graph; Mamba's time includes the host's Python, the Transformer's does not.
Floors: weights once, and cache or state, at the bandwidth of a copy. A Mamba step is the same at every context.
Earlier, such a Transformer on an H200 at context 2048: 333, 2775, 4908, 5552 tokens/s at batch 1, 16, 64, 128.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymamba import MambaConfig, MambaState
from common import median
from decoding import DEVICE, Loop, build, greedy_times, random_ids, rate, state_of, step_bytes
from gpu_common import GpuReport, graph_times, options, release

SIZES = {"layers": 32, "width": 2560, "heads": 32, "hidden": 7296, "vocabulary": 50280}
PRESET = "2.8b"
CONTEXT = 2048
CONTEXTS = {1: (512, 2048, 8192, 32768, 131072), 16: (512, 2048, 8192, 16384), 64: (CONTEXT,), 128: (CONTEXT,)}
EARLIER = {1: 333, 16: 2775, 64: 4908, 128: 5552}  # at CONTEXT
TARGET = (128, 8.0)  # at this batch so many times as fast; 5 in arXiv 2312.00752, section 4.5
SPARE = 3 << 30  # bytes of memory beside weights and cache


# ---- the Transformer -------------------------------------------------------------------------------------------


def enter(residual, delta, norm, qkv, turn, keys, values):
    """(b,m) twice → the residual and queries (b,h,p); keys and values go to their place (b,h,p) in the cache."""
    residual = residual + delta
    x = F.rms_norm(residual, norm.shape, norm, 1e-5) @ qkv.T
    q, k, v = x.unflatten(1, (3, -1, 2 * turn.shape[-1])).unbind(1)
    keys.copy_(rotate(k, turn))
    values.copy_(v)
    return residual, rotate(q, turn)


def leave(residual, attended, out, norm, gate_up, down):
    """What attention gave (b,h,p) → the residual after it, and what the MLP adds to it, (b,m) each."""
    residual = residual + attended.flatten(1) @ out.T
    gate, up = (F.rms_norm(residual, norm.shape, norm, 1e-5) @ gate_up.T).chunk(2, dim=-1)
    return residual, (F.silu(gate) * up) @ down.T


def finish(residual, delta, norm, head):
    """The most probable id (b,), and the logits (b,v)."""
    logits = F.rms_norm(residual + delta, norm.shape, norm, 1e-5) @ head.T
    return logits.argmax(-1), logits


def rotate(x, turn):
    """Rotary positions: x (b,h,p), turn (2,p/2) cosines and sines of one position."""
    (cos, sin), (a, b) = turn, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Transformer:
    """Weights and cache. Axis letters: b rows, m width, h heads, p their width, f hidden, t positions."""

    def __init__(self, *, layers, width, heads, hidden, vocabulary, device=DEVICE, dtype=torch.bfloat16):
        new = functools.partial(torch.empty, device=device, dtype=dtype)
        self.heads, self.head_width = heads, width // heads
        self.embedding = new(vocabulary, width).normal_(0, 0.02)
        shapes = {"qkv": (3 * width, width), "out": (width, width), "gate_up": (2 * hidden, width),
                  "down": (width, hidden)}  # fmt: skip
        self.layers = [{k: new(s).normal_(0, s[1] ** -0.5) for k, s in shapes.items()} for _ in range(layers)]
        for layer in self.layers:
            layer |= {"norm_1": new(width).fill_(1), "norm_2": new(width).fill_(1)}
        self.norm = new(width).fill_(1)
        self.parts = enter, leave, finish

    def compile(self):
        self.parts = tuple(torch.compile(part, dynamic=False, fullgraph=True) for part in (enter, leave, finish))

    def num_params(self) -> int:
        return sum(w.numel() for layer in self.layers for w in layer.values()) + self.embedding.numel()

    def cache_bytes(self, b, t) -> int:
        """Of the keys and values of t positions in b rows."""
        return 2 * len(self.layers) * b * self.heads * t * self.head_width * self.embedding.element_size()

    def allocate(self, b, t):
        """A cache of random keys and values for t positions of b rows."""
        new = functools.partial(self.embedding.new_empty, (b, self.heads, t, self.head_width))
        self.keys, self.values = ([new().normal_() for _ in self.layers] for _ in range(2))
        frequency = 1e4 ** -torch.linspace(0, 1, self.head_width // 2 + 1)[:-1]
        angle = torch.arange(t)[:, None] * frequency
        self.turns = torch.stack([angle.cos(), angle.sin()], 1).to(self.embedding)

    def step(self, ids, position, attend):
        """One token (b,) at a position: the most probable next ids (b,), and the logits (b,v)."""
        enter, leave, finish = self.parts
        residual, turn = self.embedding[ids], self.turns[position]
        delta = torch.zeros_like(residual)
        for w, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            place = keys[:, :, position], values[:, :, position]
            residual, q = enter(residual, delta, w["norm_1"], w["qkv"], turn, *place)
            attended = attend(q, keys[:, :, : position + 1], values[:, :, : position + 1])
            residual, delta = leave(residual, attended, w["out"], w["norm_2"], w["gate_up"], w["down"])
        return finish(residual, delta, self.norm, self.embedding)


# ---- attention of one query (b,h,p) to keys and values (b,h,t,p) -----------------------------------------------


def sdpa(backend):
    def attend(q, keys, values):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]

    return attend


def products(q, keys, values):
    scores = keys @ (q * q.shape[-1] ** -0.5)[..., None]
    return (scores.float().softmax(2).to(q.dtype).mT @ values)[:, :, 0]


ATTENTION = {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
             "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION), "products": products}  # fmt: skip


def fastest(q, keys, values):
    """The name of the fastest attention, and the seconds of each that runs here."""
    times = {}
    for name, attend in ATTENTION.items():
        try:
            times[name] = median(graph_times(functools.partial(attend, q, keys, values), 0.02))
        except RuntimeError as error:  # not for these shapes or this GPU
            print(f"  {name} attention does not run: {str(error).splitlines()[0][:100]}", flush=True)
            release()
    return min(times, key=times.get), times


# ---- rows ------------------------------------------------------------------------------------------------------


def mamba(report, batches):
    """{batch: tokens a second}"""
    found, model = {}, build(PRESET)
    for b in batches:
        with report.row(f"mamba b={b}"):
            times = greedy_times(Loop(model, state_of(model, b)), random_ids(model, b), budget=0.7)
            found[b], floor = rate(times, b), step_bytes(model, b) / report.bandwidth
            text = f"{found[b]:9,.0f} tokens/s, {median(times) / floor:4.2f} × floor"
            report.timed(f"mamba b={b}", times, text, model="mamba", batch=b, tokens_per_s=found[b], floor=floor)
    return found


def transformer(report, model, b, contexts, ours):
    """Rows of one batch size. `ours`: Mamba's tokens a second, None if it has none."""
    room = torch.cuda.mem_get_info()[0] - SPARE
    fitting = [t for t in contexts if model.cache_bytes(b, t) <= room]
    for t in contexts[len(fitting) :]:
        text = f"left out: a cache of {model.cache_bytes(b, t) / 1e9:.1f} GB, {room / 1e9:.1f} are free"
        report.add(f"transformer b={b} t={t}", text, missing=model.cache_bytes(b, t))
    if not fitting:
        return
    model.allocate(b, fitting[-1])
    for t in fitting:
        with report.row(f"transformer b={b} t={t}"):
            row(report, model, b, t, ours)


def row(report, model, b, t, ours):
    q = torch.randn(b, model.heads, model.head_width, device=DEVICE).to(model.embedding)
    name, tried = fastest(q, model.keys[0][:, :, :t], model.values[0][:, :, :t])
    ids = torch.randint(0, len(model.embedding), (b,), device=DEVICE)
    times = graph_times(lambda: ids.copy_(model.step(ids, t - 1, ATTENTION[name])[0]), 0.4)
    weights = model.num_params() * model.embedding.element_size()
    here, floor = rate(times, b), (weights + model.cache_bytes(b, t)) / report.bandwidth
    text = f"{here:9,.0f} tokens/s, {median(times) / floor:4.2f} × floor, {name}"
    text += f", earlier {EARLIER[b]:,}" if t == CONTEXT else ""
    report.timed(f"transformer b={b} t={t}", times, text, model="transformer", batch=b, context=t, tokens_per_s=here,
                 floor=floor, attention=name, attention_ms={k: v * 1e3 for k, v in tried.items()})  # fmt: skip
    if t == CONTEXT and ours is not None:
        batch, target = TARGET
        met = f"   (target ≥ {target:g}: {'met' if ours / here >= target else 'NOT MET'})" if b == batch else ""
        report.add(f"mamba over transformer b={b} t={t}", f"{ours / here:8.2f} ×{met}", ratio=ours / here, batch=b)


def memory(report, model):
    """What one row keeps of its text."""
    state = MambaState.zeros(MambaConfig.preset(PRESET), 1, device="meta", dtype=torch.bfloat16).nbytes
    for t in CONTEXTS[1]:
        cache = model.cache_bytes(1, t)
        text = f"cache {cache / 1e6:9.1f} MB, state {state / 1e6:6.1f} MB, {cache / state:7.1f} ×"
        report.add(f"memory of a row, t={t}", text, context=t, cache=cache, state=state)


@torch.no_grad()
def main() -> int:
    args = options(__doc__)
    contexts = {1: (512, CONTEXT)} if args.quick else CONTEXTS
    report, ours = GpuReport("gpu_transformer"), {}
    with report.row("mamba"):
        ours = mamba(report, contexts)
    torch.manual_seed(0)
    model = Transformer(**SIZES)
    model.compile()
    report.add("parameters", f"{model.num_params() / 1e9:.3f} G of the Transformer", transformer=model.num_params())
    with report.row("memory of a row"):
        memory(report, model)
    for b in contexts:
        with report.row(f"transformer b={b}"):
            transformer(report, model, b, contexts[b], ours.get(b))
            model.keys = model.values = None
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
