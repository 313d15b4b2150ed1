"""What torch lacks for training gpt-oss on a CPU: attention with sinks, a frugal loss, fake MXFP4, Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MXFP4_BLOCK = 32
MXFP4_MAX = 6.0
CHUNK_ROWS = 512


class SinkAttention(torch.autograd.Function):
    """Flash attention with one learned sink logit per head.

    The sink only enlarges the softmax's denominator, so the flash kernel's backward is right as it stands
    when it is given the scaled-down output and the log-sum-exp that includes the sink.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None) -> Tensor:
        """Attend q, k, v (B, H, T, D), sinks (H,), additive mask (T, T) or None for plain causal."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor
        out, lse = flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=q.shape[-1] ** -0.5)
        total = torch.logaddexp(lse, sinks[None, :, None].to(lse.dtype))  # (B, H, T)
        out = out * (lse - total).exp()[..., None].to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of q, k, v and the sinks."""
        q, k, v, sinks, out, total = ctx.saved_tensors
        (grad,) = grads
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(), q, k, v, out, total, 0.0, ctx.mask is None,
            attn_mask=ctx.mask, scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        share = (sinks[None, :, None] - total).exp()
        dsinks = -(share * (grad.float() * out.float()).sum(-1)).sum((0, 2))
        return dq, dk, dv, dsinks, None


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head by chunks of rows that fit the cache; never holds all logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """Return the sum over the rows of x (N, hidden), each counted by its share (N,)."""
        low = weight.to(x.dtype)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float32)
        for a in range(0, x.shape[0], CHUNK_ROWS):
            b = a + CHUNK_ROWS
            wanted, keep = target[a:b, None], share[a:b, None]
            logits = (x[a:b] @ low.T).float()
            logp = logits.log_softmax(-1)
            loss -= (logp.gather(1, wanted) * keep).sum()
            slope = logp.exp_().scatter_add_(1, wanted, -torch.ones_like(keep)).mul_(keep).to(x.dtype)
            dx[a:b] = slope @ low
            dweight += slope.T @ x[a:b]
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale the gradients made in the forward pass."""
        dx, dweight = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dweight * grads[0], None, None


def fake_mxfp4(weight: Tensor) -> Tensor:
    """Round to MXFP4 along the last axis as OCP's MX specification does; the gradient passes through."""
    blocks = weight.detach().reshape(*weight.shape[:-1], -1, MXFP4_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    unit = blocks / scale
    size = unit.abs().clamp(max=MXFP4_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = torch.copysign(torch.round(size / step) * step, unit) * scale
    return weight + (rounded.flatten(-2) - weight).detach()


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about the nearest semi-orthogonal matrix of each (..., rows, columns): Newton-Schulz of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; 3-D parameters are stacks of matrices."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
