"""The systems that label_capture.py compares, each in a process of its own that keeps its engine.

A system is started once with all cases of one teacher, and then labels the rows of a case round
by round when asked to. Between its turns all of its processes are stopped, so that whoever is
measured has the machine to itself. What one round covers stands at each system.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import psutil

from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Logits, Recipe, Teacher

_START_TIMEOUT_S = 300.0
_ROUND_TIMEOUT_S = 300.0
_SETTLE_S = 1.0  # for what was due while it was stopped
_BLOCK_ROWS = 32  # ray.data.llm's own batch size
_START = "start"  # the case of rows that ray.data.llm gets to show that its engine is up


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of a round: as text, which all systems begin with, and as its tokens."""

    id: str
    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of label and its rows, round by round: ours label those of each round, a peer those
    of every second one (``rounds_of``).

    word_ids: of classes, the token of each label's word.
    """

    name: str
    labels: Logits | Generate | Classes
    rounds: list[list[Row]]
    word_ids: tuple[int, ...] = ()

    def rounds_of(self, peer: str) -> range:
        """The rounds that a peer labels. The last round is ours alone."""
        return range((Bare.name, RayDataLLM.name).index(peer), len(self.rounds) - 1, 2)

    def sampling(self) -> dict[str, Any]:
        """vLLM's sampling parameters for this case, as a user writes them."""
        asked: dict[str, Any]
        match self.labels:
            case Logits(k=k):
                asked = {"prompt_logprobs": k, "max_tokens": 1}
            case Generate(k=k, max_tokens=max_tokens):
                asked = {"logprobs": k, "max_tokens": max_tokens}
            case Classes():
                asked = {"logprob_token_ids": list(self.word_ids), "max_tokens": 1}
        return {"temperature": 0.0, "detokenize": False, "flat_logprobs": True, **asked}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A teacher with all that is asked of it; folder: for what the systems write."""

    recipe: Recipe
    model: Model
    cases: dict[str, Case]
    folder: Path


def engine_arguments(teacher: Teacher, model: Model) -> dict[str, Any]:
    """What every system gives vLLM: Journeyman's, without its worker extension."""
    from journeyman.teacher import engine

    arguments = engine.engine_arguments(teacher, model)
    return {k: v for k, v in arguments.items() if k != "worker_extension_cls"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """One round; output_tokens: that the teacher wrote, where it was to write."""

    seconds: float
    rows: int
    output_tokens: int


class Bare:
    """``vllm.LLM`` with flat log-probabilities: texts in, FlatLogprobs out.

    No template is filled in, nothing is made of them and nothing is written, which is kind to
    this floor.
    """

    name = "bare vLLM flat"

    def __init__(self, setting: Setting) -> None:
        from journeyman.teacher import engine, lifeline

        engine._set_environment(setting.recipe.teacher, draws=False)
        del os.environ[lifeline.PARENT]  # or our plugins would work in this engine as well
        from vllm import LLM

        self._cases = setting.cases
        self._llm = LLM(**engine_arguments(setting.recipe.teacher, setting.model))

    def run(self, case: str, number: int) -> Took:
        from vllm import SamplingParams

        rows = self._cases[case].rounds[number]
        started = time.perf_counter()
        sampling = SamplingParams(**self._cases[case].sampling())
        outputs = self._llm.generate([row.text for row in rows], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Took(
            seconds=seconds,
            rows=len(outputs),
            output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        )

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Journeyman:
    """``labels.replica.Replica``: corpus shards on disk in, committed label shards on disk out.

    Covers reading, templates, tokenising, capture, codec, Parquet and commits; what the actor
    pool does for each shard beside that takes milliseconds (``through_ray_data``).
    """

    name = "journeyman"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._case = ""
        self._replica: Any = None
        for case in setting.cases.values():
            _write_corpus(case, setting.folder / case.name)
        self._turn_to(next(iter(setting.cases)))

    def run(self, case: str, number: int) -> Took:
        from journeyman.labels.replica import Work

        self._turn_to(case)
        in_flight = self._replica._labels.shards_in_flight
        work = [Work(shard=_shard(number, part)) for part in range(in_flight)]
        with ThreadPoolExecutor(in_flight) as threads:
            started = time.perf_counter()
            commits = list(threads.map(self._replica.label, work))
            seconds = time.perf_counter() - started
        assert all(commit.ok == commit.rows for commit in commits)
        return Took(
            seconds=seconds,
            rows=sum(commit.ok for commit in commits),
            output_tokens=sum(commit.output_tokens for commit in commits),
        )

    def close(self) -> None:
        self._replica.close()

    def _turn_to(self, case: str) -> None:
        """A replica asks one kind of label: give this one another, and keep its engine."""
        from journeyman.labels import pipeline, replica
        from journeyman.labels.store import LabelStore

        if case == self._case:
            return
        self._case = case
        settings, model = self._setting.recipe, self._setting.model
        asked = settings.model_copy(update={"labels": self._setting.cases[case].labels})
        folder = self._setting.folder / case
        spec = replica.ReplicaSpec(
            recipe=asked,
            teacher=asked.teacher,
            model=model,
            corpus_dir=folder / "corpus",
            labels=str(folder / "labels"),
            identity=pipeline.identity(asked, model, "benchmark"),
        )
        LabelStore(spec.labels).open(spec.identity)
        if self._replica is None:
            self._replica = replica.Replica(spec, lambda *_: None)
            engine = self._replica._backend
            replica.Engine = lambda *_, **__: engine
            return
        self._replica._heartbeat.cancel()
        self._replica._spec, self._replica._labels = spec, asked.labels
        self._replica._store = LabelStore(spec.labels)
        self._replica._call(self._replica._start())


class RayDataLLM:
    """``ray.data.llm``: texts in, Parquet files of Arrow lists out.

    One dataset runs through all rounds, as its engine lives no longer than a dataset: rows wait
    in a stage in front of it until their round is asked for. A round lasts until its last file
    is written. Kept from it: chat templates, its tokenising stage (its engine tokenises),
    detokenising, and its metrics.
    """

    name = "ray.data.llm"

    def __init__(self, setting: Setting) -> None:
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        from journeyman import cluster

        self._setting = setting
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - 15 by default, the others have 0
        ray.init(
            num_cpus=4,  # as many tasks as it likes, whatever the machine has
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
        )
        self._gate = ray.remote(num_cpus=0)(_Gate).options(max_concurrency=16).remote()
        arguments = engine_arguments(setting.recipe.teacher, setting.model)
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=arguments.pop("model"),
                engine_kwargs=arguments,
                batch_size=_BLOCK_ROWS,
                concurrency=1,
                runtime_env={"env_vars": environment(setting.recipe.teacher)},
                chat_template_stage=False,
                tokenize_stage=False,
                detokenize_stage=False,
                log_engine_metrics=False,
                placement_group_config={"bundles": [{"CPU": 1}]},
            ),
            postprocess=_arrow_lists,
        )
        dataset = ray.data.from_blocks(list(_blocks(setting)))
        dataset = dataset.map_batches(
            _wait, fn_kwargs={"gate": self._gate}, batch_size=None, num_cpus=0.1, concurrency=1
        )
        dataset = processor(dataset).map_batches(
            _write,
            fn_kwargs={"folder": str(setting.folder)},
            batch_size=None,
            batch_format="pyarrow",
        )
        cluster.quiet_ray_data()
        self._written: Counter[tuple[str, int]] = Counter()
        self._output_tokens: Counter[tuple[str, int]] = Counter()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        threading.Thread(target=self._consume, args=(dataset,), daemon=True).start()
        self._run(_START, 0, _BLOCK_ROWS)  # it waits for a full batch

    def run(self, case: str, number: int) -> Took:
        return self._run(case, number, len(self._setting.cases[case].rounds[number]))

    def _run(self, case: str, number: int, n_rows: int) -> Took:
        import ray

        key = (case, number)
        started = time.perf_counter()
        ray.get(self._gate.open.remote(case, number))
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._written[key] >= n_rows, timeout=_ROUND_TIMEOUT_S
            )
        seconds = time.perf_counter() - started
        if self._error or self._written[key] < n_rows:
            raise RuntimeError(f"{self._written[key]} of {n_rows} rows") from self._error
        return Took(
            seconds=seconds, rows=self._written[key], output_tokens=self._output_tokens[key]
        )

    def close(self) -> None:
        import ray

        ray.shutdown()

    def _consume(self, dataset: Any) -> None:
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                with self._changed:
                    for case, number, n_rows, n_tokens in zip(*batch.values(), strict=True):
                        self._written[str(case), int(number)] += int(n_rows)
                        self._output_tokens[str(case), int(number)] += int(n_tokens)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


class _Gate:
    """Holds rows back until their round."""

    def __init__(self) -> None:
        import asyncio

        self._open: set[tuple[str, int]] = set()
        self._changed = asyncio.Condition()

    async def open(self, case: str, number: int) -> None:
        async with self._changed:
            self._open.add((case, number))
            self._changed.notify_all()

    async def wait(self, case: str, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: (case, number) in self._open)


def _wait(batch: dict[str, Any], gate: Any) -> dict[str, Any]:
    import ray

    ray.get(gate.wait.remote(str(batch["case"][0]), int(batch["round"][0])))
    return batch


def _arrow_lists(row: dict[str, Any]) -> dict[str, Any]:
    """A competent user's postprocess: entries of each position as lists that Arrow takes."""
    positions = row["prompt_logprobs"][1:] if row["prompt_logprobs"] else row["logprobs"]
    return {
        "case": row["case"],
        "round": row["round"],
        "id": row["id"],
        "output": row["generated_tokens"],
        "ids": [list(position) for position in positions],
        "logprobs": [[e["logprob"] for e in position.values()] for position in positions],
    }


def _write(table: Any, folder: str) -> Any:
    """The lists to one Parquet file, and how many rows it has."""
    import uuid

    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = table.select(["id", "output", "ids", "logprobs"]).cast(
        pa.schema(
            [
                ("id", pa.string()),
                ("output", pa.list_(pa.int32())),
                ("ids", pa.list_(pa.list_(pa.int32()))),
                ("logprobs", pa.list_(pa.list_(pa.float32()))),
            ]
        )
    )
    case, number = table["case"][0].as_py(), table["round"][0].as_py()
    path = Path(folder) / "ray_data_llm" / case
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(labels, path / f"{number}-{uuid.uuid4().hex}.parquet", compression="zstd")
    n_tokens = sum(map(len, labels["output"].to_pylist()))
    return pa.table({"case": [case], "round": [number], "rows": [len(table)], "tokens": [n_tokens]})


def _blocks(setting: Setting) -> Iterator[Any]:
    """Tables of rows, in the order in which rounds are asked for; a block before them all."""
    import pyarrow as pa

    first, *_ = setting.cases.values()
    rounds = [(_START, 0, first, first.rounds[0][:_BLOCK_ROWS])]
    rounds += [
        (case.name, number, case, case.rounds[number])
        for case in setting.cases.values()
        for number in case.rounds_of(RayDataLLM.name)
    ]
    for name, number, case, rows in rounds:
        for begin in range(0, len(rows), _BLOCK_ROWS):
            yield pa.Table.from_pylist(
                [
                    {
                        "case": name,
                        "round": number,
                        "id": row.id,
                        "prompt": row.text,
                        "sampling_params": case.sampling(),
                    }
                    for row in rows[begin : begin + _BLOCK_ROWS]
                ]
            )


def environment(teacher: Teacher) -> dict[str, str]:
    """What Journeyman sets for its engine, for an actor that starts one."""
    from journeyman.teacher import engine

    engine._set_environment(teacher, draws=False)
    names = ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "LD_PRELOAD",
             "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_CPU_KVCACHE_SPACE",
             "VLLM_CPU_OMP_THREADS_BIND", "MALLOC_MMAP_THRESHOLD_",
             "MALLOC_TRIM_THRESHOLD_")  # fmt: skip
    found = {name: os.environ[name] for name in names if name in os.environ}
    return found | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


def python_path() -> str:
    from journeyman import cluster

    return os.pathsep.join([cluster.python_path(), str(Path(__file__).parent)])


# Journeyman's input


def _write_corpus(case: Case, folder: Path) -> None:
    """A round is as many corpus shards as a replica has in work at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from journeyman import corpus

    (folder / "corpus").mkdir(parents=True)
    parts = case.labels.shards_in_flight
    for number, rows in enumerate(case.rounds):
        for part in range(parts):
            table = pa.Table.from_pylist(
                [
                    {"id": row.id, "text": row.text, "label": None, "split": "train",
                     "meta": None, "count": 1}
                    for row in rows[part::parts]
                ],
                schema=corpus.schema(),
            )  # fmt: skip
            pq.write_table(table, folder / "corpus" / _shard(number, part), compression="zstd")


def _shard(number: int, part: int) -> str:
    return f"part-{number:02d}{part:03d}.parquet"


# Processes


class Process:
    """A system in a process of its own. Close it: its engine ends with it."""

    SYSTEMS: ClassVar[dict[str, Any]] = {s.name: s for s in (Bare, Journeyman, RayDataLLM)}

    def __init__(self, name: str, setting: Setting) -> None:
        """Starts the engine; raises RuntimeError with the reason if that fails."""
        self.name = name
        self._log = setting.folder / f"{name.replace(' ', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(name, setting, theirs, self._log), daemon=False
        )
        started = time.monotonic()
        self._process.start()
        theirs.close()
        self._answer(_START_TIMEOUT_S)
        self.start_seconds = time.monotonic() - started
        self._signal(signal.SIGSTOP)

    def run(self, case: str, number: int) -> Took:
        self._signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        self._pipe.send((case, number))
        took: Took = self._answer(_ROUND_TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        return took

    def _signal(self, signum: signal.Signals) -> None:
        """To it and to all it has started; parents first, so that they start none meanwhile."""
        own = psutil.Process(self._process.pid)
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self, timeout_s: float) -> Any:
        value: Any = "it did not answer in time"
        if self._pipe.poll(timeout_s):
            try:
                value = self._pipe.recv()
            except EOFError:
                value = f"its process died; its last words:\n{self._log.read_text()[-2000:]}"
        if isinstance(value, str):
            raise RuntimeError(f"{self.name}: {value}")
        return value


def _serve(name: str, setting: Setting, pipe: Connection, log: Path) -> None:
    os.setsid()  # one group with all that it starts, so that all of it can be ended
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    system = None
    try:
        system = Process.SYSTEMS[name](setting)
        pipe.send(None)
        while (asked := pipe.recv()) is not None:
            pipe.send(system.run(*asked))
    except EOFError:
        pass  # the benchmark has ended
    except BaseException:
        pipe.send(traceback.format_exc()[-3000:])
    finally:
        if system is not None:
            system.close()


@contextlib.contextmanager
def started(names: Sequence[str], setting: Setting) -> Iterator[list[Process]]:
    """The systems, started one after another."""
    with contextlib.ExitStack() as stack:
        processes = []
        for name in names:
            process = Process(name, setting)
            stack.callback(process.close)
            processes.append(process)
        yield processes
