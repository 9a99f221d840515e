"""What both modules share: weights in FP8 that are kept or made, products, and where their gradients go."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dualpipe.precision.reference import Quantised, multiply, quantise
from transformer_engine.common.recipe import DelayedScaling, MXFP8BlockScaling
from transformer_engine.pytorch.module._common import WeightGradStore
from transformer_engine.pytorch.quantization import IN_FORCE, operands


class TransformerEngineBaseModule(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, int]], dtype: Any, device: Any, *, fuse: bool, delay: bool) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = fuse
        self.wgrad_store = WeightGradStore(delay)
        self._fp8_workspaces: dict[str, Any] = {}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
            getattr(self, name).skip_backward_post_hook = delay
        self.weight_names = list(shapes)

    def backward_dw(self) -> None:
        if not self.wgrad_store.delay_wgrad_compute():
            return
        gradients, _ = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            for name, gradient in zip(self.weight_names, gradients, strict=True):
                getattr(self, name).grad = gradient  # the gradient of the microbatches before is lost

    def multiply(self, inp: Tensor, splits: list[int], is_first_microbatch: bool | None) -> Tensor:
        device = getattr(self, next(iter(self.named_parameters()))[0]).device  # needs a registered parameter (2.8)
        assert device.type != "meta" and device == inp.device, f"weights on {device}, input on {inp.device}"
        if not torch.is_autocast_enabled(inp.device.type):
            for name, parameter in self.named_parameters():
                if parameter.dtype != inp.dtype:
                    raise TypeError(f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")
        weights = [getattr(self, name) for name in self.weight_names]
        if IN_FORCE[-1] is None:
            raise RuntimeError("outside of autocast: this would be computed in high precision, silently")
        delays = self.wgrad_store.delay_wgrad_compute()
        arguments = (inp, splits, is_first_microbatch, self, IN_FORCE[-1], delays, *weights)
        return _Products.apply(*arguments) if torch.is_grad_enabled() else _Products.forward(None, *arguments)

    def quantised(self, name: str, weight: Tensor, recipe: Any, first: bool | None, *, columns: bool) -> Any:
        """W to be summed over its columns and, with ``columns``, W^T; what is kept is taken as it is."""
        if first is False and name in self._fp8_workspaces:
            return self._fp8_workspaces[name]
        how = operands(recipe)[1]
        rows = quantise(weight.detach(), how)
        turned = rows.mT if how.tile == (128, 128) else quantise(weight.detach().mT, how)
        made = rows, turned if columns else None
        if first is not None:
            self._fp8_workspaces[name] = made
        return made


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, splits, first, module, recipe, delays, *weights):
        activation, _, gradient = operands(recipe)
        multiple = 32 if isinstance(recipe, MXFP8BlockScaling) else 16
        assert inp.shape[0] % 8 == 0 and inp.shape[1] % 16 == 0, f"FP8 execution requires other sizes: {inp.shape}"
        assert sum(splits) == len(inp) > 0, f"{splits} of {len(inp)} rows"
        assert not (isinstance(recipe, DelayedScaling) and first is False), "the history would miss this"
        columns = torch.is_grad_enabled() if ctx is None else inp.requires_grad
        names = module.weight_names
        kept = [
            module.quantised(name, w, recipe, first, columns=columns) for name, w in zip(names, weights, strict=True)
        ]
        rows = [quantise(part, activation) for part in inp.split(splits)]
        y = torch.cat([multiply(part, row, inp.dtype) for part, (row, _) in zip(rows, kept, strict=True)])
        if ctx is not None:
            # the input makes a recomputation run; the weight must not have been kept by a forward in inference mode
            ctx.save_for_backward(inp, *(row.values_MK for row, _ in kept))
            ctx.main_grads = [weakref.ref(weight) for weight in weights]
            ctx.kept, ctx.splits, ctx.store, ctx.multiple = kept, splits, module.wgrad_store, multiple
            ctx.fuse, ctx.delays, ctx.how = module.fuse_wgrad_accumulation, delays, (activation, gradient)
            ctx.accumulate = module.fuse_wgrad_accumulation and not first
            ctx.wants = inp.requires_grad, weights[0].requires_grad
        return y

    @staticmethod
    def backward(ctx, grad):
        inp, *weights = ctx.saved_tensors  # as many as there are weights
        activation, gradient = ctx.how
        main_grads: list[Any] = [None] * len(weights)
        if ctx.fuse and ctx.wants[1]:
            origins = [reference() for reference in ctx.main_grads]
            assert all(each is not None for each in origins), "weight was removed while fuse_wgrad_accumulation=True"
            main_grads = [each.main_grad for each in origins]
        parts = grad.split(ctx.splits)
        dgrad = None
        if ctx.wants[0]:
            assert all(columns is not None for _, columns in ctx.kept), "the kept weight has no columnwise data"
            pairs = zip(parts, ctx.kept, strict=True)
            dgrad = torch.cat([multiply(quantise(part, gradient), columns, grad.dtype) for part, (_, columns) in pairs])

        def compute(x: Any, dy: Any, *_: Any) -> list[Any]:
            return [
                _wgrad(a, g, main, grad.dtype, accumulate=ctx.accumulate)
                for a, g, main in zip(x, dy, main_grads, strict=True)
            ]

        made: list[Any] = [None] * len(weights)
        if ctx.wants[1]:
            assert all(split % ctx.multiple == 0 for split in ctx.splits), f"{ctx.splits} tokens are summed over"
            x = [quantise(part.mT, activation) for part in inp.split(ctx.splits)]
            dy = [quantise(part.mT, gradient) for part in parts]
            if ctx.delays and ctx.store.delay_wgrad_compute():
                ctx.store.put([x, dy, main_grads], compute)
            else:
                made = compute(x, dy)
        return dgrad, None, None, None, None, None, *([None] * len(weights) if ctx.fuse else made)


def _wgrad(x: Quantised, dy: Quantised, main: Any, dtype: Any, *, accumulate: bool) -> Any:
    if main is None:
        return multiply(dy, x, dtype)
    product = multiply(dy, x, main.dtype)  # zeros, of no tokens
    return main.add_(product) if accumulate else main.copy_(product)
