"""Checkpoints that are damaged, cut off, refused by the disk, slow, or made to run code: what a run goes on from."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

NAME = "iteration-000-step-{:07d}"


# ---------------------------------------------------------------------------------------------- damage


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def resume_from_damaged(directory: str) -> list[tuple[str, str, int, list[str]]]:
    """Damages every file of the newest of two checkpoints in every way; the step to resume from, and what is said."""
    from small_state import Run

    run = Run(directory)
    run.save(1, keep=True)
    run.save(2)
    newest = run.directory / NAME.format(2)
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    found = []
    for file in files:
        for damage in (remove, truncate, flip_a_bit):
            copy = f"{directory}/{damage.__name__}-{file.replace('/', '-')}"
            if dist.get_rank() == 0:
                # not the rollouts: they are linked, and the run's own
                shutil.copytree(run.directory, f"{copy}/checkpoints")
                damage(Path(copy, "checkpoints", newest.name, file))
            dist.barrier()
            damaged = Run(copy)
            whole = damaged.checkpoints.newest_whole(damaged.checkpoints.latest())
            found.append((file, damage.__name__, whole.progress.step, list(damaged.said)))
    assert damaged.resumed_value() == 1
    return found


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(workers: Any, tmp_path: Path) -> None:
    outcomes = workers.run(resume_from_damaged, str(tmp_path), dp=2)
    assert outcomes[0] == outcomes[1], "all ranks resume from the same"
    files = {file for file, *_ in outcomes[0]}
    expected = {"manifest.json", "state.json", "rollouts/part-00000.parquet", "shards/.metadata"}
    assert expected | {"shards/__0_0.distcp", "shards/__1_0.distcp", "shards/metadata.json"} <= files
    for file, damage, step, said in outcomes[0]:
        assert step == 1, (file, damage)
        (sentence,) = said
        assert sentence.endswith("this checkpoint is damaged, and passed over.") and "\n" not in sentence
        assert NAME.format(2) in sentence
        # a manifest of which one digit is another is a manifest of other files
        assert file in sentence or (file, damage) == ("manifest.json", "flip_a_bit")


def nothing_whole(directory: str) -> list[str]:
    from small_state import Run

    from nemo_spin.errors import CheckpointError

    run = Run(directory)
    sentences = []
    run.save(1)
    before = (run.directory / NAME.format(1) / "state.json").read_text()
    for content in ("{", before.replace('"format": 2', '"format": 1')):
        dist.barrier()
        if dist.get_rank() == 0:
            (run.directory / NAME.format(1) / "state.json").write_text(content)
        dist.barrier()
        try:
            run.resumed_value()
        except CheckpointError as error:
            sentences.append(str(error))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(run.directory / NAME.format(1))
    dist.barrier()
    try:
        run.checkpoints.latest()
    except CheckpointError as error:
        sentences.append(str(error))
    return sentences


def test_without_a_whole_one_the_run_does_not_begin_anew_by_itself(workers: Any, tmp_path: Path) -> None:
    results = workers.run(nothing_whole, str(tmp_path), dp=2)
    assert results[0] == results[1]
    damaged, old, gone = results[0]
    assert "holds no whole checkpoint (iteration-000-step-0000001: state.json is damaged)" in damaged
    assert "that wrote no checksums" in old
    assert "names 'iteration-000-step-0000001', but there is no checkpoint beside it" in gone


def resume_by_state(directory: str) -> tuple[list[float], list[str]]:
    from small_state import Run

    run = Run(directory)
    run.save(9, keep=True)
    run.save(10, keep=True)
    values = []
    for pointer in (NAME.format(9), "iteration-000-step-0000077", "../../elsewhere", None):
        dist.barrier()
        if dist.get_rank() == 0:
            latest = run.directory / "latest"
            latest.write_text(f"{pointer}\n") if pointer else latest.unlink()
            # names say nothing
            if not pointer:
                (run.directory / NAME.format(9)).rename(run.directory / "iteration-999-step-9999999")
        dist.barrier()
        values.append(run.resumed_value())
    return values, run.said


def test_the_state_decides_which_is_newest_and_the_pointer_does_not(workers: Any, tmp_path: Path) -> None:
    values, said = workers.run(resume_by_state, str(tmp_path))[0]
    assert values == [10, 10, 10, 10]
    assert [sentence.split("latest names ")[1] for sentence in said] == [
        "'iteration-000-step-0000077', which is not there.",
        "'../../elsewhere', which is not there.",
    ]


def resume_from_a_wrong_step(directory: str) -> tuple[float, list[str]]:
    from small_state import Run

    run = Run(directory)
    run.save(3, keep=True)
    run.save(8)
    if dist.get_rank() == 0:
        file = run.directory / NAME.format(8) / "state.json"
        # one bit: 8 becomes 0, and the newest one the oldest
        file.write_text(file.read_text().replace('"step": 8', '"step": 0'))
    dist.barrier()
    return run.resumed_value(), run.said


def test_a_newest_checkpoint_that_is_damaged_to_look_old_is_named(workers: Any, tmp_path: Path) -> None:
    value, said = workers.run(resume_from_a_wrong_step, str(tmp_path))[0]
    assert value == 3
    assert NAME.format(8) in said[0] and "state.json is not what was written" in said[0]


# ---------------------------------------------------------------------------------------------- being killed


@contextmanager
def frozen_at_every_point(run: Any, to: Path) -> Any:
    """Copies what is on disk at every point at which a run may be killed, as a run finds it that starts then."""
    from nemo_spin.checkpoint import background, manager, publishing

    def freeze(point: str) -> None:
        if dist.get_rank() == 0:
            shutil.copytree(run.directory, to / point.replace("/", "-") / "checkpoints")

    modules = (background, publishing, manager)
    for module in modules:
        module.reached, module.kept_reached = freeze, module.reached
    try:
        yield
    finally:
        for module in modules:
            module.reached = module.kept_reached


POINTS = ["begun", "shards-written", "manifest-written", "renamed", "pointer-moved", "old-removed"]


def resume_after_kills(directory: str, second_step: int) -> dict[str, tuple[float, set[str], set[str]]]:
    """Point at which the second save is cut off -> what is resumed, and what is there before and after that."""
    from small_state import Run

    run = Run(directory)
    run.save(1)
    if second_step == 1:
        # The same place with another content: nobody can tell the two apart but by what they restore.
        run.save(1)
    with frozen_at_every_point(run, Path(directory)):
        run.save(second_step)
    found = {}
    for point in POINTS:
        again = Run(f"{directory}/checkpoint-{point}")
        before = again.names()
        value = again.resumed_value()
        with again.checkpoints.writing():
            pass
        found[point] = (value, before, again.names())
    return found


def test_a_run_killed_at_any_point_of_a_save_has_a_whole_checkpoint(workers: Any, tmp_path: Path) -> None:
    found = workers.run(resume_after_kills, str(tmp_path), 2, dp=2)[0]
    old, new, unfinished = NAME.format(1), NAME.format(2), f".unfinished-{NAME.format(2)}"
    for point in POINTS[:3]:
        assert found[point] == (1, {old, unfinished, "latest"}, {old, "latest"}), point
    for point in POINTS[3:5]:
        assert found[point] == (2, {old, new, "latest"}, {old, new, "latest"}), point
    assert found["old-removed"] == (2, {new, "latest"}, {new, "latest"})


def test_one_at_the_same_place_is_there_until_the_other_is(workers: Any, tmp_path: Path) -> None:
    found = workers.run(resume_after_kills, str(tmp_path), 1, dp=2)[0]
    first, second = f"{NAME.format(1)}-2", NAME.format(1)
    for point in POINTS[:3]:
        assert found[point][0] == 1 and found[point][2] == {first, "latest"}, point
    for point in POINTS[3:5]:
        assert found[point][0] == 1 and found[point][2] == {first, second, "latest"}, point
    assert found["old-removed"][2] == {second, "latest"}


# ---------------------------------------------------------------------------------------------- a disk that fails


@contextmanager
def failing(what: str, rank: int, number: int) -> Any:
    """One of the system's calls fails on one rank; "write" is refused by the system itself."""
    if what == "write":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def full(path: Any) -> Any:
        return os.statvfs_result((4096, 4096, 1000, 1000, 10, *([0] * 5), 0))

    kept = getattr(os, what)
    if dist.get_rank() == rank:
        setattr(os, what, full if what == "statvfs" else fail)
    try:
        yield
    finally:
        setattr(os, what, kept)


def save_on_a_failing_disk(directory: str, what: str, rank: int, number: int, asynchronous: bool) -> dict[str, Any]:
    from small_state import Run

    from nemo_spin.errors import UserError

    run = Run(directory, asynchronous=asynchronous, columns=20_000)
    tried, sentence = [], ""
    with run.checkpoints.writing():
        run.save(1)
        with failing(what, rank, number):
            run.save(10)
            for step in range(11, 26):
                if run.checkpoints.settle(step, wait=True):
                    tried.append(step)
                    run.save(step)
            try:
                run.save(26, last=True)
            except UserError as error:
                sentence = str(error)
        while_failing = run.names()
        value = run.resumed_value()
        due = next((step for step in range(26, 60) if run.checkpoints.settle(step)), 26)
        run.save(due)
        again = run.checkpoints.settle(due + 1)
    return {
        "tried": tried, "due": due, "again": again, "sentence": sentence, "said": run.said, "value": value,
        "names": (while_failing, run.names()),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "rank", "number", "asynchronous"),
    [
        ("write", 1, errno.EFBIG, True),
        ("fsync", 1, errno.ENOSPC, True),
        ("fsync", 0, errno.EIO, True),
        ("statvfs", 0, errno.ENOSPC, True),
        ("rename", 0, errno.EDQUOT, True),
        ("fsync", 1, errno.EACCES, False),
        ("link", 0, errno.ENOSPC, False),
    ],
    ids=[
        "size of a file",
        "shards of rank 1",
        "shards of rank 0",
        "no room",
        "the last moment",
        "not allowed",
        "linking",
    ],
)
def test_a_disk_that_takes_no_checkpoint_does_not_end_the_run(
    workers: Any, tmp_path: Path, what: str, rank: int, number: int, asynchronous: bool
) -> None:
    arguments = (what, rank, number, asynchronous)
    results = workers.run(save_on_a_failing_disk, str(tmp_path), *arguments, dp=2)
    assert results[0] == results[1], "all ranks decide alike"
    result, kept = results[0], NAME.format(1)
    if what == "link":
        # what cannot be linked is copied
        assert result["tried"] == [] and result["said"] == [] and result["sentence"] == ""
        return
    assert result["tried"] == [11, 13, 17, 25]
    assert result["due"] == 41 and not result["again"]
    assert result["names"] == ({kept, "latest"}, {NAME.format(41), "latest"})
    assert result["value"] == 1
    *warnings, success = result["said"]
    assert len(warnings) == 5 and all(line.startswith("warning: ") and "\n" not in line for line in warnings)
    reason = os.strerror(number)
    assert f"could not be written ({reason}" in warnings[0] and f"{kept} is kept" in warnings[0]
    assert "on rank 1" in warnings[0] or rank == 0
    assert ("GiB more are needed" in warnings[0]) == (what == "statvfs")
    assert "tries again after 1 step:" in warnings[0] and "after 16 steps:" in warnings[4]
    assert "takes checkpoints again" in success and NAME.format(41) in success
    assert f"cannot be written ({reason}" in result["sentence"] and f"{kept} is kept" in result["sentence"]


# ---------------------------------------------------------------------------------------------- in the background


def save_slowly(directory: str) -> dict[str, Any]:
    """The first rank's disk takes nothing until it is let go."""
    from small_state import Run

    from nemo_spin.model_io.stores.sharded import ShardWriter

    let_go = threading.Event()
    write = ShardWriter.write

    def wait_and_write(self: ShardWriter) -> Any:
        if dist.get_rank() == 0:
            assert let_go.wait(60)
        return write(self)

    ShardWriter.write = wait_and_write
    seen: dict[str, Any] = {}
    run = Run(directory)
    try:
        with run.checkpoints.writing():
            run.save(1, keep=True, wait=False)
            for _ in range(3):
                run.model.advance()
                run.progress.advance(1)
            seen["while it is written"] = run.checkpoints.settle(2), run.names()
            # The second one has to wait for the first; nothing else can let it go.
            threading.Timer(0.5, let_go.set).start()
            run.save(5, keep=True, wait=False)
            seen["when the second has begun"] = NAME.format(1) in run.names()
            seen["first"] = run.resumed_value()
            run.model.advance()
        seen["second"] = run.resumed_value()
    finally:
        ShardWriter.write = write
    return seen


def test_training_goes_on_while_one_is_written_and_waits_for_it_before_the_next(workers: Any, tmp_path: Path) -> None:
    for seen in workers.run(save_slowly, str(tmp_path), dp=2):
        assert seen["while it is written"] == (False, {f".unfinished-{NAME.format(1)}"})
        assert seen["when the second has begun"]
        # what was copied, not what training made of it since
        assert (seen["first"], seen["second"]) == (1, 5)


def fail_while_saving(directory: str, lost: bool) -> tuple[set[str], bool]:
    """An error ends the run, on every rank, while a checkpoint is being written; lost: rank 1 never writes its part."""
    from small_state import Run

    from nemo_spin.checkpoint import manager
    from nemo_spin.model_io.stores.sharded import ShardWriter

    write, seconds = ShardWriter.write, manager._SECONDS_AFTER_ERROR
    over = threading.Event()

    def never(self: ShardWriter) -> Any:
        assert over.wait(60)
        return write(self)

    run = Run(directory)
    raised = False
    try:
        manager._SECONDS_AFTER_ERROR = 1.0 if lost else seconds
        ShardWriter.write = never if lost and dist.get_rank() == 1 else write
        with run.checkpoints.writing():
            run.save(1, wait=False)
            raise ZeroDivisionError
    except ZeroDivisionError:
        raised = True
    finally:
        over.set()
        ShardWriter.write, manager._SECONDS_AFTER_ERROR = write, seconds
    return run.names(), raised


@pytest.mark.parametrize("lost", [False, True], ids=["on all ranks", "a rank is gone"])
def test_an_error_in_training_does_not_lose_what_is_being_written(workers: Any, tmp_path: Path, lost: bool) -> None:
    names, raised = workers.run(fail_while_saving, str(tmp_path), lost, dp=2)[0]
    assert raised
    assert names == ({f".unfinished-{NAME.format(1)}"} if lost else {NAME.format(1), "latest"})


# ---------------------------------------------------------------------------------------------- code in a checkpoint


class Evil:
    """Leaves a mark where a pickle reader runs what the file names."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.makedirs, (self.mark, 0o777, True)


def resume_from_evil(directory: str, where: str) -> dict[str, Any]:
    from small_state import Run, SmallModel

    from nemo_spin.checkpoint import manifest

    mark = Path(directory) / "mark"
    run = Run(directory)
    run.save(1, keep=True)
    if where == "plain values":
        # common.pt or an object among the shards, whichever this megatron-core writes
        SmallModel.plain_of, kept = SmallModel.sharded_training_state, SmallModel.sharded_training_state
        SmallModel.sharded_training_state = lambda self, *a, **k: kept(self, *a, **k) | {"plain": Evil(str(mark))}
        try:
            run.save(2)
        finally:
            SmallModel.sharded_training_state = kept
    else:
        run.save(2)
        newest = run.directory / NAME.format(2)
        (newest / "shards" / ".metadata").write_bytes(pickle.dumps(Evil(str(mark))))
        names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
        manifest.write_manifest(newest, {n: manifest.digest_of(newest / n) for n in names if n != manifest.FILE})
    shutil.rmtree(mark, ignore_errors=True)
    value = run.resumed_value()
    left = mark.exists()
    # It would work: this is what reads a checkpoint that is not looked at first.
    with open(run.directory / NAME.format(2) / "shards" / ".metadata", "rb") as file:
        pickle.load(file)
    return {"value": value, "left": left, "works": mark.exists(), "said": run.said}


@pytest.mark.parametrize("where", [".metadata", "plain values"])
def test_a_checkpoint_of_a_stranger_runs_no_code(workers: Any, tmp_path: Path, where: str) -> None:
    (result,) = workers.run(resume_from_evil, str(tmp_path), where)
    assert not result["left"]
    assert result["value"] == 1
    assert NAME.format(2) in result["said"][0]
    assert result["works"] or where != ".metadata"


# ---------------------------------------------------------------------------------------------- other directories


def write_shards(directory: str, what: str, rank: int, number: int) -> str:
    from small_state import SmallModel

    from nemo_spin.errors import UserError
    from nemo_spin.model_io.stores.sharded import save_sharded

    with failing(what, rank, number):
        try:
            save_sharded(SmallModel(1.0, 20_000).sharded_training_state(False, False), Path(directory))
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "rank", "number"), [("write", 1, errno.EFBIG), ("rename", 0, errno.ENOSPC)], ids=["shards", "description"]
)
def test_shards_that_cannot_be_written_are_one_sentence_on_every_rank(
    workers: Any, tmp_path: Path, what: str, rank: int, number: int
) -> None:
    sentences = workers.run(write_shards, str(tmp_path), what, rank, number, dp=2)
    expected = f"{tmp_path} cannot be written ({os.strerror(number)}): make room, and run the same command again."
    assert sentences == [expected, expected]
