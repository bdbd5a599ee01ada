"""Tests that every backend passes, on the executed kernels: those that no case of ``test_kernels`` stands for."""

from tests.kernels.test_attention import (  # noqa: F401
    test_against_loops,
    test_capacity_larger_than_used,
    test_d_out_of_any_strides,
    test_deterministic,
    test_dropout_drops_the_same_elements,
    test_dropout_rate,
    test_empty_batch_and_no_tokens,
    test_gradient_of_one_output,
    test_infinite_scores_as_in_plain_attention,
    test_nan_and_inf_of_real_tokens_propagate,
    test_nan_does_not_cross_packed_sequences,
    test_nan_in_padding_gradients_stays_there,
    test_nan_of_a_real_key_reaches_gradients,
    test_nan_of_one_padding_token_stays_there,
    test_outputs_are_contiguous_and_own_memory,
    test_packed_equals_one_by_one,
    test_scores_of_ten_thousand,
)
from tests.kernels.test_pieces import test_a_piece_without_keys  # noqa: F401
