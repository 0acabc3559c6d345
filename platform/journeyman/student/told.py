"""What trackers were told, kept in a run's store, so that another node does not tell it again.

Put there behind training, every few seconds where there is something new: no step waits for the
store, and a store that fails is tried again. Told twice is only what the store did not know yet of
a run that goes on where this node's copy is not: as a rule that of the last few seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from pathlib import Path

from journeyman import files
from journeyman.errors import ClusterError
from journeyman.folder import Folder

FOLDER = "trackers"  # in the work folder
_ID = "id"
_EVERY_S = 5.0


class Told:
    """Of one run, on the node of rank 0. TensorBoard's files, which lie in the run's folder, go
    with it."""

    def __init__(self, work: Path, store: str, every_s: float = _EVERY_S) -> None:
        """work: the folder, store: its URL; the run's own are above them."""
        self._work, self._store = work, Folder(store)
        self._run, self._run_store = work.parent, Folder(store.rpartition("/")[0])
        self._every_s = every_s
        self._sizes: dict[Path, int] = {}  # of files that only grow, as the store has them
        self._changed, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="told", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """There is something new; does not wait."""
        self._changed.set()

    def close(self) -> None:
        """Once more, with all there is; a sentence on stderr where the store does not take it."""
        self._ends.set()
        self._changed.set()
        self._thread.join()
        try:
            self._put()
        except ClusterError as error:
            print(
                f"training.trackers: {error} Until then TensorBoard's newest files are in "
                f"{self._run / 'tensorboard'} alone.",
                file=sys.stderr,
                flush=True,
            )

    def _follow(self) -> None:
        while self._changed.wait() and not self._ends.is_set():
            self._changed.clear()
            try:
                self._put()
            except ClusterError:
                self._changed.set()
            self._ends.wait(self._every_s)

    def _put(self) -> None:
        """The lists are read before TensorBoard's files, and put behind them: they must not name
        what those lack."""
        lists = {path: path.read_bytes() for path in sorted((self._work / FOLDER).glob("*"))}
        for path in (self._run / "tensorboard").rglob("*.tfevents.*"):
            if self._has_grown(path, path.stat().st_size):
                self._put_one(self._run_store, self._run, path, path.read_bytes())
        for path, content in lists.items():
            if self._has_grown(path, len(content)):
                self._put_one(self._store, self._work, path, content)

    def _has_grown(self, path: Path, size: int) -> bool:
        return self._sizes.get(path) != size

    def _put_one(self, folder: Folder, below: Path, path: Path, content: bytes) -> None:
        folder.put(str(path.relative_to(below)), content)
        self._sizes[path] = len(content)


def fetch(work: Path, store: str) -> None:
    """Have on this node what trackers were told of the run that is in the store.

    What this node has of the same run is added: it may be ahead. What it has of another one, a
    training of the same inputs that is over, is removed.
    """
    own, folder = work / FOLDER, Folder(store)
    there: dict[str, bytes] = {}
    for item in list(folder.walk(FOLDER)):
        with contextlib.suppress(FileNotFoundError):
            there[item.name.rpartition("/")[2]] = folder.get(item.name)
    same = (own / _ID).is_file() and (own / _ID).read_bytes() == there.get(_ID)
    if not same:
        shutil.rmtree(own, ignore_errors=True)
    for name, content in there.items():
        path = own / name
        lines = path.read_bytes().splitlines() if name != _ID and path.exists() else []
        known = set(content.splitlines())
        files.write_bytes(path, content + b"".join(b"%s\n" % li for li in lines if li not in known))
