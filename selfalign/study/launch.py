"""Runs the jobs of a study: in processes of this machine, or on a cluster through submitit."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from selfalign.errors import UserError
from selfalign.records import read_json, write_json
from selfalign.study.job import mark_failed, run_job
from selfalign.study.plan import Job, read_study
from selfalign.study.results import FAILED_SUFFIX, RESULT_FILE, RUNS, read_result
from selfalign.study.settings import LaunchConfig
from selfalign.training.tracking import read_metrics

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Status:
    """Where a study stands."""

    total: int
    done: int
    failed: tuple[str, ...]
    """Names of runs that ended without a result."""
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Step and last step of the runs under way, by name."""
    finished: float = 0.0
    """Runs' worth of work that this sitting has done, parts of running ones included."""


class Launcher(Protocol):
    """Starts jobs, and knows which of them are under way."""

    def submit(self, job: Job) -> None:
        """Put a job into the queue."""
        ...

    def running(self) -> set[str]:
        """Names of the jobs under way."""
        ...

    def active(self) -> bool:
        """Whether any job is queued or under way."""
        ...

    def stop(self) -> None:
        """Stop what is under way at a checkpoint, as far as it is this process's to stop."""
        ...


def launch(folder: Path, config: LaunchConfig) -> Iterator[Status]:
    """Run all jobs of a study that have no result, those that failed before included.

    Yields:
        Where the study stands, now and then. Closing the iterator stops the runs at a checkpoint.

    Raises:
        UserError: the launcher cannot be used here.
    """
    jobs = read_study(folder).jobs()
    todo = [job for job in jobs if read_result(folder / RUNS / job.name) is None]
    begun = {job.name: _step(folder, job) / job.config.training.steps for job in todo}
    launcher = _make_launcher(folder, config)
    try:
        for job in todo:
            _failure_file(folder, job).unlink(missing_ok=True)
            launcher.submit(job)
        while launcher.active():
            yield _status(folder, jobs, begun, launcher)
            time.sleep(POLL_SECONDS)
        for job in todo:  # a cluster may end a job without asking it
            result, failure = folder / RUNS / job.name / RESULT_FILE, _failure_file(folder, job)
            if not result.is_file() and not failure.is_file():
                mark_failed(folder, job.name, UserError("it ended without a result"))
        yield _status(folder, jobs, begun, launcher)
    finally:
        launcher.stop()


def _status(folder: Path, jobs: list[Job], begun: dict[str, float], launcher: Launcher) -> Status:
    running = launcher.running()
    done, failed, progress, finished = 0, [], {}, 0.0
    for job in jobs:
        if (folder / RUNS / job.name / RESULT_FILE).is_file():
            done += 1
            finished += 1 - begun[job.name] if job.name in begun else 0
        elif _failure_file(folder, job).is_file():
            failed.append(job.name)
            finished += 1 - begun[job.name]
        elif job.name in running:
            steps = job.config.training.steps
            progress[job.name] = (_step(folder, job), steps)
            finished += max(0.0, progress[job.name][0] / steps - begun[job.name])
    return Status(len(jobs), done, tuple(failed), progress, finished)


def _step(folder: Path, job: Job) -> int:
    lines = read_metrics(folder / RUNS / job.name, most=1)
    return lines[-1]["step"] if lines else 0


def _failure_file(folder: Path, job: Job) -> Path:
    return (folder / RUNS / job.name).with_suffix(FAILED_SUFFIX)


def _make_launcher(folder: Path, config: LaunchConfig) -> Launcher:
    if config.launcher == "local":
        return LocalLauncher(folder, config)
    return ClusterLauncher(folder, config)


class LocalLauncher:
    """A process per run, several at once, so that none can harm another.

    Args:
        folder: of the study.
        config: processes and threads.
    """

    def __init__(self, folder: Path, config: LaunchConfig) -> None:
        self.folder, self.threads = folder, config.threads
        gpus = torch.cuda.device_count()
        count = config.processes or gpus or max(1, (os.cpu_count() or 1) // config.threads)
        self._gpus = [str(number % gpus) if gpus else "" for number in range(count)]
        self._pool = ThreadPoolExecutor(count)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._futures: list[Future[None]] = []
        self._stopping = False

    def submit(self, job: Job) -> None:
        """See `Launcher.submit`."""
        self._futures.append(self._pool.submit(self._run, job.name))

    def _run(self, name: str) -> None:
        if self._stopping:
            return
        gpu = self._gpus.pop()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        run = self.folder / RUNS / name
        run.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "selfalign.study.job", str(self.folder), name]
        with run.with_suffix(".log").open("ab") as log:
            # In a session of its own, so that a Ctrl-C meant for the study does not reach it as well.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            self._processes[name] = process
            code = process.wait()
        del self._processes[name]
        self._gpus.append(gpu)
        mark = run.with_suffix(FAILED_SUFFIX)
        if code not in (0, 2) and not self._stopping and not mark.is_file():
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            mark_failed(self.folder, name, UserError(f"the process was {how}"))

    def running(self) -> set[str]:
        """See `Launcher.running`."""
        return set(self._processes)

    def active(self) -> bool:
        """See `Launcher.active`."""
        return not all(future.done() for future in self._futures)

    def stop(self) -> None:
        """See `Launcher.stop`; a second interrupt ends them at once."""
        self._stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        try:
            self._signal(lambda process: process.terminate())
            wait([future for future in self._futures if not future.cancelled()])
        except KeyboardInterrupt:
            self._signal(lambda process: process.kill())
            raise

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        for process in list(self._processes.values()):
            with contextlib.suppress(OSError):
                send(process)


def require_launcher(folder: Path, config: LaunchConfig) -> None:
    """Refuse a launcher that cannot be used here, before anything is written.

    Raises:
        UserError: submitit is not installed, or there is no such cluster.
    """
    if config.launcher != "local":
        _cluster_executor(folder, config)


def _cluster_executor(folder: Path, config: LaunchConfig) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--launcher {config.launcher} needs submitit: pip install 'selfalign[cluster]'"
        ) from error
    cluster = "slurm" if config.launcher == "slurm" else "local"
    try:
        return submitit.AutoExecutor(folder=folder.absolute() / "jobs", cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--launcher {config.launcher}: {error}") from error


@dataclass(frozen=True)
class ClusterJob:
    """What a cluster's job calls; one that is preempted or out of time is queued again."""

    folder: Path
    name: str

    def __call__(self) -> None:
        """Run the job; a failure leaves its mark, and the cluster's log its traceback."""
        try:
            run_job(self.folder, self.name)
        except Exception as error:
            mark_failed(self.folder, self.name, error)
            raise

    def checkpoint(self) -> Any:
        """What submitit queues instead: the same, which goes on from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ClusterLauncher:
    """A job of the cluster per run. The cluster outlives this process, and so do its jobs.

    Args:
        folder: of the study.
        config: resources of each job.

    Raises:
        UserError: submitit is not installed, or there is no such cluster here.
    """

    def __init__(self, folder: Path, config: LaunchConfig) -> None:
        self._executor = _cluster_executor(folder, config)
        import submitit

        self.folder = folder.absolute()
        self._logs = self.folder / "jobs"
        cluster = "slurm" if config.launcher == "slurm" else "local"
        self._executor.update_parameters(
            name="selfalign",
            timeout_min=config.minutes,
            cpus_per_task=config.threads,
            gpus_per_node=config.gpus if cluster == "slurm" else 0,
        )
        if cluster == "slurm" and config.partition:
            self._executor.update_parameters(slurm_partition=config.partition)
        self._record = self._logs / "submitted.json"
        known = read_json(self._record, dict[str, str]) if self._record.is_file() else {}
        job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self._jobs: dict[str, Any] = {
            name: job_class(folder=self._logs, job_id=id_) for name, id_ in known.items()
        }

    def submit(self, job: Job) -> None:
        """Queue a job, unless one of an earlier sitting is still queued or under way."""
        if job.name in self._jobs and not self._jobs[job.name].done():
            return
        submitted = self._executor.submit(ClusterJob(self.folder, job.name))
        self._jobs[job.name] = submitted
        ids = {name: entry.job_id for name, entry in self._jobs.items()}
        write_json(self._record, ids)

    def running(self) -> set[str]:
        """See `Launcher.running`."""
        return {name for name, job in self._jobs.items() if job.state == "RUNNING"}

    def active(self) -> bool:
        """See `Launcher.active`."""
        return not all(job.done() for job in self._jobs.values())

    def stop(self) -> None:
        """Leave the cluster's jobs alone: they go on, and their results are found next time."""
