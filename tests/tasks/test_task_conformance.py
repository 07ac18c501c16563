"""Run the conformance suite on every task in `TASKS`, including ones added later.

The module `sample_arguments` provides arguments for tasks that need them.
"""

from __future__ import annotations

import numpy as np
from sample_arguments import sample_arguments

from nipq_search.tasks import TASKS, base
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.testing import TaskConformance, suites
from nipq_search.testing.tasks import read_only_copy


class RegisteredTask(TaskConformance):
    """The suite for registered tasks, with two more tests for tasks that keep images in arrays."""

    def task_args(self, folder):
        return sample_arguments(self.name, folder)

    def test_images_of_a_read_only_copy_stay_read_only(self, instance):
        if isinstance(instance, ArrayClassification):
            assert not read_only_copy(instance).split("train").images.flags.writeable

    def test_images_of_a_split_have_the_classes_in_proportion(self, instance):
        if not isinstance(instance, ArrayClassification):
            return
        for name in base.SPLITS:
            counts = np.bincount(instance.split(name).labels, minlength=10)
            assert counts.min() > 0.85 * counts.max()


globals().update(suites(RegisteredTask, TASKS))
