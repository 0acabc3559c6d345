"""A loss with the output projection inside: hidden states go in, a scalar and gradients come out.

Logits exist for one chunk of positions at a time, and are turned into their own gradient in place:
a sparse teacher needs of the student its log-probabilities at a few tokens and the mass of the
rest, so that the gradient is one softmax, scaled, with those few tokens overwritten. No tensor of
[positions, vocabulary] exists, in any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from journeyman.student.divergences import Objective, SparseTeacher, sparse_loss

# Logits of a chunk, in bytes. On a CPU glibc gives larger blocks back to the kernel each time they
# are freed, and faults their pages in again for the next chunk; on a GPU this bounds memory.
_CHUNK_CPU, _CHUNK_GPU = 28 << 20, 256 << 20


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
    values = torch.empty(token_ids.shape, dtype=_precision(hidden), device=hidden.device)
    first = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    with torch.no_grad():
        for part in _parts(hidden, weight, chunk):
            logprobs = _logits(hidden[part], weight, bias)
            torch.log_softmax(logprobs, -1, out=logprobs)
            values[part] = logprobs.gather(1, token_ids[part])
            first[part] = logprobs.argmax(-1)
    return values, first


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
        projection = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=_precision(hidden), device=hidden.device)
        of_hidden, of_weight, of_bias = (wanted and n for n in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight: torch.Tensor | None = None
        grad_bias = (
            torch.zeros_like(bias, dtype=_precision(bias)) if bias is not None and of_bias else None
        )
        with torch.autocast(device, enabled=False):
            for part in _parts(hidden, weight, chunk):
                logits = _logits(hidden[part], projection, bias)
                some = teacher.take(part) if teacher is not None else None
                if some is not None and objective.divergence == "uld":
                    some = _by_rank(some, logits)
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
                    grad_weight = _added(grad_weight, gradient, hidden[part], _precision(weight))
        if of_weight:
            grad_weight = (
                torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
            )
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        scaled = [g if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None, None, None, None, None)


def _added(
    total: torch.Tensor | None, gradient: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """total + gradientᵀ · hidden, [v, h]; in dtype, or a bfloat16 sum would stop growing."""
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
    known = (targets >= 0).to(logits.dtype)
    target = targets.clamp_min(0).unsqueeze(-1)
    own = logits.gather(1, target).squeeze(-1)
    mean = logits.mean(-1) if smoothing else torch.zeros_like(own)
    # The gradient of cross-entropy is `scale` · softmax, and of the target `scale` less.
    scale = of_text * known
    if teacher is None:
        log_total = _softmax_in_place(logits)
        loss, gradient = torch.zeros_like(own), logits
        of_others = scale
    else:
        of_teacher = 1 - of_text
        there = teacher.token_ids >= 0
        any_there = there.any(1, keepdim=True)
        # An entry that is not there stands for the first that is, and gets its value again.
        first = there.to(torch.int8).argmax(1, keepdim=True)
        ids = torch.where(there, teacher.token_ids, teacher.token_ids.gather(1, first).clamp_min(0))
        entries = logits.gather(1, ids)
        logits.scatter_(1, ids, torch.where(any_there, float("-inf"), entries))
        # The rest by its own softmax: 1 - the entries' mass would be 0 for a sure student.
        log_rest = _softmax_in_place(logits)
        log_entries = entries.masked_fill(~there, float("-inf")).logsumexp(-1)
        log_total = torch.logaddexp(log_rest, log_entries)
        entries = entries - log_total.unsqueeze(-1)
        log_rest = log_rest - log_total
        loss, by_entry, by_rest = _gradients(entries, log_rest, teacher, objective, with_gradient)
        loss, gradient = of_teacher * loss, logits
        # d loss / d logit = d loss / d its log-probability - softmax · the sum of all of these.
        of_total = scale - of_teacher * (by_entry.sum(-1) + by_rest)
        at_entries = of_teacher * by_entry + entries.exp() * of_total.unsqueeze(-1)
        at_entries = torch.where(there, at_entries, at_entries.gather(1, first))
        of_others = of_teacher * by_rest + log_rest.exp() * of_total
    if of_text:
        text_loss = log_total - (1 - smoothing) * own - smoothing * mean
        loss = loss + scale * text_loss
    if not with_gradient:
        return loss, None
    gradient.mul_((of_others * weights).unsqueeze(-1))
    if teacher is not None:
        at_entries = at_entries * weights.unsqueeze(-1)
        # Of a position without entries, all tokens are the rest.
        gradient.scatter_(1, ids, torch.where(any_there, at_entries, gradient.gather(1, ids)))
    if of_text:
        scaled = scale * weights
        gradient.scatter_add_(1, target, (-(1 - smoothing) * scaled).unsqueeze(-1))
        if smoothing:
            gradient.sub_((smoothing / gradient.shape[1] * scaled).unsqueeze(-1))
    return loss, gradient


def _by_rank(teacher: SparseTeacher, logits: torch.Tensor) -> SparseTeacher:
    """The teacher's sorted record, over the student's tokens of the same ranks.

    Ranks that the student's vocabulary does not have are part of the tail: it gives them nothing.
    """
    k = min(teacher.token_ids.shape[1], logits.shape[1])
    there = teacher.token_ids[:, :k] >= 0
    tail = teacher.log_tail_mass
    if k < teacher.token_ids.shape[1]:
        tail = torch.logaddexp(tail, teacher.logprobs[:, k:].logsumexp(-1))
    return SparseTeacher(
        token_ids=torch.where(there, logits.topk(k).indices, -1),
        logprobs=teacher.logprobs[:, :k],
        log_tail_mass=tail,
        sampled=teacher.sampled,
    )


def _softmax_in_place(logits: torch.Tensor) -> torch.Tensor:
    """The log of the sum of exp(logits), float[c]: -inf for a row of -inf, which becomes nan."""
    peak = logits.amax(-1)
    torch.softmax(logits, -1, out=logits)
    # The peak's probability is exp(0) / sum.
    return torch.where(peak == float("-inf"), peak, peak - logits.amax(-1).log())


def _gradients(
    entries: torch.Tensor,
    log_rest: torch.Tensor,
    teacher: SparseTeacher,
    objective: Objective,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The divergence, and its derivatives by the student's log-probabilities at the entries,
    float[c, k], and by the log of its rest, float[c]; 0 where they are not wanted."""
    if not with_gradient:
        loss = sparse_loss(entries, log_rest, teacher, objective)
        return loss, torch.zeros_like(entries), torch.zeros_like(log_rest)
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
