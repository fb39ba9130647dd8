"""L2 normalisation over channels with a learned scale (ParseNet, arXiv 1506.04579)."""

import torch
from torch import Tensor, nn


class L2Norm(nn.Module):
    """x / (||x||_2 over channels + eps) x weight: [B, C, H, W] -> [B, C, H, W].

    SSD applies it to the first source map, whose features are larger than those of the others.
    """

    def __init__(self, channels: int, scale: float = 20.0, eps: float = 1e-10) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype) + self.eps
        return (x / norm * self.weight[:, None, None]).to(x.dtype)
