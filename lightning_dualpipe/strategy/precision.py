"""A precision plugin on ranks that hold parts of a model: what it asks of the model, it asks of the whole."""

from functools import partial

from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.parallel.grad_norm import clip_, gradient_norm
from lightning_dualpipe.plugins.fp8_precision import FP8Precision
from lightning_dualpipe.precision.recipe import Recipe
from lightning_dualpipe.strategy.checkpoints import PipelineCheckpoints

__all__ = ["PipelinePrecision"]


class PipelinePrecision(PipelineCheckpoints):
    @override
    def setup_precision_plugin(self) -> None:
        """Clipping by norm goes through the plugin, which sees this rank's parameters only: give it the whole norm.

        For this run: a plugin may serve other Trainers.
        """
        super().setup_precision_plugin()
        plugin = self.precision_plugin
        plugin.clip_grad_by_norm = partial(self._clip_by_norm, plugin)  # type: ignore[method-assign]

    def _teardown_precision_plugin(self) -> None:
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        self.precision_plugin.teardown()

    def gradient_norm(self, norm_type: float = 2.0) -> Tensor:
        """Norm of the gradients of the whole model, each parameter counted once; the same on every rank."""
        assert self.assembly is not None
        named, replicas = self.assembly.named_parameters(), self.assembly.replicas
        return gradient_norm(named, replicas, group=self.groups.world, norm_type=norm_type)

    def _clip_by_norm(self, plugin: Precision, optimizer: Optimizer, clip_val: float) -> None:
        assert self.assembly is not None
        wanted = {id(parameter) for parameter in plugin.main_params(optimizer)}
        named = {name: p for name, p in self.assembly.named_parameters().items() if id(p) in wanted}
        clip_(named, clip_val, self.assembly.replicas, group=self.groups.world)

    # ---- FP8 ----------------------------------------------------------------------------------

    @property
    def _recipe(self) -> Recipe | None:
        plugin = self.precision_plugin
        return plugin.recipe if isinstance(plugin, FP8Precision) else None

    def _check_backend(self) -> None:
        """Raise now what would be raised at setup, by every rank."""
        if isinstance(self.precision_plugin, FP8Precision) and self.parallel_devices:
            self.precision_plugin.choose(self.parallel_devices[0])

    def _look_at(self, whole: nn.Module) -> None:
        if isinstance(self.precision_plugin, FP8Precision):
            self.precision_plugin.look_at(whole)
