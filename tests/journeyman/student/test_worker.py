"""Steps of two real workers on gloo against one worker, and against dense float64."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.recipe import Recipe, Student
from journeyman.student import checkpoints, worker
from journeyman.student.causal_learner import Causal
from journeyman.student.classifying import Classifying
from journeyman.student.lesson import Load, Task, load, prepare
from journeyman.student.place import Place
from journeyman.student.plan import Plan

from .conftest import TOPICS, make_causal_recipe, make_recipe, make_rows, reader, write_token_rows
from .test_classifier import make_seeing

BATCHES = [[3, 1, 4, 0, 2], [6], [5, 7]]  # shards of 3 and 2 rows, of 1 and none, of 1 and 1
SURE = [0.9, 0.4, 0.6, 0.5, 0.99, 0.7, 0.8, 0.45]  # how sure the teacher is of the train rows
CLASS_WEIGHTS = dict(zip(TOPICS, (0.5, 2.0, 1.2), strict=True))


def class_rows() -> ClassRows:
    rows = make_rows(n_train=8, n_calibrate=2)
    sure = np.array([*SURE, 0.9, 0.9])[:, None]
    is_first = rows.logprobs == rows.logprobs.max(axis=1, keepdims=True)
    return dataclasses.replace(rows, logprobs=np.log(np.where(is_first, sure, (1 - sure) / 2)))


def classifying(
    encoder: Path, lora: dict[str, int] | None = None, **training: object
) -> tuple[Recipe, Load]:
    recipe = make_recipe(gold_weight=0.3, batch_size=6, **training)
    return recipe, partial(
        Classifying,
        model_dir=encoder,
        student=Student.model_validate(recipe.learner().model_dump() | {"lora": lora}),
        training=recipe.training,
        read_rows=reader(class_rows(), encoder, recipe),
    )


def writing(llama: Path, **training: object) -> tuple[Recipe, Load]:
    recipe = make_causal_recipe(batch_size=6, cross_entropy=0.2, **training)
    return recipe, partial(
        Causal,
        model_dir=llama,
        student=recipe.learner(),
        training=recipe.training,
        rows_dir=llama / "rows",
    )


def steps(
    kind: str,
    model: Path,
    training: dict[str, Any],
    work: Path,
    place: Place,
    batches: Sequence[Sequence[int]] = BATCHES,
    begin: int = 0,
    *,
    wide: bool = False,
) -> dict[str, np.ndarray]:
    """Losses, and the gradients of the last step; a checkpoint is left behind it.

    begin: of the batches, the first that work's checkpoint has not learned. wide: in float64.
    """
    make = {
        "classifier": classifying,
        "seeing": classifying,
        "adapted": partial(classifying, lora={"rank": 4}),
    }
    recipe, loads = (make | {"causal": writing})[kind](model, **training)
    known = checkpoints.Checkpoints(work, "test")
    task = Task(training=recipe.training, checkpoints=known, load=loads)
    state = known.latest()
    assert begin == (state.step if state else 0)
    learner = load(task, state, place.device)
    if wide:
        learner.module.double()
    lesson = prepare(task, state, learner, place)
    reductions = counted(lesson.held.module)
    for module in lesson.learner.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # workers draw their own
    plan = Plan.of(task.training, lesson.state.total_steps)
    taken = worker.Steps(task, lesson, place, plan, None)
    shares = [worker.share(np.array(batch), task.training, place) for batch in batches[begin:]]
    loaded = lesson.learner.batches(part for share in shares for part in share.parts)
    losses = [taken.take(i, share, loaded) for i, share in enumerate(shares, begin)]
    n_reduced = np.array(len(reductions))
    check_damaged_rows_of_one_end_all(taken, len(batches), shares[-1], place)
    learning = {n: p for n, p in lesson.learner.module.named_parameters() if p.requires_grad}
    gradients = {n: whole(p.grad) for n, p in learning.items() if p.grad is not None}
    norm = np.array(lesson.held.gradient_norm())
    n_held = sum(own(p).nbytes for p in lesson.learner.module.parameters())
    write = lesson.snapshot()
    if place.leads:
        work.mkdir(exist_ok=True)
        (work / "attempt").write_text("test")
        known.save(dataclasses.replace(lesson.state, step=len(batches)), write, n_bytes=1)
    check_a_damaged_part_behind_the_first_ends_all(taken, len(batches), place)
    if lesson.held.together and kind == "causal":
        check_damaged_rows_of_one_end_the_evaluation_of_all(taken, place)
    found = {"losses": np.array(losses), "norm": norm, "held": np.array(n_held)}
    return {**found, "reduced": n_reduced, **gradients}


def counted(module: torch.nn.Module) -> list[int]:
    """Grows by one whenever DDP averages the workers' gradients."""
    seen: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch wants classes, not their names
        if bucket.is_last():
            seen.append(bucket.index())
        return allreduce_hook(None, bucket)

    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, hook)
    return seen


def check_damaged_rows_of_one_end_all(
    taken: worker.Steps, step: int, share: worker.Share, place: Place
) -> None:
    """All return the sentence, and none waits for one that has left."""

    def loaded() -> Iterator[Any]:
        if place.rank == place.world_size - 1:
            raise DataError("the labels of row 7 are damaged")
        yield from taken._lesson.learner.batches(iter(share.parts))

    assert str(taken.take(step, share, loaded())) == "the labels of row 7 are damaged"
    taken._trouble = None


def check_a_damaged_part_behind_the_first_ends_all(
    taken: worker.Steps, step: int, place: Place
) -> None:
    """In the midst of a step, where nobody may be missing; it is not taken."""
    share = worker.share(np.arange(6), taken._training, place)

    def loaded() -> Iterator[Any]:
        yield from taken._lesson.learner.batches(iter(share.parts[:-1]))
        if place.rank == place.world_size - 1:
            raise DataError("the labels of row 5 are damaged")
        yield from taken._lesson.learner.batches(iter(share.parts[-1:]))

    before = [own(p).clone() for p in taken._lesson.learner.module.parameters()]
    assert str(taken.take(step, share, loaded())) == "the labels of row 5 are damaged"
    for was, parameter in zip(before, taken._lesson.learner.module.parameters(), strict=True):
        assert torch.equal(was, own(parameter))
    taken._trouble = None


def check_damaged_rows_of_one_end_the_evaluation_of_all(taken: worker.Steps, place: Place) -> None:
    learner = taken._lesson.learner
    found = learner.evaluate(taken._all_read)
    held_out = learner._held_out
    if place.rank == place.world_size - 1:  # of its own copy, say
        payloads = held_out._payloads
        held_out._payloads = payloads ^ np.uint8(0xFF)
    with pytest.raises(DataError, match="the labels of row calibrate-"):
        learner.evaluate(taken._all_read)
    if place.rank == place.world_size - 1:
        held_out._payloads = payloads
    taken._trouble = None
    learner.module.train()
    assert learner.evaluate(taken._all_read) == found


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()


def main(rank: int, work: Path) -> None:
    kind, model, trainings, batches, begin, wide = json.loads((work / "asked.json").read_text())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work / 'meet'}", rank=rank, world_size=2
    )
    place = Place(rank=rank, world_size=2, device=torch.device("cpu"))
    found = [
        steps(kind, Path(model), training, work / name, place, batches, begin, wide=wide)
        for name, training in trainings.items()
    ]
    (work / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def of_two(
    kind: str,
    model: Path,
    training: dict[str, Any],
    work: Path,
    batches: Sequence[Sequence[int]] = BATCHES,
    begin: int = 0,
    *,
    wide: bool = False,
) -> list[dict[str, np.ndarray]]:
    """What each of two workers finds."""
    (found,) = each_of_two(kind, model, {".": training}, work, batches, begin, wide=wide)
    return found


def each_of_two(
    kind: str,
    model: Path,
    trainings: dict[str, dict[str, Any]],
    work: Path,
    batches: Sequence[Sequence[int]] = BATCHES,
    begin: int = 0,
    *,
    wide: bool = False,
) -> list[list[dict[str, np.ndarray]]]:
    """The same for several settings, one after the other, each with a folder of its name."""
    (work / "meet").unlink(missing_ok=True)
    asked = [kind, str(model), trainings, batches, begin, wide]
    (work / "asked.json").write_text(json.dumps(asked))
    code = (
        "import os, sys; from pathlib import Path; sys.path.append('.'); "
        f"from {__name__} import main; "
        # gloo's threads may outlive the interpreter, which would abort then.
        "main(int(sys.argv[1]), Path(sys.argv[2])); os._exit(0)"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(work)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [w.wait() for w in workers] == [0, 0]
    found = [pickle.loads((work / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    return [list(both) for both in zip(*found, strict=True)]


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """To 1e-5, each tensor as a whole; one whose gradient is 0 but for rounding, to that."""
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value)
        assert error <= 1e-5 * np.linalg.norm(value) + 1e-14, f"{name}: {error}"


ALONE = Place(rank=0, world_size=1, device=torch.device("cpu"))


def model_of(kind: str, encoder: Model, llama: Model, folder: Path) -> Path:
    if kind == "seeing":
        make_seeing(folder / "seeing")
        return folder / "seeing"
    if kind != "causal":
        return encoder.path
    copy = shutil.copytree(llama.path, folder / "llama")
    write_token_rows(copy / "rows", n_train=8, n_calibrate=2, weights=SURE)
    return copy


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kind", "accumulate", "parallel"),
    [
        ("classifier", 1, "ddp"),
        ("causal", 3, "ddp"),
        pytest.param("seeing", 3, "ddp", marks=pytest.mark.slow),
        pytest.param("classifier", 3, "fsdp", marks=pytest.mark.slow),
        pytest.param("adapted", 1, "ddp", marks=pytest.mark.slow),
        pytest.param("adapted", 3, "fsdp", marks=pytest.mark.slow),
        ("causal", 3, "fsdp"),
    ],
)
def test_two_workers_take_the_step_of_one(
    kind: str,
    accumulate: int,
    parallel: str,
    tiny_encoder: Model,
    tiny_llama: Model,
    tmp_path: Path,
) -> None:
    model = model_of(kind, tiny_encoder, tiny_llama, tmp_path)
    clipped = {"max_grad_norm": 0.1} if accumulate > 1 else {}
    alone = steps(kind, model, clipped, tmp_path / "alone", ALONE, wide=True)
    training = {"accumulate": accumulate, "parallel": parallel, **clipped}
    whole_student, _ = alone.pop("held"), alone.pop("reduced")
    for shared in of_two(kind, model, training, tmp_path, wide=True):
        assert shared.pop("held") == pytest.approx(
            whole_student / (2 if parallel == "fsdp" else 1), rel=0.05
        )
        # Once a step, however many parts it has.
        assert shared.pop("reduced") == (len(BATCHES) if parallel == "ddp" else 0)
        check_same(shared, alone)


OBJECTIVES: dict[str, list[dict[str, object]]] = {
    "tops": [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3, "label_smoothing": 0.1},
        {"divergence": "skewed_kl", "skew": 0.2},
        {"divergence": "total_variation"},
        {"tail": "renormalised"},
        {"temperature": 2.0},
    ],
    "draws": [{}],
    "reasonings": [{"rationale_weight": 0.5}, {"label_smoothing": 0.2}],
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("form", list(OBJECTIVES))
def test_two_workers_take_the_step_of_one_whatever_is_learned(
    form: Any, tiny_llama: Model, tmp_path: Path
) -> None:
    """That of one is held against dense float64 in test_projection and test_step_by_step."""
    model = shutil.copytree(tiny_llama.path, tmp_path / "llama")
    write_token_rows(model / "rows", n_train=8, n_calibrate=2, weights=SURE, form=form)
    asked = {f"{i}": objective for i, objective in enumerate(OBJECTIVES[form])}
    cut = {name: objective | {"accumulate": 2} for name, objective in asked.items()}
    shared = each_of_two("causal", model, cut, tmp_path, BATCHES[:2], wide=True)
    gradients = set()
    for both, (name, objective) in zip(shared, asked.items(), strict=True):
        work = tmp_path / f"alone-{name}"
        alone = steps("causal", model, objective, work, ALONE, BATCHES[:2], wide=True)
        del alone["held"], alone["reduced"]
        for found in both:
            check_same(found, alone)
        gradients.add(float(alone["norm"]))
    assert len(gradients) == len(asked)  # each is another objective


@pytest.mark.parametrize("form", ["tops", "reasonings"])
def test_texts_whose_loss_is_no_number_are_named(
    form: Any, tiny_llama: Model, tmp_path: Path
) -> None:
    """Those alone, whichever part of the step they are in."""
    model = shutil.copytree(tiny_llama.path, tmp_path / "llama")
    write_token_rows(model / "rows", n_train=8, n_calibrate=2, form=form)
    recipe, loads = writing(model, accumulate=3)
    task = Task(
        training=recipe.training, checkpoints=checkpoints.Checkpoints(tmp_path / "work", "test"),
        load=loads,
    )  # fmt: skip
    lesson = prepare(task, None, load(task, None, ALONE.device), ALONE)
    row_ids = np.array(lesson.learner._rows.ids)
    taken = worker.Steps(task, lesson, ALONE, Plan.of(task.training, 4), None)
    share = worker.share(np.array([3, 1, 4, 0, 2]), task.training, ALONE)
    lesson.learner._weights[row_ids == "train-1"] = np.nan
    found = taken.take(0, share, lesson.learner.batches(iter(share.parts)))
    assert "the loss is nan for the rows train-1; look at their labels" in str(found)


def test_gradients_are_scaled_to_the_largest_norm_and_no_further(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    one = [BATCHES[0]]
    free = steps("classifier", tiny_encoder.path, {}, tmp_path / "free", ALONE, one)
    free.pop("held"), free.pop("losses"), free.pop("reduced")
    norm = float(free.pop("norm"))
    for i, largest in enumerate((norm / 3, norm * 3)):
        bound = {"max_grad_norm": largest}
        got = steps("classifier", tiny_encoder.path, bound, tmp_path / f"{i}", ALONE, one)
        assert got["norm"] == pytest.approx(min(largest, norm), rel=1e-5)
        for name, gradient in free.items():
            expected = gradient * min(1.0, largest / norm)
            np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "then"), [("classifier", "fsdp"), ("causal", "alone")])
def test_sharded_students_go_on_from_whole_checkpoints(
    kind: str, then: str, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    model = model_of(kind, tiny_encoder, tiny_llama, tmp_path)
    undisturbed = steps(kind, model, {}, tmp_path / "alone", ALONE)
    sharded, work = {"parallel": "fsdp"}, tmp_path / "work"
    work.mkdir()
    of_two(kind, model, sharded, work, BATCHES[:2])
    if then == "fsdp":
        resumed = of_two(kind, model, sharded, work, BATCHES, begin=2)[0]
    else:
        resumed = steps(kind, model, {}, work, ALONE, BATCHES, begin=2)
    np.testing.assert_allclose(resumed.pop("losses"), undisturbed["losses"][2:], atol=2e-5)
    del resumed["held"], resumed["reduced"]
    for name, gradient in resumed.items():
        np.testing.assert_allclose(gradient, undisturbed[name], atol=2e-5, err_msg=name)
    saved, expected = (
        load_file(folder / "checkpoints" / "step-00000003" / "model" / "model.safetensors")
        for folder in (work, tmp_path / "alone")
    )
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("accumulate", "world_size", "parts"),
    [(1, 4, [3]), (2, 4, [2, 1]), (1, 2, [3, 3]), (1, 1, [3, 3, 3, 3]), (2, 3, [2, 2])],
)
def test_fewer_workers_take_more_parts_of_the_same_size(
    accumulate: int, world_size: int, parts: list[int]
) -> None:
    training = make_recipe(workers=4, batch_size=12, accumulate=accumulate).training
    batch, shares = np.arange(12), []
    for rank in range(world_size):
        place = Place(rank=rank, world_size=world_size, device=ALONE.device)
        shares.append(worker.share(batch, training, place))
    assert [len(part) for part in shares[0].parts] == parts
    rows = np.concatenate([part for share in shares for part in share.parts])
    assert sorted(rows) == batch.tolist()


def of_classes(model: torch.nn.Module, learner: Classifying, rows: list[int]) -> list[torch.Tensor]:
    """Each row's loss, from the recipe's words."""
    known, tokens = class_rows(), learner._tokens
    losses = []
    for i in rows:
        ids = torch.tensor(tokens.ids[slice(*tokens.starts[i : i + 2])])[None].long()
        q = model(input_ids=ids).logits[0].log_softmax(-1)
        p = torch.tensor(known.logprobs[i])
        weights = torch.tensor(list(CLASS_WEIGHTS.values()), dtype=torch.float64)
        p, gold = (0.9 * p.exp() + 0.1 / 3) * weights, known.gold[i]
        loss = (p * (p / p.sum()).log() - p * q).sum()
        told = (0.9 * torch.eye(3)[gold] + 0.1 / 3) * weights
        losses.append(loss if gold < 0 else 0.7 * loss - 0.3 * (told * q).sum())
    return losses


def of_tokens(model: torch.nn.Module, learner: Causal, rows: list[int]) -> list[torch.Tensor]:
    """Each row's sum over its tokens."""
    losses = []
    for i in rows:
        batch = learner._rows.batch(np.array([i]))
        ids = torch.tensor(batch.rows.ids).long()[None]
        q = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        p = torch.tensor(batch.logprobs).double()
        rest = torch.tensor(batch.log_tail_mass).double()
        total = torch.logaddexp(p.logsumexp(-1), rest)
        entries = q.gather(1, torch.tensor(batch.token_ids))
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(len(rest)):
            others = (q[t].exp().sum() - entries[t].exp().sum()).log()
            pt, rt = p[t] - total[t], rest[t] - total[t]
            kl = (pt.exp() * (pt - entries[t])).sum() + rt.exp() * (rt - others)
            loss = loss + 0.8 * kl - 0.2 * q[t, batch.targets[t]]
        losses.append(loss)
    return losses


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_weighted_rows_take_the_step_of_dense_float64(
    kind: str, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    model = model_of(kind, tiny_encoder, tiny_llama, tmp_path)
    rows, training = BATCHES[0], {"accumulate": 2}
    if kind == "classifier":  # a language model's rows weigh what was written
        training |= {"row_weight": "confidence", "class_weight": CLASS_WEIGHTS,
                     "label_smoothing": 0.1}  # fmt: skip
    _, load = {"classifier": classifying, "causal": writing}[kind](model, **training)
    learner = load(None, ALONE.device)
    dense = learner.module.double().eval()
    losses = {"classifier": of_classes, "causal": of_tokens}[kind](dense, learner, rows)
    sizes = learner.sizes
    weights = np.array(SURE) * sizes.sum() / (np.array(SURE) * sizes).sum()
    assert (weights * sizes).sum() / sizes.sum() == pytest.approx(1, abs=1e-12)
    loss = sum(weights[i] * one for i, one in zip(rows, losses, strict=True)) / sizes[rows].sum()
    loss.backward()
    alone = steps(kind, model, training, tmp_path / "alone", ALONE, [rows], wide=True)
    expected = {name: parameter.grad.numpy() for name, parameter in dense.named_parameters()}
    for found in (alone, *of_two(kind, model, training, tmp_path, [rows], wide=True)):
        np.testing.assert_allclose(found["losses"], [loss.item()], rtol=1e-5)
        check_same(found, expected)
