"""An exact-match cache in front of a cascade: a text that was answered before is not asked again.

Belongs to one bundle. Answers for which nothing is promised are never kept. Holds digests of texts,
not texts.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from journeyman.cascade.answering import Answers, Asked
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.recording import Answering
from journeyman.cascade.refusals import Refusal, TextRefused


def _elsewhere(refusal: TextRefused, places: Sequence[int]) -> TextRefused:
    """The same refusal; places: of its texts in another request."""
    other = TextRefused(places[refusal.place], refusal.reason)
    other.unlabeled = frozenset(places[place] for place in refusal.unlabeled)
    other.teacher_prompt_tokens = refusal.teacher_prompt_tokens
    other.teacher_output_tokens = refusal.teacher_output_tokens
    return other


def _filled(
    found: Sequence[Decision | None], fresh: Sequence[Decision | Escalation]
) -> Sequence[Decision | Escalation]:
    """fresh: of those that are not found, or nothing at all."""
    rest = iter(fresh)
    return [known or next(rest) for known in found] if fresh else ()


class Remembering:
    """Answers as ``inner`` does; keeps the answers to the ``size`` texts that were asked last."""

    def __init__(self, inner: Answering, size: int) -> None:
        self._inner, self._size = inner, size
        self._known: OrderedDict[bytes, Decision] = OrderedDict()
        self._rule = 0  # counts its changes

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Raises Refusal."""
        if asked != "cascade":
            return await self._inner.answer(texts, asked)
        rule = self._rule
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        found = [self._recall(key) for key in keys]
        missing = [i for i, decision in enumerate(found) if decision is None]
        if not missing:
            decided = tuple(d for d in found if d)
            return Answers(decisions=decided, remembered=frozenset(range(len(texts))))
        try:
            fresh = await self._inner.answer([texts[i] for i in missing])
        except TextRefused as refusal:
            other = _elsewhere(refusal, missing)
            other.decided = _filled(found, refusal.decided)
            raise other from refusal
        except Refusal as refusal:
            refusal.decided = _filled(found, refusal.decided)
            raise
        void = frozenset(missing[i] for i in fresh.void)
        decisions = dict(zip(missing, fresh.decisions, strict=True))
        for i, decision in decisions.items():
            if i not in void and rule == self._rule:  # else it was decided by an older one
                self._keep(keys[i], decision)
        return Answers(
            decisions=tuple(known or decisions[i] for i, known in enumerate(found)),
            teacher_prompt_tokens=fresh.teacher_prompt_tokens,
            teacher_output_tokens=fresh.teacher_output_tokens,
            void=void,
            remembered=frozenset(range(len(texts))) - frozenset(missing),
        )

    def forget(self) -> None:
        """Everything: the rule has changed by which it was answered."""
        self._rule += 1
        self._known.clear()

    def _recall(self, key: bytes) -> Decision | None:
        decision = self._known.get(key)
        if decision is not None:
            self._known.move_to_end(key)
        return decision

    def _keep(self, key: bytes, decision: Decision) -> None:
        self._known[key] = decision
        self._known.move_to_end(key)
        if len(self._known) > self._size:
            self._known.popitem(last=False)
