"""mamba-130m on the CPU, random weights: prefill, training step, decoding, against the model's linear layers alone.

    python benchmarks/cpu_model.py              all of it, about ten minutes
    python benchmarks/cpu_model.py prefill      one part: prefill, train or decode

The floor of each is the time of its matrix products on the same shapes, measured in the same rounds: what a model with
a free scan, convolution and norm would take. Peer: transformers' MambaForCausalLM with the same weights.
"""

import torch
from torch.nn import functional as F

from anymamba import MambaConfig, MambaLM
from anymamba.generate.decode import Decoder
from common import Report, arguments, measure, median, quiet, ratio, spread


def build(dtype):
    torch.manual_seed(0)
    return MambaLM(MambaConfig.preset("130m")).to(dtype)


def peer(model, mambapy=False):
    from transformers import MambaConfig as PeerConfig
    from transformers import MambaForCausalLM

    c = model.config
    config = PeerConfig(vocab_size=c.padded_vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layer,
                        state_size=c.d_state, use_mambapy=mambapy)  # fmt: skip
    other = MambaForCausalLM(config).to(model.backbone.norm_f.weight.dtype)
    weights = {k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()}
    other.load_state_dict(weights)
    return other


def linears(model, t, backward=False):
    """The matrix products of a forward pass over t tokens (and of its backward), with nothing between them."""
    c, dtype = model.config, model.backbone.norm_f.weight.dtype
    x, xd = torch.randn(1, t, c.d_model, dtype=dtype), torch.randn(1, t, c.d_inner, dtype=dtype)
    xr = torch.randn(1, t, c.rank, dtype=dtype)

    def products():
        for layer in model.backbone.layers:
            m = layer.mixer
            yield m.in_proj, x
            yield m.x_proj, xd
            yield m.dt_proj, xr
            yield m.out_proj, xd
        yield model.lm_head, x

    def forward():
        with torch.inference_mode():
            for module, v in products():
                module(v)

    def forward_backward():
        for module, v in products():
            v = v.detach().requires_grad_()
            y = module(v)
            y.backward(y.detach())
        model.zero_grad(set_to_none=True)

    return forward_backward if backward else forward


def prefill(report, t=2048):
    ids = torch.randint(0, 50277, (1, t))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = build(dtype)
        other = peer(model)

        @torch.inference_mode()
        def ours(model=model):
            return model(ids).logits

        @torch.inference_mode()
        def theirs(other=other):
            return other(ids).logits

        if dtype == torch.float32:
            assert (ours()[:, :64] - other(ids[:, :64]).logits).abs().max() < 1e-3
        times = measure({"ours": ours, "linear": linears(model, t)}, rounds=7)
        times |= measure({"transformers": theirs}, rounds=1, settle=0)
        r, speed = ratio(times["ours"], times["linear"]), t / median(times["ours"])
        for key, v in times.items():
            report.add(f"prefill {t} {name}: {key}, ms", spread(v), median=median(v))
        report.add(f"prefill {t} {name} / linear layers", f"{r:8.2f} ×   (target ≤ 1.3), {speed:.0f} tokens/s",
                   ratio=r, tokens_per_s=speed)  # fmt: skip
        faster = times["transformers"][0] / median(times["ours"])
        report.add(f"prefill {t} {name} vs transformers", f"{faster:8.2f} ×   (target ≥ 20)", ratio=faster)


def train(report, t=1024):
    ids = torch.randint(0, 50277, (1, t + 1))
    model = build(torch.float32)

    def ours():
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
        model.zero_grad(set_to_none=True)

    times = measure({"ours": ours, "linear": linears(model, t, backward=True)}, rounds=5)
    other = peer(model, mambapy=True).train()

    def theirs():
        logits = other(ids[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    times |= measure({"transformers + mambapy": theirs}, rounds=1, settle=0)
    for key, v in times.items():
        report.add(f"training step {t} fp32: {key}, ms", spread(v), median=median(v))
    r = ratio(times["ours"], times["linear"])
    report.add(f"training step {t} / linear layers", f"{r:8.2f} ×   (target ≤ 1.5)", ratio=r)
    faster = times["transformers + mambapy"][0] / median(times["ours"])
    report.add(f"training step {t} vs transformers + mambapy", f"{faster:8.2f} ×   (target ≥ 5)", ratio=faster)


def decode(report, steps=20):
    from cpu_limits import reading

    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = build(dtype)
        other = peer(model)
        prompt, token = torch.randint(0, 50277, (1, 32)), torch.tensor([[17]])
        with torch.inference_mode():
            state = model(prompt).state
            cache = other(prompt, use_cache=True).cache_params

        @torch.inference_mode()
        def called(model=model, state=state, token=token):
            return model(token, state).logits

        @torch.inference_mode()
        def theirs(other=other, cache=cache, token=token):
            return other(token, cache_params=cache, use_cache=True).logits

        read, size = reading()
        functions = {"ours": steps_of(model, state, 1), "ours, 8 rows": steps_of(model, state, 8), "model": called,
                     "linear": linears(model, 1), "reading": read, "transformers": theirs}  # fmt: skip
        times = measure(functions, rounds=steps)
        for key, v in times.items():
            report.add(f"decode {name}: {key}, ms", spread(v), median=median(v))
        r, speed = ratio(times["ours"], times["linear"]), 1 / median(times["ours"])
        report.add(f"decode {name} / linear layers", f"{r:8.2f} ×   (target ≤ 1.3), {speed:.1f} tokens/s",
                   ratio=r, tokens_per_s=speed)  # fmt: skip
        share = ratio(times["reading"], times["ours"]) * model.bytes_per_step() / size
        report.add(f"decode {name}, share of the memory's speed", f"{share:8.2f}     (target ≥ 0.8)", ratio=share)
        r = 8 * ratio(times["ours"], times["ours, 8 rows"])
        report.add(f"decode {name}, 8 rows / 1 row in tokens/s", f"{r:8.2f} ×   (target ≥ 4)", ratio=r)
        report.compare(f"decode {name} vs model(ids, state)", times, "ours", "model", "> 1")
        report.compare(f"decode {name} vs transformers", times, "ours", "transformers", "> 1")


def steps_of(model, state, rows):
    """A function that decodes one token of `rows` rows, each call the next one."""
    decoder, ids, state = Decoder(model), torch.full((rows,), 17), state.fork(rows)

    def step():
        nonlocal state
        _, state = decoder.step(ids, state)

    return step


PARTS = {"prefill": prefill, "train": train, "decode": decode}


def main():
    quiet()
    parts = arguments() or list(PARTS)
    report = Report("cpu_model" if parts == list(PARTS) else f"cpu_model_{'_'.join(parts)}")
    report.roofline()
    for part in parts:
        PARTS[part](report)
    report.close()


if __name__ == "__main__":
    main()
