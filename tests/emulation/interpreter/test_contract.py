"""Tests that every backend passes, on the interpreted kernels: those that no case of ``test_kernels`` stands for."""

from tests.kernels.test_attention import (  # noqa: F401
    test_against_loops,
    test_d_out_of_any_strides,
    test_dropout_drops_the_same_elements,
    test_empty_batch_and_no_tokens,
    test_gradient_of_one_output,
    test_infinite_scores_as_in_plain_attention,
    test_nan_does_not_cross_packed_sequences,
    test_nan_in_padding_gradients_stays_there,
    test_nan_of_a_real_key_reaches_gradients,
    test_nan_of_one_padding_token_stays_there,
    test_packed_equals_one_by_one,
)
from tests.kernels.test_pieces import test_a_piece_without_keys  # noqa: F401
