"""Checkpoints of a run: saved while training goes on, the last ones and the best one kept.

Everything that knows Orbax is here.
"""

import math
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from attnzoom_jax.training.sharding import replicated

LISTED = 8  # differences of each side in a message


class Checkpoints:
    """The checkpoints folder of a run.

    Args:
        folder: is created when the first checkpoint is saved.
        best_metric: the metric by which one checkpoint is the best, "" for none.
        best_mode: "max" or "min".
        keep: how many of the last checkpoints stay; the best stays besides.
        read_only: nothing is saved, deleted or created.
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
        if not read_only:
            sweep_unfinished(self.folder)

        def value(metrics: dict[str, float]) -> float:
            """What to rank a checkpoint by; NaN, which would spoil the order, is the worst."""
            number = metrics[best_metric]
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
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=value if best_metric else None,
                best_mode=best_mode,
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Save a state, in the background; `metrics` decide which checkpoint is the best."""
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

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

    def restore(self, step: int, like: Any, *, mesh: Mesh) -> Any:
        """Read a checkpoint.

        Args:
            step: as `find` returns it.
            like: a state of the same structure, arrays or shapes.
            mesh: where the restored arrays live, whatever it was when they were saved.

        Returns:
            The state.

        Raises:
            ValueError: the checkpoint is of another model; both sides are listed.
        """
        saved = self._metadata(step)
        check_same_tree(saved=saved, expected=like, where=f"checkpoint {step} in {self.folder}")
        return self._restore(step, like, mesh)

    def restore_variables(self, step: int, *, like: Any, mesh: Mesh) -> Any:
        """Read what a model needs to be evaluated, whatever optimiser trained it.

        Args:
            step: as `find` returns it.
            like: {"params", "batch_stats"}, arrays or shapes.
            mesh: where the restored arrays live.

        Returns:
            {"params", "batch_stats"}; the averaged parameters where the run kept such.

        Raises:
            ValueError: the checkpoint is of another model; both sides are listed.
        """
        saved = self._metadata(step)
        params = "ema_params" if jax.tree.leaves(saved["ema_params"]) else "params"
        there = {"params": saved[params], "batch_stats": saved["batch_stats"]}
        check_same_tree(saved=there, expected=like, where=f"checkpoint {step} in {self.folder}")
        state = self._restore(step, saved, mesh)
        return {"params": state[params], "batch_stats": state["batch_stats"] or {}}

    def _restore(self, step: int, like: Any, mesh: Mesh) -> Any:
        sharding = replicated(mesh)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # the storage raises what it likes
            raise self._damaged(step, error) from error

    def _metadata(self, step: int) -> Any:
        try:
            saved = self._manager.item_metadata(step)
            _shapes(saved["params"])
        except Exception as error:
            raise self._damaged(step, error) from error
        return saved

    def _damaged(self, step: int, error: Any) -> ValueError:
        others = ", ".join(str(other) for other in self.steps() if other != step) or "no other"
        reason = " ".join(str(error).split())[:200]
        return ValueError(
            f"checkpoint {step} in {self.folder} cannot be read ({reason}); delete the folder "
            f"{step} to go on without it; there is: {others}"
        )

    def wait(self) -> None:
        """Wait until all is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all is on disk and release the folder."""
        self._manager.close()


def sweep_unfinished(folder: pathlib.Path) -> None:
    """Remove what a killed run left half saved; Orbax itself never reads it, nor deletes it."""
    if jax.process_index() == 0:
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


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


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(list(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
