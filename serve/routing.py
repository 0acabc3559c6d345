"""Which replica is asked: one that can, and of several teachers the one whose engine remembers how
the text begins.

A replica whose engine starts again says so at once, and so is the least loaded of all. A call names
those that have said so (``avoid``), and they are not asked while there are others.

vLLM computes nothing twice that stands at the beginning of two prompts, a passage that many are
asked about or the turns of a conversation so far, but each engine remembers for itself. So texts
that begin alike go to one teacher: by consistent hashing, on which all ingresses agree without a
word between them, with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018), so that what many
share does not keep one teacher busy and the others idle.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from journeyman import prompts
from journeyman.columns import unpacked
from journeyman.recipe import Classes, Labels, Logits

_CHARS = 256  # of a beginning: some blocks of what an engine remembers
_MOST = 1.25  # times the mean load, that one replica may have


class ByLoad(RequestRouter):
    """A request router of Serve's: the less loaded of two."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the first that has room is asked."""
        if pending_request is None:
            return self.by_load(candidate_replicas)
        pending_request.routing_context.should_backoff = True  # where none has room
        return self.ranks(_able(candidate_replicas, pending_request), pending_request)

    def ranks(
        self, replicas: list[RunningReplica], request: PendingRequest
    ) -> list[list[RunningReplica]]:
        """replicas: that may be asked."""
        return self.by_load(replicas)

    def by_load(self, replicas: list[RunningReplica]) -> list[list[RunningReplica]]:
        return [random.sample(replicas, min(2, len(replicas)))]


class ByBeginning(ByLoad):
    """For ``Teacher.label`` and ``Teacher.speak``."""

    def initialize_state(self, columns: Sequence[str], leading: str) -> None:
        """columns: of a text; leading: the one that comes first in the prompt."""
        self._columns, self._leading = columns, leading

    def ranks(
        self, replicas: list[RunningReplica], request: PendingRequest
    ) -> list[list[RunningReplica]]:
        asked = request.args[0] if request.args else None
        if not asked:  # how it is: of any
            return self.by_load(replicas)
        row = unpacked(asked if isinstance(asked, str) else asked[0], self._columns)
        load = self.replica_queue_len_cache.get
        by_name = {one.replica_id.unique_id: one for one in replicas}
        loads = {name: load(one.replica_id) or 0 for name, one in by_name.items()}
        return [[by_name[name]] for name in ranked(row[self._leading], loads)]


def of_teacher(labels: Labels, columns: Sequence[str]) -> dict[str, Any]:
    """Options of the teacher's deployment; by load where what it computes begins otherwise than
    texts do: channel scoring scores the text behind each label."""
    assert not isinstance(labels, Logits)  # a cascade's teacher answers
    leading = prompts.Prompt(labels.prompt, "labels.prompt").leading
    if leading is None or (isinstance(labels, Classes) and labels.scoring == "channel"):
        return by_load()
    arguments = {"columns": list(columns), "leading": leading}
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=ByBeginning, request_router_kwargs=arguments
        )
    }


def by_load() -> dict[str, Any]:
    """Options of a deployment."""
    return {"request_router_config": RequestRouterConfig(request_router_class=ByLoad)}


def _able(replicas: list[RunningReplica], request: PendingRequest) -> list[RunningReplica]:
    """All of them, where each is to be avoided."""
    avoided = request.kwargs.get("avoid", ())
    able = [one for one in replicas if one.replica_id.unique_id not in avoided]
    return able or replicas


def ranked(text: str, loads: Mapping[str, int]) -> list[str]:
    """Names of replicas, the best first; loads: requests that each has in work."""
    beginning = text[:_CHARS].encode(errors="surrogatepass")
    bound = math.ceil(_MOST * (sum(loads.values()) + 1) / max(1, len(loads)))

    def rank(name: str) -> tuple[bool, bytes]:
        mixed = hashlib.blake2b(beginning, digest_size=8, key=name.encode()[:64])
        return loads[name] >= bound, mixed.digest()

    return sorted(loads, key=rank)
