"""MambaLM: embedding, a stack of blocks, a norm, a head. One forward body for training, prefill and decoding.

Axes: b batch, t time, m d_model, d d_inner, n d_state, r dt_rank, w d_conv, v padded vocabulary, s sequences.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anymamba.config import MambaConfig, check_config
from anymamba.errors import AnymambaError
from anymamba.ids import WHOLE, as_ids, as_tensor, check_labels
from anymamba.layers import Block, Linear, QuantizedLinear, RMSNorm, is_bare, linear_cross_entropy
from anymamba.layers.init import init_mixer, uniform
from anymamba.layers.irregular import check_gaps
from anymamba.layers.mixers import CONSTANTS, MIXERS
from anymamba.padding import as_offsets, pack, unpack
from anymamba.state import MambaState, StateHistory, check_state, places

PIECE = 8192  # tokens that a CPU reads at once when no gradient is needed, to stay in its caches; GPUs take 8 times it


class MambaOutput(NamedTuple):
    """What a forward pass gives. With labels the loss is computed without ever holding the logits of all tokens, so
    `logits` is None, unless last_only asks for a few; `model.lm_head(out.hidden)` gives them all."""

    logits: Tensor | None  # (b,t,v), or (b,1,v) with last_only; None with labels, and without a head
    state: MambaState | None  # after each row's last token; None if a mixer looks ahead
    loss: Tensor | None  # mean cross-entropy in nats a token; None without labels
    hidden: Tensor  # (b,t,m) after the final norm
    states: StateHistory | None = None  # with return_states


class Backbone(nn.Module):
    """Embedding, blocks and the final norm, named as in the published checkpoints."""

    def __init__(self, config: MambaConfig, device=None, dtype=None):
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        if config.vocab_size is not None:
            size = config.padded_vocab_size, config.d_model
            unfilled = torch.empty(*size, **kw) if torch.empty(0, device=device).is_meta else None
            self.embedding = nn.Embedding(*size, _weight=unfilled, **kw)  # random numbers on meta take torch a second
        self.layers = nn.ModuleList(Block(config, **kw) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, **kw)


class MambaLM(nn.Module):
    """A Mamba model of arXiv 2312.00752. Without a vocabulary it maps features (b,t,m) to hidden states (b,t,m)."""

    def __init__(self, config: MambaConfig, *, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = check_config(config)
        self.recompute = False  # recompute each block in backward: memory of one block instead of all
        self.dropout = 0.0  # share of what each block adds that is left out, in training mode
        self.backbone = Backbone(config, device=device, dtype=dtype)
        if config.vocab_size is not None:
            self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()
        self.tie_weights()

    def forward(self, ids: Tensor | None = None, state: MambaState | None = None, lengths: Tensor | None = None,
                cu_seqlens: Tensor | None = None, *, embeddings: Tensor | None = None, labels: Tensor | None = None,
                padding_side: str = "right", last_only: bool = False,
                return_states: int | None = None, delta: Tensor | None = None) -> MambaOutput:  # fmt: skip
        """Read tokens and go on from `state`. Reading in pieces, of any sizes, gives what reading at once gives.

        Args:
            ids: (b,t) token ids, a tensor, an array or lists, or `embeddings` (b,t,m) in their place.
            state: of an earlier call, s rows; None starts anew.
            lengths: (b,) tokens of each row; the others are padding on `padding_side` ("right" or "left") and change
                nothing: hidden states and logits there are 0.
            cu_seqlens: (s+1,) offsets of s sequences laid end to end in one row (b = 1).
            labels: (b,t) for each position the token that should follow; -100 is not counted. Gives `loss`, and no
                logits, unless last_only asks for the last ones.
            last_only: logits of each row's last token only, (b,1,v) (with cu_seqlens of each sequence's, (1,s,v));
                NaN for a row that has none.
            return_states: k also gives `states`, those after every k tokens and the last; `states.after(i)` is the
                state after i tokens. Not with lengths or cu_seqlens. Takes b·⌈t/k⌉ states of memory, and is slow for
                small k, as the scan then runs k steps at a time.
            delta: (b,t) time between each token and the one before it, at least 0, where time is not regular: it
                multiplies the step sizes, see `layers.irregular.gap_steps`. 1 everywhere changes nothing.

        Raises AnymambaError for ids or labels outside the vocabulary, shapes that do not fit, or a state of another
        shape.
        """
        if ids is not None:
            ids = as_ids(ids, "ids", self.device)
        if embeddings is not None:
            embeddings = as_tensor(embeddings, "embeddings", self.device)
        b, t = self._check_input(ids, embeddings)
        if lengths is not None and cu_seqlens is not None:
            raise AnymambaError("give lengths (padded rows) or cu_seqlens (rows end to end), not both")
        if cu_seqlens is not None:
            cu_seqlens = as_offsets(cu_seqlens, b)
        self._check_state(state, b if cu_seqlens is None else cu_seqlens.numel() - 1, return_states)
        if labels is not None:
            check_labels(labels, (b, t), self.config.vocab_size)
        if delta is not None:
            delta = as_tensor(delta, "delta").to(self.device)
            check_gaps(delta, (b, t), self.config.mixer)
        if return_states is not None and (lengths is not None or cu_seqlens is not None or t == 0):
            raise AnymambaError("return_states needs rows of one length, of a token or more, without cu_seqlens")
        plain = lengths is None and cu_seqlens is None and labels is None and return_states is None
        piece = PIECE if self.device.type == "cpu" else 8 * PIECE
        free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if free and plain and b * t > piece and t > 1 and self.keeps_state:
            return self._in_pieces(ids, embeddings, state, last_only, delta, max(1, piece // b))
        x, index = self.backbone.embedding(ids) if embeddings is None else embeddings, None
        if lengths is not None:
            x, cu_seqlens, index = pack(x, lengths, padding_side)
            delta = None if delta is None else delta.to(x.device).reshape(1, -1).index_select(1, index)
        x, state = self._blocks(x, state, cu_seqlens, return_states, delta)
        states, state = (None, state) if return_states is None else (state, state.after(t))

        last = self._last(x, cu_seqlens, index) if last_only else None
        if index is not None:
            x = unpack(x, index, b, t)
        loss = None if labels is None else self._loss(x, labels)
        logits = self._head(x if last is None else last) if last_only or labels is None else None
        return MambaOutput(logits, state, loss, x, states)

    def _in_pieces(self, ids, embeddings, state, last_only, delta, length):
        """Read a long text piece by piece: activations stay in the cache, and memory does not grow with them."""
        name, source = ("ids", ids) if embeddings is None else ("embeddings", embeddings)
        logits, hidden = [], []
        for i in range(0, source.shape[1], length):
            piece, gaps = (v if v is None else v[:, i : i + length] for v in (source, delta))
            out = self(**{name: piece}, state=state, last_only=last_only, delta=gaps)
            state = out.state
            logits = [out.logits] if last_only else [*logits, out.logits]
            hidden.append(out.hidden)
        logits = None if logits[0] is None else torch.cat(logits, 1)
        return MambaOutput(logits, state, None, torch.cat(hidden, 1))

    def _blocks(self, x, state, cu_seqlens, return_states, delta):
        x, layers, residual = self._drop(x), [], None
        for i, block in enumerate(self.backbone.layers):
            before = None if state is None else state.layers[i]
            if self.recompute and torch.is_grad_enabled():
                x, residual, after = checkpoint(block, x, residual, before, cu_seqlens, return_states, delta,
                                                use_reentrant=False)  # fmt: skip
            else:
                x, residual, after = block(x, residual, before, cu_seqlens, return_states, delta)
            x = self._drop(x)
            layers.append(after)
        x, _ = self.backbone.norm_f(x, residual)
        if any(after is None for after in layers):  # a mixer that looks ahead
            return x, None
        if cu_seqlens is None:
            read = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
        else:
            read = cu_seqlens.diff().to(x.device, torch.int64, non_blocking=True)  # of a temporary: no need to wait
        seen = read if state is None else state.seen + read
        if return_states is None:
            return x, MambaState(tuple(layers), seen)
        counts = places(x.shape[1], return_states)
        seen = seen[:, None] - x.shape[1] + torch.tensor(counts, device=x.device)
        return x, StateHistory(tuple(layers), counts, seen)

    def _drop(self, x):
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def _head(self, x):
        return self.lm_head(x) if self.config.vocab_size is not None else None

    def _loss(self, x, labels):
        head = self.lm_head
        if is_bare(head):
            return linear_cross_entropy(x, head.weight, labels)
        logits = head(x)  # an adapter, a hook or a quantised weight must have its say
        real = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, 1).to(real), labels.flatten())

    def _last(self, x, cu_seqlens, index):
        """Hidden state of each row's last token (b,1,m), or (1,s,m) for packed sequences."""
        if cu_seqlens is None:
            return x[:, -1:]
        last = cu_seqlens.to(x.device, torch.int64)[1:] - 1
        rows = x[0].index_select(0, last.clamp(min=0)) if x.shape[1] else x.new_empty(len(last), x.shape[2])
        rows = rows.masked_fill((cu_seqlens.diff() == 0).to(x.device)[:, None], math.nan)
        return rows[:, None] if index is not None else rows[None]

    # ---- checks ----

    def _check_input(self, ids, embeddings):
        """Batch and length of what was given."""
        if (ids is None) == (embeddings is None):
            raise AnymambaError("give ids (b,t) or embeddings (b,t,m), one of the two")
        if embeddings is None:
            self._check_ids(ids)
            return ids.shape
        if embeddings.dim() != 3 or embeddings.shape[2] != self.config.d_model:
            raise AnymambaError(f"embeddings are {tuple(embeddings.shape)}, but must be (b,t,{self.config.d_model})")
        return embeddings.shape[:2]

    def _check_ids(self, ids):
        if self.config.vocab_size is None:
            raise AnymambaError("this model has no vocabulary; give embeddings (b,t,m)")
        if ids.dim() != 2 or ids.dtype not in WHOLE or ids.numel() == 0:
            raise AnymambaError(f"ids are {tuple(ids.shape)} {ids.dtype}, but must be integers (batch ≥ 1, seqlen ≥ 1)")
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            return  # looking would stop the device; the embedding itself refuses there
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.padded_vocab_size:
            bad = low if low < 0 else high
            raise AnymambaError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}: was the text "
                                "encoded with another tokenizer?")  # fmt: skip

    def _check_state(self, state, rows, return_states=None):
        if not (state is None and return_states is None) and not self.keeps_state:
            raise AnymambaError("this model hears both directions: what comes later changes what it made of a text, "
                                "so it goes on from no state and keeps none: give it whole texts")  # fmt: skip
        if state is not None:
            check_state(state, self.config, rows)

    # ---- parameters ----

    @property
    def device(self) -> torch.device:
        return self.backbone.norm_f.weight.device

    @property
    def keeps_state(self) -> bool:
        """Whether every mixer only looks back: then what was read is a state to go on from."""
        return all(getattr(type(module), "keeps_state", True) for module in self.backbone.layers.modules())

    def tie_weights(self) -> None:
        if self.config.vocab_size is not None and self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter, as the published models were.

        | parameter | value |
        |---|---|
        | embedding (= head if tied) | N(0, 0.02²) |
        | in_proj, x_proj, untied head | U(±1/√fan_in) |
        | out_proj | U(±1/√fan_in) / √n_layer, so that the residual stream does not grow with depth |
        | conv1d weight, bias | U(±1/√w) |
        | dt_proj.weight | U(±dt_scale/√r) |
        | dt_proj.bias | softplus⁻¹(Δ), Δ log-uniform in [dt_min, dt_max], at least dt_init_floor |
        | A_log | log(1 … n) in every channel (S4D-Real) |
        | constant B, C, dt of ablations, other mixers | see `layers.init` |
        | D, norms | 1 |
        | biases of in_proj, out_proj | 0 |
        """
        config = self.config
        for module in () if self.device.type == "meta" else self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, config.initializer_range)
            elif isinstance(module, MIXERS):
                init_mixer(module, config)
        if config.vocab_size is not None and not config.tie_embeddings:
            uniform(self.lm_head.weight, config.d_model**-0.5)

    def param_groups(self, weight_decay: float = 0.1) -> list[dict]:
        """Two optimizer groups: matrices with weight decay; A_log, D, biases and norms without.

        A_log and the step bias set how long the model remembers: pulling them to 0 makes it forget.
        """
        decay, free = [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                (free if p.dim() < 2 or name.rpartition(".")[2] in CONSTANTS else decay).append(p)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

    def num_params(self, embedding: bool = True) -> int:
        """Number of parameters (shared ones once); `embedding=False` leaves embedding and head out."""
        skip = () if embedding else ("backbone.embedding.", "lm_head.")
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        for name, module in self.named_modules():
            if isinstance(module, QuantizedLinear) and not (name == "lm_head" and self.config.tie_embeddings):
                sizes[f"{name}.weight"] = module.in_features * module.out_features
        return sum(size for name, size in sizes.items() if not name.startswith(skip or ("\0",)))

    def flops_per_token(self) -> int:
        """Floating-point operations of a forward pass a token; forward and backward take about three times that.

        Two an entry of each matrix, 2w a channel for the convolution, 9 a state entry for the scan (the paper's
        appendix D counts 9·b·t·d·n).
        """
        c = self.config
        return (
            sum(block.mixer.flops_per_token() for block in self.backbone.layers) + 2 * c.d_model * c.padded_vocab_size
        )

    def bytes_per_step(self, batch_size: int = 1) -> int:
        """Bytes that decoding one token for every row must move: all weights once, the state read and written."""
        read = [*self.parameters(), *self.buffers()]
        if self.config.vocab_size is not None and self.lm_head.weight is not self.backbone.embedding.weight:
            read = [v for v in read if v is not self.backbone.embedding.weight]  # only looked up, a row a token
        weights = sum(v.numel() * v.element_size() for v in read)
        return weights + 2 * MambaState.zeros(self.config, batch_size, dtype=self.backbone.norm_f.weight.dtype).nbytes

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Names this model: its sizes and a hash of its config and of a sample of its weights.

        The sample is rounded to bfloat16, so that a model and its bfloat16 copy share their states.
        """
        config = self.backbone.layers[0].mixer.config  # as it was made: a tokenizer may have cut the vocabulary since
        changed = {k: v for k, v in config.to_dict().items() if v != getattr(MambaConfig, k)}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
        for name, p in sorted([*self.named_parameters(), *self.named_buffers()]):  # quantised weights are buffers
            sample = p.flatten()[:: max(1, p.numel() // 64)]
            digest.update(name.encode() + sample.to("cpu", torch.bfloat16).float().numpy().tobytes())
        sizes = f"d_model={config.d_model} n_layer={config.n_layer} vocab_size={config.vocab_size}"
        return f"mamba {sizes} {digest.hexdigest()[:12]}"

    # ---- files: handed over to the room above ----

    def save_pretrained(self, folder, format: str = "native") -> None:
        """Write a folder in the format "native", "hf" or "state-spaces"; see `anymamba.checkpoint.save`."""
        from anymamba.checkpoint import save

        save(self, folder, format)

    @classmethod
    def from_pretrained(cls, name_or_path, *, device=None, dtype: torch.dtype | None = None,
                        quantize: str | None = None, revision: str | None = None) -> "MambaLM":  # fmt: skip
        """Load a model: a folder of ours or others, or a name on the hub; see `anymamba.checkpoint.load`."""
        from anymamba.checkpoint import load

        return load(name_or_path, device=device, dtype=dtype, quantize=quantize, revision=revision)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model without dropout, for as long as this lasts."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
