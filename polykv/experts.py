"""Mixtures of experts: how many of a layer's experts a token chooses, seen while a model runs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        count: how many there are.
        n_chosen: how many a token chooses.
        n_parameters: of all of them.
    """

    count: int
    n_chosen: int
    n_parameters: int

    def n_used(self, n_tokens: Any) -> Any:
        """Parameters of the experts that at least one of `n_tokens` (a number or an array) chooses, on average.

        Choices are taken to be independent and even. Independent but uneven ones use fewer experts.
        """
        return self.n_parameters * (1 - (1 - self.n_chosen / self.count) ** n_tokens)


def watch(model: nn.Module) -> list[Experts]:
    """A list to which the next forward pass adds the experts of each layer, without shared ones.

    Seen are modules named `experts` whose parameters have a row per expert and whose second argument is the indices of
    those chosen, (..., chosen per token), as in transformers.
    """
    found: list[Experts] = []

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        rows = {parameter.shape[0] for parameter in module.parameters()}
        chosen = arguments[1] if len(arguments) > 1 else None
        if len(rows) == 1 and isinstance(chosen, Tensor) and not chosen.is_floating_point():
            n_parameters = sum(parameter.numel() for parameter in module.parameters())
            found.append(Experts(rows.pop(), chosen.shape[-1], n_parameters))

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            module.register_forward_pre_hook(see)
    return found
