"""Which teacher is asked: the one whose engine remembers how the text begins.

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


class ByBeginning(RequestRouter):
    """A request router of Serve's, for ``Teacher.label`` and ``Teacher.speak``."""

    def initialize_state(self, columns: Sequence[str], leading: str) -> None:
        """columns: of a text; leading: the one that comes first in the prompt."""
        self._columns, self._leading = columns, leading

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the first that has room is asked."""
        if pending_request:
            pending_request.routing_context.should_backoff = True  # where none has room
        asked = pending_request.args[0] if pending_request and pending_request.args else None
        if not asked:  # how it is: of any, by load
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        row = unpacked(asked if isinstance(asked, str) else asked[0], self._columns)
        load = self.replica_queue_len_cache.get
        replicas = {one.replica_id.unique_id: one for one in candidate_replicas}
        loads = {name: load(one.replica_id) or 0 for name, one in replicas.items()}
        return [[replicas[name]] for name in ranked(row[self._leading], loads)]


def of_teacher(labels: Labels, columns: Sequence[str]) -> dict[str, Any]:
    """Options of the teacher's deployment; none where what it computes begins otherwise than texts
    do: channel scoring scores the text behind each label."""
    assert not isinstance(labels, Logits)  # a cascade's teacher answers
    leading = prompts.Prompt(labels.prompt, "labels.prompt").leading
    if leading is None or (isinstance(labels, Classes) and labels.scoring == "channel"):
        return {}
    arguments = {"columns": list(columns), "leading": leading}
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=ByBeginning, request_router_kwargs=arguments
        )
    }


def ranked(text: str, loads: Mapping[str, int]) -> list[str]:
    """Names of replicas, the best first; loads: requests that each has in work."""
    beginning = text[:_CHARS].encode(errors="surrogatepass")
    bound = math.ceil(_MOST * (sum(loads.values()) + 1) / max(1, len(loads)))

    def rank(name: str) -> tuple[bool, bytes]:
        mixed = hashlib.blake2b(beginning, digest_size=8, key=name.encode()[:64])
        return loads[name] >= bound, mixed.digest()

    return sorted(loads, key=rank)
