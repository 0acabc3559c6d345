"""Texts that begin alike reach one teacher, and no teacher more than its share."""

import json
from collections import Counter
from collections.abc import Iterator

from ray import serve

from journeyman.recipe import Classes
from serve import routing
from serve.routing import ranked
from tests.serve.conftest import Running

NAMES = ["a", "b", "c", "d"]
IDLE = dict.fromkeys(NAMES, 0)
LABELS = {"kind": "classes", "scoring": "direct", "classes": {"yes": " yes", "no": " no"}}


def test_who_is_asked_depends_on_the_beginning_alone_and_a_lost_replica_moves_only_its_texts():
    texts = [f"conversation {i}: {'x' * 300}" for i in range(400)]
    first = {text: ranked(text, IDLE)[0] for text in texts}

    assert all(ranked(f"{text} and a further turn", IDLE)[0] == first[text] for text in texts)
    assert min(Counter(first.values()).values()) > 400 / 4 * 0.7
    left = {name: 0 for name in NAMES if name != "c"}
    assert all(ranked(text, left)[0] == name for text, name in first.items() if name != "c")


def test_what_all_texts_share_does_not_keep_one_replica_busy():
    loads = dict(IDLE)
    for _ in range(100):  # none of which ends
        loads[ranked("the same beginning", loads)[0]] += 1
        assert max(loads.values()) <= 1.25 * sum(loads.values()) / 4 + 1
    assert min(loads.values()) > 0


def test_serve_asks_by_what_comes_first_in_the_prompt(cascade: Running):
    prompt = "Passage: {{ passage }}\nQuestion: {{ text }}\nAnswer:"
    question = Classes.model_validate(LABELS | {"prompt": prompt})

    @serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        **routing.of_teacher(question, ["passage", "text"]),
    )
    class Teacher:
        def label(self, texts: list[str]) -> str:
            return serve.get_replica_context().replica_id.unique_id

        def speak(self, text: str) -> Iterator[str]:
            yield self.label([text])

        def unready(self) -> None:
            return None

    handle = serve.run(Teacher.bind(), name="routed", route_prefix=None)
    try:
        asked = {
            passage: {
                handle.label.remote([json.dumps({"passage": passage, "text": f"{i}?"})]).result()
                for i in range(4)
            }
            for passage in "abcdefghijkl"
        }
        assert all(len(replicas) == 1 for replicas in asked.values())
        assert len(set.union(*asked.values())) == 2
        for passage, replicas in asked.items():
            text = json.dumps({"passage": passage, "text": "a stream?"})
            assert set(handle.options(stream=True).speak.remote(text)) == replicas
        assert handle.unready.remote().result() is None
    finally:
        serve.delete("routed")


def test_where_texts_do_not_begin_what_the_teacher_computes_load_decides():
    channel = {"scoring": "channel", "prompt": "{{ label }}:", "target": "{{ text }}"}
    filtered = {"prompt": "{{ text | upper }}"}
    for changed in (channel, filtered):
        options = routing.of_teacher(Classes.model_validate(LABELS | changed), ["text"])
        assert options["request_router_config"].get_request_router_class() is routing.ByLoad
