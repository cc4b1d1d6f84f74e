"""The `anymamba` command: a table of subcommands, each imported when it is called, so that --help is instant."""

import errno
import importlib
import os
import sys

COMMANDS = {
    "train": "train a model on text; without --data on the text that every machine has",
    "generate": "continue a prompt with a trained model, or talk to it (--interactive)",
    "state": "read text of any length once into a state file, and see what is in one",
    "eval": "loss, perplexity and bits per byte of a model on a file, or zero-shot tasks",
    "inspect": "what a model does with a text, as a page: step sizes, attention, memory",
    "convert": "write a model in another format: for transformers, mamba-ssm, llama.cpp, or ours",
    "tokenizer": "train a BPE tokenizer on your text",
    "merge": "add an adapter to the weights of its model, and write them as a model",
    "export": "write a model as an ONNX graph, for other runtimes",
    "doctor": "what runs here and how fast paths are chosen; tests every kernel",
    "warmup": "compile the kernels of a model ahead of time",
}

USAGE = """usage: anymamba COMMAND [options]

{commands}

examples:
  anymamba train                                      three minutes, on Python's own source code
  anymamba train --data book.txt --minutes 10
  anymamba generate runs/NAME --prompt "def main"
  anymamba state read runs/NAME book.txt -o book.state
  anymamba doctor

anymamba COMMAND --help tells each command's options; --debug after any command shows the traceback of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows "?" instead of ending the command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {k:<10} {v}" for k, v in COMMANDS.items())))
        return 0
    if argv[0] == "--version":
        from anymamba import __version__

        print(f"anymamba {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"anymamba: there is no command {argv[0]!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _guarded(argv[0], argv[1:], debug)


def _guarded(command, argv, debug):
    from anymamba.errors import AnymambaError

    try:
        return importlib.import_module(f"anymamba.cli.{command}").main(argv) or 0
    except AnymambaError as error:
        if debug:
            raise
        print(f"anymamba {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: nothing to say to anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        cure = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        print(f"anymamba {command}: {error}; {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ninterrupted", file=sys.stderr)
        return 130
