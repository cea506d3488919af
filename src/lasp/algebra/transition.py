"""How a run of tokens transforms the state that enters it.

Every causal linear recurrence is S_t = A_t S_{t-1} + B_t on a state S of shape [..., K, V]. The product of the
A_t of a run is its *transition*. The kinds differ only in what they store:

    Identity   nothing                 no decay
    Scalar     log_decay [...]         one decay per head
    Diagonal   log_decay [..., K]      one decay per key channel
    Dense      matrix    [..., K, K]   delta rules

Decays are held as natural logarithms, in the state's dtype: products of many decays become sums, which neither
overflow nor lose the small ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

_Kind = TypeVar("_Kind", bound="Transition")


@dataclass(frozen=True)
class Transition:
    """A linear map on states [..., K, V]; see the subclasses."""

    # The state's dims along which a slice of the state evolves on its own, so that it may be sent in parts.
    sliceable: ClassVar[tuple[str, ...]] = ("K", "V")

    def apply(self, state: Tensor) -> Tensor:
        """The state after the run, were the run to add nothing. [..., K, V] -> [..., K, V]."""
        raise NotImplementedError

    def compose(self: _Kind, early: _Kind) -> _Kind:
        """This transition after `early`."""
        raise NotImplementedError

    def adjoint(self: _Kind) -> _Kind:
        """The transposed map, which carries a gradient from the end of the run to its start."""
        return self

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...] | None:
        """The shape of what is stored for a state of the given shape; None where nothing is."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __getitem__(self: _Kind, index: int) -> _Kind:
        """The transition at `index` of the leading axis."""
        return type(self)(*(tensor[index] for tensor in self.tensors()))

    @classmethod
    def identity(cls: type[_Kind], state: Tensor) -> _Kind:
        """The transition of an empty run, for states like `state`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Transition):
    """No decay: the state is carried as it is."""

    def apply(self, state: Tensor) -> Tensor:
        return state

    def compose(self, early: Identity) -> Identity:
        return self

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> None:
        return None

    def __getitem__(self, index: int) -> Identity:
        return self

    @classmethod
    def identity(cls, state: Tensor) -> Identity:
        return cls()


@dataclass(frozen=True)
class Scalar(Transition):
    """One decay per head: S -> exp(log_decay) S, log_decay [...]."""

    log_decay: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.log_decay.exp()[..., None, None] * state

    def compose(self, early: Scalar) -> Scalar:
        return Scalar(self.log_decay + early.log_decay)

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...]:
        return tuple(state_shape[:-2])

    @classmethod
    def identity(cls, state: Tensor) -> Scalar:
        return cls(state.new_zeros(state.shape[:-2]))


@dataclass(frozen=True)
class Diagonal(Transition):
    """One decay per key channel: S -> diag(exp(log_decay)) S, log_decay [..., K]."""

    log_decay: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.log_decay.exp()[..., None] * state

    def compose(self, early: Diagonal) -> Diagonal:
        return Diagonal(self.log_decay + early.log_decay)

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...]:
        return tuple(state_shape[:-1])

    @classmethod
    def identity(cls, state: Tensor) -> Diagonal:
        return cls(state.new_zeros(state.shape[:-1]))


@dataclass(frozen=True)
class Dense(Transition):
    """A matrix over the key channels: S -> matrix S, matrix [..., K, K].

    It mixes the rows of the state, so only a slice along V evolves on its own.
    """

    sliceable: ClassVar[tuple[str, ...]] = ("V",)
    matrix: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.matrix @ state

    def compose(self, early: Dense) -> Dense:
        return Dense(self.matrix @ early.matrix)

    def adjoint(self) -> Dense:
        return Dense(self.matrix.mT)

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...]:
        return (*state_shape[:-1], state_shape[-2])

    @classmethod
    def identity(cls, state: Tensor) -> Dense:
        size = state.shape[-2]
        eye = torch.eye(size, dtype=state.dtype, device=state.device)
        return cls(eye.expand(*state.shape[:-2], size, size))
