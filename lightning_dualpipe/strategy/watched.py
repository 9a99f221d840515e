"""A pipeline that is watched while a Trainer runs: it is ended when nothing moves, by option."""

from lightning_dualpipe.strategy.places import PipelinePlaces
from lightning_dualpipe.strategy.watchdog import Watchdog

__all__ = ["WatchedPipeline"]


class WatchedPipeline(PipelinePlaces):
    hang_timeout: float | None = None
    _watchdog: Watchdog | None = None

    def _watch_for_hangs(self) -> None:
        if self.hang_timeout is not None and self.world_size > 1 and self._watchdog is None:
            self._watchdog = Watchdog(
                self.hang_timeout, rank=self.global_rank, world=self.world_size, device=self.root_device
            )
            self._watchdog.start(self.groups.world_host)

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
