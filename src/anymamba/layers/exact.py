from torch import Tensor, bfloat16, float16, nn


class ExactParameters(nn.Module):
    """A module whose own parameters stay in float32: model.bfloat16() must not round A, D and step sizes, for errors in
    A compound over the whole text."""

    def _exact(self) -> list[Tensor]:
        return list(self.parameters(recurse=False))

    def _apply(self, fn, recurse=True):
        keep = {id(v) for v in self._exact()}

        def convert(v):
            out = fn(v)
            lowered = id(v) in keep and out.dtype in (bfloat16, float16)
            return v.to(out.device) if lowered else out

        return super()._apply(convert, recurse)
