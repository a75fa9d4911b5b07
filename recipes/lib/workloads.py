"""What the benchmarks train: models, synthetic batches of their shape, and one training step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lib.models import build_model, excluded_pattern, init_and_scale
from lib.presets import PRESETS, Config
from specscale import NormScaler, apply_norm_scaling

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}

Batch = tuple[Tensor, Tensor]
"""Inputs and labels."""


@dataclass(frozen=True)
class Workload:
    """Training of one model on images."""

    config: Config
    """The preset's name, the model, the batch size, the learning rate, autocast, memory format and seed."""
    image_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 100
    optimizer: str = "adam"
    fused: bool = False
    """Whether the optimizer's step is fused."""
    micro_batches: int = 1
    """The parts of a batch whose gradients are added up, so that a large batch fits in memory."""

    @property
    def name(self) -> str:
        return self.config.preset

    def model(self) -> nn.Module:
        return build_model(self.config, self.image_shape, self.num_classes)

    def build(self, device: torch.device) -> nn.Module:
        """The model after the scaled orthogonal init, not under a norm constraint."""
        torch.manual_seed(self.config.seed)
        with torch.device(device):
            model = self.model()
        init_and_scale(self.config, "none", model, self.image_shape)
        return model.to(memory_format=torch.channels_last) if self.config.channels_last else model

    def scale(self, model: nn.Module, norm: str, solver: str = "block") -> NormScaler:
        """Put such a model under a norm constraint, on the norms of its init."""
        return apply_norm_scaling(model, norm, solver=solver, exclude=excluded_pattern(model))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        options = {"fused": True} if self.fused else {}
        return OPTIMIZERS[self.optimizer](model.parameters(), lr=self.config.lr, **options)

    def batches(self, device: torch.device, seed: int = 0) -> Iterator[Batch]:
        """Endless synthetic batches."""
        generator = torch.Generator(device).manual_seed(seed)
        while True:
            yield self.draw(generator)

    def draw(self, generator: torch.Generator) -> Batch:
        """Coarse noise in pixels, labeled by a fixed random linear classifier: there is something to learn."""
        channels, height, width = self.image_shape
        size, device = (self.config.batch_size, channels, height // 4, width // 4), generator.device
        coarse = torch.randn(size, generator=generator, device=device)
        images = nn.functional.interpolate(coarse, scale_factor=4.0)
        images = images + 0.5 * torch.randn(images.shape, generator=generator, device=device)
        teacher = torch.Generator(device).manual_seed(1)
        classes = torch.randn(coarse[0].numel(), self.num_classes, generator=teacher, device=device)
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=memory_format), (coarse.flatten(1) @ classes).argmax(1)

    def train_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        optimizer.zero_grad()
        for inputs, labels in zip(*(part.chunk(self.micro_batches) for part in batch), strict=True):
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.amp):
                output = model(inputs)
            loss = nn.functional.cross_entropy(output.flatten(0, -2).float(), labels.flatten())
            (loss / self.micro_batches).backward()
        optimizer.step()


@dataclass(frozen=True)
class GPTSizes:
    """The sizes of a GPT."""

    num_blocks: int = 24
    width: int = 2048
    num_heads: int = 16
    num_tokens: int = 2048
    vocabulary: int = 32768


@dataclass(frozen=True)
class GPTWorkload(Workload):
    """Training of a GPT on random tokens; the batch size counts sequences."""

    sizes: GPTSizes = field(default_factory=GPTSizes)

    def model(self) -> nn.Module:
        return GPT(self.sizes)

    def draw(self, generator: torch.Generator) -> Batch:
        size = (self.config.batch_size, self.sizes.num_tokens + 1)
        tokens = torch.randint(self.sizes.vocabulary, size, generator=generator, device=generator.device)
        return tokens[:, :-1], tokens[:, 1:]


class GPTBlock(nn.Module):
    """Causal attention with fused query, key and value, and an MLP four times as wide."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        attended = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        x = x + self.projection(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A plain decoder: token and position embeddings, blocks, and a head of its own."""

    def __init__(self, sizes: GPTSizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.num_tokens, sizes.width)
        self.blocks = nn.Sequential(*(GPTBlock(sizes.width, sizes.num_heads) for _ in range(sizes.num_blocks)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(position))))


def vit_b() -> Workload:
    """timm's ViT-B at 224 x 224."""
    config = Config(preset="vit-b", model="vit_base_patch16_224", targets="channels", batch_size=128, lr=3e-4)
    return Workload(config, (3, 224, 224), 1000)


def gpt_24x2048() -> Workload:
    """24 blocks, 2048 wide, 65536 tokens in a step."""
    return GPTWorkload(Config(preset="gpt-24x2048", targets="channels", batch_size=32, lr=3e-4), micro_batches=8)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    **{name: lambda name=name: Workload(PRESETS[name]()) for name in ("mlp-5x2000", "mlp-7x4000")},
    **{name: lambda name=name: Workload(PRESETS[name]()) for name in ("resnet34", "resnet50")},
    "vit-b": vit_b,
    "gpt-24x2048": gpt_24x2048,
}
"""The workloads by name."""


def tiny(workload: Workload) -> Workload:
    """A workload of the same kind that takes milliseconds on a CPU."""
    config = replace(workload.config, batch_size=4, width=80, depth=3)
    if isinstance(workload, GPTWorkload):
        return replace(workload, config=config, sizes=GPTSizes(1, 48, 4, 16, 90), micro_batches=2)
    if config.model == "mlp":
        return replace(workload, config=config)
    if config.model.startswith("resnet"):
        return replace(workload, config=replace(config, model="resnet18-quarter"))
    return replace(workload, config=replace(config, model="test_vit"), image_shape=(3, 32, 32))
