"""Plain modules as users write them; none of them knows of sub-networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet._torchvision import torchvision


class BiLSTM(nn.Module):
    """Embedding, two LSTM layers both ways, final states side by side, two FC layers."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=batch_first, bidirectional=True)
        self.fc1 = nn.Linear(10, 7)
        self.fc2 = nn.Linear(7, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        e = self.embedding(x)
        outputs, (final, _) = self.lstm(e if self.batch_first else e.transpose(0, 1))
        both = torch.cat([final[-2], final[-1]], dim=1)
        return self.fc2(F.relu(self.fc1(both + outputs.mean(1 if self.batch_first else 0))))


class GRUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3, padding=1)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.gru(F.gelu(self.conv(x)).permute(0, 2, 1))
        return self.fc(outputs[:, -1])


class Concats(nn.Module):
    """Branches side by side, a dense connection, and a flatten of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 5, 1)
        self.b = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.mix = nn.Conv2d(12, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear((12 + 8) * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.bn(torch.cat([x, self.a(x), self.b(x)], 1))
        x = self.pool(torch.cat([x, self.mix(x)], 1))
        return self.fc(x.view(x.size(0), -1))


class Separable(nn.Module):
    """Depthwise convolutions, one with two filters a channel; a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 4, 1)
        self.twice = nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)
        self.squeeze = nn.Linear(8, 3)
        self.excite = nn.Linear(3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)))
        x = self.twice(F.relu(self.point(self.depthwise(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * gate[:, :, None, None]
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class GroupNormed(nn.Module):
    """GroupNorm of one group and of one channel a group, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(1, 6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 3, padding=1), nn.GroupNorm(4, 4)
        self.conv3, self.norm3 = nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(1, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.norm3(self.conv3(F.relu(self.norm2(self.conv2(x)))))
        return self.fc(F.relu(x).mean([-2, -1]))


class LayerNormed(nn.Module):
    """Tokens through LayerNorm and an MLP with a skip, and a learnt scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.amax(dim=1))


class Padded(nn.Module):
    """A residual block whose shortcut is pooled and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        short = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 2, 2))
        return self.fc((short + self.conv2(self.conv1(x).relu())).amax((2, 3)))


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def mobilenet_v2() -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=5)


Example = tuple[Callable[[], nn.Module], Tensor]

EXAMPLES: dict[str, Example] = {
    "bilstm": (BiLSTM, torch.zeros(1, 4, dtype=torch.int64)),
    "gru": (GRUNet, torch.zeros(1, 2, 6)),
    "concats": (Concats, torch.zeros(1, 2, 6, 6)),
    "separable": (Separable, torch.zeros(1, 1, 9, 9)),
    "group_norm": (GroupNormed, torch.zeros(1, 2, 5, 5)),
    "layer_norm": (LayerNormed, torch.zeros(1, 4, dtype=torch.int64)),
    "padded": (Padded, torch.zeros(1, 1, 6, 6)),
    "resnet18": (resnet18, torch.zeros(1, 3, 32, 32)),
    "mobilenet_v2": (mobilenet_v2, torch.zeros(1, 3, 32, 32)),
}
