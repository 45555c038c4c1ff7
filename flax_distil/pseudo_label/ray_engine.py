"""Labelling by Ray: one actor per accelerator of a cluster, each with a teacher of its own.

Whichever actor is idle gets the next shard. It writes the shard to the store itself, so only
numbers and totals travel; of a stream, which one process reads, also the utterances. Ray restarts
an actor that died and runs its shard again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.pseudo_label.jobs import LabelJob
from flax_distil.pseudo_label.shards import LabelProgress, Work, label_shards
from flax_distil.pseudo_label.store import Shard
from flax_distil.pseudo_label.teacher import Teacher

RETRIES = 3  # of a shard whose actor died; actors are restarted without limit


# Makes the jobs and the teacher in each actor.
Load = Callable[[], tuple[Sequence[LabelJob], Teacher]]


class LabelActor:
    """A process with a teacher."""

    def __init__(self, load: Load):
        self.jobs, self.teacher = load()

    def label(self, dataset: int, number: int, utterances: list[Utterance] | None) -> Shard:
        """Label and write a shard. utterances: of a stream; else they are read here."""
        job = self.jobs[dataset]
        work = (number, job.shard(number) if utterances is None else utterances)
        return next(label_shards(job, self.teacher, [work]))


def connect() -> Any:
    """Ray, connected to the cluster at RAY_ADDRESS, to one on this machine, or to a new one.

    Raises InputError where Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'flax-distil[ray]'") from None
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot reach a Ray cluster: {error}") from None
    return ray


def start_engines(
    config: PseudoLabelConfig, load: Load, jobs: Sequence[LabelJob]
) -> list[Callable[[Iterable[Work], LabelProgress], Iterator[Shard]]]:
    """An engine for each job, all on the same actors.

    Raises InputError where Ray is not installed or the cluster cannot be reached.
    """
    ray = connect()
    from ray.util.actor_pool import ActorPool

    count, options = placement(ray.cluster_resources(), len(ray.nodes()))
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **options)(LabelActor)
    pool = ActorPool([actor.remote(load) for _ in range(config.ray_workers or count)])
    return [partial(label_by_actors, pool, dataset, job) for dataset, job in enumerate(jobs)]


def placement(resources: Mapping[str, float], nodes: int) -> tuple[int, dict[str, Any]]:
    """How many actors a cluster has room for, and what each needs: a TPU chip, a GPU, or, where
    there is neither, a machine."""
    if chips := int(resources.get("TPU", 0)):
        return chips, {"resources": {"TPU": 1}}
    if gpus := int(resources.get("GPU", 0)):
        return gpus, {"num_gpus": 1}
    return nodes, {"num_cpus": 1, "scheduling_strategy": "SPREAD"}


def label_by_actors(
    pool: Any, dataset: int, job: LabelJob, work: Iterable[Work], progress: LabelProgress
) -> Iterator[Shard]:
    """The shards of a job as the actors of `pool` finish them.

    Raises InputError where one of them does, or dies at the same shard again and again.
    """
    from ray.exceptions import RayActorError, RayTaskError

    def results() -> Iterator[Shard]:
        for number, utterances in work:
            if not pool.has_free():
                yield pool.get_next_unordered()
            rows = list(utterances) if job.count is None else None
            pool.submit(lambda actor, task: actor.label.remote(*task), (dataset, number, rows))
        while pool.has_next():
            yield pool.get_next_unordered()

    try:
        for shard in results():
            progress.advance(shard.seconds, shard.utterances)
            yield shard
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    except RayActorError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise InputError(
            f"a labelling actor could not start, or died {RETRIES + 1} times at the same shard: "
            f"{last_line}; see Ray's logs on its machine"
        ) from None
