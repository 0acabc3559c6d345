"""Where the ledger of `certify` rows is kept: in a bundle's folder, and for all runs that lie
beside one another in a folder of its own, where each finds what the others have spent.

    <output>/.ledger/<job>/uses/<number>.json   what one certification used its rows for
    <output>/.ledger/<job>/rows/<digest>        a set of rows, 8 bytes for each
    <bundle>/ledger/rows/<digest>               the sets of the ledger in bundle.json

Whoever creates a number's file is next: of two that certify at once, one sees the other's uses. A
use is written before its bundle, and is the same one for who was killed between and comes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import TypeAdapter, ValidationError

from journeyman.certify import bundle as bundles
from journeyman.certify.certificate import Certificate
from journeyman.certify.ledger import MARK_BYTES, Ledger, LedgerEntry, Marks, RowSet
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.models import Model
from journeyman.recipe import Recipe, digest

_BESIDE_BUNDLE = "ledger"
_USES, _ROWS = "uses", "rows"
_WRITTEN = np.dtype("<u8")
_ENTRIES = TypeAdapter(tuple[LedgerEntry, ...])


def spend_rows(
    recipe: Recipe,
    ids: Mapping[str, Sequence[str]],
    students: Sequence[Model],
    certificates: Sequence[Certificate],
    out_dir: Path,
    shared: Folder | None,
    *ledgers: Ledger,
) -> Ledger:
    """The ledger with these uses of the certify rows, after those of the bundle that is there and
    those that other runs had of any of these rows; written down in the shared one.

    ids: of the rows of each split; students: in the order in which they are asked; certificates:
    what came of it, since a use is another one where costs that were measured anew, or gold that
    was corrected, decided otherwise; out_dir: of the bundle; shared: of the runs beside this one,
    None where there is none; ledgers: of the runs that the students come from.
    Raises DataError where a row would spend more than ``certify.max_delta``, ClusterError.
    """
    rows = RowSet.of(ids["certify"])
    uses = _uses(recipe, RowSet.of(ids["calibrate"]), rows, students, certificates)
    own = of_bundle(out_dir).joined(*ledgers)
    while True:
        there, last = read(shared) if shared else (Ledger(), 0)
        known = own.joined(there.touching(rows))
        spent = known.spending(uses, rows, recipe.certify.max_delta)
        fresh = there.lacking(uses)
        if not shared or not fresh:
            return spent
        _keep(shared, {rows.digest: rows.marks})
        if shared.create(f"{_USES}/{last + 1:06d}.json", _in_json(fresh)):
            return spent


def _uses(
    recipe: Recipe,
    calibrate: RowSet,
    rows: RowSet,
    students: Sequence[Model],
    certificates: Sequence[Certificate],
) -> list[LedgerEntry]:
    settings = recipe.certify
    beside = [settings.way(), recipe.cascade.combine, calibrate.digest]
    *before, own = (student.weights_digest[:12] for student in students)
    who = f"student {own}" + "".join(f" behind {one}" for one in reversed(before))
    return [
        LedgerEntry(
            use=f"{kind} at {settings.alpha:g}, {who}",
            rows_digest=rows.digest,
            delta=settings.delta,
            way=digest([*beside, [_came_of_it(c) for c in certificates if c.kind == kind]]),
            run=recipe.name,
        )
        for kind in settings.guarantees
    ]


def _came_of_it(certificate: Certificate) -> list[int]:
    return [certificate.n_accepted, certificate.errors, certificate.gains]


def of_bundle(directory: Path) -> Ledger:
    """What the bundle there says of its certify rows; nothing where there is none.

    Raises BundleMismatch where it was damaged."""
    there = (directory / bundles.BUNDLE_FILE).exists()
    entries = bundles.load_any(directory).ledger if there else ()
    return Ledger(entries=entries, marks=_marks(Folder(directory / _BESIDE_BUNDLE), entries))


def write_beside(ledger: Ledger, bundle_dir: Path) -> None:
    """The rows of a bundle's ledger, into its folder; raises ClusterError."""
    _keep(Folder(bundle_dir / _BESIDE_BUNDLE), ledger.marks)


def read(shared: Folder) -> tuple[Ledger, int]:
    """What runs beside one another have spent, and the number of the last of the files.

    Raises DataError where one is damaged, ClusterError.
    """
    names = sorted(item.name for item in shared.walk(_USES) if item.name.endswith(".json"))
    entries: list[LedgerEntry] = []
    for name, content in shared.get_each(names):
        try:
            entries += _ENTRIES.validate_json(content or b"[]")
        except ValidationError as error:
            raise DataError(
                f"{shared.path(name)}: damaged; it says what certify rows were used for. Bring it "
                "back, or remove it, by which that use is forgotten."
            ) from error
    last = max((int(PurePosixPath(name).stem) for name in names), default=0)
    return Ledger(entries=tuple(entries), marks=_marks(shared, entries)), last


def _in_json(entries: Sequence[LedgerEntry]) -> bytes:
    return json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1).encode()


def _keep(folder: Folder, marks: Mapping[str, Marks]) -> None:
    for name, of_rows in marks.items():
        if not folder.has(f"{_ROWS}/{name}"):
            folder.put(f"{_ROWS}/{name}", of_rows.astype(_WRITTEN).tobytes())


def _marks(folder: Folder, entries: Iterable[LedgerEntry]) -> dict[str, Marks]:
    """Of the sets that are there; what is gone or damaged is none."""
    names = {f"{_ROWS}/{entry.rows_digest}": entry.rows_digest for entry in entries}
    return {
        names[name]: np.frombuffer(content, dtype=_WRITTEN).astype(np.uint64)
        for name, content in folder.get_each(names)
        if content is not None and len(content) % MARK_BYTES == 0
    }
