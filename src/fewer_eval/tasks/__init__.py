"""The tasks that an evaluation can run with nothing but the default model's package and one text package."""

from fewer_eval.tasks import common_words, needle, running_text, tracking, uuids
from fewer_eval.tasks.base import Example, Task
from fewer_eval.tasks.user_file import from_jsonl

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        needle.SINGLE,
        needle.MULTIKEY,
        needle.MULTIVALUE,
        tracking.TRACKING,
        common_words.COMMON_WORDS,
        uuids.SINGLE,
        uuids.CHAIN,
        running_text.RUNNING_TEXT,
    )
}

__all__ = ["TASKS", "Example", "Task", "from_jsonl"]
