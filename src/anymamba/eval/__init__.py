"""What a model knows: log-likelihoods of texts, zero-shot tasks from local files, and lm-evaluation-harness.

`python -m anymamba.eval` is the harness's own command with `--model anymamba`; in Python,
`import anymamba.eval.harness` registers that model.
"""

from anymamba.eval.scoring import Score, loglikelihoods
from anymamba.eval.tasks import TASKS, TaskResult, find, run

__all__ = ["TASKS", "Score", "TaskResult", "find", "loglikelihoods", "run"]
