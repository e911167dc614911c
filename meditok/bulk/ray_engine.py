"""Parts made by actors of Ray Data: each holds the model, and an actor that dies is started and its part made again.

Inputs, the model and the output folder must lie where every node of the cluster sees them under the same name. With
RAY_ADDRESS set the run joins that cluster, else it starts one on this machine.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace

from .._lazy import require
from ..errors import MeditokError
from .engines import Engine, Recipe
from .folder import StoreFolder
from .plan import Shard
from .run import Listener, Part, Result, Seconds, Work, run_shards

# Nothing about a run leaves the cluster, and its own log lines are not ours.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


class Ray(Engine):
    """Makes parts in actors: one a GPU where there are any, else one a CPU core."""

    def __init__(self):
        require("ray.data", "--engine ray (pip install 'meditok[ray]')")

    def make(
        self,
        shards: Sequence[Shard],
        work: Work,
        target: StoreFolder,
        listener: Listener,
        recipe: Recipe,
        on_error: str,
    ) -> Seconds:
        import ray

        if not shards:
            return Seconds()
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            return _through_ray(shards, work, target, listener, recipe, on_error)
        finally:
            if started_here:
                ray.shutdown()


def _through_ray(shards, work, target, listener, recipe, on_error) -> Seconds:
    import ray

    started, seconds = time.perf_counter(), Seconds(threads=1)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    resources = ray.cluster_resources()
    device = work.model.device.type  # every actor's, so that all parts agree
    gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
    actors = max(1, min(len(shards), gpus or int(resources.get("CPU", 1))))
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Maker,
        fn_constructor_args=(replace(work, model=None, workers=0), target, recipe, device, on_error, os.getcwd()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    for row in made.iter_rows():
        told = pickle.loads(row["told"])
        for result in told.results:
            listener.file(result)
        if told.error is not None:
            raise told.error
        listener.pictures(told.rows)
        seconds.decode += told.seconds.decode
        seconds.model += told.seconds.model
        seconds.write += told.seconds.write
    seconds.wall, seconds.threads = time.perf_counter() - started, actors
    return seconds


class Told:
    """What an actor tells the driver of a part: its failures and warnings, its rows and where the time went."""

    def __init__(self, on_error: str):
        self.on_error, self.results, self.rows, self.seconds = on_error, [], 0, Seconds()
        self.error: Exception | None = None  # that is of no one file

    def file(self, result: Result) -> None:
        if result.error is not None or result.warnings:
            self.results.append(replace(result, ids=[], rows=[]))
        if result.error is not None and self.on_error == "fail":
            raise result.error

    def pictures(self, count: int) -> None:
        self.rows += count


class Maker:
    """The actor: loads the model once, then makes one part a call."""

    def __init__(self, work: Work, target: StoreFolder, recipe: Recipe, device: str, on_error: str, folder: str):
        from ..models.files import load

        os.chdir(folder)  # where relative paths hold
        self.work = replace(work, model=load(recipe.model, device=device, precision=recipe.precision))
        self.target, self.on_error = target, on_error

    def __call__(self, batch: dict) -> dict:
        told = Told(self.on_error)
        shard = pickle.loads(batch["shard"][0])
        try:
            told.seconds = run_shards([shard], self.work, lambda one: Part(self.target, one, self.work), told)
        except (MeditokError, OSError) as error:
            if not any(result.error is error for result in told.results):
                told.error = error
        return {"told": [pickle.dumps(told)]}
