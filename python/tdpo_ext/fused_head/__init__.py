"""From hidden states and the weights of a head: the statistics and the loss, without logits.

One GEMM unit is 2 N V H operations, of the N tokens that are kept. Forward makes a tile of policy
logits and one of reference logits, adds both to the records of their rows, and forgets them: 2
units. The gradient of the policy's logits, dz, gives two more products, dh = dz W and dW = dz^T h.
Three ways to them:

    recompute   tiles are made anew in backward, those that a row's upstream gradients need:
                TDPO1 2 + 1 + 2 = 5 units, TDPO2 2 + 1.5 + 2 = 5.5, any gradients 2 + 2 + 2 = 6
    direction   frozen head: dh up to the pair's scalar, in forward, from whole rows: 2 + 1 = 3
    whole pairs dz of all tokens of a pair exists at once, or what it is up to the pair's scalar,
                and the scalar is known before the products: 2 + 2 = 4

On CUDA half-width operands stay as they are. dz is rounded to their type as the kernel stores it,
beside the float32 logits, which whole rows have only in groups.

See docs/fused-head.md.
"""
