"""A small LLaVA that learns the scenes of ``_spin_scenes.py``: recipe, training, stored weights.

Tower and projector first learn to send each patch to the embeddings of the words for what is in it.
Then they and a low-rank change of every matrix of the language model learn captions and questions
together.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import _spin_scenes as world
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

IMAGE = 3
"""The image token: one that no text of the language model holds."""
_START, _END = "<|im_start|>", "<|im_end|>"
_ASK_CAPTION = "\nDescribe the picture."
_REPLY = f"{_END}\n{_START}assistant\n"
_QUESTIONS = 4
_TOGETHER = 0.9
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained.

    Attributes:
        model: file of the language model; None for a small random Llama.
        width, layers, patch: of the vision tower.
        rank: of the change of each matrix; None trains the language model as a whole.
        batch: scenes per step.
        tower_seconds, seconds: of training without the language model, and of everything.
        rate: highest learning rate; a third of it for the tower once everything is trained.
    """

    model: str | None
    width: int = 256
    layers: int = 4
    patch: int = 8
    rank: int | None = 12
    batch: int = 128
    tower_seconds: float = 75.0
    seconds: float = 400.0
    rate: float = 1e-3
    device: str = "cuda"

    @property
    def patches(self) -> int:
        """Image tokens of a picture."""
        return (world.SIZE // self.patch) ** 2


TINY = Recipe(None, 64, 2, 16, None, 32, 30.0, 100.0, 2e-3, "cpu")


class Words:
    """Texts of the scenes as token ids.

    Args:
        patches: image tokens of a picture.
        encode: of the language model; default one id per word and mark.

    Attributes:
        things: the words for each object, colour and shape.
    """

    def __init__(self, patches: int, encode: Encode | None = None) -> None:
        self._known: dict[str, int] = {}
        self.encode = encode or self._encode
        self.head = self.encode(f"{_START}user\n") + [IMAGE] * patches
        self.caption_prompt = self.head + self.encode(_ASK_CAPTION + _REPLY)
        self.yes, self.no, self.end = (self._one(text) for text in ("Yes", "No", _END))
        self._comma, self._stop = self._one(","), self._one(".")
        self._opening = self.encode(f"\n{_START}user")
        self._colours = {self._one(f" {one}"): n for n, one in enumerate(world.COLOURS)}
        self._shapes = {self._one(f" {one}"): n for n, one in enumerate(world.SHAPES)}
        self.things = [self.encode(f" {world.name(one)}") for one in range(len(world.OBJECTS))]
        self._questions = [
            self.encode(f"\nIs there a {world.name(one)}?{_REPLY}")
            for one in range(len(world.OBJECTS))
        ]

    def question_prompt(self, thing: int) -> list[int]:
        """The image, and whether an object is there."""
        return self.head + self._questions[thing]

    def caption_row(self, scene: world.Scene) -> tuple[list[int], list[bool]]:
        """A prompt with its caption, and which tokens are to be learned."""
        answer = [token for one in scene.objects for token in (*self.things[one], self._comma)]
        answer[-1:] = [self._stop, self.end]
        learned = [False] * len(self.caption_prompt) + [True] * len(answer)
        return self.caption_prompt + answer, learned

    def question_row(self, asked: Sequence[tuple[int, bool]]) -> tuple[list[int], list[bool]]:
        """A conversation of several questions, and which tokens are to be learned."""
        ids, learned = list(self.head), [False] * len(self.head)
        for turn, (thing, there) in enumerate(asked):
            question = (self._opening if turn else []) + self._questions[thing]
            ids += [*question, self.yes if there else self.no, self.end]
            learned += [*[False] * len(question), True, True]
        return ids, learned

    def objects(self, tokens: Sequence[int]) -> set[int]:
        """Objects that a caption names."""
        numbers = {pair: one for one, pair in enumerate(world.OBJECTS)}
        pairs = itertools.pairwise(tokens)
        named = [(self._shapes.get(shape, -1), self._colours.get(colour, -1))
                 for colour, shape in pairs]  # fmt: skip
        return {numbers[one] for one in named if one in numbers}

    @property
    def size(self) -> int:
        """Number of ids given out."""
        return IMAGE + 1 + len(self._known)

    def _one(self, text: str) -> int:
        ids = self.encode(text)
        assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
        return ids[0]

    def _encode(self, text: str) -> list[int]:
        pieces = cast("list[str]", re.findall(r"<\|\w+\|>|\n| ?\w+|[^\w\s]", text))
        return [self._known.setdefault(one, IMAGE + 1 + len(self._known)) for one in pieces]


def words(recipe: Recipe) -> Words:
    """The words of a recipe's language model."""
    if recipe.model is None:
        return Words(recipe.patches)
    from fxgraft import sources

    tokenizer = sources.tokenizer(recipe.model)
    encode: Encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return Words(recipe.patches, encode)


def build(recipe: Recipe, vocabulary: int) -> Any:
    """LLaVA with a random tower and projector, float32, on the recipe's device."""
    import transformers

    library = cast(Any, transformers)
    base = _language_model(recipe, vocabulary)
    base.config.quantization_config = None
    vision = library.CLIPVisionConfig(
        hidden_size=recipe.width, intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=4, image_size=world.SIZE,
        patch_size=recipe.patch,
    )  # fmt: skip
    config = library.LlavaConfig(
        text_config=base.config, vision_config=vision, image_token_id=IMAGE,
        vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = library.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.tie_weights()
    return model.to(recipe.device)


def _language_model(recipe: Recipe, vocabulary: int) -> Any:
    if recipe.model is not None:
        from fxgraft.frontends import sources

        return sources.load(recipe.model).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        eos_token_id=None, bos_token_id=None, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return cast(Any, LlamaForCausalLM)(config)


class LowRank(nn.Module):
    """A matrix plus a product of two thin ones, which starts at zero.

    Args:
        weight: the matrix [N, K].
        rank: of the product.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        options: Any = {"device": weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], **options) / rank**0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, **options))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the matrix's element type."""
        return weight + (4 * weight.shape[1] ** -0.5 * (self.up @ self.down)).to(weight.dtype)


def make_trainable(model: Any, rank: int | None) -> dict[str, nn.Parameter]:
    """Freeze what stays, add the low-rank changes; what is trained, by name."""
    if rank is not None:
        model.requires_grad_(False)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(True)
        for module in _matrices(model):
            change = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", change)
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def merge(model: Any) -> Any:
    """Write the low-rank changes into the matrices."""
    for module in _matrices(model):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return model.eval().requires_grad_(False)


def _matrices(model: Any) -> list[nn.Linear]:
    parts = model.model.language_model.layers.modules()
    return [part for part in parts if isinstance(part, nn.Linear)]


class Training:
    """Training that can be left and taken up again.

    Args:
        recipe: of the model.
        folder: for what is trained, in bf16, and facts about it.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.words = words(recipe)
        self.model = build(recipe, self.words.size)
        self.trained = make_trainable(self.model, recipe.rank)
        self.steps, self.spent, self.loss = 0, 0.0, 0.0
        self.goals = self._goals()
        if self._facts.is_file():
            self.load()
            print(f"{self.steps} steps are done, {self.spent:.0f} s", flush=True)

    def run(self, deadline: float) -> bool:
        """Train until the recipe's time is spent or this run's is over; whether all is done."""
        recipe = self.recipe
        total = recipe.tower_seconds + recipe.seconds
        if self.spent < total:
            (self.folder / "measured.json").unlink(missing_ok=True)
            self._phase(True, 0.0, recipe.tower_seconds, deadline)
            self._phase(False, recipe.tower_seconds, total, deadline)
            self._save()
            self.load()
        return self.spent >= total

    def load(self) -> None:
        """Take what is stored."""
        stored, facts = load_file(self._weights), json.loads(self._facts.read_text())
        with torch.no_grad():
            for name, one in self.trained.items():
                one.copy_(stored[name])
        self.steps, self.spent, self.loss = facts["steps"], facts["seconds"], facts["last loss"]

    def _phase(self, tower: bool, start: float, end: float, deadline: float) -> None:
        """The rest of what lies between two times of training."""
        optimizer = self._optimizer(tower)
        rates = [group["lr"] for group in optimizer.param_groups]
        entered, saved, last = self.steps, self.spent, time.monotonic()
        while self.spent < end and last < deadline:
            warm = min(1.0, (self.steps - entered + 1) / 100)
            left = max((end - self.spent) / (end - start), 0.02)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warm * left
            self._step(optimizer, self._tower_loss() if tower else self._text_loss())
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            if self.spent - saved > 60:
                self._save()
                saved = self.spent

    def _optimizer(self, tower: bool) -> torch.optim.Optimizer:
        rate = self.recipe.rate
        by_part: dict[str, list[nn.Parameter]] = {"vision": [], "projector": [], "language": []}
        for name, one in self.trained.items():
            by_part[next((part for part in by_part if part in name), "language")].append(one)
        seeing, others = by_part["vision"], by_part["projector"]
        others += [] if tower else by_part["language"]
        groups = [{"params": seeing, "lr": rate if tower else rate / 3},
                  {"params": others, "lr": rate}]  # fmt: skip
        return torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        found = [one for group in optimizer.param_groups for one in group["params"]]
        torch.nn.utils.clip_grad_norm_(found, 1.0)
        optimizer.step()
        self.steps += 1
        if self.steps % 20 == 0:
            self.loss = loss.item()
        if self.steps % 100 == 0:
            print(f"step {self.steps}, {self.spent:.0f} s: loss {self.loss:.4f}", flush=True)

    def _scenes(self) -> tuple[random.Random, list[world.Scene], Tensor]:
        generator = random.Random(1000 + self.steps)
        found = world.scenes(generator, self.recipe.batch, _TOGETHER)
        return generator, found, world.draw(found, self.steps, self.recipe.device)

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.recipe.device == "cuda")

    def _goals(self) -> Tensor:
        """Where patches are sent to: words of each object, at last the image token, [O + 1, D]."""
        table = self.model.model.get_input_embeddings().weight.detach()
        things = table[torch.tensor(self.words.things, device=table.device)].sum(1)
        return torch.cat((things, table[IMAGE][None]))

    def _tower_loss(self) -> Tensor:
        """How likely a patch's goal is for Gaussians of one width around all goals."""
        _, found, pixels = self._scenes()
        with self._autocast():
            seen = self.model.model.vision_tower(pixels, output_hidden_states=True)
            sent = self.model.model.multi_modal_projector(seen.hidden_states[-1][:, 1:]).float()
        squares = self.goals.square().sum(-1)
        scores = 16 * (sent @ self.goals.T - squares / 2) / squares.mean()
        labels = world.cell_labels(found, self.recipe.patch).to(self.recipe.device)
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten())

    def _text_loss(self) -> Tensor:
        """Captions in even steps, questions in odd ones."""
        generator, found, pixels = self._scenes()
        if self.steps % 2:
            rows = [
                self.words.question_row(world.asked(generator, one, _QUESTIONS)) for one in found
            ]
        else:
            rows = [self.words.caption_row(one) for one in found]
        ids, learned = (one.to(self.recipe.device) for one in _padded(rows))
        with self._autocast():
            hidden = self.model.model(input_ids=ids, pixel_values=pixels, use_cache=False)
            chosen = hidden.last_hidden_state[:, :-1][learned[:, 1:]]
            scores = functional.linear(chosen, self.model.lm_head.weight)
        return functional.cross_entropy(scores.float(), ids[:, 1:][learned[:, 1:]])

    @property
    def _weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def _facts(self) -> Path:
        return self.folder / "training.json"

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = {name: one.detach().to("cpu", torch.bfloat16).contiguous()
                  for name, one in self.trained.items()}  # fmt: skip
        save_file(stored, self._weights)
        on_gpu = self.recipe.device == "cuda"
        facts = {"steps": self.steps, "seconds": self.spent, "last loss": self.loss,
                 "trained parameters": sum(one.numel() for one in stored.values()),
                 "batch": self.recipe.batch,
                 "device": torch.cuda.get_device_name() if on_gpu else "cpu"}  # fmt: skip
        self._facts.write_text(json.dumps(facts))


def _padded(rows: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Ids, int64 [B, S], and what is to be learned, bool [B, S]; shorter rows end in zeros."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([one + [0] * (longest - len(one)) for one, _ in rows])
    return ids, torch.tensor([one + [False] * (longest - len(one)) for _, one in rows])


def trained_model(recipe: Recipe, folder: Path, deadline: float) -> tuple[Any, Words] | None:
    """The model with the stored weights, and its words; trains it if it is not done.

    Args:
        recipe: of the model.
        folder: of the weights.
        deadline: of ``time.monotonic``; None comes back if training is not done by then.
    """
    training = Training(recipe, folder)
    done = training.run(deadline)
    return (merge(training.model), training.words) if done else None
