"""The verb ``tune``: the paper's automatic search, over this search space."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial
from papercore.lab.cli import flag
from papercore.lab.files import write_json, write_text
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from tqdm.auto import tqdm

from eclstm.bohb import Evaluation, brackets, hyperband
from eclstm.cell import state_length
from eclstm.evaluate import evaluate, load_model
from eclstm.plots import plot_predictions, plot_search
from eclstm.sources import DataOptions, load
from eclstm.trainer import ECLSTMConfig, ECLSTMTrainer, fit


@dataclass
class TuneOptions:
    """How to search; the training flags give what the search leaves fixed."""

    min_epochs: int = flag("budget of the first rung, in epochs", 3)
    max_epochs: int = flag("budget of the last rung, in epochs", 27)
    eta: int = flag("one in so many configurations goes on to the next rung (HpBandSter: 3)", 3)
    sweeps: int = flag("how often to run all brackets", 1)
    random_share: float = flag("configurations drawn at random, not from the model (HpBandSter: 1/3)", 1 / 3)
    storage: str | None = flag(
        "Optuna storage URL that workers share; a sqlite file in the output folder if not given", None
    )
    large: bool = flag("also offer the widest filters and kernels, several times slower", False)


def search_space(trial: Trial, large: bool = False) -> dict[str, Any]:
    """Options of :class:`ECLSTMConfig` for one configuration.

    The keys are those of the authors' configuration dictionary; their ranges were not published, these are ours.

    """
    filters, kernels = ([8, 10, 16, 20, 32], [2, 3, 5, 7]) if large else ([8, 10, 16, 20], [2, 3, 5])
    layers = []
    for i in range(trial.suggest_int("layers", 1, 3)):
        depth = trial.suggest_int(f"depth_{i}", 1, 3)
        sizes = [trial.suggest_categorical(f"kernel_{i}_{j}", kernels) for j in range(depth)]
        inner = trial.suggest_categorical(f"recurrent_activation_{i}", ["linear", "tanh"])
        gate = trial.suggest_categorical(f"gate_activation_{i}", ["hard_sigmoid", "sigmoid"])
        first = trial.suggest_categorical("fusion", ["early", "hybrid"]) if i == 0 and depth > 1 else "early"
        layers.append(
            {
                "filters": [trial.suggest_categorical(f"filters_{i}", filters)] * depth,
                "kernel_sizes": sizes,
                "fusion": [first] + ["early"] * (depth - 1),
                "recurrent_activation": [inner] * (depth - 1) + [gate],
                "conv_activation": trial.suggest_categorical(f"conv_activation_{i}", ["hard_sigmoid", "relu", "tanh"]),
                "stride": trial.suggest_categorical(f"stride_{i}", [1, 2]),
            }
        )
    preprocess = trial.suggest_categorical("preprocessing", [False, True])
    return {
        "layers": layers,
        "preprocessing": [{"filters": 10, "kernel_size": 3, "stride": 2}] if preprocess else [],
        "sequence_length": trial.suggest_int("sequence_length", 3, 10),
        "window_size": trial.suggest_categorical("window_size", [12, 16, 20, 24, 30]),
        "dense": [
            trial.suggest_categorical(f"dense_{i}", [50, 100, 150, 200])
            for i in range(trial.suggest_int("dense_layers", 1, 2))
        ],
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 3e-3, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
    }


def valid(chosen: dict[str, Any], shortest: int) -> dict[str, Any]:
    """``chosen``, if every convolution has something left to read and a segment fits the ``shortest`` unit; by arithmetic alone.

    Raises:
        ValueError: if not.
    """
    rows, length = chosen["sequence_length"] + chosen["window_size"] - 1, chosen["window_size"]
    if rows > shortest:
        raise ValueError(f"segments of {rows} rows, but a unit has {shortest}")
    for layer in chosen["preprocessing"]:
        length = state_length(length, [layer["kernel_size"]], layer["stride"])
    for layer in chosen["layers"]:
        length = state_length(length, layer["kernel_sizes"], layer["stride"])
    return chosen


def tune(data: DataOptions, config: ECLSTMConfig, options: TuneOptions) -> dict[str, float]:
    """Search, then judge the best configuration on the test units; its checkpoint is in ``output_dir/best``."""
    folder = Path(config.output_dir or f"runs/eclstm-tune-{data.name}")
    resumable(folder, data, config, options)
    plan = brackets(options.min_epochs, options.max_epochs, options.eta) * options.sweeps
    rows = [
        [str(b), *(f"{rung.configurations} x {rung.budget}" for rung in rungs), *[""] * (len(plan[0]) - len(rungs))]
        for b, rungs in enumerate(plan)
    ]
    print_table("configurations x epochs", ["bracket", *(f"rung {i}" for i in range(len(plan[0])))], rows)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = options.storage or f"sqlite:///{folder / 'tune.db'}"
    with FileLock(folder / "lock"):  # workers that start together would each make the tables
        study = optuna.create_study(study_name=f"eclstm-{folder.name}", storage=storage, load_if_exists=True)
    training, test = load(data, config.seed)

    def train(chosen: dict[str, Any], epochs: int, work: Path) -> ECLSTMTrainer:
        fixed: dict[str, Any] = {
            "output_dir": str(work),
            "num_train_epochs": epochs,
            "patience": options.max_epochs,
            "disable_tqdm": True,
        }
        return fit(data, dataclasses.replace(config, **chosen, **fixed), training, may_change=("num_train_epochs",))

    def objective(chosen: dict[str, Any], epochs: int, work: Path) -> float:
        best = train(chosen, epochs, work).state.best_metric
        return float("inf") if best is None else best

    def space(trial: Trial) -> dict[str, Any]:
        return valid(search_space(trial, options.large), int(training.lengths.min()))

    total = sum(rung.configurations for rungs in plan for rung in rungs)
    with tqdm(total=total, initial=len(study.trials), desc="tune", unit="evaluation", dynamic_ncols=True) as bar:

        def on_result(evaluation: Evaluation, trial: FrozenTrial) -> None:
            bar.write(
                f"bracket {evaluation.bracket}, configuration {evaluation.configuration}, {evaluation.budget} epochs: "
                f"validation RMSE {trial.value:.2f}"
            )
            bar.update(len(study.trials) - bar.n)

        best = hyperband(
            study,
            objective,
            space,
            folder,
            min_budget=options.min_epochs,
            max_budget=options.max_epochs,
            eta=options.eta,
            sweeps=options.sweeps,
            seed=config.seed,
            random_share=options.random_share,
            on_result=on_result,
        )
    chosen = best.user_attrs["options"]
    work = folder / f"bracket-{best.user_attrs['bracket']}-{best.user_attrs['configuration']}"
    flags = {**chosen, "num_train_epochs": options.max_epochs, "patience": options.max_epochs}
    with FileLock(work / "lock"):  # all workers end here
        train(chosen, options.max_epochs, work).save_model(str(folder / "best"))
    write_text(folder / "best.yaml", yaml.safe_dump(flags, sort_keys=False))
    result = evaluate(load_model(str(folder / "best")), test)
    metrics = {**result.metrics, "validation_rmse": float(best.value or 0), "evaluations": len(study.trials)}
    write_json(folder / "metrics.json", metrics)
    plot_predictions(result, folder / "predicted.png", f"{data.name}, tuned")
    plot_search(study.trials, folder / "search.png")
    result.show(f"{data.name}, tuned (validation RMSE {best.value:.2f})")
    console.print(f"model {folder / 'best'}; flags for `eclstm train --config`: {folder / 'best.yaml'}", soft_wrap=True)
    return metrics
