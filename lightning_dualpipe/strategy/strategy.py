"""``Trainer(strategy="dualpipe")``: pipeline and expert parallelism for an ordinary LightningModule.

    setup           find the model that follows ``interface.PipelineModel``, keep this rank's stages,
                    give them memory, replace the model's ``forward`` by the pipeline
    training_step   the user's, unmodified, on every rank: calling the model runs the whole schedule
    backward        hands the gradients over, summed over every rank that holds the parameter
    optimizers      step on this rank's share of what they update, then share the result
    clipping        by the norm of the whole model, each parameter counted once
    checkpoints     one file, as ``strategy="auto"`` would have written it, or a directory of all ranks' parts

What a rank holds is decided by ``strategy.assembly``, who reads the data by ``strategy.reader``; the
base classes talk to other ranks (``collectives``), share out ``optimizers``, read and write checkpoints and show the
precision plugin the whole model.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
)
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states, pl_worker_init_function
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_dualpipe.interface import InitializesWeights
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.pipeline.overlap import launch_order
from lightning_dualpipe.pipeline.record import Recorder
from lightning_dualpipe.schedules.record import StepRecord
from lightning_dualpipe.strategy.assembly import Assembly
from lightning_dualpipe.strategy.checks import check_arguments, check_callbacks, check_model, check_run, dtype_of
from lightning_dualpipe.strategy.configured import clear_gradients_early, optimizers_may_be_empty
from lightning_dualpipe.strategy.failures import report_failure
from lightning_dualpipe.strategy.interrupts import exit_as_terminated, stop_between_batches
from lightning_dualpipe.strategy.launcher import PipelineLauncher, join_run
from lightning_dualpipe.strategy.meeting import store_of_this_attempt
from lightning_dualpipe.strategy.metric_groups import collect_over
from lightning_dualpipe.strategy.model_summary import summarize_the_whole_model
from lightning_dualpipe.strategy.parting import wait_for_threads_at_exit
from lightning_dualpipe.strategy.reader import PipelineReader, check_lengths, warn_of_stream
from lightning_dualpipe.strategy.recording import start_recording, stop_recording
from lightning_dualpipe.strategy.requeue import requeue_between_batches
from lightning_dualpipe.strategy.roll_call import RollCall
from lightning_dualpipe.strategy.watched import WatchedPipeline

__all__ = ["DualPipeStrategy"]


class DualPipeStrategy(WatchedPipeline):
    """Trains one model over several processes: pipeline, data and expert parallelism.

    The world of processes is ``pipeline_parallel_size`` x data-parallel size. Experts are spread over
    data ranks, so ``expert_parallel_size`` divides the data-parallel size.

    Args:
        pipeline_parallel_size: ranks that share one copy of the batch; ``"auto"`` takes the devices of a node.
        expert_parallel_size: data ranks over which the experts of a layer are spread.
        schedule: ``dualpipe`` (even number of pipeline ranks, every stage twice), ``dualpipev``, ``zb1p``,
            ``1f1b`` or ``gpipe``.
        num_microbatches: pieces of a batch; ``"auto"`` takes the smallest divisor of the batch size that
            is at least twice the pipeline size (four where only experts are spread). More pieces mean a smaller
            idle share.
        optimizer_precision: of gradients, and of the weights that optimizers update, where parameters are in half
            precision: ``"32"``, of which parameters are rounded copies, or the ``"parameters"``' own.
        overlap: compute one microbatch while the tokens of another travel to their experts. Off, every layer waits
            for its own tokens; results are the same.
        dispatcher: the way of tokens to their experts, by its name in ``parallel.choice``; ``"auto"`` takes the best
            that can run here, and says why.
        save_distributed_checkpoint: every rank writes what it has into a directory, ``"async"``: while training goes
            on; off, rank 0 writes one file.
        process_group_backend: ``nccl`` on GPUs and ``gloo`` on CPUs by default.
        timeout: how long a collective may wait before the run is given up.
        hang_timeout: seconds in which no rank is at work, after which the run is ended and it is said who waits for
            whom; None: never.
    """

    strategy_name = "dualpipe"

    def __init__(
        self,
        pipeline_parallel_size: int | Literal["auto"] = "auto",
        expert_parallel_size: int = 1,
        schedule: Literal["dualpipe", "dualpipev", "zb1p", "1f1b", "gpipe"] = "dualpipe",
        num_microbatches: int | Literal["auto"] = "auto",
        overlap: bool = True,
        optimizer_precision: Literal["32", "parameters"] = "32",
        dispatcher: Literal["auto", "all_to_all", "node", "deepep"] = "auto",
        save_distributed_checkpoint: bool | Literal["async"] = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        hang_timeout: float | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        check_arguments(
            pipeline_parallel_size,
            expert_parallel_size,
            schedule,
            num_microbatches,
            optimizer_precision,
            dispatcher,
            save_distributed_checkpoint,
            hang_timeout,
            timeout or default_pg_timeout,
        )
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self.pipeline_parallel_size = pipeline_parallel_size
        self.expert_parallel_size = expert_parallel_size
        self.schedule = schedule
        self.num_microbatches = num_microbatches
        self.overlap = overlap
        self.optimizer_precision = optimizer_precision
        self.dispatcher = dispatcher
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.num_nodes = 1
        self._backend = process_group_backend
        self._timeout = timeout or default_pg_timeout
        self.hang_timeout = hang_timeout
        self._groups: Groups | None = None
        self._roll_call: RollCall | None = None
        self._recorder: Recorder | None = None

    # ---- who and where ------------------------------------------------------------------------

    @property
    def layout(self) -> ParallelLayout:
        """The places of all ranks; known as soon as the number of processes is."""
        pipeline = self.num_processes if self.pipeline_parallel_size == "auto" else self.pipeline_parallel_size
        return ParallelLayout(
            world=self.world_size,
            pipeline=pipeline,
            expert=self.expert_parallel_size,
            per_node=self.num_processes or None,
        )

    @property
    @override
    def groups(self) -> Groups:
        assert self._groups is not None, "process groups exist after setup_environment"
        return self._groups

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def world_size(self) -> int:
        return self.num_nodes * self.num_processes

    @property
    def is_distributed(self) -> bool:
        """Whether ranks read different data. Lightning injects a distributed sampler only then."""
        return self.layout.data > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.layout.data, "rank": self._data_rank}

    @property
    def _data_rank(self) -> int:
        """Which of the pipelines this rank belongs to."""
        return self.layout.data_rank(self.global_rank)

    # ---- launch -------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        join_run(self.global_rank)
        self._check()
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if self.world_size > 1 and not self.cluster_environment.creates_processes_externally:
            self._launcher = PipelineLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _check(self) -> None:
        check_run(
            self.schedule,
            self.layout,
            dispatcher=self.dispatcher,
            devices=self.parallel_devices or [],
            precision=str(self.precision_plugin.precision),
            recipe=self._recipe,
            syncs_batchnorm=getattr(self, "_layer_sync", None) is not None,
            started=dist.get_world_size() if _distributed_is_initialized() else None,
        )
        self._check_backend()

    def check_model(self, trainer: Trainer) -> None:
        if check_model(self._module, self.schedule, self.layout):
            self._look_at(self._module)
        check_callbacks(trainer, self.layout)

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utilities_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        _set_num_threads_if_needed(num_processes=self.num_processes)  # in every rank: they share the cores
        self._check()  # again: another Trainer may have started processes since this one was made
        self.set_world_ranks()
        assert self.cluster_environment is not None
        if self.world_size > 1 and not _distributed_is_initialized():
            device_id = self.root_device if self.root_device.type != "cpu" else None
            backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
            store = store_of_this_attempt(self.global_rank, self.world_size, self._timeout)
            _init_dist_connection(
                self.cluster_environment, backend, store=store, timeout=self._timeout, device_id=device_id
            )
        if self.world_size > 1:
            wait_for_threads_at_exit()
        if self.num_nodes > 1 and self._roll_call is None:
            self._roll_call = RollCall.arrange(self.global_rank, self.world_size)
        # as in one process: what is random from here on follows from what rank 0 has drawn so far
        _set_rng_states(self.broadcast(_collect_rng_states(include_cuda=False)))
        if self._groups is None:
            self._groups = Groups.create(self.layout, self.global_rank, timeout=self._timeout, device=self.root_device)

    # ---- model --------------------------------------------------------------------------------

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """On the meta device if the model can initialise itself by name; it gets memory after it is cut."""
        by_name = any(isinstance(module, InitializesWeights) for module in self._module.modules())
        device = torch.device("meta") if by_name and self.world_size > 1 else self.root_device
        with device, self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        stop_between_batches(trainer)
        requeue_between_batches(trainer, self.groups.world_host)
        check_callbacks(trainer, self.layout)
        self._watch_for_hangs()
        if self.assembly is None or self.assembly.owner is not self.lightning_module:
            self.assembly = Assembly(
                self.lightning_module,
                self.layout,
                self.groups,
                rank=self.global_rank,
                schedule=self.schedule,
                num_microbatches=self.num_microbatches,
                order=launch_order(self.root_device) if self.overlap else None,
                dispatcher=self.dispatcher,
                dtype=dtype_of(str(self.precision_plugin.precision)),
                device=self.root_device,
                context=lambda: self.precision_plugin.forward_context(),
                look_at=self._look_at,
                convert=self.precision_plugin.convert_module,
                main_gradients=self.optimizer_precision == "32",
            )
        else:
            self.assembly.convert()  # the end of the last run has undone it
        self.model = self.lightning_module
        self.model_to_device()
        collect_over(self.lightning_module, self.groups.data)
        self.assembly.attach()
        self.barrier("assembled")
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            with optimizers_may_be_empty():
                self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        if self.world_size > 1:
            summarize_the_whole_model(trainer)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # ---- steps --------------------------------------------------------------------------------
    # The precision context is entered around each microbatch of a stage: backwards run inside the step, and
    # Transformer Engine forbids a second call of a module within one context.

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        clear_gradients_early(self._module.trainer, self._optimizers)
        return self._module.training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.predict_step(*args, **kwargs)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        assert self.assembly is not None
        self.assembly.sums.blocked = True
        try:
            yield
        finally:
            self.assembly.sums.blocked = False

    @property
    def num_microbatches_used(self) -> int | None:
        """Pieces of the last training batch; None before the first."""
        return None if self.assembly is None else self.assembly.num_microbatches_used

    def sum_over_replicas(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum each tensor, in place, over the ranks that hold the tensor of the LightningModule it is named after."""
        assert self.assembly is not None
        self.assembly.replicas.sum_tensors(tensors)

    def record_step(self) -> None:
        """Record the next run of the schedule, on all ranks."""
        assert self.assembly is not None
        self._recorder = start_recording(self.assembly.engine, self.root_device, self.barrier)

    def recorded_step(self) -> StepRecord | None:
        """On rank 0, what was recorded of every rank since ``record_step``, if the schedule has run. A collective."""
        recorder, self._recorder = self._recorder, None
        if self.assembly is None or recorder is None or (self._alone and self.world_size > 1):
            return None
        return stop_recording(self.assembly.engine, recorder, self.layout, self.groups)

    # ---- data ---------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        seeded = getattr(dataloader, "num_workers", 0) and getattr(dataloader, "worker_init_fn", 0) is None
        if seeded:  # workers of one data rank draw the same numbers wherever in the pipeline they are
            seed = partial(pl_worker_init_function, rank=self._data_rank)
            dataloader.worker_init_fn = seed  # type: ignore[attr-defined]
        if self.layout.expert > 1 or not self._module.trainer.predicting:  # pipelines meet in each other's batches
            check_lengths(dataloader, self.groups.data_host)
        group = self.groups.pipeline_host
        if group is not None:
            warn_of_stream(dataloader)
        return dataloader if group is None else PipelineReader.of(dataloader, group)

    # ---- the end ------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._stop_watching()
        exit_as_terminated(exception)
        if self._roll_call is not None:
            self._roll_call.report(exception)
        if self.world_size > 1:
            report_failure(exception, rank=self.global_rank)

    @override
    def teardown(self) -> None:
        self._stop_watching()
        if self.assembly is not None:
            self.assembly.detach()
        self._release_optimizers()
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self._teardown_precision_plugin()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self._finish_saving()
