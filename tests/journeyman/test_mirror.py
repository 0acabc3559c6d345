"""A folder behind a URL and its copies: as two nodes see them, whatever is cut short."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from journeyman import folder, mirror, steps
from journeyman.errors import ClusterError, DataError, RecipeError
from journeyman.mirror import LIST, Mirror, copy_of, reading_copy_of
from tests.conftest import small_recipe
from tests.journeyman.labels.object_server import Faults, ObjectServer, serving

CONTENT = {"config.json": b"{}", "weights/model.bin": bytes(range(256)) * 5, "empty": b""}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectServer, str]]:
    with serving(monkeypatch) as (server, url):
        yield server, url


def write(local: Path, content: dict[str, bytes]) -> None:
    for name, value in content.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(value)


def read(local: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(local)): path.read_bytes()
        for path in local.rglob("*")
        if path.is_file() and path.name != LIST
    }


def test_what_one_node_wrote_another_has_and_only_that(
    store: tuple[ObjectServer, str], tmp_path: Path
):
    server, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    assert not other.pull()
    write(one.local, CONTENT)
    one.push()
    assert other.pull()
    assert read(other.local) == CONTENT
    changed = CONTENT | {"config.json": b'{"layers": 2}', "more": b"1"}
    del changed["empty"]
    (one.local / "empty").unlink()
    write(one.local, changed)
    one.push()
    assert other.pull()
    assert read(other.local) == changed
    assert {key.removeprefix(url.removeprefix("s3://") + "/") for key in server.objects} == {
        *changed, LIST,
    }  # fmt: skip


def test_what_is_the_same_is_neither_sent_nor_fetched_again(
    store: tuple[ObjectServer, str], tmp_path: Path
):
    server, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    write(one.local, CONTENT)
    one.push()
    other.pull()
    server.n_requests.clear()
    one.push()
    other.pull()
    assert server.n_requests == {"GET": 2}  # its list, each


def test_a_folder_that_is_being_written_is_none(store: tuple[ObjectServer, str], tmp_path: Path):
    server, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    write(one.local, CONTENT)
    one.push()
    other.pull()
    listed = server.objects.pop(f"{url.removeprefix('s3://')}/{LIST}")
    assert not other.pull()
    assert not other.local.exists()
    # The list of other files than are there, as while a second writer is at it.
    server.objects[f"{url.removeprefix('s3://')}/{LIST}"] = listed
    server.objects[f"{url.removeprefix('s3://')}/config.json"] = b"[]"
    with pytest.raises(DataError, match=r"config\.json: is being written, or damaged"):
        other.pull()
    assert not other.local.exists()


def test_a_corpus_whose_upload_breaks_off_is_none_to_those_who_read_it_there(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They know it by its manifest, and look at no list."""
    _, url = store
    one, there = Mirror(local=tmp_path / "one", url=url), folder.Folder(url)
    write(one.local, {"manifest.json": b"old", "part-0": b"old", "part-1": b"old"})
    one.push()
    new = {"manifest.json": b"new", "part-0": b"new", "part-1": b"new"}
    write(one.local, new)
    put_file = folder.Folder.put_file

    def put(self: folder.Folder, name: str, source: Path) -> None:
        assert not there.has("manifest.json")
        if name == "part-1":
            raise KeyboardInterrupt
        put_file(self, name, source)

    with monkeypatch.context() as patch:
        patch.setattr(folder.Folder, "put_file", put)
        with pytest.raises(KeyboardInterrupt):
            one.push()
    assert not there.has("manifest.json") and there.get("part-0") == b"new"
    one.push()
    assert {name: there.get(name) for name in new} == new


MANY = {f"part-{i:05d}.parquet": b"%d" % i for i in range(10 * mirror._AT_ONCE)}
Transfer = Callable[..., None]  # put_file or get_file of a folder


def together(own: Transfer, began: list[str]) -> Transfer:
    """Goes on once as many as may be under way at a time are, and fails where they never are."""
    meet = threading.Barrier(mirror._AT_ONCE)

    def transfer(self: folder.Folder, name: str, *arguments: object) -> None:
        began.append(name)
        if name in MANY:
            meet.wait(timeout=20)
        own(self, name, *arguments)

    return transfer


def test_many_files_go_at_once_and_the_manifest_when_all_are_there(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    write(one.local, MANY | {"a": b"1", "manifest.json": b"{}"})
    put_file = folder.Folder.put_file
    put: list[str] = []
    got: list[str] = []

    def watched(self: folder.Folder, name: str, source: Path) -> None:
        put_file(self, name, source)
        if name == "manifest.json":
            there = {key.removeprefix(url.removeprefix("s3://") + "/") for key in server.objects}
            assert there == {*MANY, "a", "manifest.json"}

    monkeypatch.setattr(folder.Folder, "put_file", together(watched, put))
    monkeypatch.setattr(folder.Folder, "get_file", together(folder.Folder.get_file, got))
    one.push()
    assert put[-1] == "manifest.json" and sorted(put) == sorted([*MANY, "a", "manifest.json"])
    assert other.pull()
    assert sorted(got) == sorted(put) and read(other.local) == read(one.local)


def failing_at(n: int, own: Transfer, began: list[str], error: Exception) -> Transfer:
    """Of so many that have begun the last one fails; those beside it go on when it has."""
    lock, failed = threading.Lock(), threading.Event()

    def transfer(self: folder.Folder, name: str, *arguments: object) -> None:
        with lock:
            began.append(name)
            n_begun = len(began)
        if n_begun == n:
            failed.set()
            raise error
        if n_begun > n - mirror._AT_ONCE:
            assert failed.wait(timeout=20)
        own(self, name, *arguments)

    return transfer


@pytest.mark.parametrize("way", ["put_file", "get_file"])
def test_the_first_file_that_fails_stops_the_rest(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    server, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    write(one.local, MANY | {"manifest.json": b"{}"})
    if way == "get_file":
        one.push()
    n, began = 3 * mirror._AT_ONCE, list[str]()
    fails = failing_at(n, getattr(folder.Folder, way), began, ClusterError("the store is away"))
    with monkeypatch.context() as patch:
        patch.setattr(folder.Folder, way, fails)
        with pytest.raises(ClusterError, match="the store is away"):
            one.push() if way == "put_file" else other.pull()
    assert len(began) < n + mirror._AT_ONCE < len(MANY)
    if way == "put_file":
        assert not {"manifest.json", LIST} & {key.rpartition("/")[2] for key in server.objects}
        one.push()
    else:
        assert not other.local.exists()
    assert other.pull() and read(other.local) == read(one.local)


def test_a_copy_that_has_lost_a_file_is_made_again(store: tuple[ObjectServer, str], tmp_path: Path):
    _, url = store
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    write(one.local, CONTENT)
    one.push()
    other.pull()
    (other.local / "config.json").unlink()
    (other.local / "weights" / "model.bin").write_bytes(b"half")
    assert other.pull() and read(other.local) == CONTENT


def test_a_file_that_goes_while_it_is_fetched_is_said(
    store: tuple[ObjectServer, str], tmp_path: Path
):
    server, url = store
    one = Mirror(local=tmp_path / "one", url=url)
    write(one.local, CONTENT)
    one.push()
    del server.objects[f"{url.removeprefix('s3://')}/empty"]
    del server.objects[f"{url.removeprefix('s3://')}/weights/model.bin"]
    with pytest.raises(DataError, match=r"model\.bin: is being written"):
        Mirror(local=tmp_path / "other", url=url).pull()


@pytest.mark.parametrize("name", ["exp#1", "exp?v=1", "#"])
def test_a_url_of_which_the_store_would_drop_a_part_is_refused(name: str):
    with pytest.raises(RecipeError, match="has no folder"):
        folder.Folder(f"s3://bucket/{name}/corpus")


def test_certify_rows_have_spent_what_a_bundle_says_that_was_not_wholly_put(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server, url = store
    monkeypatch.setenv("JOURNEYMAN_CACHE", str(tmp_path))
    run = steps.Run(small_recipe(Path("x"), f"output={url}"))
    bundle = Mirror(local=tmp_path / "made", url=run.mirror("certify").url)
    write(bundle.local, {"bundle.json": b"{}", "manifest.json": b"{}"})
    bundle.push()
    del server.objects[f"{str(bundle.url).removeprefix('s3://')}/{LIST}"]
    run._fetch("certify")
    assert read(run.path("certify")) == {"bundle.json": b"{}"}


def test_what_is_read_and_what_is_written_are_apart_on_a_node():
    url = "s3://bucket/runs/routing"
    assert copy_of(url) != reading_copy_of(url)
    assert copy_of(url).name == reading_copy_of(f"{url}/").name == "routing"


def test_large_files_go_in_pieces_through_a_store_that_fails(
    store: tuple[ObjectServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server, url = store
    monkeypatch.setattr(folder, "_PIECE", 5 << 20)
    one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
    large = random.Random(0).randbytes((12 << 20) + 7)
    write(one.local, CONTENT | {"large": large})
    server.faults = Faults(share=0.2, random=random.Random(3))
    one.push()
    assert other.pull()
    assert server.faults.met.total() > 2
    assert server.uploads and read(other.local) == CONTENT | {"large": large}


def test_a_folder_on_a_shared_disk_is_its_own_copy(tmp_path: Path):
    shared = Mirror(local=tmp_path / "shared").below("student")
    assert not shared.pull()
    write(shared.local, CONTENT)
    shared.push()
    assert shared.pull() and read(tmp_path / "shared" / "student") == CONTENT
    assert not (shared.local / LIST).exists()
    shared.remove()
    assert not shared.local.exists()


def test_removed_is_gone_from_both(store: tuple[ObjectServer, str], tmp_path: Path):
    server, url = store
    one = Mirror(local=tmp_path / "one", url=url)
    write(one.local, CONTENT)
    one.push()
    one.remove()
    assert not server.objects and not one.local.exists()
