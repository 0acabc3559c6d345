"""A cascade whose student writes, on two real engines in Ray, against transformers."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest

from journeyman import corpus, models, recipe
from journeyman.certify import judging, written
from journeyman.certify.bundle import JudgeRecord, Rate, WrittenBundle, save
from journeyman.errors import BundleMismatch, RecipeError
from journeyman.teacher.tasks import prompt_digest
from serve import loading
from tests.conftest import journeyman
from tests.serve import tiny
from tests.serve.test_app import children

N_TOKENS = 6
TEXTS = tiny.TEXTS[:12]


@dataclass(frozen=True)
class Answer:
    """By transformers, greedily."""

    text: str
    logprobs: np.ndarray  # float64[N_TOKENS]


@dataclass(frozen=True)
class Written:
    folder: Path
    bundle: WrittenBundle
    by_student: dict[str, Answer]
    by_teacher: dict[str, Answer]

    def accepted(self, text: str) -> bool:
        return self.by_student[text].logprobs.mean() > self.bundle.accept_above


def settings_of(folder: Path, **cascade: object) -> recipe.Recipe:
    values = tiny.a_recipe(folder).model_dump(mode="json", exclude_unset=True)
    labels = {"kind": "generate", "prompt": "Say more: {{ text }}", "max_tokens": N_TOKENS}
    student = {"model": str(folder / "student"), "kind": "causal"}
    values |= {"labels": labels, "student": student, "cascade": {"student_cpus": 0.5, **cascade}}
    values["cascade"] |= {"teacher_cpus": 0.5, "request_timeout_s": 30}
    return recipe.parse(values)


def a_bundle(
    folder: Path, student: Path, settings: recipe.Recipe, threshold: float
) -> WrittenBundle:
    return tiny.a_written_bundle(
        models.resolve(str(student)),
        models.resolve(str(folder / "teacher")),
        written.check(settings),
        threshold,
    )


def greedy(folder: Path) -> dict[str, Answer]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    for text in TEXTS:
        ids = tokenizer.encode(f"Say more: {text}", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=N_TOKENS, do_sample=False)
            logits = model(out).logits[0, ids.shape[1] - 1 : -1].double()
        said = out[0, ids.shape[1] :]
        logprobs = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
        answers[text] = Answer(tokenizer.decode(said, skip_special_tokens=True), logprobs.numpy())
    return answers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written")
    tiny.write_teacher(folder / "teacher")
    tiny.write_teacher(folder / "student", seed=1)
    by_student, by_teacher = greedy(folder / "student"), greedy(folder / "teacher")
    settings = settings_of(folder)
    scores = np.sort([answer.logprobs.mean() for answer in by_student.values()])
    gap = int(np.argmax(np.diff(scores)[3:8])) + 3  # wide enough for either engine's rounding
    threshold = float(scores[gap : gap + 2].mean())
    bundle = a_bundle(folder, folder / "student", settings, threshold)
    write(bundle, settings, folder / "bundle")
    return Written(folder, bundle, by_student, by_teacher)


def write(bundle: WrittenBundle, settings: recipe.Recipe, folder: Path) -> None:
    save(bundle, folder)
    (folder / "recipe.json").write_text(json.dumps(settings.model_dump(mode="json")))


def test_what_a_student_that_writes_cannot_be_served_with_is_said(run: Written, tmp_path: Path):
    values = settings_of(run.folder).model_dump(mode="json", exclude_unset=True)
    values["labels"]["prompt"] = "Say less: {{ text }}"
    write(run.bundle, recipe.parse(values), tmp_path / "bundle")
    with pytest.raises(BundleMismatch, match="the recipe's prompt"):
        loading.load(tmp_path / "bundle")
    values["labels"]["prompt"] = "{{ title }}: {{ text }}"
    values["corpus"]["columns"] = {"meta": ["title"]}
    of_two = run.bundle.model_dump() | {"columns": ("text", "title")}
    write(WrittenBundle.model_validate(of_two), recipe.parse(values), tmp_path / "bundle")
    with pytest.raises(RecipeError, match=r"columns text, title"):
        loading.load(tmp_path / "bundle")


@dataclass(frozen=True)
class Running:
    url: str
    client: httpx.Client

    def figures(self) -> dict:
        return self.client.get("/v1/figures").json()

    def switch(self, bundle: Path, bundle_id: str, text: str) -> list[httpx.Response]:
        """As ``serve deploy`` does it; what the text was answered with meanwhile."""
        from ray import serve

        serve.get_app_handle("cascade").reconfigure.remote({"bundle": str(bundle)}).result()
        deadline, answers = time.monotonic() + 120, []
        while (figures := self.figures())["bundle"] != bundle_id:
            assert time.monotonic() < deadline and not figures["reload_failure"], figures
            answers.append(self.ask(text))
            time.sleep(0.1)
        return answers

    def ask(self, text: str, model: str = "cascade", **more: object) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def cascade(ray_cluster: None, run: Written) -> Iterator[Running]:
    from serve.running import running

    with running(run.folder / "bundle") as url, httpx.Client(base_url=url, timeout=60) as client:
        yield Running(url, client)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_student_writes_what_it_is_sure_of_and_the_teacher_the_rest(
    cascade: Running, run: Written
):
    by = {True: 0, False: 0}
    for text in TEXTS:
        body = cascade.ask(text, logprobs=True).json()
        accepted, own = run.accepted(text), run.by_student[text]
        by[accepted] += 1
        expected = own if accepted else run.by_teacher[text]
        [choice], note = body["choices"], body["journeyman"]
        assert note["answered_by"] == ["student" if accepted else "teacher"]
        assert note["confidence"][0] == pytest.approx(own.logprobs.mean(), abs=5e-3)
        assert choice["message"]["content"] == expected.text
        said = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert said == pytest.approx(expected.logprobs[: len(said)].tolist(), abs=1e-2)
        assert note["guarantee"]["holds"]
    assert min(by.values()) > 2, by


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_official_client_streams_from_it(cascade: Running, run: Written):
    client = openai.OpenAI(base_url=f"{cascade.url}/v1", api_key="none")
    for name, own in (("student", run.by_student), ("teacher", run.by_teacher)):
        stream = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": TEXTS[0]}], stream=True
        )
        said = [c.choices[0].delta.content for c in stream if c.choices]
        assert "".join(filter(None, said)) == own[TEXTS[0]].text
        assert len([*filter(None, said)]) > 1 or name == "student"  # the teacher's, as it writes


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_text_too_long_for_the_models_is_refused_with_a_sentence(cascade: Running):
    response = cascade.ask("word " * 500)
    assert response.status_code == 400, response.text
    assert "tokens" in response.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_audits_find_the_promise_broken_and_what_was_kept_is_a_corpus(
    cascade: Running, run: Written, tmp_path: Path
):
    """A looser bundle of the same student takes over in place: of random models, which differ far
    more often than promised."""
    kept = tmp_path / "kept"
    feedback = {"to": str(kept), "audit_rate": 0.5, "roll_s": 1}
    third = sorted(answer.logprobs.mean() for answer in run.by_student.values())[2]
    promise = tiny.a_promise(float(third) + 1e-6)
    looser = WrittenBundle.model_validate(run.bundle.model_dump() | promise)
    write(looser, settings_of(run.folder, feedback=feedback), run.folder / "looser")
    cascade.switch(run.folder / "looser", looser.bundle_id, TEXTS[0])
    deadline = time.monotonic() + 60
    while cascade.figures()["watch"]["rung"] == 0:
        assert time.monotonic() < deadline, cascade.figures()
        for text in TEXTS:
            assert cascade.ask(text).status_code == 200
    status = journeyman("cascade", "status", cascade.url).stdout
    assert "the promise is broken at any threshold: the teacher answers all" in status
    fresh = [f"{text} {i}" for i, text in enumerate(TEXTS * 2)]
    for text in fresh:
        assert cascade.ask(text).json()["journeyman"]["answered_by"] == ["teacher"]
    cascade.switch(run.folder / "bundle", run.bundle.bundle_id, TEXTS[0])

    def rows() -> list[dict]:
        tables = [pq.read_table(path).to_pylist() for path in kept.glob("*.parquet")]
        return [row for table in tables for row in table]

    while not set(fresh) <= {row["text"] for row in rows()}:  # each was escalated
        assert time.monotonic() < deadline + 60, rows()
        time.sleep(0.2)
    by = {"student": run.by_student, "teacher": run.by_teacher}
    known = [row for row in rows() if row["text"] in run.by_student]
    assert {row["answered_by"] for row in known} == set(by)
    for row in known:
        assert row["label"] == by[row["answered_by"]][row["text"]].text
        own = run.by_student[row["text"]].logprobs.mean()
        assert row["confidence"] == pytest.approx(own, abs=5e-3)
    assert {row["bundle"] for row in rows()} == {looser.bundle_id}
    assert {(row["split"], row["propensity"]) for row in rows()} == {
        ("train", 0.5),
        ("certify", 0.5),
    }

    source = tmp_path / "own.jsonl"
    source.write_text(json.dumps({"text": "mine"}))
    values = settings_of(run.folder).model_dump(mode="json", exclude_unset=True)
    values["corpus"] = {
        "sources": [str(source)], "shares": {"train": 1.0}, "feedback": str(kept)
    }  # fmt: skip
    corpus.prepare(recipe.parse(values), tmp_path / "corpus")
    prepared = {row["text"]: row["split"] for row in all_rows(tmp_path / "corpus")}
    audited = {row["text"] for row in rows() if row["split"] == "certify"}
    assert {text for text, split in prepared.items() if split != "train"} == audited
    assert set(prepared) == {row["text"] for row in rows()} | {"mine"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_audits_of_a_judged_promise_ask_the_teacher_what_it_makes_of_both_answers(
    cascade: Running, run: Written, tmp_path: Path
):
    """Of random models, whose answers are never the same by their text."""
    feedback = {"to": str(tmp_path / "kept"), "audit_rate": 1.0}
    values = settings_of(run.folder, feedback=feedback).model_dump(mode="json", exclude_unset=True)
    settings = recipe.parse(values | {"certify": {"match": "judge"}})
    asked = judging.asked_of_judge(settings, written.question(settings))
    rate = Rate(count=0, n=50, low=0.0, high=0.1)
    record = JudgeRecord(
        model=run.bundle.teacher, model_digest=run.bundle.teacher_digest,
        prompt_digest=prompt_digest(asked), n_pairs=9, false_agreement=rate, false_difference=rate,
    )  # fmt: skip
    judged = {"match": "judge", "judge": record}
    bundle = WrittenBundle.model_validate(run.bundle.model_dump() | judged)
    write(bundle, settings, tmp_path / "bundle")
    cascade.switch(tmp_path / "bundle", bundle.bundle_id, TEXTS[0])
    for text in TEXTS:
        assert cascade.ask(text).status_code == 200
    n_accepted = sum(map(run.accepted, TEXTS))
    deadline = time.monotonic() + 60
    while (watch := cascade.figures()["watch"])["judged"] < n_accepted or watch["pending"]:
        assert time.monotonic() < deadline, watch
        time.sleep(0.2)
    assert watch["lost"] == 0 and "judged" in journeyman("cascade", "status", cascade.url).stdout
    cascade.switch(run.folder / "bundle", run.bundle.bundle_id, TEXTS[0])


def all_rows(folder: Path) -> list[dict]:
    names = [shard["name"] for shard in corpus.read_manifest(folder)["shards"]]
    return [row for name in names for row in corpus.read_shard(folder, name).to_pylist()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_while_the_students_engine_is_gone_the_teacher_answers(cascade: Running, run: Written):
    text = next(text for text in TEXTS if run.accepted(text))
    [student] = children("ServeReplica:cascade:Student")
    [engine] = children("EngineCore", of=student)
    os.kill(engine.pid, signal.SIGKILL)
    answered_by = []
    deadline = time.monotonic() + 240
    while answered_by[-2:] != ["teacher", "student"]:  # it has come back
        assert time.monotonic() < deadline, answered_by
        response = cascade.ask(text)
        assert response.status_code == 200, response.text
        [by] = response.json()["journeyman"]["answered_by"]
        if answered_by[-1:] != [by]:
            answered_by.append(by)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_bundle_of_another_student_takes_over_without_dropping_a_request(
    cascade: Running, run: Written
):
    other = run.folder / "other"
    tiny.write_teacher(other / "student", seed=2)
    by_other = greedy(other / "student")
    bundle = a_bundle(run.folder, other / "student", settings_of(run.folder), threshold=-1e3)
    write(bundle, settings_of(run.folder), other / "bundle")
    text = next(text for text in TEXTS if run.accepted(text))
    answers = cascade.switch(other / "bundle", bundle.bundle_id, text)
    assert len(answers) > 10 and {answer.status_code for answer in answers} == {200}
    assert {answer.json()["journeyman"]["answered_by"][0] for answer in answers} == {"student"}
    for text in TEXTS:
        body = cascade.ask(text).json()
        assert body["journeyman"]["answered_by"] == ["student"]
        assert body["journeyman"]["bundle"] == bundle.bundle_id
        assert body["choices"][0]["message"]["content"] == by_other[text].text
