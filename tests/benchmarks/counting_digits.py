"""The digits task with a loader that records every training sample in a file."""

from __future__ import annotations

import os

from nipq_search.tasks.vision.digits import Digits


class Counted:
    """A loader that appends the size of each of its batches to the file named in COUNTED."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            with open(os.environ["COUNTED"], "a") as file:
                file.write(f"{len(batch[-1])}\n")
            yield batch


class CountingDigits(Digits):
    """Digits with a counting training loader."""

    def loader(self, split, *arguments, **options):
        loader = super().loader(split, *arguments, **options)
        return Counted(loader) if split == "train" else loader
