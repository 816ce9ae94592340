"""`slicefine VERB ...`: finds the verb, runs it, and turns errors into one message and an exit code.

Exit codes: 0 done, 2 something is wrong with what was asked, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from slicefine import __version__
from slicefine.errors import SliceFineError, SliceFineWarning, did_you_mean

OK, WRONG, INTERRUPTED = 0, 2, 130
ELSEWHERE = {
    "--lr": "--training.learning_rate",
    "--epochs": "--training.num_train_epochs",
    "--batch_size": "--training.per_device_train_batch_size",
    "--rank": "--slice.r",
    "--model": "--model.name",
    "--base_model": "--model.name",
    "--data": "--data.train",
}
"""What other tools call our settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (those of the process by default); returns the exit code."""
    with warnings.catch_warnings():
        _show_warnings_plainly()
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        except SliceFineError as error:
            print(f"slicefine: error: {error}", file=sys.stderr)
            return WRONG
        except KeyboardInterrupt:
            print("slicefine: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `| head` has seen enough; what Python writes when it ends must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK


def _run(arguments: list[str]) -> int:
    try:
        from jsonargparse import ArgumentParser

        from slicefine.cli import analyze, bench, demo, evaluate, export, plan, recipes, report, train
    except ModuleNotFoundError as error:
        raise SliceFineError(f"The command line needs {error.name}: pip install 'slicefine[train]'") from error

    verbs = {module.NAME: module for module in (train, evaluate, plan, analyze, bench, export, report, recipes, demo)}
    parser = ArgumentParser(
        prog="slicefine",
        description="Fine-tune pretrained models by training sliding slices of the weights that are already there.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="verb", required=False, title="verbs", metavar="VERB")
    parsers = {}
    for name, module in verbs.items():
        parsers[name] = ArgumentParser(description=module.HELP, exit_on_error=False, allow_abbrev=False)
        commands.add_subcommand(name, parsers[name], help=module.HELP)
        module.add(parsers[name])  # after that: it may add verbs of its own
    try:
        given = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        verb = next((word for word in arguments if word in verbs), None)
        explained = verbs[verb].explain(error) if verb and hasattr(verbs[verb], "explain") else None
        help_text = (parsers[verb] if verb else parser).format_help()
        raise SliceFineError(explained or _in_words(error, list(verbs), help_text)) from error
    if "verb" not in given:
        parser.print_help()
        return OK
    return verbs[given["verb"]].run(given[given["verb"]])


def _in_words(error: ArgumentError, verbs: list[str], help_text: str) -> str:
    """jsonargparse's message, with the nearest verb or flag."""
    text = str(error)
    if found := re.search(r"invalid choice: '(.*?)'", text):
        return f"There is no verb {found[1]!r}; there are {', '.join(verbs)}.{did_you_mean(found[1], verbs)}"
    if found := re.search(r"(?:unrecognized arguments|ambiguous option): (\S+)", text):
        word = found[1].partition("=")[0]
        flags = sorted(set(re.findall(r"--[\w.-]+", help_text)))
        usual = ELSEWHERE.get(f"--{word.lstrip('-').rpartition('.')[2]}")
        near = f" Did you mean {usual!r}?" if usual in flags else did_you_mean(word, flags)
        return f"There is no argument {word!r} here.{near} See --help."
    if found := re.search(r"argument (--[\w.-]+).*expected (?:at least )?one argument", text):
        return f"{found[1]} takes a value: {found[1]} VALUE (true or false for a switch). See --help."
    if found := re.search(r"arguments are required: (.*)", text):
        missing = [name.rpartition(".")[2].upper() for name in found[1].split(", ")]
        return f"{' and '.join(missing)} is missing. See --help."
    return text


def _show_warnings_plainly() -> None:
    """Show our warnings without the line of code they come from."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **how: Any) -> None:
        if issubclass(category, SliceFineWarning):
            print(f"slicefine: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **how)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
