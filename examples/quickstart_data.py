"""The quickstart's data: scikit-learn's digits, or a file of the user's own."""

from __future__ import annotations

import csv
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_data(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """X of shape (examples, features) and y of shape (examples,): the digits, or what the user's file holds."""
    if path is None:
        return load_digits(return_X_y=True)
    if not path.is_file() or path.suffix not in (".npz", ".csv"):
        raise ValueError("give an existing .npz or .csv file, or leave it out for the digits")
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise ValueError("is not a file that numpy.savez wrote")
        with np.load(path) as arrays:
            if not {"X", "y"} <= set(arrays):
                raise ValueError(f"needs arrays named X and y, has {', '.join(arrays) or 'none'}")
            x, y = arrays["X"], arrays["y"].ravel()
    else:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        if rows and not all(is_number(cell) for cell in rows[0][:-1]):
            rows = rows[1:]  # the first line holds names
        x, y = [row[:-1] for row in rows], np.array([row[-1] for row in rows])
    try:
        x = np.asarray(x, float)
    except ValueError as error:
        raise ValueError("all but the label must be numbers, the same number of them for every example") from error
    if not len(x) == len(y) > 0 or not np.isfinite(x).all():
        raise ValueError(f"needs one label and only finite numbers per example, got {len(x)} examples, {len(y)} labels")
    return x.reshape(len(y), -1), y


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def split(x: np.ndarray, y: np.ndarray, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """60 % to train on, 15 % to look at while choosing settings, 25 % to test; the same for every seed."""
    y = np.unique(y, return_inverse=True)[1]
    rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    train_x, val_x, train_y, val_y = train_test_split(rest_x, rest_y, test_size=0.2, stratify=rest_y, random_state=0)
    low, high = train_x.min(0), train_x.max(0)

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = (x - low) / np.where(high > low, high - low, 1)  # every feature of the training part lies in 0…1
        return torch.tensor(scaled, dtype=torch.float32, device=device), torch.tensor(y, device=device)

    return {"train": tensors(train_x, train_y), "validation": tensors(val_x, val_y), "test": tensors(test_x, test_y)}
