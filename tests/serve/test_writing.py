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
import pytest

from journeyman import models, recipe
from journeyman.certify import written
from journeyman.certify.bundle import WrittenBundle, save
from journeyman.errors import BundleMismatch, RecipeError
from serve import loading
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
    bundle = tiny.a_written_bundle(
        models.resolve(str(folder / "student")),
        models.resolve(str(folder / "teacher")),
        written.check(settings),
        threshold=float(scores[gap : gap + 2].mean()),
    )
    save(bundle, folder / "bundle")
    (folder / "bundle" / "recipe.json").write_text(json.dumps(settings.model_dump(mode="json")))
    return Written(folder, bundle, by_student, by_teacher)


def test_what_a_student_that_writes_cannot_be_served_with_is_said(run: Written, tmp_path: Path):
    (tmp_path / "bundle").mkdir()
    save(run.bundle, tmp_path / "bundle")
    kept = settings_of(run.folder, feedback={"to": str(tmp_path / "kept")})
    (tmp_path / "bundle/recipe.json").write_text(json.dumps(kept.model_dump(mode="json")))
    with pytest.raises(RecipeError, match=r"cascade\.feedback"):
        loading.load(tmp_path / "bundle")
    other = settings_of(run.folder).model_dump(mode="json")
    other["labels"]["prompt"] = "Say less: {{ text }}"
    (tmp_path / "bundle/recipe.json").write_text(json.dumps(other))
    with pytest.raises(BundleMismatch, match="the recipe's prompt"):
        loading.load(tmp_path / "bundle")


@dataclass(frozen=True)
class Running:
    url: str
    client: httpx.Client

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
        said = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert said == own[TEXTS[0]].text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_text_too_long_for_the_models_is_refused_with_a_sentence(cascade: Running):
    response = cascade.ask("word " * 500)
    assert response.status_code == 400, response.text
    assert "tokens" in response.json()["error"]["message"]


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
