"""From hidden states and the weights of a head: the statistics and the loss, without logits."""
