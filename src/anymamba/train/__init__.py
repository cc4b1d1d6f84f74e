"""Training: `train` starts a run, `resume` goes on with one, `evaluate` measures a model on text.

result = train(TrainConfig(data=("shakespeare.txt",), minutes=3))
"""

from anymamba.train.config import TrainConfig
from anymamba.train.evaluate import Evaluation, evaluate
from anymamba.train.runs import load_run
from anymamba.train.trainer import Result, resume, train

__all__ = ["Evaluation", "Result", "TrainConfig", "evaluate", "load_run", "resume", "train"]
