"""Small networks in torch, their modules named as in torchvision: what converted weights must give.

Written from the papers and from the names and shapes that torchvision's weights have. Importing
this needs torch.
"""

import torch
from torch import nn
from torch.nn import functional as F


def randomise(module, seed=0):
    """No value at its default, so that each one matters; torch's scale of kernels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("num_batches_tracked"):
                continue
            if value.ndim > 1 and not name.endswith("layer_scale"):
                fan_in = value[0].numel()
                value.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0, 0.3, generator=generator)
    return module.eval()


def conv_norm_relu6(c_in, c_out, size, stride=1, groups=1):
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c = width
        for i in range(4):
            c_out = width * 2**i
            stride = 1 if i == 0 else 2
            blocks = [BasicBlock(c, c_out, stride), BasicBlock(c_out, c_out, 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c = c_out
        self.fc = nn.Linear(c, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        c = c_in * expansion
        layers = [conv_norm_relu6(c_in, c, 1)] if expansion > 1 else []
        layers += [
            conv_norm_relu6(c, c, 3, stride, groups=c),
            nn.Conv2d(c, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    # Table 2 of the paper: expansion, channels, blocks, stride.
    TABLE = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes, width):
        super().__init__()
        layers = [conv_norm_relu6(3, width, 3, 2)]
        c = width
        for t, channels, n, s in self.TABLE:
            for i in range(n):
                c_out = channels * width // 32
                layers.append(InvertedResidual(c, c_out, s if i == 0 else 1, t))
                c = c_out
        layers.append(conv_norm_relu6(c, 40 * width, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(40 * width, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, num_classes, width, sizes, *, norm):
        super().__init__()
        layers, c = [], 3
        for i, size in enumerate(sizes):
            for _ in range(size):
                c_out = width * min(2**i, 8)
                layers.append(nn.Conv2d(c, c_out, 3, padding=1))
                layers += [nn.BatchNorm2d(c_out)] if norm else []
                layers.append(nn.ReLU())
                c = c_out
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(c * 49, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 7)
        return self.classifier(torch.flatten(x, 1))


class DenseLayer(nn.Module):
    def __init__(self, c, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c)
        self.conv1 = nn.Conv2d(c, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    def __init__(self, num_classes, width, sizes):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, width, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(width))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        c, growth = width, width // 2
        for i, size in enumerate(sizes, start=1):
            block = nn.Sequential()
            for j in range(1, size + 1):
                block.add_module(f"denselayer{j}", DenseLayer(c, growth))
                c += growth
            self.features.add_module(f"denseblock{i}", block)
            if i < len(sizes):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(c))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", nn.Conv2d(c, c // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{i}", transition)
                c //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(c))
        self.classifier = nn.Linear(c, num_classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    def __init__(self, c):
        super().__init__(c, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class ConvNeXtBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(c, c, 7, padding=3, groups=c),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(c, eps=1e-6),
            nn.Linear(c, 4 * c),
            nn.GELU(),
            nn.Linear(4 * c, c),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    def __init__(self, num_classes, width, sizes):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, width, 4, 4), ChannelNorm(width))]
        for i, size in enumerate(sizes):
            c = width * 2**i
            if i:
                layers.append(nn.Sequential(ChannelNorm(c // 2), nn.Conv2d(c // 2, c, 2, 2)))
            layers.append(nn.Sequential(*(ConvNeXtBlock(c) for _ in range(size))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(c), nn.Flatten(1), nn.Linear(c, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))
