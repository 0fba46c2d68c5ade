"""This package holds the operators of torch: dense, padded and packed calls, their fakes, gradients
and transforms."""
