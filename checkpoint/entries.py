"""One array of ours and the tensors of a checkpoint that it is made of; tables list these."""

import dataclasses
import math

import numpy as np

PARAMS, ROUTER_BIAS = "params", "router_bias"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of ours: the grid of tensors stacked in it, and how each of them is laid out."""

    tree: str
    """PARAMS or ROUTER_BIAS."""
    path: str
    """Place in that tree, keys joined by '/'."""
    names: np.ndarray
    """Tensor names, an array of strings whose shape is the array's leading (stacked) axes."""
    out_dims: tuple[int, ...]
    """Factors of the tensor's first axis."""
    in_dims: tuple[int, ...] | None
    """Factors of its second axis; (): a vector; None: used as stored, with shape out_dims."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in a checkpoint."""
        if self.in_dims is None:
            return self.out_dims
        if not self.in_dims:
            return (math.prod(self.out_dims),)
        return math.prod(self.out_dims), math.prod(self.in_dims)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return (*self.names.shape, *(self.in_dims or ()), *self.out_dims)

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor in our layout."""
        if self.in_dims is None:
            return tensor
        return np.ascontiguousarray(tensor.T).reshape(*self.in_dims, *self.out_dims)

    def store(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `load`."""
        if self.in_dims is None:
            return array
        return np.ascontiguousarray(array.reshape(self.stored_shape[::-1]).T)
