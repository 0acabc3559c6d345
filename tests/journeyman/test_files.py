"""Folders that are written whole or not at all, whoever is killed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from journeyman import files
from journeyman.errors import ClusterError

KILLED = """
import os, signal, sys
from pathlib import Path
from journeyman import files

with files.scratch_folder(Path(sys.argv[1])) as fresh:
    (fresh / "half.bin").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def scratch_folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(".rows.*.tmp"))


def test_what_a_killed_process_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "rows"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    (theirs,) = scratch_folders(tmp_path)
    with files.scratch_folder(final) as ours:  # its owner lives: it stays
        assert scratch_folders(tmp_path) == sorted([theirs, ours])
    writer.kill()
    writer.wait()
    assert scratch_folders(tmp_path) == [theirs]
    with files.scratch_folder(final) as ours:
        assert scratch_folders(tmp_path) == [ours]
        (ours / "whole.bin").write_bytes(b"whole")
        ours.rename(final)
    assert scratch_folders(tmp_path) == []
    assert (final / "whole.bin").read_bytes() == b"whole"
    writer.communicate()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_sentence_whoever_meets_it(error: Exception) -> None:
    """safetensors has a kind of its own, whose words are the system's."""
    with (
        pytest.raises(ClusterError, match="runs: the disk is full; free some"),
        files.disk_errors(Path("runs")),
    ):
        raise error
