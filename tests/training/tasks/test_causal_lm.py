from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel, OPTConfig, OPTForCausalLM
from transformers.utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slicefine import SliceFineError, SliceFineWarning
from slicefine.training.export import export
from slicefine.training.progress import StepTimer
from slicefine.training.prompts import prompt
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train
from slicefine.training.sft import CausalLMTrainer
from slicefine.training.smoke import smoke
from slicefine.training.tasks import Prepared, causal_lm, get_task

IGNORED = -100
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}|{% endgeneration %}"
    "{% else %}<{{ m['role'] }}>{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def recipe_for(settings: dict[str, Any], rows: list[Any] | str, **changed: Any) -> Recipe:
    """A recipe over `rows`, half of them for validation."""
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path = Path(settings["data.train"]).with_suffix(".jsonl")
    path.write_text(text, encoding="utf-8")
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe.from_flat(settings | {"data.train": str(path), "data.validation": 0.5} | changed)


def prepared(settings: dict[str, Any], rows: list[Any], **changed: Any) -> Prepared:
    """`rows`, prepared twice over, so that the split leaves all of them for training."""
    recipe = recipe_for(
        settings, rows, data__validation=str(Path(settings["data.train"]).with_suffix(".jsonl")), **changed
    )
    return causal_lm.prepare(recipe, causal_lm.read(recipe.data))


def refusal(settings: dict[str, Any], rows: list[Any] | str, **changed: Any) -> str:
    recipe = recipe_for(settings, rows, **changed)
    with pytest.raises(SliceFineError) as error:
        causal_lm.prepare(recipe, causal_lm.read(recipe.data))
    return str(error.value)


def learned(made: Prepared, row: int = 0) -> str:
    return made.processor.decode([label for label in made.train[row]["labels"] if label != IGNORED])


@pytest.fixture
def chat_folder(lm_folder: Path, tmp_path: Path) -> Callable[[str], str]:
    """The tiny Llama with a chat template."""

    def make(template: str) -> str:
        folder = tmp_path / "chat"
        shutil.copytree(lm_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    ("row", "text", "wanted"),
    [
        ({"instruction": "Do.", "input": "", "output": "Done."}, prompt("Do.") + "Done.", "Done.</s>"),
        ({"instruction": "Do.", "input": None, "output": "Done."}, prompt("Do.") + "Done.", "Done.</s>"),
        ({"instruction": "Do.", "output": "Done.", "answer": 3}, prompt("Do.") + "Done.", "Done.</s>"),
        ({"instruction": "Do.", "input": "It", "output": "Né."}, prompt("Do.", "It") + "Né.", "Né.</s>"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 = 4", " 4</s>"),
        ({"prompt": "2 + 2 =", "completion": " 4</s>"}, "2 + 2 = 4", " 4</s>"),
        ({"text": "All of it."}, "All of it.", "<s>All of it.</s>"),
    ],
)
def test_the_completion_and_the_end_token_are_learned(
    lm_settings: dict[str, Any], row: dict[str, Any], text: str, wanted: str
) -> None:
    made = prepared(lm_settings, [row])
    assert made.processor.decode(made.train[0]["input_ids"]) == f"<s>{text}</s>"
    assert learned(made) == wanted
    assert len(made.train[0]["labels"]) == len(made.train[0]["input_ids"])


@pytest.mark.parametrize(
    ("template", "wanted", "note"),
    [(MARKED, "two|four|", "all turns of the assistant"), (CHATML, "four|", "the last one is learned alone")],
    ids=["marked", "not marked"],
)
def test_the_assistant_is_learned(
    lm_settings: dict[str, Any], chat_folder: Callable[[str], str], template: str, wanted: str, note: str
) -> None:
    made = prepared(lm_settings, [{"messages": TALK}], model__name=chat_folder(template))
    assert made.processor.decode(made.train[0]["input_ids"]) == "<user>one|<assistant>two|<user>three|<assistant>four|"
    assert learned(made) == wanted
    assert any(note in said for said in made.notes)


def test_templates_that_trl_knows_are_marked_by_it(
    lm_settings: dict[str, Any], chat_folder: Callable[[str], str]
) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    made = prepared(lm_settings, [{"messages": TALK}], model__name=chat_folder(qwen2_5_chat_template))
    assert learned(made).split() == ["two<|im_end|>", "four<|im_end|>"]
    assert any("TRL's version of the chat template" in said for said in made.notes)


@pytest.mark.parametrize(
    ("template", "says_so"),
    [
        (CHATML, True),
        (CHATML.replace("|{% endfor %}", "</s>\n{% endfor %}"), False),
        (MARKED, True),
        (MARKED.replace("|{% endgeneration %}", "{% endgeneration %}</s>"), True),
        (MARKED.replace("|{% endgeneration %}", "</s>{% endgeneration %}"), False),
    ],
    ids=["no token", "a token", "marked, no token", "marked, a token outside", "marked, a token"],
)
def test_an_end_of_turn_that_is_not_learned_is_named(
    lm_settings: dict[str, Any], chat_folder: Callable[[str], str], template: str, says_so: bool
) -> None:
    made = prepared(lm_settings, [{"messages": TALK}], model__name=chat_folder(template))
    assert learned(made).rstrip().endswith("four</s>") is not says_so
    assert any("no end of turn is learned: the tuned model may not stop" in note for note in made.notes) is says_so


def test_an_answer_that_the_prompt_contains_is_not_taken_for_learned(
    lm_settings: dict[str, Any], chat_folder: Callable[[str], str]
) -> None:
    talk = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    assert learned(prepared(lm_settings, [{"messages": talk}], model__name=chat_folder(CHATML))) == "yes|"
    folder = chat_folder(CHATML.replace("in messages", "in messages[:-1]"))
    with pytest.raises(SliceFineError, match=r"train\.jsonl:1: the chat template leaves out the assistant's last turn"):
        prepared(lm_settings, [{"messages": talk}], model__name=folder)


def test_reasoning_that_a_template_removes(lm_settings: dict[str, Any], chat_folder: Callable[[str], str]) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>hm\n</think>\n\ntwo"}]
    assert learned(prepared(lm_settings, [{"messages": talk}], model__name=chat_folder(CHATML))).endswith("two|")
    thinking = CHATML.replace("<assistant>{% endif", "<assistant><think>{% endif")  # which the prompt then has
    assert learned(prepared(lm_settings, [{"messages": talk}], model__name=chat_folder(thinking))).startswith("hm")
    removing = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    with pytest.raises(SliceFineError, match=r"train\.jsonl:1: the chat template removes the reasoning"):
        prepared(lm_settings, [{"messages": talk}], model__name=chat_folder(removing))


def test_templates_with_the_date_are_named(lm_settings: dict[str, Any], chat_folder: Callable[[str], str]) -> None:
    folder = chat_folder("{{ strftime_now('%Y') }}" + CHATML)
    made = prepared(lm_settings, [{"messages": TALK}], model__name=folder)
    assert any("resumed on another day" in note for note in made.notes)


def test_the_format_is_found_by_the_columns_or_given(lm_settings: dict[str, Any]) -> None:
    both = {"instruction": "Do.", "output": "Done.", "text": "All of it."}
    said = refusal(lm_settings, [both] * 4)
    assert "has the columns of instruction and of text, and `data.format` is auto" in said
    assert learned(prepared(lm_settings, [both], data__format="text")) == "<s>All of it.</s>"
    assert learned(prepared(lm_settings, [both], data__format="instruction")) == "Done.</s>"
    made = prepared(lm_settings, [{"body": "All of it."}], data__text="body")
    assert learned(made) == "<s>All of it.</s>"


def test_hub_data(lm_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{number}", "completion": "x"} for number in range(4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    recipe = Recipe.from_flat(lm_settings | {"data.train": "nobody/sums", "data.validation": "test"})
    examples = causal_lm.read(recipe.data)
    assert examples.format == "prompt"
    assert [row["prompt"] for row in examples.train] == ["0", "1", "2", "3"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "a", "answer": "b"}], ":1: the columns 'question', 'answer' are of no known format."),
        ([{"question": "a"}], "instruction (instruction, output), prompt (prompt, completion), chat (messages), text (text)"),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            "mixes prompt (1 rows, the first {file}:2), text (1 rows, the first {file}:1)",
        ),
        ([{"prompt": "a", "completion": "  "}], ":1: 'completion' is empty."),
        ([{"instruction": "a", "output": ""}], ":1: 'output' is empty."),
        ([{"instruction": "", "output": "b"}], ":1: 'instruction' is empty."),
        ([{"instruction": "a", "input": 3, "output": "b"}], ":1: 'input' is a text; got 3."),
        ([{"prompt": "a", "completion": None}], ":1: 'completion' is a text; got null."),
        ([{"text": ["a"]}], ":1: 'text' is a text; got ['a']."),
        ([{"messages": "hello"}], ":1: 'messages' is a list of objects with role and content; got 'hello'."),
        ([{"messages": []}], ":1: 'messages' is empty."),
        ([{"messages": [{"role": "user"}]}], ":1: message 1 has role and content, both texts"),
        ([{"messages": TALK[:3]}], ":1: a conversation ends with the assistant's turn, which is learned; this one ends with 'user'"),
        ([{"messages": [TALK[0], {"role": "assistant", "content": " "}]}], ":1: the last turn of the assistant is empty."),
        ([{"messages": TALK}], "Conversations need a chat template; the tokenizer of"),
        ([], "the train set is empty"),
        ([{"text": "a"}], "leaves 0 for validation and 1 for training"),
    ],
)  # fmt: skip
def test_bad_rows(lm_settings: dict[str, Any], rows: list[Any], says: str) -> None:
    file = Path(lm_settings["data.train"]).with_suffix(".jsonl")
    assert says.replace("{file}", str(file)) in refusal(
        lm_settings, rows * (1 if len(rows) != 1 or "leaves" in says else 4)
    )


def test_a_given_format_names_the_columns_it_lacks(lm_settings: dict[str, Any]) -> None:
    said = refusal(lm_settings, [{"text": "a"}] * 4, data__format="prompt")
    assert ":1: no column 'prompt', 'completion'; there are 'text'." in said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'][0] }}{% endfor %}", "leaves out the assistant's last turn"),
        (CHATML, ":2: the chat template of the tokenizer refuses the conversation: no tools here."),
        (MARKED.replace("== 'assistant'", "== 'model'"), "marks nothing as the assistant's"),
        (MARKED.replace("in messages", "in messages[:-1]"), "leaves out the assistant's last turn"),
        (
            MARKED.replace("== 'assistant'", "== 'assistant' and not loop.last"),
            "does not mark the assistant's last turn",
        ),
    ],
    ids=["leaves out", "raises", "marks nothing", "marked, leaves out", "marks another turn"],
)
def test_wrong_templates(
    lm_settings: dict[str, Any], chat_folder: Callable[[str], str], template: str, says: str
) -> None:
    tools = [{"role": "tool", "content": "x"}, *TALK]
    rows = [{"messages": TALK}, {"messages": tools}]
    with pytest.raises(SliceFineError) as error:
        prepared(lm_settings, rows, model__name=chat_folder(template))
    assert says in str(error.value)
    assert "train.jsonl:" in str(error.value)


def test_sets_of_two_formats(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    said = refusal(lm_settings, [{"prompt": "a", "completion": "b"}], data__validation=str(tmp_path / "other.jsonl"))
    assert "train.jsonl has prompt" in said
    assert "other.jsonl has text" in said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"data.label": "answer"},
            "`data.label` is for text-classification, image-classification, video-classification; this is causal-lm. Leave it out.",
        ),
        ({"data.text_pair": "b"}, "`data.text_pair` is for text-classification"),
        ({"data.packing_strategy": "wrapped"}, "`data.packing` is false"),
        ({"task": "text-classification", "data.packing": True}, "`data.packing` is for causal-lm; this is text-class"),
        ({"task": "text-classification", "data.format": "chat"}, "`data.format` is for causal-lm"),
    ],
)
def test_settings_of_the_other_task(lm_settings: dict[str, Any], changed: dict[str, Any], says: str) -> None:
    (problem,) = Recipe.from_flat(lm_settings | changed).problems()
    assert says in problem


def test_more_than_the_model_reads(lm_settings: dict[str, Any]) -> None:
    assert "`data.max_length` is at most what" in refusal(lm_settings, [{"text": "a"}] * 2, data__max_length=600)


def test_a_model_without_a_head(lm_settings: dict[str, Any], lm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(lm_folder, folder)
    LlamaModel(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    assert "have none for lm_head.weight" in refusal(lm_settings, [{"text": "a"}] * 2, model__name=str(folder))


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_the_code_of_a_model_is_neither_run_nor_offered(
    task: str, lm_settings: dict[str, Any], lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks on a terminal
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(lm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {
        "AutoConfig": "code_of.C",
        "AutoModelForCausalLM": "code_of.M",
        "AutoModelForSequenceClassification": "code_of.M",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": own}))
    (folder / "code_of.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    rows = [{"text": f"a{number}", "label": number % 2} for number in range(8)]
    recipe = recipe_for(lm_settings | {"task": task, "model.name": str(folder)}, rows)
    with pytest.raises(SliceFineError, match="did not load"):
        train(recipe)
    with pytest.raises(SliceFineError, match="A smoke test needs"):
        smoke(recipe, tmp_path)
    with pytest.raises(ValueError, match="custom code"):
        get_task(task).load_base(str(folder), folder)
    assert not ran.exists()


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
@pytest.mark.filterwarnings("ignore:Some weights of")
def test_attention_is_computed_as_the_recipe_says(task: str, lm_settings: dict[str, Any]) -> None:
    rows = [{"text": f"a{number}", "label": number % 2} for number in range(8)]

    def used(**changed: Any) -> str | None:
        recipe = recipe_for(lm_settings | {"task": task}, rows, **changed)
        assert recipe.problems() == []
        made = get_task(task)
        return made.prepare(recipe, made.read(recipe.data)).model.config._attn_implementation

    assert [used(), used(model__attn_implementation="eager")] == ["sdpa", "eager"]
    if not is_flash_attn_2_available():
        with pytest.raises(SliceFineError, match=r"`model\.attn_implementation`: FlashAttention2 .* cannot be used"):
            used(model__attn_implementation="flash_attention_2")


# ---------------------------------------------------------------- length


LONG = [
    {"prompt": "short: ", "completion": "abcd"},
    {"prompt": "x" * 40, "completion": "never seen"},
    {"prompt": "y" * 12, "completion": "seen for its beginning"},
]


def test_what_is_cut_to_nothing_is_dropped_and_named(lm_settings: dict[str, Any]) -> None:
    with pytest.warns(SliceFineWarning, match="left out") as warned:
        made = prepared(lm_settings, LONG, data__max_length=20)
    said = str(warned[0].message)
    assert "1 of 3 train examples have nothing to learn within `data.max_length` (20 tokens): " in said
    assert "train.jsonl:2." in said
    assert [learned(made, row) for row in range(2)] == ["abcd</s>", "seen fo"]
    assert max(map(len, made.train["input_ids"])) == 20
    assert "1 of 3 train examples are cut to 20 tokens." in made.notes
    assert any(note.endswith("train.jsonl:2; left out.") for note in made.notes)


def test_many_examples_are_encoded_as_one_is(lm_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a" * number, "completion": "b" * (number % 7 + 1)} for number in range(1, 30)]
    together = prepared(lm_settings, rows)
    monkeypatch.setattr(causal_lm, "TOGETHER", 1)
    assert prepared(lm_settings, rows).train.to_list() == together.train.to_list()


def test_what_is_cut_to_nothing_can_be_an_error(lm_settings: dict[str, Any]) -> None:
    said = refusal(lm_settings, LONG[1:] * 2, data__max_length=20, data__fully_cut="error")
    assert "have nothing to learn within `data.max_length` (20 tokens)" in said
    assert "Raise `data.max_length`" in said
    assert "nothing to learn" in refusal(lm_settings, [LONG[1]] * 2, data__max_length=20)  # where nothing would be left


def test_the_first_token_is_nothing_to_learn(lm_settings: dict[str, Any]) -> None:
    assert "have nothing to learn" in refusal(lm_settings, [{"text": "abc"}] * 2, data__max_length=1)
    assert learned(prepared(lm_settings, [{"text": "abc"}], data__max_length=2)) == "<s>a"


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing(lm_settings: dict[str, Any], strategy: str) -> None:
    rows = [{"prompt": f"{number}: ", "completion": "abcdefgh"[: number % 5 + 1]} for number in range(20)]
    made = prepared(lm_settings, rows, data__packing=True, data__packing_strategy=strategy, data__max_length=32)
    tokens = [token for row in made.train["input_ids"] for token in row]
    alone = [token for row in prepared(lm_settings, rows).train["input_ids"] for token in row]
    assert sorted(tokens) == sorted(alone)
    assert 5 < len(made.train) < 12
    assert any(note.startswith(f"Packing: 20 training examples in {len(made.train)} sequences") for note in made.notes)


@pytest.mark.parametrize(("strategy", "dropped"), [("bfd_split", 10), ("wrapped", 8)])
def test_sequences_of_prompts_alone_are_left_out(
    lm_settings: dict[str, Any], strategy: str, dropped: int, tmp_path: Path
) -> None:
    """A long prompt fills sequences of its own, the first of which would be the first batch."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = recipe_for(
        lm_settings,
        [{"prompt": "x" * 60, "completion": "abc"}] * 5,
        data__validation=str(short),
        data__packing=True,
        data__packing_strategy=strategy,
        data__max_length=24,
        training__per_device_train_batch_size=1,
        training__max_steps=5,
    )
    made = causal_lm.prepare(recipe, causal_lm.read(recipe.data))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=strategy == "bfd_split")
    assert all(bool((collate([row])["labels"][:, 1:] != IGNORED).any()) for row in made.train)
    assert "".join(learned(made, row) for row in range(len(made.train))) == "abc</s>" * 5
    (note,) = [note for note in made.notes if note.startswith("Packing")]
    assert note.endswith(f"sequences of up to 24 tokens; {dropped} more, of prompts alone, are left out.")
    assert train(recipe).status == "finished"


# ---------------------------------------------------------------- special tokens


def test_packed_examples_do_not_see_each_other(lm_settings: dict[str, Any]) -> None:
    """The loss of every example is what it is alone."""
    rows = [{"prompt": f"{number}: ", "completion": "abcdefgh"[: number % 5 + 1]} for number in range(20)]
    packed = prepared(lm_settings, rows, data__packing=True, data__packing_strategy="bfd", data__max_length=32)
    alone = prepared(lm_settings, rows, data__max_length=32)
    assert len(packed.train) < len(alone.train)

    def summed(made: Prepared) -> tuple[float, int]:
        total, count = 0.0, 0
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=made is packed)
        for example in made.train:
            batch = collator([example])
            labels = batch["labels"][:, 1:]
            logits = made.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="sum", ignore_index=-100
            )
            total, count = total + float(losses), count + int((labels != -100).sum())
        return total, count

    with torch.no_grad():
        (together, counted), (single, expected) = summed(packed), summed(alone)
    assert counted == expected
    assert together == pytest.approx(single, rel=1e-5)


@pytest.fixture
def opt_folder(lm_folder: Path, tmp_path: Path) -> str:
    """A tiny OPT, which takes the positions of packed examples and does not tell the examples apart by them."""
    folder = tmp_path / "opt"
    shutil.copytree(lm_folder, folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "max_position_embeddings": 512,
    }
    config = OPTConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1, dropout=0.0
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packing_is_refused_where_examples_would_see_each_other(
    lm_settings: dict[str, Any], opt_folder: str, strategy: str, tmp_path: Path
) -> None:
    packed = lm_settings | {"data.packing": True, "data.packing_strategy": strategy, "training.max_steps": 5}
    with pytest.raises(
        SliceFineError, match=r"`data\.packing`: opt does not keep packed examples apart; set it to false"
    ):
        train(Recipe.from_flat(packed | {"model.name": opt_folder}))
    assert not (tmp_path / "run").exists()
    assert train(Recipe.from_flat(packed)).status == "finished"  # Llama keeps them apart
    joined = packed | {"model.name": opt_folder, "data.packing_strategy": "wrapped", "output": str(tmp_path / "joined")}
    assert train(Recipe.from_flat(joined)).status == "finished"


def test_validation_examples_are_padded_and_not_packed(
    lm_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    step = CausalLMTrainer.prediction_step

    def prediction_step(self: CausalLMTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append((set(inputs), len(inputs["input_ids"])))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CausalLMTrainer, "prediction_step", prediction_step)
    before = [
        train(
            Recipe.from_flat(
                lm_settings | {"data.packing": packing, "output": str(tmp_path / str(packing)), "training.max_steps": 5}
            )
        ).metrics["before"]
        for packing in (False, True)
    ]
    assert before[0] == before[1]
    assert {(frozenset(names), rows) for names, rows in seen} == {
        (frozenset({"input_ids", "labels", "attention_mask"}), 6)
    }


@pytest.fixture
def without(lm_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """The tiny Llama without some special tokens."""

    def make(*names: str, config: bool) -> str:
        folder = tmp_path / "bare"
        shutil.copytree(lm_folder, folder)
        for file in ["tokenizer_config.json", *(["config.json", "generation_config.json"] if config else [])]:
            content = json.loads((folder / file).read_text())
            kept = {
                key: value for key, value in content.items() if key not in [*names, *(f"{name}_id" for name in names)]
            }
            (folder / file).write_text(
                json.dumps(kept | {f"{name}_id": None for name in names} if "tok" not in file else kept)
            )
        return str(folder)

    return make


@pytest.mark.parametrize("by_itself", [True, False], ids=["a tokenizer that ends texts", "one that does not"])
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "a", "completion": "b"}, "b</s>"),
        ({"prompt": "a", "completion": "b</s>"}, "b</s>"),
        ({"prompt": "a</s>", "completion": "b"}, "b</s>"),
        ({"text": "b"}, "b</s>"),
        ({"text": "b</s>"}, "b</s>"),
    ],
)
def test_there_is_one_end_token(
    lm_settings: dict[str, Any], lm_folder: Path, tmp_path: Path, row: dict[str, str], wanted: str, by_itself: bool
) -> None:
    folder = tmp_path / "ending"
    shutil.copytree(lm_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_eos_token = by_itself
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][-1] == (1 if by_itself else 66)
    assert learned(prepared(lm_settings, [row], model__name=str(folder))).removeprefix("<s>") == wanted


def test_no_pad_token(lm_settings: dict[str, Any]) -> None:
    made = prepared(lm_settings, [{"text": "a"}])
    assert made.processor.pad_token == "</s>"
    assert made.notes == ["The tokenizer has no pad token; '</s>' is used, and ignored by attention and loss."]
    assert made.train[0]["labels"][-1] == 1  # the end is learned all the same


def test_no_end_token_but_one_in_the_model(lm_settings: dict[str, Any], without: Callable[..., str]) -> None:
    made = prepared(lm_settings, [{"prompt": "a", "completion": "b"}], model__name=without("eos_token", config=False))
    assert learned(made) == "b</s>"
    assert "The tokenizer has no end token; the one of the model's configuration is used, '</s>'." in made.notes


def test_no_end_token_at_all(lm_settings: dict[str, Any], without: Callable[..., str]) -> None:
    folder = without("eos_token", config=True)
    made = prepared(lm_settings, [{"prompt": "a", "completion": "b"}], model__name=folder)
    assert learned(made) == "b"
    assert any("will write until it is stopped" in note for note in made.notes)
    assert made.processor.pad_token is not None
    assert (
        train(
            Recipe.from_flat(lm_settings | {"model.name": folder, "training.max_steps": 2, "slice.slide_every": 1})
        ).status
        == "finished"
    )


def test_a_prompt_and_completion_that_share_a_token_are_counted(
    lm_settings: dict[str, Any], lm_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "merging"
    shutil.copytree(lm_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [["Ġ", "b"]]
    content["model"]["vocab"]["Ġb"] = 258
    (folder / "tokenizer.json").write_text(json.dumps(content))
    made = prepared(
        lm_settings, [{"prompt": "a ", "completion": "b"}, {"prompt": "a:", "completion": "b"}], model__name=str(folder)
    )
    assert learned(made) == " b</s>"
    (note,) = [note for note in made.notes if "slightly different prompt" in note]
    assert note.startswith("In 2 examples (")  # in training and in validation


# ---------------------------------------------------------------- runs


def test_from_recipe_to_an_exported_model(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    record = train(Recipe.from_flat(lm_settings | {"training.num_train_epochs": 6, "training.learning_rate": 2e-2}))
    assert (record.status, record.steps, record.data["format"]) == ("finished", 36, "instruction")
    assert set(record.metrics["after"]) == {"loss", "perplexity", "token_accuracy"}
    assert record.metrics["after"]["loss"] < record.metrics["before"]["loss"] - 0.3
    assert record.metrics["after"]["perplexity"] == math.exp(record.metrics["after"]["loss"])
    assert record.notes
    assert sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir() if "token" in path.name) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    out = export(tmp_path / "run", "merged", tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(lm_settings["model.name"])
    trained = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    tokens = AutoTokenizer.from_pretrained(out)("Add 1 and 2.", return_tensors="pt")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).eval()(**tokens).logits, trained(**tokens).logits)


def test_validation_figures_are_of_all_tokens(lm_settings: dict[str, Any]) -> None:
    """As counted by hand from the logits of one example at a time, and the same in any batches."""
    rows = [{"prompt": "a" * number, "completion": "bcdef"[: number % 5 + 1]} for number in range(1, 20)]
    made = prepared(lm_settings, rows)
    losses, correct = [], []
    for example in made.validation:
        with torch.no_grad():
            logits = made.model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        logits, labels = logits[labels != IGNORED].double(), labels[labels != IGNORED]
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        correct += (logits.argmax(-1) == labels).tolist()
    for size in (1, 7):
        recipe = recipe_for(
            lm_settings,
            rows,
            data__validation=str(Path(lm_settings["data.train"]).with_suffix(".jsonl")),
            output=f"{lm_settings['output']}{size}",
            training__per_device_eval_batch_size=size,
            training__max_steps=2,
            slice__slide_every=1,
        )
        figures = train(recipe).metrics["before"]
        assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert figures["token_accuracy"] == pytest.approx(sum(correct) / len(correct))


VARIANTS = {
    "plain": {"slice.order": "random"},
    "packed": {
        "data.packing": True,
        "data.max_length": 400,
        "training.per_device_train_batch_size": 2,
        "training.per_device_eval_batch_size": 2,
        "training.max_steps": 9,
    },
    "accumulated, checkpointing": {
        "training.gradient_accumulation_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.activation_checkpointing": True,
    },
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_interrupted_and_resumed_is_bit_identical(
    variant: dict[str, Any], lm_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = lm_settings | variant
    whole = train(Recipe.from_flat(settings | {"output": str(tmp_path / "whole")}))
    torch.manual_seed(1234)  # nothing outside of the checkpoint decides how a run goes on
    end_step = StepTimer.on_step_end

    def on_step_end(self: StepTimer, *args: Any, **kwargs: Any) -> None:
        end_step(self, *args, **kwargs)
        if len(self.seconds) == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", on_step_end)
        assert train(Recipe.from_flat(settings)).status == "interrupted"
    record = train(Recipe.load(tmp_path / "run" / "recipe.yaml"), resume=True)
    assert (record.status, record.steps, record.planned_steps) == ("finished", whole.steps, whole.steps)
    assert record.metrics == RunRecord.read(tmp_path / "whole").metrics
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        files = [tmp_path / run / "adapter" / name for run in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_bf16_base(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    record = train(
        Recipe.from_flat(
            lm_settings
            | {"model.dtype": "bfloat16", "training.bf16": True, "slice.slide_every": 1, "training.max_steps": 3}
        )
    )
    assert record.status == "finished"
    assert json.loads((tmp_path / "run" / "adapter" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_output_layer_is_refused_by_name(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"CausalLMTrainer refuses the recipe: .*lm_head"):
        train(Recipe.from_flat(lm_settings | {"slice.target_modules": ["lm_head"]}))
    assert not (tmp_path / "run").exists()
