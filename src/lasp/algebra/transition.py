"""Transitions: the map by which a run of tokens transforms the state that enters it.

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

from dataclasses import dataclass
from math import inf
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
        """All tensors stored, in the order of the fields."""
        return tuple(self.__dict__.values())

    def __getitem__(self: _Kind, index: int | slice) -> _Kind:
        """The transition at `index` of the leading axis."""
        return type(self)(*(tensor[index] for tensor in self.tensors()))

    @classmethod
    def identity(cls: type[_Kind], state: Tensor) -> _Kind:
        """The transition of an empty run, for states like `state`."""
        raise NotImplementedError

    @classmethod
    def zero(cls: type[_Kind], state: Tensor) -> _Kind:
        """The transition of a run that forgets what enters it, a NaN too, for states like `state`."""
        raise NotImplementedError

    def forgettable(self, state: Tensor) -> Transition:
        """The same map in a kind that also has a zero."""
        return self


# A decay of zero, a logarithm of -inf, forgets: selected, not multiplied, because 0 * NaN is NaN.


def _decayed(log_decay: Tensor, state: Tensor) -> Tensor:
    return torch.where(log_decay == -torch.inf, 0.0, log_decay.exp() * state)


def _sum(late: Tensor, early: Tensor) -> Tensor:
    forgets = (late == -torch.inf) | (early == -torch.inf)
    return torch.where(forgets, -torch.inf, late + early)


def _remembers(matrix: Tensor) -> Tensor:
    return matrix.any(dim=(-2, -1), keepdim=True)


def _forgotten(remembers: Tensor, product: Tensor) -> Tensor:
    """A product, in which NaN is zero where a matrix is that remembers nothing. Else it is kept, for its gradient."""
    return torch.where(remembers, product, product.nan_to_num(0.0, inf, -inf))


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

    def __getitem__(self, index: int | slice) -> Identity:
        return self

    @classmethod
    def identity(cls, state: Tensor) -> Identity:
        return cls()

    def forgettable(self, state: Tensor) -> Scalar:
        return Scalar.identity(state)


@dataclass(frozen=True)
class Scalar(Transition):
    """One decay per head: S -> exp(log_decay) S, log_decay [...]."""

    log_decay: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return _decayed(self.log_decay[..., None, None], state)

    def compose(self, early: Scalar) -> Scalar:
        return Scalar(_sum(self.log_decay, early.log_decay))

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...]:
        return tuple(state_shape[:-2])

    @classmethod
    def identity(cls, state: Tensor) -> Scalar:
        return cls(state.new_zeros(state.shape[:-2]))

    @classmethod
    def zero(cls, state: Tensor) -> Scalar:
        return cls(state.new_full(state.shape[:-2], -torch.inf))


@dataclass(frozen=True)
class Diagonal(Transition):
    """One decay per key channel: S -> diag(exp(log_decay)) S, log_decay [..., K]."""

    log_decay: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return _decayed(self.log_decay[..., None], state)

    def compose(self, early: Diagonal) -> Diagonal:
        return Diagonal(_sum(self.log_decay, early.log_decay))

    @staticmethod
    def tail_shape(state_shape: torch.Size) -> tuple[int, ...]:
        return tuple(state_shape[:-1])

    @classmethod
    def identity(cls, state: Tensor) -> Diagonal:
        return cls(state.new_zeros(state.shape[:-1]))

    @classmethod
    def zero(cls, state: Tensor) -> Diagonal:
        return cls(state.new_full(state.shape[:-1], -torch.inf))


@dataclass(frozen=True)
class Dense(Transition):
    """A matrix over the key channels: S -> matrix S, matrix [..., K, K].

    It mixes the rows of the state, so only a slice along V evolves on its own.
    """

    sliceable: ClassVar[tuple[str, ...]] = ("V",)
    matrix: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return _forgotten(_remembers(self.matrix), self.matrix @ state)

    def compose(self, early: Dense) -> Dense:
        return Dense(_forgotten(_remembers(self.matrix) & _remembers(early.matrix), self.matrix @ early.matrix))

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

    @classmethod
    def zero(cls, state: Tensor) -> Dense:
        return cls(state.new_zeros(*state.shape[:-1], state.shape[-2]))
