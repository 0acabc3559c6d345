"""Checkpoints on a disk that fills up, and such as are cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from journeyman.errors import ClusterError, DataError
from journeyman.student.checkpoints import Checkpoints, State
from tests.conftest import small_disk

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
