"""Evaluate a run: python eval.py --workdir=runs/demo [--checkpoint=best|last|STEP].

Runs every evaluation of the config, writes eval.json into the workdir and prints a table.

A network that was never trained here needs no run: python eval.py --config=FILE.py --workdir=OUT,
where the config has `network`, or `model.name` and `pretrained`.
"""

from typing import Any

from absl import flags

from attnzoom_jax import cli
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.restore import load_model
from attnzoom_jax.training import sharding
from attnzoom_jax.training.workdir import Workdir, provenance, to_plain


def evaluate(
    workdir: str,
    *,
    checkpoint: str = "best",
    config: Any = None,
    overrides: dict[str, Any] | None = None,
    data_dir: str = "",
    output: str = "eval.json",
) -> dict[str, float]:
    """Evaluate a checkpoint of a run, or a network with published weights, and write eval.json.

    Args:
        workdir: folder of the run; one without a run is made for the results.
        checkpoint: "best", "last" or a step.
        config: instead of the run's own.
        overrides: what the command line changed in that config.
        data_dir: folder of prepared data sets, instead of the config's.
        output: name of the file in the workdir.

    Returns:
        {"split/metric": value}.

    Raises:
        ValueError: what a person can mend, in one message.
    """
    own = Workdir(workdir).config() if config is None else config
    mesh = sharding.mesh_anywhere(own.get("mesh"))
    trained = load_model(
        workdir,
        checkpoint=checkpoint,
        config=config,
        overrides=overrides,
        data_dir=data_dir,
        mesh=mesh,
    )
    config, folder = trained.config, Workdir(workdir)
    evaluators = {
        name: create_evaluator(
            model=trained.model,
            data=config.data,
            mesh=mesh,
            **{
                "class_names": trained.class_names,
                "folder": folder.path / "tables" / name,
                **options,
            },
        )
        for name, options in config.evals.items()
    }
    folder.create()
    metrics: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        of = "" if trained.step is None else f" (checkpoint {trained.step})"
        print(f"evaluating {name}{of} ...", flush=True)
        new = evaluator.run(trained.variables)
        if not getattr(evaluator, "prints_itself", False):
            print_table(new)
        twice = metrics.keys() & new.keys()
        if twice:
            raise ValueError(
                f"evals.{name} and one before it both give {min(twice)!r}; set evals.{name}.prefix"
            )
        metrics.update(new)
    folder.write(
        output,
        {
            "metrics": metrics,
            "step": trained.step,
            "seed": config.seed,
            **provenance(),
            "config": to_plain(config),
            "overrides": folder.overrides() if overrides is None else to_plain(overrides),
        },
    )
    return metrics


def print_table(metrics: dict[str, float]) -> None:
    """Print metrics, one per line."""
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:>8{'d' if isinstance(value, int) else '.4f'}}")


def main() -> None:
    """Parse the flags, evaluate, print."""
    config = flags.FLAGS.config
    workdir = flags.FLAGS.workdir
    used = Workdir(workdir).config() if config is None else config
    cli.start_devices(used.platform, compile_cache=used.compile_cache, many=True)
    evaluate(
        workdir,
        checkpoint=flags.FLAGS.checkpoint,
        config=config,
        overrides=None if config is None else cli.config_overrides(),
        data_dir=flags.FLAGS.data_dir,
        output=flags.FLAGS.output,
    )
    print(f"written to {workdir}/{flags.FLAGS.output}", flush=True)


if __name__ == "__main__":
    cli.define_config_flag("Config file, instead of the config that the run was trained with")
    flags.DEFINE_string("workdir", None, "Folder of the run, or for the results of a network")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("data_dir", "", "Folder of prepared data sets, instead of the config's")
    flags.DEFINE_string("output", "eval.json", "Name of the file of the results, in the workdir")
    flags.mark_flag_as_required("workdir")
    cli.run(main)
