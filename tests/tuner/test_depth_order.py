"""Depth windows: what the first forward pass that trains shows of a stack, which its modules' registration does not tell."""

import copy
import io
import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, DECODER, TEXT, text
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from slicefine import SliceFineConfig, SliceFineError
from slicefine.errors import SliceFineWarning
from slicefine.tuner.layer import SliceLayer

BLOCKS = ["0", "1", "2", "3"]


class Stack(nn.Module):
    """Four layers; how they are used is up to those below."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return x


class Branches(Stack):
    def forward(self, x):
        return sum(block(x) for block in self.blocks)


class BranchesOfParts(Stack):
    """Each has a tensor of its own."""

    def forward(self, x):
        return sum(block(x + number) for number, block in enumerate(self.blocks))


class Forked(Stack):
    """The last two read the same."""

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](x) + self.blocks[3](x)


class Reversed(Stack):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x).tanh()
        return x


class ReversedBranches(Stack):
    def forward(self, x):
        return sum(block(x) for block in reversed(self.blocks))


class Exchanged(Stack):
    def forward(self, x):
        for number in (0, 2, 1, 3):
            x = self.blocks[number](x)
        return x


class WithEmbedding(Stack):
    """Registered after the blocks, and used before them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(self.embed(x))


class WithInputsOfEachBlock(Stack):
    """As Gemma 4's: it is registered after the blocks and feeds every one of them."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(8, 32)

    def forward(self, x):
        for block, more in zip(self.blocks, self.projection(x).chunk(4, -1), strict=True):
            x = block(x + more)
        return x


class Between(Stack):
    """A layer between two blocks is used below the second."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Linear(8, 8)

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](self.norm(x)))


class WithPooler(nn.Module):
    """Registered before the blocks, and used after them."""

    def __init__(self):
        super().__init__()
        self.pooler, self.encoder = nn.Linear(8, 8), Stack()

    def forward(self, x):
        return self.pooler(self.encoder(x))


class Stages(Stack):
    """Lists within a list, as PVT's: a list of layers is not called itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(4))

    def forward(self, x):
        for stage in self.blocks:
            for layer in stage:
                x = layer(x).tanh()
        return x


class BranchingStages(Stages):
    def forward(self, x):
        return sum(second(first(x)) for first, second in self.blocks)


class TwoInputs(Stack):
    """Two streams, block by block."""

    def forward(self, x):
        y = x.flip(0)
        for block in self.blocks:
            x, y = block(x), block(y)
        return x + y


class Twins(Stack):
    """The stack is used for two inputs, one after the other."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(0))


class InPlace(Stack):
    """Blocks that write into what they get, and return it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x.add_(self.layer(x.clone()))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


class ByName(Stack):
    """Containers, as many models use them, and names for arguments."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, mask, state=None):
            return {"state": (self.layer(state["state"][0]) * mask,)}

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, x):
        state, mask = {"state": (x,)}, torch.ones(8)
        for block in self.blocks:
            state = block(mask, state=state)
        return state["state"][0]


class Checkpointed(Stack):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class CheckpointedAgain(Checkpointed):
    reentrant = True


def example(rows=3):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def adapted(base, window, **settings):
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    settings = {"r": 2, "axis": "row", "target_modules": targets, "depth_window": window, "depth_every": 1} | settings
    return get_peft_model(base, SliceFineConfig(**settings))


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


def train(model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(example()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- refused


ORDER = "`depth_window` needs blocks in an order, each of which reads what the one before it writes; this one"
BELOW = "`depth_window` ends backpropagation below a block, and this one reads what"


@pytest.mark.parametrize("window", [[0, 2], [2, 0], [3, 0], [0, 3]], ids=str)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Branches, rf"blocks\.1: {ORDER} does not read what block 0, called before it, writes\. Name another list with `depth_stack`, or leave out"),
        (ReversedBranches, rf"blocks\.2: {ORDER} does not read what block 3, called before it"),
        (Reversed, rf"blocks\.2: {ORDER} reads what block 3 writes"),
        (Forked, rf"blocks\.3: {ORDER} does not read what block 2"),
        (WithEmbedding, rf"blocks\.0: {BELOW} embed outside of blocks writes, which is trained at every step\. Leave .*`exclude_modules`, or leave out"),
        (WithInputsOfEachBlock, rf"blocks\.0: {BELOW} projection outside"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_stacks_that_are_refused(build, message, window):
    """In whatever turn the run begins; again by whoever goes on; and nothing is left behind."""
    model = adapted(build(), window)
    for _ in range(2):
        with pytest.raises(SliceFineError, match=message):
            model(example())
    model.disable_adapter_layers()
    model(example())
    model.enable_adapter_layers()
    assert not hooks(model.unload())


@pytest.mark.parametrize(
    ("build", "window", "message"),
    [
        (BranchesOfParts, [0, 2], r"blocks\.1: .* does not read what block 0"),
        (BranchesOfParts, [2, 0], r"blocks\.3: .* does not read what block 2"),
        (BranchingStages, [0, 2], r"blocks\.1: .* does not read what block 0"),
        (Exchanged, [0, 2], r"blocks\.1: .* reads what block 2 writes"),
        (Exchanged, [2, 0], r"blocks\.1: .* reads what block 2 writes"),
        (Between, [0, 3], r"blocks\.2: .* reads what norm outside of blocks writes"),
        (Between, [3, 0], r"blocks\.2: .* reads what norm outside of blocks writes"),
    ],
)
def test_stacks_whose_graph_tells(build, window, message):
    with pytest.raises(SliceFineError, match=message):
        adapted(build(), window)(example())


def test_what_feeds_only_blocks_that_never_rest_is_no_matter():
    train(adapted(Between(), [2, 0]), 2)
    train(adapted(WithEmbedding(), [0]), 2)


def test_gemma_4_has_a_layer_that_feeds_every_block():
    """`all-linear` takes it, and it is registered after the blocks."""
    parts = {"head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(
        **DECODER | parts, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0
    )
    model, other = (transformers.Gemma4ForCausalLM(config) for _ in range(2))
    with pytest.raises(SliceFineError, match=rf"model\.layers\.0: {BELOW} model\.per_layer_model_projection outside"):
        get_peft_model(model, SliceFineConfig(r=2, depth_window=[1, 0]))(**text())
    excluded = {"exclude_modules": r".*per_layer_model_projection"}
    model = get_peft_model(other, SliceFineConfig(r=2, depth_window=[1, 0], **excluded))
    model(**text()).logits.square().mean().backward()
    assert not hooks(model)


# ---------------------------------------------------------------------- accepted


@pytest.mark.parametrize("window", [[0, 2], [2, 0], [3, 1, 0]], ids=str)
@pytest.mark.parametrize("build", [Stack, WithPooler, Stages, TwoInputs, Twins, InPlace, ByName, Checkpointed])
def test_stacks_that_are_used_in_their_order(build, window):
    """The hooks go with the first pass."""
    model = adapted(build(), window, depth_stack="encoder.blocks" if build is WithPooler else "blocks")
    assert hooks(model)
    with torch.no_grad():
        model(example())
    assert hooks(model), "that was no pass that trains"
    train(model, 1)
    assert not hooks(model)
    train(model, 2 * len(window))


def test_reentrant_checkpointing_makes_no_graph_to_look_at():
    model = adapted(CheckpointedAgain(), [0, 2])
    x = example().requires_grad_()
    for _ in range(2):
        model(x).square().mean().backward()
    assert hooks(model), "the backward pass, which calls the blocks again, is no forward pass"


def test_a_pooler_that_is_registered_first_is_trained_at_every_step():
    model = adapted(WithPooler(), [2, 0])
    layers = {layer.name: layer for layer in model.modules() if isinstance(layer, SliceLayer)}
    model(example()).square().mean().backward()
    reached = {name for name, layer in layers.items() if layer.slicefine_weight["default"].grad is not None}
    assert reached == {"pooler", "encoder.blocks.2", "encoder.blocks.3"}


ENCODERS = {"T5": "encoder.block", "Whisper": "model.encoder.layers", "CLIP": "text_model.encoder.layers"}


@pytest.mark.filterwarnings("ignore:.*of experts, say")  # which are left out here
@pytest.mark.parametrize("window", [[1, 0], [0, 1]], ids=str)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "ALBERT"])
def test_architectures(name, window):
    architecture = ARCHITECTURES[name]
    settings = {"task_type": architecture.task_type, "modules_to_save": architecture.head and [architecture.head]}
    config = SliceFineConfig(r=2, depth_window=window, depth_stack=ENCODERS.get(name), **settings)
    model = get_peft_model(architecture.build().train(), config)
    model(**architecture.inputs())
    assert not hooks(model)


@pytest.mark.parametrize("groups", [2, 1])
def test_blocks_that_are_used_several_times(groups):
    """ALBERT: each block twice in a row, or the two of them twice, where the window saves nothing."""
    base = transformers.AlbertModel(
        transformers.AlbertConfig(
            **TEXT | {"num_hidden_layers": 4},
            embedding_size=16,
            num_hidden_groups=groups,
            inner_group_num=3 - groups,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    settings = {"exclude_modules": r".*embedding_hidden_mapping_in", "depth_window": [1, 0], "depth_every": 1}
    model = get_peft_model(base, SliceFineConfig(r=2, **settings))
    if groups == 2:
        model(**text())
    else:
        with pytest.warns(SliceFineWarning, match="Backpropagation goes on below the depth window"):
            model(**text())
    assert not hooks(model)


@pytest.mark.parametrize("window", [[0, 2], [2, 0]], ids=str)
def test_blocks_that_are_dropped(window, monkeypatch):
    """LayerDrop: some blocks are not called in a pass, be it the last one."""
    base = Stack()
    model = adapted(base, window)
    passes = iter([[0, 2], [1, 3], [0, 1, 3]])

    def forward(x):
        for number in next(passes):
            x = base.blocks[number](x)
        return x

    monkeypatch.setattr(base, "forward", forward)
    for _ in range(3):
        model(example()).square().mean().backward()
    assert not hooks(model)


# ---------------------------------------------------------------------- the rest of an adapter's life


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("begun", [False, True])
def test_copies_are_looked_at_as_well(begun, way):
    """Also one that is made in the middle of a pass, whose graph cannot be copied."""
    model = adapted(Branches(), [0, 2])
    if begun:
        model.get_base_model().blocks[0](example())
    copied = way(model)
    with pytest.raises(SliceFineError, match="does not read what block 0"):
        copied(example())
    assert hooks(model)


def test_a_model_that_is_loaded_to_be_used_is_not_looked_at(tmp_path):
    model = adapted(Stack(), [0, 2])
    train(model, 1)
    model.save_pretrained(tmp_path)
    assert not hooks(PeftModel.from_pretrained(Stack(), tmp_path))
    assert hooks(PeftModel.from_pretrained(Stack(), tmp_path, is_trainable=True))


def test_another_adapter_is_trained_without_a_window():
    model = adapted(Branches(), [0, 2])
    model.add_adapter("other", SliceFineConfig(r=2, axis="row", target_modules=BLOCKS))
    model.set_adapter("other")
    train(model, 2)
    model.delete_adapter("default")
    train(model, 2)


def test_what_is_trained_in_full_below_the_blocks_is_told_of_by_a_warning():
    targets = {"target_modules": BLOCKS, "modules_to_save": ["embed"]}
    model = adapted(WithEmbedding(), [2, 0], **targets)
    with pytest.warns(SliceFineWarning, match=r"`modules_to_save`.*if it is a target, .*`exclude_modules`"):
        model(example())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(adapted(WithEmbedding(), [2, 0], target_modules=BLOCKS), 2)
