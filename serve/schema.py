"""What travels over HTTP: requests, answers, errors. FastAPI's page (/docs) is made of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from journeyman.cascade.answering import Answers, Asked
from journeyman.cascade.policy import AnsweredBy, Decision
from journeyman.cascade.refusals import ColumnsRefused
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.certify.certificate import GuaranteeKind
from journeyman.columns import packed
from journeyman.errors import DataError
from serve.live import Served

MAX_TEXTS = 256
MAX_CHARACTERS = 32_768
_DEPTH = 3  # of lists and objects in the deepest field that there is

# As in a corpus, whose rows without text are malformed.
Text = Annotated[str, Field(max_length=MAX_CHARACTERS, pattern=r"\S")]
Columns = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_CHARACTERS)]], Field(min_length=1, max_length=64)
]


class Body(BaseModel):
    """Of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_sane_size(cls, data: Any) -> Any:
        """Before each of a million entries is found to be wrong by itself."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if _crowded(value, _DEPTH):
                raise ValueError(f"{name}: list should have at most {MAX_TEXTS} items")
            if len(data) > MAX_TEXTS:
                raise ValueError(f"the body has more than {MAX_TEXTS} fields")
        return data


def _crowded(value: Any, depth: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return len(value) > MAX_TEXTS or (depth > 0 and any(_crowded(v, depth - 1) for v in inside))


class ClassifyRequest(Body):
    """One text or several, and who shall answer."""

    input: (
        Text | Columns | Annotated[list[Text | Columns], Field(min_length=1, max_length=MAX_TEXTS)]
    ) = Field(
        description=f"The text, or up to {MAX_TEXTS} of them, of at most {MAX_CHARACTERS} "
        "characters each. Where the bundle needs further columns (`columns` of GET /v1/bundle), an "
        "object of them in place of each text.",
        examples=["please book me a flight to berlin"],
    )
    model: Asked = Field(
        "cascade",
        description="cascade: the student where it may answer, else the teacher. student, "
        "teacher: that one alone, without any guarantee.",
    )

    def texts(self, columns: Sequence[str]) -> list[str]:
        """As a cascade takes them; columns: the bundle's. Raises ColumnsRefused."""
        rows = self.input if isinstance(self.input, list) else [self.input]
        return [_packed(place, row, columns) for place, row in enumerate(rows)]


def _packed(place: int, row: str | dict[str, str], columns: Sequence[str]) -> str:
    try:
        return packed(row, columns)
    except DataError as error:
        raise ColumnsRefused(f"text {place}: {error}") from error


class Result(BaseModel):
    """The answer to one text."""

    label: str
    answered_by: AnsweredBy
    confidence: float | None = Field(
        description="The student's score, which the bundle's threshold is compared with; null if "
        "the student was not asked, or the text is longer than any that was certified (`longest` "
        "of GET /v1/bundle): such a text is the teacher's, however sure the student is. Of "
        "several students, of the one that answered, or of the last that was asked, less its own "
        "threshold."
    )
    stage: int | None = Field(
        None, description="Of several students, which one answered, counted from 1."
    )
    probabilities: dict[str, float] = Field(description="Of who answered, by label.")


class Promise(BaseModel):
    """The guarantee under which the cascade answers; see GET /v1/bundle for how it came about."""

    holds: bool = Field(description="Whether this is promised of these answers; see reason.")
    reason: Literal["void", "tightened"] | None = Field(
        description="Why it does not hold, null where it does. void: the student answered in place "
        "of a teacher that failed. tightened: audits found it broken as certified; the threshold "
        "is stricter since, and nothing is promised until a new bundle is certified."
    )
    kind: GuaranteeKind
    alpha: float = Field(description="The rate of the kind's disagreements is at most this,")
    delta: float = Field(description="but for this chance of bad luck in the certified rows.")


class Usage(BaseModel):
    """What the request cost."""

    teacher_prompt_tokens: int
    teacher_output_tokens: int
    answered_by_student: int = Field(description="Texts.")
    answered_by_teacher: int = Field(description="Texts.")


class ClassifyAnswer(BaseModel):
    """The answers to a request, in the order of its texts."""

    id: str
    object: Literal["classification"] = "classification"
    model: Asked
    bundle: str = Field(description="Id of the policy bundle that decided.")
    guarantee: Promise | None = Field(description="Null where one model was asked for.")
    results: list[Result]
    usage: Usage


class Health(BaseModel):
    status: Literal["ok", "ready"]


class ErrorBody(BaseModel):
    message: str
    type: str
    code: str


class ErrorAnswer(BaseModel):
    """Every error's form, OpenAI's."""

    error: ErrorBody


def promise_of(
    answers: Answers, served: Served, asked: Asked, *, as_asked: bool = True
) -> Promise | None:
    """None where one model alone was asked; or where an answer was cut as the request wished
    (as_asked is false then), since the promise is about whole ones."""
    if asked != "cascade" or not as_asked:
        return None
    guarantee = served.bundle.served
    return Promise(
        holds=not answers.void and not served.tightened(),
        reason="void" if answers.void else "tightened" if served.tightened() else None,
        kind=guarantee.kind,
        alpha=guarantee.alpha,
        delta=guarantee.delta,
    )


# All that `headers_of` gives.
ANSWER_HEADERS = tuple(
    f"x-journeyman-{what}" for what in ("answered-by", "bundle", "guarantee", "stage", "confidence")
)


def headers_of(
    answers: Answers, served: Served, asked: Asked, *, as_asked: bool = True
) -> dict[str, str]:
    """What a proxy or a log needs to know of an answer without reading it."""
    by = {decision.answered_by for decision in answers.decisions}
    promise = promise_of(answers, served, asked, as_asked=as_asked)
    guarantee = "none" if promise is None else promise.reason or "holds"
    headers = {
        "x-journeyman-answered-by": by.pop() if len(by) == 1 else "both",
        "x-journeyman-bundle": served.bundle.bundle_id,
        "x-journeyman-guarantee": guarantee,
    }
    stages = {decision.stage for decision in answers.decisions}
    if len(stages) == 1 and (stage := stages.pop()) is not None:
        headers["x-journeyman-stage"] = str(stage)
    confidence = answers.decisions[0].confidence
    if len(answers.decisions) == 1 and confidence is not None:
        headers["x-journeyman-confidence"] = f"{confidence:.6f}"
    return headers


def probabilities_of(decision: Decision, label_names: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(label_names, decision.probabilities.tolist(), strict=True))


def bundle_card(bundle: PolicyBundle | WrittenBundle) -> dict[str, Any]:
    """The bundle as GET /v1/bundle shows it: without the curve, which is long."""
    content = bundle.model_dump(mode="json", exclude={"curve"})
    return {"id": bundle.bundle_id, "object": "bundle", **content}
