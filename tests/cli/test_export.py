from __future__ import annotations

import json
import re
import shutil
import signal
import warnings
from pathlib import Path

import exporting
import pytest
import tiny

from slicefine.cli.main import main
from slicefine.training import export_merged


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return exporting.trained_adapter(
        tmp_path_factory.mktemp("llama"), tiny.llama(attention_bias=True), bias="slicefine_only"
    )


def test_the_flags_are_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    flags = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    assert flags == {"help", "as", "no_verify", "drop_biases_and_heads", "trust_remote_code"}


def test_lora_says_what_it_found_and_what_it_leaves_out(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--as", "lora", str(out)]) == 2
    error = capsys.readouterr().err
    assert (
        "with --drop_biases_and_heads: 8 problems\n  1. model.layers.0.self_attn.k_proj.bias was trained in full."
        in error
    )
    assert not out.exists()

    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for users; in tests a warning is an error
        assert main(["export", str(adapter), str(out), "--as", "lora", "--drop_biases_and_heads"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert re.search(r"^LoRA of rank 8 in 14 layers, 14,848 bytes$", printed.err, re.MULTILINE)
    assert re.search(
        r"^Largest logit difference .* in fp32: [\d.e-]+; with .* bf16: [\d.e-]+ ", printed.err, re.MULTILINE
    )
    assert re.search(r"^slicefine: warning: .*Left out, as asked: .*k_proj\.bias", printed.err, re.MULTILINE)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--as", "slice"], "one of merged, lora, slices; got 'slice'. Did you mean 'slices'?"),
        (["--as", "merged", "--drop_biases_and_heads"], "only lora leaves biases and heads out"),
        (["--as", "slices", "--no_verify"], "slices are always checked"),
        (["--no-verify"], "There is no argument '--no-verify' here. Did you mean '--no_verify'?"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], says: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 2
    assert re.search(r"The export takes [\d,]+ bytes; .* has 99 free\.", capsys.readouterr().err)


def test_ctrl_c_is_130_and_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = export_merged._write_safetensors

    def interrupted(path: Path, outputs: list[export_merged.Output]) -> None:
        write(path, outputs[:3])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(export_merged, "_write_safetensors", interrupted)
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("slicefine: interrupted\n")
    assert list(tmp_path.iterdir()) == []
