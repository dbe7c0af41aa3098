"""A dense decoder as a plain torch module, with the KV cache behind a hook.

One module for every Llama- and Qwen-like model: what differs between them is stated by `Decoder`.
The module never says where keys and values live. It hands a layer's new ones to `kv_update`, which
stores them and answers what the layer may attend to; each target supplies its own hook.

Shapes: B rows, T tokens a row, S context tokens a row, N query heads, K key/value heads, H values
a head, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.serving.domain.artifact import Decoder

KvUpdate = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer, keys [B, T, K, H], values [B, T, K, H]) to (keys [B, K, S, H], values [B, K, S, H])."""

Tensors = Mapping[str, npt.NDArray[np.float32]]


class DecoderModule(nn.Module):
    """The forward pass. Built by `from_tensors`; parameters carry the canonical names' values."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.embed = nn.Embedding(decoder.vocab, decoder.hidden)
        self.layers = nn.ModuleList(_Layer(decoder, index) for index in range(decoder.layers))
        self.final_norm = nn.RMSNorm(decoder.hidden, eps=decoder.rms_eps)
        if not decoder.tied:
            self.lm_head = nn.Linear(decoder.hidden, decoder.vocab, bias=False)
        self.register_buffer("inv_freq", torch.zeros(decoder.head_dim // 2))

    @classmethod
    def from_tensors(cls, decoder: Decoder, tensors: Tensors) -> "DecoderModule":
        """Build the module and copy the canonical `tensors` into it, one at a time."""
        with torch.device("meta"):
            module = cls(decoder)
        module = module.to_empty(device="cpu").eval().requires_grad_(requires_grad=False)
        targets = {_canonical(name): value for name, value in module.state_dict().items()}
        assert targets.keys() == tensors.keys(), targets.keys() ^ tensors.keys()
        for name, target in targets.items():
            target.copy_(torch.from_numpy(np.array(tensors[name])))
        return module

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        sample_index: torch.Tensor,
        kv_update: KvUpdate,
    ) -> torch.Tensor:
        """Return logits [samples, V] of the tokens at `sample_index` in the flattened [B * T].

        Args:
            input_ids: [B, T] int64.
            position_ids: [B, T] int64.
            mask: [B, 1, T, S] bool; True may be attended to.
            sample_index: [samples] int64.
            kv_update: where keys and values live.
        """
        cos, sin = self.turns(position_ids)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask, kv_update)
        chosen = hidden.reshape(-1, self.decoder.hidden)[sample_index]
        head = self.embed if self.decoder.tied else self.lm_head
        return F.linear(self.final_norm(chosen), cast("torch.Tensor", head.weight))

    def turns(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cosines and sines [B, 1, T, H] at `position_ids` [B, T]."""
        angles = position_ids[..., None].to(torch.float32) * cast("torch.Tensor", self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        scale = self.decoder.rope_scale
        return torch.cos(angles) * scale, torch.sin(angles) * scale


class _Layer(nn.Module):
    """One block: attention, then the gated MLP, each behind its norm and added to the stream."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        super().__init__()
        d, h = decoder.hidden, decoder.head_dim
        self.decoder = decoder
        self.index = index
        self.attn_norm = nn.RMSNorm(d, eps=decoder.rms_eps)
        self.q = nn.Linear(d, decoder.heads * h, bias=decoder.qkv_bias)
        self.k = nn.Linear(d, decoder.kv_heads * h, bias=decoder.qkv_bias)
        self.v = nn.Linear(d, decoder.kv_heads * h, bias=decoder.qkv_bias)
        if decoder.qk_norm:
            self.q_norm = nn.RMSNorm(h, eps=decoder.rms_eps)
            self.k_norm = nn.RMSNorm(h, eps=decoder.rms_eps)
        self.o = nn.Linear(decoder.heads * h, d, bias=decoder.o_bias)
        self.mlp_norm = nn.RMSNorm(d, eps=decoder.rms_eps)
        self.gate = nn.Linear(d, decoder.ffn, bias=False)
        self.up = nn.Linear(d, decoder.ffn, bias=False)
        self.down = nn.Linear(decoder.ffn, d, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        kv_update: KvUpdate,
    ) -> torch.Tensor:
        hidden = hidden + self._attend(self.attn_norm(hidden), cos, sin, mask, kv_update)
        normed = self.mlp_norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _attend(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        kv_update: KvUpdate,
    ) -> torch.Tensor:
        decoder = self.decoder
        rows, tokens, _ = x.shape
        q = self.q(x).reshape(rows, tokens, decoder.heads, decoder.head_dim)
        k = self.k(x).reshape(rows, tokens, decoder.kv_heads, decoder.head_dim)
        v = self.v(x).reshape(rows, tokens, decoder.kv_heads, decoder.head_dim)
        if decoder.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = _rotate(q.transpose(1, 2), cos, sin)
        k = _rotate(k.transpose(1, 2), cos, sin).transpose(1, 2)
        keys, values = kv_update(self.index, k, v)
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=decoder.heads != decoder.kv_heads
        )
        return self.o(out.transpose(1, 2).reshape(rows, tokens, -1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + H/2) of `x` [B, heads, T, H] by the positions' angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _canonical(name: str) -> str:
    """`layers.0.q.weight` is `layers.0.q`; `layers.0.q.bias` is `layers.0.q_bias`."""
    if name == "inv_freq":
        return ROPE_TENSOR
    return name.removesuffix(".weight").replace(".bias", "_bias")
