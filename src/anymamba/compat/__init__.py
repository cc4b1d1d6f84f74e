"""The names of mamba-ssm and causal-conv1d on anymamba's ops, so that code written for them runs on any machine.

Change the import, `from anymamba.compat.mamba_ssm import Mamba`, or leave the code as it is and call `install()` first.
Modules, signatures and layouts (channels first) are those of mamba-ssm 2.3 and causal-conv1d 1.7, as far as Mamba-1
goes. On purpose different: gradients also flow through final states, any size is taken, states are kept in float32
unless a dtype is asked for, and `generate` lets every row stop on its own.
"""

import importlib
import importlib.util
import pkgutil
import sys

NAMES = ("mamba_ssm", "causal_conv1d")


def install() -> list[str]:
    """Make `import mamba_ssm` and `import causal_conv1d` find the modules of `anymamba.compat` in this process.

    Call it before the code that imports them, transformers included. Returns those installed now: a package that is
    really there, or was installed before, stays as it is.
    """
    missing = [name for name in NAMES if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in missing:
        package = importlib.import_module(f"{__name__}.{name}")
        found = [
            package.__name__,
            *(info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
        ]
        for full in found:
            sys.modules[full.removeprefix(f"{__name__}.")] = importlib.import_module(full)
    return missing
