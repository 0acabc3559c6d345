"""On-policy rounds: what each takes, that none is done twice; and, slowly, with real engines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman import corpus, files, models, recipe, steps
from journeyman.errors import RecipeError
from journeyman.folder import Folder
from journeyman.labels import dataset, finishing, pipeline
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Recipe, Training
from journeyman.student import loop, on_policy, round_corpus, step, writing
from tests.benchmarks import tiny_teacher
from tests.conftest import ROOT

from ..labels import synthetic as made
from .conftest import make_causal_recipe

ROUNDS = {"rounds": 2, "share": 0.25, "max_tokens": 6}


def settings(
    labels: dict[str, Any] | None = None, rounds: dict[str, Any] | None = None, **training: Any
) -> Recipe:
    values = make_causal_recipe(workers=1, epochs=1).model_dump(mode="json")
    values["training"] |= {"on_policy": ROUNDS | (rounds or {}), **training}
    asked = {"kind": "generate", "prompt": "the {{ text }}", "k": 3}
    return recipe.parse(values | {"labels": asked | (labels or {})})


# --- the corpora of a round ---


@pytest.mark.parametrize(("n", "share"), [(40, 0.25), (40, 0.3), (7, 0.5), (3, 0.01), (5, 1.0)])
def test_every_prompt_is_taken_before_one_is_taken_twice(n: int, share: float) -> None:
    counts = np.zeros(n, int)
    for number in range(12):
        rows = round_corpus.taken(n, number, share)
        assert len(rows) == len(set(rows)) == max(1, round(share * n))
        counts[rows] += 1
        assert counts.max() - counts.min() <= 1


def test_a_round_has_train_rows_alone_and_what_was_written_behind_them(tmp_path: Path) -> None:
    rows = [made.row(f"w{i}", "train" if i % 4 else "test") for i in range(24)]
    made.write_corpus(tmp_path / "corpus", [rows[:10], rows[10:]])
    n = round_corpus.write_prompts(tmp_path / "corpus", tmp_path / "prompts", 1, 0.5, 4)
    manifest = corpus.read_manifest(tmp_path / "prompts")
    found = [r for s in manifest["shards"]
             for r in corpus.read_shard(tmp_path / "prompts", s["name"]).to_pylist()]  # fmt: skip
    assert n == manifest["rows"] == len(found) == 9 and [s["rows"] for s in manifest["shards"]] == [
        4, 4, 1]  # fmt: skip
    assert {r["id"] for r in found} < {r["id"] for r in rows if r["split"] == "train"}

    asked = made.settings("generate")
    said = [made.generated("", ids, made.distributions(len(ids)), truncated=cut)
            for ids, cut in (([5, 6, 1], False), ([7], True), ([8], False))]  # fmt: skip
    made.write_dataset(tmp_path / "a", asked, [list(zip(rows[:3], said, strict=True))],
                       codec=made.TOP3)  # fmt: skip
    assert round_corpus.write_written(
        tmp_path / "a" / "corpus", tmp_path / "a" / "labels", tmp_path / "written"
    ) == 2  # fmt: skip
    written = corpus.read_shard(tmp_path / "written", "part-00000.parquet").to_pylist()
    assert [r["id"] for r in written] == [rows[0]["id"], rows[2]["id"]]
    assert [json.loads(r["meta"]) for r in written] == [
        {round_corpus.TOKENS: [5, 6, 1]}, {round_corpus.TOKENS: [8]}]  # fmt: skip


# --- which parts are made, with the steps that make them stood in for ---


class Parts:
    """Stand-ins for labeling and training that note what they are asked, and write so much that it
    counts as done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, llama: Model) -> None:
        self.made: list[str] = []
        self.run = run
        self.dies_at = ""
        self.learned_by: list[Training] = []  # of each round
        self.llama = llama  # the student before its first step
        self._llama = llama
        monkeypatch.setattr(pipeline, "label", self._label)
        monkeypatch.setattr(step, "train", self._train)
        monkeypatch.setattr(loop, "train", self._loop)
        monkeypatch.setattr(step, "write_rows", lambda *_, **__: None)

    def _note(self, path: Path) -> None:
        name = str(path.relative_to(self.run))
        if name == self.dies_at:
            raise KeyboardInterrupt
        self.made.append(name)

    def _label(self, asked: Recipe, model: Model, corpus_dir: Path, labels: Path, _: Any) -> None:
        self._note(labels)
        shards = []
        for shard in corpus.read_manifest(corpus_dir)["shards"]:
            rows = corpus.read_shard(corpus_dir, shard["name"]).to_pylist()
            if asked.labels.kind == "generate":
                said = made.generated("w1", [4, 1], made.distributions(2))
            else:
                said = made.logits([4, 1], made.distributions(2))
            shards.append([(row, said) for row in rows])
        if not labels.exists():
            with files.scratch_folder(labels) as part:
                store = made.write_dataset(part, asked.labels, shards, codec=made.TOP3)
                store.finish({"filtered": None})  # which comes last, as in ``finishing.finish``
                (part / "labels").rename(labels)
        finishing.complete(LabelStore(labels), asked)

    def _student(self, folder: Path, inputs: str) -> None:
        self._note(folder)
        with files.replaced_directory(folder) as fresh:
            for file in self._llama.path.iterdir():
                (fresh / file.name).write_bytes(file.read_bytes())
            # A student of its own: rounds depend on the weights that they begin with.
            config = files.read_json(fresh / "config.json") | {"made": inputs}
            (fresh / "config.json").write_text(json.dumps(config))
            best = {"epoch": 1, "step": 2, "agreement": 0.5, "kl": 1.0, "n_rows": 4}
            record = {"inputs": inputs, "seconds": 2.0, "labels": "l", "rows": 3, "steps": 2,
                      "planned_steps": 2, "stopped_early": False, "world_size": 1, "hardware": {},
                      "best": best}  # fmt: skip
            (fresh / "journeyman.json").write_text(json.dumps(record))
            (fresh / "README.md").write_text("---\nlicense: other\n---\n")

    def _train(self, *given: Any, inputs: str, **_: Any) -> None:
        self._student(given[-1], inputs)

    def _loop(self, asked: Recipe, load: Any, parent: Model, folder: Path, *, inputs: str,
              **_: Any) -> None:  # fmt: skip
        assert asked.training.cross_entropy == 0
        assert asked.learner().start == "pretrained" and parent.reference == self._llama.reference
        self.learned_by.append(asked.training)
        self._student(folder, inputs)

    def __call__(self, asked: Recipe) -> list[str]:
        """What a run with these settings makes."""
        self.made.clear()
        on_policy.train(
            asked, self.run / "labels", self.run / "corpus", self.llama, self._llama,
            self.run / "student", inputs=asked.hash, start_inputs="start", labels_digest="labels",
            show=lambda _: None,
        )  # fmt: skip
        return list(self.made)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tiny_llama: Model, tmp_path: Path) -> Parts:
    rows = [made.row(f"w{i}", "train" if i < 12 else "calibrate") for i in range(16)]
    made.write_corpus(tmp_path / "corpus", [rows])
    return Parts(monkeypatch, tmp_path, tiny_llama)


def of_round(number: int, *names: str) -> list[str]:
    wanted = names or ("answers", "scores", "student")
    return [f"on_policy/round-{number:02d}/{name}" for name in wanted]


def test_rounds_follow_each_other_and_end_in_the_runs_student(parts: Parts) -> None:
    assert parts(settings()) == ["on_policy/start", *of_round(0), *of_round(1)]
    record = files.read_json(parts.run / "student" / "journeyman.json")
    assert record["inputs"] == settings().hash and record["seconds"] == 6
    assert len(record["on_policy"]) == 3 and "path" not in str(record["parent"]["model"])
    assert parts(settings()) == []
    taken = [{r for s in corpus.read_manifest(parts.run / folder)["shards"] for r in
              corpus.read_shard(parts.run / folder, s["name"])["id"].to_pylist()}
             for folder in of_round(0, "prompts") + of_round(1, "prompts")]  # fmt: skip
    assert len(taken[0]) == len(taken[1]) == 3 and not taken[0] & taken[1]


@pytest.mark.parametrize(
    ("rounds", "more", "learned"),
    [
        ({}, {}, ("reverse_kl", 0.5)),
        ({"divergence": "jsd"}, {}, ("jsd", 0.5)),
        ({"divergence": "jsd"}, {"beta": 0.25}, ("jsd", 0.25)),
    ],
)
def test_rounds_learn_by_the_divergence_that_is_asked_for(
    rounds: dict[str, Any], more: dict[str, Any], learned: tuple[str, float], parts: Parts
) -> None:
    """Whatever the teacher's own answers were learned by."""
    parts(settings(rounds=rounds, divergence="skewed_kl", **more))
    assert [(t.divergence, t.beta) for t in parts.learned_by] == [learned] * 2


def test_rows_steps_and_seconds_of_a_student_are_of_all_its_rounds(parts: Parts) -> None:
    parts(settings())
    record = files.read_json(parts.run / "student" / "journeyman.json")
    assert (record["rows"], record["steps"], record["seconds"]) == (9, 6, 6)


def test_the_card_of_a_student_names_its_parent_its_labels_and_its_rounds(
    parts: Parts, tmp_path: Path
) -> None:
    folder = tmp_path / "licensed"
    shutil.copytree(parts.llama.path, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    parts.llama = dataclasses.replace(parts.llama, path=folder)
    parts(settings())
    card = (parts.run / "student" / "README.md").read_text()
    assert f"`{parts.llama.reference}` (SHA-256 `{parts.llama.weights_digest}`)" in card
    assert "its card says: mit" in card and "labels of kind `generate`" in card
    assert "- 3 train rows, 1 epochs" in card and "6 s on 1" in card
    assert "2 on-policy round(s)" in card and "scored: 3, 3 rows, `reverse_kl`" in card
    assert "After 2 of 2 steps of the last round" in card


@pytest.mark.parametrize(
    ("dies_at", "left"),
    [
        ("on_policy/round-00/answers", [*of_round(0), *of_round(1)]),
        ("on_policy/round-00/scores", [*of_round(0, "scores", "student"), *of_round(1)]),
        ("on_policy/round-01/student", of_round(1, "student")),
    ],
)
def test_a_killed_run_goes_on_in_the_round_and_at_the_part_where_it_was(
    dies_at: str, left: list[str], parts: Parts
) -> None:
    parts.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        parts(settings())
    parts.dies_at = ""
    assert parts(settings()) == left


def test_labels_whose_last_row_was_labeled_when_the_run_was_killed_are_finished(
    parts: Parts,
) -> None:
    asked = settings(rounds={"rounds": 1})
    parts.dies_at = "on_policy/round-00/student"
    with pytest.raises(KeyboardInterrupt):
        parts(asked)
    parts.dies_at = ""
    for name in of_round(0, "answers", "scores"):  # what comes last is not there
        LabelStore(parts.run / name).finish({"filtered": None})
    assert parts(asked) == of_round(0)
    assert dataset.is_finished(parts.run / "on_policy" / "round-00" / "scores")


class Deadly:
    """Dies in place of the n-th name that is given to a file or a folder, or in no place at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        for of, name in ((Path, "rename"), (Path, "replace"), (Folder, "_put")):
            monkeypatch.setattr(of, name, self._counted(getattr(of, name)))

    def _counted(self, do: Any) -> Any:
        def counted(*given: Any) -> Any:
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt
            return do(*given)

        return counted


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_files_goes_on(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(rounds={"rounds": 1})
    deadly = Deadly(monkeypatch)
    untouched = parts.run
    for n in itertools.count(1):
        parts.run = untouched / str(n)
        shutil.copytree(untouched / "corpus", parts.run / "corpus")
        deadly.n = n
        try:
            parts(asked)
            break
        except KeyboardInterrupt:
            deadly.n = 0
        finished = [
            part
            for part in of_round(0, "answers", "scores")
            if dataset.is_finished(parts.run / part)
        ]
        assert not set(finished) & set(parts(asked)), f"killed at file {n}"  # nothing is paid twice
        record = files.read_json(parts.run / "student" / "journeyman.json")
        assert record["inputs"] == asked.hash and record["seconds"] == 4
        shutil.rmtree(parts.run)
    assert n > 20


def test_changed_settings_make_the_rounds_again_and_more_rounds_go_on(parts: Parts) -> None:
    parts(settings())
    assert parts(settings(rounds={"rounds": 3})) == of_round(2)
    assert parts(settings(rounds={"max_tokens": 5})) == [*of_round(0), *of_round(1)]
    assert (parts.run / "on_policy" / "round-00.old" / "student").exists()


def test_a_student_that_was_trained_without_rounds_is_where_they_start(parts: Parts) -> None:
    parts._student(parts.run / "student", "start")
    assert parts(settings()) == [*of_round(0), *of_round(1)]


# --- what is refused ---


def test_true_draws_are_refused() -> None:
    with pytest.raises(RecipeError, match="which true draws give no unbiased"):
        settings({"codec": "sampled"})


def test_a_student_of_other_tokens_is_refused(tiny_llama: Model, bytes_llama: Model) -> None:
    with pytest.raises(RecipeError, match=r"scores the student's own tokens.* has others"):
        step.check_vocabulary(settings(), bytes_llama, tiny_llama)


@pytest.mark.parametrize("kind", ["logits", "rationales", "classes"])
def test_rounds_need_prompts(kind: str) -> None:
    values = made.recipe_of(kind).model_dump(mode="json")
    with pytest.raises(RecipeError, match=f"needs prompts .* got {kind}"):
        recipe.parse(values | {"training": {"on_policy": {}}})


@pytest.mark.parametrize(
    ("section", "name"), [("teacher", "max_model_len"), ("student", "max_length")]
)
def test_an_answer_must_leave_room_for_its_prompt(section: str, name: str) -> None:
    values = settings().model_dump(mode="json")
    values[section][name] = 6
    with pytest.raises(RecipeError, match=rf"no room for a prompt in {section}\.{name} \(6\)"):
        recipe.parse(values)


def test_what_cannot_be_scored_is_refused_before_a_round_is_paid_for(
    parts: Parts, bytes_llama: Model
) -> None:
    parts.llama = bytes_llama
    with pytest.raises(RecipeError, match="scores the student's own tokens"):
        parts(settings())
    assert not parts.made


def test_a_student_of_a_shorter_context_than_the_teachers_answers_in_its_own(
    tiny_llama: Model,
) -> None:
    values = settings().model_dump(mode="json")
    for context, own in ((1000, 64), (50, 50)):
        values["teacher"]["max_model_len"] = context
        asked = recipe.parse(values)
        by_student = writing.written_by(asked, tiny_llama.path, asked.labels)
        assert by_student.teacher.max_model_len == own


def test_another_chat_template_is_another_prompt(tiny_llama: Model, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for file in tiny_llama.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    other = models.resolve(str(tmp_path))
    step.check_vocabulary(settings(), other, tiny_llama)
    with pytest.raises(RecipeError, match="its chat template is not the teacher's"):
        step.check_vocabulary(settings({"chat": True}), other, tiny_llama)


# --- with engines ---


@pytest.mark.slow
@pytest.mark.timeout(1200)  # five engine starts
def test_two_rounds_with_engines_score_the_students_own_tokens(
    ray_cluster: None, teacher_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round's training, and gone on with."""
    folder = tiny_teacher.make(tmp_path / "teacher", teacher_model)
    asked = recipe.parse(
        {
            "name": "rounds",
            "output": str(tmp_path / "runs"),
            "corpus": {
                "sources": [str(ROOT / "jobs" / "recipes" / "wikitext" / "sentences.txt.gz")],
                "shares": {"train": 0.8, "calibrate": 0.2},
                "limits": {"train": 40, "calibrate": 8},
                "rows_per_shard": 20,
            },
            "teacher": {"model": str(folder), "dtype": "float32", "max_model_len": 256,
                        "max_num_seqs": 16, "cpu_kv_cache_gib": 0.5},
            "labels": {"kind": "generate", "prompt": "{{ text }}:", "max_tokens": 8, "k": 16,
                       "temperature": 1.0},
            "student": {"kind": "causal", "model": str(folder), "start": "pruned", "layers": 1,
                        "max_length": 128},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3,
                         "on_policy": {"rounds": 2, "share": 0.5, "max_tokens": 7}},
        }
    )  # fmt: skip
    labeled, fitted = Counter[str](), Counter[str]()
    label, fit = pipeline.label, loop.train

    def counted(*given: Any, **more: Any) -> Any:
        labeled[str(given[3])] += 1
        return label(*given, **more)

    def killed(*given: Any, **more: Any) -> Any:
        fitted[str(given[3])] += 1
        if sum(fitted.values()) == 3:
            raise KeyboardInterrupt
        return fit(*given, **more)

    monkeypatch.setattr(pipeline, "label", counted)
    monkeypatch.setattr(loop, "train", killed)
    run = steps.Run(asked)
    run.execute("prepare")
    run.execute("label")
    with pytest.raises(KeyboardInterrupt):
        run.execute("train")
    rounds = run.directory / "on_policy"
    assert run.execute("train").seconds is not None
    assert set(labeled.values()) == {1} and len(labeled) == 5  # each dataset was labeled once
    assert sorted(fitted.values()) == [1, 1, 2]
    assert steps.Run(asked).execute("train").seconds is None
    record = files.read_json(run.path("train") / "journeyman.json")
    assert len(record["on_policy"]) == 3
    assert AutoModelForCausalLM.from_pretrained(run.path("train")).config.num_hidden_layers == 1
    for number in range(2):
        _check_scores(rounds / f"round-{number:02d}", folder)


def _check_scores(folder: Path, teacher: Path) -> None:
    """The teacher's dense distributions behind the prompt, at each token that the student wrote."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    answers = {r["id"]: r for r in dataset.read(folder / "answers").to_pylist()}
    scores = dataset.read(folder / "scores")
    codec = dataset.codec_of(LabelStore(folder / "scores").manifest())
    prompts = {r["id"]: r["text"] for s in corpus.read_manifest(folder / "prompts")["shards"]
               for r in corpus.read_shard(folder / "prompts", s["name"]).to_pylist()}  # fmt: skip
    assert codec is not None and len(scores) == len(answers) == 20
    for row, found in zip(scores.to_pylist(), dataset.distributions(scores, codec), strict=True):
        written = codec.unpack_ids(answers[row["id"]]["token_ids"]).tolist()
        assert codec.unpack_ids(row["token_ids"]).tolist() == written
        prompt = tokenizer.encode(f"{prompts[row['id']]}:")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        dense = logits.log_softmax(-1).numpy()
        assert found is not None and len(found.token_ids) == len(written) <= 7
        expected = np.take_along_axis(dense, found.token_ids, axis=1)
        np.testing.assert_allclose(found.logprobs, expected, atol=5e-3)
