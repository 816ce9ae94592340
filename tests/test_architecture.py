"""Decisions that a change must not overturn unnoticed: the order of imports, the public names, a fast start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import slicefine

ROOT = Path(__file__).parent.parent


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_flows_one_way():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_public_names():
    assert slicefine.__all__ == [
        "ParameterCounts",
        "Slice",
        "SliceFineCallback",
        "SliceFineConfig",
        "SliceFineError",
        "SliceFineModel",
        "SliceFineWarning",
        "active_slices",
        "couplings",
        "parameter_counts",
        "touched_slices",
    ]
    for name in slicefine.__all__:
        assert getattr(slicefine, name).__doc__, f"{name} has no docstring"
    assert set(slicefine.__all__) <= set(dir(slicefine))
    with pytest.raises(AttributeError, match="no attribute 'SliceFineConfg'"):
        slicefine.SliceFineConfg  # noqa: B018 -- the access is the test


def test_importing_slicefine_imports_nothing_heavy():
    loaded = json.loads(python("import slicefine, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "peft", "transformers", "numpy"} & set(loaded)


@pytest.mark.parametrize(
    "imports",
    [
        "import slicefine; import peft",
        "import peft; import slicefine",
        "from slicefine import SliceFineConfig; import peft",
        "import slicefine; from peft import PeftModel; import peft",
        "import slicefine; import transformers; import peft",
    ],
)
def test_the_method_is_known_to_peft_in_any_order_of_imports(imports):
    code = f"{imports}; print(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['SLICEFINE'].__name__, peft.__spec__.loader.__class__.__name__)"
    assert python(code).split() == ["SliceFineConfig", "SourceFileLoader"]


def test_the_readme_names_the_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in readme
        assert f"\n{command}:" in makefile
