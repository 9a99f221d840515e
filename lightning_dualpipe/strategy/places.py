"""Where in the pipeline a parameter or a microbatch is: what guards ask when something has gone wrong."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_dualpipe.strategy.precision import PipelinePrecision

__all__ = ["PipelinePlaces"]


class PipelinePlaces(PipelinePrecision):
    """Follows ``interface.KnowsPlaces``."""

    def stages_of(self, parameter: str) -> Sequence[int]:
        """The stages that use the parameter of this name in the LightningModule."""
        assert self.assembly is not None
        whole = self.assembly.part.whole
        return whole.stages_of[whole.same_as[parameter]]

    def microbatch_losses(self) -> Mapping[int, Tensor]:
        """By microbatch of the last training batch the sum of its losses, where this rank has computed it."""
        return {} if self.assembly is None else dict(self.assembly.engine.losses)
