"""A small correct memory model as an author would write it, and what authors get wrong: edits of its text."""

from dataclasses import dataclass

MODEL = '''
import copy
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memory_bench.backbone import Backbone
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits


@dataclass(frozen=True, slots=True)
class MineConfig:
    segment: int = 8
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class MineState(State):
    memory: Tensor  # [rows, 1, width]


class Mine(MemoryModel[MineState]):
    """Puts a gated mean of the last segment before the next."""

    Config = MineConfig
    source = "made up"

    def __init__(self, backbone, config, rng):
        super().__init__()
        self.backbone, self.config = backbone, config
        self.gate = nn.Parameter(torch.randn(backbone.width, generator=rng))
        self.traits = Traits(segment=config.segment)

    def open(self, rows, *, seeds=None):
        memory = self.gate.new_zeros(rows, 1, self.backbone.width)
        return MineState(memory)

    def step(self, state, segment, *, write=True):
        real = segment.mask
        embeds = self.backbone.embed(segment.ids)
        one = real.new_ones(real.shape[0], 1)
        mask, text = torch.cat([one, real], dim=1), torch.cat([~one, real], dim=1)
        hidden = self.backbone.run(torch.cat([state.memory, embeds], dim=1), mask, text=text)[:, 1:]
        readout = Readout(hidden, self.backbone.head)
        if not write:
            return readout, state
        mean = (hidden * real[..., None]).sum(dim=1, keepdim=True) / real.sum(dim=1).clamp(min=1)[:, None, None]
        memory = torch.where(real.any(dim=1)[:, None, None], self.gate * mean, state.memory)
        return readout, MineState(memory)

    def flops(self, tokens, remembered):
        return self.backbone.flops(tokens + 1, keys=tokens + 1, predicted=tokens)
'''


@dataclass(frozen=True)
class Mistake:
    """An edit of `MODEL`, and what the sentence about it must say (a regular expression)."""

    name: str
    old: str
    new: str
    said: str
    more: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        text = MODEL
        for old, new in ((self.old, self.new), *self.more):
            assert old in text, f"{self.name}: nothing to edit"
            text = text.replace(old, new)
        return text


READOUT = "readout = Readout(hidden, self.backbone.head)"
WRITTEN = "return readout, MineState(memory)"
FLOPS = "return self.backbone.flops(tokens + 1, keys=tokens + 1, predicted=tokens)"
OPENED = "memory = self.gate.new_zeros(rows, 1, self.backbone.width)"
TRAITS = "self.traits = Traits(segment=config.segment)"
CONFIG = "    Config = MineConfig\n"
SOURCE = '    source = "made up"\n'
FROZEN = "@dataclass(frozen=True, slots=True)\nclass MineConfig"
STATE = "@dataclass(frozen=True, slots=True)\nclass MineState(State)"
INIT = "def __init__(self, backbone, config, rng):\n        super().__init__()"
KEPT = "self.backbone, self.config = backbone, config"
GATE = "self.gate = nn.Parameter(torch.randn(backbone.width, generator=rng))"
REAL = "real = segment.mask"

METHOD = "    def flops"
FIELD = "    memory: Tensor  # [rows, 1, width]"


def method(text: str) -> str:
    """One more method, or an override."""
    return f"    {text}\n\n{METHOD}"


def also(text: str) -> str:
    """One more attribute of the class."""
    return f"{SOURCE}    {text}\n"


MISTAKES = (
    # The class.
    Mistake(
        "no Config",
        CONFIG,
        "",
        r"Mine\.Config must be a frozen dataclass, the class.*\(@dataclass\(frozen=True\)\), but it is None",
    ),
    Mistake(
        "Config is no dataclass",
        FROZEN,
        "class MineConfig",
        r"Mine\.Config must be a frozen dataclass, the class.*but it is the class MineConfig",
    ),
    Mistake(
        "Config is not frozen",
        FROZEN,
        "@dataclass\nclass MineConfig",
        r"Mine\.Config must be a frozen dataclass, the class.*it is the class MineConfig, which is not frozen",
    ),
    Mistake(
        "Config is an instance",
        CONFIG,
        "    Config = MineConfig()\n",
        r"Mine\.Config must be a frozen dataclass, the class.*but it is a MineConfig, which is not frozen",
    ),
    Mistake(
        "Config has a field without default",
        "    segment: int = 8\n",
        "    slots: int\n    segment: int = 8\n",
        r"build\(\) must make the model: its class has.*'slots'",
    ),
    Mistake(
        "Config holds what is no plain data",
        "gain: float = 1.0",
        "gain: torch.dtype = torch.float32",
        r"options of Mine\.Config must be plain data \(numbers,.*PydanticSchemaGenerationError.*dtype",
    ),
    Mistake(
        "no source", SOURCE, "", r"Mine\.source must say in a text where the method.*comes from, but it is '' \(str\)"
    ),
    Mistake(
        "source is a list",
        SOURCE,
        '    source = ["made up"]\n',
        r"Mine\.source must say in a text where the method.*comes from, but it is a list of 1",
    ),
    Mistake(
        "version is a text",
        SOURCE,
        also('version = "1.0"'),
        r"Mine\.version must be a whole number, at least 1,.*not '1\.0' \(str\)",
    ),
    Mistake(
        "version is zero",
        SOURCE,
        also("version = 0"),
        r"Mine\.version must be a whole number, at least 1,.*not 0 \(int\)",
    ),
    Mistake(
        "families is a text",
        SOURCE,
        also('families = "llama"'),
        r"Mine\.families must be a tuple of names among llama,.*gpt2, opt, not 'llama'",
    ),
    Mistake(
        "families has an unknown name",
        SOURCE,
        also('families = ("llama", "gpt-2")'),
        r"Mine\.families must be a tuple of names among llama,.*gpt2, opt, not \('llama', 'gpt-2'\)",
    ),
    Mistake(
        "families lacks the one it is built on",
        SOURCE,
        also('families = ("opt",)'),
        r"Mine was built on a llama backbone, a family it.*does not declare \(\('opt',\)\)",
    ),
    Mistake(
        "ablations is a list",
        SOURCE,
        also('ablations = ["without gain"]'),
        r"Mine\.ablations must map a title to changed options,.*\{'recall': False\}\}, but it is a list of 1",
    ),
    Mistake(
        "ablations change an option that is not there",
        SOURCE,
        also('ablations = {"off": {"gian": 0.0}}'),
        r"Mine\.ablations\['off'\] changes gian, but the options.*are gain, segment",
    ),
    Mistake(
        "frozen_backbone is a text",
        SOURCE,
        also('frozen_backbone = "no"'),
        r"Mine\.frozen_backbone must be True or False, not.*'no' \(str\)",
    ),
    Mistake(
        "unreached is a text",
        SOURCE,
        also('unreached = "gate"'),
        r"Mine\.unreached must be a tuple of beginnings of.*parameters' names, not 'gate' \(str\)",
    ),
    Mistake(
        "no step",
        "def step(",
        "def forward(",
        r"build\(\) must make the model: its class has.*method step",
    ),
    Mistake(
        "no open",
        "def open(",
        "def init_state(",
        r"build\(\) must make the model: its class has.*method open",
    ),
    Mistake(
        "no flops",
        "def flops(",
        "def cost(",
        r"build\(\) must make the model: its class has.*method flops",
    ),
    Mistake(
        "no subclass of MemoryModel",
        "class Mine(MemoryModel[MineState])",
        "class Mine(nn.Module)",
        r"build\(\) must return an instance of a subclass of.*memory_bench\.protocol\.MemoryModel, not a Mine",
    ),
    Mistake(
        "not even a module",
        "class Mine(MemoryModel[MineState])",
        "class Mine",
        r"build\(\) must return an instance of a subclass of.*memory_bench\.protocol\.MemoryModel, not a Mine",
    ),
    Mistake(
        "fit gives a dict",
        METHOD,
        method("@classmethod\n    def fit(cls, card, budget):\n        return {'segment': card.window}"),
        r"Mine\.fit\(card, budget\) must return an instance of.*Mine\.Config, not a dict of 1",
    ),
    Mistake(
        "fit is no class method",
        METHOD,
        method("def fit(self, card, budget):\n        return MineConfig()"),
        r"Mine\.fit must be callable as fit\(card, budget\), a.*budget\): missing a required argument: 'budget'",
    ),
    Mistake(
        "fit takes no budget",
        METHOD,
        method("@classmethod\n    def fit(cls, card):\n        return MineConfig()"),
        r"Mine\.fit must be callable as fit\(card, budget\), a.*fit\(card\): too many positional arguments",
    ),
    Mistake(
        "fit raises",
        METHOD,
        method("@classmethod\n    def fit(cls, card, budget):\n        return MineConfig(segment=card.windw)"),
        r"Mine\.fit\(card, budget\), a class method, must return.*no attribute 'windw' \(fit in mine\.py line 55\)",
    ),
    Mistake(
        "helpers is a list",
        METHOD,
        method("@classmethod\n    def helpers(cls, config):\n        return ['minilm']"),
        r"Mine\.helpers\(config\) must map names of helpers.*to what to choose instead, not \['minilm'\]",
    ),
    Mistake(
        "helpers names nobody",
        METHOD,
        method("@classmethod\n    def helpers(cls, config):\n        return {'mini-lm': 'x'}"),
        r"Mine\.helpers\(config\) must map names of helpers.*to what to choose instead, not \{'mini-lm': 'x'\}",
    ),
    # The constructor.
    Mistake(
        "the constructor takes no generator",
        "def __init__(self, backbone, config, rng):",
        "def __init__(self, backbone, config):\n        rng = torch.Generator().manual_seed(0)",
        r"build\(\) must make the model: its class has.*4 were given",
    ),
    Mistake(
        "the constructor takes one thing more",
        "config, rng):",
        "config, rng, device):",
        r"build\(\) must make the model: its class has.*'device'",
    ),
    Mistake(
        "the constructor does not call its base",
        "        super().__init__()\n",
        "",
        r"build\(\) must make the model: its class has.*call \(__init__ in mine\.py line 31\)",
    ),
    Mistake(
        "the constructor raises",
        GATE,
        GATE + "\n        self.scale = config.scale",
        r"build\(\) must make the model: its class has.*attribute 'scale' \(__init__ in mine\.py line 34\)",
    ),
    Mistake(
        "no backbone",
        KEPT,
        "self.lm, self.config = backbone, config",
        r"Mine\.backbone must be the Backbone the constructor.*its weights are told apart, but there is none",
    ),
    Mistake(
        "the backbone is hidden from the module",
        KEPT,
        "self.config = config\n        object.__setattr__(self, 'backbone', backbone)",
        r"Mine\.backbone must be the Backbone the constructor.*apart, but it is a Backbone beside the modules",
    ),
    Mistake(
        "the backbone is registered twice",
        KEPT,
        KEPT + "\n        self.lm = backbone",
        r"the backbone must be registered once, as.*would count and be saved as the method's own",
    ),
    Mistake(
        "the backbone's model is registered too",
        KEPT,
        KEPT + "\n        self.inner = backbone.model",
        r"the backbone must be registered once, as.*would count and be saved as the method's own",
    ),
    Mistake(
        "a copy of the backbone is kept",
        KEPT,
        KEPT + "\n        self.teacher = copy.deepcopy(backbone)",
        r"the backbone must be registered once, as.*would count and be saved as the method's own",
    ),
    Mistake(
        "the backbone is changed",
        KEPT,
        KEPT + "\n        with torch.no_grad():\n            next(backbone.parameters()).mul_(2)",
        r"the constructor of Mine must leave the backbone as.*but model\.model\.embed_tokens\.weight changed",
    ),
    Mistake(
        "drawn without the generator",
        "torch.randn(backbone.width, generator=rng)",
        "torch.randn(backbone.width)",
        r"building a model twice must give the same weights,.*\(or a backbone's weights were changed\)",
    ),
    Mistake(
        "the global random state is set",
        GATE,
        "torch.manual_seed(0)\n        " + GATE,
        r"building a model must not touch the global random.*state, but that of torch changed",
    ),
    Mistake(
        "no two builds are alike",
        "torch.randn(backbone.width, generator=rng)",
        "torch.randn(backbone.width, generator=torch.Generator().manual_seed(torch.seed() % 2**31))",
        r"building a model twice must give the same weights,.*\(or a backbone's weights were changed\)",
    ),
    Mistake(
        "parameters of another type",
        "torch.randn(backbone.width, generator=rng)",
        "torch.randn(backbone.width, generator=rng, dtype=torch.float64)",
        r"Mine\.gate must be on the backbone's device and of.*it with device=… and dtype=… of the backbone",
    ),
    Mistake(
        "no traits", TRAITS, "", r"Mine\.traits must be a Traits\(segment=…\), set in the.*constructor, but it is None"
    ),
    Mistake(
        "traits is a dict",
        TRAITS,
        "self.traits = {'segment': config.segment}",
        r"Mine\.traits must be a Traits\(segment=…\), set in the.*constructor, but it is a dict of 1",
    ),
    Mistake(
        "traits.segment is a float",
        TRAITS,
        "self.traits = Traits(segment=config.segment / 1)",
        r"traits\.segment must be a whole number of tokens.*from 1, or None, not 8\.0 \(float\)",
    ),
    Mistake(
        "traits.segment is zero",
        TRAITS,
        "self.traits = Traits(segment=0)",
        r"traits\.segment must be a whole number of tokens.*from 1, or None, not 0 \(int\)",
    ),
    Mistake(
        "traits.look_ahead is a flag",
        TRAITS,
        "self.traits = Traits(config.segment, look_ahead=True)",
        r"traits\.look_ahead must be a whole number of tokens.*from 0, not True \(bool\)",
    ),
    Mistake(
        "traits.look_ahead is negative",
        TRAITS,
        "self.traits = Traits(config.segment, look_ahead=-1)",
        r"traits\.look_ahead must be a whole number of tokens.*from 0, not -1 \(int\)",
    ),
    Mistake(
        "traits.bounded is a text",
        TRAITS,
        "self.traits = Traits(config.segment, bounded='yes')",
        r"traits\.bounded must be True or False, not 'yes'.*\(str\)",
    ),
    # The state.
    Mistake(
        "open takes no seeds",
        "def open(self, rows, *, seeds=None):",
        "def open(self, rows):",
        r"Mine\.open must be callable as open\(rows, \*,.*got an unexpected keyword argument 'seeds'",
    ),
    Mistake(
        "open takes nothing",
        "def open(self, rows, *, seeds=None):",
        "def open(self):\n        rows = 1",
        r"Mine\.open must be callable as open\(rows, \*,.*written open\(\): too many positional arguments",
    ),
    Mistake(
        "open gives None",
        "return MineState(memory)\n\n    def step",
        "return None\n\n    def step",
        r"Mine\.open\(2\) must return a State \(a frozen.*memory_bench\.protocol\.State\), but gave None",
    ),
    Mistake(
        "open gives a tensor",
        "return MineState(memory)\n\n    def step",
        "return memory\n\n    def step",
        r"Mine\.open\(2\) must return a State \(a frozen.*but gave a tensor \[2, 1, 32\] of float32",
    ),
    Mistake(
        "the state is no State",
        "class MineState(State)",
        "class MineState",
        r"Mine\.open\(2\) must return a State \(a frozen.*but gave a MineState",
    ),
    Mistake(
        "the state is no dataclass",
        STATE,
        "class MineState(State)",
        r"Mine\.open\(2\) must return a State, but it raised.*takes no arguments \(open in mine\.py line 37\)",
    ),
    Mistake(
        "the state is not frozen",
        STATE,
        "@dataclass\nclass MineState(State)",
        r"MineState, the state that Mine\.open\(2\) gave, must.*be a frozen dataclass: states are values",
    ),
    Mistake(
        "open gives one row",
        OPENED,
        OPENED.replace("rows, 1", "1, 1"),
        r"MineState\.memory must have the row as its first.*but it is a tensor \[1, 1, 32\] of float32",
    ),
    Mistake(
        "the state's rows come second",
        OPENED,
        OPENED.replace("rows, 1", "1, rows"),
        r"MineState\.memory must have the row as its first.*but it is a tensor \[1, 2, 32\] of float32",
    ),
    Mistake(
        "a tensor of the state has no axis",
        FIELD,
        FIELD + "\n    seen: Tensor = torch.tensor(0)",
        r"MineState\.seen must have the row as its first axis:.*Mine\.open\(2\), but it is a tensor \[\] of int64",
    ),
    Mistake(
        "a tensor is hidden in a dict of the state",
        FIELD,
        FIELD + "\n    more: dict = field(default_factory=lambda: {'seen': torch.zeros(2)})",
        r"MineState\.more is a dict of 1 with tensors or a.*and dataclasses, where their rows are found",
    ),
    Mistake(
        "a state begins as NaN",
        OPENED,
        OPENED + " * float('nan')",
        r"MineState\.memory from Mine\.open\(2\) must be finite.*is said by a mask\), but it has NaN or infinity",
    ),
    Mistake(
        "rows draw from one generator",
        OPENED,
        "memory = torch.randn(rows, 1, self.backbone.width, generator=torch.Generator().manual_seed(0))",
        r"a row must not depend on the rows beside it",
    ),
    # The step.
    Mistake(
        "step takes no write",
        "segment, *, write=True):",
        "segment):\n        write = True",
        r"Mine\.step must be callable as step\(state, segment,.*got an unexpected keyword argument 'write'",
    ),
    Mistake(
        "step takes write by place only",
        "segment, *, write=True):",
        "segment, write, /):",
        r"Mine\.step must be callable as step\(state, segment,.*write, /\): missing a required argument: 'write'",
    ),
    Mistake(
        "step gives the readout alone",
        WRITTEN,
        "return readout",
        r"Mine\.step of 2 rows and 8 tokens must return.*State\), two things, but it gave a Readout",
    ),
    Mistake(
        "step gives three things",
        WRITTEN,
        WRITTEN + ", None",
        r"Mine\.step of 2 rows and 8 tokens must return.*a tuple of 3 \(a Readout, a MineState, None\)",
    ),
    Mistake(
        "step gives the state first",
        WRITTEN,
        "return MineState(memory), readout",
        r"Mine\.step of 2 rows and 8 tokens must return.*it gave a tuple of 2 \(a MineState, a Readout\)",
    ),
    Mistake(
        "step gives logits",
        WRITTEN,
        "return self.backbone.head(hidden), MineState(memory)",
        r"Mine\.step of 2 rows and 8 tokens must return.*2 \(a tensor \[2, 8, 64\] of float32, a MineState\)",
    ),
    Mistake(
        "step gives nothing",
        WRITTEN,
        "readout, MineState(memory)",
        r"Mine\.step of 2 rows and 8 tokens must return.*\(Readout, State\), two things, but it gave None",
    ),
    Mistake(
        "step gives no state",
        WRITTEN,
        "return readout, memory",
        r"Mine\.step of 2 rows and 8 tokens must return a.*but gave a tensor \[2, 1, 32\] of float32",
    ),
    Mistake(
        "a peek gives None as its state",
        "return readout, state",
        "return readout, None",
        r"Mine\.step of 2 rows and 8 tokens \(write=False\) must.*memory_bench\.protocol\.State\), but gave None",
    ),
    Mistake(
        "step raises",
        REAL,
        "real = segment.attention_mask",
        r"Mine\.step of 2 rows and 8 tokens \(write=False\) must.*'attention_mask' \(step in mine\.py line 41\)",
    ),
    Mistake(
        "hidden lacks its rows",
        READOUT,
        "readout = Readout(hidden[0], self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*segment, but it is a tensor \[8, 32\] of float32",
    ),
    Mistake(
        "hidden is one token short",
        READOUT,
        "readout = Readout(hidden[:, 1:], self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*but it is a tensor \[2, 7, 32\] of float32",
    ),
    Mistake(
        "hidden still has the memory's position",
        ", text=text)[:, 1:]",
        ", text=text)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*but it is a tensor \[2, 9, 32\] of float32",
    ),
    Mistake(
        "hidden is transposed",
        READOUT,
        "readout = Readout(hidden.transpose(0, 1), self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*but it is a tensor \[8, 2, 32\] of float32",
    ),
    Mistake(
        "hidden has another width",
        READOUT,
        "readout = Readout(hidden[..., :-1], self.backbone.head)",
        r"Readout\.head of Mine\.step of 2 rows and 8 tokens.*shapes cannot be multiplied \(16x31 and 32x64\)",
    ),
    Mistake(
        "hidden is in float64",
        READOUT,
        "readout = Readout(hidden.double(), lambda h: self.backbone.head(h.float()))",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*cpu\), but it is a tensor \[2, 8, 32\] of float64",
    ),
    Mistake(
        "hidden is on another device",
        READOUT,
        "readout = Readout(hidden.to('meta'), self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*it is a tensor \[2, 8, 32\] of float32 on meta",
    ),
    Mistake(
        "hidden is a list",
        READOUT,
        "readout = Readout(hidden.tolist(), self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*token of the segment, but it is a list of 2",
    ),
    Mistake(
        "the head is missing",
        READOUT,
        "readout = Readout(hidden, None)",
        r"Readout\.head of Mine\.step of 2 rows and 8 tokens.*must map hidden states to logits, not None",
    ),
    Mistake(
        "the head gives another vocabulary",
        READOUT,
        "readout = Readout(hidden, lambda h: self.backbone.head(h)[..., :-1])",
        r"Readout\.head of Mine\.step of 2 rows and 8 tokens.*64\], but it gave a tensor \[2, 8, 63\] of float32",
    ),
    Mistake(
        "the head gives probabilities of the last token",
        READOUT,
        "readout = Readout(hidden, lambda h: self.backbone.head(h)[..., -1])",
        r"Readout\.head of Mine\.step of 2 rows and 8 tokens.*8, 64\], but it gave a tensor \[2, 8\] of float32",
    ),
    Mistake(
        "aux_loss is a number",
        READOUT,
        "readout = Readout(hidden, self.backbone.head, 0.5)",
        r"Readout\.aux_loss of Mine\.step of 2 rows and 8.*be None or a scalar tensor, not 0\.5 \(float\)",
    ),
    Mistake(
        "aux_loss has rows",
        READOUT,
        "readout = Readout(hidden, self.backbone.head, hidden.mean(dim=(1, 2)))",
        r"Readout\.aux_loss of Mine\.step of 2 rows and 8.*or a scalar tensor, not a tensor \[2\] of float32",
    ),
    Mistake(
        "predictions are NaN",
        READOUT,
        "readout = Readout(hidden / 0 * 0, self.backbone.head)",
        r"Readout\.hidden of Mine\.step of 2 rows and 8 tokens.*8, 32\] and finite, but it has NaN or infinity",
    ),
    Mistake(
        "the state becomes NaN",
        "memory = torch.where(",
        "memory = float('nan') * torch.where(",
        r"MineState\.memory from Mine\.step of 2 rows and 8.*is said by a mask\), but it has NaN or infinity",
    ),
    Mistake(
        "the state loses its rows",
        WRITTEN,
        "return readout, MineState(memory.mean(dim=0, keepdim=True))",
        r"MineState\.memory must have the row as its first.*but it is a tensor \[1, 1, 32\] of float32",
    ),
    Mistake(
        "the state loses its rows and is spread again",
        WRITTEN,
        "return readout, MineState(memory.mean(dim=0, keepdim=True).expand_as(memory))",
        r"a row must not depend on the rows beside it",
    ),
    Mistake(
        "the state's type drifts",
        WRITTEN,
        "return readout, MineState(memory.double())",
        r"Mine\.step of 2 rows and 8 tokens must keep the type.*torch\.float32, but made it torch\.float64",
    ),
    Mistake(
        "the state's type drifts and is taken back",
        WRITTEN,
        "return readout, MineState(memory.double())",
        r"Mine\.step of 2 rows and 8 tokens must keep the type.*torch\.float32, but made it torch\.float64",
        (("[state.memory, embeds]", "[state.memory.to(embeds), embeds]"),),
    ),
    Mistake(
        "the state is changed in place",
        "return readout, MineState(memory)",
        "state.memory.copy_(memory)\n        return readout, state",
        r"a peek must return the state it was given.*\(state\.memory\)",
    ),
    Mistake(
        "a peek writes",
        "        if not write:\n            return readout, state\n",
        "",
        r"Mine\.step of 2 rows and 8 tokens with write=False.*the state as it was, but state\.memory changed",
    ),
    Mistake(
        "memory stays on the module",
        REAL,
        "self.seen = getattr(self, 'seen', 0) + 1\n        " + REAL,
        r"a step must leave nothing on the module, but seen.*changed",
    ),
    Mistake(
        "a module is made in step",
        REAL,
        "self.extra = nn.Linear(2, 2)\n        " + REAL,
        r"a step must leave nothing on the module, but it.*made extra: make modules when built",
    ),
    Mistake(
        "a step draws global random numbers",
        REAL,
        "torch.rand(1)\n        " + REAL,
        r"a step must not touch the global random state, but.*that of torch changed",
    ),
    Mistake(
        "a step draws Python's random numbers",
        REAL,
        "random.random()\n        " + REAL,
        r"a step must not touch the global random state, but.*that of Python changed",
    ),
    Mistake(
        "padding is read",
        REAL,
        "real = torch.ones_like(segment.mask)",
        r"the ids of left padding must have no influence",
    ),
    Mistake(
        "padding is written",
        "real.any(dim=1)[:, None, None]",
        "real.new_ones(real.shape[0], 1, 1)",
        r"a row of nothing but padding must keep its memory",
    ),
    Mistake(
        "a step looks ahead",
        "embeds = self.backbone.embed(segment.ids)",
        "embeds = self.backbone.embed(segment.ids)\n"
        "        total = (embeds * real[..., None]).sum(1, keepdim=True)\n"
        "        embeds = embeds + total / real.sum(1).clamp(min=1)[:, None, None]",
        r"predictions depend on 7 tokens past the predicting.*position, but traits\.look_ahead says 0",
    ),
    Mistake(
        "a segment must be full",
        REAL,
        REAL + "\n        segment.ids.view(-1, self.config.segment)",
        r"Mine\.step of 2 rows and 4 tokens \(write=False\) must.*instead\. \(step in mine\.py line 42\)",
    ),
    Mistake(
        "no gradient reaches a parameter",
        GATE,
        GATE + "\n        self.idle = nn.Parameter(torch.zeros(3))",
        r"a training loss must reach every trained parameter.*no gradient reaches idle \(1 parameters in all\)",
    ),
    Mistake(
        "memory is detached",
        "self.gate * mean",
        "(self.gate * mean).detach()",
        r"a training loss must reach every trained parameter.*no gradient reaches gate \(1 parameters in all\)",
    ),
    Mistake(
        "a weight is kept beside the parameters",
        GATE,
        GATE + "\n        self.scale = self.gate.detach().clone()",
        r"The promise 'In bfloat16 the model runs, and its.*!= c10::BFloat16 \(step in mine\.py line 46\)",
        (("self.gate * mean", "self.scale * self.gate * mean"),),
    ),
    # What it says of itself.
    Mistake(
        "flops is a float",
        FLOPS,
        FLOPS + " / 1",
        r"Mine\.flops\(8, 0\) must be a whole number of.*\(multiply-add = 2\), but it is 329984\.0 \(float\)",
    ),
    Mistake(
        "flops is negative",
        FLOPS,
        FLOPS.replace("return ", "return -"),
        r"Mine\.flops\(8, 0\) must be a whole number of.*0 \(multiply-add = 2\), but it is -329984 \(int\)",
    ),
    Mistake(
        "flops is None",
        FLOPS,
        FLOPS.replace("return ", ""),
        r"Mine\.flops\(8, 0\) must be a whole number of.*from 0 \(multiply-add = 2\), but it is None",
    ),
    Mistake(
        "flops is a tensor",
        FLOPS,
        FLOPS.replace("return ", "return torch.tensor(") + ")",
        r"Mine\.flops\(8, 0\) must be a whole number of.*= 2\), but it is a tensor \[\] of int64",
    ),
    Mistake(
        "flops takes the state",
        "def flops(self, tokens, remembered):",
        "def flops(self, state, tokens, remembered):",
        r"Mine\.flops must be callable as flops\(tokens,.*missing a required argument: 'remembered'",
    ),
    Mistake(
        "flops forgets the memory's position",
        FLOPS,
        "return self.backbone.flops(tokens, keys=tokens)",
        r"flops\(8, 0\) says 294912, but 329984 were counted.*\(11% off\)",
    ),
    Mistake(
        "flops divides by what was read",
        FLOPS,
        FLOPS + " // remembered",
        r"Mine\.flops\(8, 0\) must be a whole number of.*or modulo by zero \(flops in mine\.py line 54\)",
    ),
    Mistake(
        "memory_parameters is a list",
        METHOD,
        method("def memory_parameters(self):\n        return [self.gate]"),
        r"Mine\.memory_parameters\(\) must be a dict of names to.*parameters, not a list of 1",
    ),
    Mistake(
        "memory_parameters has the backbone's",
        METHOD,
        method("def memory_parameters(self):\n        return dict(self.named_parameters())"),
        r"Mine\.memory_parameters\(\) must be the parameters.*backbone\.model\.model\.embed_tokens\.weight",
    ),
    Mistake(
        "memory_parameters lacks one",
        METHOD,
        method("def memory_parameters(self):\n        return {}"),
        r"Mine\.memory_parameters\(\) must be the parameters.*are not the backbone's, but it leaves out gate",
    ),
    Mistake(
        "added_parameters is a float",
        METHOD,
        method("def added_parameters(self):\n        return 32.0"),
        r"Mine\.added_parameters\(\) must be a whole number, 32.*or more, not 32\.0 \(float\)",
    ),
    Mistake(
        "absorb gives what step gives",
        METHOD,
        method("def absorb(self, state, segment):\n        return self.step(state, segment)"),
        r"Mine\.absorb\(state, segment\) must return a State \(a.*but gave a tuple of 2",
    ),
    Mistake(
        "absorb does nothing",
        METHOD,
        method("def absorb(self, state, segment):\n        return state"),
        r"absorb must give the state that step gives.*\(state\.memory\)",
    ),
    Mistake(
        "absorb_flops is a float",
        METHOD,
        method("def absorb_flops(self, tokens, remembered):\n        return 0.5"),
        r"Mine\.absorb_flops\(8, 0\) must be a whole number of.*0 \(multiply-add = 2\), but it is 0\.5 \(float\)",
    ),
    Mistake(
        "detached_flops is more than flops",
        METHOD,
        method("def detached_flops(self, tokens, remembered):\n        return 2 * self.flops(tokens, remembered)"),
        r"Mine\.detached_flops\(8, 0\) must not be more than.*flops, 329984, but it is 659968",
    ),
    Mistake(
        "decode gives a list",
        METHOD,
        method("def decode(self, state, prompt, plan):\n        return super().decode(state, prompt, plan).tolist()"),
        r"Mine\.decode of 2 rows must give the new tokens.*= \[2, 3\] int64, but it gave a list of 2",
    ),
    Mistake(
        "decode gives the prompt too",
        METHOD,
        method(
            "def decode(self, state, prompt, plan):\n"
            "        return torch.cat([prompt.ids, super().decode(state, prompt, plan)], dim=1)"
        ),
        r"Mine\.decode of 2 rows must give the new tokens.*3\] int64, but it gave a tensor \[2, 7\] of int64",
    ),
    Mistake(
        "decode gives floats",
        METHOD,
        method("def decode(self, state, prompt, plan):\n        return super().decode(state, prompt, plan).float()"),
        r"Mine\.decode of 2 rows must give the new tokens.*int64, but it gave a tensor \[2, 3\] of float32",
    ),
    Mistake(
        "decode gives other tokens",
        METHOD,
        method("def decode(self, state, prompt, plan):\n        return super().decode(state, prompt, plan).flip(1)"),
        r"decode must give the greedy continuation that.*rereading gives, \[\[",
    ),
    Mistake(
        "a state that grows is called bounded",
        WRITTEN,
        "return readout, MineState(memory, torch.cat([state.log, memory[:, 0]], dim=1))",
        r"a bounded state must stop growing, but it went from.*32896 to 65664 bytes",
        (
            (FIELD, FIELD + "\n    log: Tensor"),
            ("return MineState(memory)\n\n", "return MineState(memory, memory[:, 0, :0])\n\n"),
        ),
    ),
    Mistake(
        "chunk_invariant is said and not so",
        TRAITS,
        "self.traits = Traits(config.segment, chunk_invariant=True)",
        r"pieces of 1 tokens must give the same predictions.*\(traits\.chunk_invariant\)",
    ),
    Mistake(
        "expected_retention is a text",
        METHOD,
        method("def expected_retention(self, tokens):\n        return 'half'"),
        r"Mine\.expected_retention\(0\) must be None or a share.*from 0 to 1, not 'half' \(str\)",
    ),
)
