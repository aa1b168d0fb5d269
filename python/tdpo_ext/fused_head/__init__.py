"""The fused head: from hidden states and heads to statistics and loss, without [N, V] logits.

A head is the last layer of a language model, W [V, H] and an optional bias. A tile is the logits of
some tokens over some vocabulary entries. A record is what is kept of one token while tiles come and
go: running maxima and sums, and the label's logits.

Cost is counted in units of 2 N V H operations, one matrix product, for the N tokens that are not
ignored. Forward makes a tile of policy logits and one of reference logits, adds both to the records
of their tokens, and forgets them: 2 units. With the gradient of the policy's logits, dz, two more
products give the gradients dh = dz W and dW = dz^T h. There are three paths to them:

    recompute    backward makes tiles once more, those that a token's upstream gradients need:
                 TDPO1 2 + 1 + 2 = 5 units, TDPO2 2 + 1.5 + 2 = 5.5, any gradients 2 + 2 + 2 = 6;
                 divergences and entropies too, for any gradients
    direction    for a frozen head: forward makes dh from whole rows of logits, except for a factor
                 that all tokens of a sequence share, the upstream gradient of log p(y):
                 2 + 1 = 3 units
    whole pairs  forward keeps what dh and dW need of all tokens of a pair (their logits, or dz but
                 for that factor) until the pair's loss is known: 2 + 2 = 4 units

Half-width operands are not cast on CUDA. There the kernel rounds dz to their type as it stores it,
in memory beside the float32 logits. So whole rows of logits exist for one group of tokens at a
time, and dz for several groups: those of whole pairs, or as many as fit.

    functional.py         the public functions: checks, and the choice of a path
    ops.py                the ops for torch.library, and an autograd.Function for each path
    problem.py            both heads, the labels and the memory limit; the gradient of a tile
    quantities.py         what is computed of each token: statistics, or divergences as well
    forward.py            computes it
    backward.py           recompute
    forward_gradients.py  direction and whole pairs
    pairs.py              the derivative of the loss for whole pairs
    head.py, products.py  logits from hidden states, gradients back; all matrix products
    tiles.py              the sizes of tiles, and memory for them

See docs/fused-head.md.
"""
