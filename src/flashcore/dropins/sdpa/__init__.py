"""This package holds the drop-in for torch.nn.functional.scaled_dot_product_attention."""
