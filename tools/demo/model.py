"""The demo network for training: gpt-oss in torch, named as in the checkpoint; knows nothing of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.ops import HeadLoss, Muon, SinkAttention, fake_mxfp4

RMS_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Shape of the network; names as in the checkpoint's config.json."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_local_experts: int = 8
    num_experts_per_tok: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 64
    sliding_window: int = 128
    swiglu_limit: float = 7.0
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_original_context: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    dropout: float = 0.1


def rope_tables(config: NetConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return YaRN's cosines and sines (T, D/2), correction range unrounded, times the concentration."""
    half = config.head_dim // 2

    def boundary(rotations: float) -> float:
        turns = config.rope_original_context / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low, high = boundary(config.rope_beta_fast), boundary(config.rope_beta_slow)
    index = torch.arange(half, dtype=torch.float32)
    frequency = config.rope_theta ** (-index / half)
    mask = 1 - ((index - low) / (high - low)).clamp(0, 1)
    inverse = frequency / config.rope_factor * (1 - mask) + frequency * mask
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    concentration = 0.1 * math.log(config.rope_factor) + 1
    return angle.cos() * concentration, angle.sin() * concentration


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, D) by position; pairs are (i, i + D/2)."""
    a, b = x.chunk(2, -1)
    c, s = cos[: x.shape[1], None], sin[: x.shape[1], None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


class RMSNorm(nn.Module):
    """Scale to unit mean square in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, RMS_EPS)


class Attention(nn.Module):
    """Grouped-query attention with biases and sinks."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within each row of x (B, T, hidden)."""
        B, T, _ = x.shape
        H, Hk, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        qkv = F.linear(x, weight, bias).view(B, T, H + 2 * Hk, D)
        qk = rotate(qkv[:, :, : H + Hk], cos.to(qkv.dtype), sin.to(qkv.dtype))
        q = qk[:, :, :H].transpose(1, 2)  # (B, H, T, D)
        k = qk[:, :, H:].repeat_interleave(H // Hk, 2).transpose(1, 2)
        v = qkv[:, :, H + Hk :].repeat_interleave(H // Hk, 2).transpose(1, 2)
        if mask is not None:
            mask = mask.to(q.dtype)
        out: Tensor = SinkAttention.apply(q, k, v, self.sinks, mask)  # type: ignore[no-untyped-call]
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, H * D))
        return mixed


class Experts(nn.Module):
    """The experts' weights in packed orientation (E, out, in), gate and up rows interleaved."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        E, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.limit = config.swiglu_limit
        self.fake_quantise = False
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * inner, hidden) / math.sqrt(hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(E, hidden, inner) / math.sqrt(inner))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, hidden))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Apply expert e to the next counts[e] rows of x."""
        gate_up, down = (
            fake_mxfp4(w) if self.fake_quantise else w for w in (self.gate_up_proj, self.down_proj)
        )
        # Halves instead of interleaved rows: strided activations cost more than reordering the weights.
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        bias = torch.cat([self.gate_up_proj_bias[:, ::2], self.gate_up_proj_bias[:, 1::2]], 1)
        parts = torch.split(x, counts)
        inner = torch.cat([F.linear(p, w, b) for p, w, b in zip(parts, gate_up, bias, strict=True)])
        gate, up = inner.chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        parts = torch.split(gate * torch.sigmoid(1.702 * gate) * (up + 1), counts)
        return torch.cat(
            [F.linear(p, w, b) for p, w, b in zip(parts, down, self.down_proj_bias, strict=True)]
        )


class MoE(nn.Module):
    """Top-k mixture of experts; computes only the chosen ones and keeps a load-balance loss."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Mix the chosen experts for each row of x (N, hidden)."""
        E, k = self.config.num_local_experts, self.config.num_experts_per_tok
        with torch.autocast("cpu", enabled=False):
            logits = self.router(x.float())  # (N, E)
            best, chosen = logits.topk(k, -1)
            weight = best.softmax(-1)  # (N, k)
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=E)
        self.balance = E * (logits.softmax(-1).mean(0) * counts / len(flat)).sum()
        rows = order // k
        low = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        y = self.experts(low.index_select(0, rows), counts.tolist())
        y = y * weight.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, rows, y.float())


class Layer(nn.Module):
    """Pre-norm attention and mixture of experts."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MoE(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Add both branches to the float32 residual stream x (B, T, hidden)."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x).flatten(0, 1)).view_as(x)
        return x + F.dropout(y, self.dropout, self.training)


class Backbone(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)


class Network(nn.Module):
    """A gpt-oss language model whose state_dict has the checkpoint's names."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            self.model.embed_tokens.weight.normal_(0, 0.1)
            self.lm_head.weight.normal_(0, 0.02)
            for layer in self.layers:
                for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                    weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
                for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.self_attn, part).bias.zero_()

    @property
    def layers(self) -> list[Any]:
        """Return the layers in order."""
        return list(self.model.layers)

    def fake_quantise(self, on: bool) -> None:
        """Switch rounding of the expert matrices to MXFP4 in the forward pass."""
        for layer in self.layers:
            layer.mlp.experts.fake_quantise = on

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the normed last hidden state (B, T, hidden) of ids (B, T)."""
        T = ids.shape[1]
        cos, sin = rope_tables(self.config, T)
        i = torch.arange(T)
        near = (i[None] <= i[:, None]) & (i[:, None] - i[None] < self.config.sliding_window)
        window = torch.where(near, 0.0, float("-inf"))
        x = F.dropout(self.model.embed_tokens(ids), self.layers[0].dropout, self.training)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, window if number % 2 == 0 else None)
        normed: Tensor = self.model.norm(x)
        return normed

    def loss(self, ids: Tensor, target: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return cross-entropy over the targets (B, T), averaged by their shares, and mean balance loss."""
        share = torch.ones(target.shape) if share is None else share
        x = self.hidden(ids).flatten(0, 1)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        total: Tensor = HeadLoss.apply(x, self.lm_head.weight, target.flatten(), share.flatten())  # type: ignore[no-untyped-call]
        balance = torch.stack([layer.mlp.balance for layer in self.layers]).mean()
        return total / share.sum(), balance


def optimisers(net: Network, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the attention and expert matrices and AdamW for all else."""
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    small: list[nn.Parameter] = []
    for name, p in net.named_parameters():
        if ".layers." in name and p.ndim >= 2 and "bias" not in name and "router" not in name:
            matrices.append(p)
        else:
            (tables if p.ndim == 2 and "bias" not in name else small).append(p)
    groups = [{"params": tables, "weight_decay": 0.05}, {"params": small, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), fused=True)
    return [Muon(matrices, muon_lr), adam]


@torch.no_grad()
def held_out_loss(net: Network, ids: list[int], size: int) -> float:
    """Return nats per token of prose in rows of `size`."""
    net.eval()
    rows = torch.tensor([ids[i : i + size + 1] for i in range(0, len(ids) - size, size)])
    losses = [net.loss(chunk[:, :-1], chunk[:, 1:])[0] * len(chunk) for chunk in torch.split(rows, 12)]
    net.train()
    return float(torch.stack(losses).sum()) / len(rows)
