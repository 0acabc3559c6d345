"""Checkpoints on a disk that fills up, and such as are cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from journeyman.errors import ClusterError, DataError
from journeyman.folder import Folder
from journeyman.mirror import Mirror
from journeyman.student import checkpoints as module
from journeyman.student import loop
from journeyman.student.checkpoints import Checkpoints, State, read_curve
from tests.conftest import small_disk
from tests.journeyman.labels.object_server import ObjectServer, serving

FILES = ("state.json", "model/config.json", "model/model.safetensors", "optimizer.pt")


def state(step: int) -> State:
    return State(step=step, total_steps=9, seconds=1.0, n_rows=5, evaluations=())


def content(n: int = 8) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text('{"layers": 2}')
        save_file({"w": torch.ones(n)}, folder / "model" / "model.safetensors")
        torch.save({"moments": torch.ones(2 * n)}, folder / "optimizer.pt")

    return write


def bytes_of(n: int) -> int:
    return 3 * 4 * n


def two_checkpoints(work: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    checkpoints = Checkpoints.claim(work)
    monkeypatch.setattr(Checkpoints, "_keep", lambda *_: None)
    for step in (1, 2):
        checkpoints.save(state(step), content(), bytes_of(8))
    monkeypatch.undo()
    return checkpoints


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", ["half", "last byte", "all", "gone"])
def test_a_checkpoint_that_is_cut_short_is_never_read(
    name: str, cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = two_checkpoints(tmp_path, monkeypatch)
    path = checkpoints.path(2) / name
    whole = path.read_bytes()
    if cut == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: {"half": len(whole) // 2, "last byte": -2, "all": 0}[cut]])
    assert checkpoints.latest() == state(1)
    with pytest.raises(DataError, match=r"step-00000002: the checkpoint is cut short or gone"):
        checkpoints.model(2)
    # Training goes on at the one before, and writes it anew.
    checkpoints.save(state(2), content(), bytes_of(8))
    assert checkpoints.latest() == state(2)
    assert path.read_bytes() == whole


def test_a_file_too_many_is_no_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = two_checkpoints(tmp_path, monkeypatch)
    (checkpoints.path(2) / "model" / "shard-2.safetensors").write_bytes(b"x")
    assert checkpoints.latest() == state(1)


@pytest.mark.parametrize("n", [60_000, 140_000], ids=["in the optimizer", "in the weights"])
def test_a_full_disk_leaves_the_former_checkpoint(n: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as work:
        checkpoints = Checkpoints.claim(work)
        checkpoints.save(state(1), content(), bytes_of(8))
        with pytest.raises(ClusterError, match="the disk is full; free some space there"):
            checkpoints.save(state(2), content(n), bytes_of(n))
        assert [p.name for p in (work / "checkpoints").iterdir()] == ["step-00000001"]
        assert checkpoints.latest() == state(1)
        # What is wrong with the tensors themselves is not laid on the disk.
        with pytest.raises(TypeError, match="no tensors"):
            checkpoints.save(state(2), no_tensors, bytes_of(8))


def no_tensors(folder: Path) -> None:
    raise TypeError("no tensors")


def test_a_full_disk_is_named_by_the_curve(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as work:
        checkpoints = Checkpoints.claim(work)
        checkpoints.record(kind="steps", step=1)
        with pytest.raises(OSError, match="No space"):
            (work / "filler").write_bytes(b"0" * 100_000)
        with pytest.raises(ClusterError, match="the disk is full"):
            for step in range(2, 500):
                checkpoints.record(kind="steps", step=step)
        (work / "filler").unlink()
        checkpoints.start_curve(1)
        checkpoints.record(kind="steps", step=2)
        assert checkpoints.curve.read_text().count("\n") == 2


def test_workers_that_start_again_void_what_lost_ones_write(tmp_path: Path) -> None:
    driver = Checkpoints.claim(tmp_path)
    lost = driver.restarted()
    again = driver.restarted()
    with pytest.raises(ClusterError, match="has taken over; this one stops"):
        lost.record(kind="steps", step=1)
    with pytest.raises(ClusterError, match="has taken over"):
        lost.save(state(1), content(), bytes_of(8))
    again.record(kind="steps", step=1)
    another = Checkpoints.claim(tmp_path)
    for before in (driver, again):  # a killed driver's workers, started again by Ray
        with pytest.raises(ClusterError, match="has taken over"):
            before.restarted()
    another.restarted().save(state(1), content(), bytes_of(8))
    assert another.latest() == state(1)


def test_a_node_without_the_runs_folder_says_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints.claim(tmp_path / "work")
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="must be a folder on a disk that all nodes share"):
        checkpoints.restarted()


# --- nodes that share a store, and no disk ---


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectServer, str]]:
    with serving(monkeypatch) as (server, url):
        yield server, url


def on_node(tmp_path: Path, name: str, url: str, before: Checkpoints) -> Checkpoints:
    """What a worker on that node is sent."""
    return Checkpoints(Mirror(local=tmp_path / name, url=url), before.attempt)


def test_a_worker_elsewhere_goes_on_from_the_store(
    store: tuple[ObjectServer, str], tmp_path: Path
) -> None:
    _, url = store
    driver = Checkpoints.claim(Mirror(local=tmp_path / "driver", url=url))
    lost = on_node(tmp_path, "lost", url, driver).restarted()
    lost.start_curve(0)
    for step in (1, 2, 3):
        lost.record(kind="steps", step=step)
        if step < 3:
            lost.save(state(step), content(step), bytes_of(step))
    again = on_node(tmp_path, "again", url, driver).restarted()
    assert driver.latest() == again.latest() == state(2)
    weights = (again.model(2) / "model.safetensors").read_bytes()
    assert weights == (lost.path(2) / "model" / "model.safetensors").read_bytes()
    again.start_curve(2)
    again.record(kind="steps", step=3, again=True)
    again.save(state(3), content(3), bytes_of(3))
    driver.fetch_curve()
    assert [r["step"] for r in read_curve(driver.curve)] == [1, 2, 3]
    assert read_curve(driver.curve)[-1]["again"]
    with pytest.raises(ClusterError, match="has taken over; this one stops"):
        lost.save(state(4), content(), bytes_of(8))
    assert driver.latest() == state(3)
    assert driver.model(3).is_dir()


@pytest.mark.parametrize("name", FILES)
def test_an_upload_that_is_cut_short_is_never_read(
    name: str, store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = store
    here = Mirror(local=tmp_path / "here", url=url)
    checkpoints = Checkpoints.claim(here)
    monkeypatch.setattr(Checkpoints, "_keep_there", lambda *_: None)
    for step in (1, 2):
        checkpoints.save(state(step), content(), bytes_of(8))
    del server.objects[f"{url.removeprefix('s3://')}/checkpoints/step-00000002/{name}"]
    elsewhere = on_node(tmp_path, "elsewhere", url, checkpoints)
    assert elsewhere.latest() == state(1)
    with pytest.raises(DataError, match=r"step-00000002: the checkpoint is cut short or gone"):
        elsewhere.model(2)


def test_a_store_holds_the_last_and_the_best_checkpoint_only(
    store: tuple[ObjectServer, str], tmp_path: Path
) -> None:
    server, url = store
    checkpoints = Checkpoints.claim(Mirror(local=tmp_path / "here", url=url))
    for step in (1, 2, 3):
        checkpoints.save(state(step), content(), bytes_of(8))
    kept = {key.split("/checkpoints/")[1].split("/")[0] for key in server.objects
            if "/checkpoints/" in key}  # fmt: skip
    assert kept == {"step-00000003"}


def test_where_a_run_stands_is_said_and_asked_every_few_seconds(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = store
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    driver = Checkpoints.claim(Mirror(local=tmp_path / "driver", url=url))
    worker = on_node(tmp_path, "worker", url, driver).restarted()
    server.n_requests.clear()
    told = []
    for second in range(21):
        now[0] = 1000.0 + second
        worker.show({"step": second})
        if shown := driver.shown():
            told.append(shown["step"])
    assert told == [0, 5, 10, 15, 20]
    assert server.n_requests["PUT"] == 5


def test_event_files_follow_the_run(store: tuple[ObjectServer, str], tmp_path: Path) -> None:
    server, url = store
    checkpoints = Checkpoints.claim(Mirror(local=tmp_path / "run" / "work", url=f"{url}/work"))
    events = tmp_path / "run" / "tensorboard" / "title" / "events.out.tfevents.1.host"
    events.parent.mkdir(parents=True)
    events.write_bytes(b"events")
    told = checkpoints.told()
    assert told is not None
    told.close()
    key = f"{url.removeprefix('s3://')}/tensorboard/title/{events.name}"
    assert server.objects[key] == b"events"


def test_half_a_line_of_the_curve_costs_no_other(tmp_path: Path) -> None:
    driver = Checkpoints.claim(tmp_path)
    driver.start_curve(0)
    driver.record(kind="steps", step=1)
    with driver.curve.open("a") as file:
        file.write('{"kind": "steps", "step": 2, "lo{"kind": "steps", "step": 2}\n')  # two writers
        file.write('{"kind": "steps", "step": 3, "loss": 9')  # a writer that was killed
    again = driver.restarted()
    again.start_curve(1)
    again.record(kind="steps", step=2)
    assert [record["step"] for record in read_curve(again.curve)] == [1, 2]


def test_a_worker_that_is_late_takes_nothing_from_the_one_in_its_place(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node counts as lost while it puts a checkpoint, and reaches the store all the same."""
    _, url = store
    driver = Checkpoints.claim(Mirror(local=tmp_path / "driver", url=url))
    late = on_node(tmp_path, "late", url, driver).restarted()
    late.save(state(1), content(), bytes_of(8))
    put_file = module.Folder.put_file

    def put(self: module.Folder, name: str, source: Path) -> None:
        put_file(self, name, source)
        if name.endswith("step-00000002/optimizer.pt"):
            monkeypatch.undo()
            again = on_node(tmp_path, "again", url, driver).restarted()
            assert again.latest() == state(1)
            again.save(state(3), content(), bytes_of(8))

    monkeypatch.setattr(module.Folder, "put_file", put)
    with pytest.raises(ClusterError, match="has taken over; this one stops"):
        late.save(state(2), content(), bytes_of(8))
    assert driver.latest() == state(3)
    assert driver.model(3).is_dir()


def test_what_another_training_left_on_a_node_is_not_taken_for_this_ones(
    store: tuple[ObjectServer, str], tmp_path: Path
) -> None:
    _, url = store
    for n, name in ((8, "first"), (16, "second")):
        driver = Checkpoints.claim(Mirror(local=tmp_path / name, url=url))
        worker = on_node(tmp_path, "worker", url, driver).restarted()
        worker.start_curve(0)
        worker.save(dataclasses.replace(state(2), seconds=float(n)), content(n), bytes_of(n))
        saved = (driver.model(2) / "model.safetensors").stat().st_size
        assert saved > 4 * n
        if n == 8:
            stale = on_node(tmp_path, "stale", url, driver)
            assert stale.model(2).is_dir()
            Mirror(local=tmp_path / "first", url=url).remove()
    assert load_file(worker.model(2) / "model.safetensors")["w"].shape == (16,)
    there = on_node(tmp_path, "stale", url, driver)
    assert load_file(there.model(2) / "model.safetensors")["w"].shape == (16,)


def test_in_a_store_the_work_of_other_settings_goes_once_nobody_writes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch) as (_, url):
        run = Folder(url)
        others = ".student-work-other/checkpoints/step-1/state.json"
        for name in (".student-work-mine/attempt", others, "student/x", ".student-workshop"):
            run.put(name, b"1")
        loop.clear_work(tmp_path / "student", "mine", url)
        left = {item.name for item in run.walk("")}
        assert len(left) == 3 and not run.has(".student-work-mine/attempt")
        monkeypatch.setattr(loop, "_LEFT_AFTER_S", -60.0)  # a day later
        loop.clear_work(tmp_path / "student", "mine", url)
        assert {item.name for item in run.walk("")} == {"student/x", ".student-workshop"}
