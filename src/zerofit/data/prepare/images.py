"""From a folder of pictures to a checked, split and resized one: every file is read once, by many processes."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...config.images import ImageDataConfig
from ...errors import DataError, ZerofitError
from ..child_processes import without_main
from ..images import shards
from ..images.decode import Limits, import_pillow
from ..images.discover import Found, discover, shown
from ..images.shards import Checked, read_shard, shard_rows
from ..images.store import FILES, FORMAT, INDEX, META, RECORD, SPLITS, is_prepared_images, read_images_meta
from .lock import only_one

#: Pictures of a shard at least, and shards at most: a shard is the unit of work, and what an interruption costs.
SHARD_PICTURES, MAX_SHARDS = 64, 1024
#: Pictures below which starting processes costs more than it saves.
FEW_PICTURES = 256
#: Pictures a worker from which torch's faster filter outweighs the seconds of its import.
MANY_PICTURES = 2_000
#: Largest class to smallest from which balanced sampling is worth a thought.
IMBALANCE_TOLD = 3.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedImages:
    """What a prepared folder holds; `classes` maps a name to its pictures of each split."""

    folder: Path
    classes: dict[str, dict[str, int]]
    skipped: list[dict[str, Any]]
    notices: list[str]
    cache_bytes: int
    made_now: bool

    @property
    def samples(self) -> dict[str, int]:
        """Split -> pictures."""
        return {split: sum(counts[split] for counts in self.classes.values()) for split in SPLITS}

    @property
    def imbalance(self) -> float:
        """Training pictures of the largest class over those of the smallest."""
        counts = [counts["train"] for counts in self.classes.values()]
        return max(counts) / max(min(counts), 1)

    def describe(self) -> str:
        """One line for people."""
        counts = ", ".join(f"{self.samples[split]:,} {split} pictures" for split in SPLITS)
        return f"{self.folder}: {counts}, {len(self.classes)} classes, cache {self.cache_bytes / 2**20:,.0f} MiB"


def prepare_images(
    config: ImageDataConfig, *, force: bool = False, workers: int | None = None, progress: Progress | None = None
) -> PreparedImages:
    """Check ``config.prepare``'s pictures, split them, and write ``config.path``; with ``read: files`` no pixels.

    Idempotent. Interrupted, it goes on with the shards that were finished. The folder appears when all is complete.

    Args:
        config: what to prepare, where to, and the limits.
        force: replace a folder that holds something else.
        workers: processes; None takes every core that this process may use.
        progress: called with (pictures done, pictures).

    Raises:
        DataError: no usable classes, more bad files than ``max_bad_fraction``, a folder that holds something else, or
            that another process is preparing.
    """
    import_pillow()
    if not config.prepare:
        raise DataError("Nothing to prepare: name a folder of pictures, with a folder a class in it.")
    sources = [str(Path(source).absolute()) for source in config.prepare]
    found = discover(sources)
    request = _request(config, sources)
    if config.path.exists() and any(config.path.iterdir()):
        if not is_prepared_images(config.path):
            raise DataError(f"{config.path} is not empty and holds no prepared pictures. Choose another --out.")
        if not force:
            return _already_there(config, request, found)
    cores = workers or shards.usable_cores()
    resize = _choose_resize(len(found.pictures), cores)
    try:
        with only_one(config.path):
            work = _work_folder(config.path, {**request, "resize": resize}, found)
            checked = _check_all(found, config, work, resize, cores, progress or (lambda *_: None))
            _refuse_too_many(checked, config)
            prepared = _finish(found, checked, config, request, resize, work)
            _publish(work, config.path)
    except OSError as error:
        raise _not_written(error, config, len(found.pictures)) from error
    return prepared


def _not_written(error: OSError, config: ImageDataConfig, pictures: int) -> DataError:
    if error.errno == errno.ENOSPC:
        return DataError(
            f"The disk of {config.path} is full. {pictures:,} pictures take up to "
            f"{pictures * 6 * config.cache_size**2 / 2**30:.1f} GiB at cache_size {config.cache_size}. Free "
            f"some and run the same command again, which goes on; or use a smaller cache_size, another --out, or "
            f"--no-cache."
        )
    return DataError(
        f"{config.path} cannot be written: {error.filename or config.path.parent}: {error.strerror or error}. Choose "
        f"another folder with --out (data.path)."
    )


def _choose_resize(pictures: int, cores: int) -> str:
    if find_spec("cykooz_resizer") is not None:
        return "cykooz"
    return "torch" if pictures >= MANY_PICTURES * cores else "pillow"


def _request(config: ImageDataConfig, sources: list[str]) -> dict[str, Any]:
    names = ("val_fraction", "split_seed", "cache_size", "min_side", "max_pixels")
    return {"sources": sources, "pixels": config.read == "cache", **{name: getattr(config, name) for name in names}}


def _already_there(config: ImageDataConfig, request: dict[str, Any], found: Found) -> PreparedImages:
    folder = config.path
    meta = read_images_meta(folder)
    differing = [name for name, value in request.items() if meta["request"].get(name) != value]
    if differing or meta["files_digest"] != found.digest:
        raise DataError(
            f"{folder} was prepared from {'other ' + shown(differing) if differing else 'files that have changed'}. "
            f"Prepare into another folder (--out), or write over it with --force."
        )
    return of_meta(folder, meta)


def of_meta(folder: Path, meta: dict[str, Any], *, made_now: bool = False) -> PreparedImages:
    """What a folder's ``meta.json`` says."""
    return PreparedImages(folder, meta["counts"], meta["skipped"], meta["notices"], sum(meta["shards"]), made_now)


def _work_folder(folder: Path, request: dict[str, Any], found: Found) -> Path:
    """A folder beside the result; finished shards of an interrupted attempt at the same request are kept in it."""
    work = folder.with_name(folder.name + ".partial")
    wanted = json.dumps({**request, "files_digest": found.digest, "format": FORMAT})
    ticket = work / "request.json"
    if not ticket.exists() or ticket.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        ticket.write_text(wanted, encoding="utf-8")
    return work


def _check_all(
    found: Found, config: ImageDataConfig, work: Path, resize: str, workers: int, progress: Progress
) -> list[Checked]:
    """Every picture checked, in the order of `found`."""
    pictures = found.pictures
    size = max(SHARD_PICTURES, -(-len(pictures) // MAX_SHARDS))
    cut = [pictures[first : first + size] for first in range(0, len(pictures), size)]
    limits = Limits(config.min_side, config.max_pixels)
    jobs = [
        (shard, number, work, limits, config.cache_size, resize, config.read == "cache")
        for number, shard in enumerate(cut)
        if not shard_rows(work, number).exists()
    ]
    done = len(pictures) - sum(len(job[0]) for job in jobs)
    progress(done, len(pictures))
    few = sum(len(job[0]) for job in jobs) < FEW_PICTURES
    rows: dict[int, list[Checked]] = {}
    for number in _run_here(jobs) if few or workers == 1 else _run_in_processes(jobs, resize, workers):
        rows[number] = list(read_shard(work, number, cut[number]))  # while the processes go on
        done += len(cut[number])
        progress(done, len(pictures))
    kept = ((number, shard) for number, shard in enumerate(cut) if number not in rows)
    rows |= {number: list(read_shard(work, number, shard)) for number, shard in kept}
    return [checked for number in range(len(cut)) for checked in rows[number]]


def _run_here(jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
    for job in jobs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = shards.check_shard(*job)
        yield done


def _run_in_processes(jobs: Sequence[tuple[Any, ...]], resize: str, workers: int) -> Iterator[int]:
    """Shards in processes of their own, few ahead of the workers so that an interruption is answered soon."""
    context = _context(resize)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=shards.start_worker) as pool:
        waiting: set[Future[int]] = set()
        try:
            for job in jobs:
                with without_main():
                    waiting.add(pool.submit(shards.check_shard, *job))
                if len(waiting) >= 2 * workers:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise ZerofitError(
                "A process that reads pictures died, most likely for want of memory or in a decoder. Finished parts "
                "are kept: run the same command again, with fewer --workers; if it dies again at the same place, look "
                "for a damaged file."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _context(resize: str) -> multiprocessing.context.BaseContext:
    """How to start processes: forked from this one where nothing forbids it, which takes milliseconds, else from a
    fresh one, which takes as long as its imports.

    A fork inherits the locks that other threads hold, and PyTorch's threads and GPU.
    """
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    if alone and resize != "torch" and sys.platform == "linux":
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shards.__name__, *(["torch"] if resize == "torch" else [])])
    return context


def _refuse_too_many(checked: Sequence[Checked], config: ImageDataConfig) -> None:
    bad = [row for row in checked if row.reason]
    if len(bad) <= config.max_bad_fraction * len(checked):
        return
    listed = [f"{row.picture.path} ({row.reason})" for row in bad]
    raise DataError(
        f"{len(bad)} of {len(checked)} pictures cannot be used, and max_bad_fraction {config.max_bad_fraction:g} "
        f"allows {int(config.max_bad_fraction * len(checked))}: {shown(listed)}. Mend or remove them, or allow more "
        f"with --max-bad-fraction."
    )


def _finish(
    found: Found, checked: Sequence[Checked], config: ImageDataConfig, request: dict[str, Any], resize: str, work: Path
) -> PreparedImages:
    """Split, drop what would leak, and write the index, the list of files and last the meta."""
    good = [row for row in checked if not row.reason]
    skipped = [_skipped(row, row.reason) for row in checked if row.reason]
    splits = [row.picture.split for row in good] if found.given_split else _split(good, config)
    leaks, notices = _duplicates(good, splits)
    skipped += [_skipped(good[place], f"the same file as {good[twin].picture.path} in val") for place, twin in leaks]
    dropped = {place for place, _ in leaks}
    kept = [(row, split) for place, (row, split) in enumerate(zip(good, splits, strict=True)) if place not in dropped]
    counts = {name: dict.fromkeys(SPLITS, 0) for name in found.classes}
    for row, split in kept:
        counts[row.picture.class_name][split or ""] += 1
    _refuse_emptied(counts, skipped)
    notices = [*found.notices, *notices, *_told(counts, found)]
    sizes = [path.stat().st_size for path in sorted(work.glob("pixels-*.bin"))] if request["pixels"] else []
    digests = _write_files(work, kept, found.classes)
    meta = {
        "format": FORMAT, "kind": "images", "request": request, "classes": list(found.classes), "counts": counts,
        "files": len(kept), "files_digest": found.digest, "split": "folders" if found.given_split else "made here",
        "splits": {s: {"samples": sum(c[s] for c in counts.values()), "sha256": digests[s]} for s in SPLITS},
        "resize": resize, "skipped": skipped, "other_files": found.others, "notices": notices, "shards": sizes,
        "versions": {"python": platform.python_version(), "pillow": import_pillow().__version__,
                     "numpy": np.__version__},
    }  # fmt: skip
    if not request["pixels"]:
        for path in work.glob("pixels-*"):
            path.unlink()
    with (work / META).open("w", encoding="utf-8") as out:
        json.dump(meta, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    return of_meta(config.path, meta, made_now=True)


def _skipped(row: Checked, reason: str) -> dict[str, Any]:
    return {**asdict(row.picture), "reason": reason}


def _split(rows: Sequence[Checked], config: ImageDataConfig) -> list[str]:
    """``val_fraction`` of each class validates, at least one where a class has two contents; copies stay together.

    Which ones is a function of the seed and the contents alone: not of file names or their order.
    """
    contents: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        contents[row.picture.class_name].add(row.sha256)
    validates: set[str] = set()
    for name, hashes in sorted(contents.items()):
        order = sorted(hashes)
        random.Random(f"{config.split_seed}:{name}").shuffle(order)
        wanted = max(round(len(order) * config.val_fraction), 1) if len(order) > 1 else 0
        validates.update(order[: min(wanted, len(order) - 1)])
    return ["val" if row.sha256 in validates else "train" for row in rows]


def _duplicates(rows: Sequence[Checked], splits: Sequence[str | None]) -> tuple[list[tuple[int, int]], list[str]]:
    """Training pictures that validate too, each with its twin, and what to tell about copies."""
    by_hash: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        by_hash[row.sha256].append(place)
    copies = [places for places in by_hash.values() if len(places) > 1]
    leaks: list[tuple[int, int]] = []
    for places in copies:
        validating = [place for place in places if splits[place] == "val"]
        leaks += [(place, validating[0]) for place in places if splits[place] == "train" and validating]
    notices = []
    if leaks:
        names = [rows[place].picture.path for place, _ in leaks]
        notices.append(f"{len(leaks)} training pictures validate too and were left out of train: {shown(names)}")
    two = [places for places in copies if len({rows[place].picture.class_name for place in places}) > 1]
    if two:
        names = [" = ".join(rows[place].picture.path for place in places) for places in two]
        notices.append(f"{len(two)} pictures lie under more than one class: {shown(names)}")
    more = sum(len(places) - 1 for places in copies) - len(leaks)
    if more:
        notices.append(f"{more} copies of other pictures within a split are kept")
    return leaks, notices


def _refuse_emptied(counts: dict[str, dict[str, int]], skipped: Sequence[dict[str, Any]]) -> None:
    empty = [name for name, count in counts.items() if not count["train"]]
    if empty:
        reasons = [f"{row['path']} ({row['reason']})" for row in skipped if row["class_name"] in empty]
        raise DataError(f"No training picture of {shown(empty)} can be used: {shown(reasons)}. Mend or add some.")
    if not any(count["val"] for count in counts.values()):
        raise DataError(
            "No picture is left for validation. Give every class two different pictures at least, or a val folder."
        )


def _told(counts: dict[str, dict[str, int]], found: Found) -> Iterator[str]:
    trained = {name: count["train"] for name, count in counts.items()}
    most, least = max(trained, key=trained.__getitem__), min(trained, key=trained.__getitem__)
    if trained[most] >= IMBALANCE_TOLD * trained[least]:
        yield (
            f"unbalanced: {most} has {trained[most]:,} training pictures, {least} {trained[least]:,} "
            f"({trained[most] / trained[least]:.1f} to 1); data.balanced true draws every class equally often"
        )
    lone = [name for name, count in counts.items() if not count["val"]]
    if lone and not found.given_split:
        yield f"classes with a single picture are not validated: {shown(lone)}"
    if found.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in Counter(found.others).most_common(5))
        yield f"files that are no pictures were passed over: {kinds}"


def _write_files(work: Path, kept: Sequence[tuple[Checked, str | None]], classes: Sequence[str]) -> dict[str, str]:
    """``index.npy`` and ``files.jsonl``; returns a hash of each split's contents and classes."""
    labels = {name: label for label, name in enumerate(classes)}
    digests = {split: hashlib.sha256() for split in SPLITS}
    rows = []
    with (work / FILES).open("w", encoding="ascii") as out:
        for row, split in kept:
            assert split is not None
            picture = row.picture
            values = {**row.record, "label": labels[picture.class_name], "split": SPLITS.index(split)}
            rows.append(tuple(values[name] for name in RECORD.names or ()))
            digests[split].update(f"{row.sha256}:{picture.class_name}\n".encode("utf-8", "surrogateescape"))
            line = {
                "path": picture.path, "split": split, "class": picture.class_name, "bytes": picture.bytes,
                "mtime_ns": picture.mtime_ns, "sha256": row.sha256,
            }  # fmt: skip
            out.write(json.dumps(line) + "\n")
    index = np.array(rows, RECORD)
    np.save(work / INDEX, index)
    return {split: digest.hexdigest() for split, digest in digests.items()}


def _publish(work: Path, folder: Path) -> None:
    """The finished folder in place of what was there."""
    for path in (*work.glob("rows-*"), *work.glob("pixels-*.bin.*"), work / "request.json"):  # a kill leaves some
        path.unlink()
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    work.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
