"""Looking inside: what a model's state holds, what its tokens write and forget, what a prediction rests on.

trace = capture(model, ids, layers=[3], keep=["dt", "B", "C"]).layers[3]
hidden_attention(trace, channels=7)           # (t,t): the scan of channel 7 as a matrix
with patch(model, 3, "dt", trace.dt):         # layer 3 with the step sizes of that run
    model(other_ids)
"""

from anymamba.inspect.attention import attention_blocks, carried, hidden_attention
from anymamba.inspect.capture import LayerTrace, Recording, Trace, capture, recording
from anymamba.inspect.memory import forget_factor, horizon, horizon_of, write, write_strength
from anymamba.inspect.probe import Recall, recall
from anymamba.inspect.saliency import ablation_saliency, gradient_saliency
from anymamba.inspect.surgery import edit_state, mix_states, patch

__all__ = ["LayerTrace", "Recall", "Recording", "Trace", "ablation_saliency", "attention_blocks", "capture", "carried",
           "edit_state", "forget_factor", "gradient_saliency", "hidden_attention", "horizon", "horizon_of",
           "mix_states", "patch", "recall", "recording", "write", "write_strength"]  # fmt: skip
