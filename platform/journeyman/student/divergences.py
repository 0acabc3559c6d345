"""How far a student's next-token distribution is from a sparse teacher's: functions of tensors.

Both sides are reduced to the same few outcomes, the tokens that the teacher's record holds and, as
one more, all the others; ``projection`` brings the student's side here and takes gradients back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation", "uld"]
Tail = Literal["bucket", "renormalised"]

_NONE = -1e4  # log of an outcome that is not there: its probability is 0, and no gradient is nan
_LEAST = -50.0  # log of a tail that the record has as 0: reverse divergences stay finite


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTeacher:
    """Next-token distributions at n positions, as ``labels.codec.Distributions``.

    sampled: entries are log(count / draws) of true draws (Random Sampling KD, Anshumann et al.,
    ACL 2025), and not the largest probabilities.
    """

    token_ids: torch.Tensor  # int64[n, k]; -1 where a position has fewer entries
    logprobs: torch.Tensor  # float32[n, k], natural logs; -inf where fewer
    log_tail_mass: torch.Tensor  # float32[n]: of all other tokens together; -inf if none
    sampled: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, part: slice) -> SparseTeacher:
        return SparseTeacher(
            token_ids=self.token_ids[part],
            logprobs=self.logprobs[part],
            log_tail_mass=self.log_tail_mass[part],
            sampled=self.sampled,
        )


def within(teacher: SparseTeacher, n_tokens: int) -> SparseTeacher:
    """The record for a student that knows the tokens below n_tokens only, as where the teacher's
    output layer is padded further.

    What the student cannot say is one of the other tokens, on both sides: its mass goes to the
    tail. (The whole divergence would be infinite, over tokens that are in no text.) Draws have no
    tail: those that are left are draws from the teacher, given that it says what the student can.
    """
    import torch

    known = teacher.token_ids < n_tokens
    if known.all():
        return teacher
    lost = teacher.logprobs.masked_fill(known, -math.inf).logsumexp(-1)
    # Entries that are there stand in front.
    there = known & (teacher.token_ids >= 0)
    order = torch.argsort(there.to(torch.int8), dim=-1, descending=True, stable=True)
    known = there.gather(-1, order)
    logprobs = teacher.logprobs.gather(-1, order).masked_fill(~known, -math.inf)
    tail = torch.logaddexp(teacher.log_tail_mass, lost)
    if teacher.sampled:
        logprobs = logprobs.log_softmax(-1).masked_fill(~known, -math.inf)
        tail = teacher.log_tail_mass
    return SparseTeacher(
        token_ids=teacher.token_ids.gather(-1, order).masked_fill(~known, -1),
        logprobs=logprobs,
        log_tail_mass=tail,
        sampled=teacher.sampled,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """(1 - cross_entropy) · T² · divergence + cross_entropy · CE of the text's own next token.

    tail: ``bucket``: all tokens outside the record are one outcome, on both sides.
    ``renormalised``: both sides are conditioned on the record's tokens; biased, since what the
    student gives to all others costs nothing, and with reverse KL it leaves the record altogether.
    temperature: softens the outcomes' probabilities on both sides, the bucket's as one of them (how
    a tail spreads within itself is not in the record); with a record of the whole vocabulary this
    is the usual temperature (Hinton et al. 2015). A student equal to its teacher has loss 0.

    uld: Universal Logit Distillation (Boizard et al. 2024), for vocabularies that differ: the sum
    over ranks of |p - q|, both sorted, the shorter one filled up with zeros. Of a record of the k
    likeliest tokens: the k first ranks, and all others as one outcome, the teacher's tail less the
    student's. That is never above the sum over all ranks, at most twice the smaller of the two
    tails below it (|Σp - Σq| ≤ Σ|p - q| ≤ Σp + Σq), and equal to it with a record of the whole
    vocabulary. Neither temperature nor ``tail`` go with it.
    """

    divergence: Divergence = "forward_kl"
    tail: Tail = "bucket"
    temperature: float = 1.0
    beta: float = 0.5  # jsd: the teacher's weight in the mixture (GKD, Agarwal et al. 2024)
    skew: float = 0.1  # skewed_kl: the teacher's weight in the mixture (DistiLLM, Ko et al. 2024)
    cross_entropy: float = 0.0
    label_smoothing: float = 0.0  # of the cross-entropy


def sparse_loss(
    student: torch.Tensor, log_rest: torch.Tensor, teacher: SparseTeacher, objective: Objective
) -> torch.Tensor:
    """T² · the divergence at each position: float[n], natural logarithm.

    student: float[n, k], log-probabilities at the teacher's entries, with ``uld`` of the student's
    own tokens of the same ranks; any number where there is none. log_rest: float[n], log of the
    student's mass on all other tokens, -inf if there are none. Raises ValueError for what true
    draws give no unbiased estimate of.
    """
    there = teacher.token_ids >= 0
    if teacher.sampled:
        return _of_draws(student, teacher, objective, there)
    if objective.divergence == "uld":
        return _of_ranks(student, log_rest, teacher, there)
    q = student.masked_fill(~there, _NONE)
    p = teacher.logprobs.to(student.dtype).clamp_min(_NONE).masked_fill(~there, _NONE)
    if objective.tail == "bucket":
        # Bounded after the temperature, which would give a bound weight; and where the record holds
        # every token, a tail is rounding.
        tail = (teacher.log_tail_mass.to(student.dtype) / objective.temperature).clamp_min(_LEAST)
        tail = tail.masked_fill(log_rest == -math.inf, _NONE)
        q = _with(q, log_rest.clamp_min(_NONE))
        # A record is rounded: what it says of all outcomes adds up to 1 only then.
        p = _with(p / objective.temperature, tail).log_softmax(-1)
        if objective.temperature != 1:
            q = (q / objective.temperature).log_softmax(-1)
    else:
        p = (p / objective.temperature).log_softmax(-1)
        q = (q / objective.temperature).log_softmax(-1)
    return objective.temperature**2 * _divergence(p, q, objective)


def judged(
    each: torch.Tensor, first: torch.Tensor, teacher: SparseTeacher
) -> tuple[torch.Tensor, torch.Tensor]:
    """What held-out figures are means of, at each position: float[n] each.

    each: ``sparse_loss`` by forward KL, tail ``bucket``; first: int64[n], the student's likeliest
    tokens. Of distributions: KL, and whether the first choices are the same. Of draws: the
    student's cross-entropy from the teacher, and the share of them that are its first choice, both
    unbiased. The KL of the counts themselves is not: counts have less entropy than what they were
    drawn from, by some (outcomes - 1) / (2 · draws) nats (Miller 1955), and how much less is not in
    the record.
    """
    if teacher.sampled:
        share = teacher.logprobs.exp()
        hits = share.masked_fill(teacher.token_ids != first.unsqueeze(-1), 0.0).sum(-1)
        surprise = -teacher.logprobs.masked_fill(share == 0, 0.0)
        return each + (share * surprise).sum(-1), hits
    likeliest = teacher.token_ids.gather(1, teacher.logprobs.argmax(1, keepdim=True))[:, 0]
    return each, (first == likeliest).to(each.dtype)


def _of_draws(
    student: torch.Tensor, teacher: SparseTeacher, objective: Objective, there: torch.Tensor
) -> torch.Tensor:
    """KL of the draws' counts from the student, whose gradient is unbiased for that of forward KL
    (Anshumann et al. 2025, section 3)."""
    if objective.divergence != "forward_kl" or objective.temperature != 1:
        raise ValueError(
            "true draws estimate forward KL at temperature 1, and no other divergence without bias"
        )
    share = teacher.logprobs.to(student.dtype).masked_fill(~there, 0.0)
    weight = share.exp().masked_fill(~there, 0.0)
    return (weight * (share - student.masked_fill(~there, 0.0))).sum(-1)


def _of_ranks(
    student: torch.Tensor, log_rest: torch.Tensor, teacher: SparseTeacher, there: torch.Tensor
) -> torch.Tensor:
    """Of sorted probabilities, rank by rank, and of what is behind the last one."""
    p, q = teacher.logprobs.to(student.dtype).exp(), student.exp()
    tails = teacher.log_tail_mass.to(student.dtype).exp() - log_rest.exp()
    return (p - q).abs().masked_fill(~there, 0.0).sum(-1) + tails.abs()


def _with(entries: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat((entries, rest.unsqueeze(-1)), dim=-1)


def _divergence(p: torch.Tensor, q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """float[n], of log-probabilities float[n, outcomes] of the teacher and the student."""
    match objective.divergence:
        case "forward_kl":
            return _kl(p, q)
        case "reverse_kl":
            return _kl(q, p)
        case "jsd":
            mixture = _mixture(p, q, objective.beta)
            return objective.beta * _kl(p, mixture) + (1 - objective.beta) * _kl(q, mixture)
        case "skewed_kl":
            return _kl(p, _mixture(p, q, objective.skew))
        case "total_variation":
            return (p.exp() - q.exp()).abs().sum(-1) / 2
    raise ValueError(f"{objective.divergence} is not of a distribution's outcomes")


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _mixture(p: torch.Tensor, q: torch.Tensor, of_p: float) -> torch.Tensor:
    import torch

    return torch.logaddexp(p + math.log(of_p), q + math.log1p(-of_p))
