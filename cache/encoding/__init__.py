"""How probabilities and logits become integers that compress well."""
