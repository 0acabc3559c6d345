"""A loss with the output projection inside: hidden states go in, a scalar and gradients come out.

Logits exist for one chunk of positions at a time, and are turned into their own gradient in place:
a sparse teacher needs of the student its log-probabilities at a few tokens and the mass of the
rest, so that the gradient is one softmax, scaled, with those few tokens overwritten. No tensor of
[positions, vocabulary] exists, in any precision.
"""

from __future__ import annotations

from typing import Any

import torch

from journeyman.student.divergences import Objective, SparseTeacher, sparse_loss

# Logits of a chunk, in bytes. On a CPU glibc gives larger blocks back to the kernel each time they
# are freed, and faults their pages in again for the next chunk; on a GPU this bounds memory.
_CHUNK_CPU, _CHUNK_GPU = 28 << 20, 256 << 20
_LEAST_MASS = 1e-30


def projected_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher: SparseTeacher | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of weights · loss over n positions, and each position's loss (detached): float[n].

    hidden: float[n, h]; weight: float[v, h]; bias: float[v]; teacher: None for cross-entropy only;
    targets: int64[n], the next token of the text, -1 where there is none; weights: float[n],
    without gradient; chunk: positions projected at a time. Differentiable with respect to hidden,
    weight and bias. The losses are ``Objective``'s. Raises ValueError as ``sparse_loss``.
    """
    wanted = torch.is_grad_enabled()  # inside a function's forward it never is
    return _ProjectedLoss.apply(
        hidden, weight, bias, teacher, targets, weights, objective, chunk, wanted
    )


def projected_logprobs_at(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities float32[n, k] at int64[n, k], and the likeliest tokens int64[n]."""
    values, first = [], []
    with torch.no_grad():
        for part in _parts(hidden, weight, chunk):
            logprobs = _logits(hidden[part], weight, bias)
            torch.log_softmax(logprobs, -1, out=logprobs)
            values.append(logprobs.gather(1, token_ids[part]))
            first.append(logprobs.argmax(-1))
    return torch.cat(values), torch.cat(first)


class _ProjectedLoss(torch.autograd.Function):
    """Gradients are made in forward, while a chunk's logits are there, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher: SparseTeacher | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        objective: Objective,
        chunk: int | None,
        wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        # The parameter's own precision is that of its gradient.
        projection = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=_precision(hidden), device=hidden.device)
        of_hidden, of_weight, of_bias = (wanted and n for n in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight: torch.Tensor | None = None
        grad_bias = torch.zeros_like(bias) if bias is not None and of_bias else None
        with torch.autocast(device, enabled=False):
            for part in _parts(hidden, weight, chunk):
                logits = _logits(hidden[part], projection, bias)
                some = teacher.take(part) if teacher is not None else None
                losses[part], gradient = _in_place(
                    logits,
                    some,
                    targets[part],
                    weights[part],
                    objective,
                    of_hidden or of_weight or of_bias,
                )
                if gradient is None:
                    continue
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
                gradient = gradient.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(gradient, projection, out=grad_hidden[part])
                if of_weight:
                    grad_weight = _added(grad_weight, gradient, hidden[part], weight.dtype)
        if of_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        scaled = [g if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None, None, None, None, None)


def _added(
    total: torch.Tensor | None, gradient: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """total + gradientᵀ · hidden, [v, h]."""
    if total is None:
        return torch.mm(gradient.T, hidden).to(dtype)
    if hidden.dtype == dtype:
        return total.addmm_(gradient.T, hidden)
    return total.add_(torch.mm(gradient.T, hidden))


def _in_place(
    logits: torch.Tensor,
    teacher: SparseTeacher | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each position's loss, float[c], and weights · its gradient, float[c, v], in the logits' own
    memory."""
    of_text = objective.cross_entropy if teacher is not None else 1.0
    smoothing = objective.label_smoothing if of_text else 0.0
    loss = logits.new_zeros(len(logits))
    logprobs = torch.log_softmax(logits, -1, out=logits)
    known = (targets >= 0).to(logits.dtype)
    target = targets.clamp_min(0).unsqueeze(-1)
    if of_text:
        own = logprobs.gather(1, target).squeeze(-1)
        text_loss = -(1 - smoothing) * own
        if smoothing:
            text_loss -= smoothing * logprobs.mean(-1)
        loss += of_text * known * text_loss
    # The gradient of a position is `scale` · softmax for all tokens outside the record.
    scale = of_text * known
    if teacher is None:
        gradient = logprobs.exp_()
        if not with_gradient:
            return loss, None
        gradient.mul_((scale * weights).unsqueeze(-1))
    else:
        of_teacher = 1 - of_text
        there = teacher.token_ids >= 0
        # An entry that is not there stands for the first one, and gets its value again.
        ids = torch.where(there, teacher.token_ids, teacher.token_ids[:, :1].clamp_min(0))
        entries = logprobs.gather(1, ids)
        logprobs.scatter_(1, ids, float("-inf"))
        gradient = logprobs.exp_()
        rest = gradient.sum(-1).clamp_min_(_LEAST_MASS)
        # A position without any entry: all of the mass is the rest.
        rest = torch.where(there[:, 0], rest, torch.ones_like(rest))
        if not with_gradient:
            return loss + of_teacher * sparse_loss(entries, rest.log(), teacher, objective), None
        divergence, by_entry, by_rest = _gradients(entries, rest.log(), teacher, objective)
        loss += of_teacher * divergence
        together = by_entry.sum(-1) + by_rest
        rest_scale = of_teacher * (by_rest / rest - together) + scale
        rest_scale = torch.where(there[:, 0], rest_scale, scale)
        at_entries = of_teacher * by_entry + entries.exp() * (
            scale - of_teacher * together
        ).unsqueeze(-1)
        at_entries = torch.where(there, at_entries, at_entries[:, :1])
        at_entries = torch.where(there[:, :1], at_entries, entries.exp() * scale.unsqueeze(-1))
        gradient.mul_((rest_scale * weights).unsqueeze(-1))
        gradient.scatter_(1, ids, at_entries * weights.unsqueeze(-1))
    if of_text:
        scaled = scale * weights
        gradient.scatter_add_(1, target, (-(1 - smoothing) * scaled).unsqueeze(-1))
        if smoothing:
            gradient.sub_((smoothing / gradient.shape[1] * scaled).unsqueeze(-1))
    return loss, gradient


def _gradients(
    entries: torch.Tensor, log_rest: torch.Tensor, teacher: SparseTeacher, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The divergence, and its derivatives by the student's log-probabilities at the entries,
    float[c, k], and by the log of its rest, float[c]."""
    with torch.enable_grad():
        entries, log_rest = entries.detach().requires_grad_(), log_rest.detach().requires_grad_()
        loss = sparse_loss(entries, log_rest, teacher, objective)
        by_entry, by_rest = torch.autograd.grad(
            loss.sum(), (entries, log_rest), allow_unused=True, materialize_grads=True
        )
    return loss.detach(), by_entry, by_rest


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float32[c, v]; float64 where the hidden states are."""
    logits = torch.mm(hidden, weight.T).to(_precision(hidden))
    return logits if bias is None else logits.add_(bias)


def _precision(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _parts(hidden: torch.Tensor, weight: torch.Tensor, chunk: int | None) -> list[slice]:
    if chunk is None:
        most = _CHUNK_CPU if hidden.device.type == "cpu" else _CHUNK_GPU
        chunk = max(1, most // (4 * len(weight)))
    return [slice(begin, begin + chunk) for begin in range(0, len(hidden), chunk)]
