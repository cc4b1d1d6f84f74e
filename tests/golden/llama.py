"""Makes llama.json: what llama.cpp says with our weights. Needs llama-cpp-python and gguf.

python tests/golden/llama.py
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from anymamba.checkpoint import gguf
from gguf_cases import CASES, GOLDEN, Llama, models, prompts


def measure() -> dict:
    """For each model and kind: logits after the first prompt, and what is written greedily after each."""
    import llama_cpp

    found, known = {"llama-cpp-python": llama_cpp.__version__}, models()
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in CASES:
            path = Path(folder) / f"{name}-{kind}.gguf"
            gguf.save(known[name], path, dtype=kind)
            llama = Llama(path)
            logits = [float(f"{v:.9g}") for v in llama.step(prompts(name)[0])]
            written = [llama.written(ids, known[name].config.vocab_size) for ids in prompts(name)]
            found[f"{name} {kind}"] = {"logits": logits, "written": written}
            llama.close()
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure()) + "\n")
