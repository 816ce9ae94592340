"""Keep other libraries' progress bars, reports and deprecations off the command line: they are not for its user."""

from __future__ import annotations

import warnings


def quiet() -> None:
    """Silence transformers and datasets below the level of an error."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
