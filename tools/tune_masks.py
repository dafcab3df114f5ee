"""Choose the intentional transformation of each attribute's masks, and evaluate what is chosen.

    python tools/tune_masks.py --workdir=runs/attributes

For a run of configs/multi_channel.py. Every transform of ops/masks.py, at every point of a grid, is
scored on validation images, clean and corrupted; each attribute takes what serves it best. What is
chosen, within each transform and among all, then goes through the evaluations of the config that
are not part of training, on test images, beside the untransformed masks, and beside a control that
leaves the masks and moves the decision threshold of each attribute. WORKDIR/mask_study.json holds
all of it; "chosen" is what an evaluator takes as `transform`, or a config as model.transform.

Validation images are corrupted in three of the eight ways of the robustness evaluation, at one
level, so that most of what the test does to images was unknown when the choice was made;
--corruptions chooses others.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from attnzoom_jax import cli
from attnzoom_jax.data.corruptions import CORRUPTIONS
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.restore import TrainedModel, restore_model
from attnzoom_jax.evaluation.tune_masks import shift_logits, tune_masks
from attnzoom_jax.training import sharding
from attnzoom_jax.training.workdir import Workdir, provenance, to_plain

STUDY = "mask_study.json"
CHOSEN_BY = ("gaussian_noise", "gaussian_blur", "contrast")
SHOWN = ("balanced_accuracy", "top1", "corruption_balanced_accuracy", "corruption_accuracy")


def study(
    workdir: str, *, checkpoint: str = "best", split: str = "", level: int = 3, **options: Any
) -> dict[str, Any]:
    """Tune the masks of a run, evaluate what is chosen, and write mask_study.json.

    Args:
        workdir: folder of the run.
        checkpoint: "best", "last" or a step.
        split: of validation images; "" for that of the first evaluation in config.train_evals.
        level: of the corruptions of the validation images.
        **options: corruptions and grid, as `tune_masks` takes them.

    Returns:
        What the file holds: the study, with the metrics of the test as "test" of each transform.

    Raises:
        ValueError: what a person can mend, in one message.
    """
    mesh = sharding.create_mesh()
    trained = restore_model(workdir, checkpoint=checkpoint, mesh=mesh)
    config = trained.config
    split = split or config.evals[config.train_evals[0]].split
    print(f"scoring transforms on {split} (checkpoint {trained.step}) ...", flush=True)
    options.setdefault("corruptions", CHOSEN_BY)
    found = tune_masks(trained, split=split, mesh=mesh, level=level, seed=config.seed, **options)
    found["transforms"] = {"identity": {"chosen": None, "score": _mean(found), "test": {}}} | found[
        "transforms"
    ]
    for name, one in found["transforms"].items():
        print(f"evaluating {name} ...", flush=True)
        one["test"] = _test(trained, one["chosen"], mesh)
    for name, one in found["controls"].items():
        print(f"evaluating the control {name} ...", flush=True)
        variables = shift_logits(trained.variables, one["chosen"])
        one["test"] = _test(dataclasses.replace(trained, variables=variables), None, mesh)
    found |= {"step": trained.step, "seed": config.seed, **provenance()}
    Workdir(workdir).write(STUDY, found)
    return found


def _mean(found: dict[str, Any]) -> float:
    known = [score for score in found["identity"] if score is not None]
    return sum(known) / len(known)


def _test(trained: TrainedModel, chosen: Any, mesh: Any) -> dict[str, float]:
    """The evaluations that training does not run, with these transforms."""
    config, metrics = trained.config, {}
    transform = chosen[0] if chosen and len(chosen) == 1 else chosen
    for name, options in config.evals.items():
        if name in config.train_evals:
            continue
        options = {**to_plain(options), "transform": transform}
        evaluator = create_evaluator(model=trained.model, data=config.data, mesh=mesh, **options)
        metrics |= evaluator.run(trained.variables)
    return metrics


def print_table(found: dict[str, Any]) -> None:
    """Print the score of each transform on the validation images, and what the test says."""
    transforms = {**found["transforms"], **found["controls"]}
    names = [
        name for name in transforms["identity"]["test"] if name.rpartition("/")[2] in SHOWN
    ] + [n for n in transforms["identity"]["test"] if n.endswith("/attack_accuracy")]
    width = max(map(len, transforms))
    print(f"  {'':<{width}}  validation  {'  '.join(names)}")
    for name, one in transforms.items():
        values = "  ".join(f"{one['test'][n]:>{len(n)}.4f}" for n in names)
        print(f"  {name:<{width}}  {one['score']:>10.4f}  {values}")


def main() -> None:
    """Parse the flags, tune, print."""
    given = flags.FLAGS
    config = Workdir(given.workdir).config()
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    found = study(
        given.workdir,
        checkpoint=given.checkpoint,
        split=given.split,
        level=given.level,
        corruptions=tuple(given.corruptions),
    )
    print_table(found)
    print(f"written to {given.workdir}/{STUDY}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("split", "", "Split of validation images; default: the one of training")
    flags.DEFINE_list(
        "corruptions",
        list(CHOSEN_BY),
        f"Of the validation images: {', '.join(CORRUPTIONS)}",
    )
    flags.DEFINE_integer("level", 3, "Of the corruptions", lower_bound=1, upper_bound=5)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
