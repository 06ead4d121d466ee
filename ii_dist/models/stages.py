"""What a network of stem and stages owes timm: features of each stage, pruning, gradient checkpointing.

In: a network that says what its stem and its last norm are. Out: timm's `forward_features`, `forward_intermediates` and
`prune_intermediate_layers`, for any number of stages (timm's ResNet has four).
"""

from typing import Any

from torch import Tensor, nn

from ii_dist.models.compat import checkpoint_seq, feature_take_indices


class StagedNet(nn.Module):
    """Stem, stages `layer1` .. `layerN`, last norm. `feature_info` lists the stem and then the stages."""

    feature_info: list[dict[str, Any]]
    grad_checkpointing: bool
    num_features: int
    head_hidden_size: int

    def forward_stem(self, x_NCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_norm(self, x_NCHW: Tensor) -> Tensor:
        """What follows the last stage; nothing, unless the network says otherwise."""
        return x_NCHW

    def drop_norm(self) -> None:
        """Make `forward_norm` do nothing."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(str(tap["module"]) for tap in self.feature_info[1:])

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        x = self.forward_stem(x_NCHW)
        for name in self.stage_names:
            x = self._stage(name, x)
        return self.forward_norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of the stem and of each stage at `indices`, and the last one; arguments as timm's.

        norm: apply the last norm, where there is one, to the last stage's output among the intermediates too.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        names = self.stage_names[:last] if stop_early else self.stage_names
        x = self.forward_stem(x)
        taken = {0: x}
        for index, name in enumerate(names, start=1):
            x = taken[index] = self._stage(name, x)
        if complete := len(names) == len(self.stage_names):
            x = self.forward_norm(x)
        if norm and complete:
            taken[len(names)] = x
        features = [taken[index] for index in sorted(taken) if index in wanted]
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and the head; arguments as timm's."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        for name in self.stage_names[last:]:
            setattr(self, name, nn.Sequential())
        cut = last < len(self.stage_names)
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_norm:
            self.drop_norm()
        if cut or prune_head:
            self.reset_classifier(0, "")
        return list(wanted)

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        y: Tensor = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return y
