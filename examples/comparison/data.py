"""Data sets as tensors in memory, split into training, validation and test parts.

The test part is what the data set's authors call so. The validation part is cut off the training part, by a
permutation that never changes, and is what every choice is made on.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Part = tuple[Tensor, Tensor]
FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


# Of the data sets that everybody has the same of.
CHECKSUMS = {"digits": "44471cf4", "fashion-mnist": "4c94a3b3", "cifar10": "3287a115"}


def checksum_of(tensors: Iterable[Tensor], code: bytes = b"") -> str:
    checksum = zlib.crc32(code)
    for tensor in tensors:
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    return f"{checksum:08x}"


class Tensors:
    """Examples of any shape and their labels, as they are; ``code`` is what else decides over the runs on them."""

    def __init__(self, parts: dict[str, Part], classes: int, code: bytes = b"") -> None:
        self.parts, self.classes = parts, classes
        self.checksum = checksum_of((tensor for part in parts.values() for tensor in part), code)
        self.example_shape = tuple(parts["train"][0].shape[1:])

    def to(self, device: torch.device) -> Tensors:
        self.parts = {name: (x.to(device), y.to(device)) for name, (x, y) in self.parts.items()}
        return self

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(y) for name, (_, y) in self.parts.items()}

    def example(self) -> Tensor:
        """One example, as the model gets it."""
        return self._scale(self.parts["train"][0][:1])

    def batches(self, size: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """Whole batches without end, from a new order in each epoch; of each batch every rank takes its share."""
        x, y = self.parts["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for chosen in order[: max(size, len(order) // size * size)].split(size):
                yield x[chosen[rank::ranks]], y[chosen[rank::ranks]]

    def evaluation_batches(self, part: str) -> Iterator[Part]:
        x, y = self.parts[part]
        for examples, labels in zip(x.split(1000), y.split(1000), strict=True):
            yield self._scale(examples), labels

    def _scale(self, examples: Tensor) -> Tensor:
        return examples


class Images(Tensors):
    """Images as bytes of shape (examples, channels, height, width), with labels; scaled when a batch is taken."""

    def __init__(self, train: Part, test: Part, *, validation: int, augment: bool = False) -> None:
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
        chosen = {"validation": order[:validation], "train": order[validation:]}
        parts = {name: (train[0][which], train[1][which]) for name, which in chosen.items()} | {"test": test}
        super().__init__(parts, int(train[1].max()) + 1)
        self.augment = augment
        self._look_at_pixels()

    def _look_at_pixels(self) -> None:
        pixels = self.parts["train"][0].float()
        self.mean, self.std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        self.example_shape = tuple(pixels.shape[1:])

    def averaged(self, size: int) -> Images:
        """The same with size × size pixels, each the mean of those it stands for: for computers without a GPU."""
        for name, (x, y) in self.parts.items():
            smaller = [F.adaptive_avg_pool2d(images.float(), size).round_().byte() for images in x.split(1000)]
            self.parts[name] = torch.cat(smaller), y
        self._look_at_pixels()
        return self

    def to(self, device: torch.device) -> Images:
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        super().to(device)
        return self

    @property
    def border(self) -> int:
        """Pixels of padding before a crop: 4 for CIFAR's 32 × 32."""
        return self.example_shape[-1] // 8

    def batches(self, size: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """Batches without end, from a new order in each epoch; of each batch every rank takes its share."""
        x, y = self.parts["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            drawn = [
                (
                    chosen,
                    torch.randint(2 * self.border + 1, (len(chosen), 2), generator=generator),
                    torch.rand(len(chosen), generator=generator) < 0.5,
                )
                for chosen in order[: max(size, len(order) // size * size)].split(size)  # whole batches only
            ]
            # An epoch's go to the device at once: the host waits for every copy.
            mine = [torch.stack(part)[:, rank::ranks].to(x.device) for part in zip(*drawn, strict=True)]
            for which, offsets, flips in zip(*mine, strict=True):
                images = self._scale(x[which])
                if self.augment:
                    images = crop_and_flip(images, self.border, offsets, flips)
                yield images, y[which]

    def _scale(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)


def crop_and_flip(images: Tensor, border: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """The usual augmentation of CIFAR: a crop of the image padded on each side, mirrored half of the time."""
    count, _, height, width = images.shape
    padded = F.pad(images, (border,) * 4)
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
    columns = offsets[:, 1, None] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    examples = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[examples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Text:
    """A text, character by character: windows of it, and for every character the one that follows."""

    window = 64

    def __init__(self, text: str) -> None:
        letters = {letter: code for code, letter in enumerate(sorted(set(text)))}
        codes = torch.tensor([letters[letter] for letter in text])
        ends = [round(0.8 * len(codes)), round(0.9 * len(codes))]
        pieces = codes.tensor_split(ends)
        if min(len(piece) for piece in pieces) <= self.window:
            raise ValueError(f"a text of {len(text)} characters is too short; at least {12 * self.window} are needed")
        self.pieces = dict(zip(("train", "validation", "test"), pieces, strict=True))
        self.checksum = checksum_of([codes, torch.tensor(list(map(ord, letters)))])
        self.classes = len(letters)
        self.example_shape = (self.window,)

    def to(self, device: torch.device) -> Text:
        self.pieces = {name: piece.to(device) for name, piece in self.pieces.items()}
        return self

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(piece) for name, piece in self.pieces.items()}

    def example(self) -> Tensor:
        return self.pieces["train"][None, : self.window]

    def batches(self, size: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        piece = self.pieces["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(piece) - self.window, (size,), generator=generator)[rank::ranks]
            windows = starts[:, None].to(piece.device) + torch.arange(self.window + 1, device=piece.device)
            yield piece[windows[:, :-1]], piece[windows[:, 1:]]

    def evaluation_batches(self, part: str) -> Iterator[Part]:
        piece = self.pieces[part]
        length = (len(piece) - 1) // self.window * self.window
        inputs, following = piece[:length].view(-1, self.window), piece[1 : length + 1].view(-1, self.window)
        yield from zip(inputs.split(200), following.split(200), strict=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: Tensors | Text, part: str) -> float:
    """Percentage of labels, or of following characters, that the model gets right."""
    was_training = model.training
    model.eval()
    right = total = 0
    for x, y in data.evaluation_batches(part):
        right += int((model(x).argmax(-1) == y).sum())
        total += y.numel()
    model.train(was_training)
    return 100 * right / total


def digits(_folder: Path | None) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.uint8)[:, None]
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x, y = x[order], y[order]
    return Images((x[:1347], y[:1347]), (x[1347:], y[1347:]), validation=270)


def fashion_mnist(folder: Path | None) -> Images:
    """The idx files, plain or gzipped, as its authors and Debian's package dataset-fashion-mnist ship them."""
    tried = [folder] if folder else [Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist")]
    for candidate in tried:
        paths = {name: [find(candidate, file, (".gz", "")) for file in files] for name, files in FASHION_FILES.items()}
        if all(path for pair in paths.values() for path in pair):
            parts = {name: (read_idx(pair[0])[:, None], read_idx(pair[1]).long()) for name, pair in paths.items()}
            return Images(parts["train"], parts["test"], validation=5000)
    raise FileNotFoundError(
        f"no {FASHION_FILES['train'][0]}.gz and its three companions in {' or '.join(map(str, tried))}. On Debian and "
        "Ubuntu: apt-get install dataset-fashion-mnist; else get them from github.com/zalandoresearch/fashion-mnist "
        "and give their folder as --data-dir"
    )


def find(folder: Path, name: str, endings: tuple[str, ...]) -> Path | None:
    return next((folder / f"{name}{ending}" for ending in endings if (folder / f"{name}{ending}").is_file()), None)


def read_idx(path: Path) -> Tensor:
    """A tensor of bytes in the idx format: two zeros, the type (8 = byte), the number of dimensions, their sizes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    dims = content[3]
    shape = np.frombuffer(content, ">u4", dims, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def cifar10(folder: Path | None) -> Images:
    """The binary version (cifar-10-batches-bin), or torchvision's where that is installed."""
    root = folder or Path("data")
    batches = next(
        (path for path in (root / "cifar-10-batches-bin", root) if (path / "test_batch.bin").is_file()), None
    )
    if batches:
        train = [read_cifar(batches / f"data_batch_{number}.bin") for number in range(1, 6)]
        x, y = (torch.cat(tensors) for tensors in zip(*train, strict=True))
        return Images((x, y), read_cifar(batches / "test_batch.bin"), validation=5000, augment=True)
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise FileNotFoundError(
            f"no cifar-10-batches-bin in {root}: get the binary version from www.cs.toronto.edu/~kriz/cifar.html and "
            "give the folder that holds it as --data-dir, or install torchvision, which downloads its own"
        ) from error
    parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts)
    return Images(train, test, validation=5000, augment=True)


def read_cifar(path: Path) -> Part:
    records = torch.from_numpy(np.fromfile(path, np.uint8).reshape(-1, 3073))
    return records[:, 1:].reshape(-1, 3, 32, 32).clone(), records[:, 0].long()


def text(path: Path | None) -> Text:
    if path is None or not path.is_file():
        raise FileNotFoundError(f"--data text needs a text file as --data-dir, got {path}")
    return Text(path.read_text(encoding="utf-8"))


DATA: dict[str, Callable[[Path | None], Tensors | Text]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "text": text,
}


def contents(name: str, data: Tensors | Text) -> str:
    """What tells data of one name apart: a checksum, and nothing for what everybody has the same of."""
    return "" if data.checksum == CHECKSUMS.get(name) else data.checksum
