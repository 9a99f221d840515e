"""Put together what one rank runs: its part of the model, the engine, and who else holds what.

find      the submodule that follows ``interface.PipelineModel``
cut       its layers into stages, ranks of equal cost; keep this rank's, replace the rest by placeholders
spread    experts over the ranks of the expert group
fill      memory and initial weights for what was built on the meta device
attach    the model's ``forward`` becomes the pipeline
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_dualpipe.checkpoint.store import CheckpointStore
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import InitializesWeights, Layer, PipelineModel, WeightGradients, as_layers
from lightning_dualpipe.parallel.choice import GroupsExperts, choose_dispatcher, node_hints
from lightning_dualpipe.parallel.dispatch import SpreadsExperts, TokenDispatcher
from lightning_dualpipe.parallel.early_sums import GradientSums
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.parallel.node_dispatch import NodeDispatcher
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.parallel.traffic import Traffic
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.forward import PipelinedForward
from lightning_dualpipe.pipeline.overlap import ORDERS, LaunchOrder
from lightning_dualpipe.pipeline.partition import Whole, keep_only, materialize, partition, uncut
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.streams import CommunicationStream
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.precision.linear import make_linears_deferrable
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.schedules import Schedule, build_schedule

__all__ = ["Assembly", "check_experts", "find_pipeline_model", "program_name"]


def find_pipeline_model(owner: nn.Module) -> tuple[nn.Module, PipelineModel]:
    """The outermost submodule of a LightningModule that a pipeline can cut, once as each of the two things it is.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    found: list[tuple[str, nn.Module, PipelineModel]] = []
    for name, module in owner.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _, _ in found)
        model: object = module
        if isinstance(model, PipelineModel) and not inside:
            found.append((name, module, model))
    if len(found) == 1:
        return found[0][1:]
    who = type(owner).__name__
    if not found:
        raise ConfigurationError(
            f"{who} has no model that a pipeline can cut: none of its submodules has the methods layers(), inputs(), "
            "boundary() and loss() of lightning_dualpipe.PipelineModel. docs/your_own_model.md shows them for a small "
            "GPT. If the model is built in configure_model or in setup, build it under the same attribute there"
        )
    raise ConfigurationError(
        f"{who} has {len(found)} models that a pipeline could cut ({', '.join(name for name, _, _ in found)}); "
        "one can be trained at a time: keep one, or wrap them in a single one"
    )


def program_name(schedule: str, layout: ParallelLayout) -> str:
    """The schedule that runs. A pipeline of one rank passes nothing on, and takes the plainest one; or, where tokens
    travel to experts, a V of two stages, whose pairs hide that.
    """
    if layout.pipeline > 1:
        return schedule
    return "dualpipev" if layout.expert > 1 and schedule.startswith("dualpipe") else "1f1b"


def check_experts(owner: nn.Module, layout: ParallelLayout) -> None:
    """Of the whole model: a rank may hold layers without experts.

    Raises:
        ConfigurationError: its experts cannot be spread over the expert ranks.
    """
    sizes = {module.num_experts for module in owner.modules() if isinstance(module, SpreadsExperts)}
    if layout.expert > 1 and not sizes:
        rank_zero_warn(
            f"expert_parallel_size={layout.expert} has no effect: {type(owner).__name__} has no experts to spread "
            "(no submodule follows lightning_dualpipe.parallel.dispatch.SpreadsExperts)"
        )
    for size in sizes:
        layout.check(num_experts=size)


@dataclass(frozen=True, slots=True)
class Part:
    """A model of which this rank keeps some stages, and what is known of the whole."""

    layers: Sequence[Layer]
    stages: Sequence[range]
    whole: Whole
    made_for: str

    @classmethod
    def cut(
        cls,
        owner: nn.Module,
        module: nn.Module,
        model: PipelineModel,
        placement: Schedule,
        *,
        rank: int,
        made_for: str,
    ) -> "Part":
        """Cut ``model`` in place. A second Trainer with the same layout finds what the first one cut."""
        before: Part | None = vars(module).get(_PART)
        if before is not None:
            if before.made_for == made_for:
                return before
            raise ConfigurationError(
                f"{type(owner).__name__} was cut by another Trainer for {before.made_for}, this one needs {made_for}; "
                "use the first Trainer again, or build the module anew and load its checkpoint"
            )
        layers = as_layers(model.layers())
        stages = partition(layers, placement.placement)
        part = cls(layers, stages, Whole.of(owner, layers, stages), made_for)
        kept = [layers[index] for stage in placement.stages_on(rank) for index in stages[stage]]
        keep_only(module, kept, layers)
        vars(module)[_PART] = part
        return part


_PART = "_pipeline_part"


class Assembly:
    """What this rank runs of ``owner``, the LightningModule.

    Args:
        order: who goes on when a forward and a backward run at once; None: layers wait for their own communication.
        dispatcher: the way of tokens to their experts, by its name in ``parallel.choice``.
        dtype: what layers compute in.
        convert: the precision plugin's conversion of modules.
        look_at: shows it the whole model first: what a rank holds says little of what it is a part of.
        context: what a forward of a stage runs in.
        main_gradients: whether parameters in half precision have float32 gradients.
    """

    def __init__(
        self,
        owner: nn.Module,
        layout: ParallelLayout,
        groups: Groups,
        *,
        rank: int,
        schedule: str,
        num_microbatches: int | Literal["auto"],
        order: LaunchOrder | None,
        device: torch.device,
        context: Callable[[], AbstractContextManager[object]],
        convert: Callable[[nn.Module], nn.Module],
        main_gradients: bool,
        look_at: Callable[[nn.Module], None] = lambda _: None,
        dispatcher: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.owner = owner
        self._module, self.model = find_pipeline_model(owner)
        self._layout, self._groups = layout, groups
        self._rank, self._pipeline_rank = rank, layout.pipeline_rank(rank)
        schedule_of = partial(build_schedule, program_name(schedule, layout), layout.pipeline)
        self._placement = schedule_of(2 * layout.pipeline)
        if _PART not in vars(self._module):
            check_experts(owner, layout)
        made_for = _described(program_name(schedule, layout), layout)
        routers = [module for module in owner.modules() if isinstance(module, GroupsExperts)]  # of all layers
        self.part = Part.cut(
            owner, self._module, self.model, self._placement, rank=self._pipeline_rank, made_for=made_for
        )
        self._dispatchers: list[TokenDispatcher] = []
        self._spread_experts(dispatcher, routers, device, dtype)
        filled = self._fill(device)
        self._look_at, self._convert = look_at, convert
        self.convert()
        owner.to(device)
        self.rows = self._rows()
        holders = {first: self._holders(first) for first in self._local_tensors()}
        self.replicas = ReplicaGroups(holders, rank=rank, timeout=groups.timeout)
        # what was not filled by name is what this process's random state, a file or the user has made of it
        self.replicas.broadcast({name: t for name, t in self._local_tensors().items() if name not in filled})
        self.store = CheckpointStore(
            whole=self.part.whole.tensors,
            same_as=self.part.whole.same_as,
            rows=self.rows,
            owned=frozenset(first for first, ranks in holders.items() if ranks[0] == rank),
            group=groups.world_host,
        )
        here = self._placement.stages_on(self._pipeline_rank)
        self.sums = GradientSums(self.replicas, self.named_parameters, self.part.whole.stages_of, here)
        self._stream = CommunicationStream(device)
        self._stages = self._build_stages(context, overlap=order is not None)
        self._forward = self._pipelined(device, num_microbatches, schedule_of, order or ORDERS["eager"])
        self._main_gradients = main_gradients
        self._undo: list[Callable[[], None]] = []

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the first name they have in the whole model."""
        same_as = self.part.whole.same_as
        return {same_as[name]: parameter for name, parameter in self.owner.named_parameters()}

    def uncut(self) -> AbstractContextManager[dict[int, str]]:
        """Within, the model has all its modules; yields names by id of what stands for the parameters elsewhere."""
        return uncut(self.owner, self.part.whole.same_as)

    @property
    def engine(self) -> Engine:
        return self._forward.engine

    @property
    def peak_held(self) -> int:
        """Most microbatches whose activations this rank held at once, in the last training step."""
        return self.engine.peak_held

    @property
    def num_microbatches_used(self) -> int | None:
        """Pieces of the last training batch; None before the first."""
        return self._forward.num_microbatches_used

    @property
    def expert_traffic(self) -> Traffic:
        """What all dispatches of this rank have sent; counted by ``dispatcher="node"`` alone."""
        counted = (each.traffic for each in self._dispatchers if isinstance(each, NodeDispatcher))
        return sum(counted, Traffic())

    def convert(self) -> None:
        """By the precision plugin. A second time changes nothing, unless what the first one did has been undone."""
        with self.uncut():
            self._look_at(self.owner)
        self._convert(self.owner)

    def attach(self) -> None:
        """From now on, calling the model runs the pipeline."""
        self.detach()
        for stage in self._stages.values():
            for module in {module for layer in stage.layers for module in layer.modules}:
                self._undo.append(make_linears_deferrable(module, stage.weight_gradients))
        if self._main_gradients:
            self._undo.append(keep_main_gradients(self.named_parameters().values()))
        vars(self._module)["forward"] = self._forward

    def detach(self) -> None:
        """The model as it was, less what other ranks hold."""
        vars(self._module).pop("forward", None)
        while self._undo:
            self._undo.pop()()

    # ---- steps of the constructor -------------------------------------------------------------

    def _spread_experts(
        self, dispatcher: str, routers: Sequence[GroupsExperts], device: torch.device, dtype: torch.dtype
    ) -> None:
        if self._layout.expert == 1:
            return
        chosen = choose_dispatcher(dispatcher, self._layout, device=device, dtype=dtype)
        if routers:
            rank_zero_info(str(chosen))
        for hint in node_hints(routers, self._layout):
            rank_zero_warn(hint)
        build = chosen.build(self._groups)
        for module in self.owner.modules():
            if isinstance(module, SpreadsExperts):
                self._dispatchers.append(build(module.num_experts))
                module.use_dispatcher(self._dispatchers[-1])

    def _fill(self, device: torch.device) -> set[str]:
        """Names of the tensors that had no memory, and whose values follow from their names now."""
        without_memory = {name for name, tensor in self._local_tensors().items() if tensor.is_meta}
        if not materialize(self.owner, device):
            return set()
        source = _initializes_itself(self.owner)
        if source is None:
            raise ConfigurationError(
                f"{type(self.owner).__name__} is on the meta device, but has no initialize_weights() to fill it; "
                "add one that depends on parameter names only, or build the model on a real device"
            )
        source.initialize_weights()
        return without_memory

    def _build_stages(
        self, context: Callable[[], AbstractContextManager[object]], *, overlap: bool
    ) -> dict[int, Stage]:
        layers, num_stages = self.part.layers, self._placement.num_stages
        return {
            index: Stage(
                index,
                num_stages,
                self.model,
                [layers[position] for position in self.part.stages[index]],
                WeightGradients(),
                context,
                overlap,
                self._stream,
            )
            for index in self._placement.stages_on(self._pipeline_rank)
        }

    def _pipelined(
        self,
        device: torch.device,
        num_microbatches: int | Literal["auto"],
        schedule_of: Callable[[int], Schedule],
        order: LaunchOrder,
    ) -> PipelinedForward:
        groups = self._groups
        engine = Engine(
            self.model,
            schedule_of,
            rank=self._pipeline_rank,
            stages=self._stages,
            transport=Transport(groups.pipeline, device, self._stream),
            dtype=self._dtype(),
            order=order,
        )
        return PipelinedForward(
            engine,
            self.named_parameters,
            self.sums,
            num_ranks=max(self._layout.pipeline, len(self._stages)),
            num_microbatches=num_microbatches,
            device=device,
            pipeline=groups.pipeline_broadcast,
            data=groups.data_host if self._layout.expert > 1 else None,
            world=groups.world,
        )

    def _dtype(self) -> torch.dtype:
        """What crosses a boundary if the model does not say: the widest format among all ranks' parameters."""
        mine = {parameter.dtype for parameter in self.named_parameters().values() if parameter.is_floating_point()}
        found: list[set[torch.dtype]] = [mine]
        if self._groups.world_host is not None:
            found = [set() for _ in range(self._layout.world)]
            dist.all_gather_object(found, mine, group=self._groups.world_host)
        return reduce(torch.promote_types, set.union(*found)) if any(found) else torch.get_default_dtype()

    # ---- who holds what -----------------------------------------------------------------------

    def _local_tensors(self) -> dict[str, Tensor]:
        same_as = self.part.whole.same_as
        state = self.owner.state_dict(keep_vars=True)
        return {same_as[name]: tensor for name, tensor in state.items() if name in same_as}

    def _rows(self) -> dict[str, range]:
        """Of the tensors that are spread by rows over the expert ranks, the rows that are here."""
        expert_rank = self._layout.expert_rank(self._rank)
        found = {}
        for first, tensor in self._local_tensors().items():
            if tuple(tensor.shape) != self.part.whole.tensors[first].shape:
                found[first] = range(expert_rank * len(tensor), (expert_rank + 1) * len(tensor))
        return found

    def _holders(self, first: str) -> tuple[int, ...]:
        """Global ranks that hold this very tensor, or these very rows of it, in order."""
        layout = self._layout
        pipeline_ranks = {r for stage in self.part.whole.stages_of[first] for r in self._placement.replicas_of(stage)}
        ranks = (layout.rank(pipeline=p, data=d) for p in pipeline_ranks for d in range(layout.data))
        mine = self._layout.expert_rank(self._rank)
        return tuple(sorted(r for r in ranks if first not in self.rows or layout.expert_rank(r) == mine))


def _described(schedule: str, layout: ParallelLayout) -> str:
    """What decides which part of a model a rank keeps, in the user's words."""
    sizes = f"pipeline_parallel_size={layout.pipeline}, expert_parallel_size={layout.expert}"
    return f"schedule={schedule!r}, {sizes}" if layout.pipeline > 1 or layout.expert > 1 else sizes


def _initializes_itself(owner: nn.Module) -> InitializesWeights | None:
    return next((module for module in owner.modules() if isinstance(module, InitializesWeights)), None)
