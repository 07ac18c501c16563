"""Division of labeled texts into three splits that have no text or group in common."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nipq_search.errors import nearest
from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arguments import (
    argument_error,
    check_limit,
    sample_limit,
    seed,
    split_sources,
)
from nipq_search.tasks.common.arrays import stratified
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.text.table import Row, TextTable

MAX_CLASSES = 1000
"""Maximum number of distinct labels; a column with more is probably the wrong one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSplits:
    """Division of texts into splits.

    Attributes:
        validation: share of the samples to hold out, or of the groups if there are any; or the
            file or files of the split.
        test: the same for the test split.
        train_samples: maximum number of training samples; None uses all.
        split_seed: seed for the division.
    """

    validation: float | str | Sequence[str] = 0.1
    test: float | str | Sequence[str] = 0.1
    train_samples: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Check every argument and make paths absolute."""
        validation, test = split_sources(self.validation, self.test)
        store(self, validation=validation, test=test)
        sample_limit("train_samples", self.train_samples)
        seed("split_seed", self.split_seed)

    def shares(self) -> dict[str, float]:
        """Return the share to hold out for each split that has no separate files."""
        values = {"test": self.test, "validation": self.validation}
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def files(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of each split that has separate files."""
        values = {"validation": self.validation, "test": self.test}
        return {
            name: tuple(value) for name, value in values.items() if not isinstance(value, float)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledTexts:
    """Rows by split, class names by label index, and the number of dropped rows by reason."""

    rows: Mapping[str, Sequence[Row]]
    classes: tuple[str, ...]
    dropped: Mapping[str, int]


def split_rows(
    rows: Sequence[Row],
    table: TextTable,
    splits: TextSplits,
    read: Callable[[str, str], list[Row]],
) -> LabeledTexts:
    """Divide the rows of a table into three splits, and read splits that have separate files.

    Rows of the table are dropped if their text or group also occurs in a separate file.

    Args:
        rows: rows of the table.
        table: the table, which defines the classes and whether to drop duplicates.
        splits: how to divide the rows.
        read: function that reads the rows of a file, given its path and the name of the argument
            that contains the path.

    Returns:
        The rows by split, the classes, and the number of dropped rows by reason.

    Raises:
        UserError: labels are missing or unsuitable, a class has no row in a split, or there are
            fewer training rows than `splits.train_samples`.
    """
    dropped: collections.Counter[str] = collections.Counter()
    fixed = {
        name: [row for path in files for row in read(path, name)]
        for name, files in splits.files().items()
    }
    everything = [*rows, *(row for own in fixed.values() for row in own)]
    classes = tuple(table.labels or ()) or _distinct_labels(everything)
    present = {row.label for row in everything}
    for label in classes:
        if label not in present:
            hint = nearest(label, present - {""}) if len(present) <= MAX_CLASSES else ""
            raise argument_error("labels", f"no row has the label '{label}'{hint}")
    texts: set[Any] = set()
    groups: set[str | None] = set()
    for name in ("test", "validation"):
        if name in fixed:
            fixed[name] = _clean(fixed[name], classes, table, texts, groups, dropped)
    rest = _clean(rows, classes, table, texts, groups, dropped)
    cut = _by_group if rest and rest[0].group is not None else _by_row
    found = {**cut(rest, splits.shares(), splits.split_seed), **fixed}
    train = found["train"]
    if splits.train_samples is not None:
        check_limit("train_samples", splits.train_samples, len(train))
        (chosen,) = stratified(_labels(train), [splits.train_samples], splits.split_seed)
        found["train"] = [train[index] for index in chosen]
    _check_classes(found, classes, dropped)
    return LabeledTexts(
        rows={name: found[name] for name in SPLITS}, classes=classes, dropped=dict(dropped)
    )


def _distinct_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the distinct labels in sorted order, numerically if all of them are integers."""
    counts = collections.Counter(row.label for row in rows)
    if missing := counts.get("", 0):
        raise argument_error(
            "label",
            f"the column is empty in {missing} of {counts.total()} rows; "
            "list the classes in task_args.labels to drop them",
        )
    if len(counts) > MAX_CLASSES:
        raise argument_error(
            "label", f"the column has {len(counts)} distinct values, more than {MAX_CLASSES}"
        )
    if all(re.fullmatch(r"-?\d*\.\d+", label) for label in counts):
        raise argument_error(
            "label",
            f"the column contains numbers such as {next(iter(counts))} instead of classes; if "
            "they are classes, list them in task_args.labels",
        )
    whole = all(re.fullmatch(r"-?\d+", label) for label in counts)
    return tuple(sorted(counts, key=(lambda label: (int(label), label)) if whole else None))


def _clean(
    rows: Iterable[Row],
    classes: tuple[str, ...],
    table: TextTable,
    texts: set[Any],
    groups: set[str | None],
    dropped: collections.Counter[str],
) -> list[Row]:
    """Return the rows that a split can use, and count the dropped rows by reason.

    A row is dropped if its label is unknown, its text is empty, or its group is in an earlier
    split (`groups`). With `table.deduplicate`, repeated texts (`texts`) are dropped as well. The
    groups and texts of the returned rows are added to both sets.
    """
    kept: list[Row] = []
    known, former = set(classes), set(groups)
    for row in rows:
        if row.label not in known:
            dropped["label"] += 1
        elif not row.text.strip():
            dropped["empty"] += 1
        elif table.deduplicate and row.content in texts:
            dropped["duplicate"] += 1
        elif row.group is not None and row.group in former:
            dropped["group"] += 1
        else:
            texts.add(row.content)
            groups.add(row.group)
            kept.append(row)
    return kept


def _by_row(
    rows: Sequence[Row], shares: Mapping[str, float], seed: int
) -> dict[str, Sequence[Row]]:
    """Hold out shares of the rows, stratified by class; the remaining rows form `train`."""
    sizes = [round(share * len(rows)) for share in shares.values()]
    indices = stratified(_labels(rows), [*sizes, len(rows) - sum(sizes)], seed)
    return {
        name: [rows[index] for index in chosen]
        for name, chosen in zip([*shares, "train"], indices, strict=True)
    }


def _by_group(
    rows: Sequence[Row], shares: Mapping[str, float], seed: int
) -> dict[str, Sequence[Row]]:
    """Hold out randomly drawn shares of the groups; all other groups form `train`."""
    names = sorted({str(row.group) for row in rows})
    # Unlike default_rng, RandomState produces the same stream in every version of numpy.
    order = [names[index] for index in np.random.RandomState(seed).permutation(len(names))]
    owner: dict[str, str] = {}
    for split, share in shares.items():
        for group in order[: max(1, round(share * len(names)))]:
            owner[group] = split
        order = order[max(1, round(share * len(names))) :]
    found: dict[str, Sequence[Row]] = {}
    for split in [*shares, "train"]:
        found[split] = [row for row in rows if owner.get(str(row.group), "train") == split]
    return found


def _labels(rows: Sequence[Row]) -> np.ndarray[Any, Any]:
    """Return the labels of the rows as an array of strings, (N,)."""
    return np.array([row.label for row in rows], dtype=object).astype(str)


REASONS = {
    "label": "with other labels",
    "empty": "without text",
    "duplicate": "with a duplicate text",
    "group": "with a group of another split",
}
"""Descriptions of dropped rows for messages, by the key that is used to count them."""


def _check_classes(
    splits: Mapping[str, Sequence[Row]], classes: tuple[str, ...], dropped: Mapping[str, int]
) -> None:
    """Raise `UserError` unless there are at least two classes and every split has all of them."""
    if len(classes) < 2:
        raise argument_error(
            "label",
            f"the column has only one class, {', '.join(classes)}; at least two are needed",
        )
    for name, rows in splits.items():
        present = {row.label for row in rows}
        missing = [label for label in classes if label not in present]
        if missing:
            key = "train_samples" if name == "train" else name
            left = ", ".join(f"{count} {REASONS[reason]}" for reason, count in dropped.items())
            note = f" (dropped rows: {left})" if left else ""
            raise argument_error(
                key,
                f"class '{missing[0]}' has no row in the {name} split of {len(rows)} rows{note}; "
                "enlarge the split, or list the classes to use in task_args.labels",
            )
