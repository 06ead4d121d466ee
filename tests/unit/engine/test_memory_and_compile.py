"""Memory for work, and what a compiler sees: the same numbers, and graphs without a break."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ii_dist.config import (
    ConfigError,
    DataFacts,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    make_plan,
)
from ii_dist.engine import Engine, EngineParts, make_engine
from ii_dist.models import create_model

CLASSES, SIDE, BATCH = 5, 32, 4
NETWORKS = ("ini_resnet20", "ini_preresnet20", "ini_resnet18")


@dataclass(frozen=True)
class Images:
    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    weight_N: torch.Tensor
    partner_labels_N: torch.Tensor | None = None
    label_share_N: torch.Tensor | None = None


def images(step: int) -> list[Images]:
    g = torch.Generator().manual_seed(step)
    images_NCHW = torch.randn(BATCH, 3, SIDE, SIDE, generator=g)
    return [Images(images_NCHW, torch.randint(CLASSES, (BATCH,), generator=g), torch.ones(BATCH))]


def network(name: str, gate: str = "fold3x3") -> nn.Module:
    torch.manual_seed(0)
    # Of a block that begins as the identity the first gradients would be zeros: nothing to compare.
    return create_model(ModelConfig(network=name, gate=gate, drop_path=0.2, zero_init_last=False), CLASSES)


def build(model: nn.Module, shards: int = 0, **engine: object) -> Engine:
    cfg = RunConfig(
        name="x",
        engine=EngineConfig.model_validate({"device": "cpu", **engine}),
        optim=OptimConfig(lr=0.05, lr_reference_batch=0, warmup_epochs=0),
        runtime=RuntimeConfig(canonical_shards=shards),
        train=TrainConfig(global_batch=BATCH, epochs=2),
    )
    plan = make_plan(cfg, 1, DataFacts(4 * BATCH, 8, CLASSES))
    return make_engine(model, EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, image_size=SIDE))


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes of the activations that forward passes keep for backward passes, each storage once."""
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            alive.append(tensor)  # its address stays its own
            seen[storage.data_ptr()] = storage.nbytes()
            total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


@pytest.mark.parametrize("shards", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_activations_change_no_bit_of_a_step(name: str, shards: int) -> None:
    """Gradients, weights, momentum, and running statistics, which count each micro-batch once."""
    engines = [build(network(name), shards, checkpoint_activations=on) for on in (False, True)]
    for step in range(2):
        one, two = (engine.train_step(images(step)) for engine in engines)
        assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = (engine.state().whole() for engine in engines)
    assert any("num_batches" in key for key in first)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_activations_keep_less(name: str) -> None:
    found = []
    for on in (False, True):
        model = network(name).train()
        model.set_grad_checkpointing(on)  # type: ignore[operator]
        with kept_bytes() as total:
            model(images(0)[0].images_NCHW)
        found.append(total[0] - sum(p.untyped_storage().nbytes() for p in model.parameters()))
    assert found[1] < 0.45 * found[0]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint_activations true: Sequential has no blocks for it; use false"):
        build(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), checkpoint_activations=True)


def test_sync_batchnorm_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="sync_batchnorm true: torch has it for GPUs only"):
        build(network("ini_resnet20"), sync_batchnorm=True)
    with pytest.raises(ConfigError, match=r"engine\.sync_batchnorm true: torch has it for GPUs only"):
        build(network("ini_resnet20"), sync_batchnorm=True, device="auto")


@pytest.mark.parametrize("gate", ["fold3x3", "se"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiler_sees_one_graph_without_a_break(name: str, gate: str, checkpointed: bool) -> None:
    model = network(name, gate).train()
    model.set_grad_checkpointing(checkpointed)  # type: ignore[operator]
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(images(0)[0].images_NCHW)
    assert explained.break_reasons == []
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_break_would_be_counted() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum().item() > 0 else x - 1

    assert torch._dynamo.explain(Breaks())(torch.ones(2)).graph_break_count > 0
