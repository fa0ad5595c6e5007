"""Tasks: the kind of prediction of a run, from the targets to the report; one file each.

`make_task` returns a task by name; users register their own in `tasks`.
"""

from fedhead.tasks.task import Calibrated, Targets, Task, make_task, tasks

__all__ = ["Calibrated", "Targets", "Task", "make_task", "tasks"]
