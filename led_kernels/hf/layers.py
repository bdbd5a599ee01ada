"""What the fused layers of LED's encoder and decoder share."""

from __future__ import annotations

from torch import Tensor, nn


class FusedLayer(nn.Module):
    """The second half of a layer, by the names that transformers' layers give to its modules."""

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, length, d_model]`` to the same, with residual and norm."""
        expanded = self._dropout(self.activation_fn(self.fc1(hidden_states)), self.activation_dropout)
        contracted = self._dropout(self.fc2(expanded), self.dropout)
        return self.final_layer_norm(hidden_states + contracted)

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(x, p=p, training=self.training)
