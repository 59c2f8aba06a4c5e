"""Read base models from their files: headers, weights, experts, tokenizers."""
