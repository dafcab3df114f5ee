"""Checkpoints of a run: saved while training goes on, the last ones and the best one kept.

Everything that knows Orbax is here. Orbax makes a checkpoint appear whole or not at all, but reads
flipped bits as if they were numbers: each checkpoint has the checksums of its files with it.
"""

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from attnzoom_jax.training import checksum

ROOM = 2**20  # bytes besides the arrays: Orbax's own files, each of them a block at least
DELETED = "deleted"  # folder of what is no longer kept, for a moment
LISTED = 8  # differences of each side in a message
UNFINISHED = "*.orbax-checkpoint-tmp*"
# Orbax writes them at the very end, after the checksums; nothing is read from them.
LATE_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
LINE = "line.json"


class Checkpoints:
    """The checkpoints folder of a run.

    Args:
        folder: is created when the first checkpoint is saved.
        best_metric: the metric by which one checkpoint is the best, "" for none.
        best_mode: "max" or "min".
        keep: how many of the last checkpoints stay; the best stays besides.
        read_only: nothing is saved, deleted or created.

    Raises:
        ValueError: checkpoints are damaged: all of them, or, if read_only, so that the others
            cannot be listed.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        best_metric: str = "",
        best_mode: str = "max",
        keep: int = 2,
        read_only: bool = False,
    ) -> None:
        self.folder = pathlib.Path(folder).absolute()
        self.best_metric = best_metric
        self._read_only = read_only
        self._line: dict[str, Any] = {}
        if not read_only:
            if jax.process_index() == 0:
                sweep_unfinished(self.folder)
                set_aside_damaged(self.folder)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoints are looked through")

        def value(metrics: dict[str, float]) -> float:
            """What to rank a checkpoint by; NaN, which would spoil the order, is the worst."""
            number = metrics.get(best_metric, math.nan)
            worst = -math.inf if best_mode == "max" else math.inf
            return worst if math.isnan(number) else number

        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=value,
                    reverse=best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=value if best_metric else None,
            best_mode=best_mode,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._complete),
            # Renamed first: else a kill leaves a checkpoint that is half deleted.
            todelete_subdir=None if read_only else DELETED,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, item_handlers=ocp.StandardCheckpointHandler(), options=options
            )
        except Exception as error:  # it reads the metrics of all checkpoints
            for step, damage in find_damaged(self.folder).items():
                raise ValueError(_damaged(self.folder, step, damage)) from error
            raise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # At the end of the process a save would be cut off. Of several processes the others may be
        # gone, and a save waits for all of them.
        if kind is not None and jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to tell of
                self._manager.wait_until_finished()

    def save(
        self,
        step: int,
        state: Any,
        metrics: dict[str, float] | None = None,
        *,
        line: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state in the background.

        Args:
            step: of the state.
            state: what `restore` gives back.
            metrics: decide which checkpoint is the best.
            line: {name: number}, int32 or float32, of a line of the log that has not ended here.

        Raises:
            ValueError: this checkpoint, or the one before, cannot be written.
        """
        self.wait()  # its `_complete` needs its own `_line`
        with self._writing():
            _check_room(self.folder, state)
            self._line = {name: np.asarray(n).item() for name, n in (line or {}).items()}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def line(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as `line`, None if nothing."""
        path = self.folder / str(step) / LINE
        numbers = json.loads(path.read_text()) if path.exists() else {}
        types = {int: np.int32, float: np.float32}
        return {name: types[type(n)](n) for name, n in numbers.items()} or None

    def _complete(self) -> None:
        """What Orbax calls when all files of a checkpoint are there, before it gets its name."""
        if jax.process_index() == 0:
            for folder in self.folder.glob(UNFINISHED):
                if self._line:
                    (folder / LINE).write_text(json.dumps(self._line))
                checksum.write_sums(folder, leave_out=LATE_FILES)

    def last_step(self) -> int | None:
        """The newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """The step that "last", "best" (the last where no metric decides) or a number names.

        Raises:
            ValueError: no such checkpoint; those that exist are named.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(
                f"no checkpoint in {self.folder}; train first, or name another workdir"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            if not self.best_metric:
                return steps[-1]
            best = self._manager.best_step()
            if best is None:
                raise ValueError(
                    f"no checkpoint in {self.folder} has metrics; take --checkpoint=last"
                )
            return best
        if not which.isdigit() or int(which) not in steps:
            raise ValueError(
                f"no checkpoint {which!r} in {self.folder}; there is: last, best, "
                + ", ".join(map(str, steps))
            )
        return int(which)

    def restore(self, step: int, like: Any, *, mesh: Mesh | None) -> Any:
        """Read a checkpoint.

        Args:
            step: as `find` returns it.
            like: a state of the same structure, arrays or shapes.
            mesh: where the restored arrays live, whatever it was when they were saved: split over
                it as those of `like` are, else whole on every device. None, or where `like` has a
                NumPy array: on the host, as NumPy.

        Returns:
            The state.

        Raises:
            ValueError: the checkpoint is of another model; both sides are listed.
        """
        saved = self._metadata(step)
        check_same_tree(saved=saved, expected=like, where=f"checkpoint {step} in {self.folder}")
        return self._restore(step, like, mesh)

    def restore_variables(self, step: int, *, like: Any, mesh: Mesh | None) -> Any:
        """Read what a model needs to be evaluated, whatever optimiser trained it.

        Args:
            step: as `find` returns it.
            like: {"params", "batch_stats"}, arrays or shapes.
            mesh: as of `restore`.

        Returns:
            {"params", "batch_stats"}; the averaged parameters where the run kept such.

        Raises:
            ValueError: the checkpoint is of another model; both sides are listed.
        """
        saved = self._metadata(step)
        params = "ema_params" if jax.tree.leaves(saved["ema_params"]) else "params"
        there = {"params": saved[params], "batch_stats": saved["batch_stats"]}
        check_same_tree(saved=there, expected=like, where=f"checkpoint {step} in {self.folder}")
        # The rest must be read too, but need not find room on the devices.
        rest = jax.tree.map(_on_host, saved)
        wanted = {**rest, params: like["params"], "batch_stats": saved["batch_stats"]}
        state = self._restore(step, wanted, mesh)
        return {"params": state[params], "batch_stats": state["batch_stats"] or {}}

    def _restore(self, step: int, like: Any, mesh: Mesh | None) -> Any:
        def target(leaf: Any) -> Any:
            if mesh is None or isinstance(leaf, np.ndarray):
                return _on_host(leaf)
            place = getattr(leaf, "sharding", None)
            spec = place.spec if isinstance(place, NamedSharding) else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        try:
            return self._manager.restore(
                step, args=ocp.args.StandardRestore(jax.tree.map(target, like))
            )
        except Exception as error:  # the storage raises what it likes
            raise ValueError(_damaged(self.folder, step, error)) from error

    def _metadata(self, step: int) -> Any:
        self._check(step)
        try:
            saved = self._manager.item_metadata(step)
            _shapes(saved["params"])
        except Exception as error:
            raise ValueError(_damaged(self.folder, step, error)) from error
        return saved

    def _check(self, step: int) -> None:
        damage = checksum.find_damage(self.folder / str(step))
        if damage:
            raise ValueError(_damaged(self.folder, step, damage))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the storage raises what it likes, and later than at the save
            steps = _steps(self.folder)
            last = f"the last one is step {max(steps)}" if steps else "there is none yet"
            raise ValueError(
                f"a checkpoint cannot be written into {self.folder} ({_one_line(error)}); {last}, "
                "from which the same command goes on"
            ) from error

    def wait(self) -> None:
        """Wait until all is on disk; a ValueError if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()
        if not self._read_only and jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def close(self) -> None:
        """Wait until all is on disk and release the folder; a ValueError as `wait`."""
        self.wait()
        self._manager.close()


def sweep_unfinished(folder: pathlib.Path) -> None:
    """Remove what a killed run left half saved or deleted; Orbax itself leaves it there."""
    for path in (*folder.glob(UNFINISHED), folder / DELETED):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_damaged(folder: pathlib.Path) -> None:
    """Rename checkpoints that are not as they were written, and say so.

    Raises:
        ValueError: there is no other to go on from.
    """
    damaged = find_damaged(folder)
    others = sorted(_steps(folder) - damaged.keys())
    if damaged and not others:
        listed = ", ".join(f"{step}: {damage}" for step, damage in damaged.items())
        raise ValueError(
            f"every checkpoint in {folder} is damaged ({listed}); bring one back from a copy, or "
            "delete the folder to begin anew"
        )
    for step, damage in damaged.items():
        aside = folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        print(
            f"checkpoint {step} in {folder} is damaged ({damage}); it is now called {aside.name}, "
            f"and there is: {', '.join(map(str, others))}",
            flush=True,
        )


def find_damaged(folder: pathlib.Path) -> dict[int, str]:
    """{step: what is wrong} of the checkpoints that are not as they were written."""
    found = {step: checksum.find_damage(folder / str(step)) for step in sorted(_steps(folder))}
    return {step: damage for step, damage in found.items() if damage}


def _check_room(folder: pathlib.Path, state: Any) -> None:
    """Raise an OSError if there is no room for a state: Orbax would fail too, at great length."""
    needed = ROOM + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(folder).free
    if jax.process_index() == 0 and free < needed:
        raise OSError(
            f"No space left on device: {free / 1e6:.1f} MB are free, and it takes up to "
            f"{needed / 1e6:.1f} MB"
        )


def _steps(folder: pathlib.Path) -> set[int]:
    return {int(path.name) for path in folder.glob("*") if path.name.isdigit()}


def _damaged(folder: pathlib.Path, step: int, error: Any) -> str:
    others = ", ".join(map(str, sorted(_steps(folder) - {step}))) or "no other"
    return (
        f"checkpoint {step} in {folder} cannot be read ({_one_line(error)}); delete the folder "
        f"{step} to go on without it; there is: {others}"
    )


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:200]


def check_same_tree(*, saved: Any, expected: Any, where: str) -> None:
    """Compare two trees of arrays path by path.

    Args:
        saved: what there is.
        expected: what the model needs.
        where: names the saved side in the message.

    Raises:
        ValueError: lists what only one side has, or what differs in shape: - saved, + expected.
    """
    there, needed = _shapes(saved), _shapes(expected)
    ours = [f"- {path} {shape}" for path, shape in there.items() if needed.get(path) != shape]
    theirs = [f"+ {path} {shape}" for path, shape in needed.items() if there.get(path) != shape]
    if ours or theirs:
        # The first ones of each side, so that neither crowds out the other.
        shown = sorted(ours[:LISTED] + theirs[:LISTED], key=lambda line: line[2:])
        if more := len(ours) + len(theirs) - len(shown):
            shown.append(f"... and {more} more")
        raise ValueError(
            f"{where} is of another model (- saved, + expected by this config):\n  "
            + "\n  ".join(shown)
        )


def _on_host(leaf: Any) -> np.ndarray:
    return np.empty(leaf.shape, leaf.dtype)


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(list(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
