"""Losses on sparse teachers, and their gradients, against a dense float64 computation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from journeyman.student.divergences import Objective, SparseTeacher
from journeyman.student.projection import projected_logprobs_at, projected_loss

N, H, V = 11, 6, 23
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A student's last layer, a text, and a teacher over the whole vocabulary."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    teacher: torch.Tensor  # log-probabilities, float64[N, V]

    def inputs(self) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]


@pytest.fixture(scope="module")
def case() -> Case:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    targets = torch.randint(V, (N,), generator=random)
    targets[4] = -1
    weights = torch.rand(N, generator=random, dtype=torch.float64)
    weights[2] = 0.0
    return Case(
        hidden=normal(N, H), weight=normal(V, H), bias=normal(V), targets=targets,
        weights=weights, teacher=(2 * normal(N, V)).log_softmax(-1),
    )  # fmt: skip


def sparse(dense: torch.Tensor, k: int, absent: int = 0) -> SparseTeacher:
    """The k likeliest tokens; of the first positions ``absent`` entries fewer."""
    logprobs, ids = dense.topk(k)
    logprobs, ids = logprobs.clone(), ids.clone()
    if absent:
        logprobs[:3, -absent:], ids[:3, -absent:] = -torch.inf, -1
    tail = (1 - logprobs.exp().sum(-1)).clamp_min(0).log()
    return SparseTeacher(token_ids=ids, logprobs=logprobs, log_tail_mass=tail)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p / q).sum()


def reference(case: Case, teacher: SparseTeacher, objective: Objective, inputs) -> torch.Tensor:
    """float64[N], position by position, from the full softmax."""
    hidden, weight, bias = inputs
    logprobs = (hidden @ weight.T + bias).log_softmax(-1)
    temperature, losses = objective.temperature, []
    for i in range(N):
        ids = teacher.token_ids[i][teacher.token_ids[i] >= 0]
        entries = torch.zeros(V, dtype=torch.bool)
        entries[ids] = True
        q, p = logprobs[i][ids].exp(), teacher.logprobs[i][: len(ids)].exp()
        if teacher.sampled:  # shares of the draws stand for the whole distribution
            losses.append((1 - objective.cross_entropy) * (p * (p / q).log()).sum())
            losses[-1] = losses[-1] + objective.cross_entropy * text(case, objective, logprobs, i)
            continue
        if objective.tail == "bucket" and len(ids) < V:
            q = torch.cat((q, logprobs[i][~entries].exp().sum()[None]))
            p = torch.cat((p, teacher.log_tail_mass[i].exp()[None]))
        q, p = q ** (1 / temperature), p ** (1 / temperature)
        q, p = q / q.sum(), p / p.sum()
        mixed = {"jsd": objective.beta, "skewed_kl": objective.skew}.get(objective.divergence, 0)
        m = mixed * p + (1 - mixed) * q
        loss = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m),
            "skewed_kl": kl(p, m),
            "total_variation": 0.5 * (p - q).abs().sum(),
        }[objective.divergence]
        share = objective.cross_entropy
        told = text(case, objective, logprobs, i)
        losses.append((1 - share) * temperature**2 * loss + share * told)
    return torch.stack(losses)


def text(case: Case, objective: Objective, logprobs: torch.Tensor, i: int) -> torch.Tensor:
    """Cross-entropy of the text at a position, its target smoothed; 0 where there is none."""
    if case.targets[i] < 0:
        return torch.zeros((), dtype=torch.float64)
    smooth = torch.full((V,), objective.label_smoothing / V, dtype=torch.float64)
    smooth[case.targets[i]] += 1 - objective.label_smoothing
    return -(smooth * logprobs[i]).sum()


def check(case: Case, teacher: SparseTeacher, objective: Objective, chunk: int | None) -> None:
    ours, theirs = case.inputs(), case.inputs()
    total, each = projected_loss(*ours, teacher, case.targets, case.weights, objective, chunk=chunk)
    (3 * total).backward()
    expected = reference(case, teacher, objective, theirs)
    (3 * (expected * case.weights).sum()).backward()
    torch.testing.assert_close(each, expected.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(total, (expected * case.weights).sum(), rtol=1e-5, atol=1e-9)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one.grad, theirs_one.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("k", "absent"), [(V, 0), (5, 0), (5, 2), (1, 0)])
def test_loss_and_gradient_are_those_of_the_dense_one(
    case: Case, divergence: str, tail: str, temperature: float, k: int, absent: int
) -> None:
    objective = Objective(divergence=divergence, tail=tail, temperature=temperature)
    check(case, sparse(case.teacher, k, absent), objective, chunk=4)


@pytest.mark.parametrize("chunk", [1, 3, N, None])
@pytest.mark.parametrize(("beta", "skew"), [(0.1, 0.01), (0.9, 0.7)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixed_with_the_text(
    case: Case, divergence: str, temperature: float, beta: float, skew: float, chunk: int | None
) -> None:
    objective = Objective(
        divergence=divergence, temperature=temperature, beta=beta, skew=skew, cross_entropy=0.3,
        label_smoothing=0.1,
    )  # fmt: skip
    check(case, sparse(case.teacher, 5, 2), objective, chunk)


@pytest.mark.parametrize("objective", [
    Objective(), Objective(cross_entropy=0.3, label_smoothing=0.1)
])  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_shares_of_draws_are_learned_as_they_are(
    case: Case, objective: Objective, chunk: int | None
) -> None:
    """Over the student's whole vocabulary: what was not drawn is no outcome of its own."""
    shares = torch.tensor([[5, 2, 1], [8, 0, 0], [4, 4, 0]], dtype=torch.float64)[
        torch.arange(N) % 3
    ]
    ids = case.teacher.topk(3).indices
    teacher = SparseTeacher(
        token_ids=torch.where(shares > 0, ids, -1), logprobs=(shares / 8).log(),
        log_tail_mass=torch.full((N,), -torch.inf, dtype=torch.float64), sampled=True,
    )  # fmt: skip
    check(case, teacher, objective, chunk)


def test_without_a_teacher_it_is_cross_entropy(case: Case) -> None:
    ours, theirs = case.inputs(), case.inputs()
    total, each = projected_loss(
        *ours, None, case.targets, case.weights, Objective(label_smoothing=0.1), chunk=4
    )
    total.backward()
    expected = torch.nn.functional.cross_entropy(
        theirs[0] @ theirs[1].T + theirs[2], case.targets, ignore_index=-1, reduction="none",
        label_smoothing=0.1,
    )  # fmt: skip
    (expected * case.weights).sum().backward()
    torch.testing.assert_close(each, expected.detach())
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one.grad, theirs_one.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_like_its_teacher_has_nothing_to_learn(
    case: Case, divergence: str, tail: str, temperature: float
) -> None:
    hidden, weight, bias = case.inputs()
    teacher = sparse((hidden @ weight.T + bias).detach().log_softmax(-1), 5)
    objective = Objective(divergence=divergence, tail=tail, temperature=temperature)
    total, _ = projected_loss(hidden, weight, bias, teacher, case.targets, case.weights, objective)
    total.backward()
    assert abs(total.item()) < 1e-12
    if divergence != "total_variation":  # whose gradient has a kink there
        assert hidden.grad.abs().max() < 1e-7


def test_draws_give_the_dense_gradient_in_the_mean_and_renormalised_entries_do_not(
    case: Case,
) -> None:
    def gradient(teacher: SparseTeacher, objective: Objective) -> torch.Tensor:
        hidden, weight, bias = case.inputs()
        projected_loss(hidden, weight, bias, teacher, case.targets, case.weights, objective)[
            0
        ].backward()
        return hidden.grad

    dense = gradient(sparse(case.teacher, V), Objective())
    random = np.random.default_rng(0)
    probabilities = case.teacher.exp().numpy()
    draws, repeats = 8, [64, 4096]
    sums, done, errors = torch.zeros_like(dense), 0, []
    for n in repeats:
        while done < n:
            counts = torch.from_numpy(
                np.stack([random.multinomial(draws, p / p.sum()) for p in probabilities])
            )
            ids = torch.where(counts > 0, torch.arange(V), -1).sort(-1, descending=True).values
            found = counts.gather(1, ids.clamp_min(0)).double() / draws
            logprobs = torch.where(ids >= 0, found.log(), -torch.inf)
            teacher = SparseTeacher(
                token_ids=ids[:, :draws], logprobs=logprobs[:, :draws],
                log_tail_mass=torch.full((N,), -torch.inf), sampled=True,
            )  # fmt: skip
            sums += gradient(teacher, Objective())
            done += 1
        errors.append(((sums / done - dense).norm() / dense.norm()).item())
    # 64 times the draws: an eighth of the error, but for chance.
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3
    biased = gradient(sparse(case.teacher, draws), Objective(tail="renormalised"))
    assert (biased - dense).norm() / dense.norm() > 10 * errors[1]


@pytest.mark.parametrize("objective", [Objective(divergence="jsd"), Objective(temperature=2.0)])
def test_draws_estimate_forward_kl_only(case: Case, objective: Objective) -> None:
    teacher = dataclasses.replace(sparse(case.teacher, 5), sampled=True)
    with pytest.raises(ValueError, match="forward KL at temperature 1"):
        projected_loss(*case.inputs(), teacher, case.targets, case.weights, objective)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sure_students_and_teachers_give_finite_numbers(case: Case, divergence: str) -> None:
    hidden = (300 * case.hidden).float().requires_grad_()
    weight = case.weight.float().requires_grad_()
    dense = case.teacher.clone()
    dense[0] = -torch.inf
    dense[0, 3] = 0.0
    teacher = sparse(dense, 5)
    teacher = SparseTeacher(
        token_ids=torch.where(teacher.logprobs > -torch.inf, teacher.token_ids, -1),
        logprobs=teacher.logprobs.float(),
        log_tail_mass=teacher.log_tail_mass.float(),
    )
    objective = Objective(divergence=divergence, cross_entropy=0.1)
    total, each = projected_loss(
        hidden, weight, None, teacher, case.targets, case.weights.float(), objective
    )
    total.backward()
    for tensor in (total, each, hidden.grad, weight.grad):
        assert tensor.isfinite().all()


def test_float32_is_within_rounding_of_float64(case: Case) -> None:
    teacher = sparse(case.teacher, 5, 2)
    wide, narrow = case.inputs(), [t.float().detach().requires_grad_() for t in case.inputs()]
    projected_loss(*wide, teacher, case.targets, case.weights, Objective())[0].backward()
    half = SparseTeacher(
        token_ids=teacher.token_ids,
        logprobs=teacher.logprobs.float(),
        log_tail_mass=teacher.log_tail_mass.float(),
    )
    projected_loss(*narrow, half, case.targets, case.weights.float(), Objective())[0].backward()
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)


def test_logprobs_at_chosen_tokens(case: Case) -> None:
    dense = (case.hidden @ case.weight.T + case.bias).log_softmax(-1)
    ids = torch.randint(V, (N, 4), generator=torch.Generator().manual_seed(1))
    found, first = projected_logprobs_at(case.hidden, case.weight, case.bias, ids, chunk=3)
    torch.testing.assert_close(found, dense.gather(1, ids))
    assert first.equal(dense.argmax(-1))


@pytest.mark.parametrize("temperature", [8.0, 20.0])
def test_a_record_of_the_whole_vocabulary_has_no_tail_at_any_temperature(
    case: Case, temperature: float
) -> None:
    check(case, sparse(case.teacher, V), Objective(temperature=temperature), chunk=4)


def test_a_sure_student_is_still_pulled_to_the_tail(case: Case) -> None:
    hidden, weight = case.hidden, case.weight
    # The student's mass on all other tokens is below what float32 can hold.
    narrow = [(300 * hidden).float().requires_grad_(), weight.float(), None]
    teacher = sparse(case.teacher, 5)
    total, _ = projected_loss(*narrow, teacher, case.targets, case.weights.float(), Objective())
    total.backward()
    wide = [narrow[0].detach().double().requires_grad_(), narrow[1].double(), torch.zeros(())]
    logprobs = (wide[0] @ wide[1].T).log_softmax(-1)
    others = torch.ones(N, V).scatter(1, teacher.token_ids, 0.0).bool()
    rest = logprobs.masked_fill(~others, -torch.inf).logsumexp(-1)
    assert rest.min() < -110
    p = torch.cat((teacher.logprobs, teacher.log_tail_mass[:, None]), 1)
    q = torch.cat((logprobs.gather(1, teacher.token_ids), rest[:, None]), 1)
    expected = ((p.exp() * (p - q)).sum(-1) * case.weights).sum()
    expected.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(narrow[0].grad.double(), wide[0].grad, rtol=1e-4, atol=1e-5)


def test_entries_that_are_not_there_may_stand_anywhere(case: Case) -> None:
    teacher = sparse(case.teacher, 5, 2)
    turned = dataclasses.replace(
        teacher, token_ids=teacher.token_ids.roll(1, 1), logprobs=teacher.logprobs.roll(1, 1)
    )
    assert (turned.token_ids[:3, 0] == -1).all()
    gradients = []
    for record in (teacher, turned):
        inputs = case.inputs()
        projected_loss(*inputs, record, case.targets, case.weights, Objective())[0].backward()
        gradients.append([t.grad for t in inputs])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_position_without_entries_teaches_nothing(case: Case) -> None:
    teacher = SparseTeacher(
        token_ids=torch.full((N, 5), -1), logprobs=torch.full((N, 5), -torch.inf),
        log_tail_mass=torch.zeros(N),
    )  # fmt: skip
    inputs = case.inputs()
    total, _ = projected_loss(*inputs, teacher, case.targets, case.weights, Objective())
    total.backward()
    assert total.item() == 0
    assert all(t.grad.abs().max() < 1e-12 for t in inputs)


def test_gradient_of_bfloat16_weights_does_not_lose_small_chunks() -> None:
    random = torch.Generator().manual_seed(0)
    n, v = 1024, 60
    hidden = torch.randn(n, 16, generator=random).bfloat16()
    weight = (torch.randn(v, 16, generator=random) / 4).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), generator=random)
    projected_loss(hidden, weight, None, None, targets, torch.ones(n), Objective(), chunk=8)[
        0
    ].backward()
    wide = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ wide.T, targets, reduction="sum").backward()
    assert (weight.grad.double() - wide.grad).norm() < 0.006 * wide.grad.norm()


def test_autocast_and_tied_weights(case: Case) -> None:
    """The projection is the embedding matrix too, and both uses give it gradient."""
    ids, teacher = torch.arange(N) % V, sparse(case.teacher, 5)
    tied = case.weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, each = projected_loss(
            tied[ids], tied, None, teacher, case.targets, case.weights.float(), Objective()
        )
    total.backward()
    wide = case.weight.clone().requires_grad_()
    inputs = wide[ids], wide, torch.zeros(V, dtype=torch.float64)
    (reference(case, teacher, Objective(), inputs) * case.weights).sum().backward()
    assert total.dtype == each.dtype == tied.grad.dtype == torch.float32
    assert (tied.grad.double() - wide.grad).norm() < 0.02 * wide.grad.norm()


def test_no_positions(case: Case) -> None:
    none = torch.zeros(0, 1, dtype=torch.int64)
    found, first = projected_logprobs_at(case.hidden[:0], case.weight, case.bias, none)
    assert found.shape == (0, 1) and first.shape == (0,)


def test_without_gradients_it_is_the_same_loss(case: Case) -> None:
    teacher, objective = sparse(case.teacher, 5, 2), Objective(cross_entropy=0.3)
    expected = reference(case, teacher, objective, case.inputs())
    with torch.inference_mode():
        _, each = projected_loss(
            *case.inputs(), teacher, case.targets, case.weights, objective, chunk=4
        )
    torch.testing.assert_close(each, expected.detach(), rtol=1e-5, atol=1e-9)


def sorted_distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """float64[N]: of all ranks, the shorter vocabulary filled up with zeros (Boizard et al.
    2024)."""
    widest = max(p.shape[1], q.shape[1])
    p, q = (
        torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, widest - x.shape[1]))
        for x in (p, q)
    )
    return (p - q).abs().sum(-1)


ULD = Objective(divergence="uld", cross_entropy=0.4)


@pytest.mark.parametrize("vocabulary", [V - 8, V, V + 9])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_sorted_probabilities_of_whole_records_are_the_dense_ones(
    case: Case, vocabulary: int, chunk: int | None
) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    dense = 2 * torch.randn(N, vocabulary, generator=random, dtype=torch.float64)
    teacher = sparse(dense.log_softmax(-1), vocabulary)
    ours, theirs = case.inputs(), case.inputs()
    total, each = projected_loss(*ours, teacher, case.targets, case.weights, ULD, chunk=chunk)
    total.backward()
    logprobs = (theirs[0] @ theirs[1].T + theirs[2]).log_softmax(-1)
    text = torch.nn.functional.nll_loss(logprobs, case.targets, ignore_index=-1, reduction="none")
    expected = 0.6 * sorted_distance(dense.softmax(-1), logprobs.exp()) + 0.4 * text
    (expected * case.weights).sum().backward()
    torch.testing.assert_close(each, expected.detach(), rtol=1e-5, atol=1e-9)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one.grad, theirs_one.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 12, V + 5])
def test_likeliest_tokens_bound_the_distance_of_all_ranks(case: Case, k: int) -> None:
    random = torch.Generator().manual_seed(k)
    dense = torch.randn(N, V + 9, generator=random, dtype=torch.float64).softmax(-1)
    record = sparse(dense.log(), k)
    objective = Objective(divergence="uld", cross_entropy=1e-12)
    _, found = projected_loss(*case.inputs(), record, case.targets, case.weights, objective)
    q = (case.hidden @ case.weight.T + case.bias).softmax(-1)
    whole = sorted_distance(dense, q)
    tails = torch.minimum(
        record.log_tail_mass.exp(), 1 - q.sort(-1, descending=True).values[:, :k].sum(-1)
    )
    assert (found <= whole + 1e-9).all() and (found >= whole - 2 * tails - 1e-9).all()


@pytest.mark.parametrize("k", [1, 3, 12, V + 5])
@pytest.mark.parametrize("chunk", [4, None])
def test_likeliest_tokens_are_compared_rank_by_rank_and_the_rest_as_one(
    case: Case, k: int, chunk: int | None
) -> None:
    random = torch.Generator().manual_seed(k)
    dense = 2 * torch.randn(N, V + 9, generator=random, dtype=torch.float64)
    record = sparse(dense.log_softmax(-1), k)
    ours, theirs = case.inputs(), case.inputs()
    total, each = projected_loss(*ours, record, case.targets, case.weights, ULD, chunk=chunk)
    total.backward()
    logprobs = (theirs[0] @ theirs[1].T + theirs[2]).log_softmax(-1)
    ranked = logprobs.exp().sort(-1, descending=True).values
    first = torch.nn.functional.pad(ranked[:, :k], (0, max(0, k - V)))
    rest = record.log_tail_mass.exp() - ranked[:, k:].sum(-1)
    told = torch.nn.functional.nll_loss(logprobs, case.targets, ignore_index=-1, reduction="none")
    distance = (record.logprobs.exp() - first).abs().sum(-1) + rest.abs()
    expected = 0.6 * distance + 0.4 * told
    (expected * case.weights).sum().backward()
    torch.testing.assert_close(each, expected.detach(), rtol=1e-5, atol=1e-9)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one.grad, theirs_one.grad, rtol=1e-5, atol=1e-9)


def test_positions_that_are_not_aligned_teach_their_text_alone(case: Case) -> None:
    teacher = sparse(case.teacher, 5)
    teacher.token_ids[3], teacher.logprobs[3], teacher.log_tail_mass[3] = -1, -torch.inf, 0.0
    ours, theirs = case.inputs(), case.inputs()
    only = torch.zeros_like(case.weights)
    only[3] = 1
    projected_loss(*ours, teacher, case.targets, only, ULD)[0].backward()
    logits = theirs[0] @ theirs[1].T + theirs[2]
    (0.4 * torch.nn.functional.cross_entropy(logits[3], case.targets[3])).backward()
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one.grad, theirs_one.grad, rtol=1e-5, atol=1e-12)


def test_true_draws_are_not_sorted_probabilities(case: Case) -> None:
    teacher = dataclasses.replace(sparse(case.teacher, 5), sampled=True)
    with pytest.raises(ValueError, match="forward KL at temperature 1"):
        projected_loss(*case.inputs(), teacher, case.targets, case.weights, ULD)
